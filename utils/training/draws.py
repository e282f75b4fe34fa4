"""Batches of network training: the random choices are drawn on the CPU, then many batches are augmented together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.compute.transfer import Draw
from utils.data.augment import DC, DSA, apply_by_part, identity
from utils.data.synthetic import SyntheticSet

AUGMENTED_CPU, AUGMENTED_CUDA = 2**20, 2**25  # pixel values that are augmented together
MIXED_SHARE = 0.5  # of the batches, as IDC and its descendants mix


@dataclass(frozen=True)
class Mix(Draw):
    """How the images of a batch are mixed with others of it, and the labels alike."""

    partner: Tensor  # the other image of each, int64 [n]
    weight: Tensor  # of the image itself, a scalar
    box: tuple[int, int, int, int] | None = None  # the rows and columns that CutMix takes of the other; None: mixup

    def __call__(self, images: Tensor) -> Tensor:
        if self.box is None:
            return self.weight * images + (1 - self.weight) * images[self.partner]
        top, bottom, left, right = self.box
        out = images.clone()
        out[:, :, top:bottom, left:right] = images[self.partner, :, top:bottom, left:right]
        return out

    def of_labels(self, labels: Tensor) -> Tensor:
        """Probabilities `[n, num_classes]`, mixed as the images are."""
        return self.weight * labels + (1 - self.weight) * labels[self.partner]


def draw_mix(kind: str, n: int, size: tuple[int, int], g: torch.Generator) -> Mix | None:
    """Draw how `n` images of a size are mixed; None for half of the batches, and for `none`.

    The share of the image itself is uniform. With `cutmix` a box of the other image takes the rest of the area, cut off
    at the border (Yun et al., ICCV 2019, section 3); with `mixup` it is blended in (Zhang et al., ICLR 2018).
    """
    if kind == "none" or float(torch.rand((), generator=g)) >= MIXED_SHARE:
        return None
    share, partner = torch.rand((), generator=g), torch.randperm(n, generator=g)
    if kind == "mixup":
        return Mix(partner, share)
    edges = []
    for length in size:
        half = float(length * (1 - share).sqrt()) / 2
        centre = float(length * torch.rand((), generator=g))
        edges += [max(0, round(centre - half)), min(length, round(centre + half))]
    area = (edges[1] - edges[0]) * (edges[3] - edges[2])
    return Mix(partner, torch.tensor(1 - area / (size[0] * size[1])), tuple(edges))


@dataclass(frozen=True)
class Batch(Draw):
    """The random choices of one batch: its images and outliers (int64 `[n]`), and how they are augmented."""

    index: Tensor
    transform: Draw | None
    index_oe: Tensor | None
    transform_oe: Draw | None
    mix: Mix | None = None  # of the augmented images; outliers are not mixed


def draw_epoch(
    synthetic: SyntheticSet, batch: int, augmentation: DSA | DC | None, g: torch.Generator, mix: str = "none"
) -> list[Batch]:
    """Draw the batches, of `batch` images, of one epoch over a synthetic set; only the sizes of the set matter.

    Every batch has as many outliers as images: fewer outliers are repeated, of more some are left out.
    """
    size = tuple(synthetic.images.shape[2:])

    def transform(index: Tensor | None) -> Draw | None:
        """The augmentation of the images or outliers of a batch, if there are any."""
        if augmentation is None or index is None or not len(index):
            return None
        return augmentation.draw(len(index), size, g)

    order = torch.randperm(len(synthetic.images), generator=g)
    count = synthetic.num_outliers
    order_oe = torch.randperm(count, generator=g) if count else None
    if 0 < count < len(order):
        more = [torch.randperm(count, generator=g) for _ in range(len(order) // count)]
        order_oe = torch.cat([order_oe, *more])[: len(order)]
    batches = []
    for start in range(0, len(order), batch):
        index = order[start : start + batch]
        index_oe = None if order_oe is None else order_oe[start : start + len(index)]
        drawn = (transform(index), index_oe, transform(index_oe))
        batches.append(Batch(index, *drawn, draw_mix(mix, len(index), size, g)))
    return batches


def with_fresh_outliers(
    synthetic: SyntheticSet, drawn: Sequence[list[Batch]], generators: Sequence[torch.Generator]
) -> tuple[SyntheticSet, list[list[Batch]]]:
    """A set that holds the `fresh_oe` of all epochs, and their batches, which index into these."""
    count = synthetic.fresh_oe.count
    made = torch.cat([synthetic.fresh_oe.make(g) for g in generators])
    moved = [[replace(b, index_oe=b.index_oe + i * count) for b in batches] for i, batches in enumerate(drawn)]
    return replace(synthetic, images_oe=made, fresh_oe=None), moved


def augmented_batches(synthetic: SyntheticSet, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each batch its augmented images followed by augmented outliers, `[n, C, H, W]`, and the image labels.

    Many are augmented together, so the set must not change meanwhile. To be mixed, its labels must be probabilities.
    """
    together = AUGMENTED_CUDA if synthetic.images.device.type == "cuda" else AUGMENTED_CPU
    largest = max(len(b.index) + (0 if b.index_oe is None else len(b.index_oe)) for b in batches)
    per_block = max(1, together // (largest * synthetic.images[0].numel()))
    for first in range(0, len(batches), per_block):
        block = batches[first : first + per_block]
        index = [b.index for b in block]
        images = _augmented(synthetic.images, index, [b.transform for b in block])
        labels = synthetic.labels[torch.cat(index)].split([len(i) for i in index])
        images = [x if b.mix is None else b.mix(x) for b, x in zip(block, images, strict=True)]
        labels = [y if b.mix is None else b.mix.of_labels(y) for b, y in zip(block, labels, strict=True)]
        if block[0].index_oe is not None:
            outliers = _augmented(synthetic.images_oe, [b.index_oe for b in block], [b.transform_oe for b in block])
            images = map(torch.cat, zip(images, outliers, strict=True))
        yield from zip(images, labels, strict=True)


def _augmented(images: Tensor, index: Sequence[Tensor], transforms: Sequence[Draw | None]) -> Sequence[Tensor]:
    """`transform(images[i])` for each `i` of `index`."""
    lengths = [len(i) for i in index]
    chosen = images.index_select(0, torch.cat(list(index)))
    return apply_by_part(chosen, [t or identity for t in transforms], lengths).split(lengths)
