"""The results of a study, several seeds of several kinds of sets: mean rows, and differences paired by seed.

They lie in a folder of a table script, or in a CSV file of scripts/tables/keep_results.py: a path like
`digits.csv/ipc1/DC` names the kinds in that file that begin with `ipc1/DC/`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.core.errors import UserError, require
from utils.report.results import Results, load_results, load_study_csv
from utils.report.tables import OF_NETWORKS, OF_OOD, Measure, counted, defined, markdown_table


@dataclass(frozen=True)
class StudyColumn:
    """A measure of the networks, or of the detection by a score."""

    measure: str
    score: str = ""  # empty: `measure` is one of the networks
    sets: Sequence[str] | None = None  # the OOD sets of the mean; None: all
    group: str = ""  # a name for these sets

    @property
    def shown(self) -> Measure:
        return (OF_OOD if self.score else OF_NETWORKS)[self.measure]

    @property
    def title(self) -> str:
        """As the tables show it."""
        if not self.score:
            return self.shown.heading
        alone = self.sets[0] if self.sets and len(self.sets) == 1 else ""
        return " ".join(filter(None, (self.shown.short_title, self.score, self.group or alone, self.shown.better)))

    def of(self, results: Results) -> list[float]:
        """One value per network; NaN where it was not measured."""
        if not self.score:
            return results.of_networks(self.measure)
        return results.per_network(self.score, self.measure, self.sets) or [math.nan] * len(results.errors)


@dataclass(frozen=True)
class NamedResults:
    """Results under one name: those of a column of a comparison, or of each seed of a kind of sets."""

    name: str
    runs: dict[Path | int, Results]  # by folder, or by seed

    @property
    def protocols(self) -> list[str]:
        """How the networks were trained."""
        return list(dict.fromkeys(p for results in self.runs.values() for p in results.protocols))

    def values(self, column: StudyColumn) -> list[float]:
        """One value per network of all runs; NaN where it was not measured."""
        return [v for results in self.runs.values() for v in column.of(results)]

    def cell(self, column: StudyColumn) -> str:
        """`mean ± std` over the networks of all runs, or a dash where nothing was measured.

        Where some networks, or all of a run, lack the measure, it says how many have it.
        """
        return column.shown.cell(self.values(column))

    def by_run(self, column: StudyColumn) -> dict[Path | int, float]:
        """The mean over the networks of each run; networks and runs without a value are left out."""
        values = {run: defined(column.of(results)) for run, results in self.runs.items()}
        return {run: float(np.mean(of_run)) for run, of_run in values.items() if of_run}


def csv_part(place: Path) -> tuple[Path, str] | None:
    """The CSV file and the group of kinds (or the kind) in it that `place` names; None if it names no CSV file."""
    file = next((path for path in (place, *place.parents) if path.suffix == ".csv" and not path.is_dir()), None)
    return (file, place.relative_to(file).as_posix().removeprefix(".")) if file else None


def places_of_kinds(study: Path, names: Sequence[str] | None) -> dict[str, Path]:
    """Where the kinds of a study are, by name: those of `names` that it has, or (None) all.

    Kinds that begin with `whole` are also looked for in the folder above. A `UserError` tells of a study without kinds.
    """
    here, part = kinds_in(study), csv_part(study)
    if not here and part:
        groups = dict.fromkeys(kind.rpartition("/")[0] for kind in load_study_csv(part[0]))
        raise UserError(f"{study} names no kinds of {part[0]}; its kinds are in {', '.join(filter(None, groups))}")
    above = {name: place for name, place in kinds_in(study.parent).items() if name.startswith("whole")}
    places = above | here
    return {name: places[name] for name in names or sorted(places) if name in places}


def kinds_in(study: Path) -> dict[str, Path]:
    """The places of the kinds in a folder, or in (a group of) a CSV file, by name."""
    if part := csv_part(study):
        start = f"{part[1]}/".lstrip("/")
        names = (kind.removeprefix(start) for kind in load_study_csv(part[0]) if kind.startswith(start))
        return {name: study.resolve() / name for name in names if "/" not in name}
    example = "result-tables/digits/ipc1"
    require(study.is_dir(), f"{study} is no folder; give folders of a table script, e.g. {example}, or a CSV file")
    return {path.name: path.resolve() for path in study.iterdir() if list(path.glob("seed*/3-ood"))}


def read_kind(place: Path, name: str) -> NamedResults:
    """The results of a kind: a folder with a folder `seed<number>` for each seed, or one of a CSV file.

    A `UserError` tells that there are none, a seed has several, or one is damaged.
    """
    if part := csv_part(place):
        return NamedResults(name, load_study_csv(part[0])[part[1]])
    seeds: dict[int, Results] = {}
    for path in place.glob("seed*"):
        files = list(path.rglob("results.json")) if re.fullmatch(r"seed-?\d+", path.name) else []
        require(len(files) < 2, f"{path} holds {len(files)} files results.json; keep one for each seed")
        require(not files or int(path.name[4:]) not in seeds, f"{path}: another folder is of this seed; keep one")
        seeds |= {int(path.name[4:]): load_results(file.parent) for file in files}
    require(seeds, f"{place}: no results of stage 3 in seed<number>/; give folders that a table script wrote")
    return NamedResults(name, dict(sorted(seeds.items())))


def mean_rows(kinds: Sequence[NamedResults], columns: Sequence[StudyColumn], first: str = "images, outliers") -> str:
    """A markdown table: a row for each kind, a column for each measure; a row of fewer seeds than others says so."""
    most = max((len(kind.runs) for kind in kinds), default=0)
    rows = [[f"{kind.name}{_fewer(len(kind.runs), most)}", *map(kind.cell, columns)] for kind in kinds]
    return markdown_table((first, *(column.title for column in columns)), rows)


def _fewer(seeds: int, most: int) -> str:
    """What stands behind a name for which there are fewer seeds than the most."""
    return f" ({counted(seeds, 'seed')})" if seeds < most else ""


def score_rows(kinds: Sequence[NamedResults], scores: Sequence[str], measure: str) -> str:
    """A markdown table of one measure of `OF_OOD`, in the mean over the OOD sets: a row for each score."""
    rows = [[score, *(kind.cell(StudyColumn(measure, score)) for kind in kinds)] for score in scores]
    shown, most = OF_OOD[measure], max(len(kind.runs) for kind in kinds)
    titles = (f"{kind.name}{_fewer(len(kind.runs), most)}" for kind in kinds)
    return markdown_table((f"score, {shown.short_title} {shown.better}", *titles), rows)


def paired(base: NamedResults, other: NamedResults, column: StudyColumn) -> np.ndarray:
    """`base` minus `other` for each seed that both have, in the unit of the measure."""
    first, second = base.by_run(column), other.by_run(column)
    return np.array([column.shown.factor * (first[seed] - second[seed]) for seed in first if seed in second])


def differences(base: NamedResults, others: Sequence[NamedResults], columns: Sequence[StudyColumn]) -> str:
    """A markdown table: `base` minus each other kind, paired by seed, and the standard error over two seeds or more."""
    rows = []
    for other in others:
        title = f"{base.name} minus {other.name}{_fewer(len({*base.runs} & {*other.runs}), len(base.runs))}"
        rows.append([title, *(_difference(base, other, column) for column in columns)])
    return markdown_table(("difference", *(column.title.rstrip(" ↑↓") for column in columns)), rows)


def _difference(base: NamedResults, other: NamedResults, column: StudyColumn) -> str:
    gaps, shown = paired(base, other, column), column.shown
    if not len(gaps):
        return "-"
    error = f" ± {gaps.std(ddof=1) / np.sqrt(len(gaps)):.{shown.digits}f}" if len(gaps) > 1 else ""
    return f"{gaps.mean():+.{shown.digits}f}{error}"
