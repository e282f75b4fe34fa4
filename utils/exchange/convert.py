"""Distilled sets of any repository in the form that stage 2 trains on, and what was found and assumed in words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.core.errors import blame, named, require
from utils.core.torch_files import PLAIN_INTEGERS, read_pt
from utils.data.datasets import RealData
from utils.data.distilled_file import Normalisation
from utils.data.synthetic import SyntheticSet, check_factor, decode, in_classes_of, is_probabilities
from utils.exchange.assumptions import Assumptions
from utils.exchange.formats import MTT_STATISTICS, STATED, RawSet, checked_images, find_files, read_raw

DEFAULT_SPACE = {"datm": "zca", "idc": "unit", "folders": "unit"}  # others: normalised
DEFAULT_FACTOR = {"idc": 2}
OWN_CLASSES = ("ImageFolder", "TinyImageNet")  # others number their classes everywhere alike
OF_DC = (
    "it does not say how its images are normalised: as by TrustDD's code, it is assumed; DC's, DSA's and DM's code has "
    "mean 0.4914 0.4822 0.4465 and deviation 0.2023 0.1994 0.2010 (--distilled_mean, --distilled_std)"
)


@dataclass(frozen=True)
class TrainingSet:
    """A set to train on."""

    synthetic: SyntheticSet  # as stage 2 stores it; networks are trained on the `decoded` one
    lines: tuple[str, ...] = ()  # for the log: what was found and assumed
    origin: Path | None = None  # the run of stage 1 that its images are from, if there is one
    factor: int = 1  # images of its source held factor × factor parts, whether they are decoded here or not
    start: str = ""  # what its outliers before distilling are, if they are not those that its distillation began with

    @property
    def stored(self) -> int:
        """The number of images of its source."""
        return len(self.synthetic.images) * self.synthetic.factor**2 // self.factor**2

    def ipc(self, num_classes: int) -> int:
        """Images of its source per class, rounded down, at least 1."""
        return max(1, self.stored // num_classes)

    def changed(self, synthetic: SyntheticSet, *said: str) -> "TrainingSet":
        """The set with other outliers, and a line on them: what is `said`, if it is not empty."""
        return replace(self, synthetic=synthetic, lines=(*self.lines, "; ".join(filter(None, said))))


def read_distilled(
    paths: Sequence[str],
    real: RealData,
    assumed: Assumptions,
    exp_idx: int = 0,
    outliers: Sequence[str] = (),
    flag: str = "--distilled",
    is_beside: bool = False,
) -> TrainingSet:
    """Read a distilled set of any repository: on the CPU, images as networks see those of `real`, labels of training.

    A `UserError` tells that there is no such set, it is damaged or of other data, or contradicts what is assumed.

    Args:
        paths: a file, a folder, or files of images and labels.
        real: the data set that networks are tested on; classes and image shape must be its.
        exp_idx: which experiment of a `res_….pt`.
        outliers: paths of its outliers, if they are in files of their own: a tensor `[M, C, H, W]` in the space and the
            parts of the images, or a set of any format, whose outliers are taken, or else its images.
        is_beside: the set is read beside another, which `assumed` is about: what its own file states goes first.
    """
    with blame(flag):
        files = find_files(paths, assumed.distilled_format)
        raw, where = read_raw(files, real, exp_idx), str(files.images)
        if is_beside:
            assumed = _besides(raw, files.format, assumed)
        normalisation = _normalisation(raw, files.format, real, assumed, where)
        factor = _factor(raw, files.format, real, assumed, normalisation, where)
        images = _in_training_space(decode(raw.images, factor, normalisation.fill), normalisation, real)
        guess = "logits" if files.format in ("mtt", "datm") else None
        labels, kind = training_labels(raw.labels, assumed, guess, real.num_classes, where)
        labels = labels.repeat(factor**2, *[1] * (labels.ndim - 1))
        line = (
            f"distilled set: {where}, format {files.format}: {len(images)} images, {real.num_classes} classes, "
            f"labels {kind}, {_in_words(normalisation)}, decoding factor {factor}, learning rate "
            f"{'not stored' if raw.lr_net is None else f'{raw.lr_net:g}'}"
        )
        images_oe, line_oe = None, ""
        if outliers:
            images_oe, line_oe = _outliers(outliers, real, assumed, exp_idx, normalisation, factor)
        elif raw.images_oe is not None:
            images_oe = _in_training_space(decode(raw.images_oe, factor, normalisation.fill), normalisation, real)
        synthetic = SyntheticSet(images, labels, images_oe, raw.lr_net)
        synthetic = in_classes_of(real.class_names, synthetic, raw.class_names, where)
    lines = (line, *_unsaid(raw, files.format, real, assumed), raw.note, line_oe)
    return TrainingSet(synthetic, tuple(filter(None, lines)), factor=factor * raw.decoded)


def _factor(
    raw: RawSet, form: str, real: RealData, assumed: Assumptions, normalisation: Normalisation, where: str
) -> int:
    """How many parts a side each image holds: as the user, the file or else the format says."""
    factor = assumed.distilled_factor or raw.factor or DEFAULT_FACTOR.get(form, 1)
    check_factor(factor, real.im_size, "--distilled_factor")
    is_whole = factor == 1 or normalisation.space != "zca"
    require(is_whole, f"{where} is whitened (ZCA), so a part of it is no image; --distilled_factor 1 is accepted")
    return factor


def _besides(raw: RawSet, form: str, assumed: Assumptions) -> Assumptions:
    """What is assumed of a set, without what its own file states."""
    space = ("distilled_space", "distilled_mean", "distilled_std") if raw.stated.space else ()
    return replace(assumed, **dict.fromkeys(("distilled_factor", *space))) if form in STATED else assumed


def _unsaid(raw: RawSet, form: str, real: RealData, assumed: Assumptions) -> list[str]:
    """Lines for the log on what neither the files nor the user say, and sets may differ in."""
    lines = [OF_DC] if form == "res" and real.name == "CIFAR10" and not (raw.stated.space or said_of(assumed)) else []
    if not raw.class_names and form != "folders" and real.name in OWN_CLASSES:
        lines.append(f"it names no classes: its labels are taken in the order of {named(real.class_names, 10)}")
    return lines


def said_of(assumed: Assumptions) -> str | None:
    """The space of the images, as the user says it."""
    return assumed.distilled_space or ("normalised" if assumed.statistics else None)


def _normalisation(raw: RawSet, form: str, real: RealData, assumed: Assumptions, where: str) -> Normalisation:
    """What the images are: as the user says, or the file, or the format; a guess is compared with the numbers."""
    said = said_of(assumed)
    space = said or raw.stated.space or DEFAULT_SPACE.get(form, "normalised")
    statistics = assumed.statistics or raw.stated.statistics or (real.mean, real.std)
    require(
        space != "zca" or real.zca is not None,
        f"{where} is whitened (ZCA), so networks must see whitened test images: add --zca. "
        "If it is not, give --distilled_space normalised",
    )
    mean, std = map(len, statistics)
    told = f"--distilled_mean, --distilled_std: give one number each, or one for each of {real.channel} channels"
    require(mean == std and mean in (1, real.channel), told)
    is_stated = raw.stated.space and (form in STATED or raw.stated.space == "unit")
    if not (said or is_stated):
        check_guess(raw.images, space, real, where)
    return Normalisation(space, statistics, (raw.stated.zca or real.zca.to("cpu")) if space == "zca" else None)


def _in_training_space(images: torch.Tensor, normalisation: Normalisation, real: RealData) -> torch.Tensor:
    """Images as networks see those of `real`: unchanged, if they were made like that, or normalised anew."""
    return images if normalisation.is_of(real) else real.normalize(normalisation.to_unit(images).to(real.device)).cpu()


def check_guess(images: torch.Tensor, space: str, real: RealData, where: str) -> None:
    """Raise a `UserError` where the numbers of images contradict a space that no file states.

    Normalised images have negative numbers and, when they are distilled, a deviation from 0.4 to 40. Whitened ones have
    the deviation of pixels once the whitening is undone; normalised ones would get 18 times that (CIFAR-10).
    """
    low, high, mean, std = (f(images).item() for f in (torch.min, torch.max, torch.mean, torch.std))
    what = {"unit": "pixels from 0 to 1", "normalised": "normalised images", "zca": "whitened images (ZCA)"}[space]
    like = ""
    if space == "unit":
        wrong = low < -0.1 or high > 1.1
        like = "normalised or whitened images" if low < -0.1 else "pixels from 0 to 255" if high > 2 else ""
    elif low >= -0.05:
        wrong, like = True, "pixels from 0 to 1" if high <= 1.1 else "pixels from 0 to 255"
    elif space == "normalised":
        wrong, like = not 0.4 < std < 40 or abs(mean) > 3, "whitened images" if std < 0.4 else ""
    else:
        pixels = real.zca.undo(images.to(real.device))
        wrong, like = bool(pixels.std() > 4 * sum(real.std) / len(real.std)), "normalised images"
    require(
        not wrong,
        f"{where} is taken to hold {what}, but its numbers are from {low:.3g} to {high:.3g}, mean {mean:.3g}, "
        f"deviation {std:.3g}{like and f', as of {like}'}. Say what they are with --distilled_space "
        "(and --distilled_mean, --distilled_std)",
    )


def training_labels(
    labels: torch.Tensor, assumed: Assumptions, guess: str | None, num_classes: int, where: str
) -> tuple[torch.Tensor, str]:
    """Labels for network training, int64 `[N]` or probabilities `[N, num_classes]`; and `hard`, or their kind.

    A `UserError`, which the file `where` begins, tells that they are none of these, or not of `num_classes` classes.

    Args:
        labels: classes `[N]` or `[N, 1]`, or one-hot or soft ones `[N, num_classes]`.
        guess: what soft labels are taken for that are no probabilities; None: an error.
    """
    kind, temperature = assumed.soft_labels, assumed.label_temperature
    fits = labels.ndim == 1 or labels.shape[1:] in ((1,), (num_classes,))
    require(fits, f"{where} has labels {list(labels.shape[:8])}; --dataset has {num_classes} classes")
    soft = labels.float()
    require(torch.isfinite(soft).all(), f"{where} has labels that are NaN or infinite; write it again")
    is_soft = labels.shape[1:] == (num_classes,)
    probable = is_soft and is_probabilities(soft)
    if not is_soft or (kind is None and probable and ((soft == 0) | (soft == 1)).all()):
        told = f"{where} has one class for each image, no soft labels; leave out --soft_labels and --label_temperature"
        require(kind is None and temperature is None, told)
        classes = soft.argmax(1) if is_soft else labels.flatten()
        told = f"{where} has labels {classes.dtype} [N]; they must be integers, or [N, {num_classes}]"
        require(classes.dtype in PLAIN_INTEGERS, told)
        found, wanted = classes.unique().tolist(), f"--dataset has {num_classes}, 0..{num_classes - 1}"
        told = f"{where} has {len(found)} classes, {found[0]}..{found[-1]}; {wanted}"
        require(found == list(range(num_classes)), told)
        return classes.long(), "hard"
    sums = soft.sum(1)
    looks = f"from {soft.min():.3g} to {soft.max():.3g}, rows that add up to {sums.min():.3g}..{sums.max():.3g}"
    kind = kind or ("probabilities" if probable else guess if (soft < 0).any() or (soft > 1).any() else None)
    told = f"{where} has labels that may be probabilities or logits: {looks}. Say with --soft_labels which"
    require(kind is not None, told)
    if kind == "logits":
        return (soft / (temperature or 1.0)).softmax(1), kind
    require(temperature is None, f"--label_temperature: {where} has probabilities; only logits have a temperature")
    require(probable, f"{where} has labels that are no probabilities: {looks}. Give --soft_labels logits")
    return soft, kind


def _outliers(
    paths: Sequence[str], real: RealData, assumed: Assumptions, exp_idx: int, of_images: Normalisation, factor: int
) -> tuple[torch.Tensor, str]:
    """The outliers of `--distilled_oe`, and a line that says what they are."""
    with blame("--distilled_oe"):
        content = read_pt(Path(paths[0])) if len(paths) == 1 and paths[0].endswith(".pt") else None
        if not isinstance(content, torch.Tensor):
            plain = replace(assumed, distilled_format=None, soft_labels=None, label_temperature=None)
            found = read_distilled(paths, real, plain, exp_idx, flag="--distilled_oe", is_beside=True)
            images = found.synthetic.images if found.synthetic.images_oe is None else found.synthetic.images_oe
            return images, f"outliers: {len(images)}, of the {found.lines[0]}"
        images = checked_images(content, real, Path(paths[0]))
        if not said_of(assumed):
            check_guess(images, of_images.space, real, paths[0])
    images = decode(images, factor, of_images.fill)
    line = f"outliers: {paths[0]}, {len(images)} images, {_in_words(of_images)}, decoding factor {factor}"
    return _in_training_space(images, of_images, real), line


def _in_words(normalisation: Normalisation) -> str:
    if normalisation.space == "zca":
        return "whitened (ZCA)"
    if normalisation.space == "unit":
        return "pixels from 0 to 1"
    mean, std = (" ".join(f"{v:.4g}" for v in values) for values in normalisation.statistics)
    of_mtt = " (those of MTT's code; of others, give --distilled_mean and --distilled_std)"
    return f"normalised with mean {mean} and deviation {std}{of_mtt * (normalisation.statistics is MTT_STATISTICS)}"
