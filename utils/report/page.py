"""A comparison as one self-contained web page: style and pictures are embedded, and there are no scripts."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from utils.report.compare import Row, Run
from utils.runs.lineage import args_or_nothing

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --best: #2f7d4f; }
@media (prefers-color-scheme: dark) { :root { --best: #6fcf97; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom-width: 2px; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.first td { border-top: 2px solid var(--line); } td.best { font-weight: 700; color: var(--best); }
tr:hover td { background: var(--soft); }
img { max-width: 100%; height: auto; background: white; border: 1px solid var(--line); border-radius: 4px; }
figure { margin: 0; } figcaption { font-size: .85rem; opacity: .75; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; align-items: start; }
.across { grid-column: 1 / -1; }
.main { max-width: 760px; margin-top: 1.5rem; }
.note { opacity: .75; font-size: .9rem; } code { font-size: .85em; overflow-wrap: anywhere; }
"""
NOTE = (
    "Mean ± standard deviation over networks. Percent, but NLL in nats and Brier from 0 to 2. The best mean of a row "
    "is bold. IN measures take in-distribution as positive, OUT measures OOD; ↑ higher is better, ↓ lower."
)


def comparison_page(runs: Sequence[Run], rows: Sequence[Row], picture: Path | None, notes: Sequence[str] = ()) -> str:
    """The page: a table of the networks, the picture of the comparison, a table for each score, and each run's plots.

    Args:
        picture: a PNG of the comparison, if there is one; notes: lines that stand above the tables.
    """
    parts = [f"<h1>{escape(' · '.join(run.name for run in runs))}</h1>", f'<p class="note">{escape(NOTE)}</p>']
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    for score in dict.fromkeys(row.score for row in rows):
        title = f"OOD detection, score {score}" if score else "Accuracy, error detection and calibration"
        parts += [f"<h2>{escape(title)}</h2>", _table(runs, [row for row in rows if row.score == score])]
        if picture is not None and not score:
            parts.append(f'<div class="main">{_figure(picture, "distilled images, and AUROC on each OOD set")}</div>')
    for run in runs:
        parts.append(f"<h2>{escape(run.name)}</h2>")
        parts += [_run(folder) for folder in run.folders]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>TrustDD: comparison</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    first_column = "OOD set" if rows[0].score else ""
    head = "".join(f"<th>{escape(text)}</th>" for text in (first_column, "measure", *(run.name for run in runs)))
    lines = []
    before = None
    for row in rows:
        cells = zip(row.cells(), row.best(), strict=True)
        values = "".join(f'<td class="best">{c}</td>' if best else f"<td>{c}</td>" for c, best in cells)
        first = ' class="first"' if row.set != before else ""
        shown = escape(row.set) if row.set != before else ""
        lines.append(f"<tr{first}><td>{shown}</td><td>{escape(row.measure)}</td>{values}</tr>")
        before = row.set
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _run(folder: Path) -> str:
    """The plots of one stage-3 folder."""
    titles = {"reliability": "reliability of the confidence", "distilled": "the distilled set"}
    order = sorted(folder.glob("*.png"), key=lambda path: (path.stem not in titles, path.stem))
    figures = [_figure(path, titles.get(path.stem, path.stem.replace("_", " ", 1))) for path in order]
    fitted = args_or_nothing(folder).get("fitted_on")
    note = f" (detectors fitted on the {escape(str(fitted))})" if fitted else ""
    return f'<p><code>{escape(str(folder))}</code>{note}</p>\n<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption, quote=True)
    across = ' class="across"' if path.stem.startswith("scores_") else ""  # these are wide: a panel for each OOD set
    return (
        f'<figure{across}><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
    )
