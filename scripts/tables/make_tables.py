"""Make the pages of docs/results, one for each study of scripts/tables/studies.yaml, and their list in docs/results.md.

    python scripts/tables/make_tables.py
    python scripts/tables/make_tables.py digits-oe-poe

The tables of a page come from CSV files in assets/results, or from sections of the older tables-….md there.
"""

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import study as study_script

from utils.core.files import save_text
from utils.core.run_script import run_script
from utils.report.tables import markdown_table
from utils.settings.parser import Parser, one_of

RESULTS, PAGES, OVERVIEW = ROOT / "assets" / "results", ROOT / "docs" / "results", ROOT / "docs" / "results.md"
HEAD = (
    "<!-- Made by scripts/tables/make_tables.py from scripts/tables/studies.yaml. Change that file, not this one. -->"
)
LIST = ("<!-- list of studies -->", "<!-- end of the list -->")
PAIRED = "Differences, paired by seed, with their standard errors over seeds:"
BLOCK = re.compile(r"(?:^\|.*\n?)+", re.MULTILINE)
Rows = list[list[str]]


@cache
def read_studies() -> dict[str, dict]:
    """What studies.yaml says of each study, by its name."""
    return yaml.safe_load(Path(__file__).with_name("studies.yaml").read_text(encoding="utf-8"))


def words_of(value: object) -> list[str]:
    """The words of a value in studies.yaml: a string as the shell reads it, or a list."""
    return list(map(str, value)) if isinstance(value, list) else shlex.split("" if value is None else str(value))


def places_of(table: Mapping) -> list[str]:
    """The CSV files of a table, or the groups of kinds in them, below assets/results."""
    return words_of(table.get("study"))


def rows_of(block: str) -> Rows:
    """The header and the rows of a markdown table."""
    header, _, *rows = block.strip().splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in (header, *rows)]


def section_of(place: str) -> list[Rows]:
    """The tables of a section, `FILE#section`, of an older file of tables."""
    file, _, section = place.partition("#")
    text = (RESULTS / file).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return [rows_of(block) for block in BLOCK.findall(found)]


def chosen(rows: Rows, columns: str | None) -> Rows:
    """The first column and those of the titles in `columns`, which are separated by semicolons; None: all."""
    if not columns:
        return rows
    titles = [title.rstrip(" ↑↓") for title in rows[0]]
    places = [0, *(titles.index(title.strip()) for title in columns.split(";"))]
    return [[row[place] for place in places] for row in rows]


def short(difference: str) -> str:
    """`A, x minus A, y` as `A, x minus y`."""
    first, _, second = difference.partition(" minus ")
    return f"{first} minus {second.removeprefix(first.partition(', ')[0] + ', ')}" if second else difference


def made_parts(table: Mapping) -> tuple[str, list[Rows]]:
    """How the networks of a table were trained, and its parts, by study.py."""
    flags = {flag: value for flag, value in table.items() if flag not in ("text", "study", "parts")}
    words = [str(RESULTS / place) for place in places_of(table)]
    words += [word for flag, value in flags.items() for word in (f"--{flag}", *words_of(value))]
    trained, *blocks = study_script.study_text(study_script.get_args_parser().parse_args(words)).split("\n\n")
    return trained, [rows_of(block) for block in blocks]


def tables_of(table: Mapping) -> tuple[str, list[Rows]]:
    """How the networks of a table were trained, and the parts to show; differences of several studies become one."""
    trained, parts = made_parts(table) if places_of(table) else ("", section_of(table["section"]))
    wanted = table.get("parts", [0, 1] if "section" in table else range(len(parts)))
    shown: list[Rows] = []
    for number in wanted:
        if number < len(parts):
            rows = [[short(row[0]), *row[1:]] for row in chosen(parts[number], table.get("columns"))]
            if shown and shown[-1][0] == rows[0]:
                shown[-1] += rows[1:]
            else:
                shown.append(rows)
    return trained, shown


def told_once(trained: Iterable[str]) -> list[str]:
    """The sentences that say more than those before them: a protocol, or a row that was trained by it."""
    told: dict[str, list[str]] = {}  # whose networks, by protocol; empty: those of all rows of a table
    sentences = []
    for sentence in filter(None, trained):
        parts = sentence.removesuffix(".").split("protocol ")[1].split("; ")
        found = {p: re.findall(r'"[^"]*"|[^," ][^,]*|^$', who) for p, _, who in (x.partition(": ") for x in parts)}
        if any(not {*whose} <= {*told.get(protocol, ())} for protocol, whose in found.items()):
            sentences.append(sentence)
        told |= {protocol: told.get(protocol, []) + whose for protocol, whose in found.items()}
    return sentences


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines of 160 characters; words, links and commands stay whole."""
    pieces = re.findall(r"(?:`[^`]*`|\[[^]]*\]\([^)]*\)| ± |\S)+", text)
    glued = " ".join(piece.replace(" ", "\0") for piece in pieces)
    lines = textwrap.wrap(glued, 160, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def page_text(name: str, about: Mapping) -> str:
    """The page of a study."""
    parts = [HEAD, f"# {about['title']}", wrapped(f"**{about['question']}** {about['answer']}")]
    trained, files = [], []
    for table in about["tables"]:
        parts.append(wrapped(table["text"]))
        if not places_of(table) and "section" not in table:
            continue
        protocol, tables = tables_of(table)
        if any(trained) and ": " not in protocol:  # it is of all rows of this table
            which = re.split(r"[:;]", table["text"])[0]
            protocol = protocol.replace("Networks", f"Networks of *{which.replace('*', '')}*", 1)
        trained.append(protocol)
        files += [re.sub(r"\.csv.*", ".csv", place) for place in places_of(table)] or [table["section"]]
        for rows in tables:
            if rows[0][0] == "difference":
                parts.append(PAIRED)
            parts.append(markdown_table(rows[0], rows[1:]))
    if about.get("notes"):
        parts += ["## Notes", "\n".join(wrapped(f"- {note}", "  ") for note in about["notes"])]
    measured = dict(about["measured"])
    measured["what"] = " ".join([measured["what"], *told_once(trained)])
    links = [f"[{file.partition('#')[2] or file}](../../assets/results/{file})" for file in dict.fromkeys(files)]
    measured["files"] = f"{', '.join(links)}. Words, OOD sets and ±: [results](../results.md#how-it-was-measured)."
    parts += [
        "## How it was measured",
        "\n".join(wrapped(f"- **{key.capitalize()}:** {value}", "  ") for key, value in measured.items()),
        f"```\n{about['command'].strip()}\npython scripts/tables/make_tables.py {name}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def overview(text: str) -> str:
    """The text of docs/results.md with the list of all studies between its two marks."""
    lines = (f"- [{about['title']}](results/{name}.md): {about['gist']}" for name, about in read_studies().items())
    before, rest = text.split(LIST[0])
    return "\n".join([f"{before}{LIST[0]}", *lines, f"{LIST[1]}{rest.split(LIST[1])[1]}"])


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Make the pages of docs/results from the CSV files of assets/results.")
    parser.add_argument(
        "studies", nargs="*", type=one_of("study", read_studies()), help="only these pages; left out: all studies"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Make the pages, and the list of all; say which file each is in."""
    studies = read_studies()
    made = {PAGES / f"{name}.md": page_text(name, studies[name]) for name in args.studies or studies}
    made[OVERVIEW] = overview(OVERVIEW.read_text(encoding="utf-8"))
    for path, text in made.items():
        save_text(path, text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "make_tables.py")
