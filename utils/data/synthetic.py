"""The synthetic set: labelled images and outliers that networks are trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from utils.core.errors import require
from utils.data.identity import class_order, renumbered


@dataclass(frozen=True)
class SyntheticSet:
    """Labelled images to train networks on, usually distilled and sorted by class, and outliers if there are any."""

    images: torch.Tensor  # float32 [num_classes·ipc, C, H, W], normalised
    labels: torch.Tensor  # int64 [num_classes·ipc], or probabilities, float32 [num_classes·ipc, num_classes]
    images_oe: torch.Tensor | None = None  # outliers, as images
    lr_net: float | None = None  # the distilled learning rate for network training
    fresh_oe: Any = None  # `FreshOutliers` of utils/outliers: draws new ones in every epoch, instead of images_oe
    factor: int = 1  # each image holds factor × factor parts; networks are trained on the `decoded` set

    @property
    def hard_labels(self) -> torch.Tensor:
        """The class of each image, int64 `[N]`: of soft labels the most probable."""
        return self.labels.argmax(1) if self.labels.is_floating_point() else self.labels

    @property
    def num_outliers(self) -> int:
        """How many outliers an epoch has."""
        if self.fresh_oe is not None:
            return self.fresh_oe.count
        return 0 if self.images_oe is None else len(self.images_oe)

    def to(self, device: torch.device | str) -> "SyntheticSet":
        """The same set on `device`."""
        return replace(self._with_images(lambda images: images.to(device)), labels=self.labels.to(device))

    def detached_cpu(self) -> "SyntheticSet":
        """A copy on the CPU that later updates do not change."""
        return self._with_images(lambda images: images.detach().clone()).to("cpu")

    def decoded(self) -> "SyntheticSet":
        """The set that networks are trained on: every part of every image, enlarged."""
        if self.factor == 1:
            return self
        labels = self.labels.repeat(self.factor**2, *[1] * (self.labels.ndim - 1))
        return replace(self._with_images(lambda images: decode(images, self.factor)), labels=labels, factor=1)

    def with_probabilities(self) -> "SyntheticSet":
        """The set with soft labels, of which hard ones become certain; it has images of all classes."""
        if self.labels.is_floating_point():
            return self
        return replace(self, labels=F.one_hot(self.labels).to(self.images.dtype))

    def _with_images(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "SyntheticSet":
        """The set with changed images and outliers."""
        oe = None if self.images_oe is None else change(self.images_oe)
        return replace(self, images=change(self.images), images_oe=oe)

    def without_outliers(self) -> "SyntheticSet":
        """The labelled images alone."""
        return replace(self, images_oe=None, fresh_oe=None)


def in_classes_of(known: Sequence[str], synthetic: SyntheticSet, class_names: object, what: str) -> SyntheticSet:
    """The set with labels in the order of the classes `known`, sorted by class, if its own had another order.

    `class_names` are those of the set in the order of its labels.
    A `UserError`, which names the file `what`, tells that the names of the classes differ.
    """
    order = class_order(class_names, known, what)
    if order is None:
        return synthetic
    moved = replace(synthetic, labels=renumbered(synthetic.labels, order))
    by_class = moved.hard_labels.argsort(stable=True)
    return replace(moved, images=moved.images[by_class], labels=moved.labels[by_class])


def is_probabilities(labels: torch.Tensor) -> bool:
    """Whether every row of `labels` `[N, K]` has numbers from 0 that add up to 1 (to 0.001)."""
    return bool(torch.isfinite(labels).all() and (labels >= 0).all() and ((labels.sum(1) - 1).abs() < 1e-3).all())


def decode(images: torch.Tensor, factor: int, fill: float = 0.0) -> torch.Tensor:
    """Cut images `[N, C, H, W]` into `factor × factor` parts, enlarged to the size of the whole; differentiable.

    A side that `factor` does not divide is first padded with `fill`, below and on the right: 0 is the mean of the data
    set once images are normalised; published sets of IDC pad pixels with 0.5.
    Returns `[factor²·N, C, H, W]`: the upper left parts of all images, then those to their right, and so on.
    """
    if factor == 1:
        return images
    height, width = images.shape[2:]
    rows, columns = -(-height // factor), -(-width // factor)
    padded = F.pad(images, (0, columns * factor - width, 0, rows * factor - height), value=fill)
    parts = padded.unfold(2, rows, rows).unfold(3, columns, columns)  # [N, C, factor, factor, rows, columns]
    parts = parts.permute(2, 3, 0, 1, 4, 5).reshape(-1, images.shape[1], rows, columns)
    return F.interpolate(parts, (height, width), mode="bilinear", align_corners=False)


def encode(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Put images `[factor²·N, C, H, W]`, in the order of `decode`, into parts of images `[N, C, H, W]`.

    Each is shrunk to the size of a part, by the mean over areas.
    """
    if factor == 1:
        return images
    channel, height, width = images.shape[1:]
    rows, columns = -(-height // factor), -(-width // factor)
    small = F.adaptive_avg_pool2d(images, (rows, columns)).view(factor, factor, -1, channel, rows, columns)
    whole = small.permute(2, 3, 0, 4, 1, 5).reshape(-1, channel, factor * rows, factor * columns)
    return whole[:, :, :height, :width].contiguous()


def as_parts(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Images as they look once they were stored in parts, shrunk and enlarged; as many must fill whole images."""
    return decode(encode(images, factor), factor)


def check_factor(factor: object, size: tuple[int, int], flag: str) -> int:
    """`factor`, if parts of images of this size have two pixels a side or more, and none lies beyond the border; else a
    `UserError` about `flag`."""
    shown, most = f"{flag} {factor}: images of {size[0]}x{size[1]}", max(1, min(size) // 2)
    require(type(factor) is int and 1 <= factor <= most, f"{shown} hold at most {most} parts a side")
    beyond = any((factor - 1) * -(-side // factor) >= side for side in size)  # parts are rounded up to whole pixels
    require(not beyond, f"{shown} have no room for so many parts of whole pixels; give a smaller number")
    return factor


def decode_slots(images: torch.Tensor, factor: int) -> torch.Tensor:
    """`decode` for images by class slot: `[slots, n, C, H, W]` becomes `[slots, factor²·n, C, H, W]`."""
    if factor == 1:
        return images
    slots, n = images.shape[:2]
    parts = decode(images.flatten(0, 1), factor).view(factor**2, slots, n, *images.shape[2:])
    return parts.transpose(0, 1).flatten(1, 2)


def on_stored(images: torch.Tensor, factor: int, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient on stored images `[slots, n, C, H, W]` that a gradient on the decoded ones gives."""
    if factor == 1:
        return gradient
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        (on_images,) = torch.autograd.grad(decode_slots(leaf, factor), leaf, gradient)
    return on_images
