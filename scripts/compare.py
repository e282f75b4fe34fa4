"""Put stage-3 results side by side.

python scripts/compare.py result-test-ood-synthetic/DSA/CIFAR10/ConvNet/10/A result-test-…/B --names plain POE
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.arguments import Parser, one_of
from utils.compare import comparison_table, find_run, plot_comparison
from utils.errors import UserError, run_script
from utils.ood_metrics import MEASURES
from utils.runs import save_text


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Put stage-3 results side by side.")
    parser.add_argument("folders", nargs="+", help="stage-3 run folders, or folders with one of them somewhere below")
    parser.add_argument("--names", nargs="+", default=None, help="one name per folder for the columns; left out: paths")
    parser.add_argument(
        "--measures",
        nargs="+",
        type=one_of("measure", MEASURES),
        default=["fpr_in", "auroc", "aupr_in"],
        help=f"which of {', '.join(MEASURES)}",
    )
    parser.add_argument(
        "--out", default=None, help="folder to write compare.md and compare.png into; left out: print only"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the table, and write it where asked."""
    if args.names and len(args.names) != len(args.folders):
        raise UserError(f"--names: {len(args.names)} names for {len(args.folders)} folders; give one each")
    names = args.names or [None] * len(args.folders)
    runs = [find_run(Path(folder), name) for folder, name in zip(args.folders, names, strict=True)]
    text = comparison_table(runs, args.measures)
    print(text)
    if args.out:
        out = Path(args.out)
        save_text(out / "compare.md", text)
        plot_comparison(out / "compare.png", runs)
        print(f"this table: {out / 'compare.md'}, as a picture: {out / 'compare.png'}")


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "compare.py")
