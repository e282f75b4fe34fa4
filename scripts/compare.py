"""Put stage-3 results side by side.

python scripts/compare.py result-test-ood-synthetic/DSA/CIFAR10/ConvNet/10/A result-test-…/B --names plain POE
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.core.errors import UserError
from utils.core.files import save_text
from utils.core.run_script import run_script
from utils.ood.measures import MEASURES
from utils.report.compare import Comparison, find_runs
from utils.settings.parser import Parser, one_of


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Put stage-3 results side by side.")
    parser.add_argument(
        "folders",
        nargs="+",
        help="stage-3 run folders, or folders above them; or run folders of stage 1 or 2, which are followed to the "
        "results made from them",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        default=None,
        help="one name per folder for the columns; folders of the same name are pooled into one column, e.g. the "
        "seeds of a study. Left out: paths",
    )
    parser.add_argument(
        "--measures",
        nargs="+",
        type=one_of("measure", MEASURES),
        default=["fpr_in", "auroc", "aupr_in"],
        help=f"which of {', '.join(MEASURES)}",
    )
    parser.add_argument("--scores", nargs="+", default=None, help="only these OOD scores; left out: all")
    parser.add_argument(
        "--results",
        nargs="+",
        default=None,
        help="folders to search for the results made from folders of stage 1 and 2; left out: every result* here",
    )
    parser.add_argument(
        "--out", default=None, help="folder to write compare.md, .csv, .tex and .png into; left out: print only"
    )
    parser.add_argument("--notes", nargs="+", default=[], help="lines to write below the table and on the page")
    parser.add_argument("--title", default=None, help="of the page; left out: the names of the columns")
    parser.add_argument(
        "--html", action="store_true", help="also write compare.html there, one page with all tables and plots"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the table, and write the files if asked."""
    if args.names and len(args.names) != len(args.folders):
        raise UserError(f"--names: {len(args.names)} names for {len(args.folders)} folders; give one each")
    if args.title is not None and not args.html:
        raise UserError("--title: only the page has one; give --html, too, or leave it out")
    if args.html and not args.out:
        raise UserError("--html: give --out, too: the folder that the page is written into")
    search = [Path(root) for root in args.results] if args.results else sorted(Path().glob("result*"))
    columns = find_runs([Path(folder) for folder in args.folders], args.names, search)
    table = Comparison(columns, args.measures, args.scores)
    text = "\n".join([table.markdown(), *(f"{note}\n" for note in args.notes)])
    written = write(Path(args.out), table, text, args.notes if args.html else None, args.title) if args.out else []
    print(text)
    if written:
        print(f"written into {args.out}: {', '.join(written)}")


def write(
    out: Path, table: Comparison, text: str, notes: Sequence[str] | None = None, title: str | None = None
) -> list[str]:
    """Write the table in all formats into `out`, and with `notes` the page; returns the names of the files.

    `text`: the table in markdown, with what stands below it. `title`: of the page.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make {out}: {error}") from None
    files = {"compare.md": text, "compare.csv": table.csv(), "compare.tex": table.latex()}
    picture = table.picture(out / "compare.png")
    if notes is not None:
        files["compare.html"] = table.page(picture, notes, title)
    for name, text in files.items():
        save_text(out / name, text)
    return [*files, *([picture.name] if picture else [])]


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "compare.py")
