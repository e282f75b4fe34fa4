"""The synthetic set: labelled images and outliers that networks are trained on."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from utils.data.datasets import RealData
from utils.data.identity import class_order, renumbered
from utils.data.parts import decode


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
        oe = None if self.images_oe is None else self.images_oe.to(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), images_oe=oe)

    def detached_cpu(self) -> "SyntheticSet":
        """A copy on the CPU that later updates do not change."""
        oe = None if self.images_oe is None else self.images_oe.detach().clone()
        return replace(self, images=self.images.detach().clone(), images_oe=oe).to("cpu")

    def decoded(self) -> "SyntheticSet":
        """The set that networks are trained on: every part of every image, enlarged."""
        if self.factor == 1:
            return self
        labels = self.labels.repeat(self.factor**2, *[1] * (self.labels.ndim - 1))
        oe = None if self.images_oe is None else decode(self.images_oe, self.factor)
        return replace(self, images=decode(self.images, self.factor), labels=labels, images_oe=oe, factor=1)

    def with_probabilities(self) -> "SyntheticSet":
        """The set with soft labels, of which hard ones become certain; it has images of all classes."""
        if self.labels.is_floating_point():
            return self
        return replace(self, labels=F.one_hot(self.labels).to(self.images.dtype))

    def without_outliers(self) -> "SyntheticSet":
        """The labelled images alone."""
        return replace(self, images_oe=None, fresh_oe=None)


def in_classes_of(real: RealData, synthetic: SyntheticSet, class_names: object, what: str) -> SyntheticSet:
    """The set with the labels of `real`, sorted by class, if its own classes had another order.

    `class_names` are those of the set in the order of its labels.
    A `UserError`, which names the file `what`, tells that the names of the classes differ.
    """
    order = class_order(class_names, real.class_names, what)
    if order is None:
        return synthetic
    moved = replace(synthetic, labels=renumbered(synthetic.labels, order))
    by_class = moved.hard_labels.argsort(stable=True)
    return replace(moved, images=moved.images[by_class], labels=moved.labels[by_class])


def is_probabilities(labels: torch.Tensor) -> bool:
    """Whether every row of `labels` `[N, K]` has numbers from 0 that add up to 1 (to 0.001)."""
    return bool(torch.isfinite(labels).all() and (labels >= 0).all() and ((labels.sum(1) - 1).abs() < 1e-3).all())
