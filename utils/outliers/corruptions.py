"""Corruptions that turn training images into pseudo-outliers (POE); images are `[N, C, H, W]` in [0, 1]."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from utils.compute.transfer import product_dtype, send
from utils.core.errors import require, unknown_name
from utils.core.rng import draw_seed, noise

PIXELATE = 0.2
Shape = tuple[int, ...]
DEFAULT_CORRUPTIONS = ("jigsaw", "invert", "pixelate", "gauss-speckle")


def jigsaw(images: torch.Tensor) -> torch.Tensor:
    """Rearrange the quadrants, the upper two with swapped halves; a last odd row or column stays in place."""
    h, w = (side // 2 for side in images.shape[2:])
    out = images.clone()
    out[..., :h, :w] = images[..., :h, :w].roll(-(images.shape[2] // 4), 2)
    out[..., :h, w : 2 * w] = images[..., h : 2 * h, :w]
    out[..., h : 2 * h, :w] = images[..., h : 2 * h, w : 2 * w]
    out[..., h : 2 * h, w : 2 * w] = images[..., :h, w : 2 * w].roll(-(images.shape[3] // 4), 3)
    return out


def invert(images: torch.Tensor) -> torch.Tensor:
    """Channels 1 and 2 become 1-x, channel 0 stays; one-channel images become 1-x."""
    if images.shape[1] == 1:
        return 1 - images
    return torch.cat([images[:, :1], 1 - images[:, 1:]], 1)


def pixelate(images: torch.Tensor) -> torch.Tensor:
    """Box-average down to a fifth of the size, then enlarge to nearest pixels (`PIL.Image.BOX` twice)."""
    dtype = product_dtype(images.dtype, images.device)
    rows, columns = (_pixelate_weights(side, dtype, images.device) for side in images.shape[2:])
    return (rows @ images.to(dtype) @ columns.T).to(images.dtype)


@lru_cache
def _pixelate_weights(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[length, length]`, along one side. PIL's box filter selects whole pixels by their centres."""
    small, product = max(int(PIXELATE * length), 1), torch.eye(length)
    for before, after in ((length, small), (small, length)):
        scale = before / after
        support = 0.5 * max(scale, 1.0)
        weights = torch.zeros(after, before)
        for i in range(after):
            centre = (i + 0.5) * scale
            weights[i, max(int(centre - support + 0.5), 0) : int(centre + support + 0.5)] = 1
        product = weights / weights.sum(1, keepdim=True) @ product
    return product.to(device, dtype)


def rgb_ghost(images: torch.Tensor) -> torch.Tensor:
    """Channels (1 mirrored left-right, 2, 0); one channel: mirrored."""
    if images.shape[1] == 1:
        return images.flip(3)
    return torch.stack([images[:, 1].flip(2), images[:, 2], images[:, 0]], 1)


def speckle(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Add noise (of the images' shape) in proportion to each pixel; clipped to [0, 1]."""
    return (images + images * noise).clamp(0, 1)


def _draw_partner(shape: Shape, generator: torch.Generator | None) -> torch.Tensor:
    """For each image the index of another image of the batch (of itself in a batch of one)."""
    ring = torch.randperm(shape[0], generator=generator)
    partner = torch.empty_like(ring)
    partner[ring] = ring.roll(1)
    return partner


CORRUPTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "jigsaw": jigsaw,
    "invert": invert,
    "pixelate": pixelate,
    "rgb-ghost": rgb_ghost,
    "gauss-speckle": speckle,
    "uniform-speckle": speckle,
    "avg-mean": lambda images, partner: (images + images[partner]) / 2,
    "geo-mean": lambda images, partner: (images * images[partner]).sqrt(),
}
DRAWS: dict[str, Callable[..., torch.Tensor]] = {  # of random ones: what they take beside images `(N, C, H, W)`
    "gauss-speckle": torch.randn,
    "uniform-speckle": torch.rand,
    "avg-mean": _draw_partner,
    "geo-mean": _draw_partner,
}
MEANS = ("avg-mean", "geo-mean")  # of two images


def corrupt(images: torch.Tensor, name: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Corrupted copies of images `[N, C, H, W]` in [0, 1], of one or three channels.

    A `UserError` tells that `name` is none of `CORRUPTIONS`. `generator` is on the CPU; default: torch's global one.
    Noise for images on a GPU is drawn there, and is not that of a CPU.
    """
    require(name in CORRUPTIONS, unknown_name("corruption", name, CORRUPTIONS))
    apply, draw, device = CORRUPTIONS[name], DRAWS.get(name), images.device
    if draw is None:
        return apply(images)
    if draw in (torch.randn, torch.rand) and device.type != "cpu":  # one number per pixel: too many to transfer
        return apply(images, noise(draw, images.shape, draw_seed(generator), device).to(images.dtype))
    return apply(images, send(draw(tuple(images.shape), generator=generator), device))


def corrupt_mixed(images: torch.Tensor, names: Sequence[str], generator: torch.Generator) -> torch.Tensor:
    """Copies of images, each corrupted by one of `names`; all are equally likely."""
    which, out, parts = torch.randint(len(names), (len(images),), generator=generator), images.clone(), []
    for i in which.unique().tolist():
        rows = read = (which == i).nonzero().flatten()
        if names[i] in MEANS and len(rows) == 1:  # a mean is of two images
            other = torch.randint(len(images) - 1, (1,), generator=generator)
            read = torch.cat([rows, other + (other >= rows)])
        parts.append((names[i], rows, read))
    for name, rows, read in parts:
        changed = corrupt(images[send(read, images.device)], name, generator)
        out[send(rows, images.device)] = changed[: len(rows)]
    return out
