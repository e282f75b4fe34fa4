"""Mean rows and paired differences of a study, against numpy and SciPy; and the files that it is read from."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import study as study_script
from scipy.stats import sem

from utils.core.errors import UserError
from utils.core.run_script import run_script
from utils.ood.measures import MEASURES
from utils.report.compare import Comparison, find_runs
from utils.report.results import NETWORK_MEASURES, STUDY_COLUMNS, Results, load_results, load_study_csv, save_study_csv
from utils.report.study import NamedResults, StudyColumn, differences, mean_rows, read_kind

SETS, SCORES = ("blob", "uniform"), ("msp", "mls")


@pytest.fixture
def study(tmp_path):
    """Three kinds of three seeds (the last kind: two) with two networks each, and all that was measured."""
    values, g = {}, np.random.default_rng(0)
    for kind, seeds in (("plain", (1, 2, 3)), ("poe", (1, 2, 10)), ("poe-corrupt", (1, 2))):
        for seed in seeds:
            errors = [{m: float(g.random()) for m in NETWORK_MEASURES} for _ in range(2)]
            rows = [
                {"network": n, "set": s, "score": score, **{m: float(g.random()) for m in MEASURES}}
                for s in SETS for n in range(2) for score in SCORES
            ]  # fmt: skip
            folder = tmp_path / "ipc1" / kind / f"seed{seed}" / "3-ood" / "DSA" / "20260101-000000"
            folder.mkdir(parents=True)
            content = {"about": {}, "errors": errors, "rows": rows, "missing": []}
            (folder / "results.json").write_text(json.dumps(content))
            values[kind, seed] = content
    return tmp_path / "ipc1", values


def expected(content: dict, score: str, measure: str) -> list[float]:
    """The mean over the sets of each network."""
    rows = [r for r in content["rows"] if r["score"] == score]
    return [np.mean([r[measure] for r in rows if r["network"] == n]) for n in range(2)]


def test_mean_rows_by_numpy(study):
    folder, values = study
    kind = read_kind(folder / "poe", "distilled")
    table = mean_rows([kind], [StudyColumn("accuracy"), StudyColumn("nll"), StudyColumn("auroc", "mls")])
    accuracies, nll, auroc = [], [], []
    for seed in (1, 2, 10):
        accuracies += [100 * (1 - e["error"]) for e in values["poe", seed]["errors"]]
        nll += [e["nll"] for e in values["poe", seed]["errors"]]
        auroc += [100 * v for v in expected(values["poe", seed], "mls", "auroc")]
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    wanted = [f"{np.mean(v):.{d}f} ± {np.std(v):.{d}f}" for v, d in ((accuracies, 2), (nll, 3), (auroc, 2))]
    assert cells == ["distilled", *wanted]


def test_differences_by_scipy(study):
    """Only seeds that both kinds have are compared."""
    folder, values = study
    base, other = (read_kind(folder / k, k) for k in ("poe", "poe-corrupt"))
    (line,) = differences(base, [other], [StudyColumn("auroc", "msp")]).splitlines()[2:]
    first, second = (
        [100 * np.mean(expected(values[kind, seed], "msp", "auroc")) for seed in (1, 2)]
        for kind in ("poe", "poe-corrupt")
    )
    gaps = np.subtract(first, second)
    wanted = f"{gaps.mean():+.2f} ± {sem(gaps):.2f}"
    assert line.split("|")[2].strip() == wanted
    assert line.split("|")[1].strip() == "poe minus poe-corrupt (2 seeds)"


def test_one_seed_has_no_error_and_none_no_difference(study):
    folder, _ = study
    base, other = read_kind(folder / "poe", "a"), read_kind(folder / "plain", "b")
    one = NamedResults("one", {1: other.runs[1]})
    none = NamedResults("none", {7: other.runs[1]})
    cells = [row.split("|")[2].strip() for row in differences(base, [one, none], [StudyColumn("ece")]).splitlines()[2:]]
    gap = 100 * (np.mean(base.runs[1].of_networks("ece")) - np.mean(other.runs[1].of_networks("ece")))
    assert cells == [f"{gap:+.2f}", "-"]


def test_a_clear_difference(study):
    folder, _ = study
    kind = read_kind(folder / "poe", "a")
    assert differences(kind, [kind], [StudyColumn("ece")]).splitlines()[2].split("|")[2].strip() == "+0.00 ± 0.00"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script within this process; returns its exit status, and what it wrote to stdout and stderr."""

    def run_(*words: object, script: ModuleType = study_script) -> tuple[int, str, str]:
        status = 0
        try:
            run_script(lambda: script.main(script.get_args_parser().parse_args(list(map(str, words)))), "script")
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run_


def test_the_script(study, tmp_path, run):
    folder, _ = study
    out = tmp_path / "study.md"
    words = ["--prefixes", "DM", "--base", "poe", "--measures", "auroc", "--sets", "--out", out]
    status, shown, error = run(folder, *words)
    assert status == 0, error
    assert out.read_text() == shown
    lines = shown.splitlines()
    assert lines[0] == "Networks trained by protocol dc."
    assert [line.split("|")[1].strip() for line in lines[4:7]] == [
        "DM, none",
        "DM, distilled (POE)",
        "DM, on the fly (2 seeds)",
    ]
    assert sum("minus" in line for line in lines) == 2
    assert "AUROC mls uniform ↑" in shown


def test_a_row_for_each_score(study, run):
    folder, values = study
    path = next((folder / "poe-corrupt/seed1").rglob("results.json"))  # one of the kinds has a further score
    content = json.loads(path.read_text())
    content["rows"] += [row | {"score": "knn", "fpr_in": 0.25} for row in content["rows"] if row["score"] == "msp"]
    path.write_text(json.dumps(content))
    status, shown, error = run(folder, "--kinds", "poe", "poe-corrupt", "--by_score", "fpr_in")
    assert status == 0, error
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[2:])
    assert header == ["score, FPR95 ↓", "distilled images, distilled (POE)", "distilled images, on the fly (2 seeds)"]
    assert [row[0] for row in rows] == ["msp", "mls", "knn"]
    mls = [100 * v for seed in (1, 2, 10) for v in expected(values["poe", seed], "mls", "fpr_in")]
    assert rows[1][1] == f"{np.mean(mls):.2f} ± {np.std(mls):.2f}"
    assert rows[2][1:] == ["-", "25.00 ± 0.00 (2 of 4)"]  # the other seeds lack it


def test_a_column_for_each_set(study, run):
    folder, values = study
    words = ["--kinds", "poe", "poe-corrupt", "--base", "poe", "--scores", "mls", "--by_set", "auroc"]
    status, shown, error = run(folder, *words)
    assert status == 0, error
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in t.splitlines()] for t in shown.split("\n\n")
    ]
    assert tables[1][0] == ["images, outliers", *(f"AUROC mls {name} ↑" for name in SETS)]
    assert tables[2][0] == ["difference", *(f"AUROC mls {name}" for name in SETS)]
    rows = [r for seed in (1, 2, 10) for r in values["poe", seed]["rows"]]
    for name, cell in zip(SETS, tables[1][2][1:], strict=True):
        found = [100 * r["auroc"] for r in rows if (r["set"], r["score"]) == (name, "mls")]
        assert cell == f"{np.mean(found):.2f} ± {np.std(found):.2f}"
    assert run(folder, "--by_set", "auroc", "--by_score", "auroc")[0] != 0


def test_means_over_groups_of_sets(study, run):
    folder, values = study
    words = [
        "--kinds",
        "poe",
        "--scores",
        "mls",
        "--by_set",
        "fpr_in",
        "--groups",
        f"both={','.join(SETS)}",
        f"one={SETS[0]}",
    ]
    status, shown, error = run(folder, *words)
    assert status == 0, error
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[2:])
    assert header == ["images, outliers", "FPR95 mls both ↓", "FPR95 mls one ↓"]
    for names, cell in zip((SETS, SETS[:1]), row[1:], strict=True):
        found = []
        for seed in (1, 2, 10):
            rows = [r for r in values["poe", seed]["rows"] if r["set"] in names and r["score"] == "mls"]
            by_network = {r["network"] for r in rows}
            found += [100 * np.mean([r["fpr_in"] for r in rows if r["network"] == n]) for n in by_network]
        assert cell == f"{np.mean(found):.2f} ± {np.std(found):.2f}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--groups", "near=uniform"], "--groups: it needs --by_set MEASURE"),
        (["--by_set", "auroc", "--groups", "near=nothing"], "--groups: unknown OOD set 'nothing'"),
        (["--by_set", "auroc", "--groups", "near"], "'near' is no group; write NAME=SET,SET"),
    ],
)
def test_groups_that_are_none(study, run, words, message):
    status, _, error = run(study[0], *words)
    assert status == 2
    assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["{}", "--base", "oe"], "--base: no folder holds oe"),
        (["{}", "--base", "poe", "--against", "oe-real"], "--against: no folder holds oe-real"),
        (["{}", "--scores", "energy"], "--scores: energy is not in distilled images, none"),
        (["{}", "--by_score", "auroc", "--sets"], "--sets: --by_score is one table"),
        (["{}", "--by_score", "auroc", "--scores", "knn"], "--scores: no kind has knn"),
        (["{}/poe", "--kinds", "plain"], "--kinds: no folder plain in"),
        (["{}", "--prefixes", "A", "B"], "--prefixes: 2 words for 1 folders"),
        (["{}", "--kinds", "herding"], "--kinds: no folder herding in"),
        (["{}/poe"], "holds no kinds"),
    ],
)
def test_bad_input_of_the_script(study, run, words, message):
    status, shown, error = run(*(word.format(study[0]) for word in words))
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not shown


def test_kinds_of_several_folders_and_one_beside_them(study, run):
    """The whole training set lies beside the folders and is shown once."""
    folder, _ = study
    other, whole = folder.parent / "ipc10", folder.parent / "whole"
    shutil.copytree(folder / "poe", other / "poe")
    shutil.copytree(folder / "poe-corrupt", other / "poe-corrupt")
    shutil.copytree(folder / "plain", whole)
    words = ["--prefixes", "A", "B", "--kinds", "plain", "poe", "poe-corrupt", "whole", "--base", "poe"]
    status, shown, error = run(folder, other, *words, "--against", "poe-corrupt")
    assert status == 0, error
    first = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")]
    rows = [
        "A, none",
        "A, distilled (POE)",
        "A, on the fly (2 seeds)",
        "whole training set, none",
        "B, distilled (POE)",
        "B, on the fly (2 seeds)",
    ]
    pairs = [f"{name}, distilled (POE) minus {name}, on the fly (2 seeds)" for name in "AB"]
    pairs.insert(1, "difference")
    assert first == ["images, outliers", *rows, "difference", *pairs]


def test_other_names_of_kinds(study, run):
    """Such as links to the same kind in several tables, e.g. of two precisions."""
    folder, _ = study
    both = folder.parent / "both"
    both.mkdir()
    (both / "fp32").symlink_to(folder / "plain")
    (both / "bf16").symlink_to(folder / "poe")
    status, shown, error = run(both, "--prefixes", "A", "--base", "bf16")
    assert status == 0, error
    rows = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")]
    assert rows == ["images, outliers", "A, bf16", "A, fp32", "difference", "A, bf16 minus A, fp32 (2 seeds)"]
    assert "| bf16 " in run(both)[1]


def test_two_results_of_one_seed(study):
    folder, _ = study
    again = folder / "poe" / "seed1" / "3-ood" / "DSA" / "20260102-000000"
    again.mkdir()
    again.joinpath("results.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds 2 files results\.json"):
        read_kind(folder / "poe", "poe")


def test_kept_results(study, run, tmp_path):
    """The file gives the same tables, whatever machine they were measured on, and tells nothing of it."""
    folder, values = study
    path = next((folder / "poe/seed1").rglob("results.json"))
    flags = {"ipc": 10, "data_path": "/home/x/data", "ood_path": "/home/x/ood"}
    path.write_text(json.dumps(values["poe", 1] | {"about": {"networks": "/home/x/2-networks", "flags": flags}}))
    import keep_results

    words = ["--base", "poe", "--sets", "--prefixes", "A"]
    tables = run(folder, *words)[1]
    for out in ("kept.csv", "kept.csv/ipc1/DM"):
        place = tmp_path / out
        status, shown, error = run(folder, place, script=keep_results)
        assert (status, shown) == (0, f"{place}: 8 results\n"), error
        assert run(place, *words)[1] == tables != ""
    assert "/home" not in (tmp_path / "kept.csv").read_text()
    shutil.rmtree(folder / "poe/seed10")
    run(folder, tmp_path / "kept.csv", script=keep_results)  # from a machine that lacks a seed
    for place in (tmp_path / "kept.csv", tmp_path / "kept.csv/ipc1/DM"):
        assert run(place, *words)[1] == tables


def test_the_file_of_a_study_by_the_csv_module(study, tmp_path):
    """All digits, a row for each network, and one for each of its sets and scores."""
    _, values = study
    content = values["poe", 10]
    results = Results(content["errors"], content["rows"])
    results.errors[1]["auroc"] = float("nan")
    results.rows[2]["fpr_in"] = float("nan")
    save_study_csv(tmp_path / "a.csv", {"a, b/poe": {10: results, 2: results}, "a": {1: results}})
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["seed"]) for row in rows[:: len(rows) // 3]] == [
        ("a", "1"),
        ("a, b/poe", "2"),
        ("a, b/poe", "10"),
    ]
    of_seed = rows[: len(rows) // 3]
    for row, errors in zip(of_seed, content["errors"], strict=False):
        assert (row["set"], row["score"]) == ("", "")
        assert [row[STUDY_COLUMNS[m]] for m in errors] == ["" if np.isnan(v) else repr(v) for v in errors.values()]
    for row, expected in zip(of_seed[2:], content["rows"], strict=True):
        shown = {key: "" if value != value else str(value) for key, value in expected.items()}
        assert {key: row[key] for key in expected} == shown
    again = load_study_csv(tmp_path / "a.csv")["a, b/poe"][2]
    assert [{k: v for k, v in r.items() if v == v} for r in again.rows] == [
        {k: v for k, v in r.items() if v == v} for r in content["rows"]
    ]
    np.testing.assert_array_equal(again.of_networks("auroc"), results.of_networks("auroc"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: text.replace("uniform", "uniform,1", 1),
        lambda text: text.replace("poe,1,1,,", "poe,1,1,blob,", 1),
        lambda text: text.replace("network", "net", 1),
        lambda text: text.replace(",1,", ",one,", 1),
        lambda text: text.replace("\n", '\n"', 1),
    ],
)
def test_a_damaged_file_of_a_study(study, run, tmp_path, damage):
    import keep_results

    file = tmp_path / "a.csv"
    run(study[0], file, script=keep_results)
    assert run(file)[0] == 0
    file.write_text(damage(file.read_text()))
    for words, script in (([file], study_script), ([study[0], file], keep_results)):
        status, shown, error = run(*words, script=script)
        assert (status, shown, error.count("\n")) == (2, "", 1)
        assert f"{file} is not there, is damaged, or is not the CSV file of a study; write it again" in error


def test_a_whole_set_beside_a_group_of_a_file(study, run, tmp_path):
    """As with folders; and the file says which groups it has."""
    import keep_results

    folder, _ = study
    shutil.copytree(folder / "plain", tmp_path / "more" / "whole")
    for source, group in ((folder, "ipc1"), (folder, "ipc10"), (tmp_path / "more", "")):
        run(source, tmp_path / "a.csv" / group, script=keep_results)
    status, shown, error = run(
        tmp_path / "a.csv/ipc1", tmp_path / "a.csv/ipc10", "--prefixes", "A", "B", "--base", "poe"
    )
    assert status == 0, error
    assert shown.count("| whole training set, none ") == 1
    assert run(tmp_path / "a.csv")[1].count("\n") == 5
    error = run(tmp_path / "a.csv", "--kinds", "poe")[2]
    assert "--kinds: no folder poe in" in error
    assert "ipc2 names no kinds of" in run(tmp_path / "a.csv/ipc2")[2]
    assert "its kinds are in ipc1, ipc10" in run(tmp_path / "a.csv/ipc2")[2]


def test_what_lies_beside_the_folder_is_told(study, run, tmp_path):
    import keep_results

    folder, _ = study
    assert "not copied" not in run(folder, tmp_path / "a.csv", script=keep_results)[1]
    shutil.copytree(folder / "plain", folder.parent / "whole")
    assert f"not copied: whole in {folder.parent}; copy" in run(folder, tmp_path / "a.csv", script=keep_results)[1]


def test_seeds_by_their_number(study, run):
    """A negative one counts; two folders of one number are refused."""
    folder, _ = study
    shutil.copytree(folder / "poe-corrupt" / "seed1", folder / "poe-corrupt" / "seed-3")
    assert [*read_kind(folder / "poe-corrupt", "x").runs] == [-3, 1, 2]
    shutil.copytree(folder / "poe-corrupt" / "seed1", folder / "poe-corrupt" / "seed01")
    assert "another folder is of this seed; keep one" in run(folder)[2]


def test_ood_sets_of_other_sizes(study, run, tmp_path):
    """The files of a set may have been replaced between two seeds, or differ between machines."""
    import keep_results

    folder, _ = study
    for number, path in enumerate(sorted((folder / "poe").rglob("results.json"))):
        content = json.loads(path.read_text())
        sizes = {name: {"images": 90, "kind": "ood"} for name in SETS}
        content["about"] = {"ood_sets": sizes | {SETS[1]: {"images": 90 + (number == 1), "kind": "ood"}}}
        path.write_text(json.dumps(content))
    told = f"{SETS[1]} has 90 images for"
    status, _, error = run(folder, "--kinds", "plain", "poe")
    assert status == 2
    assert told in error
    assert told in run(folder, tmp_path / "kept.csv", script=keep_results)[2]
    column = read_kind(folder / "poe", "poe")
    assert f"Caution: {told} poe (1), and 91 for poe (10)." in Comparison([column], ["auroc"]).markdown()
    other = read_kind(folder / "plain", "plain")
    assert (
        "Runs: 3 of poe, 2 of plain."
        in Comparison([column, replace(other, runs=dict([*other.runs.items()][:2]))], []).trained
    )
    (odd := folder / "poe" / "seed10").rename(tmp_path / "seed10")
    assert "Caution" not in Comparison([read_kind(folder / "poe", "poe")], ["auroc"]).markdown()
    assert run(folder, tmp_path / "kept.csv", script=keep_results)[0] == 0
    assert load_study_csv(tmp_path / "kept.csv")["poe"][1].sizes == dict.fromkeys(SETS, 90)
    assert load_study_csv(tmp_path / "kept.csv")["plain"][1].sizes == {}  # older results
    shutil.rmtree(folder / "poe")
    (folder / "poe").mkdir()
    (tmp_path / "seed10").rename(odd)  # as measured on another machine
    assert told in run(folder, tmp_path / "kept.csv", script=keep_results)[2]


def test_results_that_cannot_be_kept(study, run, tmp_path):
    import keep_results

    folder, _ = study
    assert "poe holds no results in" in run(folder / "poe", tmp_path / "kept.csv", script=keep_results)[2]
    assert (
        "kept is no CSV file; give a name that ends in .csv" in run(folder, tmp_path / "kept", script=keep_results)[2]
    )
    again = folder / "poe/seed1/3-ood/DSA/20260102-000000"
    shutil.copytree(next(again.parent.iterdir()), again)
    status, shown, error = run(folder, tmp_path / "kept.csv", script=keep_results)
    assert (status, shown, error.count("\n")) == (2, "", 1)
    assert "seed1 holds 2 files results.json; keep one for each seed" in error
    assert not (tmp_path / "kept.csv").exists()


@pytest.mark.parametrize(
    ("kind", "prefix", "expected"),
    [
        ("poe-again", "", "distilled images, distilled (POE), corrupted again"),
        ("poe-kcenter-again", "DM", "DM, k-center, corrupted again"),
        ("oe-again", "", "distilled images, distilled (OE), corrupted again"),
        ("random-initial-again", "DM", "DM, random, random outliers, corrupted again"),
        ("whole-corrupt", "DM", "whole training set, on the fly"),
        ("poe-corrupt", "DM", "DM, on the fly"),
        ("plain-corrupt", "DM", "DM, on the fly (plain images)"),
        ("plain", "DM", "DM, none"),
        ("poe-none", "DM", "DM, none (poe images)"),
        ("oe-initial", "", "distilled images, start (OE)"),
    ],
)
def test_names_of_rows(monkeypatch, kind, prefix, expected):
    import study

    assert study.title(kind, prefix) == expected


def change(folder: Path, edit) -> None:
    """Edit the content of the one results.json below `folder`."""
    (path,) = folder.rglob("results.json")
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_other_ood_sets_are_not_compared(study, run):
    folder, _ = study

    def without_blob(content):
        content["rows"] = [row for row in content["rows"] if row["set"] != "blob"]

    change(folder / "poe" / "seed2", without_blob)
    status, _, error = run(folder, "--base", "poe")
    assert status == 2
    assert "distilled images, distilled (POE), seed 2, was not measured on the same OOD sets" in error
    assert "as distilled images, none, seed 1: blob" in error


def test_other_ood_sets_of_rows_of_the_same_name(study, run):
    folder, _ = study
    other = folder.parent / "ipc10"
    shutil.copytree(folder, other)
    assert run(folder, other)[0] == 0
    for path in other.rglob("results.json"):
        content = json.loads(path.read_text())
        content["rows"] = [row for row in content["rows"] if row["set"] != "blob"]
        path.write_text(json.dumps(content))
    assert run(other)[0] == 0
    for words in ([folder, other], [other, folder]):
        assert run(*words)[0] == 2


def test_validation_sets_are_left_out(study, run):
    folder, _ = study
    _, before, _ = run(folder, "--base", "poe", "--sets")

    def with_validation(content):
        content["rows"] += [row | {"set": "val:invert"} for row in content["rows"] if row["set"] == "blob"]

    change(folder / "plain" / "seed1", with_validation)
    status, after, _ = run(folder, "--base", "poe", "--sets")
    assert (status, after) == (0, before)


def test_scores_left_out_are_those_that_all_have(study, run):
    folder, _ = study
    _, msp, _ = run(folder, "--scores", "msp")

    def without_mls(content):
        content["rows"] = [row for row in content["rows"] if row["score"] != "mls"]

    change(folder / "poe" / "seed2", without_mls)
    status, out, _ = run(folder)
    assert (status, out) == (0, msp)


def test_a_network_without_a_value_is_left_out(study):
    """Error detection has none where a network makes no errors: the mean is over the others, and p over their seeds."""
    folder, values = study
    for seed, networks in ((1, (0,)), (2, (0, 1))):
        for network in networks:
            change(folder / "poe" / f"seed{seed}", lambda c, n=network: c["errors"][n].update(auroc=None))
    kind = read_kind(folder / "poe", "poe")
    means = kind.by_run(StudyColumn("auroc"))
    assert list(means) == [1, 10]
    assert means[1] == values["poe", 1]["errors"][1]["auroc"]


def test_the_whole_set_is_compared_in_every_folder(study, run):
    folder, _ = study
    shutil.copytree(folder, folder.parent / "ipc10")
    shutil.copytree(folder / "plain", folder.parent / "whole")
    assert "| whole training set, none " in run(folder)[1]  # beside the folder, without being named
    words = [folder, folder.parent / "ipc10", "--prefixes", "one", "ten", "--kinds", "poe", "whole", "--base", "poe"]
    status, out, _ = run(*words)
    assert status == 0
    assert sum(line.startswith("| whole training set, none ") for line in out.splitlines()) == 1
    differences = [line for line in out.splitlines() if " minus " in line]
    assert [line.split("|")[1].split(",")[0].strip() for line in differences] == ["one", "ten"]


def test_the_head_names_the_protocols(study, tmp_path, run):
    """Of each kind, where they differ, and which checkpoints were tested; the CSV file keeps them."""
    folder, _ = study
    for path in (folder / "poe").rglob("results.json"):
        content = json.loads(path.read_text())
        content["about"] |= {"training": {"protocol": "ncfm", "epochs": 300, "mix": "none"}, "checkpoints": "best"}
        path.write_text(json.dumps(content))
    status, shown, error = run(folder, "--kinds", "plain", "poe")
    assert status == 0, error
    ncfm = "ncfm, 300 epochs, mix none, the best checkpoints on the test set"
    kinds = f'dc: "distilled images, none"; {ncfm}: "distilled images, distilled (POE)"'
    assert shown.splitlines()[0] == f"Networks trained by protocol {kinds}."
    save_study_csv(tmp_path / "a.csv", {kind: read_kind(folder / kind, kind).runs for kind in ("plain", "poe")})
    assert run(tmp_path / "a.csv", "--kinds", "plain", "poe")[1] == shown
    columns = find_runs([folder / "plain", folder / "poe"], ["a", "b"], [])
    assert (
        Comparison(columns, ["auroc"])
        .markdown()
        .startswith(f"Networks trained by protocol dc: a; {ncfm}: b.\n\n| OOD set")
    )
    content["about"]["checkpoints"] = "epoch300"  # the last ones need no word
    path.write_text(json.dumps(content))
    assert load_results(path.parent).protocols == ("ncfm, 300 epochs, mix none",)
    content["about"]["flags"] = {"num_ood_ratio": 10, "T": 2.0}
    path.write_text(json.dumps(content))
    (told,) = load_results(path.parent).protocols
    assert told == "ncfm, 300 epochs, mix none, 1/10 of the OOD images, energy at a temperature of 2"
    del content["about"]["flags"]
    content["about"]["checkpoints"] = "epoch200"
    path.write_text(json.dumps(content))
    assert load_results(path.parent).protocols == ("ncfm, 300 epochs, mix none, checkpoints of epoch 200",)
