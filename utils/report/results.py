"""What stage 3 measured, and the files that hold it: of one run as JSON and CSV, of a study as one CSV."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from utils.core.errors import UserError
from utils.core.files import csv_text, read_json, save_text
from utils.ood.evaluate import NetworkScores
from utils.ood.measures import CALIBRATION_MEASURES, ERROR_MEASURES, MEASURES, SCALED_MEASURES

NETWORK_MEASURES = (*ERROR_MEASURES, *CALIBRATION_MEASURES, *SCALED_MEASURES)
# columns of the CSV of a study; measures of error detection that share their name with one of OOD detection get another
STUDY_COLUMNS = {m: f"error_{m}" if m in ("auroc", "aupr", "fpr") else m for m in NETWORK_MEASURES}


@dataclass
class Results:
    """What stage 3 measured."""

    errors: list[dict[str, float]] = field(default_factory=list)  # of each network: those of `NETWORK_MEASURES`
    rows: list[dict] = field(default_factory=list)  # `network`, `set`, `score`, `MEASURES`: NaN of scores not finite
    missing: list[str] = field(default_factory=list)  # OOD sets that were skipped
    sizes: dict[str, int] = field(default_factory=dict)  # images of each OOD set; older results do not say it
    protocols: tuple[str, ...] = ("dc",)  # how the networks were trained; older results have one, and do not say it

    def sets(self) -> list[str]:
        return list(dict.fromkeys(row["set"] for row in self.rows))

    def ood_sets(self) -> list[str]:
        """Those of `sets` that are no validation sets."""
        return [name for name in self.sets() if not name.startswith("val:")]

    def scores(self) -> list[str]:
        return list(dict.fromkeys(row["score"] for row in self.rows))

    @property
    def are_scaled(self) -> bool:
        """Whether there are `SCALED_MEASURES`."""
        return any("temperature" in errors for errors in self.errors)

    def per_network(self, score: str, measure: str, sets: Sequence[str] | None = None) -> list[float]:
        """One value per network, the mean over `sets`; left out: all OOD sets."""
        sets = self.ood_sets() if sets is None else sets
        values: dict[int, list[float]] = {}
        for row in self.rows:
            if row["set"] in sets and row["score"] == score:
                values.setdefault(row["network"], []).append(row[measure])
        return [float(np.mean(v)) for v in values.values()]

    def of_networks(self, measure: str) -> list[float]:
        """The accuracy, or one of `NETWORK_MEASURES`, of each network; NaN if it was not measured."""
        if measure == "accuracy":
            return [1 - error for error in self.of_networks("error")]
        return [e.get(measure, math.nan) for e in self.errors]


def shared_sets(results: Sequence[Results]) -> list[str]:
    """The OOD sets on which all networks of all `results` were measured, in order: those whose means compare."""

    def networks(r: Results, among: Sequence[str]) -> set[int]:
        return {row["network"] for row in r.rows if row["set"] in among}

    names = dict.fromkeys(name for r in results for name in r.ood_sets())
    return [name for name in names if all(networks(r, [name]) == networks(r, r.sets()) for r in results)]


def odd_sizes(named: Iterable[tuple[str, Results]]) -> str:
    """What differs, if one of the OOD sets had another number of images for some of the results; else it is empty."""
    seen: dict[str, tuple[str, int]] = {}
    for name, results in named:
        for ood, count in results.sizes.items():
            first, before = seen.setdefault(ood, (name, count))
            if count != before:
                return f"{ood} has {before} images for {first}, and {count} for {name}"
    return ""


def protocol_line(named: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A line for the head of a table; `named`: each row, and the protocols by which its networks were trained."""
    names: dict[str, list[str]] = {}
    for name, protocols in named:
        for protocol in protocols:
            names.setdefault(protocol, []).append(f'"{name}"' if ", " in name else name)
    whose = [protocol if len(names) == 1 else f"{protocol}: {', '.join(who)}" for protocol, who in names.items()]
    return f"Networks trained by protocol {'; '.join(whose)}."


def results_of(networks: Sequence[NetworkScores]) -> Results:
    """The results of stage 3, from the scores of one network or more."""
    rows = [
        {"network": index, "set": name, "score": score, **measures}
        for name in networks[0].measures
        for index, network in enumerate(networks)
        for score, measures in network.measures[name].items()
    ]
    return Results([n.errors for n in networks], rows)


def results_json(results: Results, about: dict) -> str:
    """The results, and plain values about them, as JSON; NaN becomes null."""
    content: dict = {"about": about}
    for key, rows in (("errors", results.errors), ("rows", results.rows)):
        content[key] = [{k: None if v != v else v for k, v in row.items()} for row in rows]
    return json.dumps(content | {"missing": results.missing}, indent=1) + "\n"


def results_csv(results: Results) -> str:
    """CSV with a row per network, OOD set and score; each repeats the network's accuracy, AURC and calibration."""
    repeated = ("accuracy", "aurc", *CALIBRATION_MEASURES, *(SCALED_MEASURES if results.are_scaled else ()))
    of_networks = [results.of_networks(measure) for measure in repeated]
    columns = ("network", "set", "score", *MEASURES)
    lines = [[*(row[c] for c in columns), *(values[row["network"]] for values in of_networks)] for row in results.rows]
    return csv_text([[*columns, *repeated], *lines])


def load_results(folder: Path) -> Results:
    """Read `results.json` of a stage-3 folder; a `UserError` tells that it is missing, damaged, or something else."""
    path = folder / "results.json"
    content = read_json(path, "results")
    try:
        errors, rows = (
            [{k: math.nan if v is None else v for k, v in row.items()} for row in content[key]]
            for key in ("errors", "rows")
        )
        for row in rows:
            _ = row["set"], row["score"], [float(row[m]) for m in MEASURES], float(errors[row["network"]]["error"])
        about = content["about"]
        protocol = _protocol(about.get("training", {"protocol": "dc"}), about.get("checkpoints"))
        sizes = {name: ood["images"] for name, ood in about.get("ood_sets", {}).items() if "images" in ood}
        protocols = (", ".join([protocol, *ways_of_testing(about)]),)
        return Results(errors, rows, list(content["missing"]), sizes, protocols)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise UserError(f"{path} is damaged, or is not what test_ood_model_syn.py writes; run it again") from None


def ways_of_testing(about: Mapping) -> list[str]:
    """What the test of networks has out of the ordinary, in words; `about`: the facts in `results.json`."""
    flags, found = about.get("flags", {}), []
    if about.get("fitted_on"):
        found.append(f"detectors fitted on the {about['fitted_on']}")
    if flags.get("num_ood_ratio", 1) != 1:
        found.append(f"1/{flags['num_ood_ratio']} of the OOD images")
    if flags.get("T", 1.0) != 1:
        found.append(f"energy at a temperature of {flags['T']:g}")
    return found


def _protocol(training: Mapping[str, object], checkpoints: str | None) -> str:
    """How networks were trained, in words.

    `training`: the protocol, the epochs, and flags that overrule it. `checkpoints`: those that were tested, `best` or
    `epoch<e>`; the last ones are not named.
    """
    more = [f"{name} {value}" for name, value in training.items() if name not in ("protocol", "epochs")]
    epochs = [f"{training['epochs']} epochs"] if training.get("epochs") else []
    if checkpoints == "best":
        more.append("the best checkpoints on the test set")
    elif checkpoints and checkpoints != f"epoch{training.get('epochs')}":
        more.append(f"checkpoints of {checkpoints.replace('epoch', 'epoch ')}")
    return ", ".join([str(training["protocol"]), *epochs, *more])


StudyResults = dict[str, dict[int, Results]]  # by the name of the kind and the seed


def save_study_csv(path: Path, study: StudyResults) -> None:
    """Write the results of a study with all their digits.

    Each network has a row with its own measures, where `set` and `score` are empty, and one for each set and score.
    """
    text = io.StringIO()
    columns = ["kind", "seed", "network", "set", "score", *MEASURES, *STUDY_COLUMNS.values(), "protocol"]
    columns += ["images"] * any(results.sizes for seeds in study.values() for results in seeds.values())
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for kind, seeds in sorted(study.items()):
        for seed, results in sorted(seeds.items()):
            networks = ({STUDY_COLUMNS[m]: v for m, v in errors.items()} for errors in results.errors)
            trained = {"protocol": " | ".join(results.protocols)}
            rows = [{"network": i} | network | trained for i, network in enumerate(networks)]
            rows += [row | ({"images": n} if (n := results.sizes.get(row["set"])) else {}) for row in results.rows]
            defined = ({c: v for c, v in row.items() if v == v} for row in rows)  # without NaN
            writer.writerows({"kind": kind, "seed": seed} | row for row in defined)
    save_text(path, text.getvalue())


def load_study_csv(path: Path) -> StudyResults:
    """Read what `save_study_csv` wrote; a `UserError` tells that it is missing, damaged, or something else."""
    try:
        return _parsed(path.resolve(), path.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error):
        how = "write it again by scripts/tables/keep_results.py"
        raise UserError(f"{path} is not there, is damaged, or is not the CSV file of a study; {how}") from None


@lru_cache(maxsize=4)
def _parsed(path: Path, _changed: int) -> StudyResults:
    """The content of the file as it was at the time `_changed`: a table asks for it once for each kind."""
    study: StudyResults = {}
    for row in csv.DictReader(io.StringIO(path.read_bytes().decode()), strict=True):
        if None in row or None in row.values():
            raise ValueError("a line is longer or shorter than the header")
        results = study.setdefault(row["kind"], {}).setdefault(int(row["seed"]), Results())
        if row["set"]:
            where = {"network": int(row["network"]), "set": row["set"], "score": row["score"]}
            _ = results.errors[where["network"]]["error"]  # the network must be known
            results.rows.append(where | {m: float(row[m] or math.nan) for m in MEASURES})
            results.sizes |= {row["set"]: int(row["images"])} if row.get("images") else {}
        else:
            results.errors.append({m: float(row[c]) for m, c in STUDY_COLUMNS.items() if row[c]})
            results.protocols = tuple(row.get("protocol", "dc").split(" | "))
    return study
