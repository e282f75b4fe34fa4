"""What stage 3 measured, and the files that hold it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.core.errors import UserError
from utils.core.files import csv_text, read_json
from utils.ood.calibration import CALIBRATION_MEASURES, SCALED_MEASURES, Reliability, reliability
from utils.ood.evaluate import NetworkScores
from utils.ood.measures import ERROR_MEASURES, MEASURES

NETWORK_MEASURES = (*ERROR_MEASURES, *CALIBRATION_MEASURES, *SCALED_MEASURES)


@dataclass
class Results:
    """What stage 3 measured.

    `errors`: one dict of `NETWORK_MEASURES` per network (`SCALED_MEASURES` only with temperature scaling). `rows`: one
    dict per network, OOD set and score, with the keys `network`, `set`, `score` and `MEASURES`; NaN where a score was
    not finite. `missing`: OOD sets that were skipped.
    """

    errors: list[dict[str, float]] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def sets(self) -> list[str]:
        """Names of the measured sets, in order."""
        return list(dict.fromkeys(row["set"] for row in self.rows))

    def ood_sets(self) -> list[str]:
        """Those of `sets` that are no validation sets."""
        return [name for name in self.sets() if not name.startswith("val:")]

    def scores(self) -> list[str]:
        """Names of the scores, in order."""
        return list(dict.fromkeys(row["score"] for row in self.rows))

    def sets_of_all(self) -> list[str]:
        """Names of the sets on which every network was measured, in order, without validation sets."""
        of = {name: {row["network"] for row in self.rows if row["set"] == name} for name in self.sets()}
        everyone = set().union(*of.values())
        return [name for name in self.ood_sets() if of[name] == everyone]

    def per_network(
        self, name: str | None, score: str, measure: str, among: Sequence[str] | None = None
    ) -> list[float]:
        """One value per network: of one set, or (name None) the mean over the OOD sets `among`.

        `among` left out: all but validation sets.
        """
        values: dict[int, list[float]] = {}
        for row in self.rows:
            in_mean = row["set"] in among if among is not None else not row["set"].startswith("val:")
            wanted = row["set"] == name if name else in_mean
            if wanted and row["score"] == score:
                values.setdefault(row["network"], []).append(row[measure])
        return [float(np.mean(v)) for v in values.values()]

    def of_networks(self, measure: str) -> list[float]:
        """One of `NETWORK_MEASURES` for each network; NaN if the report lacks it."""
        return [e.get(measure, math.nan) for e in self.errors]


def shared_sets(results: Sequence[Results]) -> list[str]:
    """The OOD sets on which all networks of all `results` were measured, in order: those whose means compare."""
    measured = [r for r in results if r.rows]
    names = dict.fromkeys(name for r in measured for name in r.sets())
    return [name for name in names if all(name in r.sets_of_all() for r in measured)]


@dataclass
class PlotData:
    """What the plots need beside the results.

    `in_scores[score]`: one `[N]` per network; `out_scores[score][set]`: one `[M]` per network; `reliability`: over the
    predictions of all networks.
    """

    in_scores: dict[str, list[np.ndarray]]
    out_scores: dict[str, dict[str, list[np.ndarray]]]
    reliability: Reliability


def results_of(networks: Sequence[NetworkScores]) -> tuple[Results, PlotData]:
    """The results and plot data of stage 3, from the scores of one network or more."""
    sets, scores = list(networks[0].out_scores), list(networks[0].in_scores)
    rows = [
        {"network": index, "set": name, "score": score, **network.measures[name][score]}
        for name in sets
        for index, network in enumerate(networks)
        for score in scores
    ]
    bins = reliability(*(np.concatenate([getattr(n, what) for n in networks]) for what in ("confidence", "correct")))
    in_scores = {score: [n.in_scores[score] for n in networks] for score in scores}
    out_scores = {score: {name: [n.out_scores[name][score] for n in networks] for name in sets} for score in scores}
    return Results([n.errors for n in networks], rows), PlotData(in_scores, out_scores, bins)


def results_json(results: Results, about: dict) -> str:
    """The results, and plain values about them, as JSON; NaN becomes null."""
    content = {"about": about, "errors": results.errors, "rows": results.rows, "missing": results.missing}
    return json.dumps(_without_nan(content), indent=1) + "\n"


def results_csv(results: Results) -> str:
    """CSV with a row per network, OOD set and score; each repeats the network's accuracy, AURC and calibration.

    After temperature scaling the temperature and the calibration with it, too.
    """
    scaled = SCALED_MEASURES if any("temperature" in errors for errors in results.errors) else ()
    repeated = {"accuracy": "error", "aurc": "aurc"} | {m: m for m in (*CALIBRATION_MEASURES, *scaled)}
    columns = ["network", "set", "score", *MEASURES, *repeated]
    lines = [columns]
    for row in results.rows:
        of_network = results.errors[row["network"]]
        more = {column: of_network.get(m, math.nan) for column, m in repeated.items()}
        values = row | more | {"accuracy": 1 - of_network["error"]}
        lines.append([values[column] for column in columns])
    return csv_text(lines)


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def load_results(folder: Path) -> Results:
    """Read `results.json` of a stage-3 folder.

    Raises:
        UserError: when it is missing, damaged, or not what stage 3 writes.
    """
    path = folder / "results.json"
    content = read_json(path, "results", most=64 << 20)
    try:
        errors, rows = ([_with_nan(row) for row in content[key]] for key in ("errors", "rows"))
        for row in rows:
            _ = row["set"], row["score"], [float(row[m]) for m in MEASURES], float(errors[row["network"]]["error"])
        return Results(errors, rows, list(content["missing"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise UserError(f"{path} is damaged, or is not what test_ood_model_syn.py writes; run it again") from None


def _with_nan(row: dict) -> dict:
    return {k: math.nan if v is None else v for k, v in row.items()}
