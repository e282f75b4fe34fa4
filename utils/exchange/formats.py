"""The formats in which repositories write distilled sets: finding out which a file or folder has, and reading it."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from utils.core.errors import UserError, blame, named, one_line, require
from utils.core.files import read_npz
from utils.core.images import ImageReader, image_suffixes, is_content
from utils.core.pixels import in_full_range, unit_images
from utils.core.torch_files import PLAIN_TENSORS, read_pt
from utils.data.datasets import RealData
from utils.data.distilled_file import NOT_STATED, DistilledFile, Normalisation
from utils.data.synthetic import check_factor

SPACES = ("normalised", "unit", "zca")
FORMATS = {
    "res": "res_….pt (DC, DSA, DM, TrustDD): a dict whose 'data' is a list of [images, labels]",
    "mtt": "images_….pt and labels_….pt (MTT, TESLA, FTD): one tensor each",
    "datm": "the same with lr_….pt (DATM): labels are logits, images are whitened",
    "idc": "data.pt (IDC, DREAM, NCFM): [images, labels], from 0 to 1, several small images in each",
    "folders": "a folder of JPEG or PNG files for each class (SRe2L, CDA, RDED)",
    "kip": "an .npz with images [N, H, W, C] and labels (KIP)",
    "published": "distilled.safetensors, as scripts/publish.py writes it",
}
ACCEPTED = "Accepted: " + "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
BY_SUFFIX = {".safetensors": "published", ".npz": "kip"}
SAFETENSORS = "distilled.safetensors"
MTT_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # MTT's for CIFAR-10, and for CIFAR-100, too
STATED = ("res", "published")  # formats whose files say themselves what the images are


@dataclass
class SetFiles:
    """The files of a distilled set."""

    format: str  # one of `FORMATS`
    images: Path  # or the folder
    labels: Path | None = None  # where they are apart
    lr: Path | None = None  # the learning rate, where it is apart

    @cached_property
    def content(self) -> object:
        """What the `.pt` file of the images holds; it is read once."""
        return read_pt(self.images)


def check_there(paths: Sequence[str | Path] | None, flag: str = "") -> None:
    """Raise a `UserError`, which `flag` begins, unless all the paths are there; it reads none of them."""
    with blame(flag):
        for path in paths or ():
            require(os.path.exists(path), f"{path} is not there")  # unlike Path.exists, False also for too long names


def find_files(paths: Sequence[str | Path], wanted: str | None) -> SetFiles:
    """What the paths of a flag lead to; a `UserError` tells that it is nothing, or several sets.

    They are a file, a folder, or files of images and labels (and of the learning rate); `wanted`: the format, if given.
    """
    paths = [Path(path) for path in paths]
    check_there(paths)
    if len(paths) > 1:
        return _of_several(paths, wanted)
    path = paths[0]
    try:
        found = _in_folder(path) if path.is_dir() else [_of_file(path)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    if wanted is not None:
        found = [files for files in found if files.format == wanted or {files.format, wanted} == {"mtt", "datm"}]
    of_format = f" of --distilled_format {wanted}" if wanted else ""
    require(found, f"{path} holds no distilled set{of_format}. {ACCEPTED}")
    names = ", ".join(f"{files.images.name} ({files.format})" for files in found[:6])
    require(len(found) == 1, f"{path} holds several sets: {names}. Give the file, or --distilled_format")
    found[0].format = wanted or found[0].format
    return found[0]


def _of_several(paths: list[Path], wanted: str | None) -> SetFiles:
    """Files of images, labels and perhaps a learning rate, told apart by their shapes."""
    kinds = {4: "images", 1: "labels", 2: "labels", 0: "lr"}
    accepted = "images [N, C, H, W] and labels [N] or [N, classes]"
    roles: dict[str, Path] = {}
    for path in paths:
        content = read_pt(path)
        role = kinds.get(0 if isinstance(content, (int, float, np.number)) else getattr(content, "ndim", None))
        told = f"{path} is no tensor of {accepted} that the other files lack. Give one set at a time"
        require(role and role not in roles, told)
        roles[role] = path
    require({"images", "labels"} <= {*roles}, f"{', '.join(map(str, paths))} must be {accepted}")
    told = f"files of images and labels are of the formats mtt and datm, not of {wanted}"
    require(wanted in (None, "mtt", "datm"), told)
    return SetFiles(wanted or ("datm" if "lr" in roles else "mtt"), **roles)


def _of_file(path: Path) -> SetFiles:
    """The set in, or beginning with, a file."""
    if path.suffix in BY_SUFFIX:
        return SetFiles(BY_SUFFIX[path.suffix], path)
    files = SetFiles("res", path)
    content = files.content
    if isinstance(content, torch.Tensor) and content.ndim == 4:
        return _with_labels(path)
    if isinstance(content, (list, tuple)) and len(content) == 2 and all(isinstance(t, torch.Tensor) for t in content):
        files.format = "idc"
    else:
        require(isinstance(content, dict) and "data" in content, f"{path} is of no known format. {ACCEPTED}")
    return files


def _with_labels(images: Path) -> SetFiles:
    """The set of a file `images_….pt` and the files of labels and learning rate beside it."""
    suffix = re.sub(r"^images(_zca)?(?=[_.])", "", images.name)  # "_best.pt", "_500.pt" or ".pt"
    labels, lr = images.with_name(f"labels{suffix}"), images.with_name(f"lr{suffix}")
    has_labels = suffix != images.name and labels.is_file()
    missing = labels.name if suffix != images.name else "its labels"
    require(has_labels, f"{images} holds images alone; {missing} must be beside it, or give both files")
    return SetFiles("datm", images, labels, lr) if lr.is_file() else SetFiles("mtt", images, labels)


def _in_folder(folder: Path) -> list[SetFiles]:
    """All sets in a folder; of the iterations of one set the last."""
    places = sorted(path for path in folder.iterdir() if is_content(path.name))
    names = [path.name for path in places]
    if SAFETENSORS in names:  # pictures of the same images lie beside it
        return [SetFiles("published", folder / SAFETENSORS)]
    found = [_with_labels(folder / name) for name in _newest(names, "images")]
    found += [SetFiles("idc", folder / name) for name in _newest(names, "data")]
    found += [SetFiles("res", p) for p in places if re.fullmatch(r"res_.*(?<!_last_finite)\.pt", p.name)]
    found += [SetFiles("kip", p) for p in places if p.suffix == ".npz"]
    files = [path for inner in [p for p in places if p.is_dir()][:3] for path in inner.iterdir()]
    if any(is_content(file.name) and file.suffix.lower() in image_suffixes() for file in files):
        found.append(SetFiles("folders", folder))
    return found


def _newest(names: Sequence[str], stem: str) -> list[str]:
    """`<stem>.pt`, else `<stem>_best.pt`, else `<stem>_<iteration>.pt` of the last iteration: none or one name."""
    for name in (f"{stem}.pt", f"{stem}_best.pt"):
        if name in names:
            return [name]
    numbered = [name for name in names if re.fullmatch(rf"{stem}_?\d+\.pt", name)]
    return sorted(numbered, key=lambda name: int(re.sub(r"\D", "", name)))[-1:]


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawSet:
    """What the files of a set hold."""

    images: torch.Tensor  # float32 [N, C, H, W]
    labels: torch.Tensor  # of any kind
    images_oe: torch.Tensor | None = None  # outliers, float32 [M, C, H, W]
    lr_net: float | None = None  # the learning rate
    stated: Normalisation = NOT_STATED  # what the files or their names say of the images
    note: str = ""  # a further line for the log
    class_names: object = None  # in the order of the labels, as the file says, unchecked
    factor: int | None = None  # of images in parts, if the file says it
    decoded: int = 1  # how many parts a side of one image stand here as images of their own


def read_raw(files: SetFiles, real: RealData, exp_idx: int) -> RawSet:
    """Read a set of any format; a `UserError` tells that a file is damaged, or does not fit `real` or its format."""
    path = files.images
    if files.format in STATED:
        file = DistilledFile(path, files.content if files.format == "res" else _published_content(path))
        one, dataset, stated = file.set(exp_idx), file.dataset, file.normalisation()
        told = f"--dataset {real.name}: {path} was distilled from {one_line(dataset, 40)}; give that data set"
        require(dataset in (None, real.name), told)
        images = checked_images(one.images, real, path)
        images_oe = None if one.images_oe is None else checked_images(one.images_oe, real, path)
        fits = stated.zca is None or len(stated.zca.mean) == images[0].numel()
        require(fits, f"{path} is damaged: its whitening is of images of another size")
        note = file.unfinished_note(exp_idx)
        decoded = check_factor(file.decoded, real.im_size, f"{path} is damaged: decoded")
        return RawSet(images, one.labels, images_oe, one.lr_net, stated, note, file.class_names, one.factor, decoded)
    told = f"--exp_idx {exp_idx}: {path} (format {files.format}) holds one set; leave the flag out"
    require(exp_idx == 0, told)
    read = {"idc": _read_pair, "folders": _read_folders, "kip": _read_kip}.get(files.format, _read_tensors)
    raw = read(files, real)
    told = f"{path} has {len(raw.images)} images and labels {list(raw.labels.shape[:8])}; there must be as many"
    require(raw.labels.shape[:1] == raw.images.shape[:1], told)
    return raw


def checked_images(images: object, real: RealData, path: Path) -> torch.Tensor:
    """Images of a file as float32 `[N, C, H, W]`, uint8 ones as pixels in [0, 1].

    A `UserError` tells that they are none, are not finite, or do not have the shape of those of `real`.
    """
    found = f"{images.dtype} {list(images.shape[:8])}" if isinstance(images, torch.Tensor) else "no tensor"
    fits = isinstance(images, torch.Tensor) and images.ndim == 4 and images.dtype in (*PLAIN_TENSORS, torch.uint8)
    require(fits, f"{path} has images {found}; they must be floating or uint8 [N, C, H, W]")
    shape, wanted = ("x".join(map(str, s)) for s in (images.shape[1:], (real.channel, *real.im_size)))
    told = f"{path} has {len(images)} images of {shape}; --dataset {real.name} has {wanted}"
    require(shape == wanted and len(images), told)
    (images,) = in_full_range([images.detach()], real.pixel_max, str(path))
    images = unit_images(images).float()
    require(torch.isfinite(images).all(), f"{path} has images that are NaN or infinite; write it again")
    return images


def _read_tensors(files: SetFiles, real: RealData) -> RawSet:
    """MTT and its descendants."""
    images, labels = checked_images(files.content, real, files.images), read_pt(files.labels)
    require(isinstance(labels, torch.Tensor), f"{files.labels} is no tensor of labels; write it again")
    lr = read_pt(files.lr) if files.lr else None
    if isinstance(lr, np.number) or (isinstance(lr, torch.Tensor) and lr.numel() == 1):
        lr = float(lr)
    is_rate = lr is None or (isinstance(lr, (int, float)) and 0 < lr < math.inf)
    require(is_rate, f"{files.lr} holds no positive learning rate; write it again")
    space = None
    if files.images.name.startswith("images_zca_"):
        space = "unit"
    elif any(files.images.parent.glob("images_zca_*.pt")):  # MTT writes it for some iterations only
        space = "zca"
    statistics = MTT_STATISTICS if real.name in ("CIFAR10", "CIFAR100") else None
    return RawSet(images, labels.detach(), None, lr, Normalisation(space, statistics))


def _read_pair(files: SetFiles, real: RealData) -> RawSet:
    images, labels = files.content
    return RawSet(checked_images(images, real, files.images), labels.detach())


def _read_folders(files: SetFiles, real: RealData) -> RawSet:
    """A folder of images for each class: in the order of `real`'s, if it has the same names, or of numbers or names."""
    reader = ImageReader("", real.pixel_max, exact=True)
    folders = _in_order([p for p in files.images.iterdir() if p.is_dir() and is_content(p.name)], real.class_names)
    told = f"{files.images} has {len(folders)} folders; --dataset has {real.num_classes} classes"
    require(len(folders) == real.num_classes, told)
    of_class = [reader.some(folder) for folder in folders]
    images = reader.files([path for paths in of_class for path in paths], real.channel, real.im_size)
    labels = torch.arange(len(folders)).repeat_interleave(torch.tensor([len(paths) for paths in of_class]))
    note = f"classes in the order of the folders: {named([folder.name for folder in folders], 3)}"
    if real.class_names:
        note += f"; those of --data_path: {named(real.class_names, 3)}"
    return RawSet(unit_images(images), labels, note="; ".join([note, *reader.notes()]))


def _in_order(folders: list[Path], class_names: tuple[str, ...]) -> list[Path]:
    """As `class_names`, if these are their names; by number if all are one word and a number; else by name."""
    if {folder.name for folder in folders} == set(class_names):
        return sorted(folders, key=lambda folder: class_names.index(folder.name))
    parts = [re.fullmatch(r"(\D*)(\d+)", folder.name) for folder in folders]
    numbered = all(parts) and len({part[1] for part in parts}) == 1
    return sorted(folders, key=lambda p: int(re.sub(r"\D", "", p.name))) if numbered else sorted(folders)


def _read_kip(files: SetFiles, real: RealData) -> RawSet:
    arrays = read_npz(files.images, ("images", "labels"))
    kinds = " and ".join(str(array.dtype) for array in arrays)
    told = f"{files.images} has images and labels {kinds}; they must be ordinary numbers"
    require(all(array.dtype.kind in "iuf" and array.dtype.isnative and array.itemsize <= 8 for array in arrays), told)
    images, labels = map(torch.from_numpy, arrays)
    images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images
    return RawSet(checked_images(images, real, files.images), labels)


def _published_content(path: Path) -> dict:
    """What scripts/publish.py wrote, in the layout of `res_….pt`."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            content = dict(json.loads((file.metadata() or {}).get("trustdd", "{}")))
    except Exception as error:
        raise UserError(f"cannot read {path}: {one_line(error)}. Copy or publish it again") from None
    require({"images", "labels"} <= {*tensors}, f"{path} lacks images or labels; publish the set again")
    content["data"] = [[tensors["images"], tensors["labels"]]]
    if "outliers" in tensors:
        outliers = tensors["outliers"]
        content["data_oe"] = [[outliers, torch.zeros(outliers.shape[:1], dtype=torch.int64)]]
    if "soft_labels" in tensors:
        require(tensors["soft_labels"].ndim == 2, f"{path} is damaged: its soft labels must be [images, classes]")
        content |= {"soft_labels": [tensors["soft_labels"]], "num_classes": tensors["soft_labels"].shape[-1]}
    if "lr_net" in tensors:
        content["lr_net"] = [tensors["lr_net"].tolist()]
    if "zca_matrix" in tensors:
        content["normalisation"] = {"zca": {n: tensors.get(f"zca_{n}") for n in ("mean", "matrix", "inverse")}}
    told = f"{path} does not say how its images are normalised; copy or publish it again"
    require("normalisation" in content, told)
    return content
