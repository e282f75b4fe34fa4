"""The formats in which repositories write distilled sets, and finding out which one a file or folder has."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch

from utils.core.errors import UserError, require
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
MAX_NAMES = 100_000  # in a folder; no distilled set has more


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

    Args:
        paths: a file, a folder, or files of images and labels (and of the learning rate).
        wanted: the format, if the user says so.
    """
    for path in map(Path, paths):
        require(path.exists(), f"{path} is not there")
    if len(paths) > 1:
        return _of_several([Path(p) for p in paths], wanted)
    path = Path(paths[0])
    candidates = list(_in_folder(path)) if path.is_dir() else [_of_file(path)]
    if wanted is not None:
        candidates = [c for c in candidates if c.format == wanted or {c.format, wanted} == {"mtt", "datm"}]
        for candidate in candidates:
            candidate.format = wanted
    of_format = f" of --distilled_format {wanted}" if wanted else ""
    require(candidates, f"{path} holds no distilled set{of_format}. {ACCEPTED}")
    names = ", ".join(f"{c.images.name} ({c.format})" for c in candidates[:6])
    require(len(candidates) == 1, f"{path} holds several sets: {names}. Give the file, or --distilled_format")
    return candidates[0]


def _of_several(paths: list[Path], wanted: str | None) -> SetFiles:
    """Files of images, labels and perhaps a learning rate, told apart by their shapes."""
    kinds = {4: "images", 1: "labels", 2: "labels", 0: "lr"}
    roles: dict[str, Path] = {}
    for path in paths:
        content = read_pt(path)
        role = kinds.get(content.ndim) if isinstance(content, torch.Tensor) else None
        require(
            role and role not in roles,
            f"{path} is no tensor of images [N, C, H, W] or labels [N] or [N, classes] that the other files lack. Give "
            "one set at a time",
        )
        roles[role] = path
    for role in ("images", "labels"):
        require(role in roles, f"{', '.join(map(str, paths))} lack {role}")
    form = wanted or ("datm" if "lr" in roles else "mtt")
    require(form in ("mtt", "datm"), f"files of images and labels are of the formats mtt and datm, not of {form}")
    return SetFiles(form, roles["images"], roles["labels"], roles.get("lr"))


def _of_file(path: Path) -> SetFiles:
    """The set in, or beginning with, a file."""
    files = SetFiles(BY_SUFFIX.get(path.suffix, "res"), path)
    if files.format != "res":
        return files
    content = files.content
    if isinstance(content, torch.Tensor) and content.ndim == 4:
        return _with_labels(path)
    if isinstance(content, (list, tuple)) and len(content) == 2 and all(isinstance(t, torch.Tensor) for t in content):
        files.format = "idc"
    elif not (isinstance(content, dict) and "data" in content):
        raise UserError(f"{path} is of no known format. {ACCEPTED}")
    return files


def _with_labels(images: Path) -> SetFiles:
    """The set of a file `images_….pt` and the files of labels and learning rate beside it."""
    suffix = re.sub(r"^images(_zca)?(?=[_.])", "", images.name)  # "_best.pt", "_500.pt" or ".pt"
    labels, lr = images.with_name(f"labels{suffix}"), images.with_name(f"lr{suffix}")
    has_labels = suffix != images.name and labels.is_file()
    missing = labels.name if suffix != images.name else "its labels"
    require(has_labels, f"{images} holds images alone; {missing} must be beside it, or give both files")
    return SetFiles("datm", images, labels, lr) if lr.is_file() else SetFiles("mtt", images, labels)


def _in_folder(folder: Path) -> Iterator[SetFiles]:
    """All sets in a folder; of the iterations of one set the last."""
    names = sorted(_names(folder, MAX_NAMES + 1))
    require(len(names) <= MAX_NAMES, f"{folder} has more than {MAX_NAMES} names; no distilled set is like that")
    if SAFETENSORS in names:  # pictures of the same images lie beside it
        yield SetFiles("published", folder / SAFETENSORS)
        return
    for name in _newest(names, "images"):
        yield _with_labels(folder / name)
    for name in _newest(names, "data"):
        yield SetFiles("idc", folder / name)
    for name in names:
        if re.fullmatch(r"res_.*(?<!_last_finite)\.pt", name):
            yield SetFiles("res", folder / name)
        elif name.endswith(".npz"):
            yield SetFiles("kip", folder / name)
    inner = [folder / name for name in names if is_content(name) and os.path.isdir(folder / name)]
    files = [Path(name) for place in inner[:3] for name in _names(place, 100)]
    if any(is_content(file.name) and file.suffix.lower() in image_suffixes() for file in files):
        yield SetFiles("folders", folder)


def _names(folder: Path, most: int) -> list[str]:
    """At most so many names of what is in a folder."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in islice(entries, most)]


def _newest(names: Sequence[str], stem: str) -> list[str]:
    """`<stem>.pt`, else `<stem>_best.pt`, else `<stem>_<iteration>.pt` of the last iteration: none or one name."""
    for name in (f"{stem}.pt", f"{stem}_best.pt"):
        if name in names:
            return [name]
    numbered = [name for name in names if re.fullmatch(rf"{stem}_?\d+\.pt", name)]
    return [max(numbered, key=lambda name: int(re.sub(r"\D", "", name)))] if numbered else []
