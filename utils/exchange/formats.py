"""The formats in which repositories write distilled sets, and finding out which one a file or folder has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from utils.core.errors import require
from utils.core.images import image_suffixes, is_content
from utils.core.torch_files import read_pt

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


def find_files(paths: Sequence[str | Path], wanted: str | None) -> SetFiles:
    """What the paths of a flag lead to; a `UserError` tells that it is nothing, or several sets.

    They are a file, a folder, or files of images and labels (and of the learning rate); `wanted`: the format, if given.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        require(path.exists(), f"{path} is not there")
    if len(paths) > 1:
        return _of_several(paths, wanted)
    path = paths[0]
    found = _in_folder(path) if path.is_dir() else [_of_file(path)]
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
        role = kinds.get(getattr(read_pt(path), "ndim", None))
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
