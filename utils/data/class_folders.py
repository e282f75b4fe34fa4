"""Classification data in folders of images: `train/<class>/*`, and the test set in the layouts that are in use."""

from collections.abc import Sequence
from pathlib import Path

import torch

from utils.core.errors import named, require
from utils.core.files import read_lines
from utils.core.images import ImageReader, is_content

ANNOTATIONS = "val_annotations.txt"  # of TinyImageNet: a line `file<TAB>class<TAB>…` for each image in val/images/
ACCEPTED = "ImageFolder reads train/<class>/* and test/<class>/*, or val/<class>/*"


def read_class_folders(
    data_path: Path, side: int, reader: ImageReader
) -> tuple[Sequence[torch.Tensor], tuple[str, ...], tuple[str, ...]]:
    """Images and labels of `train/<class>/*` and of the test set; the classes, and lines for the log.

    The classes are the sorted names of the folders in `train/`. The test set is `test/`, or `val/` where that alone has
    folders of these names or a file of annotations.
    """
    train, places = data_path / "train", (data_path / "test", data_path / "val")
    require(train.is_dir(), f"{train} is not there; {ACCEPTED}")
    classes = _class_folders(train)
    require(len(classes) >= 2, f"{train} has {len(classes)} folders of classes, and needs two or more; {ACCEPTED}")
    test = next((place for place in places if _layout(place, classes)), None)
    there = " and ".join(str(place) for place in places if place.is_dir() or place == places[0])
    told = f"{there} hold no folder of a class of train/ ({named(classes, 5)}); {ACCEPTED}"
    require(test is not None, told)
    notes, in_file = [], _layout(test, classes) == "file"
    if test != places[0]:
        how = f", with the classes of {ANNOTATIONS}" if in_file else ""
        why = "has no folder of a class of train/" if places[0].is_dir() else "is not there"
        notes.append(f"--data_path: the test set is {test}{how}; {places[0]} {why}")
    of_train = [(path, label) for label, name in enumerate(classes) for path in reader.some(train / name)]
    if in_file:
        of_test = _annotated_images(test, classes)
    else:
        names = _class_folders(test)
        extra = [name for name in names if name not in classes]
        told = f"{test} has classes that {train} lacks: {named(extra, 5)}. Both need the same names"
        require(not extra, told)
        of_test = [(path, classes.index(name)) for name in names for path in reader.find(test / name)]
    require(of_test, ". ".join([f"{test} holds no images; put some there", *reader.notes()]))
    paths, labels = zip(*of_train, *of_test, strict=True)
    counts = [len(of_train), len(of_test)]
    images, images_test = reader.files(paths, 3, (side, side)).split(counts)
    labels, labels_test = torch.tensor(labels).split(counts)
    return (images, labels, images_test, labels_test), tuple(classes), (*notes, *reader.notes())


def _layout(folder: Path, classes: Sequence[str]) -> str:
    """Where the classes of a folder's images stand: in the names of `folders`, in a `file`, or, if empty, nowhere."""
    if any((folder / name).is_dir() for name in classes):
        return "folders"
    return "file" if (folder / ANNOTATIONS).is_file() else ""


def _class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder, which may not be there."""
    return sorted(p.name for p in folder.glob("*") if p.is_dir() and is_content(p.name))


def _annotated_images(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """The images of `folder/images/` with their labels, in the order of the lines of `folder/val_annotations.txt`."""
    found = []
    for number, line in enumerate(read_lines(folder / ANNOTATIONS), 1):
        if not line.strip():
            continue
        name, class_name = (*line.split("\t"), "")[:2]
        require(
            Path(name).name == name and name not in ("", "..") and class_name in classes,
            f"line {number} of {folder / ANNOTATIONS} is {line[:80]!r}; it must be `file<TAB>class<TAB>…`, with a file "
            f"in {folder / 'images'} and a class that is a folder of train/",
        )
        found.append((folder / "images" / name, classes.index(class_name)))
    missing = [str(image) for image, _ in found if not image.exists()]
    require(not missing, f"{folder / ANNOTATIONS} names images that are not there: {named(missing)}")
    return found
