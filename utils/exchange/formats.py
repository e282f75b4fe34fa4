"""The formats in which repositories write distilled sets, and finding out which one a file or folder has."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from utils.core.errors import UserError
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
    """What the paths of a flag lead to.

    Args:
        paths: a file, a folder, or files of images and labels (and of the learning rate).
        wanted: the format, if the user says so.
    Raises:
        UserError: when nothing is found, or several sets.
    """
    found = [Path(p) for p in paths]
    for path in found:
        if not path.exists():
            raise UserError(f"{path} is not there")
    if len(found) > 1:
        return _of_several(found, wanted)
    path = found[0]
    candidates = _in_folder(path) if path.is_dir() else [_of_file(path)]
    if wanted is not None:
        candidates = [c for c in candidates if c.format == wanted or {c.format, wanted} == {"mtt", "datm"}]
        for candidate in candidates:
            candidate.format = wanted
    if not candidates:
        of_format = f" of --distilled_format {wanted}" if wanted else ""
        raise UserError(f"{path} holds no distilled set{of_format}. {_accepted()}")
    if len(candidates) > 1:
        names = ", ".join(f"{c.images.name} ({c.format})" for c in candidates[:6])
        raise UserError(f"{path} holds several sets: {names}. Give the file, or --distilled_format")
    return candidates[0]


def _accepted() -> str:
    return "Accepted: " + "; ".join(f"{name}: {what}" for name, what in FORMATS.items())


def _of_several(paths: list[Path], wanted: str | None) -> SetFiles:
    """Files of images, labels and perhaps a learning rate, told apart by their shapes."""
    kinds = {4: "images", 1: "labels", 2: "labels", 0: "lr"}
    roles: dict[str, Path] = {}
    for path in paths:
        content = read_pt(path)
        role = kinds.get(content.ndim if isinstance(content, torch.Tensor) else -1)
        if role is None or role in roles:
            raise UserError(
                f"{path} is no tensor of images [N, C, H, W] or labels [N] or [N, classes] that the other "
                "files lack. Give one set at a time"
            )
        roles[role] = path
    if not {"images", "labels"} <= {*roles}:
        raise UserError(f"{', '.join(map(str, paths))} lack {'labels' if 'images' in roles else 'images'}")
    guess = wanted or ("datm" if "lr" in roles else "mtt")
    if guess not in ("mtt", "datm"):
        raise UserError(f"files of images and labels are of the formats mtt and datm, not of {guess}")
    return SetFiles(guess, roles["images"], roles["labels"], roles.get("lr"))


def _of_file(path: Path) -> SetFiles:
    """The set in, or beginning with, a file."""
    if path.suffix == ".safetensors":
        return SetFiles("published", path)
    if path.suffix == ".npz":
        return SetFiles("kip", path)
    files = SetFiles("res", path)
    content = files.content
    if isinstance(content, dict) and "data" in content:
        return files
    if isinstance(content, (list, tuple)) and len(content) == 2 and all(isinstance(t, torch.Tensor) for t in content):
        files.format = "idc"
        return files
    if isinstance(content, torch.Tensor) and content.ndim == 4:
        return _with_labels(path)
    raise UserError(f"{path} is of no known format. {_accepted()}")


def _with_labels(images: Path) -> SetFiles:
    """The set of a file `images_….pt` and the files of labels and learning rate beside it."""
    suffix = re.sub(r"^images(_zca)?(?=[_.])", "", images.name)  # "_best.pt", "_500.pt" or ".pt"
    labels, lr = images.with_name(f"labels{suffix}"), images.with_name(f"lr{suffix}")
    if suffix == images.name or not labels.is_file():
        wanted = labels.name if suffix != images.name else "its labels"
        raise UserError(f"{images} holds images alone; {wanted} must be beside it, or give both files")
    return SetFiles("datm" if lr.is_file() else "mtt", images, labels, lr if lr.is_file() else None)


def _in_folder(folder: Path) -> list[SetFiles]:
    """All sets in a folder; of the iterations of one set the last."""
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > MAX_NAMES:
                raise UserError(f"{folder} has more than {MAX_NAMES} names; no distilled set is like that")
    if SAFETENSORS in names:  # pictures of the same images lie beside it
        return [SetFiles("published", folder / SAFETENSORS)]
    found = [_with_labels(folder / name) for name in _newest(names, "images")]
    found += [SetFiles("idc", folder / name) for name in _newest(names, "data")]
    for name in sorted(names):
        if re.fullmatch(r"res_.*\.pt", name) and not name.endswith("_last_finite.pt"):
            found.append(SetFiles("res", folder / name))
        elif name.endswith(".npz"):
            found.append(SetFiles("kip", folder / name))
    folders = [folder / name for name in sorted(names) if is_content(name) and os.path.isdir(folder / name)]
    if any(_has_images(inner) for inner in folders[:3]):
        found.append(SetFiles("folders", folder))
    return found


def _newest(names: Sequence[str], stem: str) -> list[str]:
    """`<stem>.pt`, else `<stem>_best.pt`, else `<stem>_<iteration>.pt` of the last iteration: none or one name."""
    for name in (f"{stem}.pt", f"{stem}_best.pt"):
        if name in names:
            return [name]
    numbered = [name for name in names if re.fullmatch(rf"{stem}_?\d+\.pt", name)]
    return [max(numbered, key=lambda name: int(re.sub(r"\D", "", name)))] if numbered else []


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        names = [e.name for _, e in zip(range(100), entries, strict=False) if is_content(e.name)]
    return any(Path(name).suffix.lower() in image_suffixes() for name in names)
