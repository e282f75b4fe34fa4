"""Reading the files of distilled sets, one reader for each format: what they hold, and what they say of it."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils.core.errors import UserError, named, one_line, require
from utils.core.files import check_file, read_npz
from utils.core.images import ImageReader, is_content
from utils.core.pixels import in_full_range, unit_images
from utils.core.torch_files import PLAIN_TENSORS, read_pt
from utils.data.datasets import SPECS, RealData
from utils.data.distilled_file import DistilledFile, Normalisation
from utils.data.synthetic import check_factor
from utils.exchange.formats import MAX_NAMES, SetFiles


@dataclass(frozen=True)
class RawSet:
    """What the files of a set hold."""

    images: torch.Tensor  # float32 [N, C, H, W]
    labels: torch.Tensor  # of any kind
    images_oe: torch.Tensor | None = None  # outliers, float32 [M, C, H, W]
    lr_net: float | None = None  # the learning rate
    stated: Normalisation = field(default_factory=Normalisation)  # what the files or their names say of the images
    note: str = ""  # a further line for the log
    class_names: object = None  # in the order of the labels, as the file says, unchecked
    factor: int | None = None  # of images in parts, if the file says it


def read_raw(files: SetFiles, real: RealData, exp_idx: int) -> RawSet:
    """Read a set of any format; a `UserError` tells that a file is damaged, or of something else than its format.

    Args:
        real: the data set that networks are tested on; images must be of its shape.
        exp_idx: which experiment of a `res_….pt`; others have one.
    """
    path = files.images
    if files.format == "res":
        file = DistilledFile(path, files.content)
        s = file.set(exp_idx)
        _check_dataset(file.dataset, real, path)
        stated, names = file.normalisation(), file.class_names
        raw = RawSet(s.images, s.labels, s.images_oe, s.lr_net, stated, class_names=names, factor=s.factor)
    else:
        told = f"--exp_idx {exp_idx}: {path} (format {files.format}) holds one set; leave the flag out"
        require(not exp_idx, told)
        raw = _READERS[files.format](files, real)
    check_images(raw.images, real, path)
    if raw.images_oe is not None:
        check_images(raw.images_oe, real, path)
    zca = raw.stated.zca
    fits = zca is None or len(zca.mean) == raw.images[0].numel()
    require(fits, f"{path} is damaged: its whitening is of images of another size")
    require(len(raw.labels), f"{path} has no labels; write it again")
    return raw


def check_images(images: torch.Tensor, real: RealData, path: Path) -> None:
    """Check the shape of images, and that they are finite."""
    shape, wanted = ("x".join(map(str, s)) for s in (images.shape[1:], (real.channel, *real.im_size)))
    told = f"{path} has {len(images)} images of {shape}; --dataset {real.name} has {wanted}"
    require(shape == wanted and len(images), told)
    require(torch.isfinite(images).all(), f"{path} has images that are NaN or infinite; write it again")


def floats(images: object, real: RealData, path: Path) -> torch.Tensor:
    """Images of a file as float32 `[N, C, H, W]`, uint8 ones as pixels in [0, 1]; a `UserError` for anything else."""
    found = f"{images.dtype} {list(images.shape[:8])}" if isinstance(images, torch.Tensor) else "no tensor"
    fits = isinstance(images, torch.Tensor) and images.ndim == 4 and images.dtype in (*PLAIN_TENSORS, torch.uint8)
    require(fits, f"{path} has images {found}; they must be floating or uint8 [N, C, H, W]")
    (images,) = in_full_range([images.detach()], real.pixel_max, str(path))
    return unit_images(images).float()


def _check_dataset(name: object, real: RealData, path: Path) -> None:
    """Refuse a set that says it was distilled from other data."""
    if name is not None and name != real.name:
        raise UserError(f"--dataset {real.name}: {path} was distilled from {one_line(name, 40)}; give that data set")


def _rate(value: object, path: Path) -> float:
    """A learning rate that a file holds."""
    plain = isinstance(value, float) or (
        isinstance(value, torch.Tensor) and value.numel() == 1 and value.isreal().all()
    )
    require(plain and 0 < float(value) < math.inf, f"{path} holds no positive learning rate; write it again")
    return float(value)


# --- one reader for each format --------------------------------------------------------------------------------------


def _read_tensors(files: SetFiles, real: RealData) -> RawSet:
    """MTT and its descendants. CIFAR-100 was normalised with the statistics of CIFAR-10 there."""
    images, labels = floats(files.content, real, files.images), read_pt(files.labels)
    require(isinstance(labels, torch.Tensor), f"{files.labels} is no tensor of labels; write it again")
    lr = None if files.lr is None else _rate(read_pt(files.lr), files.lr)
    space = None
    if files.images.name.startswith("images_zca_"):
        space = "unit"
    elif any(files.images.parent.glob("images_zca_*.pt")):  # MTT writes it for some iterations only
        space = "zca"
    statistics = (SPECS["CIFAR10"].mean, SPECS["CIFAR10"].std) if real.name == "CIFAR100" else None
    return RawSet(images, labels.detach(), None, lr, Normalisation(space, statistics))


def _read_pair(files: SetFiles, real: RealData) -> RawSet:
    images, labels = files.content
    return RawSet(floats(images, real, files.images), labels.detach())


def _read_folders(files: SetFiles, real: RealData) -> RawSet:
    """A folder of images for each class: in the order of `real`'s, if it has the same names, or of numbers or names."""
    reader = ImageReader("", real.pixel_max, exact=True)
    folders = [p for p in files.images.iterdir() if p.is_dir() and is_content(p.name)]
    folders = _in_order(folders, real.class_names)
    told = f"{files.images} has {len(folders)} folders; --dataset has {real.num_classes} classes"
    require(len(folders) == real.num_classes, told)
    paths, labels = [], []
    for label, folder in enumerate(folders):
        images = reader.find(folder, files.images)
        paths += images
        labels += [label] * len(images)
        told = f"{folder} has {len(images)} images; a class has some, and all at most {MAX_NAMES}"
        require(images and len(paths) <= MAX_NAMES, told)
    images = reader.files(paths, real.channel, real.im_size)
    note = f"classes in the order of the folders: {named([folder.name for folder in folders], 3)}"
    if real.class_names:
        note += f"; those of --data_path: {named(real.class_names, 3)}"
    return RawSet(unit_images(images), torch.tensor(labels), note="; ".join([note, *reader.notes()]))


def _in_order(folders: list[Path], class_names: tuple[str, ...]) -> list[Path]:
    """As `class_names`, if these are their names; by number if all are one word and a number; else by name."""
    if {folder.name for folder in folders} == set(class_names):
        return sorted(folders, key=lambda folder: class_names.index(folder.name))
    parts = [re.fullmatch(r"(\D*)(\d+)", folder.name) for folder in folders]
    numbered = all(parts) and len({part[1] for part in parts}) == 1
    return sorted(folders, key=lambda p: int(re.sub(r"\D", "", p.name))) if numbered else sorted(folders)


def _read_kip(files: SetFiles, real: RealData) -> RawSet:
    arrays = read_npz(files.images, ("images", "labels"))
    try:
        images, labels = map(torch.from_numpy, arrays)
    except (TypeError, ValueError):
        kinds = " and ".join(str(a.dtype) for a in arrays)
        raise UserError(f"{files.images} has images and labels {kinds}; they must be ordinary numbers") from None
    images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images
    return RawSet(floats(images, real, files.images), labels)


def _read_published(files: SetFiles, real: RealData) -> RawSet:
    path = files.images
    tensors, about = read_safetensors(path)
    labels = tensors.get("soft_labels", tensors.get("labels"))
    require(labels is not None and "images" in tensors, f"{path} lacks images or labels; publish the set again")
    _check_dataset(about.get("dataset"), real, path)
    images_oe = floats(tensors["outliers"], real, path) if "outliers" in tensors else None
    lr = _rate(tensors["lr_net"], path) if "lr_net" in tensors else None
    stored = about.get("normalisation", {})
    if "zca_matrix" in tensors:
        stored = {"zca": {name: tensors.get(f"zca_{name}") for name in ("mean", "matrix", "inverse")}}
    images, stated = floats(tensors["images"], real, path), Normalisation.read(stored, path)
    factor = check_factor(about.get("factor", 1), tuple(images.shape[2:]), f"{path} is damaged: factor")
    return RawSet(images, labels, images_oe, lr, stated, class_names=about.get("class_names"), factor=factor)


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a safetensors file, and its metadata under `trustdd`, a JSON object.

    A `UserError` tells that the package is missing or the file is damaged.
    """
    check_file(path)
    try:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get("trustdd", "{}"))
    except ImportError:
        raise UserError(f"{path} is read by the package safetensors: pip install safetensors") from None
    except Exception as error:
        raise UserError(f"cannot read {path}: {one_line(error)}. Copy or publish it again") from None
    return tensors, about if isinstance(about, dict) else {}


_READERS = {
    "mtt": _read_tensors,
    "datm": _read_tensors,
    "idc": _read_pair,
    "folders": _read_folders,
    "kip": _read_kip,
    "published": _read_published,
}
