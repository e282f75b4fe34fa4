"""Differentiable Siamese augmentation (DSA) and the augmentation of plain gradient matching (DC).

Every augmentation first draws parameters, on the CPU, then applies them. One set of parameters for the real and the
synthetic batch is the Siamese rule of Zhao & Bilen (ICML 2021, eq. 4); network training uses one set per image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils.compute.transfer import Draw, send
from utils.core.rng import draw_seed, noise

Size = tuple[int, int]

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP_RATIO, CUTOUT_RATIO, SCALE_RATIO, ROTATE_DEGREES = 0.125, 0.5, 1.2, 15.0


def _per_image(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """`[n]` (n = 1 or N) as `[n, 1, 1, 1]` with the dtype and device of `images`."""
    return send(values, images.device).to(images.dtype).view(-1, 1, 1, 1)


def color(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Change brightness, then saturation, then contrast. `u`: `[n, 3]` in [0, 1)."""
    brightness, saturation, contrast = (_per_image(column, images) for column in u.unbind(1))
    images = images + (brightness - 0.5) * BRIGHTNESS
    mean = images.mean(1, keepdim=True)
    images = (images - mean) * (saturation * SATURATION) + mean
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + CONTRAST) + mean


def shift(images: torch.Tensor, offset: torch.Tensor, fill: torch.Tensor | None = None) -> torch.Tensor:
    """Output pixel (r, c) is input pixel (r + dr, c + dc), zero (or `fill`) beyond the border.

    `offset`: int64 `[n, 2]`, rows then columns; `fill`: broadcastable to the images.
    """
    if len(offset) == 1 and offset.device.type == "cpu" and fill is None:  # reading it from a GPU would synchronise
        rows, cols = offset[0].tolist()
        return F.pad(images, (-cols, cols, -rows, rows))
    height, width = images.shape[2:]
    offset = send(offset, images.device)
    row = torch.arange(height, device=images.device) + offset[:, :1]
    col = torch.arange(width, device=images.device) + offset[:, 1:]
    inside = ((row >= 0) & (row < height)).unsqueeze(2) & ((col >= 0) & (col < width)).unsqueeze(1)
    index = (row.clamp(0, height - 1) * width).unsqueeze(2) + col.clamp(0, width - 1).unsqueeze(1)
    index = index.view(len(offset), 1, -1).expand(len(images), images.shape[1], -1)
    moved = images.flatten(2).gather(2, index).view_as(images)
    return torch.where(inside.unsqueeze(1), moved, images.new_zeros(()) if fill is None else fill)


def cutout(images: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Zero a square around `centre` (int64 `[n, 2]`, rows then columns), clipped at the border."""
    outside = []  # for each side, whether a position along it is outside the square, `[n, length]`
    for length, middle in zip(images.shape[2:], send(centre, images.device).unbind(1), strict=True):
        side = _cutout_side(length)
        position = torch.arange(length, device=images.device) - middle.unsqueeze(1) + side // 2
        outside.append((position < 0) | (position >= side))
    keep = outside[0].unsqueeze(2) | outside[1].unsqueeze(1)
    return images * keep.unsqueeze(1).to(images.dtype)


def _cutout_side(length: int) -> int:
    return int(length * CUTOUT_RATIO + 0.5)


def flip(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Mirror left-right where `u` (`[n]`) < 0.5."""
    return torch.where(_per_image(u, images) < 0.5, images.flip(3), images)


def affine(images: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Resample with `theta` (`[n, 2, 3]`, output to input in [-1, 1]): bilinear, zeros outside, align_corners true."""
    theta = send(theta, images.device).to(images.dtype).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=True)
    if images.is_cuda and torch.are_deterministic_algorithms_enabled():
        return bilinear(images, grid)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def bilinear(images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """`grid_sample` as `affine` calls it, by gathering neighbours; the grid is `[N, H', W', 2]`, x then y in [-1, 1].

    It is for determinism: on CUDA, the gradient of torch's `grid_sample` is summed in no fixed order.
    """
    height, width = images.shape[2:]
    x, y = (grid[..., 0] + 1) / 2 * (width - 1), (grid[..., 1] + 1) / 2 * (height - 1)
    out = images.new_zeros(())
    for column, weight_x in ((x.floor(), 1 - (x - x.floor())), (x.floor() + 1, x - x.floor())):
        for row, weight_y in ((y.floor(), 1 - (y - y.floor())), (y.floor() + 1, y - y.floor())):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().flatten(1)
            index = index.unsqueeze(1).expand(-1, images.shape[1], -1)
            values = images.flatten(2).gather(2, index).view(*images.shape[:2], *grid.shape[1:3])
            out = out + values * (weight_x * weight_y * inside).unsqueeze(1)
    return out


def _scale_theta(factors: torch.Tensor) -> torch.Tensor:
    """`[n, 2]` factors of x and y to `[n, 2, 3]`."""
    return F.pad(torch.diag_embed(factors), (0, 1))


def _rotate_theta(angle: torch.Tensor) -> torch.Tensor:
    """`[n]` angles in radians to `[n, 2, 3]`."""
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return F.pad(rows, (0, 1))


def _draw_parameters(entry: str, n: int, size: Size, g: torch.Generator) -> torch.Tensor:
    """`n` sets of the parameters of an entry of DSA."""
    if entry == "crop":
        limits = [int(side * CROP_RATIO + 0.5) for side in size]
        return torch.stack([torch.randint(-s, s + 1, (n,), generator=g) for s in limits], 1)
    if entry == "cutout":  # the centre of a square of even side lies between pixels: it has one more possible position
        ends = [side + 1 - _cutout_side(side) % 2 for side in size]
        return torch.stack([torch.randint(0, end, (n,), generator=g) for end in ends], 1)
    if entry == "scale":
        return _scale_theta(torch.rand(n, 2, generator=g) * (SCALE_RATIO - 1 / SCALE_RATIO) + 1 / SCALE_RATIO)
    if entry == "rotate":
        return _rotate_theta((torch.rand(n, generator=g) - 0.5) * 2 * math.radians(ROTATE_DEGREES))
    return torch.rand((n, 3) if entry == "color" else (n,), generator=g)


DSA_ENTRIES = {"color": color, "crop": shift, "cutout": cutout, "flip": flip, "scale": affine, "rotate": affine}


@dataclass(frozen=True)
class Transform(Draw):
    """One draw of DSA: an entry and its parameters, `[1, …]` (Siamese) or `[N, …]` (one set per image)."""

    entry: str
    params: torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return DSA_ENTRIES[self.entry](images, self.params)


@dataclass(frozen=True)
class DSA:
    """The DSA of a strategy."""

    strategy: tuple[str, ...]

    @classmethod
    def of(cls, entries: str) -> "DSA":
        """That of `_`-joined entries of `DSA_ENTRIES`, as `--dsa_strategy` gives them."""
        return cls(tuple(entries.split("_")))

    def draw(self, n: int, im_size: Size, generator: torch.Generator) -> Transform:
        """Pick one entry uniformly; n = 1 for the Siamese use, n = batch size for network training."""
        entry = self.strategy[int(torch.randint(len(self.strategy), (1,), generator=generator))]
        return Transform(entry, _draw_parameters(entry, n, im_size, generator))


def apply_by_part(images: torch.Tensor, transforms: Sequence[Callable], lengths: Sequence[int]) -> torch.Tensor:
    """Apply each transform to its part of the images `[N, C, H, W]`; consecutive parts have these `lengths`.

    Those with the same entry share one call: on a GPU, and for few images, the number of calls determines the time.
    """
    parts = images.split(list(lengths))
    if not all(isinstance(t, Transform) for t in transforms):
        return torch.cat([t(x) for t, x in zip(transforms, parts, strict=True)])
    done = {}
    for entry in dict.fromkeys(t.entry for t in transforms):
        which = [i for i, t in enumerate(transforms) if t.entry == entry]
        params = [transforms[i].params.expand(lengths[i], *transforms[i].params.shape[1:]) for i in which]
        changed = Transform(entry, torch.cat(params))(torch.cat([parts[i] for i in which]))
        done.update(zip(which, changed.split([lengths[i] for i in which]), strict=True))
    return torch.cat([done[i] for i in range(len(parts))])


def apply_by_slot(images: torch.Tensor, transforms: Sequence[Callable]) -> torch.Tensor:
    """Apply `transforms[s]` to `images[s]`; images `[S, n, C, H, W]`."""
    slots, n = images.shape[:2]
    return apply_by_part(images.flatten(0, 1), transforms, [n] * slots).view_as(images)


def identity(images: torch.Tensor) -> torch.Tensor:
    """No augmentation."""
    return images


# --- DC: used when an evaluation network is trained, never in the matching -------------------------------------------

DC_CROP, DC_SCALE, DC_ROTATE_DEGREES, DC_NOISE = 4, 0.2, 45.0, 0.001


@dataclass(frozen=True)
class DCTransform(Draw):
    """One draw of DC's augmentation for N images: which entry each has (`[N]`), and the parameters of every entry."""

    choice: torch.Tensor
    params: dict[str, torch.Tensor | int]  # by entry, in order; those of noise are a seed

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean((2, 3), keepdim=True)
        out, choice = images, _per_image(self.choice, images)
        for index, (entry, params) in enumerate(self.params.items()):
            if entry == "crop":
                changed = shift(images, params, mean)
            elif entry == "noise":
                drawn = noise(torch.randn, images.shape, params, images.device)
                changed = images + DC_NOISE * drawn.to(images.dtype)
            else:
                changed = affine(images - mean, params) + mean
            out = torch.where(choice == index, changed, out)
        return out


@dataclass(frozen=True)
class DC:
    """DC's augmentation (Zhao et al., ICLR 2021): one entry per image, drawn uniformly; padding by channel means."""

    strategy: tuple[str, ...]

    def draw(self, n: int, im_size: Size, generator: torch.Generator) -> DCTransform:
        """Return the transform of a batch of `n` images."""
        factors = 1 + DC_SCALE * (2 * torch.rand(n, 2, generator=generator) - 1)
        angle = math.radians(DC_ROTATE_DEGREES) * (2 * torch.rand(n, generator=generator) - 1)
        choice = torch.randint(len(self.strategy), (n,), generator=generator)
        offset = torch.randint(-DC_CROP, DC_CROP + 1, (n, 2), generator=generator)
        params = {"crop": offset, "scale": _scale_theta(1 / factors), "rotate": _rotate_theta(angle)}
        params["noise"] = draw_seed(generator)
        return DCTransform(choice, {entry: params[entry] for entry in self.strategy})


def dc_augmentation(dataset: str, model_eval: str) -> DC | None:
    """The augmentation that method DC uses to evaluate `model_eval` on `dataset`; None if it uses none."""
    if model_eval == "ConvNetBN":
        return DC(("crop", "noise"))
    return DC(("crop", "scale", "rotate")) if dataset == "MNIST" else None
