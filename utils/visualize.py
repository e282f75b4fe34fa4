"""Pictures: grids of synthetic images, and plots."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .runs import atomic_write

SMALLEST_SIDE = 64


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


def save_comparison(
    path: Path,
    names: Sequence[str],
    sets: Sequence[str],
    values: np.ndarray,
    spread: np.ndarray,
    strips: Sequence[tuple[str, torch.Tensor]],
) -> None:
    """Strips of images above bars of AUROC. Needs matplotlib.

    Args:
        names, sets: the runs and the OOD sets; `values`, `spread`: their AUROC and its deviation in percent,
            `[runs, sets]`.
        strips: a title and images `[N, C, H, W]` in [0, 1] for each strip.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.75 * len(strips) + 2.6), layout="constrained")
    axes = figure.subplots(len(strips) + 1, 1, height_ratios=[1] * len(strips) + [3.2], squeeze=False)[:, 0]
    for axis, (title, images) in zip(axes, strips, strict=False):
        padded = torch.nn.functional.pad(images, (0, 1, 0, 0), value=0.8)
        axis.imshow(torch.cat(list(padded), 2).expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_axis_off()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        at = np.arange(len(sets)) + (index - (len(names) - 1) / 2) * width
        axes[-1].bar(at, values[index], width * 0.92, yerr=spread[index], capsize=3, label=name)
    axes[-1].set_xticks(range(len(sets)), sets)
    axes[-1].set_ylabel("AUROC (%)")
    axes[-1].set_ylim(max(0, min(45, np.nanmin(values) - 5)), 100)
    axes[-1].axhline(50, color="grey", linewidth=0.8, linestyle=":")
    axes[-1].legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=len(names), fontsize=9, frameon=False)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=130))
