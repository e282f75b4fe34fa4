"""Tables in markdown, the report of stage 3 that is made of them, and the templates of whole pages."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.ood.calibration import CALIBRATION_MEASURES, SCALED_MEASURES
from utils.ood.measures import ERROR_MEASURES
from utils.report.measures import OF_NETWORKS, OF_OOD, Measure
from utils.report.results import Results


def mean_std(values: Sequence[float], scale: float = 100, digits: int = 2) -> str:
    """`mean ± std` of `scale` times the values (default: percent), without NaN.

    A single value has no deviation; where none is left there is a dash.
    """
    defined = [v for v in values if not math.isnan(v)]
    if not defined:
        return "-"
    if len(defined) == 1:
        return f"{scale * defined[0]:.{digits}f}"
    return f"{scale * np.mean(defined):.{digits}f} ± {scale * np.std(defined):.{digits}f}"


def counted(number: int, what: str) -> str:
    """A number of things, e.g. `1 network` or `2 networks`."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def value_cell(values: Sequence[float], measure: Measure) -> str:
    """`mean ± std` of the values of a measure, in its unit."""
    return mean_std(values, measure.factor, measure.digits)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns are also aligned in plain text; a cell may hold `|` and line breaks."""
    table = [[" ".join(cell.replace("|", r"\|").splitlines()) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def render(template: str, **values: object) -> str:
    """A file of this folder, a template of jinja2, with the values filled in; HTML escapes them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def summary(results: Results) -> str:
    """What stage 3 found, in a sentence: accuracy, calibration error, and the mean AUROC of the first score."""
    accuracy, ece = (value_cell(results.of_networks(name), OF_NETWORKS[name]) for name in ("accuracy", "ece"))
    found = f"found: accuracy {accuracy} %, calibration error (ECE) {ece} %"
    if not results.ood_sets():
        return found
    score = results.scores()[0]
    auroc = value_cell(results.per_network(None, score, "auroc"), OF_OOD["auroc"])
    return f"{found}, AUROC {auroc} % ({score}, mean over {', '.join(results.ood_sets())})"


def report_text(results: Results, scores: Sequence[str]) -> str:
    """The report: accuracy and calibration, error detection, then a table per score; mean ± std over networks."""
    parts = [
        f"{counted(len(results.errors), 'network')}; mean ± std over networks, in percent (NLL in nats, Brier in "
        "[0, 2]).",
        "## Accuracy and calibration",
        _of_networks(results, ("accuracy", *CALIBRATION_MEASURES)),
    ]
    if any("temperature" in errors for errors in results.errors):
        parts += ["## After temperature scaling", _of_networks(results, SCALED_MEASURES)]
    parts += ["## Error detection (wrong predictions are positives)", _of_networks(results, ERROR_MEASURES)]
    for score in scores:
        parts += [f"## OOD detection, score {score}", _of_score(results, score)]
    return "\n\n".join(parts) + "\n"


def _of_networks(results: Results, names: Sequence[str]) -> str:
    """A table of one row; likelihood and Brier score have a digit more than in comparisons."""
    measures = {name: OF_NETWORKS[name] for name in names}
    cells = [
        mean_std(results.of_networks(name), m.factor, 4 if m.digits == 3 else m.digits) for name, m in measures.items()
    ]
    return markdown_table([m.short_title for m in measures.values()], [cells])


def _of_score(results: Results, score: str) -> str:
    """A row for each OOD set, one for their mean, and those of validation and missing sets."""
    names = results.ood_sets()
    validation = [name for name in results.sets() if name not in names]
    wanted = [*((name, name) for name in names), *([("mean", None)] if names else [])]
    wanted += [(name, name) for name in validation]
    rows = [
        [title, *(value_cell(results.per_network(name, score, m), OF_OOD[m]) for m in OF_OOD)] for title, name in wanted
    ]
    rows += [[name, *["missing"] * len(OF_OOD)] for name in results.missing]
    return markdown_table(("OOD set", *(m.title for m in OF_OOD.values())), rows)
