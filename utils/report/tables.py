"""The catalogue of measures, tables in markdown, the report of stage 3, and the templates of whole pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.ood.measures import CALIBRATION_MEASURES, ERROR_MEASURES, SCALED_MEASURES
from utils.report.results import Results


def defined(values: Sequence[float]) -> list[float]:
    """The values without NaN."""
    return [v for v in values if not math.isnan(v)]


def mean_std(values: Sequence[float], scale: float = 100, digits: int = 2) -> str:
    """`mean ± std` of `scale` times the values (default: percent) but NaN; the mean alone of one, a dash of none.

    Where some are NaN, it says how many are not.
    """
    known = defined(values)
    if not known:
        return "-"
    mean = f"{scale * np.mean(known):.{digits}f}"
    mean += "" if len(known) == 1 else f" ± {scale * np.std(known):.{digits}f}"
    return mean if len(known) == len(values) else f"{mean} ({len(known)} of {len(values)})"


@dataclass(frozen=True)
class Measure:
    """How the tables show one measure, and which way is better."""

    title: str
    better: str = ""  # ↑: higher is better; ↓: lower is better; empty: neither
    unit: str = "%"
    factor: float = 100  # from the stored value to the unit
    digits: int = 2  # after the point
    short: str = ""  # the title where the rest is clear from what stands around it; empty: `title`

    @property
    def heading(self) -> str:
        """The title, with the arrow that says which way is better."""
        return f"{self.title} {self.better}".rstrip()

    @property
    def short_title(self) -> str:
        return self.short or self.title

    def cell(self, values: Sequence[float]) -> str:
        """`mean ± std` of the values, in the unit."""
        return mean_std(values, self.factor, self.digits)


OF_NETWORKS = {  # on the test images: `accuracy`, and the keys of `Results.errors`
    "accuracy": Measure("accuracy", "↑"),
    "error": Measure("error rate", "↓"),
    "auroc": Measure("error AUROC", "↑", short="AUROC"),
    "aupr": Measure("error AUPR", "↑", short="AUPR"),
    "fpr": Measure("error FPR95", "↓", short="FPR95"),
    "aurc": Measure("AURC", "↓"),
    "ece": Measure("ECE", "↓"),
    "nll": Measure("NLL", "↓", "nats", 1, 3),
    "brier": Measure("Brier", "↓", "0 to 2", 1, 3),
    "temperature": Measure("temperature", "", "", 1),
    "scaled_ece": Measure("ECE, scaled", "↓", short="ECE"),
    "scaled_nll": Measure("NLL, scaled", "↓", "nats", 1, 3, short="NLL"),
    "scaled_brier": Measure("Brier, scaled", "↓", "0 to 2", 1, 3, short="Brier"),
}
OF_OOD = {  # of a score on an OOD set: the keys of `Results.rows`
    "fpr_in": Measure("FPR(IN)95", "↓", short="FPR95"),
    "fpr_out": Measure("FPR(OUT)95", "↓"),
    "auroc": Measure("AUROC", "↑"),
    "aupr_in": Measure("AUPR(IN)", "↑"),
    "aupr_out": Measure("AUPR(OUT)", "↑"),
}


def counted(number: int, what: str) -> str:
    """A number of things, e.g. `1 network` or `2 networks`."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns are also aligned in plain text; a cell may hold `|` and line breaks."""
    table = [[" ".join(cell.replace("|", r"\|").splitlines()) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def render(template: str, **values: object) -> str:
    """A file of this folder, a template of jinja2, with the values filled in; HTML escapes them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    blocks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    escape, loader = select_autoescape(["html.j2"]), FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=escape, undefined=StrictUndefined, **blocks)
    return environment.get_template(template).render(values)


def summary(results: Results) -> str:
    """What stage 3 found, in a sentence: accuracy, calibration error, and the mean AUROC of the first two scores."""
    accuracy, ece = (OF_NETWORKS[name].cell(results.of_networks(name)) for name in ("accuracy", "ece"))
    found = f"found: accuracy {accuracy} %, calibration error (ECE) {ece} %"
    if not results.ood_sets():
        return found
    cells = {score: OF_OOD["auroc"].cell(results.per_network(score, "auroc")) for score in results.scores()[:2]}
    shown = ", ".join(f"{cell} % ({score})" for score, cell in cells.items())
    return f"{found}, AUROC {shown}, mean over {', '.join(results.ood_sets())}"


def report_text(results: Results, scores: Sequence[str]) -> str:
    """The report: accuracy and calibration, error detection, then a table per score; mean ± std over networks."""
    networks = counted(len(results.errors), "network")
    parts = [
        f"{networks}; mean ± std over networks, in percent (NLL in nats, Brier in [0, 2]).",
        "## Accuracy and calibration",
        _of_networks(results, ("accuracy", *CALIBRATION_MEASURES)),
    ]
    if results.are_scaled:
        parts += ["## After temperature scaling", _of_networks(results, SCALED_MEASURES)]
    parts += ["## Error detection (wrong predictions are positives)", _of_networks(results, ERROR_MEASURES)]
    for score in scores:
        parts += [f"## OOD detection, score {score}", _of_score(results, score)]
    return "\n\n".join(parts) + "\n"


def _of_networks(results: Results, names: Sequence[str]) -> str:
    """A table of one row; likelihood and Brier score have a digit more than in comparisons."""
    measures = [OF_NETWORKS[name] for name in names]
    digits = [4 if m.digits == 3 else m.digits for m in measures]
    cells = [mean_std(results.of_networks(n), m.factor, d) for n, m, d in zip(names, measures, digits, strict=True)]
    return markdown_table([m.short_title for m in measures], [cells])


def _of_score(results: Results, score: str) -> str:
    """A row for each OOD set, one for their mean, and those of validation and missing sets."""
    names, validation = results.ood_sets(), [name for name in results.sets() if name not in results.ood_sets()]
    rows = [*((n, [n]) for n in names), *([("mean", names)] if names else []), *((n, [n]) for n in validation)]
    table = [[t, *(m.cell(results.per_network(score, key, sets)) for key, m in OF_OOD.items())] for t, sets in rows]
    table += [[name, *["missing"] * len(OF_OOD)] for name in results.missing]
    return markdown_table(("OOD set", *(m.title for m in OF_OOD.values())), table)
