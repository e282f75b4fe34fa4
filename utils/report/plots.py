"""Pictures: grids of synthetic images, the distilled images behind results, and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.ood.evaluate import NetworkScores
from utils.ood.measures import reliability
from utils.runs.lineage import args_or_nothing, set_of_networks

SHOWN_PER_CLASS = 10
NAME_HEIGHT = 15  # pixels of the name of a class
BLUE, ORANGE = "#3b6ea5", "#d1733c"
MARKERS = "os^Dv*PX<>pdh"  # so that columns differ without colours, too; of these there are ten

Dots = dict[str, Sequence[Sequence[float]]]  # by OOD set: for each dot its fractions, none where nothing was measured
Panels = dict[str, dict[str, dict[int, dict[int, float]]]]  # by the titles of panel and curve, run and iteration


def shown(images: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, H, W]` as pictures: clipped to [0, 1].

    But one that would lose more than half of its values, as distilled outliers may, is stretched to that range.
    """
    flat = images.flatten(1)
    low, high = flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)
    lost = ((flat < 0) | (flat > 1)).float().mean(1).view(-1, 1, 1, 1) > 0.5
    return torch.where(lost, (images - low) / (high - low).clamp(min=1e-6), images.clamp(0, 1))


def save_grid(path: Path, images: torch.Tensor, per_row: int, names: Sequence[str] = ()) -> None:
    """Write images `[N, C, H, W]`, as `shown` makes them, as a PNG grid with a row for each class of `per_row` images;
    with one image per class ten classes in a row. Tiny images are enlarged. `names`: of the classes, to write there."""
    from torchvision.utils import make_grid

    factor = max(1, -(-64 // images.shape[-1]))
    images = shown(images).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    above = NAME_HEIGHT if names and per_row == 1 else 0
    images = F.pad(images, (0, 0, above, 0), value=1.0)
    pixels = make_grid(images, nrow=per_row if per_row > 1 else 10, padding=2, pad_value=1.0)
    grid = Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())
    font = ImageFont.load_default(NAME_HEIGHT - 3)
    longest = images.shape[3] // 6 if above else 24
    names = [name[:longest] for name in names]
    left = 0 if above or not names else 6 + int(max(map(font.getlength, names)))
    picture = Image.new("RGB", (left + grid.width, grid.height), "white")
    picture.paste(grid, (left, 0))
    draw, (height, width) = ImageDraw.Draw(picture), images.shape[2:]
    for i, name in enumerate(names):
        corner = (4 + i % 10 * (width + 2), 2 + i // 10 * (height + 2)) if above else (3, 2 + i * (height + 2))
        draw.text(corner, name, "black", font)
    atomic_write(path, lambda file: picture.save(file, format="png"))


def distilled_pictures(networks: Path) -> list[tuple[str, torch.Tensor]]:
    """The images and outliers that the networks of a stage-2 folder were trained on; none if the set cannot be read.

    They are titles and pictures `[num_classes, ipc, C, H, W]` in [0, 1].
    """
    flags = args_or_nothing(networks).get("flags") or {}
    try:
        file = set_of_networks(networks)
        synthetic, normalisation = file.set(), file.normalisation()
        order = synthetic.hard_labels.argsort(stable=True)
        parts = [(f"{flags.get('train_on', 'distilled')} images", synthetic.images[order])]
        if synthetic.images_oe is not None:
            parts.append((f"{flags.get('outliers')} outliers", synthetic.images_oe))
        per_class = synthetic.hard_labels.bincount().tolist()
        classes = len(per_class)
        return [
            (title, shown(normalisation.to_unit(images)).unflatten(0, (classes, -1)))
            for title, images in parts
            if len(images) % classes == 0 and (images is synthetic.images_oe or len({*per_class}) == 1)
        ]
    except (UserError, TypeError, RuntimeError):
        return []


def _panels(count: int, most: int, width: float, height: float, **layout: object) -> tuple[Any, Any]:
    """A figure of `count` panels of this size in inches, at most `most` in a row, and their axes.

    All plots but `save_grid` need matplotlib, which is imported here.
    """
    from matplotlib.figure import Figure

    columns = max(1, min(most, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **layout).flatten()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def _save(path: Path, figure: Any, dpi: int = 110) -> None:
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def _edges(values: np.ndarray) -> np.ndarray:
    """The edges of 40 equal bins over `values`; the bins are widened if all values are (almost) equal."""
    low, high = values.min(), values.max()
    smallest = 1e-13 * max(abs(low), abs(high))  # of less, 40 parts cannot be told from one another
    if high - low <= smallest:
        low, high = low - (smallest or 0.5), high + (smallest or 0.5)
    return np.linspace(low, high, 41)


def save_score_histograms(path: Path, score: str, in_scores: np.ndarray, out_scores: dict[str, np.ndarray]) -> None:
    """One panel per OOD set: densities of its scores and of the in-distribution scores, and the threshold that accepts
    95 % of the in-distribution images. msp is shown as what it is minus of, the largest probability."""
    sign, label = (-1, "largest softmax probability") if score == "msp" else (1, f"{score}: higher looks more unknown")
    figure, axes = _panels(len(out_scores), 4, 3.6, 2.6)
    for axis, (name, values) in zip(axes, out_scores.items(), strict=False):
        bins = _edges(np.concatenate([in_scores, values]) * sign)
        style = {"density": True, "alpha": 0.6, "histtype": "stepfilled"}  # one shape is drawn faster than 40 bars
        axis.hist(sign * in_scores, bins, label="in-distribution", color=BLUE, **style)
        axis.hist(sign * values, bins, label=name, color=ORANGE, **style)
        axis.axvline(sign * np.quantile(in_scores, 0.95), color="grey", linewidth=1, linestyle="--")
        axis.set_title(name, fontsize=10)
        axis.set_yticks([])
        axis.legend(fontsize=7)
    axes[0].set_ylabel("density", fontsize=9)
    figure.supxlabel(f"{label} (dashed: 95 % of in-distribution images are on its known side)", fontsize=9)
    _save(path, figure)


def save_roc_curves(path: Path, score: str, networks: Sequence[NetworkScores], sets: Sequence[str]) -> None:
    """ROC curves with OOD as positive, one for each of `sets`: the mean over networks, and one standard deviation.

    The score must be finite on these sets for every network.
    """
    from sklearn.metrics import roc_curve

    figure, (axis,) = _panels(1, 1, 6.4, 4.2)
    grid = np.linspace(0, 1, 201)
    for index, name in enumerate(sets):
        pairs = [(n.in_scores[score], n.out_scores[name][score]) for n in networks]
        rates = [roc_curve(np.arange(len(i) + len(o)) >= len(i), np.concatenate([i, o]))[:2] for i, o in pairs]
        curves = [np.interp(grid, *of_network) for of_network in rates]
        area = np.mean([n.measures[name][score]["auroc"] for n in networks])
        mean, spread = np.mean(curves, 0), np.std(curves, 0)
        color, line = f"C{index}", "-" if index < 10 else "--"
        axis.plot(grid, mean, line, color=color, linewidth=1.6, label=f"{name}  {100 * area:.1f}")
        axis.fill_between(grid, (mean - spread).clip(0, 1), (mean + spread).clip(0, 1), color=color, alpha=0.15, lw=0)
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=0.8)
    labels = {"xlabel": "in-distribution images taken for OOD", "ylabel": "OOD images found"}
    axis.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal", **labels)
    axis.set_title(f"ROC, score {score}", fontsize=11)
    axis.legend(title="OOD set, AUROC (%)", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    _save(path, figure)


def save_curves(path: Path, lines: Sequence[dict], of_expert: float | None = None) -> None:
    """Losses, accuracies and AUROCs over the iterations of a distillation, from the lines of `metrics.jsonl`.

    Thin lines are experiments, the thick one is their mean; networks of one evaluation are averaged. `of_expert`: the
    accuracy of an expert, which was trained on the whole training set, a fraction, if it is known.
    """
    loss, accuracy, auroc = "matching loss", "accuracy, %", "AUROC, %"
    panels: Panels = {loss: {}, accuracy: {}, auroc: {}}
    for line in lines:
        for key, value in line.items():
            name, _, ood_set = key.partition(" ")  # such as `auroc blob`
            panel = {"loss": loss, "loss_oe": loss, "accuracy": accuracy, "auroc": auroc}.get(name)
            values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
            if panel and values:
                of_network = f"{ood_set} ({line['model']})" if ood_set else line.get("model")
                curve = {"loss": "images", "loss_oe": "outliers"}.get(name, of_network)
                points = panels[panel].setdefault(curve, {}).setdefault(line["experiment"], {})
                points[line["iteration"]] = (1 if panel == loss else 100) * float(np.mean(values))
    shown = {panel: curves for panel, curves in panels.items() if curves}
    references = {} if of_expert is None else {accuracy: (100 * of_expert, "the first expert")}
    save_panels(path, shown, points=(accuracy, auroc), references=references)


def save_panels(
    path: Path,
    panels: Panels,
    points: Sequence[str] = (),
    log: Sequence[str] = (),
    log_iterations: bool = False,
    references: Mapping[str, tuple[float, str]] | None = None,
) -> None:
    """Curves over iterations: thin lines are runs, the thick one is their mean at each iteration.

    `points`: titles of panels whose means are marked by points; `log`: of those with a logarithmic axis of values;
    `log_iterations`: the axis of iterations is logarithmic from 1 on, and 0 stands to the left of it. `references`: by
    the title of a panel, a value to compare with, and what it is.
    """
    figure, axes = _panels(len(panels), 3, 4.6, 3.4)
    for axis, (panel, curves) in zip(axes, panels.items(), strict=False):
        for index, (name, runs) in enumerate(curves.items()):
            for values in runs.values():
                axis.plot(list(values), list(values.values()), color=f"C{index}", linewidth=0.6, alpha=0.5)
            steps = sorted({step for values in runs.values() for step in values})
            means = [np.mean([values[step] for values in runs.values() if step in values]) for step in steps]
            marker = "o" if panel in points else ""
            axis.plot(steps, means, color=f"C{index}", linewidth=1.6, marker=marker, markersize=3, label=name)
            if marker and 0 in steps:
                axis.axhline(means[0], color=f"C{index}", linewidth=0.8, linestyle=":")
        if references and panel in references:
            value, label = references[panel]
            axis.axhline(value, color="black", linewidth=0.8, linestyle="--", label=label)
        axis.set(xlabel="iteration (dotted: before distilling)" if panel in points else "iteration", title=panel)
        axis.legend(fontsize=8)
        if log_iterations:
            axis.set_xscale("symlog", linthresh=1)
        if panel in log:
            axis.set_yscale("log")
    _save(path, figure)


def save_reliability(path: Path, networks: Sequence[NetworkScores]) -> None:
    """The reliability diagram over the predictions of all networks; its ECE is the mean over networks, as in tables."""
    predictions = (np.concatenate([getattr(n, what) for n in networks]) for what in ("confidence", "correct"))
    count, confidence, accuracy = reliability(*predictions)
    ece = float(np.mean([n.errors["ece"] for n in networks]))
    figure, (top, bottom) = _panels(2, 1, 4.4, 2.5, height_ratios=[3, 1], sharex=True)
    edges = np.linspace(0, 1, len(count) + 1)
    left, width = edges[:-1], np.diff(edges)
    accuracy, gap = np.nan_to_num(accuracy), np.nan_to_num(confidence - accuracy)
    top.bar(left, accuracy, width, align="edge", color=BLUE, edgecolor="white", label="accuracy")
    gap_style = {"color": "none", "edgecolor": ORANGE, "hatch": "////", "linewidth": 1}
    top.bar(left, gap, width, bottom=accuracy, align="edge", label="gap to the confidence", **gap_style)
    top.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    confident = "over-confident" if (gap * count).sum() > 0 else "under-confident"
    top.set_title(f"Reliability: ECE {100 * ece:.2f} %, {confident}", fontsize=10)
    top.legend(fontsize=8, loc="upper left")
    bottom.bar(left, count / count.sum(), width, align="edge", color="#7f8c9a", edgecolor="white")
    bottom.set(xlabel="confidence (largest softmax probability)", ylabel="share", ylim=(0, None))
    _save(path, figure)


def _tiled(images: torch.Tensor) -> np.ndarray:
    """Images `[num_classes, n, C, H, W]` on grey, a row per class; with one image per class, ten classes in a row."""
    from torchvision.utils import make_grid

    per_row = images.shape[1] if images.shape[1] > 1 else min(10, len(images))
    grid = make_grid(images.flatten(0, 1), nrow=per_row, padding=1, pad_value=0.6)
    return grid.permute(1, 2, 0).numpy().clip(0, 1)


def _show(axis: Any, images: torch.Tensor, title: str, **style: object) -> None:
    axis.imshow(_tiled(images), interpolation="nearest")
    axis.set_title(title, **style)
    axis.set_axis_off()


def save_distilled(path: Path, pictures: Sequence[tuple[str, torch.Tensor]], names: Sequence[str] = ()) -> None:
    """Grids of distilled images and outliers under their titles, at most ten per class, as `_tiled` lays them out.

    `pictures`: titles and images `[num_classes, ipc, C, H, W]` in [0, 1]. `names`: of the classes; up to 20 are written
    beside the rows of the first picture, unless it is of outliers.
    """
    height, width, _ = _tiled(pictures[0][1][:, :SHOWN_PER_CLASS]).shape
    size = (4.6, min(10.0, max(2.6, 4.6 * height / width)) + 0.4)
    beside, below = (len(pictures), *size), (1, 6, 6 * height / width + 0.4)  # tall grids, wide strips
    figure, axes = _panels(len(pictures), *(below if width > height else beside))
    for axis, (title, images) in zip(axes, pictures, strict=True):
        _show(axis, images[:, :SHOWN_PER_CLASS], title, fontsize=10)
    classes, ipc, _, row, _ = pictures[0][1].shape
    has_names = ipc > 1 and classes <= 20 and not pictures[0][0].endswith("outliers")
    for index, name in enumerate(names[:classes] if has_names else ()):
        where = {"ha": "right", "va": "center", "fontsize": 8, "parse_math": False}
        axes[0].text(-2, (index + 0.5) * (row + 1), name[:24], **where)
    _save(path, figure, dpi=130)


def save_comparison(
    path: Path, names: Sequence[str], panels: dict[str, Dots], strips: Sequence[tuple[str, torch.Tensor]]
) -> None:
    """Strips of images `[N, C, H, W]` in [0, 1] under their titles, above dots of AUROC, a panel for each score.

    `names`: one for each dot of a set.
    """
    height = 2.6 if len(panels) == 1 else 1.9
    ratios = [0.8] * len(strips) + [height] * len(panels)
    whole = 0.75 * len(strips) + height * len(panels)
    figure, axes = _panels(len(ratios), 1, 8, whole / len(ratios), height_ratios=ratios)
    for axis, (title, images) in zip(axes, strips, strict=False):
        _show(axis, images[None], title, fontsize=9, loc="left")
    for axis, (score, dots) in zip(axes[len(strips) :], panels.items(), strict=True):
        _draw_dots(axis, names, score, dots)
    top = axes[len(strips)]
    top.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(names), 5), fontsize=9, frameon=False)
    _save(path, figure, dpi=130)


def _draw_dots(axis: Any, names: Sequence[str], score: str, dots: Dots) -> None:
    means, spread = (
        np.array([[100 * of(values) if values else np.nan for values in group] for group in dots.values()])
        for of in (np.mean, np.std)
    )
    width = 0.7 / len(names)
    for i, name in enumerate(names):
        at = np.arange(len(dots)) + (i - (len(names) - 1) / 2) * width
        style = {"fmt": MARKERS[i % len(MARKERS)], "markersize": 6, "capsize": 2, "color": f"C{i}"}
        axis.errorbar(at, means[:, i], spread[:, i], label=name, **style)
    for between in range(1, len(dots)):
        axis.axvline(between - 0.5, color="grey", linewidth=0.4, alpha=0.5)
    axis.set_xticks(range(len(dots)), dots)
    axis.set(xlim=(-0.5, len(dots) - 0.5), ylabel=f"AUROC (%), {score}")
    axis.axhline(50, color="grey", linewidth=0.8, linestyle=":")
    axis.text(-0.48, 50, "guessing", fontsize=7, color="grey", va="bottom")
