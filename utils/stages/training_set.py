"""From what the flags of stage 2 choose to the set that networks are trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.compute import distributed
from utils.core.errors import UserError, require
from utils.core.torch_files import read_pt
from utils.data.datasets import RealData
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import as_parts, check_factor
from utils.exchange.convert import TrainingSet, read_distilled
from utils.outliers.sources import (
    OutlierSource,
    PseudoOutliers,
    corrupted,
    initial_outliers,
    k_center_outliers,
    load_outlier_pool,
    with_fresh,
)
from utils.runs.lineage import TRAINED_ON, args_or_nothing
from utils.settings.arguments import Stage2Settings
from utils.training.coresets import check_ipc, coreset, random_images, whole_set

OUTLIERS = "outliers.pt"  # in a folder of stage 2: those that are stored beside the whole training set


def labelled_images(
    s: Stage2Settings, real: RealData, stage1: Callable[[], tuple[Path, str]], feature_network: Callable[[], nn.Module]
) -> TrainingSet:
    """The images and labels that the settings choose, and the outliers that are stored with them.

    `stage1` finds the `res_….pt` of stage 1; `feature_network` gives a network on the whole training set, for coresets.
    """
    if s.distilled:
        found = read_distilled(s.distilled, real, s, s.exp_idx, s.distilled_oe or ())
        what = f"{s.distilled[0]} has {found.stored} images of {real.num_classes} classes"
        require(s.ipc is None or s.ipc * real.num_classes == found.stored, f"--ipc {s.ipc}: {what}; leave --ipc out")
        return found
    if s.train_on == "distilled":
        path, note = stage1()
        file = DistilledFile.open(path)
        stored = file.set(s.exp_idx, real)
        lines = [f"distilled set: {path}, experiment {s.exp_idx}", note, file.unfinished_note(s.exp_idx)]
        parts, read = stored.factor**2, (args_or_nothing(path.parent).get("inputs") or {}).get("data_path")
        if read and read != real.fingerprint():
            lines.append(f"{path.parent} was distilled from other data than those of --data_path")
        if file.normalisation().space is None:
            lines.append("it does not say how its images are normalised: by the statistics of --dataset, it is assumed")
        if parts > 1:
            lines.append(f"each of its images holds {parts} parts, and networks train on these")
        return TrainingSet(stored, tuple(filter(None, lines)), path.parent, stored.factor)
    if s.train_on == "whole":
        line = f"baseline: the whole training set, {len(real.images_train)} images"
        return TrainingSet(whole_set(real), (line,))
    check_factor(s.factor, real.im_size, "--factor")
    ipc = s.ipc * s.factor**2
    check_ipc(real, s.ipc, s.factor)
    if s.train_on == "random":
        images, how = random_images(real, ipc, s.seed, s.exp_idx), "at random"
    else:
        made = coreset(s.train_on, real, ipc, feature_network()) if distributed.is_main() else None
        images, how = distributed.from_main(made), f"by {s.train_on}"
    shrunk = replace(images, images=_as_stored(images.images, s.factor, real))
    parts = f", shrunk to the parts of {s.ipc}" if s.factor > 1 else ""
    return TrainingSet(shrunk, (f"baseline: {ipc} real images per class{parts}, chosen {how}",), factor=s.factor)


def _as_stored(images: Tensor, factor: int, real: RealData) -> Tensor:
    """Images, sorted by class, as they look once they were stored in parts; whitened ones are shrunk as pixels.

    Each class fills its images itself, as in a distillation: parts at a border may be cut.
    """
    if factor > 1 and real.zca is not None:
        pixels = real.denormalize(images.to(real.device))
        return real.normalize(_as_stored(pixels, factor, replace(real, zca=None))).to(images.device)
    return torch.cat([as_parts(of_class, factor) for of_class in images.chunk(real.num_classes)])


def with_outliers(
    s: Stage2Settings, chosen: TrainingSet, real: RealData, feature_network: Callable[[], nn.Module]
) -> TrainingSet:
    """The chosen set with the outliers of `--outliers`, and no others.

    `feature_network` gives a network on the images of the set, for k-center.
    """
    synthetic = chosen.synthetic
    if s.outliers == "distilled" and synthetic.images_oe is None:
        where = f"--distilled: {s.distilled[0]}" if s.distilled else f"--folder: {chosen.origin}"
        raise UserError(
            f"{where} holds no outliers. Give a set of main_oe.py or main_poe.py (--is_load_oe looks only there), "
            "choose others with --outliers, or use train_model_synthetic_no_oe.py"
        )
    if s.outliers in ("initial", "kcenter"):
        source, per_slot = outlier_source(s, real), (s.ipc or chosen.ipc(real.num_classes)) * chosen.factor**2
        if s.outliers == "initial":
            images, how = initial_outliers(source, per_slot, s.seed, s.exp_idx).cpu(), _start_of(s, chosen, source)
            is_other = chosen.origin and how == "random"
            chosen = replace(chosen, start="random, not those that distilling began with" if is_other else "")
        else:
            net, how = feature_network() if distributed.is_main() else None, "chosen by k-center"
            found = net and k_center_outliers(source, per_slot, net, s.seed, together=True).cpu()
            images = distributed.from_main(found)
        made = replace(synthetic.decoded(), images_oe=_as_stored(images, chosen.factor, real))
        line = f"outliers, not distilled: {len(made.images_oe)} {_named(s)}, {how}"
        chosen = chosen.changed(made, line, source.notice)
    return with_new_outliers(s, chosen, real)


def _start_of(s: Stage2Settings, chosen: TrainingSet, source: OutlierSource) -> str:
    """Whether random outliers of `source` are those that the distillation of a set began with, as its run says."""
    if chosen.origin is None:
        return "random"
    about = args_or_nothing(chosen.origin)
    script, flags = about.get("script"), about.get("flags", {})
    pool = (about.get("inputs") or {}).get("oe_data_path")
    if script == "main.py":
        return "random; the distillation had none"
    of_kind, wanted = "main_oe.py", {"init": "real", "init_oe": "random", "load_path": None, "seed": s.seed}
    if s.oe_data_path is None:
        of_kind = "main_poe.py"
        wanted |= {"corruptions": list(s.corruptions), "mix_corruptions": s.mix_corruptions}
    same = script in (None, of_kind) and all(flags.get(name, value) == value for name, value in wanted.items())
    return "as distillation begins" if same and (not pool or pool == source.fingerprint()) else "random"


def with_new_outliers(s: Stage2Settings, chosen: TrainingSet, real: RealData) -> TrainingSet:
    """The set with the outliers that are new in every epoch, or without any, if `--outliers` says so; else as it is."""
    synthetic, new = chosen.synthetic, "outliers, new in every epoch:"
    if s.outliers == "none":
        return replace(chosen, synthetic=synthetic.without_outliers())
    if s.outliers == "corrupt":
        source = corrupted(synthetic.decoded().images, real, s.corruptions, s.mix_corruptions)
        made, line = with_fresh(synthetic, source), f"{new} the images of the set, corrupted"
    elif s.outliers == "real":
        source = outlier_source(s, real)
        made, line = with_fresh(synthetic, source), f"{new} {_named(s)}; no distilled set, but an upper bound"
    elif s.corrupt_again:
        source = corrupted(synthetic.decoded().images_oe, real, s.corruptions, s.mix_corruptions)
        made, line = with_fresh(synthetic, source, keeps=True), f"{new} these, corrupted again"
    else:
        return chosen
    return chosen.changed(made, line, source.notice)


def outlier_source(s: Stage2Settings, real: RealData) -> OutlierSource:
    """Where outliers that are not distilled come from."""
    if s.oe_data_path is None:
        return PseudoOutliers(real, s.corruptions, s.mix_corruptions)
    return load_outlier_pool(s.oe_data_path, real, s.num_oe_per_class, s.seed, s.download == "all")


def _named(s: Stage2Settings) -> str:
    return "corrupted real images" if s.oe_data_path is None else f"images of {s.oe_data_path}"


def resumed_set(s: Stage2Settings, real: RealData) -> TrainingSet | None:
    """The set that the run of `--resume` was trained on, from its folder.

    None if there is nothing to resume, or the folder has none, as that of the whole training set with no stored
    outliers, or of older code: it is chosen again by the flags.
    """
    path = s.resume and Path(s.resume) / (OUTLIERS if s.train_on == "whole" else TRAINED_ON)
    if not path or not path.is_file():
        return None
    if s.train_on == "whole":
        images = read_pt(path)
        require(isinstance(images, Tensor), f"--resume: {path} is damaged; start a new run")
        synthetic = replace(whole_set(real), images_oe=images)
    else:
        synthetic = DistilledFile.open(path).set(0, real)
    return with_new_outliers(s, TrainingSet(synthetic), real)
