"""Copy what a table script measured into the CSV file of a study, which can be committed.

    python scripts/tables/keep_results.py result-tables/cifar10/ipc10 cifar10-ipc10.csv
    python scripts/tables/keep_results.py result-tables/cifar10-DM/ipc10 cifar10-methods.csv/ipc10/DM
    python scripts/study.py cifar10-ipc10.csv --base poe

Seeds and kinds that were measured on several machines come together so. scripts/tables/studies.yaml then says which
tables scripts/tables/make_tables.py makes of the file, on a page of docs/results.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.core.errors import UserError, require
from utils.core.run_script import run_script
from utils.report.results import load_study_csv, odd_sizes, save_study_csv
from utils.report.study import csv_part, kinds_in, read_kind
from utils.settings.parser import Parser


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
    folder = Path(args.folder)
    places = kinds_in(folder) if folder.is_dir() else {}
    if not places:
        raise UserError(f"{folder} holds no results in <kind>/seed<number>/3-ood; give a folder of a table script")
    kinds = [read_kind(place, kind) for kind, place in places.items()]
    seeds = {f"{group}/{kind.name}".lstrip("/"): kind.runs for kind in kinds}
    study = load_study_csv(file) if file.exists() else {}
    study = study | {kind: study.get(kind, {}) | seeds[kind] for kind in seeds}
    odd = odd_sizes((f"{kind}, seed {seed}", found) for kind in seeds for seed, found in study[kind].items())
    require(not odd, f"{odd}: means over other images do not compare; measure all on the same files")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_study_csv(file, study)
    print(f"{args.out}: {sum(map(len, seeds.values()))} results")
    known = {kind.rpartition("/")[2] for kind in study}
    if above := [kind for kind in kinds_in(folder.parent) if kind.startswith("whole") and kind not in known]:
        print(f"not copied: {', '.join(above)} in {folder.parent}; copy that folder, too, once for all values of ipc")


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "keep_results.py")
