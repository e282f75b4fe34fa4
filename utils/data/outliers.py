"""Where outliers come from: a pool of real images (OE), or corrupted training images (POE).

An outlier source has `choose(slot, n, generator)`, which draws what is random in `n` outliers of one class slot,
`batch(drawn)`, which makes those outliers, normalised `[n, C, H, W]`, `draw(slot, n, generator)`, both at once, and
`notice`, a line for the log or "".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from utils.core.errors import UserError, unknown_name
from utils.core.rng import Draw, draw_seed, noise, send
from utils.core.rng import generator as keyed_generator
from utils.data.datasets import RealData
from utils.files.atomic import fingerprint
from utils.files.torch_files import conform, images_to_nchw, list_images, read_images, read_npy, read_npz

PIXELATE = 0.2
TINYIMAGES = "300K_random_images.npy"
DEFAULT_CORRUPTIONS = ("jigsaw", "invert", "pixelate", "gauss-speckle")


def jigsaw(images: torch.Tensor) -> torch.Tensor:
    """Rearrange the quarters; a last odd row or column stays where it is."""
    height, width = images.shape[2:]
    half, half_w = height // 2, width // 2
    quarter, quarter_w = height // 4, width // 4
    bottom, right = 2 * half, 2 * half_w
    a, b = images[..., quarter:half, :half_w], images[..., :quarter, :half_w]
    d, e = images[..., half:bottom, :half_w], images[..., half:bottom, half_w:right]
    f, g = images[..., :half, half_w + quarter_w : right], images[..., :half, half_w : half_w + quarter_w]
    upper = torch.cat([torch.cat([a, b], 2), d], 3)
    lower = torch.cat([e, torch.cat([f, g], 3)], 3)
    out = images.clone()
    out[..., :bottom, :right] = torch.cat([upper, lower], 2)
    return out


def invert(images: torch.Tensor) -> torch.Tensor:
    """Channels 1 and 2 become 1-x, channel 0 stays; one-channel images become 1-x."""
    if images.shape[1] == 1:
        return 1 - images
    return torch.cat([images[:, :1], 1 - images[:, 1:]], 1)


def _box_weights(length: int, out: int) -> torch.Tensor:
    """`[out, length]`: the averaging weights of PIL's box filter, which takes whole pixels by their centres."""
    scale = length / out
    support = 0.5 * max(scale, 1.0)
    weights = torch.zeros(out, length)
    for i in range(out):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        weights[i, first:last] = 1 / (last - first)
    return weights


def pixelate(images: torch.Tensor) -> torch.Tensor:
    """Box-average down to a fifth of the size, then nearest up again (`PIL.Image.BOX` twice)."""

    down_up = [_pixelate_weights(side, images.dtype, images.device) for side in images.shape[2:]]
    return down_up[0] @ images @ down_up[1].T


@lru_cache
def _pixelate_weights(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[length, length]`: down to a fifth and up again, along one side."""
    small = max(int(PIXELATE * length), 1)
    return (_box_weights(small, length) @ _box_weights(length, small)).to(device, dtype)


def rgb_ghost(images: torch.Tensor) -> torch.Tensor:
    """Channels (1 mirrored left-right, 2, 0); one channel: mirrored."""
    if images.shape[1] == 1:
        return images.flip(3)
    return torch.stack([images[:, 1].flip(2), images[:, 2], images[:, 0]], 1)


def speckle(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Add noise (of the images' shape) in proportion to each pixel; clipped to [0, 1]."""
    return (images + images * noise).clamp(0, 1)


def average(images: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """The arithmetic mean of each image and its partner (int64 `[N]`)."""
    return (images + images[partner]) / 2


def geometric_mean(images: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """The geometric mean of each image and its partner (int64 `[N]`)."""
    return (images * images[partner]).sqrt()


Shape = tuple[int, ...]


def _no_draw(shape: Shape, generator: torch.Generator | None) -> None:
    return None


def _draw_partner(shape: Shape, generator: torch.Generator | None) -> torch.Tensor:
    """For each image the index of another image of the batch (of itself in a batch of one)."""
    ring = torch.randperm(shape[0], generator=generator)
    partner = torch.empty_like(ring)
    partner[ring] = ring.roll(1)
    return partner


CORRUPTIONS: dict[str, tuple[Callable, Callable]] = {
    "jigsaw": (_no_draw, jigsaw),
    "invert": (_no_draw, invert),
    "pixelate": (_no_draw, pixelate),
    "rgb-ghost": (_no_draw, rgb_ghost),
    "gauss-speckle": (torch.randn, speckle),
    "uniform-speckle": (torch.rand, speckle),
    "avg-mean": (_draw_partner, average),
    "geo-mean": (_draw_partner, geometric_mean),
}


NOISES = (torch.randn, torch.rand)  # a number for each pixel


@dataclass(frozen=True)
class Corruption(Draw):
    """One draw of a corruption for a batch: its name, and what is random in it, if anything is. For a GPU `drawn` is
    the seed of noise, and the noise itself is drawn there."""

    name: str
    drawn: torch.Tensor | int | None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        kind, apply = CORRUPTIONS[self.name]
        if self.drawn is None:
            return apply(images)
        if isinstance(self.drawn, int):
            return apply(images, noise(kind, images.shape, self.drawn, images.device).to(images.dtype))
        return apply(images, send(self.drawn, images.device))


def corrupt(images: torch.Tensor, name: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Corrupt a batch of images.

    Args:
        images: `[N, C, H, W]` in [0, 1], one or three channels.
        name: one of `CORRUPTIONS`.
        generator: a CPU generator for the random ones; without it torch's global one.
    Returns:
        Images of the same shape in [0, 1]; the input is not changed.
    Raises:
        UserError: for an unknown name.
    """
    if name not in CORRUPTIONS:
        raise UserError(unknown_name("corruption", name, CORRUPTIONS))
    return Corruption(name, CORRUPTIONS[name][0](tuple(images.shape), generator=generator))(images)


def draw_corruption(name: str, shape: Shape, generator: torch.Generator, device: torch.device) -> Corruption:
    """What is random in the corruption `name` (of `CORRUPTIONS`) of a batch of `shape` `[N, C, H, W]` on `device`."""
    draw = CORRUPTIONS[name][0]
    if draw in NOISES and device.type != "cpu":
        return Corruption(name, draw_seed(generator))
    return Corruption(name, draw(shape, generator=generator))


def distinct(total: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """`n` different indices below `total` (all of them if there are no more) in random order, int64 `[min(n, total)]`.

    Few of many are drawn with repetition until there are enough, repetitions left out: the first `n` different ones
    are as likely in every order, and nothing of length `total` is made.
    """
    if 4 * n >= total:
        return torch.randperm(total, generator=generator)[:n]
    drawn = np.empty(0, np.int64)
    while len(drawn) < n:
        more = torch.randint(total, (n,), generator=generator).numpy()
        drawn = np.concatenate([drawn, more])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return torch.from_numpy(drawn[:n])


@dataclass(frozen=True)
class OutlierBatch(Draw):
    """What is random in a batch of outliers: which images (int64 `[n]`), and how they are corrupted."""

    index: torch.Tensor
    corruption: Corruption | None = None


class _Source:
    """What both sources share."""

    def draw(self, slot: int, n: int, generator: torch.Generator) -> torch.Tensor:
        """`n` (or as many as there are) different outliers of a slot, normalised `[n, C, H, W]`."""
        return self.batch(self.choose(slot, n, generator))


@dataclass(frozen=True)
class PseudoOutliers(_Source):
    """POE: slot c serves training images under corruption `c mod len(corruptions)`.

    Only the drawn batch is corrupted.
    """

    real: RealData
    corruptions: tuple[str, ...] = DEFAULT_CORRUPTIONS
    notice: str = ""

    def choose(self, slot: int, n: int, generator: torch.Generator) -> OutlierBatch:
        """Draw `n` (or as many as there are) different training images of any class, and how they are corrupted."""
        index = distinct(len(self.real.images_train), n, generator)
        shape = (len(index), *self.real.images_train.shape[1:])
        name = self.corruptions[slot % len(self.corruptions)]
        return OutlierBatch(index, draw_corruption(name, shape, generator, self.real.device))

    def batch(self, drawn: OutlierBatch) -> torch.Tensor:
        """The training images that were drawn, corrupted and normalised."""
        return self.real.normalize(drawn.corruption(self.real.unit_train(drawn.index)))


@dataclass(frozen=True)
class OutlierPool(_Source):
    """OE: disjoint random slices of a pool of images, one for each class slot.

    `images`: uint8 `[N, C, H, W]`, possibly memory-mapped; `slices`: int64 `[num_classes, per_slot]` into it.
    """

    real: RealData
    images: torch.Tensor
    slices: torch.Tensor
    notice: str = ""

    def choose(self, slot: int, n: int, generator: torch.Generator) -> OutlierBatch:
        """Draw `n` (or as many as the slice has) different images of the slot's slice."""
        return OutlierBatch(self.slices[slot][distinct(self.slices.shape[1], n, generator)])

    def batch(self, drawn: OutlierBatch) -> torch.Tensor:
        """The images that were drawn, conformed and normalised."""
        images = self.images[send(drawn.index, self.images.device)]
        return self.real.normalize(conform(images, self.real.channel, self.real.im_size))

    def fingerprint(self) -> str:
        """SHA-256 of the images of all slices."""
        return fingerprint(self.images[indices.to(self.images.device)] for indices in self.slices)


def read_image_pool(path: str | Path, channel: int, im_size: tuple[int, int], flag: str) -> torch.Tensor:
    """Images of a `.npy` file, an `.npz` file (key `images`) or a folder, uint8 `[N, C, H, W]`.

    A `.npy` file is memory-mapped. Arrays keep their own size and channels; images of a folder are decoded to `channel`
    and `im_size`.
    """
    path = Path(path)
    if path.is_dir():
        files = list_images(path, flag=flag)
        if not files:
            raise UserError(f"{flag}: {path} holds no images")
        return read_images(files, channel, im_size, flag)
    if path.suffix == ".npz":
        return images_to_nchw(read_npz(path, ["images"], flag)[0], path, flag)
    return images_to_nchw(read_npy(path, flag), path, flag)


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


def load_outlier_pool(
    path: str | Path, real: RealData, per_slot: int, seed: int, download: bool = False
) -> OutlierPool:
    """Read a pool and cut a random permutation of it into `num_classes` disjoint slices of `per_slot`.

    A pool too small for that is cut into slices of `N // num_classes`; `notice` says so. With `download` a missing
    `300K_random_images.npy` is fetched.
    """
    path = Path(path)
    if not path.exists():
        if not (download and path.name == TINYIMAGES):
            raise UserError(
                f"--oe_data_path: {path} is not there; give a .npy (uint8 NHWC), an .npz (key images) or a folder of "
                f"images, or let --download all fetch {TINYIMAGES} (pip install pytorch-ood)"
            )
        _fetch_tinyimages(path)
    images = read_image_pool(path, real.channel, real.im_size, "--oe_data_path")
    fits = len(images) // real.num_classes
    if not fits:
        raise UserError(
            f"--oe_data_path: {path} has {len(images)} images; {real.num_classes} classes need at least one each"
        )
    notice = ""
    if fits < per_slot:
        notice = (
            f"{path} has {len(images)} images, too few for {per_slot} per class: the slices shrink to {fits} "
            f"(N // num_classes = {len(images)} // {real.num_classes})"
        )
        per_slot = fits
    order = torch.randperm(len(images), generator=keyed_generator(seed, "outlier slices"))
    slices = order[: real.num_classes * per_slot].view(real.num_classes, per_slot)
    if real.device.type == "cuda":  # the whole of what is used lives beside the real data
        images = images[slices.flatten()].to(real.device)
        slices = torch.arange(slices.numel()).view_as(slices)
    return OutlierPool(real, images, slices, notice)
