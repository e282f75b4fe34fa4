"""The numbers in the README and in `docs/` are those of the files that they name."""

import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import main_poe
from utils.core.rng import generator
from utils.outliers import corruptions
from utils.outliers.sources import PseudoOutliers

ROOT = Path(__file__).resolve().parents[2]

import benchmark
import profile_works
import study

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE)
NUMBERS_MARK = re.compile(r"^<!-- numbers: (.+) -->$", re.MULTILINE)
NUMBER = r"(?<![\d.])-?\d+(?:\.\d+)?"
VALUE = rf"{NUMBER} ± {NUMBER}|{NUMBER}"


def cells(line: str) -> tuple[str, ...]:
    """The cells of a line of a markdown table, without emphasis."""
    return tuple(cell.strip(" *`") for cell in line.strip().strip("|").split("|"))


def tables_of(path: Path) -> list[list[tuple[str, ...]]]:
    """All tables of a file of results: markdown, or the JSON of the benchmark or of the profile."""
    if path.suffix == ".json":
        results = json.loads(path.read_text())["results"]
        is_benchmark = "ratio" in next(iter(results.values()))
        text = benchmark.table(results) if is_benchmark else profile_works.table(results)
    else:
        text = path.read_text()
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    return [[cells(line) for line in block.splitlines()] for block in blocks]


def shown_tables() -> list:
    """Each marked table of the documents: the document, the file of results, and the lines of the table."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for mark in MARK.finditer(text):
            lines = text[mark.end() :].lstrip("\n").split("\n\n", 1)[0].splitlines()
            where = f"{document.name}:{text[: mark.start()].count(chr(10)) + 1}"
            found.append(pytest.param(mark[1], [cells(line) for line in lines], id=f"{where} {mark[1]}"))
    return found


@pytest.mark.parametrize(("name", "shown"), shown_tables())
def test_a_table_equals_its_file(name, shown):
    """Each line of it, by its first cell, is a line of one table of the file; it may leave lines and columns out."""
    header, _, *rows = shown
    assert rows
    for table in tables_of(ROOT / name):
        places = [table[0].index(title) for title in header if title in table[0]]
        if len(places) == len(header):
            lines = {tuple(line[place] for place in places) for line in table}
            if all(row in lines for row in rows):
                return
    missing = [
        row for row in rows if not any(row[0] in line and row[-1] in line for t in tables_of(ROOT / name) for line in t)
    ]
    pytest.fail(f"{name} has no table with the columns {header} and all of these lines; first unknown: {missing[:1]}")


def shown_numbers() -> list:
    """Each table that is put together from several files: those files, and its values as they are written."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for mark in NUMBERS_MARK.finditer(text):
            lines = text[mark.end() :].lstrip("\n").split("\n\n", 1)[0].splitlines()[2:]
            values = [value for line in lines for cell in cells(line)[1:] for value in re.findall(VALUE, cell)]
            found.append(pytest.param(mark[1].split(), values, id=f"{document.name} {mark[1]}"))
    return found


def is_measured(value: str, text: str) -> bool:
    """Whether `x ± y` stands in a file, or a number, at its digits, is that of a file."""
    if "±" in value:
        return value in text
    digits = len(value.partition(".")[2])
    return any(f"{float(n):.{digits}f}" == value for n in re.findall(NUMBER + r"(?:[eE][+-]?\d+)?", text))


@pytest.mark.parametrize(("names", "shown"), shown_numbers())
def test_numbers_are_in_their_files(names, shown):
    assert shown
    texts = [(ROOT / name).read_text() for name in names]
    for value in shown:
        assert any(is_measured(value, text) for text in texts), f"{value} is in none of {names}"


def test_enough_tables_are_marked():
    """A document whose tables lost their marks would not be checked at all."""
    assert len(shown_tables()) >= 20
    assert len(shown_numbers()) >= 10


def test_every_file_of_results_is_named_in_a_document():
    text = "".join(document.read_text() for document in DOCUMENTS)
    patterns = re.findall(r"[\w*.-]+\.(?:md|json|log)", text)
    for path in sorted((ROOT / "assets" / "results").iterdir()):
        if path.is_dir():
            assert path.name == "raw"
            continue
        assert any(fnmatch(path.name, pattern) for pattern in patterns), path.name


def study_commands() -> list:
    """Each command of a document that makes a table from raw results: its words, the last the file that holds it."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        for line in re.findall(r"^python scripts/study\.py (assets/results/raw/.+)$", text, re.MULTILINE):
            words = shlex.split(line)
            found.append(pytest.param(words, id=f"{document.name} {words[-1]}"))
    return found


@pytest.mark.parametrize("words", study_commands())
def test_a_file_of_results_is_made_of_raw_ones(words, tmp_path, monkeypatch, capsys):
    """The command, run again, gives the same file."""
    *words, flag, out = words
    assert flag == "--out"
    monkeypatch.chdir(ROOT)
    study.main(study.get_args_parser().parse_args([*words, "--out", str(tmp_path / "again.md")]))
    assert (tmp_path / "again.md").read_text() == (ROOT / out).read_text()


def test_raw_results_are_used_and_hold_no_paths():
    used = {word for parameter in study_commands() for word in parameter.values[0]}
    for folder in sorted((ROOT / "assets/results/raw").iterdir()):
        assert any(f"{word}/".startswith(f"assets/results/raw/{folder.name}/") for word in used), folder.name
        for path in folder.rglob("results.json"):
            assert "/" not in path.read_text(), path


def test_a_wrong_number_is_found(tmp_path):
    file = tmp_path / "measured.md"
    file.write_text("| row | a ↑ | b |\n|---|---|---|\n| one | 1.00 | 2.00 |\n| two | 3.00 | 4.00 |\n")
    header, rule = ("row", "b"), ("---", "---")
    test_a_table_equals_its_file(str(file), [header, rule, ("two", "4.00")])
    for wrong in (("two", "4.01"), ("one", "4.00"), ("three", "4.00")):
        with pytest.raises(pytest.fail.Exception, match="first unknown"):
            test_a_table_equals_its_file(str(file), [header, rule, wrong])


def test_values_of_a_file():
    text = "a 1.00 ± 0.10, b 2.346, c 5e-2"
    assert all(is_measured(value, text) for value in ("1.00 ± 0.10", "2.35", "2.3", "0.05"))
    assert not any(is_measured(value, text) for value in ("1.00 ± 0.11", "2.34", "0.06"))


def test_a_corruption_is_added_as_the_readme_says(monkeypatch, tiny_real):
    """Its entry, in the table of corruptions, gives pseudo-outliers, mixed ones, too, and a value of --corruptions."""
    ((name, function),) = re.findall(r"^  `\"([\w-]+)\": (lambda .+),`", (ROOT / "README.md").read_text(), re.MULTILINE)
    monkeypatch.setitem(corruptions.CORRUPTIONS, name, eval(function))
    images = tiny_real.images_train / 255
    expected = torch.from_numpy(images.numpy()[:, :, ::-1].copy())
    assert torch.equal(corruptions.corrupt(images, name), expected)
    args = main_poe.get_args_parser().parse_args(["--dataset", "Digits", "--corruptions", "invert", name])
    assert args.corruptions == ["invert", name]
    for names, mixed, slot in ((args.corruptions, False, 1), ([name], True, 0), ([name], False, 0)):
        batch = PseudoOutliers(tiny_real, tuple(names), mixed).draw(slot, 5, generator(1))
        distance = (batch[:, None] - tiny_real.normalize(expected)).abs().amax((2, 3, 4))
        assert len(batch) == 5
        assert distance.amin(1).max() < 1e-6
        assert distance.argmin(1).unique().numel() == 5
