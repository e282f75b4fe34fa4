"""Pictures: grids of synthetic images, and plots."""

from pathlib import Path

import numpy as np
import torch

from .runs import atomic_write

SMALLEST_SIDE = 32


def save_grid(path: Path, images: torch.Tensor, per_row: int) -> None:
    """Write images `[N, C, H, W]` in [0, 1] as a PNG grid with `per_row` columns; tiny images are enlarged "
    "(nearest)."""
    from torchvision.utils import make_grid, save_image

    factor = max(1, -(-SMALLEST_SIDE // images.shape[-1]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(images, nrow=per_row, padding=2, pad_value=1.0)
    atomic_write(path, lambda file: save_image(grid, file, format="png"))


def save_score_histograms(path: Path, score: str, in_scores: np.ndarray, out_scores: dict[str, np.ndarray]) -> None:
    """One panel per OOD set: densities of its scores and of the in-distribution scores. Needs matplotlib."""
    from matplotlib.figure import Figure

    columns = min(4, len(out_scores))
    rows = -(-len(out_scores) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, values) in zip(axes, out_scores.items(), strict=False):
        bins = np.histogram_bin_edges(np.concatenate([in_scores, values]), bins=40)
        axis.hist(in_scores, bins, density=True, alpha=0.6, label="in-distribution", color="#3b6ea5")
        axis.hist(values, bins, density=True, alpha=0.6, label="OOD", color="#d1733c")
        axis.set_title(name, fontsize=10)
        axis.set_yticks([])
    for axis in axes[len(out_scores) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8)
    figure.supxlabel(f"{score} (higher = more out-of-distribution)", fontsize=10)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
