"""Data sets of torchvision and pytorch-ood: opened from the disk, or downloaded.

A download goes into a temporary folder first, so that an interrupted one leaves nothing that looks complete. Under
`torchrun` rank 0 downloads while the others wait.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from utils.compute import distributed
from utils.core.errors import UserError, one_line, print_line

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
TINYIMAGES = "300K_random_images.npy"
FROM_PYTORCH_OOD = {  # class and arguments in pytorch_ood.dataset.img
    "Textures": ("Textures", {}),
    "Places365": ("Places365", {}),
    "TinyImageNet_resize": ("TinyImageNetResize", {}),
    "TinyImageNet_crop": ("TinyImageNetCrop", {}),
    "LSUN_resize": ("LSUNResize", {}),
    "LSUN_crop": ("LSUNCrop", {}),
}
_UNPACKED_FILES = {
    "MNIST": "MNIST/raw/*-ubyte (the four unpacked files)",
    "FashionMNIST": "FashionMNIST/raw/*-ubyte (the four unpacked files)",
    "SVHN": "train_32x32.mat and test_32x32.mat",
    "CIFAR10": "cifar-10-batches-py/ (cifar-10-python.tar.gz, unpacked)",
    "CIFAR100": "cifar-100-python/ (cifar-100-python.tar.gz, unpacked)",
}
_ARCHIVES = {
    "MNIST": ("MNIST/raw/*.gz",),
    "FashionMNIST": ("FashionMNIST/raw/*.gz",),
    "SVHN": ("*_32x32.mat",),
    "CIFAR10": ("cifar-10-python.tar.gz",),
    "CIFAR100": ("cifar-100-python.tar.gz",),
}


class NotThere(UserError):
    """A data set that can be downloaded cannot be opened from the disk, and downloading is off or failed."""


def read_torchvision(name: str, root: Path, download: bool, flag: str = "--data_path") -> tuple:
    """Training and test images (uint8 `[N, C, H, W]`), labels (int64 `[N]`) and class names of a torchvision data set.

    torchvision checks the MD5 sums of its downloads, and those of CIFAR's files each time before it unpickles them.

    Args:
        root: its folder; download: download missing files.
        flag: the flag that names the folder, for the message.
    Returns:
        `images_train, labels_train, images_test, labels_test, class_names`; no names where torchvision has none.
    Raises:
        NotThere: when the set cannot be opened from `root`, and `download` is false or fails.
    """
    parts, why = _try_torchvision(name, root)
    if parts is None and not download:
        raise NotThere(_how_to_get(name, root, f"not there ({why})", flag))
    if download and distributed.anywhere(parts is None):
        with distributed.main_first():
            parts = _try_torchvision(name, root)[0] or _fetch_torchvision(name, root, flag)
    names = tuple(getattr(parts[0], "classes", ()))
    return *(t for part in parts for t in _whole_tensors(part)), names


def _try_torchvision(name: str, root: Path) -> tuple[list | None, str]:
    """The training and the test part if they are in `root`, else None and what is wrong."""
    try:
        return _open_torchvision(name, root, False), ""
    except Exception as error:
        return None, one_line(error, 80)


def _open_torchvision(name: str, root: Path, download: bool) -> list:
    """The training and the test part, as torchvision reads them."""
    from torchvision import datasets

    make = getattr(datasets, name)
    if name == "SVHN":
        return [make(root, split=split, download=download) for split in ("train", "test")]
    return [make(root, train=train, download=download) for train in (True, False)]


def _fetch_torchvision(name: str, root: Path, flag: str) -> list:
    print_line(f"{name} is not in {root}; downloading it through torchvision")

    def fetch(folder: Path) -> list:
        """Download both parts into `folder`; archives that `root` already has are not downloaded again."""
        for pattern in _ARCHIVES[name]:
            for path in root.glob(pattern):
                copy = folder / path.relative_to(root)  # no link: torchvision writes over an archive that is not whole
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        return _open_torchvision(name, folder, True)

    try:
        return _fetch_into(root, fetch)
    except Exception as error:
        found = f"not there, and its download failed ({one_line(error, 80)})"
        raise NotThere(_how_to_get(name, root, found, flag)) from None


def _fetch_into(root: Path, fetch: Callable[[Path], object]) -> object:
    """Call `fetch` with a temporary folder, move what it wrote there to `root`, and return its result."""
    made = [p for p in (root, *root.parents) if not p.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as name:
            folder = Path(name)
            result = fetch(folder)
            for path in [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]:
                goal = root / path.relative_to(folder)
                goal.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, goal)
            return result
    except BaseException:
        for path in made:
            with suppress(OSError):  # another process may have put something there
                path.rmdir()
        raise


def _how_to_get(name: str, data_path: Path, found: str, flag: str) -> str:
    return (
        f"{flag} {data_path}: {name} is {found}. Put {_UNPACKED_FILES[name]} into {data_path}, "
        f"or {name.lower()}.npz with the keys {', '.join(NPZ_KEYS)}"
    )


def _whole_tensors(part: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[N, C, H, W]` uint8 and labels int64 `[N]` of a torchvision data set, without a loop over images."""
    images = torch.as_tensor(part.data)
    labels = torch.as_tensor(part.labels if hasattr(part, "labels") else part.targets).long()
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3 and images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, labels


def fetch_tinyimages(path: Path) -> None:
    """Download 300K Random Images (Hendrycks et al.) to `path` through pytorch-ood, which checks the MD5 sum.

    Raises:
        UserError: without pytorch-ood, and when the download fails.
    """
    with distributed.main_first():
        if path.exists():  # rank 0 has downloaded it
            return
        try:
            from pytorch_ood.dataset.img import TinyImages300k
        except ImportError:
            raise UserError(f"--oe_data_path: fetching {path} needs pytorch-ood: pip install pytorch-ood") from None
        try:
            _fetch_into(path.parent, lambda folder: TinyImages300k(root=str(folder), download=True))
        except Exception as error:
            reason = one_line(error, 120)
            raise UserError(f"--oe_data_path: {path} could not be fetched by pytorch-ood: {reason}") from None


def fetch_pytorch_ood(name: str, root: Path) -> Sequence:
    """The OOD set `name` of `FROM_PYTORCH_OOD` as a pytorch-ood data set, downloaded to `root` if it is missing there.

    Raises:
        UserError: without pytorch-ood, and when the download or its checksum fails.
    """
    try:
        from pytorch_ood.dataset import img
    except ImportError:
        raise UserError(f"fetching {name} needs pytorch-ood: pip install pytorch-ood") from None
    cls, kwargs = FROM_PYTORCH_OOD[name]
    make = getattr(img, cls)
    with distributed.main_first():
        try:
            return make(root=str(root), download=False, **kwargs)
        except Exception:  # not there
            pass
        try:
            _fetch_into(root, lambda folder: make(root=str(folder), download=True, **kwargs))
            return make(root=str(root), download=False, **kwargs)
        except Exception as error:
            raise UserError(f"{name} could not be fetched by pytorch-ood: {one_line(error, 120)}") from None
