"""Copy what a table script measured into the CSV file of a study, which can be committed.

    python scripts/tables/keep_results.py result-tables/cifar10/ipc10 cifar10-ipc10.csv
    python scripts/tables/keep_results.py result-tables/cifar10-DM/ipc10 cifar10-methods.csv/ipc10/DM
    python scripts/study.py cifar10-ipc10.csv --base poe

Seeds and kinds that were measured on several machines come together so.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.core.errors import UserError
from utils.core.run_script import run_script
from utils.report.results import StudyResults, load_results, load_study_csv, save_study_csv
from utils.report.study import csv_part
from utils.settings.parser import Parser

STAGE3 = "3-ood"


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Copy the results of every kind and seed of a table into a CSV file.")
    parser.add_argument("folder", help="folder of kinds, e.g. result-tables/cifar10/ipc10")
    parser.add_argument(
        "out",
        help="CSV file to copy into, or a name in it that its kinds begin with, e.g. study.csv/ipc10/DM; kinds and "
        "seeds that are there and not in FOLDER stay",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Copy them, and say how many there are."""
    part = csv_part(Path(args.out))
    if part is None:
        raise UserError(f"out: {args.out} is no CSV file; give a name that ends in .csv")
    file, group = part
    study = load_study_csv(file) if file.exists() else {}
    results = results_below(Path(args.folder))
    for kind, seeds in results.items():
        name = f"{group}/{kind}" if group else kind
        study[name] = study.get(name, {}) | seeds
    file.parent.mkdir(parents=True, exist_ok=True)
    save_study_csv(file, study)
    print(f"{args.out}: {sum(map(len, results.values()))} results")


def results_below(folder: Path) -> StudyResults:
    """The results in `<kind>/seed<number>/3-ood`.

    Raises:
        UserError: when there are none, or several of one seed.
    """
    study: StudyResults = {}
    for path in sorted(folder.glob(f"*/seed[0-9]*/{STAGE3}/**/results.json")):
        kind, seed = path.relative_to(folder).parts[:2]
        seeds, number = study.setdefault(kind, {}), int(seed.removeprefix("seed"))
        if number in seeds:
            raise UserError(f"{folder}: a seed has several files results.json; keep one for each seed")
        seeds[number] = load_results(path.parent)
    if not study:
        raise UserError(f"{folder} holds no results in <kind>/seed<number>/{STAGE3}; give a folder of a table script")
    return study


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "keep_results.py")
