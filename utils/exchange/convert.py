"""Distilled sets of any repository in the form that stage 2 trains on, and what was found and assumed in words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.core.errors import UserError, blame
from utils.core.torch_files import read_pt
from utils.data.datasets import SPECS, RealData
from utils.data.distilled_file import Statistics
from utils.data.synthetic import SyntheticSet, check_factor, decode, in_classes_of
from utils.exchange.assumptions import Assumptions
from utils.exchange.formats import SetFiles, find_files
from utils.exchange.labels import training_labels
from utils.exchange.normalisation import check_guess, check_possible, to_training_space
from utils.exchange.readers import RawSet, check_images, floats, read_raw

DEFAULT_SPACE = {"mtt": "normalised", "datm": "zca", "idc": "unit", "folders": "unit", "kip": "normalised"}
DEFAULT_FACTOR = {"idc": 2}
STATED = ("res", "published")  # formats whose files say themselves what the images are


@dataclass(frozen=True)
class Found:
    """A set that was read."""

    synthetic: SyntheticSet
    lines: tuple[str, ...]  # for the log: what was found and assumed
    stored: int  # images in the files, before decoding


def read_distilled(
    paths: Sequence[str],
    real: RealData,
    assumed: Assumptions,
    exp_idx: int = 0,
    outliers: Sequence[str] = (),
    flag: str = "--distilled",
) -> Found:
    """Read a distilled set of any repository.

    Args:
        paths: a file, a folder, or files of images and labels.
        real: the data set that networks are tested on; classes and image shape must be its.
        exp_idx: which experiment of a `res_….pt`.
        outliers: paths of its outliers, if they are in files of their own: a tensor `[M, C, H, W]` in the space of the
            images, or a set of any format, whose outliers are taken, or else its images.
    Returns:
        The set on the CPU: images as networks see those of `real`, labels of training.
    Raises:
        UserError: when there is no such set, it is damaged or of other data, or contradicts what is assumed.
    """
    with blame(flag):
        files = find_files(paths, assumed.distilled_format)
        return _converted(files, read_raw(files, real, exp_idx), real, assumed, exp_idx, outliers)


def _converted(
    files: SetFiles, raw: RawSet, real: RealData, assumed: Assumptions, exp_idx: int, outliers: Sequence[str]
) -> Found:
    """What was read, in the form of training."""
    where = str(files.images)
    space, statistics = _space(raw, files, real, assumed, where)
    factor = assumed.distilled_factor or raw.factor or DEFAULT_FACTOR.get(files.format, 1)
    check_factor(factor, real.im_size, "--distilled_factor")
    fill = 0.5 if space == "unit" else 0.0
    images = to_training_space(decode(raw.images, factor, fill), space, statistics, real, raw.stated.zca)
    labels, kind = _labels(raw, files.format, real.num_classes, assumed, where)
    labels = labels.repeat(factor**2, *[1] * (labels.ndim - 1))
    line = (
        f"distilled set: {where}, format {files.format}: {len(images)} images, {real.num_classes} classes, "
        f"labels {kind}, {_in_words(space, statistics, real)}, decoding factor {factor}, learning rate "
        f"{'not stored' if raw.lr_net is None else f'{raw.lr_net:g}'}"
    )
    images_oe, line_oe = None, ""
    if outliers:
        images_oe, line_oe = _outliers(outliers, real, assumed, exp_idx, space, statistics)
    elif raw.images_oe is not None:
        decoded = decode(raw.images_oe, raw.factor or 1, fill)
        images_oe = to_training_space(decoded, space, statistics, real, raw.stated.zca)
    synthetic = SyntheticSet(images, labels, images_oe, raw.lr_net)
    synthetic = in_classes_of(real, synthetic, raw.class_names, where)
    return Found(synthetic, tuple(text for text in (line, raw.note, line_oe) if text), len(raw.images))


def _labels(raw: RawSet, form: str, num_classes: int, assumed: Assumptions, where: str) -> tuple[torch.Tensor, str]:
    """Labels for training, as many as stored images, and what they are."""
    guess = "logits" if form in ("mtt", "datm") else None
    labels, kind = training_labels(
        raw.labels, assumed.soft_labels, guess, assumed.label_temperature, num_classes, where
    )
    if len(labels) != len(raw.images):
        raise UserError(f"{where} has {len(raw.images)} images and {len(labels)} labels; there must be as many")
    return labels, kind


def _space(raw: RawSet, files: SetFiles, real: RealData, assumed: Assumptions, where: str) -> tuple[str, Statistics]:
    """What the images are: as the user says, or the file, or the format; a guess is compared with the numbers."""
    space = assumed.distilled_space or ("normalised" if assumed.statistics else None) or raw.stated.space
    if space is None:
        space = DEFAULT_SPACE.get(files.format, "normalised")
    statistics = assumed.statistics or raw.stated.statistics or (real.mean, real.std)
    check_possible(space, statistics, real, where)
    stated = raw.stated.space and (files.format in STATED or raw.stated.space == "unit")
    if not (assumed.distilled_space or assumed.statistics or stated):
        check_guess(raw.images, space, real, where)
    return space, statistics


def _outliers(
    paths: Sequence[str], real: RealData, assumed: Assumptions, exp_idx: int, space: str, statistics: Statistics
) -> tuple[torch.Tensor, str]:
    """The outliers of `--distilled_oe`, and a line that says what they are; `space` and `statistics`: of the images."""
    with blame("--distilled_oe"):
        content = read_pt(Path(paths[0])) if len(paths) == 1 and paths[0].endswith(".pt") else None
        if not isinstance(content, torch.Tensor):
            of_images = replace(assumed, distilled_format=None, soft_labels=None, label_temperature=None)
            found = read_distilled(paths, real, of_images, exp_idx, flag="--distilled_oe")
            synthetic = found.synthetic
            images = synthetic.images if synthetic.images_oe is None else synthetic.images_oe
            return images, f"outliers: {len(images)}, of the {found.lines[0]}"
        images = floats(content, real, Path(paths[0]))
        check_images(images, real, Path(paths[0]))
        if not (assumed.distilled_space or assumed.statistics):
            check_guess(images, space, real, paths[0])
    images = to_training_space(images, space, statistics, real)
    return images, f"outliers: {paths[0]}, {len(images)} images, {_in_words(space, statistics, real)}"


def _in_words(space: str, statistics: Statistics, real: RealData) -> str:
    if space == "zca":
        return "whitened (ZCA)"
    if space == "unit":
        return "pixels from 0 to 1"
    mean, std = (" ".join(f"{v:.4g}" for v in values) for values in statistics)
    of = next((n for n, s in SPECS.items() if s.mean and s.mean == statistics[0]), None)
    return f"normalised with mean {mean} and deviation {std}{f' ({of})' if of and of != real.name else ''}"
