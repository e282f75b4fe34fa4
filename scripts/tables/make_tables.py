"""Make the tables of assets/results from the CSV files of the studies there, as scripts/tables/tables.ini says.

python scripts/tables/make_tables.py
python scripts/tables/make_tables.py digits-ipc1-oe-poe
"""

import argparse
import configparser
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import study

from utils.core.files import save_text
from utils.core.run_script import run_script
from utils.settings.parser import Parser, one_of

RESULTS = ROOT / "assets" / "results"


def read_tables() -> dict[str, list[str]]:
    """By the name of a table, the command line of study.py that makes it."""
    config = configparser.ConfigParser(allow_no_value=True, interpolation=None)
    config.read(Path(__file__).with_name("tables.ini"), encoding="utf-8")
    tables = {}
    for name in config.sections():
        flags = {flag: shlex.split(value or "") for flag, value in config[name].items()}
        studies = [str(RESULTS / place) for place in flags.pop("study")]
        tables[name] = studies + [word for flag, values in flags.items() for word in (f"--{flag}", *values)]
    return tables


def make_table(command: list[str]) -> str:
    """The table of one command line of study.py, in markdown."""
    return study.study_text(study.get_args_parser().parse_args(command))


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Make the tables of assets/results from the CSV files there.")
    parser.add_argument(
        "tables", nargs="*", type=one_of("table", read_tables()), help="only these tables; left out: all of tables.ini"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Make the tables, and say which file each is in."""
    tables = read_tables()
    for name in args.tables or tables:
        path = RESULTS / f"{name}.md"
        save_text(path, make_table(tables[name]))
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "make_tables.py")
