"""Pictures: grids of synthetic images, the distilled images behind results, and plots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.data.datasets import SPECS
from utils.data.distilled_file import Normalisation
from utils.exchange.normalisation import to_unit
from utils.ood.calibration import Reliability
from utils.runs.lineage import args_or_nothing, distilled_set_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALLEST_SIDE = 64
SHOWN_PER_CLASS = 10


@dataclass(frozen=True)
class BarPanel:
    """AUROC of one score: `values` and their `spread` in percent, `[runs, sets]`, NaN where a run has none."""

    score: str
    sets: Sequence[str]
    values: np.ndarray
    spread: np.ndarray


def save_grid(path: Path, images: torch.Tensor, per_row: int) -> None:
    """Write images `[N, C, H, W]` in [0, 1] as a PNG grid with `per_row` columns; tiny images are enlarged."""
    from torchvision.utils import make_grid, save_image

    factor = max(1, -(-SMALLEST_SIDE // images.shape[-1]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(images, nrow=per_row, padding=2, pad_value=1.0)
    atomic_write(path, lambda file: save_image(grid, file, format="png"))


def distilled_pictures(networks: Path) -> list[tuple[str, torch.Tensor]]:
    """The images and outliers that the networks of a stage-2 folder were trained on, as pictures.

    Returns:
        Titles and images `[num_classes, ipc, C, H, W]` in [0, 1]; empty if the set is missing or cannot be read.
    """
    try:
        file, exp_idx = distilled_set_of(networks)
        synthetic = file.set(exp_idx)
        to_unit = _to_unit(file.normalisation(), args_or_nothing(networks))
    except (UserError, KeyError, TypeError, RuntimeError):
        return []
    flags = args_or_nothing(networks).get("flags") or {}
    images = flags.get("train_on", "distilled")
    outliers = flags.get("outliers", "none")  # train_model_synthetic_no_oe.py has no such flag
    order = synthetic.hard_labels.argsort(stable=True)
    classes = int(synthetic.hard_labels.max()) + 1
    parts = [(f"{images} images", synthetic.images[order])]
    if synthetic.images_oe is not None and outliers in ("distilled", "initial", "kcenter"):
        parts.append((f"{outliers} outliers", synthetic.images_oe))
    shown = [(title, to_unit(images).clamp(0, 1)) for title, images in parts if len(images) % classes == 0]
    return [(title, images.unflatten(0, (classes, -1))) for title, images in shown]


def _to_unit(stored: Normalisation, about: dict) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of normalisation, to [0, 1]: by what the file stores or, for published files, by its data set."""
    _, statistics, zca = stored
    if statistics is None and zca is None:
        spec = SPECS[about["flags"]["dataset"]]
        if spec.mean is None:
            raise KeyError("normalisation")
        statistics = (spec.mean, spec.std)
    return lambda images: to_unit(images, statistics, zca)


def _edges(values: np.ndarray) -> np.ndarray:
    """41 edges of bins that hold the finite `values`; values too close for 40 bins lie in the middle of wider ones."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    smallest = 1e-13 * max(abs(low), abs(high))  # of less, 40 parts cannot be told from one another
    if high - low <= smallest:
        low, high = low - (smallest or 0.5), high + (smallest or 0.5)
    return np.linspace(low, high, 41)


def save_score_histograms(path: Path, score: str, in_scores: np.ndarray, out_scores: dict[str, np.ndarray]) -> None:
    """One panel per OOD set: densities of its scores and of the in-distribution scores. Needs matplotlib."""
    from matplotlib.figure import Figure

    columns = min(4, len(out_scores))
    rows = -(-len(out_scores) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, values) in zip(axes, out_scores.items(), strict=False):
        bins = _edges(np.concatenate([in_scores, values]))
        axis.hist(in_scores, bins, density=True, alpha=0.6, label="in-distribution", color="#3b6ea5")
        axis.hist(values, bins, density=True, alpha=0.6, label="OOD", color="#d1733c")
        axis.set_title(name, fontsize=10)
        axis.set_yticks([])
    for axis in axes[len(out_scores) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8)
    figure.supxlabel(f"{score} (higher = more out-of-distribution)", fontsize=10)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def save_roc_curves(
    path: Path, score: str, in_scores: Sequence[np.ndarray], out_scores: dict[str, Sequence[np.ndarray]]
) -> None:
    """ROC curves with OOD as positive: for each OOD set the mean over networks at each false-positive rate, with a band
    of one standard deviation. Needs matplotlib.

    Args:
        in_scores: one array `[N]` per network; out_scores: for each set, one array `[M]` per network; all finite.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_auc_score, roc_curve

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    grid = np.linspace(0, 1, 201)
    for index, (name, arrays) in enumerate(out_scores.items()):
        curves, areas = [], []
        for inside, outside in zip(in_scores, arrays, strict=True):
            positive = np.arange(len(inside) + len(outside)) >= len(inside)
            scores = np.concatenate([inside, outside])
            fpr, tpr, _ = roc_curve(positive, scores)
            curves.append(np.interp(grid, fpr, tpr))
            areas.append(100 * roc_auc_score(positive, scores))
        mean, spread = np.mean(curves, 0), np.std(curves, 0)
        color = _color(index)
        axis.plot(grid, mean, color=color, linewidth=1.6, label=f"{name}  {np.mean(areas):.1f}")
        axis.fill_between(grid, (mean - spread).clip(0, 1), (mean + spread).clip(0, 1), color=color, alpha=0.15, lw=0)
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=0.8)
    axis.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    axis.set_xlabel("in-distribution images taken for OOD")
    axis.set_ylabel("OOD images found")
    axis.set_title(f"ROC, score {score}", fontsize=11)
    axis.legend(title="OOD set, AUROC (%)", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def save_curves(path: Path, lines: Sequence[dict]) -> None:
    """Losses, accuracies and AUROCs over the iterations of a distillation. Needs matplotlib.

    Args:
        lines: of `metrics.jsonl`. Thin lines are experiments, the thick one is their mean at each iteration; networks
            of one evaluation are averaged.
    """
    curves: dict[str, dict[str, dict[int, dict[int, float]]]] = {"matching loss": {}, "accuracy, %": {}, "AUROC, %": {}}
    for line in lines:
        for name, value in line.items():
            values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
            if name in ("loss", "loss_oe"):
                panel, curve, scale = "matching loss", "images" if name == "loss" else "outliers", 1
            elif name == "accuracy":
                panel, curve, scale = "accuracy, %", line["model"], 100
            elif name.startswith("auroc "):
                panel, curve, scale = "AUROC, %", f"{name.removeprefix('auroc ')} ({line['model']})", 100
            else:
                continue
            if values:
                points = curves[panel].setdefault(curve, {}).setdefault(line["experiment"], {})
                points[line["iteration"]] = scale * float(np.mean(values))
    save_panels(path, {panel: found for panel, found in curves.items() if found}, points=("accuracy, %", "AUROC, %"))


def save_panels(
    path: Path,
    panels: dict[str, dict[str, dict[int, dict[int, float]]]],
    points: Sequence[str] = (),
    log: Sequence[str] = (),
    log_iterations: bool = False,
) -> None:
    """Curves over iterations, a panel for each quantity, three in a row. Needs matplotlib.

    Args:
        panels: title to name of a curve to number of a run to `{iteration: value}`. Thin lines are runs, the thick one
            is their mean at each iteration.
        points: titles of panels whose means are marked by points; log: of those with a logarithmic axis of values.
        log_iterations: the axis of iterations is logarithmic from 1 on; 0 stands to the left of it.
    """
    from matplotlib.figure import Figure

    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    explained: list[str] = []
    for axis, (panel, found) in zip(axes, panels.items(), strict=False):
        for index, (name, runs) in enumerate(found.items()):
            _draw_curve(axis, name, runs, _color(index), marker="o" if panel in points else "")
        axis.set(xlabel="iteration", title=panel)
        if log_iterations:
            axis.set_xscale("symlog", linthresh=1)
        if panel in log:
            axis.set_yscale("log")
        if list(found) != explained:  # one legend serves panels of the same curves
            axis.legend(fontsize=8)
            explained = list(found)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _draw_curve(
    axis: "Axes", name: str, runs: dict[int, dict[int, float]], color: tuple[float, ...], marker: str
) -> None:
    """The runs `{number: {iteration: value}}` and their mean."""
    for points in runs.values():
        axis.plot(list(points), list(points.values()), color=color, linewidth=0.6, alpha=0.5)
    steps = sorted({step for points in runs.values() for step in points})
    means = [np.mean([p[step] for p in runs.values() if step in p]) for step in steps]
    axis.plot(steps, means, color=color, linewidth=1.6, marker=marker, markersize=3, label=name)


def _color(index: int) -> tuple[float, ...]:
    """Ten colours that are easy to tell apart, then twenty more."""
    from matplotlib import colormaps

    return colormaps["tab10"](index) if index < 10 else colormaps["tab20b"]((index - 10) % 20)


def save_reliability(path: Path, bins: Reliability) -> None:
    """The reliability diagram: accuracy by confidence, above the share of predictions in each bin. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 5.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    left, width = bins.edges[:-1], np.diff(bins.edges)
    accuracy = np.nan_to_num(bins.accuracy)
    gap = np.nan_to_num(bins.confidence - bins.accuracy)
    top.bar(left, accuracy, width, align="edge", color="#3b6ea5", edgecolor="white", label="accuracy")
    gap_style = {"color": "none", "edgecolor": "#d1733c", "hatch": "////", "linewidth": 1}
    top.bar(left, gap, width, bottom=accuracy, align="edge", label="gap to the confidence", **gap_style)
    top.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    top.set_title(f"Reliability: ECE {100 * bins.error:.2f} % ({len(left)} bins, all networks)", fontsize=10)
    top.legend(fontsize=8, loc="upper left")
    bottom.bar(left, bins.count / bins.count.sum(), width, align="edge", color="#7f8c9a", edgecolor="white")
    bottom.set(xlabel="confidence (largest softmax probability)", ylabel="share", ylim=(0, None))
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def save_distilled(path: Path, pictures: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Grids of distilled images and outliers under their titles, at most ten per class. Needs matplotlib.

    Args:
        pictures: titles and images `[num_classes, ipc, C, H, W]` in [0, 1]. A row per class; with one image per class,
            ten classes in a row.
    """
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    grids = []
    for _, images in pictures:
        shown = images[:, :SHOWN_PER_CLASS]
        per_row = shown.shape[1] if shown.shape[1] > 1 else min(10, len(shown))
        grids.append(make_grid(shown.flatten(0, 1), nrow=per_row, padding=1, pad_value=0.6).permute(1, 2, 0).numpy())
    height, width = grids[0].shape[:2]
    stacked = width > height  # wide strips go below each other, tall grids beside each other
    shape = (len(grids), 1) if stacked else (1, len(grids))
    side = min(10.0, max(2.6, 4.6 * height / width))
    size = (6, len(grids) * (6 * height / width + 0.4)) if stacked else (4.6 * len(grids), side + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    for axis, (title, _), grid in zip(figure.subplots(*shape, squeeze=False).flatten(), pictures, grids, strict=True):
        axis.imshow(grid.clip(0, 1), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=130))


def save_comparison(
    path: Path, names: Sequence[str], panels: Sequence[BarPanel], strips: Sequence[tuple[str, torch.Tensor]]
) -> None:
    """Strips of images above bars of AUROC, a panel for each score. Needs matplotlib.

    Args:
        names: the runs; strips: a title and images `[N, C, H, W]` in [0, 1] for each strip.
    """
    from matplotlib.figure import Figure

    height = 2.6 if len(panels) == 1 else 1.9
    figure = Figure(figsize=(8, 0.75 * len(strips) + height * len(panels)), layout="constrained")
    ratios = [0.8] * len(strips) + [height] * len(panels)
    axes = figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    for axis, (title, images) in zip(axes, strips, strict=False):
        padded = torch.nn.functional.pad(images, (0, 1, 0, 0), value=0.6)
        padded = torch.nn.functional.pad(padded, (0, 0, 1, 1), value=0.6)
        axis.imshow(torch.cat(list(padded), 2).expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_axis_off()
    for axis, panel in zip(axes[len(strips) :], panels, strict=True):
        _draw_bars(axis, names, panel)
    top = axes[len(strips)]
    top.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(names), 5), fontsize=9, frameon=False)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _draw_bars(axis: "Axes", names: Sequence[str], panel: BarPanel) -> None:
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        at = np.arange(len(panel.sets)) + (index - (len(names) - 1) / 2) * width
        bars = panel.values[index], width * 0.92
        axis.bar(at, *bars, yerr=panel.spread[index], capsize=3 if width > 0.1 else 1, label=name, color=_color(index))
    axis.set_xticks(range(len(panel.sets)), panel.sets)
    axis.set_ylabel(f"AUROC (%), {panel.score}")
    defined = panel.values[np.isfinite(panel.values)]
    low, high = (min(45, defined.min() - 5), defined.max() + 5) if defined.size else (0, 100)
    axis.set_ylim(max(0, low), min(100, 10 * np.ceil(high / 10)))
    axis.axhline(50, color="grey", linewidth=0.8, linestyle=":")
