"""Results of several stage-3 runs in one table: as markdown, CSV, LaTeX, a picture and a web page."""

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.core.errors import require
from utils.core.files import csv_text
from utils.report.plots import distilled_pictures, save_comparison
from utils.report.results import Results, load_results, protocol_line, shared_sets
from utils.report.tables import OF_NETWORKS, OF_OOD, Measure, markdown_table, render
from utils.runs.lineage import args_or_nothing, sources_of

STRIP = 20
RESULTS = "results.json"
CAPTIONS = {"reliability": "reliability of the confidence", "distilled": "the distilled set"}  # these come first
# what `args.json` of stage 3 says of its networks, by the flag
FACTS = {"dataset": "data set", "model": "network", "method": "method", "ipc": "images per class", "seed": "seeds"}


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
    values: tuple[list[float], ...]  # for each column one value per network, without NaN
    is_mean: bool = True  # of the networks, or over OOD sets, and not on one of them

    def shown(self) -> list[tuple[str, bool]]:
        """For each column `mean ± std`, and whether it is better than all others by more than two standard errors."""
        places = range(len(self.values))
        gains = [[g for b in places if b != a and (g := self.gain(b, a))] for a in places]
        leads = [bool(of_column) and all(gain > 2 * error for gain, error in of_column) for of_column in gains]
        return [(self.measure.cell(values), lead) for values, lead in zip(self.values, leads, strict=True)]

    def gain(self, base: int, other: int) -> tuple[float, float] | None:
        """By how much a column is better than another, and the standard error: infinite for a single network."""
        first, second = (np.array(self.values[column]) * self.measure.factor for column in (base, other))
        if not len(first) or not len(second):
            return None
        sign = -1 if self.measure.better == "↓" else 1
        several = min(len(first), len(second)) > 1
        error = math.sqrt(sum(v.var(ddof=1) / len(v) for v in (first, second))) if several else math.inf
        return sign * (second.mean() - first.mean()), error


def find_runs(folders: Sequence[Path], names: Sequence[str] | None, search: Sequence[Path]) -> list[ComparisonColumn]:
    """The stage-3 runs that `folders` lead to, one column each; folders of the same name are pooled into one column.

    Folders of stages 1 and 2 are followed to the stage-3 runs under `search` that were made from them. `names`: one
    per folder; None takes the paths of the stage-3 folders. A `UserError` tells of a folder that leads to no run.
    """
    found: dict[str, dict[Path, None]] = {}
    for folder, name in zip(folders, names or [None] * len(folders), strict=True):
        for path in _stage3_folders(folder, search):
            found.setdefault(name or str(path), {})[path] = None
    return [ComparisonColumn(name, tuple(paths), pooled(map(load_results, paths))) for name, paths in found.items()]


def _stage3_folders(folder: Path, search: Sequence[Path]) -> list[Path]:
    """The stage-3 folders in or below `folder`; if there are none, those made from what is in or below it."""
    require(folder.is_dir(), f"{folder} is no folder; give run folders of test_ood_model_syn.py, or of stage 1 or 2")
    if below := sorted(path.parent for path in folder.rglob(RESULTS)):
        return below
    known = sorted({path.parent for root in search for path in root.rglob(RESULTS)})
    made = [path for path in known if any(source.is_relative_to(folder.resolve()) for source in sources_of(path))]
    require(
        made,
        f"{folder}: no {RESULTS}, and none of the {len(known)} under {', '.join(map(str, search)) or 'nothing'} was "
        "made from it; run test_ood_model_syn.py, or name the root of its results with --results",
    )
    return made


def of_scores(column: ComparisonColumn, scores: Sequence[str]) -> ComparisonColumn:
    """The column with these scores alone, in this order; a `UserError` names a score that it does not have."""
    results, known = column.results, column.results.scores()
    for score in scores:
        require(score in known, f"--scores: {column.name} was not measured by {score}, only by {', '.join(known)}")
    rows = [row for score in dict.fromkeys(scores) for row in results.rows if row["score"] == score]
    return replace(column, results=replace(results, rows=rows))


def pooled(results: Iterable[Results]) -> Results:
    """Join several results into one; networks are numbered consecutively."""
    parts, together = list(results), Results()
    for part in parts:
        first = len(together.errors)
        together.errors += part.errors
        together.rows += [row | {"network": first + row["network"]} for row in part.rows]
    together.missing = _distinct(part.missing for part in parts)
    together.protocols = tuple(_distinct(part.protocols for part in parts))
    return together


def _distinct(names: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for part in names for name in part))


def comparison_rows(columns: Sequence[ComparisonColumn], measures: Sequence[str]) -> list[ComparisonRow]:
    """The table: accuracy and calibration; then, for each score, each of `measures` in the mean and on each OOD set.

    The mean is over the sets on which all networks were measured; its title says so where there are others.
    """
    results = [column.results for column in columns]
    shared = shared_sets(results)
    others = {*_distinct(r.ood_sets() for r in results)} - {*shared}
    mean = f"mean of {', '.join(shared)}" if others else "mean"
    sets = [
        *([(mean, shared, True)] if shared else []),
        *((n, [n], False) for n in _distinct(r.sets() for r in results)),
    ]
    rows = [
        ComparisonRow("", "", OF_NETWORKS[name], _defined(r.of_networks(name) for r in results))
        for name in ("accuracy", "aurc", "ece", "nll", "brier")
    ]
    rows += [
        ComparisonRow(score, title, OF_OOD[m], _defined(r.per_network(score, m, names) for r in results), is_mean)
        for score in _distinct(r.scores() for r in results)
        for title, names, is_mean in sets
        for m in measures
    ]
    return [row for row in rows if any(row.values)]


def _defined(values: Iterable[Sequence[float]]) -> tuple[list[float], ...]:
    return tuple([v for v in of_column if not math.isnan(v)] for of_column in values)


def markdown(columns: Sequence[ComparisonColumn], rows: Sequence[ComparisonRow]) -> str:
    """How the networks were trained, the table in markdown, and the verdicts; the best is in bold where it leads."""
    several = len({row.score for row in rows if row.score}) > 1
    lines = []
    for row in rows:
        title = f"{row.set} ({row.score})" if several and row.score else row.set
        lines.append([title, row.measure.heading, *(f"**{cell}**" if best else cell for cell, best in row.shown())])
    table = markdown_table(["OOD set", "measure", *(column.name for column in columns)], lines)
    return "\n".join([trained(columns), "", table, "", *verdicts(columns, rows), ""])


def verdicts(columns: Sequence[ComparisonColumn], rows: Sequence[ComparisonRow]) -> list[str]:
    """A sentence for each column but the first, which it is compared with: accuracy, ECE and mean AUROC."""
    measures = (OF_NETWORKS["accuracy"], OF_NETWORKS["ece"], OF_OOD["auroc"])
    wanted = [row for row in rows if row.is_mean and row.measure in measures]
    changes = {column.name: [_change(row, other) for row in wanted] for other, column in enumerate(columns) if other}
    texts = {name: ", ".join(filter(None, of_column)) for name, of_column in changes.items()}
    return [f"{name} against {columns[0].name}: {text}." for name, text in texts.items() if text]


def _change(row: ComparisonRow, other: int) -> str:
    """How a column differs from the first, with its standard error; `equal` within two of them."""
    found = row.gain(0, other)
    if found is None:
        return ""
    gain, error = found
    title = f"{row.measure.title} ({row.score})" if row.score else row.measure.title
    change = f"{-gain if row.measure.better == '↓' else gain:+.1f}"
    if math.isinf(error):
        return f"{title} {change} (one network)"
    if abs(gain) <= 2 * error:
        return f"{title} equal ({change} ± {error:.1f})"
    return f"{title} {change} ± {error:.1f} ({'better' if gain > 0 else 'worse'})"


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
    """The table in LaTeX, for the package booktabs."""
    safe = {"trained": trained(columns), "safe": lambda text: text.translate(_LATEX)}
    return render("compare.tex.j2", columns=columns, rows=rows, **safe)


def plot_comparison(path: Path, columns: Sequence[ComparisonColumn]) -> None:
    """Draw the distilled images and outliers of each column above the AUROC of each score on each OOD set."""
    results = [column.results for column in columns]
    shared, names = shared_sets(results), _distinct(r.ood_sets() for r in results)
    sets = [(name, [name]) for name in names]
    if len(names) > 1 and shared:
        sets.append(("mean" if shared == names else f"mean of {len(shared)}", shared))
    panels = {
        score: {title: _defined(r.per_network(score, "auroc", among) for r in results) for title, among in sets}
        for score in _distinct(r.scores() for r in results)
    }
    strips = []  # one image per class, and one outlier per slot, where the set is still there
    for column in columns:
        networks = args_or_nothing(column.folders[0]).get("networks")
        pictures = distilled_pictures(Path(networks)) if isinstance(networks, str) else []
        strips += [(f"{column.name}: {title}, one per class", images[:STRIP, 0]) for title, images in pictures]
    save_comparison(path, [column.name for column in columns], panels, strips)


def facts(columns: Sequence[ComparisonColumn]) -> dict[str, list[str]]:
    """For the head of the page, by title: what each column is of, as far as its folders say it."""
    lines: dict[str, list[str]] = {}
    for column in columns:
        stored = [args_or_nothing(folder) for folder in column.folders]
        values = {title: [about.get("flags", {}).get(flag) for about in stored] for flag, title in FACTS.items()}
        values["networks"] = [len(column.results.errors)]
        values["tested"] = [str(about.get("started", ""))[:10] for about in stored]
        for title, of_column in values.items():
            known = dict.fromkeys(str(value) for value in of_column if value not in (None, ""))
            lines.setdefault(title, []).append(", ".join(known))
    return {title: texts for title, texts in lines.items() if any(texts)}


def comparison_page(
    columns: Sequence[ComparisonColumn], rows: Sequence[ComparisonRow], picture: Path | None, notes: Sequence[str] = ()
) -> str:
    """A self-contained page: `notes`, tables of the networks and of each score, the `picture`, and each run's plots."""
    scores = dict.fromkeys(row.score for row in rows)
    return render(
        "page.html.j2",
        columns=columns,
        tables={score: [row for row in rows if row.score == score] for score in scores},
        picture=picture,
        notes=[trained(columns), *notes],
        verdicts=verdicts(columns, rows),
        facts=facts(columns),
        plots_of=lambda folder: sorted(folder.glob("*.png"), key=lambda p: (p.stem not in CAPTIONS, p.stem)),
        caption_of=lambda path: CAPTIONS.get(path.stem, path.stem.replace("_", " ", 1)),
        fitted_on=lambda folder: args_or_nothing(folder).get("fitted_on"),
        data_of=lambda path: base64.b64encode(path.read_bytes()).decode(),
    )
