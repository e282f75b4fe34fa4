"""DSA as its papers' scripts apply it, for `textbook_loop.py`: tensor operations on whole batches, the parameters of
scale and rotate in Python lists."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

RNG = np.random.default_rng(0)


def _random(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """A number in [0, 1) for each image, or one for all."""
    return torch.rand(1 if shared else len(x), 1, 1, 1, device=x.device)


def color(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Change brightness, saturation and contrast."""
    x = x + (_random(x, shared) - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (2 * _random(x, shared)) + mean
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (_random(x, shared) + 0.5) + mean


def crop(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Shift by at most an eighth of the side; what enters is zero."""
    n, _, height, width = x.shape
    most = (int(height / 8 + 0.5), int(width / 8 + 0.5))
    moves = [torch.randint(-m, m + 1, (1 if shared else n, 1, 1), device=x.device) for m in most]
    grid = torch.meshgrid(*(torch.arange(size, device=x.device) for size in (n, height, width)), indexing="ij")
    rows = (grid[1] + moves[0] + 1).clamp(0, height + 1)
    columns = (grid[2] + moves[1] + 1).clamp(0, width + 1)
    padded = F.pad(x, (1, 1, 1, 1))
    return padded.permute(0, 2, 3, 1).contiguous()[grid[0], rows, columns].permute(0, 3, 1, 2)


def cutout(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Set a square of half the side to zero."""
    n, _, height, width = x.shape
    size = (height // 2, width // 2)
    centres = [torch.randint(0, side + 1, (1 if shared else n, 1, 1), device=x.device) for side in (height, width)]
    grid = torch.meshgrid(*(torch.arange(s, device=x.device) for s in (n, *size)), indexing="ij")
    rows = (grid[1] + centres[0] - size[0] // 2).clamp(0, height - 1)
    columns = (grid[2] + centres[1] - size[1] // 2).clamp(0, width - 1)
    mask = torch.ones(n, height, width, device=x.device)
    mask[grid[0], rows, columns] = 0
    return x * mask.unsqueeze(1)


def flip(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Mirror left and right with probability 1/2."""
    return torch.where(_random(x, shared) < 0.5, x.flip(3), x)


def _warp(x: torch.Tensor, theta: list) -> torch.Tensor:
    grid = F.affine_grid(torch.tensor(theta, dtype=torch.float, device=x.device), x.shape, align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


def scale(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Stretch each side by a factor from 1/1.2 to 1.2."""
    factors = [_random(x, shared).flatten() * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2)]
    vertical, horizontal = (f.expand(len(x)) for f in factors)
    return _warp(x, [[[vertical[i], 0, 0], [0, horizontal[i], 0]] for i in range(len(x))])


def rotate(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Turn by at most 15 degrees."""
    angles = ((_random(x, shared).flatten() - 0.5) * 2 * 15 / 180 * math.pi).expand(len(x))
    sines, cosines = torch.sin(angles), torch.cos(angles)
    return _warp(x, [[[cosines[i], sines[i], 0], [-sines[i], cosines[i], 0]] for i in range(len(x))])


AUGMENTATIONS = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def augment(x: torch.Tensor, strategy: Sequence[str], seed: int | None = None) -> torch.Tensor:
    """Apply one entry of the strategy; with a seed its parameters are the same for all images and every call."""
    if seed is not None:
        torch.manual_seed(seed)
    choice = RNG if seed is None else np.random.default_rng(seed)
    entry = strategy[choice.integers(len(strategy))]
    return AUGMENTATIONS[entry](x, seed is not None).contiguous()
