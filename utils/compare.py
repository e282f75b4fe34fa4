"""Results of several stage-3 runs in one table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import UserError
from .ood_report import Results, load_results, markdown_table, mean_std

TITLES = {
    "fpr_in": "FPR(IN)95 ↓",
    "fpr_out": "FPR(OUT)95 ↓",
    "auroc": "AUROC ↑",
    "aupr_in": "AUPR(IN) ↑",
    "aupr_out": "AUPR(OUT) ↑",
}


def find_results(folder: Path) -> Results:
    """The results of a stage-3 run folder, or of the only one below `folder`.

    Raises:
        UserError: when there is none, or more than one.
    """
    found = sorted(folder.rglob("results.json"))
    if len(found) != 1:
        what = (
            "no results.json" if not found else f"{len(found)} of them: {', '.join(str(p.parent) for p in found[:4])}"
        )
        raise UserError(f"{folder}: {what}; give the run folder of one run of test_ood_model_syn.py")
    return load_results(found[0].parent)


def comparison_table(names: Sequence[str], results: Sequence[Results], measures: Sequence[str]) -> str:
    """A markdown table with a column per run: accuracy, then each measure of each OOD set, for each score.

    Percent, mean ± std over networks, best in bold.
    """
    rows = [["", "accuracy ↑", *_best([[1 - e["error"] for e in r.errors] for r in results], high=True)]]
    scores = list(dict.fromkeys(row["score"] for r in results for row in r.rows))
    sets = list(dict.fromkeys(name for r in results for name in r.sets()))
    for score in scores:
        for name in [*sets, None]:
            for measure in measures:
                values = [r.per_network(name, score, measure) for r in results]
                title = f"{name or 'mean'} ({score})" if len(scores) > 1 else name or "mean"
                rows.append([title, TITLES[measure], *_best(values, high=not measure.startswith("fpr"))])
    return markdown_table(["OOD set", "measure", *names], rows) + "\n"


def _best(values: Sequence[Sequence[float]], high: bool) -> list[str]:
    """`mean ± std` of each run, the best mean in bold; a dash where a run has none."""
    means = [(np.mean(v) if high else -np.mean(v)) if v else -np.inf for v in values]
    cells = [mean_std(v) if v else "-" for v in values]
    best = int(np.argmax(means))
    return [f"**{cell}**" if i == best and len(values) > 1 else cell for i, cell in enumerate(cells)]
