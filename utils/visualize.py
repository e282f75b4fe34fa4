"""Pictures: grids of synthetic images, and plots."""

from pathlib import Path

import torch

from .runs import atomic_write

SMALLEST_SIDE = 32


def save_grid(path: Path, images: torch.Tensor, per_row: int) -> None:
    """Write images `[N, C, H, W]` in [0, 1] as a PNG grid with `per_row` columns; tiny images are enlarged (nearest)."""
    from torchvision.utils import make_grid, save_image

    factor = max(1, -(-SMALLEST_SIDE // images.shape[-1]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(images, nrow=per_row, padding=2, pad_value=1.0)
    atomic_write(path, lambda file: save_image(grid, file, format="png"))
