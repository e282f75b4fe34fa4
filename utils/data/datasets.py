"""Real data as whole tensors: read once, kept as uint8, normalised where they are used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from networks import get_network
from utils.compute.transfer import send
from utils.core.arrays import images_to_nchw, read_npz
from utils.core.errors import UserError, blame, unknown_name
from utils.core.images import ImageReader
from utils.core.pixels import in_full_range, unit_images
from utils.core.torch_files import PLAIN_INTEGERS, fingerprint, read_pt
from utils.data.class_folders import read_class_folders
from utils.data.download import NPZ_KEYS, read_torchvision, read_torchvision_test
from utils.data.whitening import ZCA, fit_zca


@dataclass(frozen=True)
class Spec:
    """What is known of a named data set: image shape, classes and normalisation (None: computed)."""

    channel: int
    side: int
    num_classes: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def _of_255(*values: float) -> tuple[float, ...]:
    return tuple(v / 255 for v in values)


SPECS = {
    "MNIST": Spec(1, 28, 10, (0.1307,), (0.3081,)),
    "FashionMNIST": Spec(1, 28, 10, (0.2861,), (0.3530,)),
    "SVHN": Spec(3, 32, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CIFAR10": Spec(3, 32, 10, _of_255(125.3, 123.0, 113.9), _of_255(63.0, 62.1, 66.7)),
    "CIFAR100": Spec(3, 32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "TinyImageNet": Spec(3, 64, 200, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "Digits": Spec(1, 8, 10, None, None),
}
DATASET_NAMES = (*SPECS, "ImageFolder", "npz")


@dataclass(frozen=True)
class RealData:
    """A classification data set in memory."""

    name: str
    num_classes: int
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]  # per channel
    images_train: torch.Tensor  # [N, C, H, W], uint8 (or float32 in [0, 1])
    labels_train: torch.Tensor  # int64 [N] in 0..num_classes-1
    images_test: torch.Tensor
    labels_test: torch.Tensor
    zca: ZCA | None = None  # whitening instead of mean and std
    class_names: tuple[str, ...] = ()  # in the order of the labels, of the folders or torchvision; empty: not known
    notes: tuple[str, ...] = ()  # lines for the log
    pixel_max: int | None = None  # the value of white in dark images, of outliers too (`--pixel_max`)

    @property
    def channel(self) -> int:
        """Number of channels."""
        return self.images_train.shape[1]

    @property
    def im_size(self) -> tuple[int, int]:
        """Height and width."""
        return tuple(self.images_train.shape[2:])

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.images_train.device

    def network(self, model: str, generator: torch.Generator | None = None) -> nn.Module:
        """A network for these images and classes, on the CPU, its weights drawn from `generator`; see `get_network`."""
        return get_network(model, self.channel, self.num_classes, self.im_size, generator)

    @cached_property
    def _scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (self.mean, self.std))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images in [0, 1] to zero mean and unit deviation per channel, or whiten them."""
        if self.zca is not None:
            return self.zca.whiten(images)
        mean, std = self._scale
        return (images - mean).div_(std)

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize`, clipped to [0, 1]."""
        if self.zca is not None:
            return self.zca.undo(images).clamp(0, 1)
        mean, std = self._scale
        return (images * std + mean).clamp(0, 1)

    def unit_train(self, indices: torch.Tensor) -> torch.Tensor:
        """Training images at `indices`, float32 in [0, 1]."""
        return unit_images(self.images_train.index_select(0, send(indices, self.device)))  # far faster than []

    def train_batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Training images at `indices`, normalised."""
        return self.normalize(self.unit_train(indices))

    @cached_property
    def test_images(self) -> torch.Tensor:
        """All test images, normalised once, float32 `[N, C, H, W]`."""
        return self.normalize(unit_images(self.images_test))

    @cached_property
    def class_indices(self) -> tuple[torch.Tensor, ...]:
        """For each class the indices of its training images, on the CPU (draws are made there)."""
        labels = self.labels_train.cpu()
        order = labels.argsort(stable=True)
        return order.split(labels.bincount(minlength=self.num_classes).tolist())

    def choose(self, label: int, n: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of `n` different training images of a class, or of all if there are fewer; int64, on the CPU."""
        indices = self.class_indices[label]
        return indices[torch.randperm(len(indices), generator=generator)[:n]]

    def lines(self) -> tuple[str, ...]:
        """Lines for the log: how many images there are, and what was noted when they were read."""
        sizes = self.labels_train.bincount(minlength=self.num_classes)
        counts = (
            f"{len(self.labels_train)} training images of {self.num_classes} classes (smallest {int(sizes.min())}, "
            f"largest {int(sizes.max())}), {len(self.labels_test)} test images"
        )
        return counts, *self.notes

    def fingerprint(self) -> str:
        """SHA-256 of the images and labels."""
        return fingerprint((self.images_train, self.labels_train, self.images_test, self.labels_test))

    def to(self, device: torch.device | str) -> "RealData":
        """The same data on `device`."""
        names = ("images_train", "labels_train", "images_test", "labels_test")
        moved = {n: send(getattr(self, n), torch.device(device)) for n in names}
        return replace(self, **moved, zca=None if self.zca is None else self.zca.to(device))

    def whitened(self) -> "RealData":
        """The same data with ZCA whitening, fitted on the training images, in place of mean and deviation."""
        parts = (unit_images(part) for part in self.images_train.split(5000))
        return replace(self, zca=fit_zca(parts))


def load_dataset(
    name: str,
    data_path: str | Path,
    im_size: int | None = None,
    download: bool = True,
    zca: bool = False,
    pixel_max: int | None = None,
) -> RealData:
    """Load a data set as whole CPU tensors.

    Args:
        name: one of `DATASET_NAMES`.
        data_path: the folder of the data; for `npz` the file itself, for `ImageFolder` the folder with `train/`. For
            other names `<data_path>/<name in lower case>.npz` is read instead, if it exists.
        im_size: side of the images, `ImageFolder` only (default 64).
        download: fetch a missing set through torchvision.
        zca: whiten the images instead of normalising them.
        pixel_max: the value of white in images that use a small part of their type's range, see `white_value`.
    Raises:
        UserError: for an unknown name, `im_size` with another set, missing files, wrong dtypes, shapes or labels, and
            dark images.
    """
    if zca:
        return load_dataset(name, data_path, im_size, download, pixel_max=pixel_max).whitened()
    if name not in DATASET_NAMES:
        raise UserError(unknown_name("dataset", name, DATASET_NAMES))
    if im_size is not None and name != "ImageFolder":
        raise UserError(f"--im_size: only ImageFolder takes it; {name} has its own size")
    data_path = Path(data_path)
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source, local = data_path, data_path / f"{name.lower()}.npz"
    if name == "npz":
        arrays = _read_npz_set(data_path)
    elif name == "ImageFolder":
        arrays, class_names, notes = read_class_folders(data_path, im_size or 64, ImageReader("--data_path", pixel_max))
    elif local.is_file():
        arrays, source = _read_npz_set(local), local
    elif name == "TinyImageNet" and (unpacked := _unpacked_tinyimagenet(data_path)):
        arrays, class_names, notes = _read_unpacked(unpacked, ImageReader("--data_path", pixel_max))
    else:
        read = {"Digits": _read_digits, "TinyImageNet": _read_tinyimagenet}.get(name)
        *arrays, class_names = read(data_path) if read else read_torchvision(name, data_path, download)
    real = _checked(name, SPECS.get(name), arrays, source, pixel_max)
    return replace(real, class_names=class_names, notes=notes)


Arrays = Sequence[torch.Tensor]  # training images and labels, test images and labels


def _checked(name: str, spec: Spec | None, arrays: Arrays, source: Path, pixel_max: int | None) -> RealData:
    """Check shapes and labels, compute what `spec` leaves out, and make the `RealData`."""
    images, labels, images_test, labels_test = arrays
    where = f"--data_path: {source}"
    if images.shape[1:] != images_test.shape[1:]:
        raise UserError(
            f"{where}: training images are {_shape(images)} and test images {_shape(images_test)}; they must agree"
        )
    if spec and tuple(images.shape[1:]) != (spec.channel, spec.side, spec.side):
        raise UserError(
            f"{where}: images are {_shape(images)}; {name} has {spec.channel}x{spec.side}x{spec.side}. "
            "Use --dataset npz for other data"
        )
    for part, values, of in (("train", labels, images), ("test", labels_test, images_test)):
        if len(values) != len(of) or not len(of):
            raise UserError(
                f"{where}: {len(of)} {part} images and {len(values)} labels; their numbers must be equal, and not 0"
            )
    num_classes = spec.num_classes if spec else int(labels.max()) + 1
    if num_classes > len(labels):  # before `bincount`: a label may claim billions of classes
        raise UserError(
            f"{where}: {len(labels)} train labels cannot be of {num_classes} classes; each class needs one at least. "
            f"They are {int(labels.min())}..{int(labels.max())}; labels start at 0"
        )
    for part, values in (("train", labels), ("test", labels_test)):
        if values.min() < 0 or values.max() >= num_classes:
            found = f"{int(values.min())}..{int(values.max())}"
            raise UserError(f"{where}: {part} labels are {found}; they must be 0..{num_classes - 1}")
    empty = (labels.bincount(minlength=num_classes) == 0).nonzero().flatten().tolist()
    if num_classes < 2:
        raise UserError(f"{where}: all images are of one class; two classes or more are needed")
    if empty:
        raise UserError(
            f"{where}: train labels are {int(labels.min())}..{int(labels.max())}, and no training image is of class "
            f"{', '.join(map(str, empty[:10]))}. Labels start at 0 and leave out no class; renumber them, in the test "
            "set, too"
        )
    images, images_test = in_full_range([images, images_test], pixel_max, where)
    mean, std = (spec.mean, spec.std) if spec and spec.mean else _moments(images)
    return RealData(name, num_classes, mean, std, images, labels, images_test, labels_test, pixel_max=pixel_max)


def _shape(images: torch.Tensor) -> str:
    return "x".join(map(str, images.shape[1:]))


def _moments(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of the pixels in [0, 1], in float64, chunk by chunk."""
    total = sum(unit_images(part).double().sum((0, 2, 3)) for part in images.split(1000))
    count = images.numel() // images.shape[1]
    mean = (total / count).view(1, -1, 1, 1)
    squares = sum(((unit_images(part).double() - mean) ** 2).sum((0, 2, 3)) for part in images.split(1000))
    std = (squares / count).sqrt().clamp_min(1e-6)
    return tuple(mean.flatten().tolist()), tuple(std.tolist())


@blame("--data_path")
def _read_npz_set(path: Path) -> Arrays:
    train_images, train_labels, test_images, test_labels = read_npz(path, NPZ_KEYS)
    return (
        images_to_nchw(train_images, path).contiguous(),
        _labels(train_labels, path),
        images_to_nchw(test_images, path).contiguous(),
        _labels(test_labels, path),
    )


def _labels(array: np.ndarray, path: Path) -> torch.Tensor:
    """int64 `[N]` from integers `[N]` or, as in MedMNIST, `[N, 1]`."""
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
        raise UserError(f"{path} has labels {array.dtype} {list(array.shape)}; they must be integers [N] or [N, 1]")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def _read_digits(_: Path) -> tuple:
    """scikit-learn's 8×8 digits; a fifth of them, stratified, is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    return images[train], labels[train], images[test], labels[test], tuple(map(str, digits.target_names))


def _unpacked_tinyimagenet(data_path: Path) -> Path | None:
    """The folder of TinyImageNet as unpacked; None if it is not there, or `tinyimagenet.pt` is, which goes first."""
    if (data_path / "tinyimagenet.pt").is_file():
        return None
    folders = (data_path / "tiny-imagenet-200", data_path)
    return next((folder for folder in folders if (folder / "train").is_dir()), None)


def _read_unpacked(folder: Path, reader: ImageReader) -> tuple[Arrays, tuple[str, ...], tuple[str, ...]]:
    """TinyImageNet as unpacked: what `read_class_folders` returns, if it is whole."""
    spec = SPECS["TinyImageNet"]
    arrays, class_names, notes = read_class_folders(folder, spec.side, reader)
    if len(class_names) != spec.num_classes:
        raise UserError(
            f"--data_path: {folder / 'train'} has {len(class_names)} classes; TinyImageNet has {spec.num_classes}. "
            f"Use --dataset ImageFolder --im_size {spec.side} for a part of it"
        )
    return arrays, class_names, notes


def _read_tinyimagenet(data_path: Path) -> tuple:
    path = data_path / "tinyimagenet.pt"
    if not path.is_file():
        raise UserError(
            f"--data_path: {path} is not there, nor {data_path / 'tiny-imagenet-200' / 'train'}; TinyImageNet is read "
            "from that file or that folder (see README, Data)"
        )
    data = read_pt(path, "--data_path")
    accepted = (
        "it must hold the keys classes, images_train, labels_train, images_val and labels_val: images uint8 "
        "[N, 3, 64, 64], labels integers [N]"
    )
    keys = ("images_train", "labels_train", "images_val", "labels_val")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), torch.Tensor) for key in keys):
        raise UserError(f"--data_path: {path} lacks tensors; {accepted}")
    arrays = tuple(data[key].detach() for key in keys)
    for key, array in zip(keys, arrays, strict=True):
        of_images = array.dtype == torch.uint8 and array.ndim == 4 and tuple(array.shape[1:]) == (3, 64, 64)
        of_labels = array.dtype in PLAIN_INTEGERS and array.ndim == 1
        if not (of_images if key.startswith("images") else of_labels):
            found = f"{array.dtype} {list(array.shape[:8])}".removeprefix("torch.")
            raise UserError(f"--data_path: {path} has {key} {found}; {accepted}")
    names = data.get("classes")
    named = isinstance(names, (list, tuple)) and len(names) == SPECS["TinyImageNet"].num_classes
    names = tuple(names) if named and all(isinstance(n, str) for n in names) else ()
    return arrays[0], arrays[1].long(), arrays[2], arrays[3].long(), names


def load_test_images(
    name: str, root: Path, download: bool, flag: str = "--data_path", pixel_max: int | None = None
) -> torch.Tensor | Sequence[tuple]:
    """Only the test images of a torchvision set, which is used as an OOD set: as `read_torchvision_test` returns them.

    Raises:
        UserError: naming `flag`, when they are not in `root`, and `download` is false or fails.
    """
    local = root / f"{name.lower()}.npz"
    if local.is_file():
        with blame(flag):
            (images,) = read_npz(local, ["test_images"])
            return in_full_range([images_to_nchw(images, local).contiguous()], pixel_max, str(local))[0]
    return read_torchvision_test(name, root, download, flag)
