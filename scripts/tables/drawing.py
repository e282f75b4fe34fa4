"""What the figures have in common: colours, marks, and the values of a study."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from utils.report.results import StudyResults
from utils.report.study import NamedResults, StudyColumn
from utils.report.tables import defined

RESULTS = Path(__file__).resolve().parents[2] / "assets" / "results"
# dark to light, so that they differ in black and white; of Okabe & Ito's palette for all kinds of colour vision
BLACK, BLUE, RED, GREY = "#000000", "#0072b2", "#d55e00", "#8a8a8a"


def values(
    study: StudyResults, kind: str, measure: str, score: str = "", sets: Sequence[str] | None = None
) -> np.ndarray:
    """A measure of the networks of a kind that have it, in its unit; of a score the mean over `sets`, or (None) all."""
    column = StudyColumn(measure, score, sets)
    return column.shown.factor * np.array(defined(NamedResults(kind, study[kind]).values(column)))


def dots(
    axis: Axes, rows: Sequence[np.ndarray], title: str, marker: str = "o", color: str = BLUE, **style: object
) -> None:
    """The mean of each row, from the top, with one standard deviation."""
    at = -np.arange(len(rows))
    means, spread = ([of(row) for row in rows] for of in (np.mean, np.std))
    axis.errorbar(means, at, xerr=spread, fmt=marker, color=color, capsize=2, markersize=6, **style)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", linewidth=0.4, alpha=0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def dumbbells(axis: Axes, pairs: dict[str, Sequence[float]], labels: Sequence[str], title: str) -> list[str]:
    """Two values of each name, a hollow and a filled mark, the largest on top; returns the names from below."""
    order = sorted(pairs, key=lambda name: max(pairs[name]))
    places = range(len(order))
    first, second = ([pairs[name][i] for name in order] for i in range(2))
    axis.hlines(places, first, second, color=GREY, linewidth=1.2, zorder=1)
    axis.scatter(first, places, s=36, facecolor="white", edgecolor=RED, label=labels[0], zorder=2)
    axis.scatter(second, places, s=36, color=BLUE, marker="s", label=labels[1], zorder=3)
    axis.set_yticks(places, order, fontsize=8)
    axis.set_xlabel(title, fontsize=9)
    axis.grid(axis="x", linewidth=0.4, alpha=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return order
