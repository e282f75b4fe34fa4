"""From what the flags of stage 2 choose to the set that networks are trained on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from utils.compute import distributed
from utils.core.errors import UserError
from utils.data.datasets import RealData
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet
from utils.exchange.convert import Assumptions, read_distilled
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS
from utils.outliers.not_distilled import corrupted, with_corrupted_again, with_fresh, with_initial, with_k_center
from utils.outliers.sources import OutlierSource, PseudoOutliers, load_outlier_pool
from utils.runs.lineage import TRAINED_ON, Found
from utils.training.coresets import check_ipc, coreset, random_images
from utils.training.features import whole_set


@dataclass(frozen=True)
class Choice:
    """What the flags choose.

    `train_on`: one of `TRAIN_ON`; `outliers`: one of `OUTLIERS`; `ipc`: None for that of the set; `exp_idx`: which
    experiment; `distilled`, `distilled_oe`: paths of a set of any repository. The source of outliers that are not
    distilled: `corruptions`, one for each class or `mixed`, or the pool `oe_data_path` of which each class slot gets
    `num_oe_per_class`. `again`: whether stored outliers are corrupted once more in every epoch.
    """

    train_on: str
    outliers: str
    ipc: int | None
    seed: int
    exp_idx: int = 0
    distilled: tuple[str, ...] = ()
    distilled_oe: tuple[str, ...] = ()
    assumed: Assumptions = field(default_factory=Assumptions)
    corruptions: tuple[str, ...] = DEFAULT_CORRUPTIONS
    mixed: bool = False
    oe_data_path: str | None = None
    num_oe_per_class: int = 10000
    download: bool = False
    again: bool = False


@dataclass(frozen=True)
class TrainingSet:
    """A set to train on.

    `lines`: what the log says of it; `path`: the `res_….pt` that holds it, if one does; `origin`: the run of stage 1
    that its images are from, if there is one.
    """

    synthetic: SyntheticSet
    lines: tuple[str, ...] = ()
    path: Path | None = None
    origin: Path | None = None

    def ipc(self, num_classes: int) -> int:
        """Images per class, rounded down, at least 1."""
        return max(1, len(self.synthetic.images) // num_classes)


def labelled_images(
    choice: Choice, real: RealData, stage1: Callable[[], Found], feature_network: Callable[[], nn.Module]
) -> TrainingSet:
    """The images and labels of a choice, and the outliers that are stored with them.

    Args:
        stage1: finds the `res_….pt` of stage 1; feature_network: a network on the whole training set, for coresets.
    Raises:
        UserError: when there is no such set, or it does not fit the data or `ipc`.
    """
    if choice.distilled:
        return _foreign(choice, real)
    if choice.train_on == "distilled":
        path, note = stage1()
        lines = (f"distilled set: {path}, experiment {choice.exp_idx}", *([note] if note else []))
        return TrainingSet(DistilledFile.open(path).set(choice.exp_idx, real), lines, path, path.parent)
    if choice.train_on == "whole":
        line = f"baseline: the whole training set, {len(real.images_train)} images"
        return TrainingSet(whole_set(real), (line,))
    if choice.train_on == "random":
        images, how = random_images(real, choice.ipc, choice.seed, choice.exp_idx), "at random"
    else:
        check_ipc(real, choice.ipc)
        made = coreset(choice.train_on, real, choice.ipc, feature_network()) if distributed.is_main() else None
        images, how = distributed.from_main(made), f"by {choice.train_on}"
    return TrainingSet(images, (f"baseline: {choice.ipc} real images per class, chosen {how}",))


def _foreign(choice: Choice, real: RealData) -> TrainingSet:
    """The set of `--distilled`."""
    found = read_distilled(choice.distilled, real, choice.assumed, choice.exp_idx, choice.distilled_oe)
    if choice.ipc is not None and len(found.synthetic.images) != choice.ipc * real.num_classes:
        raise UserError(
            f"--ipc {choice.ipc}: {choice.distilled[0]} has {len(found.synthetic.images)} images of "
            f"{real.num_classes} classes once decoded; leave --ipc out"
        )
    return TrainingSet(found.synthetic, found.lines)


def with_outliers(
    choice: Choice, chosen: TrainingSet, real: RealData, feature_network: Callable[[], nn.Module]
) -> TrainingSet:
    """The chosen set with the outliers of the choice, and no others.

    Args:
        feature_network: a network on the images of the set, for k-center.
    Raises:
        UserError: when the set has no distilled outliers and they are wanted.
    """
    if choice.outliers in ("corrupt", "real"):
        return with_fresh_outliers(choice, chosen, real)
    stored = with_stored_outliers(choice, chosen, real, feature_network)
    return with_outliers_corrupted_again(choice, stored, real) if choice.again else stored


def with_stored_outliers(
    choice: Choice, chosen: TrainingSet, real: RealData, feature_network: Callable[[], nn.Module]
) -> TrainingSet:
    """The chosen set with outliers that stay the same, or without any; see `with_outliers`."""
    kind, synthetic = choice.outliers, chosen.synthetic
    ipc = choice.ipc or chosen.ipc(real.num_classes)
    if kind == "none":
        return replace(chosen, synthetic=synthetic.without_outliers())
    if kind == "distilled":
        if synthetic.images_oe is None:
            where = f"--distilled: {choice.distilled[0]}" if choice.distilled else f"--folder: {chosen.path}"
            raise UserError(
                f"{where} holds no outliers. Give a set of main_oe.py or main_poe.py (--is_load_oe looks only there), "
                "choose others with --outliers, or use train_model_synthetic_no_oe.py"
            )
        return chosen
    source = outlier_source(choice, real)
    if kind == "initial":
        made, how = with_initial(synthetic, source, real, ipc, choice.seed, choice.exp_idx), "as distillation begins"
    else:
        how = "chosen by k-center"
        net = feature_network() if distributed.is_main() else None
        made = distributed.from_main(
            with_k_center(synthetic, source, real, ipc, choice.seed, net) if net is not None else None
        )
    line = f"outliers, not distilled: {len(made.images_oe)} {_named(choice)}, {how}"
    return replace(chosen, synthetic=made, lines=(*chosen.lines, line), path=None)


def with_fresh_outliers(choice: Choice, chosen: TrainingSet, real: RealData) -> TrainingSet:
    """The chosen set with outliers that are made anew in every epoch."""
    if choice.outliers == "corrupt":
        source = corrupted(chosen.synthetic.images, real, choice.corruptions, choice.mixed)
        what = "the images of the set, corrupted"
    else:
        source, what = outlier_source(choice, real), f"{_named(choice)}; no distilled set, but an upper bound"
    line = f"outliers, anew in every epoch: {what}"
    synthetic = with_fresh(chosen.synthetic, source, real.num_classes)
    return replace(chosen, synthetic=synthetic, lines=(*chosen.lines, line))


def with_outliers_corrupted_again(choice: Choice, chosen: TrainingSet, real: RealData) -> TrainingSet:
    """The chosen set whose outliers are corrupted once more, anew in every epoch."""
    synthetic = with_corrupted_again(chosen.synthetic, real, choice.corruptions, choice.mixed)
    line = "outliers, anew in every epoch: these, corrupted again"
    return replace(chosen, synthetic=synthetic, lines=(*chosen.lines, line))


def outlier_source(choice: Choice, real: RealData) -> OutlierSource:
    """Where outliers that are not distilled come from."""
    if choice.oe_data_path is None:
        return PseudoOutliers(real, choice.corruptions, choice.mixed)
    return load_outlier_pool(choice.oe_data_path, real, choice.num_oe_per_class, choice.seed, choice.download)


def _named(choice: Choice) -> str:
    return "corrupted real images" if choice.oe_data_path is None else f"images of {choice.oe_data_path}"


def stored_set(choice: Choice, path: Path, real: RealData) -> TrainingSet:
    """The set of an earlier run, for its resumption: from the file that holds it, with the outliers of the choice."""
    exp_idx = 0 if path.name == TRAINED_ON else choice.exp_idx
    chosen = TrainingSet(DistilledFile.open(path).set(exp_idx, real), path=path)
    if choice.outliers in ("corrupt", "real"):
        return with_fresh_outliers(choice, chosen, real)
    if choice.outliers == "none":
        return replace(chosen, synthetic=chosen.synthetic.without_outliers())
    return with_outliers_corrupted_again(choice, chosen, real) if choice.again else chosen


def is_stored(choice: Choice, chosen: TrainingSet) -> bool:
    """Whether to write the set beside the networks: no file of stage 1 holds it, and it is not the whole set."""
    return chosen.path is None and choice.train_on != "whole"


def pool_fingerprint(synthetic: SyntheticSet) -> str | None:
    """Fingerprint of the pool that outliers are drawn from in every epoch, if there is one."""
    return None if synthetic.fresh_oe is None else synthetic.fresh_oe.source.fingerprint()
