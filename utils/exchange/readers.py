"""Reading distilled sets of any repository into the form that stage 2 trains on, and saying what was assumed."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.core.errors import UserError, one_line
from utils.data.datasets import SPECS, RealData
from utils.data.synthetic import SyntheticSet, load_synthetic
from utils.exchange.formats import MAX_NAMES, SetFiles, find_files
from utils.exchange.labels import training_labels
from utils.exchange.spaces import Statistics, check_guess, check_possible, decode, to_training_space
from utils.files.arrays import read_npz
from utils.files.images import IMAGE_FORMATS, list_images, read_images, unit_images
from utils.files.torch_files import PLAIN_TENSORS, read_pt

DEFAULT_SPACE = {"mtt": "normalised", "datm": "zca", "idc": "unit", "folders": "unit", "kip": "normalised"}
DEFAULT_FACTOR = {"idc": 2}


@dataclass(frozen=True)
class Assumptions:
    """What the user says of a distilled set; None: found out by its format and its numbers.

    `format`: one of `FORMATS`; `space`: one of `SPACES`; `statistics`: mean and deviation of the normalised space;
    `factor`: of decoding; `soft_labels`: `probabilities` or `logits`; `temperature`: of logits.
    """

    format: str | None = None
    space: str | None = None
    statistics: Statistics | None = None
    factor: int | None = None
    soft_labels: str | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class _Raw:
    """What the files hold: images `[N, C, H, W]` float32, labels, outliers, the learning rate; and what they say of the
    space of the images, if they do."""

    images: torch.Tensor
    labels: torch.Tensor
    images_oe: torch.Tensor | None = None
    lr_net: float | None = None
    space: str | None = None
    statistics: Statistics | None = None


def read_distilled(
    paths: Sequence[str], real: RealData, assumed: Assumptions, exp_idx: int = 0, flag: str = "--distilled"
) -> tuple[SyntheticSet, list[str]]:
    """A distilled set of any repository, and lines that say what was found and assumed.

    Args:
        paths: a file, a folder, or files of images and labels.
        real: the data set that networks are tested on; classes and image shape must be its.
        exp_idx: which experiment of a `res_….pt`.
    Returns:
        The set on the CPU: images as networks see those of `real`, labels of training.
    Raises:
        UserError: when there is no such set, it is damaged or of other data, or contradicts what is assumed.
    """
    files = find_files(paths, assumed.format, flag)
    where = f"{flag}: {files.images}"
    raw = _READERS[files.format](files, real, exp_idx, flag)
    _check_images(raw.images, real, where)
    space = assumed.space or raw.space or DEFAULT_SPACE.get(files.format, "normalised")
    if assumed.statistics and space != "normalised":
        raise UserError(f"--distilled_mean: {files.images} is taken to be {space}; add --distilled_space normalised")
    statistics = assumed.statistics or raw.statistics or (real.mean, real.std)
    factor = assumed.factor or DEFAULT_FACTOR.get(files.format, 1)
    check_possible(space, statistics, real, where)
    if not (assumed.space or (raw.space and files.format in ("res", "published"))):  # neither user nor file say so
        check_guess(raw.images, space, real, where)
    images = to_training_space(decode(raw.images, factor), space, statistics, real)
    labels, kind = training_labels(raw.labels, assumed.soft_labels, assumed.temperature, real.num_classes, where)
    labels = labels.repeat(factor**2, *[1] * (labels.ndim - 1))
    if len(labels) != len(images):
        raise UserError(f"{where} has {len(raw.images)} images and {len(raw.labels)} labels; there must be as many")
    images_oe = raw.images_oe
    if images_oe is not None:
        images_oe = to_training_space(images_oe, space, statistics, real)
    lines = [
        f"distilled set: {files.images}, format {files.format}: {len(images)} images, {real.num_classes} classes, "
        f"labels {kind}, {_space_line(space, statistics, real)}, decoding factor {factor}, learning rate "
        f"{'not stored' if raw.lr_net is None else f'{raw.lr_net:g}'}"
    ]
    return SyntheticSet(images, labels, images_oe, raw.lr_net), lines


def read_outliers(paths: Sequence[str], real: RealData, assumed: Assumptions, exp_idx: int = 0) -> torch.Tensor:
    """Outliers in files of their own (`--distilled_oe`), as networks see images of `real`, `[M, C, H, W]`.

    A tensor `[M, C, H, W]` in a `.pt`; or any format of distilled sets, whose outliers are taken, or else its images.
    """
    flag = "--distilled_oe"
    content = read_pt(Path(paths[0]), flag) if len(paths) == 1 and paths[0].endswith(".pt") else None
    if isinstance(content, torch.Tensor) and content.ndim == 4:
        where = f"{flag}: {paths[0]}"
        images = _floats(content, where)
        _check_images(images, real, where)
        space, statistics = assumed.space or "normalised", assumed.statistics or (real.mean, real.std)
        check_possible(space, statistics, real, where)
        if not assumed.space:
            check_guess(images, space, real, where)
        return to_training_space(images, space, statistics, real)
    synthetic, _ = read_distilled(paths, real, replace(assumed, soft_labels=None), exp_idx, flag)
    return synthetic.images if synthetic.images_oe is None else synthetic.images_oe


def _space_line(space: str, statistics: Statistics, real: RealData) -> str:
    if space == "zca":
        return "whitened (ZCA)"
    if space == "unit":
        return "pixels from 0 to 1"
    mean, std = (" ".join(f"{v:.4g}" for v in values) for values in statistics)
    of = next((n for n, s in SPECS.items() if s.mean and s.mean == statistics[0]), None)
    return f"normalised with mean {mean} and deviation {std}{f' ({of})' if of and of != real.name else ''}"


def _check_images(images: torch.Tensor, real: RealData, where: str) -> None:
    shape = (real.channel, *real.im_size)
    if tuple(images.shape[1:]) != shape or not len(images):
        found = f"{len(images)} images of {'x'.join(map(str, images.shape[1:]))}"
        raise UserError(f"{where} has {found}; --dataset {real.name} has {'x'.join(map(str, shape))}")
    if not torch.isfinite(images).all():
        raise UserError(f"{where} has images that are NaN or infinite; write it again")


def _floats(images: object, where: str) -> torch.Tensor:
    """Images of a file as float32 `[N, C, H, W]`."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.dtype not in (*PLAIN_TENSORS, torch.uint8):
        found = f"{images.dtype} {list(images.shape[:8])}" if isinstance(images, torch.Tensor) else "no tensor"
        raise UserError(f"{where} has images {found}; they must be floating or uint8 [N, C, H, W]")
    return unit_images(images.detach()).float()


# --- one reader for each format --------------------------------------------------------------------------------------


def _read_res(files: SetFiles, real: RealData, exp_idx: int, flag: str) -> _Raw:
    content = read_pt(files.images, flag)
    synthetic = load_synthetic(files.images, exp_idx, None, flag)
    stored = content.get("normalisation")
    if not isinstance(stored, dict):
        return _Raw(synthetic.images, synthetic.labels, synthetic.images_oe, synthetic.lr_net)
    if "zca" in stored:
        return _Raw(synthetic.images, synthetic.labels, synthetic.images_oe, synthetic.lr_net, "zca")
    return _Raw(
        synthetic.images,
        synthetic.labels,
        synthetic.images_oe,
        synthetic.lr_net,
        "normalised",
        _statistics(stored, f"{flag}: {files.images}"),
    )


def _statistics(stored: dict, where: str) -> Statistics:
    """Mean and deviation that a file stores."""
    values = tuple(stored.get(name) for name in ("mean", "std"))
    if not all(isinstance(v, (list, tuple)) and v and all(isinstance(x, float) for x in v) for v in values):
        raise UserError(f"{where} is damaged: its normalisation must be lists of numbers")
    if not all(math.isfinite(x) for v in values for x in v) or min(values[1]) <= 0:
        raise UserError(f"{where} is damaged: its normalisation must be finite, deviations above 0")
    return tuple(map(tuple, values))


def _read_tensors(files: SetFiles, real: RealData, exp_idx: int, flag: str) -> _Raw:
    """MTT and its descendants. CIFAR-100 was normalised with the statistics of CIFAR-10 there."""
    images = _floats(read_pt(files.images, flag), f"{flag}: {files.images}")
    labels = read_pt(files.labels, flag)
    if not isinstance(labels, torch.Tensor):
        raise UserError(f"{flag}: {files.labels} is no tensor of labels; write it again")
    lr = None
    if files.lr is not None:
        value = read_pt(files.lr, flag)
        lr = float(value) if isinstance(value, (torch.Tensor, float)) and getattr(value, "ndim", 0) == 0 else -1.0
        if not 0 < lr < math.inf:
            raise UserError(f"{flag}: {files.lr} is no positive learning rate; write it again")
    space = None
    if files.images.name.startswith("images_zca_"):
        space = "unit"
    elif files.images.with_name(files.images.name.replace("images_", "images_zca_", 1)).is_file():
        space = "zca"
    as_cifar10 = SPECS["CIFAR10"] if real.name == "CIFAR100" else None
    statistics = (as_cifar10.mean, as_cifar10.std) if as_cifar10 else None
    return _Raw(images, labels.detach(), None, lr, space, statistics)


def _read_pair(files: SetFiles, real: RealData, exp_idx: int, flag: str) -> _Raw:
    images, labels = read_pt(files.images, flag)
    return _Raw(_floats(images, f"{flag}: {files.images}"), labels.detach())


def _read_folders(files: SetFiles, real: RealData, exp_idx: int, flag: str) -> _Raw:
    """A folder of images for each class; the sorted names of the folders are the classes."""
    folders = sorted(p for p in files.images.iterdir() if p.is_dir())
    if len(folders) != real.num_classes:
        raise UserError(f"{flag}: {files.images} has {len(folders)} folders; --dataset has {real.num_classes} classes")
    paths, labels = [], []
    for label, folder in enumerate(folders):
        images = list_images(folder, files.images, flag)
        paths += images
        labels += [label] * len(images)
        if not images or len(paths) > MAX_NAMES:
            raise UserError(f"{flag}: {folder} has {len(images)} images; a class has some, and all at most {MAX_NAMES}")
    for path in paths:
        _check_size(path, real, flag)
    images = read_images(paths, real.channel, real.im_size, flag)
    return _Raw(unit_images(images), torch.tensor(labels))


def _check_size(path: Path, real: RealData, flag: str) -> None:
    """Compare the size and the colours of an image file with those of `real`, without decoding it."""
    from PIL import Image

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            channel = 1 if image.mode in ("1", "L", "I;16", "I") else 3
    except Exception as error:
        raise UserError(f"{flag}: cannot read the image {path}: {one_line(error)}. Mend or remove it") from None
    if (channel, height, width) != (real.channel, *real.im_size):
        wanted = "x".join(map(str, (real.channel, *real.im_size)))
        raise UserError(f"{flag}: {path} is {channel}x{height}x{width}; --dataset {real.name} has {wanted}")


def _read_kip(files: SetFiles, real: RealData, exp_idx: int, flag: str) -> _Raw:
    images, labels = (torch.from_numpy(a) for a in read_npz(files.images, ("images", "labels"), flag))
    if images.ndim == 4:
        images = images.permute(0, 3, 1, 2).contiguous()
    return _Raw(_floats(images, f"{flag}: {files.images}"), labels)


def _read_published(files: SetFiles, real: RealData, exp_idx: int, flag: str) -> _Raw:
    tensors, about = read_safetensors(files.images, flag)
    where = f"{flag}: {files.images}"
    labels = tensors.get("soft_labels", tensors.get("labels"))
    if labels is None or "images" not in tensors:
        raise UserError(f"{where} lacks images or labels; publish the set again")
    images_oe = _floats(tensors["outliers"], where) if "outliers" in tensors else None
    lr = None
    if "lr_net" in tensors:
        lr = float(tensors["lr_net"]) if tensors["lr_net"].numel() == 1 else -1.0
        if not 0 < lr < math.inf:
            raise UserError(f"{where} holds no positive learning rate; publish the set again")
    zca = "zca_matrix" in tensors
    statistics = None if zca else _statistics(about.get("normalisation") or {}, where)
    return _Raw(_floats(tensors["images"], where), labels, images_oe, lr, "zca" if zca else "normalised", statistics)


def read_safetensors(path: Path, flag: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a safetensors file, and its metadata under `trustdd`, a JSON object.

    Raises:
        UserError: when the package is missing or the file is damaged.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{flag}: {path} is read by the package safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get("trustdd", "{}"))
    except Exception as error:
        raise UserError(f"{flag}: cannot read {path}: {one_line(error)}. Copy or publish it again") from None
    return tensors, about if isinstance(about, dict) else {}


_READERS = {
    "res": _read_res,
    "mtt": _read_tensors,
    "datm": _read_tensors,
    "idc": _read_pair,
    "folders": _read_folders,
    "kip": _read_kip,
    "published": _read_published,
}
