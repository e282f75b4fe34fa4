"""Outliers that are not distilled: from a pool of real images (OE), or corrupted training images (POE); random ones,
those that k-center chooses, and those that are new in every epoch of training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.compute import distributed
from utils.compute.transfer import send
from utils.core.errors import blame, require
from utils.core.images import ImageReader
from utils.core.pixels import conform
from utils.core.rng import generator as keyed_generator
from utils.core.torch_files import fingerprint
from utils.data.datasets import RealData
from utils.data.download import fetch_pytorch_ood
from utils.data.synthetic import SyntheticSet
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS, MEANS, corrupt, corrupt_mixed
from utils.training.coresets import k_center, unit_features

TINYIMAGES = "300K_random_images.npy"  # 300K Random Images (Hendrycks et al.), as pytorch-ood names the file
CANDIDATES = 10_000  # out of which k-center chooses


def distinct(total: int, n: int, generator: torch.Generator) -> Tensor:
    """`n` distinct indices below `total`, or all of them if there are no more, in random order, int64."""
    if 4 * n >= total:  # below, no memory for `total` is needed
        return torch.randperm(total, generator=generator)[:n]
    drawn: dict[int, None] = {}
    while len(drawn) < n:
        drawn |= dict.fromkeys(torch.randint(total, (n,), generator=generator).tolist())
    return torch.tensor(list(drawn)[:n])


class OutlierSource:
    """A source of outliers for the class slots; a subclass has these methods.

    `per_slot()`: how many different outliers a slot has.
    `draw(slot, n, generator)`: `n` distinct outliers of a slot, or all if there are fewer, normalised `[n, C, H, W]`,
    on the device of the real data.
    `describe()`: plain values that identify the source: its `kind`, `oe` or `poe`, and its content.
    """

    real: RealData
    notice: str = ""  # a line for the log
    slot_names: Sequence[str] = ()  # what is special of the outliers of each slot, for pictures

    def fingerprint(self) -> str | None:
        """SHA-256 of the images that are read in addition to the real data; None if there are none."""
        return None


@dataclass(frozen=True)
class PseudoOutliers(OutlierSource):
    """POE: slot c uses training images of any class with corruption `c mod len(corruptions)`, or with `mixed` any of
    them. Only the drawn batch is corrupted."""

    real: RealData
    corruptions: tuple[str, ...] = DEFAULT_CORRUPTIONS
    mixed: bool = False

    @property
    def notice(self) -> str:
        """Which corruptions are not used, as each class has one."""
        unused = () if self.mixed else self.corruptions[self.real.num_classes :]
        each = f"each of the {self.real.num_classes} classes takes one of --corruptions"
        return f"{each}, so these are not used: {', '.join(unused)}; --mix_corruptions uses all" if unused else ""

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The corruption of each slot, if it has one."""
        slots = () if self.mixed else range(self.real.num_classes)
        return tuple(self._names(slot)[0] for slot in slots)

    def _names(self, slot: int) -> tuple[str, ...]:
        """The corruptions that an outlier of a slot may have."""
        return self.corruptions if self.mixed else (self.corruptions[slot % len(self.corruptions)],)

    def describe(self) -> dict:
        return {"kind": "poe", "corruptions": list(self.corruptions)} | ({"mixed": True} if self.mixed else {})

    def per_slot(self) -> int:
        return len(self.real.images_train)

    def draw(self, slot: int, n: int, generator: torch.Generator) -> Tensor:
        """`n` different training images, whatever their class, corrupted."""
        names = self._names(slot)
        least = 2 if {*names} & {*MEANS} else 1  # a mean is of two images
        images = self.real.unit_train(distinct(self.per_slot(), max(n, least), generator))
        if self.mixed:
            return self.real.normalize(corrupt_mixed(images, names, generator)[:n])
        return self.real.normalize(corrupt(images, names[0], generator)[:n])


@dataclass(frozen=True)
class OutlierPool(OutlierSource):
    """OE: disjoint random slices of a pool of images, one for each class slot; they are brought to the shape of `real`
    by `conform`."""

    real: RealData
    images: Tensor  # uint8 `[N, C, H, W]`, possibly memory-mapped
    slices: Tensor  # int64 indices `[num_classes, per_slot]`
    notice: str = ""
    sample: str = ""  # fingerprint of some images of the whole pool

    def describe(self) -> dict:
        return {"kind": "oe", "sample": self.sample}

    def per_slot(self) -> int:
        return self.slices.shape[1]

    def draw(self, slot: int, n: int, generator: torch.Generator) -> Tensor:
        """`n` different images of the slice."""
        index = self.slices[slot][distinct(self.per_slot(), n, generator)]
        images = self.images.index_select(0, send(index, self.images.device))
        return self.real.normalize(conform(images, self.real.channel, self.real.im_size))

    def fingerprint(self) -> str:
        return fingerprint(self.images[indices.to(self.images.device)] for indices in self.slices)


def load_outlier_pool(
    path: str | Path, real: RealData, per_slot: int, seed: int, download: bool = False
) -> OutlierPool:
    """Read a pool and cut a random permutation of it into `num_classes` disjoint slices of `per_slot`.

    A pool too small for that is cut into slices of `N // num_classes`; `notice` reports this. With `download` a missing
    `300K_random_images.npy` is downloaded. A `UserError` tells what is wrong with the pool.
    """
    path = Path(path)
    with blame("--oe_data_path"):
        if download and path.name == TINYIMAGES and distributed.anywhere(not path.exists()):
            fetch_pytorch_ood("TinyImages300k", path.parent, str(path))
        accepted = "give a .npy (uint8 NHWC), an .npz (key images) or a folder of images"
        if path.name == TINYIMAGES:
            accepted += f", or let --download all fetch {TINYIMAGES} (pip install pytorch-ood)"
        require(path.exists(), f"{path} is not there; {accepted}")
        reader = ImageReader("--oe_data_path", real.pixel_max)
        images = reader.folder_or_array(path, real.channel, real.im_size)
        fits = len(images) // real.num_classes
        require(fits, f"{path} has {len(images)} images; {real.num_classes} classes need at least one each")
    notices = [*reader.notes()]
    if fits < per_slot:
        few, shares = f"{len(images)} images, too few for {per_slot} per class", f"{len(images)} // {real.num_classes}"
        notices.append(f"{path} has {few}: the slices shrink to {fits} (N // num_classes = {shares})")
        per_slot = fits
    order = torch.randperm(len(images), generator=keyed_generator(seed, "outlier slices"))
    slices = order[: real.num_classes * per_slot].view(real.num_classes, per_slot)
    sample = fingerprint([images[:: max(1, len(images) // 100)]])
    if real.device.type == "cuda":  # copy all images that are used to the GPU
        images = images[slices.flatten()].to(real.device)
        slices = torch.arange(slices.numel()).view_as(slices)
    return OutlierPool(real, images, slices, "; ".join(notices), sample)


def draw_repeated(source: OutlierSource, slot: int, n: int, generator: torch.Generator) -> Tensor:
    """Exactly `n` outliers of a slot, normalised `[n, C, H, W]`: repeated where the source has fewer."""
    batch = source.draw(slot, n, generator)
    return batch[torch.arange(n) % len(batch)]


def draw_by_slot(source: OutlierSource, n: int, seed: int, *key: int | str) -> list[Tensor]:
    """Exactly `n` outliers of each slot, see `draw_repeated`; their generators depend on `seed`, `key` and the slot."""
    slots = range(source.real.num_classes)
    return [draw_repeated(source, slot, n, keyed_generator(seed, *key, slot)) for slot in slots]


def initial_outliers(source: OutlierSource, per_slot: int, seed: int, exp: int) -> Tensor:
    """The outliers that a distillation with `--init real` starts from, `[num_classes·per_slot, C, H, W]`."""
    return torch.cat(draw_by_slot(source, per_slot, seed, "match", exp, "initial", "outliers"))


def k_center_outliers(
    source: OutlierSource, n: int, net: nn.Module, seed: int, *key: int, together: bool = False
) -> Tensor:
    """`n` outliers of each class slot, `[num_classes·n, C, H, W]`, chosen by k-center in the features of `net`.

    Each slot's are far from those of the slots before, too; `together`: they are chosen among those of all slots.
    """
    groups = draw_by_slot(source, max(n, CANDIDATES // source.real.num_classes), seed, "candidates", *key)
    if together:
        groups, n = [torch.cat(groups)], n * source.real.num_classes
    outliers, before = [], None
    for images in groups:
        features = unit_features(net, lambda i, images=images: images[i.to(images.device)], torch.arange(len(images)))
        chosen = k_center(features, n, before)
        outliers.append(images[chosen.to(images.device)])
        before = features[chosen] if before is None else torch.cat([before, features[chosen]])
    return torch.cat(outliers)


@dataclass(frozen=True)
class FreshOutliers:
    """Outliers that are drawn whenever they are asked for, `per_slot` of each class slot."""

    source: OutlierSource
    per_slot: int

    @property
    def count(self) -> int:
        """How many are made together."""
        return self.source.real.num_classes * self.per_slot

    def make(self, g: torch.Generator) -> Tensor:
        """Draw them, normalised `[count, C, H, W]`, sorted by slot; a slot that has fewer repeats some."""
        slots = range(self.source.real.num_classes)
        return torch.cat([draw_repeated(self.source, slot, self.per_slot, g) for slot in slots])


def with_fresh(synthetic: SyntheticSet, source: OutlierSource, keeps: bool = False) -> SyntheticSet:
    """The set with other outliers of `source` in every epoch: as many as it has images once it is decoded.

    `keeps`: as many as it has outliers, which stay in `images_oe`.
    """
    kept = synthetic.images_oe if keeps else None
    count = len(synthetic.images if kept is None else kept) * synthetic.factor**2
    per_slot = -(-count // source.real.num_classes)
    return replace(synthetic, images_oe=kept, fresh_oe=FreshOutliers(source, per_slot))


def corrupted(images: Tensor, real: RealData, corruptions: tuple[str, ...], mixed: bool = False) -> PseudoOutliers:
    """A source that corrupts normalised images `[N, C, H, W]`, clipped to the range of pixels, in place of real."""
    unit = real.denormalize(images.to(real.device))
    return PseudoOutliers(replace(real, images_train=unit), corruptions, mixed)
