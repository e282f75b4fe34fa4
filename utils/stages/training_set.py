"""From what the flags of stage 2 choose to the set that networks are trained on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from utils.compute import distributed
from utils.core.errors import UserError
from utils.data.datasets import RealData
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet, as_parts, check_factor
from utils.exchange.convert import read_distilled
from utils.outliers.sources import (
    OutlierSource,
    PseudoOutliers,
    corrupted,
    initial_outliers,
    k_center_outliers,
    load_outlier_pool,
    with_corrupted_again,
    with_fresh,
)
from utils.runs.lineage import TRAINED_ON, Found
from utils.settings.arguments import Stage2Settings
from utils.training.coresets import check_ipc, coreset, random_images, whole_set


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
    factor: int = 1  # the set is decoded; stored images held factor × factor of its own

    def ipc(self, num_classes: int) -> int:
        """Stored images per class, rounded down, at least 1."""
        return max(1, len(self.synthetic.images) // (num_classes * self.factor**2))


def labelled_images(
    s: Stage2Settings, real: RealData, stage1: Callable[[], Found], feature_network: Callable[[], nn.Module]
) -> TrainingSet:
    """The images and labels that the settings choose, and the outliers that are stored with them.

    Args:
        stage1: finds the `res_….pt` of stage 1; feature_network: a network on the whole training set, for coresets.
    Raises:
        UserError: when there is no such set, or it does not fit the data or `ipc`.
    """
    if s.distilled:
        return _foreign(s, real)
    if s.train_on == "distilled":
        path, note = stage1()
        lines = (f"distilled set: {path}, experiment {s.exp_idx}", *([note] if note else []))
        stored = DistilledFile.open(path).set(s.exp_idx, real)
        return TrainingSet(stored.decoded(), (*lines, *in_words(stored)), path, path.parent, stored.factor)
    if s.train_on == "whole":
        line = f"baseline: the whole training set, {len(real.images_train)} images"
        return TrainingSet(whole_set(real), (line,))
    check_factor(s.factor, real.im_size, "--factor")
    ipc = s.ipc * s.factor**2
    check_ipc(real, ipc)
    if s.train_on == "random":
        images, how = random_images(real, ipc, s.seed, s.exp_idx), "at random"
    else:
        made = coreset(s.train_on, real, ipc, feature_network()) if distributed.is_main() else None
        images, how = distributed.from_main(made), f"by {s.train_on}"
    shrunk = replace(images, images=as_parts(images.images, s.factor))
    parts = f", shrunk to the parts of {s.ipc}" if s.factor > 1 else ""
    return TrainingSet(shrunk, (f"baseline: {ipc} real images per class{parts}, chosen {how}",), factor=s.factor)


def in_words(stored: SyntheticSet) -> tuple[str, ...]:
    """A line on the parts of stored images, if they hold several."""
    parts = stored.factor**2
    return (f"images of {parts} parts: networks train on {parts * len(stored.images)}",) if parts > 1 else ()


def _foreign(s: Stage2Settings, real: RealData) -> TrainingSet:
    """The set of `--distilled`."""
    found = read_distilled(s.distilled, real, s, s.exp_idx, s.distilled_oe or ())
    sizes = (len(found.synthetic.images), found.stored)
    if s.ipc is not None and s.ipc * real.num_classes not in sizes:
        raise UserError(
            f"--ipc {s.ipc}: {s.distilled[0]} has {len(found.synthetic.images)} images of "
            f"{real.num_classes} classes once decoded; leave --ipc out"
        )
    return TrainingSet(found.synthetic, found.lines)


def with_outliers(
    s: Stage2Settings, chosen: TrainingSet, real: RealData, feature_network: Callable[[], nn.Module]
) -> TrainingSet:
    """The chosen set with the outliers of `--outliers`, and no others.

    Args:
        feature_network: a network on the images of the set, for k-center.
    Raises:
        UserError: when the set has no distilled outliers and they are wanted.
    """
    if s.outliers in ("corrupt", "real"):
        return with_fresh_outliers(s, chosen, real)
    stored = with_stored_outliers(s, chosen, real, feature_network)
    return with_outliers_corrupted_again(s, stored, real) if s.corrupt_again else stored


def with_stored_outliers(
    s: Stage2Settings, chosen: TrainingSet, real: RealData, feature_network: Callable[[], nn.Module]
) -> TrainingSet:
    """The chosen set with outliers that stay the same, or without any; see `with_outliers`."""
    kind, synthetic = s.outliers, chosen.synthetic
    per_slot = (s.ipc or chosen.ipc(real.num_classes)) * chosen.factor**2
    if kind == "none":
        return replace(chosen, synthetic=synthetic.without_outliers())
    if kind == "distilled":
        if synthetic.images_oe is None:
            where = f"--distilled: {s.distilled[0]}" if s.distilled else f"--folder: {chosen.path}"
            raise UserError(
                f"{where} holds no outliers. Give a set of main_oe.py or main_poe.py (--is_load_oe looks only there), "
                "choose others with --outliers, or use train_model_synthetic_no_oe.py"
            )
        return chosen
    source = outlier_source(s, real)
    if kind == "initial":
        initial = initial_outliers(source, per_slot, s.seed, s.exp_idx).cpu()
        made, how = replace(synthetic, images_oe=initial), "as distillation begins"
    else:
        how = "chosen by k-center"
        net = feature_network() if distributed.is_main() else None
        chosen_oe = net and k_center_outliers(source, per_slot, net, s.seed, together=True).cpu()
        made = replace(synthetic, images_oe=distributed.from_main(chosen_oe))
    made = replace(made, images_oe=as_parts(made.images_oe, chosen.factor))
    line = f"outliers, not distilled: {len(made.images_oe)} {_named(s)}, {how}"
    return replace(chosen, synthetic=made, lines=(*chosen.lines, line), path=None)


def with_fresh_outliers(s: Stage2Settings, chosen: TrainingSet, real: RealData) -> TrainingSet:
    """The chosen set with outliers that are new in every epoch."""
    if s.outliers == "corrupt":
        source = corrupted(chosen.synthetic.images, real, s.corruptions, s.mix_corruptions)
        what = "the images of the set, corrupted"
    else:
        source, what = outlier_source(s, real), f"{_named(s)}; no distilled set, but an upper bound"
    line = f"outliers, new in every epoch: {what}"
    synthetic = with_fresh(chosen.synthetic, source)
    return replace(chosen, synthetic=synthetic, lines=(*chosen.lines, line))


def with_outliers_corrupted_again(s: Stage2Settings, chosen: TrainingSet, real: RealData) -> TrainingSet:
    """The chosen set whose outliers are corrupted once more in every epoch."""
    synthetic = with_corrupted_again(chosen.synthetic, real, s.corruptions, s.mix_corruptions)
    line = "outliers, new in every epoch: these, corrupted again"
    return replace(chosen, synthetic=synthetic, lines=(*chosen.lines, line))


def outlier_source(s: Stage2Settings, real: RealData) -> OutlierSource:
    """Where outliers that are not distilled come from."""
    if s.oe_data_path is None:
        return PseudoOutliers(real, s.corruptions, s.mix_corruptions)
    return load_outlier_pool(s.oe_data_path, real, s.num_oe_per_class, s.seed, s.download == "all")


def _named(s: Stage2Settings) -> str:
    return "corrupted real images" if s.oe_data_path is None else f"images of {s.oe_data_path}"


def stored_set(s: Stage2Settings, path: Path, real: RealData) -> TrainingSet:
    """The set of an earlier run, for its resumption: from the file that holds it, with the outliers of `--outliers`."""
    exp_idx = 0 if path.name == TRAINED_ON else s.exp_idx
    chosen = TrainingSet(DistilledFile.open(path).set(exp_idx, real).decoded(), path=path)
    if s.outliers in ("corrupt", "real"):
        return with_fresh_outliers(s, chosen, real)
    if s.outliers == "none":
        return replace(chosen, synthetic=chosen.synthetic.without_outliers())
    return with_outliers_corrupted_again(s, chosen, real) if s.corrupt_again else chosen


def is_stored(s: Stage2Settings, chosen: TrainingSet) -> bool:
    """Whether to write the set beside the networks: no file of stage 1 holds it, and it is not the whole set."""
    return chosen.path is None and s.train_on != "whole"


def pool_fingerprint(synthetic: SyntheticSet) -> str | None:
    """Fingerprint of the pool that outliers are drawn from in every epoch, if there is one."""
    return None if synthetic.fresh_oe is None else synthetic.fresh_oe.source.fingerprint()
