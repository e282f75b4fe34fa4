"""The numbers in the README and in `docs/` are those of the files that they name."""

import csv
import json
import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch

import main_poe
from scripts.tables import pipeline
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.datasets import load_dataset
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet
from utils.outliers import corruptions
from utils.outliers.sources import PseudoOutliers
from utils.report.results import load_study_csv, save_study_csv

ROOT = Path(__file__).resolve().parents[2]

import figures
import make_flags
import make_tables

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = sorted((ROOT / "docs" / "results").iterdir())
MARK = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE)
NUMBERS_MARK = re.compile(r"^<!-- numbers: (.+) -->$", re.MULTILINE)
NUMBER = r"(?<![\d.])-?\d+(?:\.\d+)?"
VALUE = rf"{NUMBER} ± {NUMBER}|{NUMBER}"
STUDIES = make_tables.read_studies()
OLD_WORDS = r"\banew\b|\bthose that\b|\bit pays\b|\bp [<=] ?0|\bp-value|\([^()]*\("


def cells(line: str) -> tuple[str, ...]:
    """The cells of a line of a markdown table, without emphasis."""
    return tuple(cell.strip(" *`") for cell in line.strip().strip("|").split("|"))


def content(name: str) -> str:
    """The text of a file of results, or of the section of it that `FILE#section` names."""
    path, _, section = name.partition("#")
    text = (ROOT / path).read_text()
    if not section:
        return text
    if path.endswith(".json"):
        return json.dumps(json.loads(text)[section])
    (found,) = re.findall(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def tables_of(name: str) -> list[list[tuple[str, ...]]]:
    """All tables of a file of results, or of a section."""
    blocks = re.findall(r"(?:^\|.*\n?)+", content(name), re.MULTILINE)
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
    for table in tables_of(name):
        places = [table[0].index(title) for title in header if title in table[0]]
        if len(places) == len(header):
            lines = {tuple(line[place] for place in places) for line in table}
            if all(row in lines for row in rows):
                return
    missing = [
        row for row in rows if not any(row[0] in line and row[-1] in line for t in tables_of(name) for line in t)
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
    return any(rounds(float(value), n, value) for n in map(float, re.findall(NUMBER + r"(?:[eE][+-]?\d+)?", text)))


def rounds(value: float, measured: float, written: str) -> bool:
    """Whether a value is a measured one, rounded, at its digits as written; a half may be rounded up or down."""
    return abs(value - measured) <= 0.5 * 10 ** -len(written.partition(".")[2]) + 1e-9


@pytest.mark.parametrize(("names", "shown"), shown_numbers())
def test_numbers_are_in_their_files(names, shown):
    assert shown
    texts = [content(name) for name in names]
    for value in shown:
        assert any(is_measured(value, text) for text in texts), f"{value} is in none of {names}"


def test_a_protocol_of_all_rows_is_told_once_and_that_of_others_too():
    """A sentence without names is of all rows of its table, so it says more than one with names."""
    one, all_, two = ("Networks trained by protocol " + text for text in ("dc: a; ncfm: b.", "ncfm.", "dc: a."))
    assert make_tables.told_once([one, all_, two, all_, "", one]) == [one, all_]
    assert make_tables.told_once([all_, one]) == [all_, one]


def test_the_oldest_python_is_one():
    """That which setup.sh looks for, which the README names, and for which ruff checks the code."""
    (major, minor) = re.search(r"sys.version_info < \((\d+), (\d+)\)", (ROOT / "scripts/setup.sh").read_text()).groups()
    assert f'target-version = "py{major}{minor}"' in (ROOT / "pyproject.toml").read_text()
    for file in ("README.md", "scripts/setup.sh", "scripts/quickstart.sh"):
        said = re.findall(r"Python (3\.\d+)(?: or newer|\+)", (ROOT / file).read_text())
        assert said == [f"{major}.{minor}"], file


def test_the_page_of_flags_is_what_the_scripts_say():
    assert make_flags.page() == (ROOT / "docs" / "flags.md").read_text()


def test_enough_tables_are_marked():
    """A document whose tables lost their marks would not be checked at all."""
    assert len(shown_tables()) >= 2
    assert len(shown_numbers()) >= 4
    assert all(name.startswith("docs/results/") for name, _ in (param.values for param in shown_tables()))
    for document in DOCUMENTS:
        text = document.read_text()
        marks = [*MARK.finditer(text), *NUMBERS_MARK.finditer(text)]
        marked = {text[m.end() :].lstrip("\n").split("\n\n", 1)[0] for m in marks}
        for table in re.findall(r"(?:^\|.*\n)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
            assert " ± " not in table or table.rstrip("\n") in marked, f"{document.name}: {table[:90]}"


def test_every_file_of_results_is_shown():
    """A CSV file, and a section of a file of old tables, by a study; other files are named in a document."""
    text = "".join(document.read_text() for document in DOCUMENTS)
    patterns = re.findall(r"[\w*.-]+\.(?:md|json|log)", text)
    tables = [table for about in STUDIES.values() for table in about["tables"]]
    places = {place for table in tables for place in make_tables.places_of(table)}
    sections = {table.get("section") for table in tables}
    sections |= {place for table in tables for place in re.findall(r"tables-\w+\.md#[\w-]+", table["text"])}
    for path in sorted((ROOT / "assets" / "results").iterdir()):
        if path.suffix == ".csv":
            assert any(f"{place}/".startswith(f"{path.name}/") for place in places), path.name
        elif path.name.startswith("tables-"):
            for section in re.findall(r"^## (\S+)$", path.read_text(), re.MULTILINE):
                assert f"{path.name}#{section}" in sections, section
        else:
            assert any(fnmatch(path.name, pattern) for pattern in patterns), path.name


def test_there_is_a_page_for_each_study_and_no_other():
    assert len(STUDIES) >= 25
    assert [page.name for page in PAGES] == sorted(f"{name}.md" for name in STUDIES)
    overview = make_tables.OVERVIEW.read_text()
    assert make_tables.overview(overview) == overview
    assert len(overview.splitlines()) <= 150
    assert max(len(line) for line in overview.splitlines() if line.startswith("- [")) <= 200


@pytest.mark.parametrize("name", STUDIES)
def test_a_page_is_what_its_study_makes(name):
    text = (ROOT / f"docs/results/{name}.md").read_text()
    assert make_tables.page_text(name, STUDIES[name]) == text
    lines = text.splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 200 for line in lines if not line.startswith("|"))


def prose(text: str) -> str:
    """A text without code, the places of its links, and headings' marks."""
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL))


def unmeasured(said: str, tables: str) -> list[str]:
    """The values in a sentence, `x ± y` or a number with a decimal point, that round no value of the tables.

    The sign of a difference may be left out, and a rounded number may be rounded again.
    """

    def found_in(value: str, measured: str) -> bool:
        same_sign = value[0] not in "+-" or value[0] == measured[0]
        return same_sign and rounds(abs(float(value)), abs(float(measured)), value)

    found = []
    number = r"[+-]?\d+(?:\.\d+)?"
    pairs = re.findall(rf"({number}) ± ({number})", tables)
    numbers = re.findall(number, tables)
    for mean, error in re.findall(rf"({number}) ± ({number})", said):
        if not any(found_in(mean, m) and found_in(error, e) for m, e in pairs):
            found.append(f"{mean} ± {error}")
    for value in re.findall(r"\d+\.\d+", re.sub(rf"{number} ± {number}", "", said)):
        if not any(found_in(value, n) for n in numbers):
            found.append(value)
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_the_numbers_that_a_study_states_are_in_its_tables(name):
    about = STUDIES[name]
    tables = "\n".join(make_tables.BLOCK.findall((ROOT / f"docs/results/{name}.md").read_text()))
    for said in (about["gist"], about["answer"], *about["notes"]):
        assert not unmeasured(prose(said), tables), said
    assert re.search(r"\d", about["answer"])


def test_a_number_that_was_not_measured_is_found():
    tables = "| a | -4.13 ± 0.29 | 48.26 |"
    assert not unmeasured("it falls by 4.1 ± 0.3 (-4.13 ± 0.29) to 48.3, in 2 runs", tables)
    assert unmeasured("by 4.2 ± 0.3 and +4.1 ± 0.3 to 48.4", tables) == ["4.2 ± 0.3", "+4.1 ± 0.3", "48.4"]


@pytest.mark.parametrize("page", [ROOT / "README.md", make_tables.OVERVIEW, *PAGES], ids=lambda page: page.name)
def test_words_that_readers_stumbled_over_do_not_come_back(page):
    assert not re.findall(OLD_WORDS, prose(page.read_text()))


def test_pages_are_made_by_one_command(monkeypatch, tmp_path, capsys):
    """Without names all of them; each page shows the command that makes it."""
    monkeypatch.setattr(make_tables, "page_text", lambda name, about: f"{name}\n")
    monkeypatch.setattr(make_tables, "PAGES", tmp_path / "docs" / "results")
    monkeypatch.setattr(make_tables, "OVERVIEW", tmp_path / "docs" / "results.md")
    monkeypatch.setattr(make_tables, "ROOT", tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results.md").write_text("before\n{}\n{}\nafter\n".format(*make_tables.LIST))
    make_tables.main(make_tables.get_args_parser().parse_args([]))
    assert {path.stem for path in (tmp_path / "docs" / "results").iterdir()} == {*STUDIES}
    listed = (tmp_path / "docs" / "results.md").read_text().splitlines()
    assert (listed[0], listed[-1], len(listed)) == ("before", "after", len(STUDIES) + 4)
    assert len(capsys.readouterr().out.splitlines()) == len(STUDIES) + 1
    for name in STUDIES:
        shown = re.findall(
            r"^python \S+make_tables\.py (.+)$", (ROOT / f"docs/results/{name}.md").read_text(), re.MULTILINE
        )
        assert shown == [name]
        assert make_tables.get_args_parser().parse_args([name]).studies == [name]


def test_results_of_studies_are_whole_and_hold_no_paths(tmp_path):
    """Each file is what `save_study_csv` writes of what it holds."""
    for path in (ROOT / "assets/results").glob("*.csv"):
        study = load_study_csv(path)
        names = {name for seeds in study.values() for r in seeds.values() for name in (*r.sets(), *r.scores())}
        assert not any("/" in name for name in names), path
        assert not any(kind.startswith("/") for kind in study), path
        save_study_csv(tmp_path / path.name, study)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


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
    assert args.corruptions == ("invert", name)
    for names, mixed, slot in ((args.corruptions, False, 1), ([name], True, 0), ([name], False, 0)):
        batch = PseudoOutliers(tiny_real, tuple(names), mixed).draw(slot, 5, generator(1))
        distance = (batch[:, None] - tiny_real.normalize(expected)).abs().amax((2, 3, 4))
        assert len(batch) == 5
        assert distance.amin(1).max() < 1e-6
        assert distance.argmin(1).unique().numel() == 5


def test_figures_draw_what_their_files_hold(tmp_path, monkeypatch, capsys):
    """The dots of AUROC lie at the means over networks and OOD sets, by the csv module; all figures are drawn."""
    rows = list(csv.DictReader((ROOT / "assets/results/cifar10-dm-ipc10-convnet-bf16.csv").open()))
    figure = figures.outliers()
    line = figure.axes[0].lines[0]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for kind, title in (("plain", "none"), ("poe-corrupt", "POE, on the fly")):
        found = [float(r["auroc"]) for r in rows if (r["kind"], r["score"]) == (kind, "msp")]
        assert line.get_xdata()[names.index(title)] == pytest.approx(100 * sum(found) / len(found))
    monkeypatch.setattr(figures, "OUT", tmp_path)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figures.main(figures.get_args_parser().parse_args([]))
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(f"{name}.png" for name in figures.FIGURES)
    assert capsys.readouterr().out.split() == [f"{name}.png" for name in figures.FIGURES]
    assert set(drawn) <= {path.name for path in (ROOT / "assets").iterdir()}


def test_pictures_of_the_pipeline(tmp_path, monkeypatch):
    """The first image of each class and each slot, in pixels; a set without outliers is refused."""
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(30) % 10
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    real = load_dataset("CIFAR10", tmp_path, download=False)
    first, last = (real.train_batch(torch.arange(start, start + 10)) for start in (0, 20))
    synthetic = SyntheticSet(last, torch.arange(10), first)
    for name, one in (("poe.pt", synthetic), ("plain.pt", synthetic.without_outliers())):
        DistilledFile.write(tmp_path / name, [one], {}, real, {})
    monkeypatch.setattr(pipeline, "PICTURES", tmp_path / "pictures.npz")
    pipeline.keep_pictures(str(tmp_path / "poe.pt"), str(tmp_path))
    found = np.load(tmp_path / "pictures.npz")
    for name, expected in (("real", images[:10]), ("distilled", images[20:]), ("outliers", images[:10])):
        np.testing.assert_array_equal(found[name], expected)
    assert found["corrupted"].shape == (10, 32, 32, 3)
    with pytest.raises(UserError, match=r"--pictures: .*plain.pt holds no outliers; give a set of main_poe.py"):
        pipeline.keep_pictures(str(tmp_path / "plain.pt"), str(tmp_path))
