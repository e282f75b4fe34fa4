"""Data sets of torchvision and pytorch-ood: opened from the disk, or downloaded.

A download goes into a temporary folder first, so that an interrupted one leaves nothing that looks complete. Under
`torchrun` rank 0 downloads while the others wait.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.compute import distributed
from utils.compute.version import require_pytorch_ood
from utils.core.errors import UserError, blame, one_line, print_line, require
from utils.core.files import read_npz
from utils.core.pixels import images_to_nchw, in_full_range

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
FROM_PYTORCH_OOD = {  # class in pytorch_ood.dataset.img
    "Textures": "Textures",
    "Places365": "Places365",
    "TinyImageNet_resize": "TinyImageNetResize",
    "TinyImageNet_crop": "TinyImageNetCrop",
    "LSUN_resize": "LSUNResize",
    "LSUN_crop": "LSUNCrop",
}
TORCHVISION_FILES = {  # what each set of torchvision is made of, for messages and to find its archives
    "MNIST": "MNIST/raw/*-ubyte (the four unpacked files)",
    "FashionMNIST": "FashionMNIST/raw/*-ubyte (the four unpacked files)",
    "SVHN": "train_32x32.mat and test_32x32.mat",
    "CIFAR10": "cifar-10-batches-py/ (cifar-10-python.tar.gz, unpacked)",
    "CIFAR100": "cifar-100-python/ (cifar-100-python.tar.gz, unpacked)",
    "KMNIST": "KMNIST/raw/*-ubyte (the four unpacked files)",
    "EMNIST": "EMNIST/raw/emnist-letters-test-*-ubyte (the two unpacked files)",
    "USPS": "usps.t.bz2",
    "STL10": "stl10_binary/ (stl10_binary.tar.gz, unpacked)",
    "Omniglot": "omniglot-py/images_evaluation.zip and omniglot-py/images_evaluation/ (unpacked from it)",
    "GTSRB": "gtsrb/ (GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip, unpacked)",
    "Flowers102": "flowers-102/ (102flowers.tgz, unpacked, imagelabels.mat and setid.mat)",
    "Food101": "food-101/ (food-101.tar.gz, unpacked)",
}
ARCHIVES = (".gz", ".tgz", ".zip", ".bz2", ".mat")
_TEST_PART = {  # torchvision's arguments; those of the others: train=False
    **{name: {"split": "test"} for name in ("SVHN", "STL10", "GTSRB", "Flowers102", "Food101")},
    "EMNIST": {"split": "letters", "train": False},  # letters alone: beside digits no class is known
    "Omniglot": {"background": False},
}


class NotThere(UserError):
    """A data set that can be downloaded cannot be opened from the disk, and downloading is off or failed."""


def read_torchvision(name: str, root: Path, download: bool) -> tuple:
    """Training images (uint8 `[N, C, H, W]`) and labels (int64 `[N]`), those of the test set, and class names.

    torchvision checks the MD5 sums of its downloads, and those of CIFAR's files each time before it unpickles them.
    `NotThere` tells that the set is not in `root`, and `download` is false or fails.
    """
    parts = [{"split": "train"} if name == "SVHN" else {"train": True}, _TEST_PART.get(name, {"train": False})]
    train, test = _opened(name, root, parts, download, "--data_path", f"keys {', '.join(NPZ_KEYS)}")
    return *_whole_tensors(train), *_whole_tensors(test), tuple(getattr(train, "classes", ()))


def load_test_images(
    name: str, root: Path, download: bool, flag: str = "--data_path", pixel_max: int | None = None
) -> torch.Tensor | Sequence[tuple]:
    """The test images of a set of `TORCHVISION_FILES`, uint8 `[N, C, H, W]`, to be an OOD set; see `read_torchvision`.

    Where they are files of many sizes, it is the data set, whose items begin with a PIL image.
    """
    local = root / f"{name.lower()}.npz"
    if local.is_file() and not download:  # else all processes fetch it together
        with blame(flag):
            (images,) = read_npz(local, ["test_images"])
            return in_full_range([images_to_nchw(images, local).contiguous()], pixel_max, str(local))[0]
    (part,) = _opened(name, root, [_TEST_PART.get(name, {"train": False})], download, flag, "key test_images")
    if not hasattr(part, "data"):
        return part
    images = _whole_tensors(part)[0]
    return images.transpose(2, 3).contiguous() if name == "EMNIST" else images  # it is stored with rows as columns


def _opened(name: str, root: Path, parts: Sequence[dict], download: bool, flag: str, keys: str) -> list:
    """The parts (torchvision's arguments); `keys`: those of the file that may replace them, for the message."""
    from torchvision import datasets

    def open_in(folder: Path, download: bool = False) -> list:
        return [getattr(datasets, name)(folder, **part, download=download) for part in parts]

    def fetch(folder: Path) -> None:
        """Download the parts into `folder`; archives that `root` already has are not downloaded again."""
        files = TORCHVISION_FILES[name]
        top = files.split("/")[0]
        for path in (*root.glob("*"), *root.glob(f"{top}/*"), *root.glob(f"{top}/raw/*")):
            if path.suffix in ARCHIVES and (path.parent != root or path.name in files):
                copy = folder / path.relative_to(root)  # no link: torchvision writes over an archive that is not whole
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        open_in(folder, download=True)

    cure = f"Put {TORCHVISION_FILES[name]} into {root}, or {name.lower()}.npz with the {keys}"
    found, why = _try(lambda: open_in(root))
    if why and not download:
        raise NotThere(f"{flag} {root}: {name} is not there ({why}). {cure}")
    if not download or not distributed.anywhere(bool(why)):
        return found
    with distributed.main_first():
        found, why = _try(lambda: open_in(root))  # rank 0 may have downloaded it
        if not why:
            return found
        print_line(f"{name} is not in {root}; downloading it through torchvision")
        _, why = _try(lambda: _fetch_into(root, fetch))
        if why:
            raise NotThere(f"{flag} {root}: {name} is not there, and its download failed ({why}). {cure}")
        return open_in(root)


def _try(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` returns, or None and what is wrong."""
    try:
        return make(), ""
    except Exception as error:
        return None, one_line(error, 120)


def _fetch_into(root: Path, fetch: Callable[[Path], Any]) -> None:
    """Call `fetch` with a temporary folder, and move what it wrote there to `root`."""
    beside = next(place for place in (root, *root.absolute().parents) if place.exists())
    with tempfile.TemporaryDirectory(prefix=".download-", dir=beside) as folder:
        fetch(Path(folder))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.suffix in ARCHIVES):  # last, as they are checked alone
            goal = root / path.relative_to(folder)
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, goal)


def _whole_tensors(part: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[N, C, H, W]` uint8 and labels int64 `[N]` of a torchvision data set, without a loop over images."""
    images = torch.as_tensor(part.data)
    labels = torch.as_tensor(part.labels if hasattr(part, "labels") else part.targets).long()
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3 and images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, labels


def fetch_pytorch_ood(name: str, root: Path, what: str | None = None) -> Sequence:
    """A data set of pytorch-ood, by a name of `FROM_PYTORCH_OOD` or its class, downloaded to `root` if it is missing.

    pytorch-ood checks MD5 sums. A `UserError` tells why it cannot be fetched; `what` names it there, else `name` does.
    """
    what = what or name
    require_pytorch_ood(f"fetching {what}")
    from pytorch_ood.dataset import img

    make = getattr(img, FROM_PYTORCH_OOD.get(name, name))
    with distributed.main_first():
        found, why = _try(lambda: make(root=str(root), download=False))
        if why:
            _, why = _try(lambda: _fetch_into(root, lambda folder: make(root=str(folder), download=True)))
            require(not why, f"{what} could not be fetched by pytorch-ood: {why}")
            found = make(root=str(root), download=False)
        return found
