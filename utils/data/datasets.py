"""Real data as whole tensors: read once, kept as uint8, normalised where they are used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from networks import get_network
from utils.compute import distributed
from utils.compute.transfer import send
from utils.core.errors import blame, named, require, unknown_name
from utils.core.files import read_npz
from utils.core.images import ImageReader
from utils.core.pixels import images_to_nchw, in_full_range, unit_images
from utils.core.torch_files import PLAIN_INTEGERS, fingerprint, read_pt
from utils.data.class_folders import read_class_folders
from utils.data.download import NPZ_KEYS, read_torchvision
from utils.data.whitening import ZCA, fit_zca


@dataclass(frozen=True)
class Spec:
    """What is known of a named data set: image shape, classes and normalisation (None: computed)."""

    channel: int
    side: int
    num_classes: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


SPECS = {
    "MNIST": Spec(1, 28, 10, (0.1307,), (0.3081,)),
    "FashionMNIST": Spec(1, 28, 10, (0.2861,), (0.3530,)),
    "SVHN": Spec(3, 32, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CIFAR10": Spec(3, 32, 10, (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
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
    pixel_max: int | None = None  # the value of white in images, of outliers too (`--pixel_max`)

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
    def scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the channels, `[1, C, 1, 1]` each, on the device."""
        return tuple(torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (self.mean, self.std))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images in [0, 1] to zero mean and unit deviation per channel, or whiten them."""
        mean, std = self.scale
        return (images - mean).div_(std) if self.zca is None else self.zca.whiten(images)

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize`, clipped to [0, 1]."""
        mean, std = self.scale
        return (images * std + mean if self.zca is None else self.zca.undo(images)).clamp(0, 1)

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
        return labels.argsort(stable=True).split(labels.bincount(minlength=self.num_classes).tolist())

    def choose(self, label: int, n: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of `n` different training images of a class, or of all if there are fewer; int64, on the CPU."""
        indices = self.class_indices[label]
        return indices[torch.randperm(len(indices), generator=generator)[:n]]

    def lines(self) -> tuple[str, ...]:
        """Lines for the log: how many images there are, and what was noted when they were read."""
        sizes = self.labels_train.bincount(minlength=self.num_classes)
        of = f"{self.num_classes} classes (smallest {int(sizes.min())}, largest {int(sizes.max())})"
        untested = {*range(self.num_classes)} - {*self.labels_test.tolist()}
        names = named([self.class_names[c] if self.class_names else str(c) for c in sorted(untested)])
        tested = f"{len(self.labels_test)} test images{f', none of {names}' if untested else ''}"
        return f"{len(self.labels_train)} training images of {of}, {tested}", *self.notes

    def fingerprint(self) -> str:
        """SHA-256 of the images and labels."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint((self.images_train, self.labels_train, self.images_test, self.labels_test))

    def to(self, device: torch.device | str) -> "RealData":
        """The same data on `device`."""
        names = ("images_train", "labels_train", "images_test", "labels_test")
        moved = {n: send(getattr(self, n), torch.device(device)) for n in names}
        return replace(self, **moved, zca=None if self.zca is None else self.zca.to(device))

    def whitened(self) -> "RealData":
        """The same data with ZCA whitening, fitted on the training images, in place of mean and deviation."""
        return replace(self, zca=fit_zca(unit_images(part) for part in self.images_train.split(5000)))


def load_dataset(
    name: str,
    data_path: str | Path,
    im_size: int | None = None,
    download: bool = True,
    zca: bool = False,
    pixel_max: int | None = None,
) -> RealData:
    """Load a data set as whole CPU tensors; a `UserError` tells what is missing or wrong.

    Args:
        name: one of `DATASET_NAMES`.
        data_path: the folder of the data; for `npz` the file itself, for `ImageFolder` the folder with `train/`. For
            other names `<data_path>/<name in lower case>.npz` is read instead, if it exists.
        im_size: side of the images, `ImageFolder` only (default 64).
        download: fetch a missing set through torchvision.
        zca: whiten the images instead of normalising them.
        pixel_max: the value of white in images that use a part of their type's range, see `white_value`.
    """
    require(name in DATASET_NAMES, unknown_name("dataset", name, DATASET_NAMES))
    wrong = f"--im_size: only ImageFolder takes it; {name} has its own size"
    require(im_size is None or name == "ImageFolder", wrong)
    data_path = Path(data_path)
    own_file = data_path if name == "npz" else data_path / f"{name.lower()}.npz"
    is_npz = name == "npz" or (name != "ImageFolder" and not distributed.anywhere(not own_file.is_file()))
    source, reader = own_file if is_npz else data_path, ImageReader("--data_path", pixel_max)
    with blame("--data_path"):
        if is_npz:
            arrays, class_names, notes = _read_npz_set(source), (), (f"data: {source}",)
        elif name == "ImageFolder":
            arrays, class_names, notes = read_class_folders(source, im_size or 64, reader)
        elif name == "TinyImageNet":
            arrays, class_names, notes = _read_tinyimagenet(source, reader)
        else:
            *arrays, class_names = _read_digits() if name == "Digits" else read_torchvision(name, source, download)
            notes = ()
        spec = SPECS.get(name)
        images, labels, images_test, labels_test = _checked(arrays, name, spec, source)
        if not reader.has_decoded:
            images, images_test = in_full_range((images, images_test), pixel_max, str(source), of_data=True)
    mean, std = (spec.mean, spec.std) if spec and spec.mean else _moments(images)
    tensors = (images, labels, images_test, labels_test)
    real = RealData(name, len(labels.unique()), mean, std, *tensors, None, tuple(class_names), notes, pixel_max)
    return real.whitened() if zca else real


Arrays = Sequence[torch.Tensor]  # training images and labels, test images and labels


def _checked(arrays: Arrays, name: str, spec: Spec | None, source: Path) -> Arrays:
    """The arrays of a data set, labels as int64 `[N]`; a `UserError` tells that they do not fit together or `spec`."""
    images, labels, images_test, labels_test = arrays
    shape, shape_test = ("x".join(map(str, part.shape[1:])) for part in (images, images_test))
    told = f"{source}: training images are {shape} and test images {shape_test}; they must agree"
    require(shape == shape_test, told)
    wanted = f"{spec.channel}x{spec.side}x{spec.side}" if spec else shape
    told = f"{source}: images are {shape}; {name} has {wanted}. Use --dataset npz for other data"
    require(shape == wanted, told)
    for part, values, of in (("train", labels, images), ("test", labels_test, images_test)):
        found = f"{values.dtype} {list(values.shape[:8])}".removeprefix("torch.")
        is_whole = (
            values.ndim and values.dtype in PLAIN_INTEGERS and values.shape[1:] in ((), (1,))
        )  # MedMNIST has [N, 1]
        require(is_whole, f"{source}: {part} labels are {found}; they must be integers [N] or [N, 1]")
        counts = f"{source}: {len(of)} {part} images and {len(values)} labels"
        require(0 < len(values) == len(of), f"{counts}; their numbers must be equal, and not 0")
    labels, labels_test = (values.flatten().long() for values in (labels, labels_test))
    known = labels.unique().tolist()
    num_classes = spec.num_classes if spec else max(2, len(known))
    fits = known == list(range(num_classes)) and labels_test.min() >= 0 and labels_test.max() < num_classes
    found, found_test = (f"{int(values.min())}..{int(values.max())}" for values in (labels, labels_test))
    require(
        fits,
        f"{source}: train labels are {found}, {len(known)} different ones, and test labels {found_test}; they must be "
        f"0..{num_classes - 1}, and each class needs a training image. Renumber them, in both parts",
    )
    return images, labels, images_test, labels_test


def _moments(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of the pixels in [0, 1], in float64, chunk by chunk.

    A deviation is at least 1/255: other images may well have something in a channel that is empty here.
    """
    total = sum(unit_images(part).double().sum((0, 2, 3)) for part in images.split(1000))
    count = images.numel() // images.shape[1]
    mean = (total / count).view(1, -1, 1, 1)
    squares = sum(((unit_images(part).double() - mean) ** 2).sum((0, 2, 3)) for part in images.split(1000))
    std = (squares / count).sqrt().clamp_min(1 / 255)
    return tuple(mean.flatten().tolist()), tuple(std.tolist())


def _read_npz_set(path: Path) -> Arrays:
    images, labels, images_test, labels_test = read_npz(path, NPZ_KEYS)
    for array in (labels, labels_test):
        told = f"{path} has labels {array.dtype} {list(array.shape)}; they must be integers [N] or [N, 1]"
        require(array.dtype.kind in "iu", told)
    images, images_test = (images_to_nchw(array, path).contiguous() for array in (images, images_test))
    labels, labels_test = (torch.from_numpy(array.astype(np.int64)) for array in (labels, labels_test))
    return images, labels, images_test, labels_test


def _read_digits() -> tuple:
    """scikit-learn's 8×8 digits and the names of their classes; a fifth of them, stratified, is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    return images[train], labels[train], images[test], labels[test], map(str, digits.target_names)


def _read_tinyimagenet(data_path: Path, reader: ImageReader) -> tuple[Arrays, Sequence[str], tuple[str, ...]]:
    """TinyImageNet of `tinyimagenet.pt` or, without that file, as it is unpacked."""
    path, spec, inner = data_path / "tinyimagenet.pt", SPECS["TinyImageNet"], data_path / "tiny-imagenet-200"
    folder = next((folder for folder in (inner, data_path) if (folder / "train").is_dir()), None)
    if folder and not path.is_file():
        parts = read_class_folders(folder, spec.side, reader)
        require(
            len(parts[1]) == spec.num_classes,
            f"{folder / 'train'} has {len(parts[1])} classes; TinyImageNet has {spec.num_classes}. "
            f"Use --dataset ImageFolder --im_size {spec.side} for a part of it",
        )
        return parts
    missing = f"{path} is not there, nor {inner / 'train'}; TinyImageNet is read from that file or that folder"
    require(path.is_file(), f"{missing} (see docs/your-data.md)")
    data, keys = read_pt(path), ("images_train", "labels_train", "images_val", "labels_val")
    arrays = [data.get(key) if isinstance(data, dict) else None for key in keys]
    accepted = f"it must hold the keys classes, {', '.join(keys)}: images uint8 [N, 3, 64, 64], labels integers [N]"
    require(all(isinstance(array, torch.Tensor) for array in arrays), f"{path} lacks tensors; {accepted}")
    require(arrays[0].dtype == arrays[2].dtype == torch.uint8, f"{path} has images of another type; {accepted}")
    names = data.get("classes")
    are_names = isinstance(names, (list, tuple)) and len(names) == spec.num_classes and {*map(type, names)} == {str}
    return [array.detach() for array in arrays], names if are_names else (), ()
