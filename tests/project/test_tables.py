"""The scripts of the tables, with a stand-in for Python that notes what it is asked to do."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise

import benchmark
import check_inputs
import cold_starts
import dataset_outliers
import numpy as np
import pytest
from conftest import ROOT

import main as stage1
import main_oe
import main_poe
import test_ood_model_syn
import train_experts
import train_model_synthetic_no_oe
import train_model_synthetic_oe
from utils.core.errors import UserError
from utils.core.pixels import unit_images
from utils.data.datasets import load_dataset

PARSERS = {
    "main.py": stage1,
    "main_oe.py": main_oe,
    "main_poe.py": main_poe,
    "train_model_synthetic_no_oe.py": train_model_synthetic_no_oe,
    "train_model_synthetic_oe.py": train_model_synthetic_oe,
    "test_ood_model_syn.py": test_ood_model_syn,
    "train_experts.py": train_experts,
}
STAND_IN = """#!/usr/bin/env bash
if [ "$1" = scripts/tables/check_inputs.py ]; then printf '%q ' "$@" > "$NOTES.checked"; exit "${CHECK_STATUS:-0}"; fi
printf '%q ' "$@" >> "$NOTES"; echo >> "$NOTES"
while [ $# -gt 0 ]; do
    if [ "$1" = --save_path ]; then mkdir -p "$2/run" && touch "$2/run/args.json"; fi
    shift
done
if [ -e "$NOTES.fail" ] && [ "$(wc -l < "$NOTES")" -ge "$(cat "$NOTES.fail")" ]; then exit 130; fi
"""


@pytest.fixture
def table(tmp_path):
    """Run a script of `scripts/`; returns its exit status and the commands, as lists of words."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    notes = tmp_path / "notes"

    def run(script, fail_at=None, **variables):
        notes.write_text("")
        fail = tmp_path / "notes.fail"
        fail.write_text(str(fail_at)) if fail_at else fail.unlink(missing_ok=True)
        places = {"PYTHON": str(stand_in), "NOTES": str(notes), "OUT": str(tmp_path / "out"), "OOD": str(tmp_path)}
        env = {"PATH": os.environ["PATH"]} | places | variables  # not what the caller has exported
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "tables" / script)], env=env, capture_output=True, text=True
        )
        run.err = done.stderr
        return done.returncode, [shlex.split(line) for line in notes.read_text().splitlines()]

    return run


@pytest.mark.parametrize("script", ["cifar10.sh", "cifar100.sh", "fashion_mnist.sh", "digits.sh"])
def test_every_stage_of_every_kind(script, table):
    status, commands = table(script, IPC="1 2", SEEDS="4 5", ITERATIONS="7", NETWORKS="2", EPOCHS="9")
    assert status == 0
    if script == "digits.sh":
        assert commands.pop(0)[0] == "scripts/dataset_outliers.py"
    assert len(commands) == 2 * (2 * 3 * 3 + 1)
    for words in commands:
        if words[0] != "scripts/compare.py":
            args = PARSERS[words[0]].get_args_parser().parse_args(words[1:])
            assert args.ipc in (1, 2)
            assert args.seed in (4, 5)
            assert getattr(args, "Iteration", 7) == 7
    assert [w[0] for w in commands[:9]] == [
        "main.py", "train_model_synthetic_no_oe.py", "test_ood_model_syn.py",
        "main_oe.py", "train_model_synthetic_oe.py", "test_ood_model_syn.py",
        "main_poe.py", "train_model_synthetic_oe.py", "test_ood_model_syn.py",
    ]  # fmt: skip
    for first, second in pairwise(commands[:9]):
        if second[0] != "main.py" and "--load_path" in second:
            assert second[second.index("--load_path") + 1] == first[first.index("--save_path") + 1]


def test_what_is_done_is_skipped_and_what_was_stopped_goes_on(table):
    settings = {"IPC": "1", "SEEDS": "1", "KINDS": "plain poe"}
    status, commands = table("cifar10.sh", fail_at=2, **settings)
    assert status == 130
    assert [w[0] for w in commands] == ["main.py", "train_model_synthetic_no_oe.py"]
    status, commands = table("cifar10.sh", **settings)
    assert status == 0
    assert commands[0][0] == "train_model_synthetic_no_oe.py"
    assert commands[0][-2:] == ["--resume", "latest"]
    assert [w[0] for w in commands[1:]] == [
        "test_ood_model_syn.py", "main_poe.py", "train_model_synthetic_oe.py", "test_ood_model_syn.py",
        "scripts/compare.py",
    ]  # fmt: skip
    status, commands = table("cifar10.sh", **settings)
    assert [w[0] for w in commands] == ["scripts/compare.py"]


def test_what_was_made_with_other_settings_is_not_taken_for_done(table):
    settings = {"IPC": "1", "SEEDS": "1", "KINDS": "plain"}
    assert table("cifar10.sh", **settings)[0] == 0
    status, commands = table("cifar10.sh", ITERATIONS="7", **settings)
    assert (status, commands) == (2, [])
    assert "was made with other settings" in table.err
    assert "< 1000" in table.err
    assert "> 7" in table.err


def test_a_stage_made_from_another_is_not_taken_for_done(table, tmp_path):
    settings = {"IPC": "1", "SEEDS": "1", "KINDS": "plain"}
    assert table("cifar10.sh", **settings)[0] == 0
    shutil.rmtree(tmp_path / "out/ipc1/plain/seed1/1-distilled")
    status, commands = table("cifar10.sh", ITERATIONS="7", **settings)
    assert status == 2
    assert [w[0] for w in commands] == ["main.py"]
    assert "2-networks was made with other settings" in table.err


def test_an_unwritten_done_is_none(table, tmp_path):
    settings = {"IPC": "1", "SEEDS": "1", "KINDS": "plain"}
    assert table("cifar10.sh", **settings)[0] == 0
    (tmp_path / "out/ipc1/plain/seed1/1-distilled/done").write_text("")
    status, commands = table("cifar10.sh", **settings)
    assert status == 0
    assert [w[0] for w in commands] == ["main.py", "scripts/compare.py"]


def test_what_was_stopped_goes_on_with_its_flags(table):
    settings = {"IPC": "1", "SEEDS": "1", "KINDS": "plain"}
    assert table("cifar10.sh", fail_at=1, **settings)[0] == 130
    _, commands = table("cifar10.sh", ITERATIONS="7", **settings)
    args = commands[0]
    assert args[args.index("--Iteration") + 1] == "7"  # main.py compares it with what the run was started with
    assert args[args.index("--resume") + 1] == "latest"


@pytest.mark.parametrize("method", ["DM", "MTT"])
def test_other_methods(table, method):
    settings = {"EXPERTS": "--num_experts 3", "MTT": "--syn_steps 9"}
    status, commands = table("cifar10.sh", METHOD=method, IPC="1", SEEDS="1", **settings)
    assert status == 0
    parsed = [(w[0], PARSERS[w[0]].get_args_parser().parse_args(w[1:])) for w in commands if w[0] in PARSERS]
    stages = [(name, args) for name, args in parsed if name != "train_experts.py"]
    assert {args.method for _, args in stages} == {method}
    mains = [args for name, args in stages if name.startswith("main")]
    assert {args.Iteration for args in mains} == {20000 if method == "DM" else 5000}
    experts = [args for name, args in parsed if name == "train_experts.py"]
    kinds = [(args.outliers, args.num_experts) for args in experts]
    assert kinds == ([("none", 3), ("oe", 3), ("poe", 3)] if method == "MTT" else [])
    for before, args in zip(experts, mains, strict=False):
        assert (args.buffer_path, args.syn_steps) == (before.buffer_path, 9)
    if method == "MTT":  # sets of other experts are not taken for done, and done ones need no experts
        assert (
            table("cifar10.sh", METHOD=method, IPC="1", SEEDS="1", **settings | {"EXPERTS": "--num_experts 4"})[0] == 2
        )
        status, commands = table("cifar10.sh", METHOD=method, IPC="1", SEEDS="1", **settings)
        assert (status, [w[0] for w in commands]) == (0, ["scripts/compare.py"])


def test_one_precision_for_all_stages(table):
    _, commands = table(
        "cifar10.sh", METHOD="MTT", IPC="1", SEEDS="1", KINDS="plain", EXPERTS="", MTT="", PRECISION="bf16"
    )
    parsed = [(w[0], PARSERS[w[0]].get_args_parser().parse_args(w[1:])) for w in commands if w[0] in PARSERS]
    assert [name for name, _ in parsed] == [
        "train_experts.py", "main.py", "train_model_synthetic_no_oe.py", "test_ood_model_syn.py"
    ]  # fmt: skip
    assert {args.precision for _, args in parsed} == {"bf16"}


def test_ablations(table):
    status, commands = table("digits.sh", IPC="1", SEEDS="1 2", KINDS="poe", ABLATIONS="1")
    assert status == 0
    corruptions = [w[w.index("--corruptions") + 1] for w in commands if "--corruptions" in w]
    assert len(corruptions) == 2 * 8
    assert len(set(corruptions)) == 8
    trained = [w for w in commands if "/lambda-" in " ".join(w) and w[0] == "train_model_synthetic_oe.py"]
    assert sorted(w[w.index("--lambda_oe") + 1] for w in trained) == sorted(["0", "0.1", "0.5", "1"] * 2)


def test_other_weights_of_outliers(table, tmp_path):
    kinds = "plain plain-initial poe poe-corrupt poe-none random random-corrupt whole-corrupt"
    status, commands = table("digits.sh", IPC="2", SEEDS="1 2", KINDS=kinds, LAMBDAS="0.25 2")
    assert status == 0
    first = commands.index(next(w for w in commands if "/lambda-" in " ".join(w)))
    *again, study = commands[first:]
    found = []
    for words in again:
        args = PARSERS[words[0]].get_args_parser().parse_args(words[1:])
        kind, seed, stage = args.save_path.split("/")[-3:]
        weight = args.save_path.split("/lambda-")[1].split("/")[0]
        found.append((kind, seed, stage))
        if stage == "2-networks":
            assert args.lambda_oe == float(weight)
            assert args.seed == int(seed[4:])
            images = args.save_path.replace(f"lambda-{weight}/{kind}", kind.split("-")[0])
            distilled = images.replace("2-networks", "1-distilled")
            assert args.load_path == (None if kind == "random-corrupt" else distilled)
        else:
            assert args.load_path == args.save_path.replace("3-ood", "2-networks")
    with_outliers = ("plain-initial", "poe", "poe-corrupt", "random-corrupt")
    each = [(k, s, n) for s in ("seed1", "seed2") for k in with_outliers for n in ("2-networks", "3-ood")]
    assert found == each * 2
    assert study[0] == "scripts/study.py"
    assert [word.rsplit("/", 1)[1] for word in study[1:3]] == ["lambda-0.25", "lambda-2"]
    assert study[study.index("--prefixes") + 1 :][:2] == ["0.25", "2"]
    status, commands = table("digits.sh", IPC="1", SEEDS="1", KINDS="plain", LAMBDAS="2", OUT=str(tmp_path / "plain"))
    assert (status, [w[0] for w in commands if "lambda-" in " ".join(w)]) == (0, [])


def test_further_detectors(table, tmp_path):
    """Not of the whole training set; and no temperature is fitted on images that the networks were trained on."""
    kinds = {"IPC": "2", "SEEDS": "1", "KINDS": "plain poe whole", "STAGE3": "--compile off"}
    status, commands = table("digits.sh", **kinds, DETECTORS="knn tscaling react")
    assert status == 0
    again = [test_ood_model_syn.get_args_parser().parse_args(w[1:]) for w in commands if "/fit-" in " ".join(w)]
    scores = {"distilled": ["knn", "react"], "real": ["knn", "tscaling", "react"]}
    expected = [(fit, kind) for fit in ("distilled", "real") for kind in ("plain", "poe")]
    for args, (fit, kind) in zip(again, expected, strict=True):
        assert (args.score, args.fit_on, args.compile) == (scores[fit], fit, "off")
        assert f"/ipc2/fit-{fit}/{kind}/seed1/3-ood" in args.save_path
        assert args.load_path.endswith(f"ipc2/{kind}/seed1/2-networks")
    status, commands = table("digits.sh", **kinds, DETECTORS="tscaling", OUT=str(tmp_path / "other"))
    assert (status, sum("/fit-" in " ".join(w) for w in commands)) == (0, 2)


@pytest.mark.parametrize("script", ["cifar10.sh", "cifar100.sh", "fashion_mnist.sh", "digits.sh"])
def test_the_line_to_try_a_script(script, table, tmp_path):
    """The stages take what it sets, and the whole table does not take it for its own."""
    text = (ROOT / "scripts" / "tables" / script).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("#   OUT=")]
    *words, shell, name = shlex.split(line[1:])
    assert (shell, name) == ("bash", f"scripts/tables/{script}")
    variables = dict(word.split("=", 1) for word in words)
    assert f"OUT=${{OUT:-{variables.pop('OUT')}}}" not in text
    status, commands = table(script, OUT=str(tmp_path / "try"), **variables)
    assert status == 0
    said = " ".join(" ".join(words) for words in commands)
    assert all(value in said for value in variables.values() if value != variables["KINDS"])
    kinds = {words[0] for words in commands if words[0] in ("main.py", "main_oe.py", "main_poe.py")}
    assert kinds == {"main.py", "main_poe.py"}
    for words in commands:
        if words[0] in PARSERS:
            PARSERS[words[0]].get_args_parser().parse_args(words[1:])


def test_inputs_are_checked_before_the_first_stage(table, tmp_path):
    status, commands = table("cifar10.sh", CHECK_STATUS="2", DOWNLOAD="all", OE_DATA="pool.npy")
    assert (status, commands) == (2, [])
    words = shlex.split((tmp_path / "notes.checked").read_text())
    args = check_inputs.get_args_parser().parse_args(words[1:])
    assert (args.dataset, args.oe_data_path, args.download) == ("CIFAR10", "pool.npy", "all")
    assert args.ood_sets == ["Textures", "Places365", "TinyImageNet_resize", "LSUN_resize", "CIFAR100"]
    status, commands = table("cifar10.sh", DOWNLOAD="all", KINDS="plain", IPC="1", SEEDS="1")
    assert status == 0
    assert all(w[w.index("--download") + 1] == "all" for w in commands if w[0] in PARSERS)
    assert "--oe_data_path" not in (tmp_path / "notes.checked").read_text()


def test_all_missing_inputs_are_listed_together(tmp_path, capsys):
    np.savez(tmp_path / "mine.npz", images=np.full((3, 32, 32, 3), 255, np.uint8))
    flags = ["--dataset", "CIFAR10", "--data_path", tmp_path, "--download", "none", "--ood_path", tmp_path]
    flags += ["--oe_data_path", tmp_path / "pool.npy", "--ood_sets", "Textures", "mine", "gaussian"]
    args = check_inputs.get_args_parser().parse_args(list(map(str, flags)))
    with pytest.raises(UserError) as error:
        check_inputs.main(args)
    text = str(error.value)
    assert text.startswith("3 inputs are missing or damaged. ")
    assert all(name in text for name in ("CIFAR10 is not there", "pool.npy is not there", "--ood_sets Textures"))
    args = check_inputs.get_args_parser().parse_args(["--dataset", "Digits", "--ood_sets", "gaussian"])
    check_inputs.main(args)


@pytest.mark.parametrize(("dataset", "fault"), [("npz", "has no key 'test_images'"), ("ImageFolder", "is not there")])
def test_what_is_wrong_with_own_data_comes_before_what_else_is(tmp_path, dataset, fault):
    """Other inputs are checked, too, though the shape and the classes of the data are not known."""
    np.savez(tmp_path / "own.npz", train_images=np.full((4, 9, 9), 255, np.uint8), train_labels=np.arange(4))
    np.savez(tmp_path / "mine.npz", images=np.full((3, 32, 32, 3), 255, np.uint8))
    np.save(tmp_path / "pool.npy", np.full((30, 16, 16, 3), 255, np.uint8))
    data = tmp_path / ("own.npz" if dataset == "npz" else "no-folder")
    flags = ["--dataset", dataset, "--data_path", data, "--ood_path", tmp_path, "--download", "none"]
    flags += ["--oe_data_path", tmp_path / "pool.npy", "--ood_sets", "Textures", "mine", "gaussian"]
    with pytest.raises(UserError) as error:
        check_inputs.main(check_inputs.get_args_parser().parse_args(list(map(str, flags))))
    first, second = str(error.value).split(" | ")
    assert first.startswith("2 inputs are missing or damaged. --data_path: ")
    assert fault in first
    assert second.startswith("--ood_sets Textures: ")


@pytest.mark.parametrize(
    "kind",
    [
        "plane",
        "plain-distilled",
        "poe-distilled",
        "whole-",
        "whole-initial",
        "-real",
        "plain-again",
        "poe-corrupt-again",
    ],
)
def test_an_unknown_kind(table, kind):
    status, commands = table("cifar10.sh", KINDS=f"plain {kind}")
    assert (status, commands) == (2, [])
    assert f"unknown kind '{kind}'" in table.err


@pytest.mark.parametrize("name", ["OUT", "DATA", "OE_DATA", "OOD"])
def test_a_path_with_a_space(table, name):
    status, commands = table("cifar10.sh", **{name: "a b"})
    assert (status, commands) == (2, [])
    assert f"{name}: 'a b' has a space in it" in table.err


@pytest.mark.parametrize("flags", ["--outlier_recipe strong", "--outlier-recipe strong", "--outlier-recipe=strong"])
def test_the_strong_recipe_in_every_spelling(table, flags):
    status, commands = table("cifar10.sh", METHOD="MTT", IPC="1", SEEDS="1", KINDS="poe", OUTLIERS=flags)
    experts = train_experts.get_args_parser().parse_args(commands[0][1:])
    assert (status, commands[0][0], experts.lambda_oe) == (0, "train_experts.py", 2)


@pytest.mark.parametrize(
    ("kinds", "sets", "pool", "made"),
    [
        ("oe", "patches", None, "--oe"),
        ("oe", "patches", "mine.npz", ""),  # a pool of one's own is never made
        ("plain", "FashionMNIST", None, "--ood"),
        ("poe", "blob", None, ""),
    ],
)
def test_files_of_digits_are_made_where_they_are_used(table, kinds, sets, pool, made):
    given = {"OE_DATA": pool} if pool else {}
    status, commands = table("digits.sh", IPC="1", SEEDS="1", KINDS=kinds, OOD_SETS=sets, DOWNLOAD="none", **given)
    first = commands[0]
    assert status == 0
    if made == "--oe" and (ROOT / "data/oe/FashionMNIST.npz").exists():
        made = ""
    assert (first[0] == "scripts/dataset_outliers.py") == bool(made)
    if made:
        args = dataset_outliers.get_args_parser().parse_args(first[1:])
        assert (args.download, args.oe is not None, args.ood is not None) == ("none", made == "--oe", made == "--ood")


@pytest.mark.parametrize(("method", "rate"), [("DSA", 0.1), ("DC", 0.1), ("DM", 1.0), ("MTT", None)])
def test_all_recipes_of_outliers(table, method, rate):
    """Every recipe of a method gives commands that are accepted, and fractions of the method's learning rate."""
    given = "" if method == "MTT" else "--batch_oe 32"
    status, commands = table("outliers.sh", METHOD=method, IPC="2", SEEDS="4", KINDS="poe poe-corrupt", OUTLIERS=given)
    assert status == 0, table.err
    rates, recipes, weights = set(), set(), {}
    for words in commands:
        if words[0] not in PARSERS:
            continue
        args = PARSERS[words[0]].get_args_parser().parse_args(words[1:])
        if words[0] == "train_experts.py":
            weights[args.buffer_path] = args.lambda_oe
        if words[0] == "main_poe.py" and method == "MTT":  # the experts are those that the recipe wants
            assert weights[args.buffer_path] == (args.expert_lambda_oe or args.lambda_oe)
        if words[0] == "main_poe.py":
            assert args.batch_oe == (None if method == "MTT" else 32)
            rates.add(args.lr_img_oe)
            recipes.add((args.init_oe, args.clamp_oe, args.mix_corruptions, args.network_pool, args.lr_img_oe))
            mixed = args.mix_corruptions
        if words[0] == "train_model_synthetic_oe.py" and args.outliers == "corrupt":
            assert args.mix_corruptions == mixed
    assert rates == ({None} if rate is None else {None, rate / 2, rate / 10})
    assert len(recipes) >= (3 if method == "MTT" else 9)
    assert sorted(weights.values()) == ([0.5, 2] if method == "MTT" else [])
    study = next(words for words in commands if words[0] == "scripts/study.py")
    assert study[study.index("--base") + 1] == "poe"


def test_ablations_need_ipc_1(table):
    status, commands = table("digits.sh", ABLATIONS="1", IPC="10")
    assert (status, commands) == (2, [])
    assert "ABLATIONS: they are at ipc 1" in table.err


def test_outliers_corrupted_again_by_mixed_corruptions(table):
    status, commands = table("cifar10.sh", IPC="2", SEEDS="4", KINDS="poe poe-again", SOURCE="--mix_corruptions")
    assert status == 0
    args = [
        PARSERS[w[0]].get_args_parser().parse_args(w[1:]) for w in commands if w[0] == "train_model_synthetic_oe.py"
    ]
    assert [(a.corrupt_again, a.mix_corruptions) for a in args] == [(False, False), (True, True)]


def test_a_recipe_that_a_method_does_not_know(table):
    status, commands = table("outliers.sh", METHOD="MTT", RECIPES="published pool")
    assert (status, commands) == (2, [])
    assert "METHOD=MTT has no recipe 'pool'" in table.err


def test_rows_of_baselines_and_of_outliers_that_are_not_distilled(table):
    kinds = "poe-corrupt oe-initial plain-kcenter random random-real whole whole-corrupt"
    settings = {"IPC": "1 2", "SEEDS": "4", "KINDS": kinds, "EPOCHS": "9", "WHOLE_EPOCHS": "3"}
    status, commands = table("cifar10.sh", **settings)
    assert status == 0
    trained = {}
    for words in commands:
        if words[0] in ("train_model_synthetic_oe.py", "train_model_synthetic_no_oe.py"):
            args = PARSERS[words[0]].get_args_parser().parse_args(words[1:])
            trained.setdefault((args.train_on, getattr(args, "outliers", "none")), []).append(args)
    assert {key: len(of_key) for key, of_key in trained.items()} == {
        ("distilled", "corrupt"): 2,
        ("distilled", "initial"): 2,
        ("distilled", "kcenter"): 2,
        ("random", "none"): 2,
        ("random", "real"): 2,
        ("whole", "none"): 1,  # it does not depend on ipc
        ("whole", "corrupt"): 1,
    }
    assert [w[0] for w in commands].count("main_poe.py") == 2
    (corrupt, _), (initial, _) = trained["distilled", "corrupt"], trained["distilled", "initial"]
    assert corrupt.load_path.endswith("ipc1/poe/seed4/1-distilled")
    assert initial.load_path.endswith("ipc1/oe/seed4/1-distilled")
    assert trained["distilled", "kcenter"][0].load_path.endswith("ipc1/plain/seed4/1-distilled")
    assert initial.oe_data_path
    assert corrupt.oe_data_path is None
    assert trained["whole", "none"][0].epoch_eval_train == 3
    assert trained["random", "none"][1].ipc == 2
    columns = [words for words in commands if words[0] == "scripts/compare.py"]
    assert [sum(word.endswith("out/whole") for word in words) for words in columns] == [1, 1]


def test_rows_of_outliers_that_are_corrupted_again(table):
    kinds = "poe-again oe-initial-again random-kcenter-again"
    status, commands = table("cifar10.sh", IPC="1", SEEDS="4", KINDS=kinds, EPOCHS="9")
    assert status == 0, table.err
    trained = [
        PARSERS[words[0]].get_args_parser().parse_args(words[1:])
        for words in commands
        if words[0] == "train_model_synthetic_oe.py"
    ]
    assert [(a.train_on, a.outliers, a.corrupt_again, bool(a.oe_data_path)) for a in trained] == [
        ("distilled", "distilled", True, False),
        ("distilled", "initial", True, True),
        ("random", "kcenter", True, False),
    ]
    assert [a.save_path.split("/")[-3] for a in trained] == kinds.split()
    assert trained[0].load_path.endswith("ipc1/poe/seed4/1-distilled")


def test_a_data_set_as_outliers(tmp_path, monkeypatch, capsys):
    def write(*flags) -> None:
        dataset_outliers.main(dataset_outliers.get_args_parser().parse_args(list(map(str, flags))))

    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 256, (20, 28, 28), dtype=np.uint8) for part in ("train", "test")}
    arrays = {f"{part}_images": a for part, a in images.items()}
    labels = {f"{part}_labels": np.arange(20) % 10 for part in images}
    np.savez(tmp_path / "fashionmnist.npz", **arrays, **labels)
    write("--data_path", tmp_path, "--oe", tmp_path / "a" / "oe.npz", "--ood", tmp_path / "b" / "ood.npz")
    for name, part in (("a/oe.npz", "train"), ("b/ood.npz", "test")):
        assert np.array_equal(np.load(tmp_path / name)["images"], images[part])
    write("--dataset", "Digits", "--ood", tmp_path / "digits.npz")
    found = np.load(tmp_path / "digits.npz")["images"]
    assert found.dtype == np.uint8
    real = load_dataset("Digits", "data")
    expected = 255 * unit_images(real.images_test)[:, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=0.51)
    with pytest.raises(UserError, match="--oe, --ood: neither is given"):
        write("--dataset", "Digits")


GPU_STAND_IN = """#!/usr/bin/env bash
if [ "$1" = -c ]; then case "$2" in *get_device_name*) echo Stand-in; exit ;; *) exec "$REAL" "$@" ;; esac; fi
printf '%q ' "$@" >> "$NOTES"; echo >> "$NOTES"
for word in "$@"; do
    if [ "$before" = --save_path ]; then mkdir -p "$word/run" && touch "$word/run/args.json"; fi
    before=$word
done
if [ -n "$SLOW" ]; then exec sleep "$SLOW"; fi
exit "${STATUS:-0}"
"""


@pytest.fixture
def gpu_check(tmp_path):
    """Run parts of gpu_check.sh with a stand-in for Python; returns the status, the commands, and the last's steps."""
    stand_in = tmp_path / "python"
    stand_in.write_text(GPU_STAND_IN)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nsleep ${DRIVER:-0}\n")
    for program in (stand_in, tmp_path / "nvidia-smi"):
        program.chmod(0o755)
    notes = tmp_path / "notes"

    def run(*parts, **variables):
        notes.write_text("")
        places = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), "DATA": "place"}
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(stand_in), "NOTES": str(notes)}
        env |= {"REAL": sys.executable, "SLOW": ""}
        command = ["bash", str(ROOT / "scripts" / "dev" / "gpu_check.sh"), *parts]
        done = subprocess.run(command, env=env | places | variables, capture_output=True, text=True, timeout=120)
        found = sorted((tmp_path / "out").glob(f"gpu_check-Stand-in-{parts[-1]}.json"))
        steps = json.loads(found[0].read_text())["steps"] if found else []
        return done.returncode, [shlex.split(line) for line in notes.read_text().splitlines()], steps

    return run


def test_every_part_of_the_gpu_check_gives_flags_that_the_scripts_take(gpu_check):
    status, commands, steps = gpu_check("distil", "dm", "dsa", "expert", "mtt")
    assert status == 0
    assert len(commands) == 4 + 3 + 3 + 1 + 4
    for words in commands:
        args = PARSERS[words[0]].get_args_parser().parse_args(words[1:])
        assert args.device == "cuda"
        assert args.data_path == ("data" if args.dataset == "Digits" else "place")
    assert [step["result"] for step in steps] == ["passed"] * 4
    assert gpu_check("dsa")[1] == []  # it is done
    status, commands, steps = gpu_check("iterations")
    assert (status, len(commands)) == (0, len(steps))
    works = set()
    for script, *words in commands:
        assert script == "scripts/dev/benchmark.py"
        args = benchmark.get_args_parser().parse_args(words)
        assert args.device == "cuda"
        works |= set(args.works)
    assert {"iteration", "stage2", "stage3", "dm", "experts", "mtt", "memory"} == works


def test_a_part_of_the_gpu_check_is_interrupted_and_resumed(gpu_check):
    status, commands, steps = gpu_check("dsa", SLOW="20", LIMIT="1", DRIVER="2.5")  # a driver that loads first
    assert (status, len(commands), steps[0]["result"]) == (0, 1, "interrupted")
    status, commands, steps = gpu_check("dsa")
    assert commands[0][-4:-2] == ["--resume", "latest"]
    assert [words[0] for words in commands] == [
        "main_poe.py", "train_model_synthetic_oe.py", "test_ood_model_syn.py",
    ]  # fmt: skip
    status, commands, steps = gpu_check("dm", STATUS="3")
    assert (status, len(commands), steps[0]["result"]) == (1, 1, "failed")
    assert gpu_check("nothing")[0] == 2


def test_flags_of_cold_starts(monkeypatch, refused):
    """Each script takes those that it is measured with, and one that fails is told of."""
    for name, flags in cold_starts.FLAGS.items():
        parser = PARSERS[name.partition(",")[0]].get_args_parser()
        args = parser.parse_args(shlex.split("--dataset CIFAR10 --model ConvNetW32 " + flags.format(out="out")))
        assert "out" in (getattr(args, "save_path", None), args.buffer_path if name == "train_experts.py" else None)
    failed = subprocess.CompletedProcess([], 2, "", "main_poe.py: error: no such data\n")
    monkeypatch.setattr(cold_starts.subprocess, "run", lambda *args, **kwargs: failed)
    assert "main_poe.py, DSA: exit status 2: main_poe.py: error: no such data" in refused("cold_starts.py")


def test_the_table_of_cold_starts(monkeypatch, in_process):
    """A row for each script: uncompiled, compiled with an empty cache, and with what that left."""
    ran, clock = [], iter(range(100))
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(cold_starts.subprocess, "run", lambda command, **k: ran.append((command, k["env"])) or done)
    monkeypatch.setattr(cold_starts.time, "perf_counter", lambda: next(clock))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    rows = [line for line in in_process("cold_starts.py", "--model", "ConvNet").splitlines() if line.startswith("| ")][
        1:
    ]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [
        [name, "1.0", "1.0", "1.0"] for name in cold_starts.FLAGS
    ]
    flags = [command[command.index("--compile") + 1] for command, _ in ran]
    assert flags == ["off", "on", "on"] * len(cold_starts.FLAGS)
    caches = [env["XDG_CACHE_HOME"] for _, env in ran]
    assert caches[::3] == caches[1::3] == caches[2::3]
    assert len(set(caches)) == len(cold_starts.FLAGS)
    assert not any("TORCHINDUCTOR_CACHE_DIR" in env for _, env in ran)
