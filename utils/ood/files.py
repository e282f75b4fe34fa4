"""OOD sets on the disk: which entries of `--ood_sets` are paths, how such sets are called, and lists of images."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import named, require
from utils.core.files import check_file, read_lines

ARRAY_SUFFIXES = (".npz", ".npy")
LIST_SUFFIX = ".txt"
SUFFIXES = (*ARRAY_SUFFIXES, LIST_SUFFIX)


def is_path(given: str) -> bool:
    """Whether an entry of `--ood_sets` is a path, not a name: it has a separator, or the suffix of an array or list."""
    return "/" in given or os.sep in given or Path(given).suffix in SUFFIXES


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

    The paths are relative to `root`, to OpenOOD's folder `images_classic` or `images_largescale` in it, or to the
    folder of the list: the first where one of the images is. A `UserError` tells of another line, of files that are
    missing, and of paths that lead out of the folder.
    """
    names = []
    for number, line in enumerate(read_lines(check_file(path)), 1):
        if not line.strip():
            continue
        match, where = re.fullmatch(r"\s*(\S.*?)\s+-?\d+\s*", line), f"line {number} of {path}"
        require(match, f"{where} is {line[:80]!r}; it must be `path label`, the label a whole number")
        name = Path(match[1])
        require(not name.is_absolute() and ".." not in name.parts, f"{where} leads out of its folder: {match[1]}")
        names.append(match[1])
    require(names, f"{path} names no images; each line must be `path label`")
    bases = [root, root / "images_classic", root / "images_largescale", path.parent]
    base = next((b for name in names for b in bases if os.path.exists(b / name)), None)
    looked = ", ".join(map(str, bases))
    require(base, f"none of the {len(names)} images of {path}, as {names[0]}, is in one of {looked}")
    images = [base / name for name in names]
    missing = [str(image) for image in images if not os.path.exists(image)]
    require(not missing, f"{path} names {len(missing)} images that are not there: {named(missing)}")
    return images
