"""Results of several stage-3 runs in one table: as markdown, CSV, LaTeX, a picture and a web page."""

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.core.errors import require
from utils.core.files import csv_text
from utils.report.plots import distilled_pictures, save_comparison
from utils.report.results import load_results, odd_sizes, protocol_line, shared_sets
from utils.report.study import NamedResults, StudyColumn
from utils.report.tables import OF_NETWORKS, OF_OOD, Measure, defined, markdown_table, render
from utils.runs.lineage import args_or_nothing, sources_of

STRIP = 20
RESULTS = "results.json"
CAPTIONS = {"reliability": "reliability of the confidence", "distilled": "the distilled set"}  # these come first
# what `args.json` of stage 3 says of its networks, by the flag
FACTS = {"dataset": "data set", "model": "network", "method": "method", "ipc": "images per class", "seed": "seeds"}

_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
)


@dataclass(frozen=True)
class ComparisonRow:
    """One line of the table: a measure of the networks, or of a score on one OOD set."""

    of: StudyColumn
    set: str
    columns: Sequence[NamedResults]
    is_mean: bool = True  # of the networks, or over OOD sets, and not on one of them

    @property
    def score(self) -> str:
        """Empty: it is a measure of the networks."""
        return self.of.score

    @property
    def measure(self) -> Measure:
        return self.of.shown

    @property
    def title(self) -> str:
        """The measure, and the score if it is of one."""
        return f"{self.measure.title} ({self.score})" if self.score else self.measure.title

    @property
    def values(self) -> list[list[float]]:
        """For each column one value per network; NaN where it has none."""
        return [column.values(self.of) for column in self.columns]

    def shown(self) -> list[tuple[str, bool]]:
        """For each column `mean ± std`, and whether it is better than all others by more than two standard errors."""
        places = range(len(self.columns))
        gains = [[g for b in places if b != a and (g := self.gain(b, a))] for a in places]
        leads = [bool(of_column) and all(gain > 2 * error for gain, error in of_column) for of_column in gains]
        return [(self.measure.cell(values), lead) for values, lead in zip(self.values, leads, strict=True)]

    def change(self, other: int) -> str:
        """How a column differs from the first, with its standard error; `equal` within two of them."""
        gain, error = self.gain(0, other)
        change = f"{-gain if self.measure.better == '↓' else gain:+.1f}"
        if math.isinf(error):
            return f"{self.title} {change} ({'better' if gain > 0 else 'worse'} by one network, perhaps by chance)"
        if abs(gain) <= 2 * error:
            return f"{self.title} equal ({change} ± {error:.1f})"
        return f"{self.title} {change} ± {error:.1f} ({'better' if gain > 0 else 'worse'})"

    def gain(self, base: int, other: int) -> tuple[float, float] | None:
        """By how much a column is better than another, and the standard error: infinite for a single network.

        The error of a column is over the means of its runs, as networks on one distilled set are alike; over networks
        only where one run alone has a value.
        """
        first, second = (np.array(defined(self.values[column])) * self.measure.factor for column in (base, other))
        if not len(first) or not len(second):
            return None
        sign, gain = -1 if self.measure.better == "↓" else 1, second.mean() - first.mean()
        means = [np.array([*self.columns[c].by_run(self.of).values()]) * self.measure.factor for c in (base, other)]
        first, second = (m if len(m) > 1 else v for m, v in zip(means, (first, second), strict=True))
        several = min(len(first), len(second)) > 1
        error = math.sqrt(sum(v.var(ddof=1) / len(v) for v in (first, second))) if several else math.inf
        return sign * gain, error


def find_runs(folders: Sequence[Path], names: Sequence[str] | None, search: Sequence[Path]) -> list[NamedResults]:
    """The stage-3 runs that `folders` lead to, one column each; folders of the same name are pooled into one column.

    Folders of stages 1 and 2 are followed to the stage-3 runs under `search` that were made from them. `names`: one
    per folder; None takes the paths of the stage-3 folders. A `UserError` tells of a folder that leads to no run, and
    of a column in which networks would count twice.
    """
    found: dict[str, dict[Path, None]] = {}
    for folder, name in zip(folders, names or [None] * len(folders), strict=True):
        for path in _stage3_folders(folder, search, one=name is not None):
            found.setdefault(name or str(path), {})[path] = None
    for name, paths in found.items():
        tested = [args_or_nothing(path).get("networks", path) for path in paths]
        twice = [str(path) for path, networks in zip(paths, tested, strict=True) if tested.count(networks) > 1]
        told = f"{', '.join(twice)} test the same networks, which would count twice in {name}"
        require(not twice, f"--names: {told}. Give one of them, or each a name of its own")
    return [NamedResults(name, {path: load_results(path) for path in paths}) for name, paths in found.items()]


def _stage3_folders(folder: Path, search: Sequence[Path], one: bool) -> list[Path]:
    """The stage-3 folders in or below `folder`; if there are none, those (or the `one`) made from what is there."""
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
    require(
        not one or len(made) == 1,
        f"--names: {folder} leads to {len(made)} results, which would be one column: {', '.join(map(str, made))}. Give "
        "those that are to be compared",
    )
    return made


def _distinct(names: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for part in names for name in part))


class Comparison:
    """The table: accuracy and calibration; then, for each score, each of `measures` in the mean and on each OOD set.

    The mean is over the sets on which all networks were measured; its title says so where there are others. `scores`:
    only these, in this order; a `UserError` tells that a column has none of one.
    """

    def __init__(self, columns: Sequence[NamedResults], measures: Sequence[str], scores: Sequence[str] | None = None):
        self.columns, runs = columns, [run for column in columns for run in column.runs.values()]
        for column in columns:
            known = _distinct(run.scores() for run in column.runs.values())
            for score in scores or ():
                told = f"--scores: {column.name} was not measured by {score}, only by {', '.join(known)}"
                require(score in known, told)
        self.shared, self.ood_sets = shared_sets(runs), _distinct(run.ood_sets() for run in runs)
        self.scores = list(dict.fromkeys(scores or _distinct(run.scores() for run in runs)))
        mean = "mean" if {*self.ood_sets} == {*self.shared} else f"mean of {', '.join(self.shared)}"
        sets = [(name, [name], False) for name in _distinct(run.sets() for run in runs)]
        sets = [(mean, self.shared, True), *sets] if self.shared else sets
        shown = [(StudyColumn(name), "", True) for name in ("accuracy", "aurc", "ece", "nll", "brier")]
        shown += [
            (StudyColumn(measure, score, names), title, is_mean)
            for score in self.scores
            for title, names, is_mean in sets
            for measure in measures
        ]
        rows = (ComparisonRow(of, title, columns, is_mean) for of, title, is_mean in shown)
        self.rows = [row for row in rows if any(map(defined, row.values))]

    @property
    def trained(self) -> str:
        """How the networks of the columns were trained, and what their tests do not have in common, in sentences."""
        lines = [protocol_line([(column.name, column.protocols) for column in self.columns])]
        counts = {column.name: len(column.runs) for column in self.columns}
        if len({*counts.values()}) > 1:
            lines.append(f"Runs: {', '.join(f'{count} of {name}' for name, count in counts.items())}.")
        named = [
            (f"{column.name} ({run})" if len(column.runs) > 1 else column.name, found)
            for column in self.columns
            for run, found in column.runs.items()
        ]
        lines += [f"Caution: {odd}."] if (odd := odd_sizes(named)) else []
        return " ".join(lines)

    def verdicts(self) -> list[str]:
        """Accuracy, ECE and mean AUROC: a sentence for the first column, and one for what each other one changes."""
        measures = (OF_NETWORKS["accuracy"], OF_NETWORKS["ece"], OF_OOD["auroc"])
        wanted = [row for row in self.rows if row.is_mean and row.measure in measures]
        own = [f"{row.title} {row.measure.cell(row.values[0])}" for row in wanted if defined(row.values[0])]
        lines = [f"{self.columns[0].name}: {', '.join(own)}."] if own and len(self.columns) > 1 else []
        for other, column in enumerate(self.columns[1:], 1):
            if changes := [row.change(other) for row in wanted if row.gain(0, other)]:
                lines.append(f"{column.name} against {self.columns[0].name}: {', '.join(changes)}.")
        return lines

    def markdown(self) -> str:
        """How the networks were trained, the table, and the verdicts; the best is in bold where it leads."""
        several = len({row.score for row in self.rows if row.score}) > 1
        lines = []
        for row in self.rows:
            title = f"{row.set} ({row.score})" if several and row.score else row.set
            lines.append([title, row.measure.heading, *(f"**{cell}**" if best else cell for cell, best in row.shown())])
        table = markdown_table(["OOD set", "measure", *(column.name for column in self.columns)], lines)
        return "\n".join([self.trained, "", table, "", *self.verdicts(), ""])

    def csv(self) -> str:
        """Mean, std and number of networks of each column, in the unit of the row."""
        titles = [f"{column.name} {what}" for column in self.columns for what in ("mean", "std", "networks")]
        lines = [["score", "set", "measure", "unit", *titles]]
        for row in self.rows:
            cells: list[float | str | int] = []
            for values in map(defined, row.values):
                scaled = np.array(values) * row.measure.factor
                cells += [float(scaled.mean()), float(scaled.std()), len(values)] if values else ["", "", 0]
            lines.append([row.score, row.set, row.measure.title, row.measure.unit, *cells])
        return csv_text(lines)

    def latex(self) -> str:
        """The table for the package booktabs."""
        return render("compare.tex.j2", table=self, safe=lambda text: text.translate(_LATEX))

    def picture(self, path: Path) -> Path | None:
        """Draw the distilled images and outliers of each column above the AUROC of each score on each OOD set; returns
        `path`, or None if there is no OOD set but validation sets."""
        sets = {name: [name] for name in self.ood_sets}
        if not sets:
            return None
        if len(sets) > 1 and self.shared:
            sets["mean" if self.shared == self.ood_sets else f"mean of {len(self.shared)}"] = self.shared
        panels = {
            score: {
                title: [defined(column.values(StudyColumn("auroc", score, names))) for column in self.columns]
                for title, names in sets.items()
            }
            for score in self.scores
        }
        strips = []  # one image per class, and one outlier per slot, where the set is still there
        for column in self.columns:
            networks = args_or_nothing(next(iter(column.runs))).get("networks")
            pictures = distilled_pictures(Path(networks)) if isinstance(networks, str) else []
            strips += [(f"{column.name}: {title}, one per class", images[:STRIP, 0]) for title, images in pictures]
        save_comparison(path, [column.name for column in self.columns], panels, strips)
        return path

    def facts(self) -> dict[str, list[str]]:
        """For the head of the page, by title: what each column is of, as far as its folders say it."""
        lines: dict[str, list[str]] = {}
        for column in self.columns:
            stored = [args_or_nothing(folder) for folder in column.runs]
            values = {title: [about.get("flags", {}).get(flag) for about in stored] for flag, title in FACTS.items()}
            trained = [args_or_nothing(Path(str(about.get("networks")))).get("flags") or {} for about in stored]
            if any(flags.get("distilled") or flags.get("train_on", "distilled") != "distilled" for flags in trained):
                values["method"] = []  # --method names folders there, and the augmentation
            if any(flags.get("train_on") == "whole" for flags in trained):
                values["images per class"] = ["all"]
            values["networks"] = [sum(len(run.errors) for run in column.runs.values())]
            values["tested"] = [str(about.get("started", ""))[:10] for about in stored]
            values["PyTorch"] = [about.get("versions", {}).get("torch") for about in stored]
            for title, of_column in values.items():
                known = dict.fromkeys(str(value) for value in of_column if value not in (None, ""))
                lines.setdefault(title, []).append(", ".join(known))
        return {title: texts for title, texts in lines.items() if any(texts)}

    def page(self, picture: Path | None, notes: Sequence[str] = (), title: str | None = None) -> str:
        """A self-contained page: `title` (left out: the columns), `notes`, tables of the networks and of each score,
        the `picture`, each run's plots."""
        return render(
            "page.html.j2",
            table=self,
            title=title or " · ".join(column.name for column in self.columns),
            tables={
                score: [row for row in self.rows if row.score == score]
                for score in _distinct([row.score] for row in self.rows)
            },
            picture=picture,
            notes=[self.trained, *notes],
            plots_of=lambda folder: sorted(folder.glob("*.png"), key=lambda p: (p.stem not in CAPTIONS, p.stem)),
            caption_of=lambda path: CAPTIONS.get(path.stem, path.stem.replace("_", " ", 1)),
            stored=args_or_nothing,
            data_of=lambda path: base64.b64encode(path.read_bytes()).decode(),
        )
