"""Classification data in folders of images: `train/<class>/*`, and the test set in the layouts that are in use."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.core.errors import UserError, blame, named
from utils.core.files import check_file, read_lines
from utils.core.images import ImageReader, check_link, is_content

FLAG = "--data_path"
ANNOTATIONS = "val_annotations.txt"  # of TinyImageNet: a line `file<TAB>class<TAB>…` for each image in val/images/


@blame(FLAG)
def read_class_folders(
    data_path: Path, side: int, reader: ImageReader
) -> tuple[Sequence[torch.Tensor], tuple[str, ...], tuple[str, ...]]:
    """`train/<class>/*` and the test set (`_test_folder`), the classes, and lines for the log.

    The classes are the sorted names of the folders in `train/`.
    """
    train = data_path / "train"
    classes = _class_folders(train)
    test, notes = _test_folder(data_path, classes)
    for folder in (train, test):
        if not folder.is_dir():
            raise UserError(f"{folder} is not there; ImageFolder reads train/<class>/* and test/<class>/*")
    in_file = _annotates(test, classes)
    extra = [] if in_file else [name for name in _class_folders(test) if name not in classes]
    if len(classes) < 2 or extra:
        raise UserError(
            f"{train} has {len(classes)} classes ({named(classes, 5) or 'none'}); {test} has others: "
            f"{named(extra, 5) or 'none'}. Both need the same names, and two classes or more"
        )
    tree = data_path.resolve()
    found: dict[Path, list[tuple[Path, int]]] = {}
    for folder in (train, test):
        check_link(folder, tree)
        there = [(label, folder / c) for label, c in enumerate(classes) if os.path.lexists(folder / c)]
        found[folder] = [(path, label) for label, place in there for path in reader.find(place, tree)]
        if in_file and folder == test:
            found[folder] = _annotated_images(test, classes, tree)
        if not found[folder]:
            raise UserError(". ".join([f"no images below {folder}", *reader.notes()]))
    bare = {*range(len(classes))} - {label for _, label in found[train]}
    if bare:
        bare_name = train / classes[min(bare)]
        raise UserError(f"no images below {bare_name}; put some there, or remove that class")
    counts = [len(found[train]), len(found[test])]
    paths, labels = zip(*found[train], *found[test], strict=True)
    images = reader.files(paths, 3, (side, side)).split(counts)
    of_train, of_test = torch.tensor(labels).split(counts)
    return (images[0], of_train, images[1], of_test), tuple(classes), (*notes, *reader.notes())


def _class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder, which may not be there."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and is_content(p.name))


def _test_folder(data_path: Path, classes: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The folder of the test images, and lines for the log: `test/`, or `val/` where that alone has the classes.

    A folder has the classes if it holds folders of those of `train/`, or a file of annotations (`_annotates`).

    Raises:
        UserError: when neither has them.
    """
    there = [folder for folder in (data_path / "test", data_path / "val") if folder.is_dir()]
    fits = [folder for folder in there if _has_classes(folder, classes) or _annotates(folder, classes)]
    if there and classes and not fits:
        raise UserError(
            f"{' and '.join(map(str, there))} hold no folder of a class of train/ ({named(classes, 5)}); "
            "ImageFolder reads train/<class>/* and test/<class>/*, or val/<class>/*"
        )
    folder = (*fits, data_path / "test")[0]
    if folder.name == "test":
        return folder, ()
    why = "has no folder of a class of train/" if len(there) == 2 else "is not there"
    how = f", with the classes of {ANNOTATIONS}" if _annotates(folder, classes) else ""
    return folder, (f"{FLAG}: the test set is {folder}{how}; {data_path / 'test'} {why}",)


def _annotates(folder: Path, classes: Sequence[str]) -> bool:
    """Whether the classes of a folder's images stand in a file, as in TinyImageNet as it is unpacked."""
    return (folder / ANNOTATIONS).is_file() and not _has_classes(folder, classes)


def _has_classes(folder: Path, classes: Sequence[str]) -> bool:
    return any((folder / name).is_dir() for name in classes)


def _annotated_images(folder: Path, classes: Sequence[str], tree: Path) -> list[tuple[Path, int]]:
    """The images of `folder/images/` with their labels, in the order of the lines of `folder/val_annotations.txt`.

    Raises:
        UserError: for a line without a plain file name and one of `classes`, for missing files, and for links out of
            the folder `tree`.
    """
    path = check_file(folder / ANNOTATIONS)
    label_of = {name: label for label, name in enumerate(classes)}
    found = []
    for number, line in enumerate(read_lines(path), 1):
        name, _, rest = line.partition("\t")
        class_name = rest.partition("\t")[0]
        if not line.strip():
            continue
        if Path(name).name != name or name in ("", "..") or class_name not in label_of:
            raise UserError(
                f"line {number} of {path} is {line[:80]!r}; it must be `file<TAB>class<TAB>…`, with a file in "
                f"{folder / 'images'} and a class that is a folder of train/"
            )
        found.append((folder / "images" / name, label_of[class_name]))
    missing = [str(image) for image, _ in found if not image.exists()]
    if missing:
        raise UserError(f"{path} names images that are not there: {named(missing)}")
    for image, _ in found:
        if image.is_symlink():
            check_link(image, tree)
    return found
