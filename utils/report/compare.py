"""Results of several stage-3 runs in one table: as markdown, CSV, LaTeX, a picture and a web page."""

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from utils.core.errors import UserError
from utils.core.files import csv_text
from utils.report.measures import OF_NETWORKS, OF_OOD, Measure
from utils.report.plots import distilled_pictures, save_comparison
from utils.report.results import Results, load_results, protocol_line, shared_sets
from utils.report.tables import markdown_table, render, value_cell
from utils.runs.lineage import args_or_nothing, sources_of

STRIP = 20
RESULTS = "results.json"
CAPTIONS = {"reliability": "reliability of the confidence", "distilled": "the distilled set"}  # these come first
SHOWN_OF_NETWORKS = ("accuracy", "aurc", "ece", "nll", "brier")


@dataclass(frozen=True)
class ComparisonColumn:
    """One column of the table: some stage-3 runs under one name."""

    name: str
    folders: tuple[Path, ...]  # of the runs
    results: Results  # of all of them


@dataclass(frozen=True)
class ComparisonRow:
    """One line of the table: a measure of the networks, or of a score on one OOD set."""

    score: str  # empty: a measure of the networks
    set: str
    measure: Measure
    values: tuple[tuple[float, ...], ...]  # for each column one value per network, without NaN

    def shown(self) -> list[tuple[str, bool]]:
        """For each column `mean ± std`, and whether that mean, at the digits shown, is the best of two or more."""
        factor, digits = self.measure.factor, self.measure.digits
        means = [round(np.mean(v) * factor, digits) if v else math.nan for v in self.values]
        defined = [mean for mean in means if not math.isnan(mean)]
        best = (max if self.measure.better == "↑" else min)(defined) if len(defined) > 1 else None
        return [
            (value_cell(values, self.measure), mean == best) for values, mean in zip(self.values, means, strict=True)
        ]


# --- finding runs ----------------------------------------------------------------------------------------------------


def find_runs(folders: Sequence[Path], names: Sequence[str] | None, search: Sequence[Path]) -> list[ComparisonColumn]:
    """The stage-3 runs that `folders` lead to, one column each; folders of the same name are pooled into one column.

    Args:
        folders: stage-3 folders, or folders above them, or folders of stages 1 and 2, which are followed to the
            stage-3 runs that were made from them.
        names: one per folder; None takes the paths of the stage-3 folders.
        search: roots under which the stage-3 runs made from stages 1 and 2 are searched.
    Raises:
        UserError: when a folder leads to no stage-3 run, or its results are damaged.
    """
    found: dict[str, list[Path]] = {}
    for folder, name in zip(folders, names or [None] * len(folders), strict=True):
        for path in stage3_folders(folder, search):
            found.setdefault(name or str(path), []).append(path)
    columns = {name: tuple(dict.fromkeys(paths)) for name, paths in found.items()}
    return [ComparisonColumn(name, paths, pooled(map(load_results, paths))) for name, paths in columns.items()]


def stage3_folders(folder: Path, search: Sequence[Path]) -> list[Path]:
    """The stage-3 folders in or below `folder`; if there are none, those made from what is in or below it.

    Raises:
        UserError: when there are neither, or `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give run folders of test_ood_model_syn.py, or of stage 1 or 2")
    if below := sorted(path.parent for path in folder.rglob(RESULTS)):
        return below
    known = sorted({path.parent for root in search for path in root.rglob(RESULTS)})
    origin = folder.resolve()
    if made := [path for path in known if any(source.is_relative_to(origin) for source in sources_of(path))]:
        return made
    raise UserError(
        f"{folder}: no {RESULTS}, and none of the {len(known)} under {', '.join(map(str, search)) or 'nothing'} was "
        "made from it; run test_ood_model_syn.py, or name the root of its results with --results"
    )


def of_scores(column: ComparisonColumn, scores: Sequence[str]) -> ComparisonColumn:
    """The column with these scores alone, in this order.

    Raises:
        UserError: naming a score that it does not have.
    """
    results, known = column.results, column.results.scores()
    if missing := [score for score in scores if score not in known]:
        raise UserError(f"--scores: {column.name} was not measured by {missing[0]}, only by {', '.join(known)}")
    rows = sorted((row for row in results.rows if row["score"] in scores), key=lambda row: scores.index(row["score"]))
    return replace(column, results=replace(results, rows=rows))


def pooled(results: Iterable[Results]) -> Results:
    """Join several results into one; networks are numbered consecutively."""
    together, protocols = Results(), []
    for part in results:
        first = len(together.errors)
        together.errors += part.errors
        together.rows += [row | {"network": first + row["network"]} for row in part.rows]
        together.missing += [name for name in part.missing if name not in together.missing]
        protocols += part.protocols
    together.protocols = tuple(dict.fromkeys(protocols))
    return together


# --- tables ----------------------------------------------------------------------------------------------------------


def comparison_rows(columns: Sequence[ComparisonColumn], measures: Sequence[str]) -> list[ComparisonRow]:
    """The table: accuracy and calibration; then, for each score, each of `measures` on each OOD set and their mean.

    The mean is over the sets on which all networks were measured; its title says so where there are others.
    """
    results = [column.results for column in columns]
    rows = [
        ComparisonRow("", "", OF_NETWORKS[name], _defined([r.of_networks(name) for r in results]))
        for name in SHOWN_OF_NETWORKS
    ]
    shared = shared_sets(results)
    sets = {name: name for name in _distinct(r.sets() for r in results)}
    if shared:
        others = set(_distinct(r.ood_sets() for r in results)) - {*shared}
        sets[None] = f"mean of {', '.join(shared)}" if others else "mean"
    rows += [
        ComparisonRow(score, title, OF_OOD[m], _defined([r.per_network(name, score, m, shared) for r in results]))
        for score in _distinct(r.scores() for r in results)
        for name, title in sets.items()
        for m in measures
    ]
    return [row for row in rows if any(row.values)]


def _distinct(names: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for part in names for name in part))


def _defined(values: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(v for v in of_column if not math.isnan(v)) for of_column in values)


def markdown(columns: Sequence[ComparisonColumn], rows: Sequence[ComparisonRow]) -> str:
    """How the networks were trained, and the table in markdown: mean ± std over networks, best in bold."""
    several = len({row.score for row in rows if row.score}) > 1
    lines = []
    for row in rows:
        title = f"{row.set} ({row.score})" if several and row.score else row.set
        lines.append([title, row.measure.heading, *(f"**{cell}**" if best else cell for cell, best in row.shown())])
    table = markdown_table(["OOD set", "measure", *(column.name for column in columns)], lines)
    return f"{trained(columns)}\n\n{table}\n"


def trained(columns: Sequence[ComparisonColumn]) -> str:
    """How the networks of the columns were trained, a sentence."""
    return protocol_line({column.name: column.results.protocols for column in columns})


def table_csv(columns: Sequence[ComparisonColumn], rows: Sequence[ComparisonRow]) -> str:
    """The table as CSV: mean, std and number of networks of each column, in the unit of the row."""
    titles = [f"{column.name} {what}" for column in columns for what in ("mean", "std", "networks")]
    lines = [["score", "set", "measure", "unit", *titles]]
    for row in rows:
        cells: list[float | str | int] = []
        for values in row.values:
            scaled = np.array(values) * row.measure.factor
            cells += [float(scaled.mean()), float(scaled.std()), len(values)] if values else ["", "", 0]
        lines.append([row.score, row.set, row.measure.title, row.measure.unit, *cells])
    return csv_text(lines)


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
)


def latex(columns: Sequence[ComparisonColumn], rows: Sequence[ComparisonRow]) -> str:
    """The table in LaTeX, for the package booktabs: mean ± std over networks, best in bold."""
    return render(
        "compare.tex.j2", columns=columns, rows=rows, trained=trained(columns), safe=lambda text: text.translate(_LATEX)
    )


# --- picture and page -------------------------------------------------------------------------------------------------


def plot_comparison(path: Path, columns: Sequence[ComparisonColumn]) -> None:
    """Draw the distilled images and outliers of each column above the AUROC of each score on each OOD set."""
    results = [column.results for column in columns]
    sets = _distinct(r.ood_sets() for r in results)
    shared = shared_sets(results)
    wanted = [*sets, None] if len(sets) > 1 and shared else sets
    mean = "mean" if shared == sets else f"mean of {len(shared)}"
    panels = {
        score: {
            name or mean: _defined([r.per_network(name, score, "auroc", shared) for r in results]) for name in wanted
        }
        for score in _distinct(r.scores() for r in results)
    }
    strips = [strip for column in columns for strip in _strips(column)]
    save_comparison(path, [column.name for column in columns], panels, strips)


def _strips(column: ComparisonColumn) -> list[tuple[str, torch.Tensor]]:
    """One image per class, and one outlier per slot, of the distilled set of a column; empty if the set is gone."""
    networks = args_or_nothing(column.folders[0]).get("networks")
    pictures = distilled_pictures(Path(networks)) if isinstance(networks, str) else []
    return [(f"{column.name}: {title}, one per class", images[:STRIP, 0]) for title, images in pictures]


def comparison_page(
    columns: Sequence[ComparisonColumn], rows: Sequence[ComparisonRow], picture: Path | None, notes: Sequence[str] = ()
) -> str:
    """A self-contained page: tables of the networks and of each score, the picture, and each run's plots; no scripts.

    Args:
        picture: a PNG of the comparison, if there is one; notes: lines that stand above the tables.
    """
    scores = dict.fromkeys(row.score for row in rows)
    return render(
        "page.html.j2",
        columns=columns,
        tables={score: [row for row in rows if row.score == score] for score in scores},
        picture=picture,
        notes=[trained(columns), *notes],
        plots_of=lambda folder: sorted(folder.glob("*.png"), key=lambda p: (p.stem not in CAPTIONS, p.stem)),
        caption_of=lambda path: CAPTIONS.get(path.stem, path.stem.replace("_", " ", 1)),
        fitted_on=lambda folder: args_or_nothing(folder).get("fitted_on"),
        data_of=lambda path: base64.b64encode(path.read_bytes()).decode(),
    )
