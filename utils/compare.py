"""Results of several stage-3 runs in one table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .errors import UserError
from .ood_report import Results, load_results, markdown_table, mean_std
from .readers import read_pt
from .visualize import save_comparison

STRIP = 20

TITLES = {
    "fpr_in": "FPR(IN)95 ↓",
    "fpr_out": "FPR(OUT)95 ↓",
    "auroc": "AUROC ↑",
    "aupr_in": "AUPR(IN) ↑",
    "aupr_out": "AUPR(OUT) ↑",
}


@dataclass(frozen=True)
class Run:
    """A stage-3 run: its name in tables, its folder, and what it measured."""

    name: str
    folder: Path
    results: Results


def find_run(folder: Path, name: str | None = None) -> Run:
    """The stage-3 run in `folder`, or the only one below it.

    Raises:
        UserError: when there is none, or more than one.
    """
    found = sorted(folder.rglob("results.json"))
    if len(found) != 1:
        what = (
            "no results.json" if not found else f"{len(found)} of them: {', '.join(str(p.parent) for p in found[:4])}"
        )
        raise UserError(f"{folder}: {what}; give the run folder of one run of test_ood_model_syn.py")
    return Run(name or str(folder), found[0].parent, load_results(found[0].parent))


def comparison_table(runs: Sequence[Run], measures: Sequence[str]) -> str:
    """A markdown table with a column per run: accuracy, then each measure of each OOD set, for each score.

    Percent, mean ± std over networks, best in bold.
    """
    results = [run.results for run in runs]
    rows = [["", "accuracy ↑", *_best([[1 - e["error"] for e in r.errors] for r in results], high=True)]]
    scores = list(dict.fromkeys(row["score"] for r in results for row in r.rows))
    sets = list(dict.fromkeys(name for r in results for name in r.sets()))
    for score in scores:
        for name in [*sets, None]:
            for measure in measures:
                values = [r.per_network(name, score, measure) for r in results]
                title = f"{name or 'mean'} ({score})" if len(scores) > 1 else name or "mean"
                rows.append([title, TITLES[measure], *_best(values, high=not measure.startswith("fpr"))])
    return markdown_table(["OOD set", "measure", *(run.name for run in runs)], rows) + "\n"


def _best(values: Sequence[Sequence[float]], high: bool) -> list[str]:
    """`mean ± std` of each run, the best mean in bold; a dash where a run has none."""
    means = [(np.mean(v) if high else -np.mean(v)) if v else -np.inf for v in values]
    cells = [mean_std(v) if v else "-" for v in values]
    best = int(np.argmax(means))
    return [f"**{cell}**" if i == best and len(values) > 1 else cell for i, cell in enumerate(cells)]


def plot_comparison(path: Path, runs: Sequence[Run]) -> None:
    """Draw the distilled images and outliers of each run above the AUROC of its first score on each OOD set."""
    results = [run.results for run in runs]
    score = results[0].rows[0]["score"]
    sets = [name for name in results[0].sets() if not name.startswith("val:")]
    values = [[r.per_network(name, score, "auroc") or [np.nan] for name in sets] for r in results]
    means, spread = (np.array([[100 * f(v) for v in row] for row in values]) for f in (np.mean, np.std))
    save_comparison(path, [run.name for run in runs], sets, means, spread, [s for run in runs for s in _strips(run)])


def _strips(run: Run) -> list[tuple[str, torch.Tensor]]:
    """One image per class, and one outlier per slot, of the distilled set behind a run; none if it is gone."""
    try:
        networks = Path(json.loads((run.folder / "args").read_text())["networks"])
        args = json.loads((networks / "args").read_text())
        content = read_pt(Path(args["distilled_set"]), "distilled set")
    except (OSError, KeyError, json.JSONDecodeError, UserError):
        return []
    mean, std = (torch.tensor(content["normalisation"][k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    strips = []
    for key, what in (("data", "distilled images"), ("data_oe", "distilled outliers")):
        if key in content:
            images, labels = content[key][args["flags"]["exp_idx"]]
            step = max(1, len(labels) // content["num_classes"])
            shown = (images[::step] * std + mean).clamp(0, 1)[:STRIP]
            strips.append((f"{run.name}: {what}, one per class", shown))
    return strips
