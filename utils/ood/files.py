"""OOD sets on the disk: which entries of `--ood_sets` are paths, how such sets are called, and lists of images."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError, named
from utils.core.files import check_file, read_lines
from utils.core.images import check_link

ARRAY_SUFFIXES = (".npz", ".npy")
LIST_SUFFIX = ".txt"
SUFFIXES = (*ARRAY_SUFFIXES, LIST_SUFFIX)
OPENOOD_FOLDERS = ("images_classic", "images_largescale")  # OpenOOD's lists are relative to one of them


def is_path(given: str) -> bool:
    """Whether an entry of `--ood_sets` is a path, not a name: it has a separator, or the suffix of an array or list."""
    return any(separator and separator in given for separator in (os.sep, os.altsep)) or Path(given).suffix in SUFFIXES


def stem(given: str) -> str:
    """The name of a set that is given by its path: without folders, and without the suffix of an array or a list."""
    path = Path(given)
    path = path.resolve() if path.name in ("", "..") else path
    return path.stem if path.suffix in SUFFIXES else path.name


def shown_names(given: Sequence[str]) -> dict[str, str]:
    """What each entry of `--ood_sets` is called in tables: a name as it is, a path by its stem if no other has that."""
    short = {entry: stem(entry) if is_path(entry) else entry for entry in given}
    count = Counter(short.values())
    return {entry: name if count[name] == 1 else entry for entry, name in short.items()}


def listed_images(path: Path, root: Path) -> list[Path]:
    """The images that a list names, as OpenOOD's `imglist`: `path label` in each line, the label a whole number.

    Args:
        root: what the paths are relative to; or its folder `images_classic` or `images_largescale`, or the folder of
            the list: the first where one of the images is.
    Raises:
        UserError: for another line, for files that are missing, and for paths and links that lead out of the folder.
    """
    lines = enumerate(read_lines(check_file(path)), 1)
    names = [_image_name(line, number, path) for number, line in lines if line.strip()]
    if not names:
        raise UserError(f"{path} names no images; each line must be `path label`")
    bases = [root, *(root / folder for folder in OPENOOD_FOLDERS), path.parent]
    base = next((b for name in names for b in bases if os.path.exists(b / name)), None)
    if base is None:
        looked = ", ".join(map(str, bases))
        raise UserError(f"none of the {len(names)} images of {path}, as {names[0]}, is in one of {looked}")
    images = [base / name for name in names]
    missing = [str(image) for image in images if not os.path.exists(image)]
    if missing:
        raise UserError(f"{path} names {len(missing)} images that are not there: {named(missing)}")
    tree = base.resolve()
    for place in (*sorted({image.parent for image in images}), *(image for image in images if image.is_symlink())):
        check_link(place, tree)
    return images


def _image_name(line: str, number: int, path: Path) -> str:
    """The path in a line of a list; its last word is the label."""
    match = re.fullmatch(r"\s*(\S.*?)\s+-?\d+\s*", line)
    if not match:
        raise UserError(f"line {number} of {path} is {line[:80]!r}; it must be `path label`, the label a whole number")
    name = Path(match[1])
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"line {number} of {path} leads out of its folder: {match[1]}")
    return match[1]
