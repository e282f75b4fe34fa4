"""A comparison as one self-contained web page: style and pictures are embedded, and there are no scripts."""

import base64
from collections.abc import Sequence
from pathlib import Path

from utils.report.compare import ComparisonColumn, ComparisonRow
from utils.report.tables import render
from utils.runs.lineage import args_or_nothing

CAPTIONS = {"reliability": "reliability of the confidence", "distilled": "the distilled set"}  # these come first


def comparison_page(
    columns: Sequence[ComparisonColumn], rows: Sequence[ComparisonRow], picture: Path | None, notes: Sequence[str] = ()
) -> str:
    """The page: a table of the networks, the picture of the comparison, a table for each score, and each run's plots.

    Args:
        picture: a PNG of the comparison, if there is one; notes: lines that stand above the tables.
    """
    scores = dict.fromkeys(row.score for row in rows)
    return render(
        "page.html.j2",
        columns=columns,
        tables={score: [row for row in rows if row.score == score] for score in scores},
        picture=picture,
        notes=notes,
        plots_of=lambda folder: sorted(folder.glob("*.png"), key=lambda p: (p.stem not in CAPTIONS, p.stem)),
        caption_of=lambda path: CAPTIONS.get(path.stem, path.stem.replace("_", " ", 1)),
        fitted_on=lambda folder: args_or_nothing(folder).get("fitted_on"),
        data_of=lambda path: base64.b64encode(path.read_bytes()).decode(),
    )
