"""The results of a study, several seeds of several kinds of sets: mean rows, and differences paired by seed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from utils.core.errors import UserError
from utils.report.results import Results, load_results
from utils.report.tables import markdown_table, mean_std

OF_NETWORKS = {  # measure of the networks: title, factor, digits
    "accuracy": ("accuracy ↑", 100, 2),
    "ece": ("ECE ↓", 100, 2),
    "nll": ("NLL ↓", 1, 3),
    "auroc": ("error AUROC ↑", 100, 2),
    "aurc": ("AURC ↓", 100, 2),
    "temperature": ("temperature", 1, 2),
    "scaled_ece": ("ECE, scaled ↓", 100, 2),
    "scaled_nll": ("NLL, scaled ↓", 1, 3),
}
OF_SCORES = {"auroc": "AUROC {} ↑", "fpr_in": "FPR95 {} ↓", "aupr_in": "AUPR(IN) {} ↑"}


@dataclass(frozen=True)
class Kind:
    """A row of the study: its name and the results of each seed."""

    name: str
    seeds: dict[int, Results]

    def values(self, column: "Column") -> list[float]:
        """One value for each network of each seed."""
        return [value for results in self.seeds.values() for value in column.of(results)]

    def by_seed(self, column: "Column") -> dict[int, float]:
        """The mean over the networks of each seed; networks and seeds without a value are left out."""
        values = {seed: np.array(column.of(results)) for seed, results in self.seeds.items()}
        defined = {seed: v[~np.isnan(v)] for seed, v in values.items()}
        return {seed: float(v.mean()) for seed, v in defined.items() if len(v)}


@dataclass(frozen=True)
class Column:
    """A measure: of the networks (`score` empty), or of a score on one OOD set (or, `set` None, in the mean)."""

    measure: str
    score: str = ""
    set: str | None = None

    @property
    def title(self) -> str:
        """As the tables show it."""
        if not self.score:
            return OF_NETWORKS[self.measure][0]
        return OF_SCORES[self.measure].format(f"{self.score}{f' {self.set}' if self.set else ''}")

    @property
    def unit(self) -> tuple[int, int]:
        """Factor and digits."""
        return (100, 2) if self.score else OF_NETWORKS[self.measure][1:]

    def of(self, results: Results) -> list[float]:
        """One value per network."""
        if self.score:
            return results.per_network(self.set, self.score, self.measure)
        if self.measure == "accuracy":
            return [1 - error for error in results.of_networks("error")]
        return results.of_networks(self.measure)


def read_kind(folder: Path, name: str) -> Kind:
    """The results below `folder`, one for each `seed<number>` in it.

    Raises:
        UserError: when there are none, a seed has several, or one is damaged.
    """
    seeds: dict[int, Results] = {}
    for path in sorted(folder.glob("seed*")):
        number = re.fullmatch(r"seed(\d+)", path.name)
        found = sorted(path.rglob("results.json"))
        if number is None or not found:
            continue
        if len(found) > 1:
            raise UserError(f"{path} holds {len(found)} files results.json; keep one for each seed")
        seeds[int(number[1])] = load_results(found[0].parent)
    if not seeds:
        raise UserError(f"{folder}: no results of stage 3 in seed<number>/; give folders that a table script wrote")
    return Kind(name, dict(sorted(seeds.items())))


def mean_rows(kinds: Sequence[Kind], columns: Sequence[Column]) -> str:
    """A markdown table: `mean ± std` over the networks of all seeds, a row for each kind."""
    rows = [[kind.name, *(mean_std(kind.values(column), *column.unit) for column in columns)] for kind in kinds]
    return markdown_table(("images, outliers", *(column.title for column in columns)), rows)


def score_rows(kinds: Sequence[Kind], scores: Sequence[str], measure: str) -> str:
    """A markdown table of one of `OF_SCORES`, mean over the OOD sets: a row for each score, a column for each kind.

    A cell is `mean ± std` over the networks of all seeds, or a dash where the kind was not measured by that score.
    """
    rows = []
    for score in scores:
        column = Column(measure, score)
        rows.append([score, *(mean_std(kind.values(column), *column.unit) for kind in kinds)])
    return markdown_table((f"score, {OF_SCORES[measure].replace(' {}', '')}", *(kind.name for kind in kinds)), rows)


def differences(base: Kind, others: Sequence[Kind], columns: Sequence[Column]) -> str:
    """A markdown table: `base` minus each other kind, paired by seed.

    A cell holds the mean difference, its standard error, and the p of a two-sided paired t test over the seeds that
    both have. With a single seed there is neither.
    """
    rows = []
    for other in others:
        cells = []
        for column in columns:
            factor, digits = column.unit
            first, second = base.by_seed(column), other.by_seed(column)
            both = [seed for seed in first if seed in second]
            cells.append(_difference(np.array([factor * (first[s] - second[s]) for s in both]), digits))
        rows.append([f"{base.name} minus {other.name}", *cells])
    return markdown_table(("difference", *(column.title.rstrip(" ↑↓") for column in columns)), rows)


def _difference(values: np.ndarray, digits: int) -> str:
    if not len(values):
        return "-"
    mean = f"{values.mean():+.{digits}f}"
    if len(values) == 1:
        return mean
    error = values.std(ddof=1) / np.sqrt(len(values))
    if not error:
        return f"{mean} ± {error:.{digits}f}"
    p = stats.ttest_1samp(values, 0).pvalue
    return f"{mean} ± {error:.{digits}f} ({'p < 0.001' if p < 0.001 else f'p = {p:.3f}'})"
