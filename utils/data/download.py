"""Data sets through torchvision and pytorch-ood: opened where they are, or fetched whole."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from utils.core.errors import UserError

Arrays = tuple


class NotThere(UserError):
    """A data set that could be fetched is not on the disk, or its download failed; nothing there is damaged."""


NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def _read_torchvision(name: str, root: Path, download: bool, flag: str = "--data_path") -> Arrays:
    try:
        parts = _open_torchvision(name, root, False)
    except Exception as error:
        parts = _fetch(name, root, flag) if download else None
        if parts is None:
            raise NotThere(_how_to_get(name, root, f"not there ({_one_line(error)})", flag)) from None
    return tuple(t for part in parts for t in _whole_tensors(part))


def _open_torchvision(name: str, root: Path, download: bool) -> list:
    """The training and the test part, as torchvision reads them."""
    from torchvision import datasets

    make = getattr(datasets, name)
    if name == "SVHN":
        return [make(root, split=split, download=download) for split in ("train", "test")]
    return [make(root, train=train, download=download) for train in (True, False)]


def _fetch(name: str, root: Path, flag: str) -> list:
    """Download into a temporary folder, then move it all to `root`: a failure leaves nothing half-made there."""
    print(f"{name} is not in {root}; downloading it through torchvision", flush=True)
    made = [p for p in (root, *root.parents) if not p.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
            there = Path(folder)
            _link_archives(name, root, there)
            parts = _open_torchvision(name, there, True)
            for path in [p for p in there.rglob("*") if p.is_file() and not p.is_symlink()]:
                goal = root / path.relative_to(there)
                goal.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, goal)
            return parts
    except Exception as error:
        for path in made:
            with suppress(OSError):  # another process may have put something there
                path.rmdir()
        found = f"not there, and its download failed ({_one_line(error)})"
        raise NotThere(_how_to_get(name, root, found, flag)) from None


def _link_archives(name: str, root: Path, there: Path) -> None:
    """Let torchvision find archives that are in `root` already, so that it only fetches what is missing."""
    for pattern in _ARCHIVES[name]:
        for path in root.glob(pattern):
            link = there / path.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:80]


_FILES = {
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


def _how_to_get(name: str, data_path: Path, found: str, flag: str) -> str:
    return (
        f"{flag} {data_path}: {name} is {found}. Put {_FILES[name]} into {data_path}, "
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


TINYIMAGES = "300K_random_images.npy"


def _fetch_tinyimages(path: Path) -> None:
    """Fetch 300K Random Images (Hendrycks et al.) to `path` through pytorch-ood, which checks the md5 sum."""
    try:
        from pytorch_ood.dataset.img import TinyImages300k
    except ImportError:
        raise UserError(f"--oe_data_path: {path} is fetched by pytorch-ood: pip install pytorch-ood") from None
    try:
        TinyImages300k(root=str(path.parent), download=True)
    except Exception as error:
        raise UserError(f"--oe_data_path: {path} could not be fetched by pytorch-ood: {str(error)[:120]}") from None


FROM_PYTORCH_OOD = {  # class and arguments in pytorch_ood.dataset.img
    "Textures": ("Textures", {}),
    "Places365": ("Places365", {}),
    "TinyImageNet_resize": ("TinyImageNetResize", {}),
    "TinyImageNet_crop": ("TinyImageNetCrop", {}),
    "LSUN_resize": ("LSUNResize", {}),
    "LSUN_crop": ("LSUNCrop", {}),
}


def _fetch_pytorch_ood(name: str, root: Path) -> Sequence:
    try:
        from pytorch_ood.dataset import img
    except ImportError:
        raise UserError(f"{name} is fetched by pytorch-ood: pip install pytorch-ood") from None
    cls, kwargs = FROM_PYTORCH_OOD[name]
    try:
        return getattr(img, cls)(root=str(root), download=True, **kwargs)
    except Exception as error:  # a failed download, a failed checksum, a full disk
        raise UserError(f"{name} could not be fetched by pytorch-ood: {str(error)[:120]}") from None
