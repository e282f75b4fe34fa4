"""Results of several stage-3 runs in one table: as markdown, CSV, LaTeX, and as a picture."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from utils.core.errors import UserError
from utils.core.files import csv_text
from utils.report.plots import BarPanel, distilled_pictures, save_comparison
from utils.report.results import Results, load_results, shared_sets
from utils.report.tables import markdown_table, mean_std
from utils.runs.lineage import args_or_nothing, sources_of

STRIP = 20
RESULTS = "results.json"
TITLES = {
    "fpr_in": "FPR(IN)95 ↓",
    "fpr_out": "FPR(OUT)95 ↓",
    "auroc": "AUROC ↑",
    "aupr_in": "AUPR(IN) ↑",
    "aupr_out": "AUPR(OUT) ↑",
}


@dataclass(frozen=True)
class Unit:
    """How a value is shown: the unit's name, the factor, and the digits after the point."""

    name: str
    scale: float
    digits: int


PERCENT, NATS, SQUARE = Unit("%", 100, 2), Unit("nats", 1, 3), Unit("0 to 2", 1, 3)
# measures of the networks on the test images: title, unit, and whether higher is better
OF_NETWORKS = {
    "accuracy": ("accuracy ↑", PERCENT, True),
    "aurc": ("AURC ↓", PERCENT, False),
    "ece": ("ECE ↓", PERCENT, False),
    "nll": ("NLL ↓", NATS, False),
    "brier": ("Brier ↓", SQUARE, False),
}


@dataclass(frozen=True)
class Run:
    """A column of the table: its name, the stage-3 folders it is made of, and what they measured."""

    name: str
    folders: tuple[Path, ...]
    results: Results


@dataclass(frozen=True)
class Row:
    """A line of the table: `values[run]` holds one value per network, without NaN; empty if the run has none."""

    score: str
    set: str
    measure: str
    unit: Unit
    high: bool
    values: tuple[tuple[float, ...], ...]

    def cells(self) -> list[str]:
        """`mean ± std` of each run; a dash if it has no value."""
        return [mean_std(values, self.unit.scale, self.unit.digits) for values in self.values]

    def best(self) -> list[bool]:
        """Whether each run's mean, at the digits shown, is the best; all False if fewer than two runs have a value."""
        means = [round(np.mean(v) * self.unit.scale, self.unit.digits) if v else math.nan for v in self.values]
        defined = [m for m in means if not math.isnan(m)]
        if len(defined) < 2:
            return [False] * len(means)
        top = max(defined) if self.high else min(defined)
        return [m == top for m in means]


# --- finding runs ----------------------------------------------------------------------------------------------------


def find_runs(folders: Sequence[Path], names: Sequence[str] | None, search: Sequence[Path]) -> list[Run]:
    """The stage-3 runs that `folders` lead to, one column each; folders of the same name are pooled into one column.

    Args:
        folders: stage-3 folders, or folders above them, or folders of stages 1 and 2, which are followed to the
            stage-3 runs that were made from them.
        names: one per folder; None takes the paths of the stage-3 folders.
        search: roots under which the stage-3 runs made from stages 1 and 2 are searched.
    Raises:
        UserError: when a folder leads to no stage-3 run, or its results are damaged.
    """
    columns: dict[str, list[Path]] = {}
    for folder, name in zip(folders, names or [None] * len(folders), strict=True):
        for path in stage3_folders(folder, search):
            known = columns.setdefault(name or str(path), [])
            if path not in known:
                known.append(path)
    return [Run(name, tuple(paths), pooled(map(load_results, paths))) for name, paths in columns.items()]


def stage3_folders(folder: Path, search: Sequence[Path]) -> list[Path]:
    """The stage-3 folders in or below `folder`; if there are none, those made from what is in or below it.

    Raises:
        UserError: when there are neither, or `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give run folders of test_ood_model_syn.py, or of stage 1 or 2")
    below = sorted(path.parent for path in folder.rglob(RESULTS))
    if below:
        return below
    known = sorted({path.parent for root in search for path in root.rglob(RESULTS)})
    origin = folder.resolve()
    made = [path for path in known if any(source.is_relative_to(origin) for source in sources_of(path))]
    if not made:
        places = ", ".join(map(str, search)) or "nothing"
        raise UserError(
            f"{folder}: no {RESULTS}, and none of the {len(known)} under {places} was made from it; run "
            "test_ood_model_syn.py, or name the root of its results with --results"
        )
    return made


def of_scores(run: Run, scores: Sequence[str]) -> Run:
    """The run with these scores alone, in this order.

    Raises:
        UserError: naming a score that it does not have.
    """
    results = run.results
    if missing := [score for score in scores if score not in results.scores()]:
        raise UserError(f"--scores: {run.name} was not measured by {missing[0]}, only by {', '.join(results.scores())}")
    rows = sorted((row for row in results.rows if row["score"] in scores), key=lambda row: scores.index(row["score"]))
    return replace(run, results=replace(results, rows=rows))


def pooled(results: Iterable[Results]) -> Results:
    """Join several results into one; networks are numbered consecutively."""
    together = Results()
    for part in results:
        first = len(together.errors)
        together.errors += part.errors
        together.rows += [row | {"network": first + row["network"]} for row in part.rows]
        together.missing += [name for name in part.missing if name not in together.missing]
    return together


# --- tables ----------------------------------------------------------------------------------------------------------


def comparison_rows(runs: Sequence[Run], measures: Sequence[str]) -> list[Row]:
    """The table: accuracy and calibration; then, for each score, each measure on each OOD set and their mean.

    The mean is over the sets on which all runs were measured; its title says so where there are others.
    """
    results = [run.results for run in runs]
    rows = []
    for name, (title, unit, high) in OF_NETWORKS.items():
        values = [[1 - e for e in r.of_networks("error")] if high else r.of_networks(name) for r in results]
        rows.append(Row("", "", title, unit, high, _defined(values)))
    scores = list(dict.fromkeys(score for r in results for score in r.scores()))
    sets = list(dict.fromkeys(name for r in results for name in r.sets()))
    shared = shared_sets(results)
    others = [name for name in sets if name not in shared and not name.startswith("val:")]
    mean = f"mean of {', '.join(shared)}" if others else "mean"
    for score in scores:
        for name in [*sets, *([None] if shared else [])]:
            for measure in measures:
                values = _defined([r.per_network(name, score, measure, shared) for r in results])
                title = TITLES[measure]
                rows.append(Row(score, name or mean, title, PERCENT, not measure.startswith("fpr"), values))
    return [row for row in rows if any(row.values)]


def _defined(values: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(v for v in of_run if not math.isnan(v)) for of_run in values)


def markdown(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """The table in markdown: mean ± std over networks, best in bold."""
    several = len({row.score for row in rows if row.score}) > 1
    lines = []
    for row in rows:
        title = f"{row.set} ({row.score})" if several and row.score else row.set
        cells = [f"**{c}**" if best else c for c, best in zip(row.cells(), row.best(), strict=True)]
        lines.append([title, row.measure, *cells])
    return markdown_table(["OOD set", "measure", *(run.name for run in runs)], lines) + "\n"


def table_csv(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """The table as CSV: mean, std and number of networks of each run, in the unit of the row."""
    columns = [f"{run.name} {what}" for run in runs for what in ("mean", "std", "networks")]
    lines = [["score", "set", "measure", "unit", *columns]]
    for row in rows:
        cells: list[float | str | int] = []
        for values in row.values:
            scaled = np.array(values) * row.unit.scale
            cells += [float(scaled.mean()), float(scaled.std()), len(values)] if values else ["", "", 0]
        lines.append([row.score, row.set, row.measure[:-2], row.unit.name, *cells])
    return csv_text(lines)


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


def latex(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """The table in LaTeX, for the package booktabs: mean ± std over networks, best in bold."""

    def safe(text: str) -> str:
        return "".join(_LATEX.get(c, c) for c in text)

    lines = [r"\begin{tabular}{lll" + "r" * len(runs) + "}", r"\toprule"]
    lines.append(" & ".join(["score", "OOD set", "measure", *(safe(run.name) for run in runs)]) + r" \\")
    score = None
    for row in rows:
        if row.score != score:
            lines.append(r"\midrule")
            score = row.score
        cells = [rf"\textbf{{{safe(c)}}}" if best else safe(c) for c, best in zip(row.cells(), row.best(), strict=True)]
        lines.append(" & ".join([*map(safe, (row.score, row.set, row.measure)), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


# --- picture ---------------------------------------------------------------------------------------------------------


def plot_comparison(path: Path, runs: Sequence[Run]) -> None:
    """Draw the distilled images and outliers of each run above the AUROC of each score on each OOD set."""
    results = [run.results for run in runs]
    sets = list(dict.fromkeys(n for r in results for n in r.sets() if not n.startswith("val:")))
    shared = shared_sets(results)
    wanted = [*sets, None] if len(sets) > 1 and shared else sets
    mean = "mean" if shared == sets else f"mean of {len(shared)}"
    panels = []
    for score in dict.fromkeys(score for r in results for score in r.scores()):
        values = [_defined([r.per_network(name, score, "auroc", shared) for name in wanted]) for r in results]
        means, spread = (
            np.array([[100 * f(v) if v else np.nan for v in row] for row in values]) for f in (np.mean, np.std)
        )
        panels.append(BarPanel(score, [name or mean for name in wanted], means, spread))
    save_comparison(path, [run.name for run in runs], panels, [s for run in runs for s in _strips(run)])


def _strips(run: Run) -> list[tuple[str, torch.Tensor]]:
    """One image per class, and one outlier per slot, of the distilled set behind a run; empty if the set is gone."""
    networks = args_or_nothing(run.folders[0]).get("networks")
    pictures = distilled_pictures(Path(networks)) if isinstance(networks, str) else []
    return [(f"{run.name}: {title}, one per class", images[:STRIP, 0]) for title, images in pictures]
