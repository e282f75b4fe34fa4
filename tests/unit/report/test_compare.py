"""Stage 3 with fitted scores, and comparisons: what they show, what they follow, and the page."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid, save_image

from networks import get_network
from scripts.compare import write
from test_ood_model_syn import get_args_parser
from utils.core.errors import UserError
from utils.core.files import csv_text
from utils.core.rng import generator
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet
from utils.ood.measures import MEASURES, SCALED_MEASURES
from utils.report.card import measured_table
from utils.report.compare import Comparison, find_runs
from utils.report.plots import distilled_pictures, save_distilled, save_grid, save_score_histograms, shown
from utils.report.results import NETWORK_MEASURES, Results, load_results, results_csv, results_json, shared_sets
from utils.report.study import NamedResults, StudyColumn, mean_rows, score_rows
from utils.report.tables import report_text

RUN = "DSA/Digits/ConvNetD1/1/20260101-000000"


def results(auroc, error=0.1, nll=0.3, sets=("patches", "blob"), score="msp"):
    """`auroc`: [networks][sets]."""
    errors = [{"error": error, "auroc": 0.9, "aupr": 0.5, "fpr": 0.2, "aurc": 0.01, "ece": 0.05, "nll": nll}] * 2
    rows = []
    for network, values in enumerate(auroc):
        for name, value in zip(sets, values, strict=True):
            rows.append({"network": network, "set": name, "score": score, **dict.fromkeys(MEASURES, value)})
    return Results([e | {"brier": 0.2} for e in errors], rows)


def run(name, *args, **kwargs):
    return NamedResults(name, {Path(): results(*args, **kwargs)})


def cells(row):
    return [cell for cell, _ in row.shown()]


def best(row):
    return [is_best for _, is_best in row.shown()]


def test_the_table_shows_means_deviations_and_the_best():
    runs = [run("plain", [[0.5, 0.7], [0.7, 0.9]]), run("a|b_%", [[0.6, 0.8], [0.6, 0.8]], error=0.2, nll=0.2)]
    table = Comparison(runs, ["auroc", "fpr_in"])
    by_title = {(row.set, row.measure.heading): row for row in table.rows}
    assert cells(by_title["patches", "AUROC ↑"]) == ["60.00 ± 10.00", "60.00 ± 0.00"]
    assert best(by_title["patches", "AUROC ↑"]) == [False, False]  # equal
    assert best(by_title["", "accuracy ↑"]) == [True, False]
    assert best(by_title["", "NLL ↓"]) == [False, True]
    assert cells(by_title["", "NLL ↓"]) == ["0.300 ± 0.000", "0.200 ± 0.000"]
    # over networks of their mean over sets: 60 and 80, not over all four values
    assert cells(by_title["mean", "AUROC ↑"])[0] == "70.00 ± 10.00"
    text = table.markdown()
    assert re.search(r"\| 60.00 ± 10.00 +\| 60.00 ± 0.00 ", text)
    assert "**90.00 ± 0.00** | 80.00 ± 0.00" in text
    assert r"a\|b_%" in text
    tex = table.latex()
    assert r"a|b\_\%" in tex
    assert r"60.00 $\pm$ 10.00 & 60.00 $\pm$ 0.00 \\" in tex
    assert r"\textbf{90.00 $\pm$ 0.00} & 80.00 $\pm$ 0.00 \\" in tex
    assert all(line.count("&") == 4 for line in tex.splitlines() if line.endswith(r"\\"))
    lines = list(csv.DictReader(table.csv().splitlines()))
    (line,) = [x for x in lines if (x["set"], x["measure"]) == ("patches", "AUROC")]
    assert float(line["plain mean"]) == pytest.approx(60)
    assert float(line["plain std"]) == pytest.approx(10)
    assert line["plain networks"] == "2"


def test_a_lead_is_more_than_two_standard_errors():
    """By numpy; the sentence names the change, its standard error and what it means."""
    base, near, far = [0.60, 0.62, 0.64], [0.63, 0.64, 0.65], [0.70, 0.71, 0.73]
    columns = [
        run(name, [[v] for v in values], sets=("blob",)) for name, values in zip("abc", (base, near, far), strict=True)
    ]
    table = Comparison(columns, ["auroc", "fpr_in"])
    marked = {(row.set, row.measure.title): best(row) for row in table.rows if row.score}
    assert marked["blob", "AUROC"] == [False, False, True]
    assert marked["blob", "FPR(IN)95"] == [False, False, False]  # lower is better, and a does not lead b
    first, *others = table.verdicts()
    assert first == f"a: accuracy 90.00 ± 0.00, ECE 5.00 ± 0.00, AUROC (msp) 62.00 ± {100 * np.std(base):.2f}."
    for other, line in zip((near, far), others, strict=True):
        change = 100 * (np.mean(other) - np.mean(base))
        error = 100 * np.sqrt(np.var(base, ddof=1) / 3 + np.var(other, ddof=1) / 3)
        means = (
            f"{change:+.1f} ± {error:.1f} (better)" if change > 2 * error else f"equal ({change:+.1f} ± {error:.1f})"
        )
        assert line.endswith(f" against a: accuracy equal (+0.0 ± 0.0), ECE equal (+0.0 ± 0.0), AUROC (msp) {means}.")
    alone = [run("a", [[0.5]], sets=("blob",)), run("b", [[0.75]], sets=("blob",))]
    assert (
        Comparison(alone, ["auroc"])
        .verdicts()[1]
        .endswith("AUROC (msp) +25.0 (better by one network, perhaps by chance).")
    )


def test_a_title_needs_a_page_and_is_text_there(refused, tmp_path):
    told = "--title: only the page has one; give --html, too, or leave it out"
    assert told in refused("scripts.compare", tmp_path, "--title", "trust")
    table = Comparison([run("a", [[0.5]], sets=("blob",))], ["auroc"])
    assert table.verdicts() == []  # a single column stands in the table
    assert "<h1>a &lt; b &amp; c?</h1>" in table.page(None, title="a < b & c?")


def test_networks_on_one_set_are_no_replicates(tmp_path):
    """With several runs in both columns, the standard error is over the means of the runs."""
    values = {"a": [[0.60, 0.61], [0.70, 0.71], [0.80, 0.81]], "b": [[0.70, 0.71], [0.80, 0.81], [0.90, 0.91]]}
    for name, runs in values.items():
        for number, of_run in enumerate(runs):
            rows = [
                {"network": i, "set": "blob", "score": "msp", **dict.fromkeys(MEASURES, value)}
                for i, value in enumerate(of_run)
            ]
            content = {"about": {}, "missing": [], "errors": [{"error": 0.5}] * 2, "rows": rows}
            (folder := tmp_path / name / str(number)).mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(content))
    columns = find_runs([tmp_path / "a", tmp_path / "b"], ["a", "b"], [])
    (auroc,) = [row for row in Comparison(columns, ["auroc"]).rows if row.set == "blob"]
    means = [100 * np.mean(values[name], axis=1) for name in "ab"]
    error = np.sqrt(sum(np.var(of_column, ddof=1) / 3 for of_column in means))
    assert auroc.gain(0, 1) == pytest.approx((10.0, error))
    assert auroc.change(1) == f"AUROC (msp) equal (+10.0 ± {error:.1f})"
    # a run without a value is left out; where a single one is left, the error of its column is over its networks
    for missing, left in ((1, "runs"), (2, "networks")):
        known = {c.name: np.array(values[c.name])[missing if c.name == "a" else 0 :] for c in columns}
        for run in list(columns[0].runs.values())[:missing]:
            run.rows.clear()
        (auroc,) = [row for row in Comparison(columns, ["auroc"]).rows if row.set == "blob"]
        samples = [100 * known["a"].mean(axis=1) if left == "runs" else 100 * known["a"].flatten(), means[1]]
        error = np.sqrt(sum(np.var(of_column, ddof=1) / len(of_column) for of_column in samples))
        assert auroc.gain(0, 1) == pytest.approx((100 * (known["b"].mean() - known["a"].mean()), error))


def test_what_a_run_lacks_is_a_dash():
    nan = float("nan")
    other = run("other", [[0.9], [0.9]], sets=("blob",), score="knn")
    old = NamedResults("old", {Path(): Results([{"error": 0.1}], results([[nan, 0.6]]).rows)})
    runs = [run("one", [[nan, 0.8], [0.5, 0.8]]), other, old]
    table = Comparison(runs, ["auroc"])
    found = {(row.score, row.set): cells(row) for row in table.rows if row.measure.title == "AUROC"}
    assert found["msp", "patches"] == ["50.00 (1 of 2)", "-", "-"]
    assert found["knn", "blob"] == ["-", "90.00 ± 0.00", "-"]
    assert ("knn", "patches") not in found
    is_best = {(row.score, row.set): best(row) for row in table.rows}
    assert is_best["msp", "patches"] == [False] * 3
    assert is_best["msp", "blob"] == [False] * 3  # the last is of one network, which has no standard error
    assert [cells(row)[2] for row in table.rows if row.measure.title == "ECE"] == ["-"]
    assert "blob (knn)" in table.markdown()


def test_folders_of_one_name_are_pooled():
    runs = [results([[0.5, 0.7], [0.6, 0.8]]), results([[0.9, 0.9], [0.7, 0.7]])]
    table = Comparison([NamedResults("both", dict(zip(map(Path, "ab"), runs, strict=True)))], ["auroc"])
    (patches,) = [row for row in table.rows if row.set == "patches"]
    assert patches.values == [[0.5, 0.6, 0.9, 0.7]]
    assert cells(patches) == ["67.50 ± 14.79"]
    assert table.facts()["networks"] == ["4"]


def test_networks_on_the_whole_set_have_no_images_per_class(tmp_path):
    """Though stage 3 of a table has `--ipc 1` for them."""
    for name, flags in (("a", {"train_on": "whole"}), ("b", {})):
        (tmp_path / name / "networks").mkdir(parents=True)
        (tmp_path / name / "networks/args.json").write_text(json.dumps({"flags": flags}))
        about = {"flags": {"ipc": 1, "method": "DSA"}, "networks": str(tmp_path / name / "networks")}
        (tmp_path / name / "args.json").write_text(json.dumps(about))
    columns = [NamedResults(name, {tmp_path / name: results([[0.5, 0.7]])}) for name in "ab"]
    facts = Comparison(columns, ["auroc"]).facts()
    assert facts["images per class"] == ["all", "1"]
    assert facts["method"] == ["", "DSA"]


@pytest.fixture
def chain(tmp_path, digits):
    """Folders of stages 1 and 2, and a network, as if they had run."""
    stage1, stage2 = tmp_path / "result-poe" / RUN, tmp_path / "result-model-synthetic-oe" / RUN
    for folder in (stage1, stage2):
        folder.mkdir(parents=True)
    images = digits.train_batch(torch.stack([digits.class_indices[c][0] for c in range(10)]))
    DistilledFile.write(stage2 / "trained_on.pt", [SyntheticSet(images, torch.arange(10), images)], {}, digits, {})
    (stage2 / "args.json").write_text(json.dumps({"flags": {}, "images_from": str(stage1)}))
    for index in range(2):
        state = get_network("ConvNetD1", 1, 10, (8, 8), generator(index)).state_dict()
        torch.save(state, stage2 / f"syn_trained_Digits_ConvNetD1_exp{index}_best.pt")
    return stage1, stage2


def test_a_run_that_lacks_a_score_is_told():
    """Its networks are no part of the mean."""
    both = {
        Path("a"): results([[0.5], [0.7]], sets=("blob",)),
        Path("b"): results([[0.9]] * 2, sets=("blob",), score="knn"),
    }
    table = Comparison([NamedResults("one", both)], ["auroc"])
    found = {(row.score, row.set): cells(row) for row in table.rows if row.measure.title == "AUROC"}
    assert found["msp", "blob"] == ["60.00 ± 10.00 (2 of 4)"]
    assert found["knn", "blob"] == ["90.00 ± 0.00 (2 of 4)"]


def test_a_comparison_on_validation_sets_alone_has_no_picture(tmp_path):
    table = Comparison([NamedResults("one", {Path("a"): results([[0.5]], sets=("val:CIFAR10",))})], ["auroc"])
    files = write(tmp_path, table, table.markdown(), [])
    assert files == ["compare.md", "compare.csv", "compare.tex", "compare.html"]
    assert "val:CIFAR10" in (tmp_path / "compare.html").read_text()


def row(network, name):
    return {"network": network, "set": name, "score": "msp", **dict.fromkeys(MEASURES, 0.5)}


def test_a_line_in_a_name_does_not_break_a_table():
    """In the report of stage 3, a comparison, a study and a card; other tables are made by the same function."""
    found = Results([dict.fromkeys(NETWORK_MEASURES, 0.5)], [row(0, "a|b"), row(0, "c\nd")], ["e|f"])
    column = NamedResults("one|two", {Path(): found})
    kind = NamedResults("g|h", {1: found})
    texts = [
        report_text(found, ["msp"]),
        Comparison([column], ["auroc"]).markdown(),
        mean_rows([kind], [StudyColumn("auroc", "msp", ["a|b"])]) + "\n" + score_rows([kind], ["msp"], "auroc"),
        measured_table({"i|j": found}),
    ]
    names = [("a|b", "c d", "e|f"), ("one|two", "a|b"), ("g|h", "AUROC msp a|b ↑"), ("1 × i|j",)]
    for text, inside in zip(texts, names, strict=True):
        tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
        split = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in tables]
        assert all(len(cells) == len(table[0]) for table in split for cells in table)
        cells = {cell.strip().replace(r"\|", "|") for table in split for cells in table for cell in cells}
        assert cells >= {*inside}


def test_a_spreadsheet_computes_no_cell(tmp_path):
    """Text that begins like a formula is quoted; numbers, also those that are text, stay as they are."""
    values = ["=1+1", "+x", "-x", "@x", "\tx", "a=b", "-0.5", "+1e3", "", -0.5, 3]
    (line,) = csv.reader(csv_text([values]).splitlines())
    assert line == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", "a=b", "-0.5", "+1e3", "", "-0.5", "3"]
    found = Results([dict.fromkeys(NETWORK_MEASURES, 1.5)], [row(0, '=HYPERLINK("x")')])
    (first,) = csv.DictReader(results_csv(found).splitlines())
    assert (first["set"], first["accuracy"], first["auroc"]) == ('\'=HYPERLINK("x")', "-0.5", "0.5")
    column = NamedResults("-cmd", {Path(): found})
    (first, *_) = csv.reader(Comparison([column], ["auroc"]).csv().splitlines())
    assert first[4:] == ["'-cmd mean", "'-cmd std", "'-cmd networks"]
    (tmp_path / "results.json").write_text(results_json(found, {}))
    assert load_results(tmp_path).sets() == ['=HYPERLINK("x")']  # what the program itself reads is not quoted


def test_the_csv_repeats_what_was_measured_of_each_network():
    """The temperature, too, where there is one."""
    errors = [dict.fromkeys(NETWORK_MEASURES, i + 0.25) for i in range(2)]
    rows = [{"network": i, "set": "blob", "score": "msp", **dict.fromkeys(MEASURES, 0.5)} for i in (1, 0)]
    first, second = csv.DictReader(results_csv(Results(errors, rows)).splitlines())
    assert (first["temperature"], second["temperature"]) == ("1.25", "0.25")
    assert (first["accuracy"], first["scaled_nll"], first["ece"]) == ("-0.25", "1.25", "1.25")
    plain = [{m: v for m, v in e.items() if m not in SCALED_MEASURES} for e in errors]
    assert set(first) - set(next(csv.DictReader(results_csv(Results(plain, rows)).splitlines()))) == {*SCALED_MEASURES}


STAGE3 = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 1, "--method", "DSA", "--is_load_best"]
STAGE3 += ["--num_exp", 2, "--num_ood_ratio", 6, "--ood_sets", "patches", "uniform"]


def test_from_stage_1_to_the_page(chain, script, in_process, pictures, refused, tmp_path):
    stage1, stage2 = chain
    printed = in_process("test_ood_model_syn.py", *STAGE3, "--score", "msp", "knn", "odin")
    assert "knn: fitted on the distilled set, 10 images" in printed
    (stage3,) = (tmp_path / "result-test-ood-synthetic").rglob("report.md")
    stage3 = stage3.parent
    kinds = [f"{kind}_{score}.png" for kind in ("scores", "roc") for score in ("msp", "knn", "odin")]
    for name in ("reliability.png", "distilled.png", *kinds):
        assert len(np.unique(np.asarray(Image.open(stage3 / name).convert("L")))) > 10
    with open(stage3 / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3
    assert all(0 <= float(row[m]) <= 1 for row in rows for m in (*MEASURES, "accuracy", "ece", "aurc"))
    loaded = load_results(stage3)
    assert "## OOD detection, score odin" in report_text(loaded, loaded.scores())
    flags = [stage1, stage2, stage3, "--names", "first", "second", "<b>&", "--out", "out", "--html"]
    done = script("scripts/compare.py", *flags)
    assert done.returncode == 0, done.stderr
    table = [line.split("|")[3:6] for line in done.stdout.splitlines() if "| AUROC" in line]
    assert len(table) == 3 * 3
    assert all(len({cell.strip(" *") for cell in cells}) == 1 for cells in table)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"compare.{e}" for e in ("md", "csv", "tex", "png", "html")
    }
    check_page((tmp_path / "out" / "compare.html").read_text(), pictures=1 + 3 * 8)
    assert "first was not measured by gen" in refused("compare.py", stage3, "--names", "first", "--scores", "gen")
    some = in_process("compare.py", stage3, "--names", "one", "--scores", "odin", "msp", "--measures", "auroc")
    titles = [cells[1].strip() for line in some.splitlines() if "AUROC" in line and (cells := line.split("|"))]
    assert titles == [f"{name} ({score})" for score in ("odin", "msp") for name in ("mean", "patches", "uniform")]
    with pytest.raises(UserError, match=r"none of the 0 under .* was made from it"):
        find_runs([stage2], None, [tmp_path / "out"])
    shutil.copytree(stage3, stage3.with_name("again"))  # results of the same networks would count twice in one column
    search = [tmp_path / "result-test-ood-synthetic"]
    with pytest.raises(UserError, match=r"--names: .*result-poe.* leads to 2 results, which would be one column: "):
        find_runs([stage1], ["one"], search)
    assert len(find_runs([stage1], None, search)) == 2
    with pytest.raises(UserError, match=r"test the same networks, which would count twice in x\. Give one of them"):
        find_runs([stage3.parent], ["x"], search)


def check_page(text, pictures):
    """Well-formed, nothing from outside, no script but the page's own, names escaped."""
    text, scripts = re.subn(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert scripts == 1
    open_tags, images = [], []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "iframe", "b")
            assert not any(name.startswith("on") for name, _ in attrs)
            if tag == "img":
                images.append(dict(attrs)["src"])
            elif tag != "meta":
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(text)
    assert not open_tags
    assert len(images) == pictures
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not re.search("https?:", text)  # the letters alone may stand in a picture, by chance
    assert "@import" not in text
    assert "url(" not in text


def test_errors_before_computing(chain, in_process, refused, tmp_path, capsys):
    _, stage2 = chain
    (stage2 / "trained_on.pt").unlink()  # older code did not write it
    error = refused("test_ood_model_syn.py", *STAGE3, "--score", "knn")
    assert "--fit_on distilled: " in error
    assert "does not hold the set that its networks were trained on (trained_on.pt). Give --fit_on real, or" in error
    assert not (tmp_path / "result-test-ood-synthetic").exists()
    in_process("test_ood_model_syn.py", *STAGE3, "--score", "knn", "--fit_on", "real")
    in_process("test_ood_model_syn.py", *STAGE3)
    for flags, messages in [
        (["--score", "msp", "mahalanobiss"], ["did you mean mahalanobis", "msp", "vim"]),
        (["--fit_on", "distil"], ["did you mean distilled", "real"]),
    ]:
        with pytest.raises(SystemExit, match="2"):
            get_args_parser().parse_args(flags)
        printed = capsys.readouterr().err
        assert all(message in printed for message in messages)


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder"):
        find_runs([Path("nowhere")], None, [])
    with pytest.raises(UserError, match=r"no results\.json"):
        find_runs([tmp_path], None, [tmp_path])
    for text in ("{", "[]", '{"errors": [], "rows": [{"network": 3}], "missing": []}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            find_runs([tmp_path], None, [])


def test_a_picture_and_a_page_of_runs_without_folders(tmp_path):
    """Many columns, one of them without a score of the others; nothing can be followed."""
    folder = tmp_path / "a"
    folder.mkdir()
    runs = [NamedResults(f"run {i}", {folder: results([[0.2, 0.7], [0.7, 0.9]])}) for i in range(11)]
    runs.append(NamedResults("last", {folder: results([[0.6], [0.6]], sets=("blob",), score="knn")}))
    table = Comparison(runs, ["auroc"])
    table.picture(tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 800
    check_page(table.page(None), pictures=0)


def test_the_mean_is_over_the_sets_of_all_runs():
    """Another set, on which only one run was measured, does not count in the mean, which names its sets."""
    runs = [run("both", [[0.5, 0.9]] * 2), run("one", [[0.9]] * 2, sets=("blob",))]
    rows = {row.set: row for row in Comparison(runs, ["auroc"]).rows if row.score}
    assert list(rows) == ["mean of blob", "patches", "blob"]
    assert cells(rows["mean of blob"]) == ["90.00 ± 0.00", "90.00 ± 0.00"]
    assert cells(rows["patches"]) == ["50.00 ± 0.00", "-"]
    seeds = {Path("a"): results([[0.5, 0.9]] * 2), Path("b"): results([[0.7]] * 2, sets=("blob",))}
    rows = Comparison([NamedResults("seeds", seeds)], ["auroc"]).rows
    assert [row.set for row in rows if row.score] == ["mean of blob", "patches", "blob"]
    assert shared_sets([*seeds.values()]) == ["blob"]


def test_pictures_show_the_outliers_that_networks_were_trained_with(tmp_path, digits):
    """Stage 2 leaves the others out, as train_model_synthetic_no_oe.py, which has no flag that says so."""
    images, labels = digits.train_batch(torch.arange(0, 20)), torch.arange(10).repeat_interleave(2)
    titles = {}
    for outliers in (None, "distilled", "initial", "corrupt"):
        stored = images if outliers in ("distilled", "initial") else None
        DistilledFile.write(tmp_path / "trained_on.pt", [SyntheticSet(images, labels, stored)], {}, digits, {})
        flags = {"dataset": "Digits"} | ({"outliers": outliers} if outliers else {})
        (tmp_path / "args.json").write_text(json.dumps({"script": "", "flags": flags}))
        titles[outliers] = [title for title, _ in distilled_pictures(tmp_path)]
    alone = ["distilled images"]
    assert titles == {
        None: alone,
        "distilled": [*alone, "distilled outliers"],
        "initial": [*alone, "initial outliers"],
        "corrupt": alone,
    }


@pytest.mark.parametrize(
    ("classes", "ipc", "titles", "named"),
    [(4, 3, ["images", "outliers"], 4), (4, 1, ["images"], 0), (3, 2, ["images"], 3), (4, 3, ["outliers"], 0)],
)
def test_classes_are_named_beside_their_rows(tmp_path, monkeypatch, classes, ipc, titles, named):
    """With one image per class rows are not classes, nor are those of outliers; a set may lack the last classes."""
    written = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, x, y, text, **_: written.append((text, x, y)))
    pictures = torch.rand(classes, ipc, 3, 8, 8)
    save_distilled(tmp_path / "distilled.png", [(title, pictures) for title in titles], ["a", "$b$", "c", "d"])
    assert [text for text, _, _ in written] == ["a", "$b$", "c", "d"][:named]
    for index, (_, x, y) in enumerate(written):
        assert x < 0
        assert abs(y - (1 + index * 9 + 3.5)) <= 1  # the middle of a row of 8 pixels, below a line of one


@pytest.mark.parametrize(("at", "width"), [(0, 0), (0, 1e-9), (-1, 0), (-1, 1e-16), (-1, 1e-3), (-1, 1e18), (1e9, 0)])
@pytest.mark.filterwarnings("error")
def test_histograms_of_scores_that_collapse(tmp_path, monkeypatch, at, width):
    """So do those of saturated networks. All scores are drawn, and as far apart as numpy would where it can."""
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.hist", lambda self, values, bins, **_: drawn.append((values, bins)))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self, **_: None)
    inside, outside = np.full(9, float(at)), np.linspace(at - width, at, 9)
    save_score_histograms(tmp_path / "scores.png", "mls", inside, {"a": outside})
    for values, bins in drawn:
        counts, _ = np.histogram(values, bins, density=True)
        assert np.isfinite(counts).all()
        assert np.histogram(values, bins)[0].sum() == 9
    if width > 1e-12:
        np.testing.assert_allclose(drawn[0][1], np.histogram_bin_edges(np.r_[inside, outside], 40), rtol=1e-12)


def test_pictures_of_images_out_of_range():
    """Clipped where few values are out of range, stretched where most are; one grey value stays in range."""
    g = np.random.default_rng(0)
    images = np.stack([g.uniform(-0.1, 1.1, (1, 4, 4)), g.uniform(1.1, 1.9, (1, 4, 4)), np.full((1, 4, 4), 3.0)])
    found = shown(torch.from_numpy(images)).numpy()
    np.testing.assert_array_equal(found[0], images[0].clip(0, 1))
    np.testing.assert_allclose(found[1], (images[1] - images[1].min()) / np.ptp(images[1]))
    assert (found[2] == 0).all()


def test_msp_is_drawn_as_a_probability(tmp_path, monkeypatch):
    """With the threshold that 95 % of the in-distribution images reach."""
    drawn, lines = [], []
    monkeypatch.setattr("matplotlib.axes.Axes.hist", lambda self, values, bins, **_: drawn.append(values))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self, **_: None)
    monkeypatch.setattr("matplotlib.axes.Axes.axvline", lambda self, at, **_: lines.append(at))
    inside = -np.linspace(0.2, 1, 101)
    save_score_histograms(tmp_path / "scores.png", "msp", inside, {"a": inside / 2})
    assert min(drawn[0]) == pytest.approx(0.2)
    assert (drawn[0] >= lines[0] - 1e-9).mean() == pytest.approx(0.95, abs=0.01)


def test_a_picture_of_histograms(tmp_path):
    save_score_histograms(tmp_path / "scores.png", "msp", np.zeros(9), {"a": np.arange(9.0)})
    assert Image.open(tmp_path / "scores.png").size[0] > 100


@pytest.mark.parametrize(("per_row", "left", "top"), [(3, "left of its row", 0), (1, "", "above its image")])
def test_a_grid_names_its_classes(per_row, left, top, tmp_path):
    """The names stand beside or above the images, which are those of torchvision's grid."""
    images = torch.rand(2 * per_row, 3, 64, 64, generator=generator(0, "grid"))
    save_grid(tmp_path / "plain.png", images, per_row)
    save_image(make_grid(images, nrow=per_row if left else 10, pad_value=1.0), tmp_path / "expected.png")
    save_grid(tmp_path / "named.png", images, per_row, ["cat", "a class with quite a long name"])
    plain, expected, named = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        for name in ("plain", "expected", "named")
    )
    assert plain.shape == expected.shape
    assert abs(plain - expected).max() <= 1
    right, below = (s - p for s, p in zip(named.shape[1::-1], plain.shape[1::-1], strict=True))
    assert (right > 0, below > 0) == (bool(left), bool(top))
    np.testing.assert_array_equal(named[2 + below : -2, 2 + right : -2], plain[2:-2, 2:-2])
    for i in range(2):
        at = (
            (slice(2 + i * 66, 66 + i * 66), slice(0, right))
            if left
            else (slice(0, below), slice(2 + i * 66, 66 + i * 66))
        )
        assert (named[at] < 100).any(), "no name"
