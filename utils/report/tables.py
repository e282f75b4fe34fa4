"""Tables of one stage-3 report, in markdown."""

import math
from collections.abc import Sequence

import numpy as np

from utils.ood.calibration import SCALED_MEASURES
from utils.ood.measures import ERROR_MEASURES, MEASURES
from utils.report.results import Results


def mean_std(values: Sequence[float], scale: float = 100, digits: int = 2) -> str:
    """`mean ± std` of `scale` times the values (default: percent), without NaN; a dash if no value is left."""
    defined = [v for v in values if not math.isnan(v)]
    if not defined:
        return "-"
    return f"{scale * np.mean(defined):.{digits}f} ± {scale * np.std(defined):.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns are also aligned in plain text; a cell may hold `|` and line breaks."""
    table = [[" ".join(cell.replace("|", r"\|").splitlines()) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def report_text(results: Results, scores: Sequence[str]) -> str:
    """The report: accuracy and calibration, error detection, then a table per score; mean ± std over networks."""
    accuracy = mean_std([1 - e for e in results.of_networks("error")])
    ece = mean_std(results.of_networks("ece"))
    nll, brier = (mean_std(results.of_networks(m), scale=1, digits=4) for m in ("nll", "brier"))
    errors = [mean_std(results.of_networks(m)) for m in ERROR_MEASURES]
    parts = [
        f"{len(results.errors)} networks; mean ± std over networks, in percent (NLL in nats, Brier in [0, 2]).",
        "## Accuracy and calibration",
        markdown_table(("accuracy", "ECE", "NLL", "Brier"), [(accuracy, ece, nll, brier)]),
        *_scaled(results),
        "## Error detection (wrong predictions are positives)",
        markdown_table(("error rate", "AUROC", "AUPR", "FPR95", "AURC"), [errors]),
    ]
    header = ("OOD set", "FPR(IN)95", "FPR(OUT)95", "AUROC", "AUPR(IN)", "AUPR(OUT)")
    for score in scores:
        names = results.sets()
        first_validation = next((i for i, n in enumerate(names) if n.startswith("val:")), len(names))
        rows = [_row(results, name, name, score) for name in names]
        if first_validation:
            rows.insert(first_validation, _row(results, "mean", None, score))
        rows += [[name, *["missing"] * len(MEASURES)] for name in results.missing]
        parts += [f"## OOD detection, score {score}", markdown_table(header, rows)]
    return "\n\n".join(parts) + "\n"


def _scaled(results: Results) -> list[str]:
    """Calibration after temperature scaling, if it was among the scores."""
    if not any("temperature" in errors for errors in results.errors):
        return []
    scales = ((1, 2), (100, 2), (1, 4), (1, 4))
    values = [
        mean_std(results.of_networks(measure), scale=scale, digits=digits)
        for measure, (scale, digits) in zip(SCALED_MEASURES, scales, strict=True)
    ]
    return ["## After temperature scaling", markdown_table(("temperature", "ECE", "NLL", "Brier"), [values])]


def _row(results: Results, title: str, name: str | None, score: str) -> list[str]:
    return [title, *(mean_std(results.per_network(name, score, m)) for m in MEASURES)]
