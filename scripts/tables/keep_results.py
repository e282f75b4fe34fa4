"""Copy what a table script measured into a small folder that can be committed: `results.json` of every kind and seed.

    python scripts/tables/keep_results.py result-tables/cifar10/ipc10 assets/results/raw/cifar10-ipc10
    python scripts/study.py assets/results/raw/cifar10-ipc10 --base poe

Seeds that were measured on several machines come together so. Paths of the machine are left out.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.core.errors import UserError
from utils.core.files import read_json, save_text
from utils.core.run_script import run_script
from utils.report.results import load_results
from utils.settings.parser import Parser

STAGE3 = "3-ood"


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Copy results.json of every kind and seed of a table.")
    parser.add_argument("folder", help="folder of kinds, e.g. result-tables/cifar10/ipc10")
    parser.add_argument("out", help="folder to copy into; seeds that are there and not in FOLDER stay")
    return parser


def main(args: argparse.Namespace) -> None:
    """Copy them, and say how many there are."""
    folder = Path(args.folder)
    found = sorted(folder.glob(f"*/seed*/{STAGE3}/**/results.json"))
    texts = {place(path, folder): kept(path) for path in found}
    if not texts:
        raise UserError(f"{folder} holds no results in <kind>/seed<number>/{STAGE3}; give a folder of a table script")
    if len(texts) < len(found):
        raise UserError(f"{folder}: a seed has several files results.json; keep one for each seed")
    for relative, text in texts.items():
        path = Path(args.out) / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        save_text(path, text)
    print(f"{args.out}: {len(texts)} results")


def place(path: Path, folder: Path) -> Path:
    """`<kind>/seed<number>/3-ood/results.json` for a file below `folder`."""
    kind, seed = path.relative_to(folder).parts[:2]
    return Path(kind, seed, STAGE3, path.name)


def kept(path: Path) -> str:
    """A file `results.json` on one line, with the flags of its run whose values are no paths."""
    load_results(path.parent)  # refuses a damaged file
    content = read_json(path, "results", most=64 << 20)
    about = content.get("about")
    flags = about.get("flags") if isinstance(about, dict) else None
    flags = flags if isinstance(flags, dict) else {}
    about = {"flags": {name: value for name, value in flags.items() if "/" not in str(value)}}
    return json.dumps(content | {"about": about}) + "\n"


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "keep_results.py")
