"""Batches of network training: the random choices are drawn on the CPU, then many batches are augmented together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from utils.compute.transfer import Draw
from utils.data.augment import DC, DSA, apply_by_part, identity
from utils.data.synthetic import SyntheticSet

AUGMENTED_CPU, AUGMENTED_CUDA = 2**20, 2**25  # pixel values that are augmented together


@dataclass(frozen=True)
class Batch(Draw):
    """The random choices of one batch: its images and outliers (int64 `[n]`), and how they are augmented."""

    index: torch.Tensor
    transform: Draw | None
    index_oe: torch.Tensor | None
    transform_oe: Draw | None

    @property
    def count(self) -> int:
        """Number of images and outliers."""
        return len(self.index) + (0 if self.index_oe is None else len(self.index_oe))


def draw_epoch(synthetic: SyntheticSet, batch: int, augmentation: DSA | DC | None, g: torch.Generator) -> list[Batch]:
    """Draw the batches, of `batch` images, of one epoch over a synthetic set; only the sizes of the set matter.

    If there are fewer outliers than images, they are repeated, so that every batch has as many of them as images.
    """

    def transform(index: torch.Tensor | None) -> Draw | None:
        """Draw how the images of `index` are augmented."""
        if augmentation is None or index is None or not len(index):
            return None
        return augmentation.draw(len(index), tuple(synthetic.images.shape[2:]), g)

    order = torch.randperm(len(synthetic.images), generator=g)
    count = synthetic.num_outliers
    order_oe = torch.randperm(count, generator=g) if count else None
    if 0 < count < len(order):
        more = [torch.randperm(count, generator=g) for _ in range(len(order) // count)]
        order_oe = torch.cat([order_oe, *more])[: len(order)]
    batches = []
    for start in range(0, len(order), batch):
        index = order[start : start + batch]
        index_oe = None if order_oe is None else order_oe[start : start + batch]
        batches.append(Batch(index, transform(index), index_oe, transform(index_oe)))
    return batches


def with_fresh_outliers(
    synthetic: SyntheticSet, drawn: Sequence[list[Batch]], generators: Sequence[torch.Generator]
) -> tuple[SyntheticSet, list[list[Batch]]]:
    """Draw new outliers for each of some epochs; return a set that holds all of them, and batches that index into it.

    Args:
        synthetic: a set with `fresh_oe`.
        drawn: the batches of each epoch; generators: one for the outliers of each epoch.
    """
    count = synthetic.fresh_oe.count
    made = torch.cat([synthetic.fresh_oe.make(g) for g in generators])
    moved = [[replace(b, index_oe=b.index_oe + i * count) for b in batches] for i, batches in enumerate(drawn)]
    return replace(synthetic, images_oe=made, fresh_oe=None), moved


def augmented_batches(synthetic: SyntheticSet, batches: Sequence[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each batch its augmented images followed by augmented outliers, `[n, C, H, W]`, and the image labels.

    The set must not change meanwhile: many batches are augmented together.
    """
    device = synthetic.images.device
    largest = max(b.count for b in batches) * synthetic.images[0].numel()
    per_block = max(1, (AUGMENTED_CUDA if device.type == "cuda" else AUGMENTED_CPU) // largest)
    for first in range(0, len(batches), per_block):
        block = batches[first : first + per_block]
        index = [b.index for b in block]
        images = _augmented(synthetic.images, index, [b.transform for b in block])
        labels = synthetic.labels[torch.cat(index)].split([len(i) for i in index])
        if block[0].index_oe is not None:
            index_oe = [b.index_oe for b in block]
            outliers = _augmented(synthetic.images_oe, index_oe, [b.transform_oe for b in block])
            images = map(torch.cat, zip(images, outliers, strict=True))
        yield from zip(images, labels, strict=True)


def _augmented(
    images: torch.Tensor, index: Sequence[torch.Tensor], transforms: Sequence[Draw | None]
) -> Sequence[torch.Tensor]:
    """`transform(images[i])` for each `i` of `index`."""
    lengths = [len(i) for i in index]
    chosen = images.index_select(0, torch.cat(list(index)))
    return apply_by_part(chosen, [t or identity for t in transforms], lengths).split(lengths)
