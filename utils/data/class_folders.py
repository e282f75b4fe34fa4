"""Classification data in folders of images: `train/<class>/*`, and the test set in the layouts that are in use."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.core.errors import named, require
from utils.core.files import read_lines
from utils.core.images import ImageReader, check_link, is_content

ANNOTATIONS = "val_annotations.txt"  # of TinyImageNet: a line `file<TAB>class<TAB>…` for each image in val/images/


def read_class_folders(
    data_path: Path, side: int, reader: ImageReader
) -> tuple[Sequence[torch.Tensor], tuple[str, ...], tuple[str, ...]]:
    """`train/<class>/*` and the test set (`_test_folder`), the classes, and lines for the log.

    The classes are the sorted names of the folders in `train/`.
    """
    train, tree = data_path / "train", data_path.resolve()
    classes = _class_folders(train)
    test, notes = _test_folder(data_path, classes)
    for folder in (train, test):
        told = f"{folder} is not there; ImageFolder reads train/<class>/* and test/<class>/*"
        require(folder.is_dir(), told)
    in_file = _annotates(test, classes)
    extra = [] if in_file else [name for name in _class_folders(test) if name not in classes]
    require(
        len(classes) >= 2 and not extra,
        f"{train} has {len(classes)} classes ({named(classes, 5) or 'none'}); {test} has others: "
        f"{named(extra, 5) or 'none'}. Both need the same names, and two classes or more",
    )
    of_train = _images_by_class(train, classes, tree, reader)
    bare = sorted({*range(len(classes))} - {label for _, label in of_train})
    of_test = _annotated_images(test, classes, tree) if in_file else _images_by_class(test, classes, tree, reader)
    empty = [train / classes[label] for label in bare] or [test] * (not of_test)
    told = ". ".join([f"no images below {named([*map(str, empty)], 1)}; put some there, or remove it", *reader.notes()])
    require(not empty, told)
    paths, labels = zip(*of_train, *of_test, strict=True)
    counts = [len(of_train), len(of_test)]
    images, images_test = reader.files(paths, 3, (side, side)).split(counts)
    labels, labels_test = torch.tensor(labels).split(counts)
    return (images, labels, images_test, labels_test), tuple(classes), (*notes, *reader.notes())


def _images_by_class(folder: Path, classes: Sequence[str], tree: Path, reader: ImageReader) -> list[tuple[Path, int]]:
    """The images below the folders of the classes, of which some may be missing, with their labels."""
    there = [(label, folder / name) for label, name in enumerate(classes) if os.path.lexists(folder / name)]
    return [(path, label) for label, place in there for path in reader.find(place, tree)]


def _class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder, which may not be there."""
    return sorted(p.name for p in folder.glob("*") if p.is_dir() and is_content(p.name))


def _test_folder(data_path: Path, classes: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The folder of the test images, and lines for the log: `test/`, or `val/` where that alone has the classes.

    A folder has the classes if it holds folders of those of `train/`, or a file of annotations.
    """
    test = data_path / "test"
    there = [folder for folder in (test, data_path / "val") if folder.is_dir()]
    fits = [folder for folder in there if _has_classes(folder, classes) or _annotates(folder, classes)]
    require(
        fits or not there or not classes,
        f"{' and '.join(map(str, there))} hold no folder of a class of train/ ({named(classes, 5)}); "
        "ImageFolder reads train/<class>/* and test/<class>/*, or val/<class>/*",
    )
    folder = (*fits, test)[0]
    if folder == test:
        return folder, ()
    why = "has no folder of a class of train/" if len(there) == 2 else "is not there"
    how = f", with the classes of {ANNOTATIONS}" if _annotates(folder, classes) else ""
    return folder, (f"--data_path: the test set is {folder}{how}; {test} {why}",)


def _annotates(folder: Path, classes: Sequence[str]) -> bool:
    """Whether the classes of a folder's images stand in a file, as in TinyImageNet as it is unpacked."""
    return (folder / ANNOTATIONS).is_file() and not _has_classes(folder, classes)


def _has_classes(folder: Path, classes: Sequence[str]) -> bool:
    return any((folder / name).is_dir() for name in classes)


def _annotated_images(folder: Path, classes: Sequence[str], tree: Path) -> list[tuple[Path, int]]:
    """The images of `folder/images/` with their labels, in the order of the lines of `folder/val_annotations.txt`."""
    found = []
    for number, line in enumerate(read_lines(folder / ANNOTATIONS), 1):
        name, class_name = (*line.split("\t"), "")[:2]
        require(
            Path(name).name == name and name not in ("", "..") and class_name in classes,
            f"line {number} of {folder / ANNOTATIONS} is {line[:80]!r}; it must be `file<TAB>class<TAB>…`, with a file "
            f"in {folder / 'images'} and a class that is a folder of train/",
        )
        found.append((folder / "images" / name, classes.index(class_name)))
    missing = [str(image) for image, _ in found if not image.exists()]
    require(not missing, f"{folder / ANNOTATIONS} names images that are not there: {named(missing)}")
    for image, _ in found:
        check_link(image, tree)
    return found
