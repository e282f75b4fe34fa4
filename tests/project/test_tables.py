"""The tables: what `table.py` plans and runs, with a stand-in for the processes that it starts."""

import importlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import check_inputs
import dataset_outliers
import pytest
from conftest import ROOT

from scripts import runner
from scripts.tables import table
from utils.core.errors import UserError
from utils.methods import METHODS

SCRIPTS = ("main", "main_oe", "main_poe", "train_model_synthetic_no_oe", "train_model_synthetic_oe")
PARSERS = {f"{name}.py": importlib.import_module(name) for name in (*SCRIPTS, "test_ood_model_syn", "train_experts")}
TABLES = ROOT / "scripts" / "tables"
CONFIGS = sorted(path.stem for path in TABLES.glob("*.yaml") if path.stem not in ("defaults", "studies"))
CIFAR = ("cifar10", "--ipc", "1", "--seeds", "1")
THREE = ["main.py", "train_model_synthetic_no_oe.py", "test_ood_model_syn.py"]


@cache
def parser_of(script):
    """The script's own parser."""
    return PARSERS[script].get_args_parser()


def parsed(words):
    """The flags of a command, by the script's own parser."""
    return parser_of(words[0]).parse_args(list(map(str, words[1:])))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `table.py CONFIGS FLAGS` with processes that end at once; returns the exit status and the commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check_inputs, "main", lambda args: None)
    monkeypatch.setattr(table, "check_inputs", check_inputs)
    monkeypatch.setattr(runner, "POLL", 0)

    def run(configs, *flags, fail_at=None, out="out"):
        commands = []

        def start(words, folder, *_):
            commands.append(words)
            if folder is not None:
                (folder / "run").mkdir(parents=True, exist_ok=True)
                (folder / "run" / "args.json").touch()
            return SimpleNamespace(poll=lambda: 130 if len(commands) == fail_at else 0)

        monkeypatch.setattr(runner, "start", start)
        files = [str(TABLES / f"{name}.yaml") for name in configs.split()]
        try:
            table.main(table.get_args_parser().parse_args([*files, "--out", out, *map(str, flags)]))
        except SystemExit as ended:
            return ended.code, commands
        return 0, commands

    return run


def args_of(commands, *scripts):
    """The flags of those commands that run one of these scripts, or any stage."""
    return [parsed(words) for words in commands if words[0] in (scripts or PARSERS)]


def test_a_dry_run_prints_the_commands_that_would_run(run, capsys):
    assert run(*CIFAR, "--kinds", "plain", "--dry_run") == (0, [])
    printed = capsys.readouterr().out.splitlines()
    _, commands = run(*CIFAR, "--kinds", "plain")
    assert [shlex.split(line)[2:] for line in printed[:-1]] == [[*map(str, words)] for words in commands]
    assert printed[-1] == f"# {len(commands)} stages"


@pytest.mark.parametrize("config", ["cifar10", "cifar100", "fashion_mnist", "digits"])
def test_every_stage_of_every_kind(config, run):
    flags = ["--seeds", 4, 5, "--networks", 2, "--set", "stage1.Iteration=7", "stage2.epoch_eval_train=9"]
    status, commands = run(config, "--ipc", 1, 2, *flags)
    assert status == 0
    while commands[0][0] == "scripts/dataset_outliers.py":
        assert config == "digits"
        commands.pop(0)
    assert len(commands) == 2 * (2 * 3 * 3 + 1)
    for args in args_of(commands):
        assert args.ipc in (1, 2)
        assert args.seed in (4, 5)
        assert getattr(args, "Iteration", 7) == 7
    of_oe = [name.replace("no_oe", "oe") for name in THREE[1:]]
    assert [w[0] for w in commands[:9]] == [*THREE, "main_oe.py", *of_oe, "main_poe.py", *of_oe]
    for first, second in pairwise(commands[:9]):
        if "--load_path" in second:
            assert second[second.index("--load_path") + 1] == first[first.index("--save_path") + 1]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_commands_in_the_head_of_a_config(config, run):
    """Each gives stages that the scripts take; that of a trial sets what it says, and is not taken for the table."""
    text = (TABLES / f"{config}.yaml").read_text()
    lines = [
        shlex.split(line) for line in re.findall(r"^#   python scripts/tables/table\.py (.+)$", text, re.MULTILINE)
    ]
    assert len(lines) >= 2
    for words in lines:
        files = [Path(word).stem for word in words if word.endswith(".yaml")]
        rest = [word for word in words if not word.endswith(".yaml")]
        assert config in files
        status, commands = run(" ".join(files), *rest)
        assert status == 0
        assert args_of(commands)
    assert "result-tables/try-" in rest[rest.index("--out") + 1]
    said = " ".join(" ".join(words) for words in commands)
    assert all(word.partition("=")[2] in said for word in rest[rest.index("--set") + 1 :])


def documented() -> list:
    """Each command of a table in a document that has no variables of the shell: its words behind the script."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"python scripts/tables/table\.py ([^`\n$]+)(?:`|$)", text, re.MULTILINE):
            found.append(pytest.param(shlex.split(line), id=f"{page.name} {line[:60]}"))
    return found


@pytest.mark.parametrize("words", documented())
def test_a_command_of_a_document_gives_stages_that_the_scripts_take(words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert table.plan(table.get_args_parser().parse_args(words), tmp_path)[1]


def test_what_is_done_is_skipped_and_what_was_stopped_goes_on(run, tmp_path):
    flags = (*CIFAR, "--kinds", "plain", "poe")
    status, commands = run(*flags, fail_at=2)
    assert (status, [w[0] for w in commands]) == (130, THREE[:2])
    for changed in ("stage2.epoch_eval_train=7", "stage2.epoch_eval_train="):  # the stopped stage would go on as it was
        with pytest.raises(UserError, match=r"seed1 was made with other flags: --epoch_eval_train 1000; now it has"):
            run(*flags, "--set", changed)
    status, commands = run(*flags)
    assert status == 0
    assert commands[0][0] == THREE[1]
    assert commands[0][-2:] == ["--resume", "latest"]
    names = ["main_poe.py", "train_model_synthetic_oe.py", "test_ood_model_syn.py", "scripts/compare.py"]
    assert [w[0] for w in commands[1:]] == ["test_ood_model_syn.py", *names]
    assert [w[0] for w in run(*flags)[1]] == ["scripts/compare.py"]
    (tmp_path / "out/ipc1/poe/seed1/3-ood/done").write_text("")  # not written to its end
    assert [w[0] for w in run(*flags)[1]] == names[2:]
    shutil.rmtree(tmp_path / "out/ipc1/poe/seed1/1-distilled")  # nothing needs it any more
    assert [w[0] for w in run(*flags)[1]] == names[3:]
    shutil.rmtree(tmp_path / "out/ipc1/poe/seed1/3-ood")
    assert [w[0] for w in run(*flags)[1]] == names[2:]


@pytest.mark.parametrize("gone", ["", "1-distilled", "2-networks"])
def test_what_was_made_with_other_settings_is_not_taken_for_done(run, tmp_path, gone):
    """Nor is a stage that was made from another."""
    flags = (*CIFAR, "--kinds", "plain")
    assert run(*flags)[0] == 0
    if gone:
        shutil.rmtree(tmp_path / "out/ipc1/plain/seed1" / gone)
    with pytest.raises(
        UserError, match=r"seed1 was made with other flags: --Iteration 1000; now it has --Iteration 7\."
    ):
        run(*flags, "--set", "stage1.Iteration=7")


def test_a_setting_that_another_stage_still_has_is_missed(run):
    """Stages 1 and 2 of the digits train for 300 epochs; a stage that does no longer is not taken for done."""
    flags = ("digits", "--ipc", 1, "--seeds", 1, "--kinds", "plain")
    assert run(*flags)[0] == 0
    with pytest.raises(UserError, match=r"other flags: --epoch_eval_train 300; now it has none\."):
        run(*flags, "--set", "stage2.epoch_eval_train=")


def test_seeds_of_one_table_are_measured_alike(run):
    """A later seed with another setting would be averaged with the earlier one."""
    flags = ("digits", "--ipc", 1, "--kinds", "plain")
    assert run(*flags, "--seeds", 1)[0] == 0
    assert run(*flags, "--seeds", 2)[0] == 0
    with pytest.raises(
        UserError, match=r"plain/seed1 was made with other flags: --Iteration \d+; now .*--Iteration 7\."
    ):
        run(*flags, "--seeds", 3, "--set", "stage1.Iteration=7")


def test_seeds_may_lie_in_a_folder_with_a_space(tmp_path):
    """Their commands differ in nothing else."""
    args = table.get_args_parser().parse_args(["scripts/tables/digits.yaml", "--ipc", "1", "--seeds", "1", "2"])
    stages = [s for s in table.plan(args, tmp_path / "a b")[1] if s.command[0] == "test_ood_model_syn.py"]
    one, two = (re.sub(table.PLACES, "", s.text) for s in stages if "/plain/" in str(s.folder))
    assert one == two


@pytest.mark.parametrize("method", ["DM", "MTT"])
def test_other_methods(run, method):
    more = ["experts.num_experts=3", "stage1.syn_steps=9", "all.precision=bf16"] if method == "MTT" else []
    status, commands = run(*CIFAR, "--method", method, "--set", *(more or ["all.precision=bf16"]))
    assert status == 0
    stages = args_of(commands, *(set(PARSERS) - {"train_experts.py"}))
    assert {args.method for args in stages} == {method}
    mains = [args for args in stages if hasattr(args, "Iteration")]
    assert {args.Iteration for args in mains} == {20000 if method == "DM" else 5000}
    experts = args_of(commands, "train_experts.py")
    assert {args.precision for args in (*stages, *experts)} == {"bf16"}
    found = [(args.outliers, args.num_experts) for args in experts]
    assert found == ([("none", 3), ("oe", 3), ("poe", 3)] if method == "MTT" else [])
    for before, args in zip(experts, mains, strict=False):
        assert (args.buffer_path, args.syn_steps) == (before.buffer_path, 9)
    if method == "MTT":  # sets of other experts are not taken for done
        with pytest.raises(UserError, match="made with other flags: --num_experts 3"):
            run(*CIFAR, "--method", method, "--set", *more, "experts.num_experts=4")


@pytest.mark.parametrize(("changed", "factor"), [((), 2), (("stage1.factor=1",), 1)])
def test_real_images_take_the_storage_of_distilled_ones(run, changed, factor):
    """The images of TGDD hold four parts by default, and a coreset of a table as many."""
    kinds = ("--kinds", "plain", "random", "kcenter-corrupt", "whole")
    status, commands = run("cifar10-tgdd-ipc10", *kinds, *(("--set", *changed) if changed else ()))
    assert status == 0
    trained = args_of(commands, "train_model_synthetic_no_oe.py", "train_model_synthetic_oe.py")
    found = {args.train_on: args.factor for args in trained}
    assert found.pop("distilled") == found.pop("whole") == 1  # of their own
    assert found == {"random": factor, "kcenter": factor}


def test_each_corruption_alone(run):
    _, commands = run("digits corruptions", "--seeds", 1, 2)
    corruptions = [args.corruptions for args in args_of(commands, "main_poe.py")]
    assert len(corruptions) == 2 * 8
    assert len({*map(tuple, corruptions)}) == 8


def test_other_weights_of_outliers(run):
    kinds = ["plain", "plain-initial", "poe", "poe-corrupt", "poe-none", "random", "random-corrupt", "whole-corrupt"]
    status, commands = run("digits", "--ipc", 2, "--seeds", 1, 2, "--kinds", *kinds, "--lambdas", 0.25, 2)
    assert status == 0
    *again, study = commands[next(i for i, w in enumerate(commands) if "/lambda-" in " ".join(w)) :]
    found = []
    for args in map(parsed, again):
        kind, seed, stage = args.save_path.split("/")[-3:]
        weight = args.save_path.split("/lambda-")[1].split("/")[0]
        found.append((weight, kind, seed, stage))
        if stage == "2-networks":
            assert (args.lambda_oe, args.seed) == (float(weight), int(seed[4:]))
            distilled = f"out/ipc2/{kind.split('-')[0]}/{seed}/1-distilled"
            assert args.load_path == (None if kind == "random-corrupt" else distilled)
        else:
            assert args.load_path == args.save_path.replace("3-ood", "2-networks")
    with_outliers = ("plain-initial", "poe", "poe-corrupt", "random-corrupt")
    cells = [(w, k, s) for w in ("0.25", "2") for s in ("seed1", "seed2") for k in with_outliers]
    assert found == [(*cell, stage) for cell in cells for stage in ("2-networks", "3-ood")]
    assert [word.rsplit("/", 1)[1] for word in study[1:3]] == ["lambda-0.25", "lambda-2"]
    assert study[study.index("--prefixes") + 1 :][:2] == ["0.25", "2"]
    _, commands = run("digits", "--ipc", 1, "--seeds", 1, "--kinds", "plain", "--lambdas", 2, out="plain")
    assert not any("lambda-" in " ".join(words) for words in commands)


def test_further_detectors(run):
    """Not of the whole training set; and no temperature is fitted on images that the networks were trained on."""
    kinds = ("digits", "--ipc", 2, "--seeds", 1, "--kinds", "plain", "poe", "whole", "--set", "stage3.compile=off")
    _, commands = run(*kinds, "--detectors", "knn", "tscaling", "react")
    again = [parsed(words) for words in commands if "/fit-" in " ".join(words)]
    scores = {"distilled": ("knn", "react"), "real": ("knn", "tscaling", "react")}
    expected = [(fit, kind) for fit in ("distilled", "real") for kind in ("plain", "poe")]
    for args, (fit, kind) in zip(again, expected, strict=True):
        assert (args.score, args.fit_on, args.compile) == (scores[fit], fit, "off")
        assert f"/ipc2/fit-{fit}/{kind}/seed1/3-ood" in args.save_path
        assert args.load_path.endswith(f"ipc2/{kind}/seed1/2-networks")
    _, commands = run(*kinds, "--detectors", "tscaling", out="other")
    assert sum("/fit-" in " ".join(w) for w in commands) == 2


def test_inputs_are_checked_before_the_first_stage(run, monkeypatch):
    seen = []

    def refuse(args):
        raise UserError(f"{args.dataset} {args.oe_data_path} {args.download} {' '.join(args.ood_sets)}")

    monkeypatch.setattr(check_inputs, "main", refuse)
    sets = "Textures Places365 TinyImageNet_resize LSUN_resize CIFAR100"
    with pytest.raises(UserError, match=rf"^CIFAR10 pool.npy all {sets}$"):
        run("cifar10", "--set", "all.download=all", "oe.oe_data_path=pool.npy")
    with pytest.raises(UserError, match=r"^CIFAR10 None data "):
        run("cifar10", "--kinds", "plain")
    monkeypatch.setattr(check_inputs, "main", lambda args: seen.append((args.skip_missing, args.pixel_max)))
    run(*CIFAR, "--kinds", "plain", out="bright")
    run(*CIFAR, "--kinds", "plain", "--set", "stage3.skip_missing=true", "all.pixel_max=15", out="dark")
    assert seen == [(False, None), (True, 15)]
    monkeypatch.setattr(check_inputs, "main", lambda args: None)
    assert {args.download for args in args_of(run(*CIFAR, "--set", "all.download=all")[1])} == {"all"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kinds", "plain", "plane"], "--kinds: unknown kind 'plane'; did you mean plain"),
        *((["--kinds", kind], f"unknown kind '{kind}'") for kind in (
            "plain-distilled", "poe-distilled", "whole-", "whole-initial", "plain-again", "poe-corrupt-again",
        )),
        (["--set", "stage=1"], "unknown value 'stage'; did you mean stage"),
        (["--set", "stage1=1"], "stage1: 1 is no section"),
        (["--set", "stage1.Iteration"], "--set: 'stage1.Iteration' has no value"),
        (["--set", "recipes.a.stag1.Iteration=1"], "unknown value in recipes.a 'stag1'; did you mean stage1"),
        (["--set", "methods.DM.stag1.Iteration=1"], "unknown value in methods.DM 'stag1'; did you mean stage1"),
        (["--set", "recipes.a=1"], "recipes.a: 1 is no section"),
        (["--set", "recipes=1"], "recipes: 1 is no section"),
        (["--set", "methods=DM"], "methods: DM is no section"),
    ],
)  # fmt: skip
def test_a_wrong_value(run, flags, message):
    with pytest.raises(UserError, match=message):
        run("cifar10", *flags)


def test_a_config_that_gives_a_value_twice(run, tmp_path):
    (tmp_path / "own.yaml").write_text("stage1: {Iteration: 3, Iteration: 4}\n")
    with pytest.raises(UserError, match=r"CONFIG: cannot read .*own\.yaml: it gives Iteration twice; give each once"):
        run(f"cifar10 {tmp_path / 'own'}", *CIFAR[1:])


def test_a_recipe_has_what_its_method_has(run, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "methods: {DM: {stage1: {Iteration: 70}}, DSA: }\nrecipes:\n  dm: {method: DM}\n  usual:\n"
    )
    flags = (*CIFAR[1:], "--kinds", "plain")
    _, commands = run(f"cifar10 {tmp_path / 'own'}", *flags)
    assert [(a.method, a.Iteration) for a in args_of(commands, "main.py")] == [("DM", 70), ("DSA", 1000)]
    (study,) = [words for words in commands if words[0] == "scripts/study.py"]
    assert study[1:3] == ["out/dm/ipc1", "out/usual/ipc1"]
    # recipes with other OOD sets have no means that compare
    _, commands = run(f"cifar10 {tmp_path / 'own'}", *flags, "--set", "recipes.dm.stage3.ood_sets=blob", out="other")
    assert not [words for words in commands if words[0] == "scripts/study.py"]


def test_the_study_of_recipes_has_the_kinds_and_ipc_of_each(run, tmp_path):
    (tmp_path / "own.yaml").write_text("recipes: {a: {}, b: {kinds: plain poe poe-again, ipc: 1 2}}")
    _, commands = run(f"cifar10 {tmp_path / 'own'}", "--seeds", "01")
    studies = [words for words in commands if words[0] == "scripts/study.py"]
    assert [words[-1] for words in studies] == [f"out/study-ipc{ipc}.md" for ipc in (1, 10, 50, 2)]
    assert studies[0][1:3] == ["out/a/ipc1", "out/b/ipc1"]
    assert "poe-again" in studies[0]
    assert studies[1][1:3] == ["out/a/ipc10", "--prefixes"]
    assert studies[3][1:2] == ["out/b/ipc2"]
    assert {args.save_path.split("/")[-2] for args in args_of(commands, "main_poe.py")} == {"seed1"}  # not seed01, too


@pytest.mark.parametrize("method", ["TGDD", "MTT"])
def test_experts_are_those_that_the_method_would_train(run, method):
    _, commands = run(*CIFAR, "--method", method, "--kinds", "poe", "--set", "stage1.max_experts=3")
    (distils,), (experts,) = args_of(commands, "main_poe.py"), args_of(commands, "train_experts.py")
    wanted = METHODS[method].own(distils).of_experts()
    assert wanted.num_experts == 3
    usual = {"TGDD": (0.9, 0.02, 12), "MTT": (0.0, 0.01, 50)}  # METHODS sections 3 and 6
    assert (wanted.mom, wanted.lr_teacher, wanted.train_epochs) == usual[method]
    assert replace(experts, buffer_path="") == replace(wanted, buffer_path="")


def test_what_is_missing_in_any_recipe_is_told_first(run, monkeypatch, tmp_path):
    """Inputs of each, and the library of a score."""
    (tmp_path / "own.yaml").write_text("recipes: {a: {}, b: {all: {dataset: CIFAR100}, stage3: {score: vim}}}")
    looked = []
    monkeypatch.setattr(check_inputs, "main", looked.append)
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    with pytest.raises(UserError, match="--score vim: needs the package pytorch-ood"):
        run(f"cifar10 {tmp_path / 'own'}", *CIFAR[1:], "--kinds", "plain")
    assert [args.dataset for args in looked] == ["CIFAR10", "CIFAR100"]


def test_a_flag_that_a_script_does_not_know(run, capsys):
    assert run("cifar10", "--set", "stage2.epochs=3") == (2, [])
    message = "table.py: train_model_synthetic_no_oe.py: error: unrecognized arguments: --epochs 3"
    assert message in capsys.readouterr().err


def test_a_path_with_a_space(run):
    _, commands = run(*CIFAR, "--kinds", "plain", "--set", "all.data_path='a b'", out="o u t")
    assert {args.data_path for args in args_of(commands)} == {"a b"}
    assert all(args.save_path.startswith("o u t/ipc1") for args in args_of(commands))


@pytest.mark.parametrize(
    ("kinds", "sets", "pool", "made"),
    [
        ("oe", "patches", "data/oe/FashionMNIST.npz", "oe"),
        ("oe", "patches", "mine.npz", ""),  # a pool of one's own is never made
        ("plain", "FashionMNIST", "data/oe/FashionMNIST.npz", "ood"),
        ("poe", "blob", "data/oe/FashionMNIST.npz", ""),
    ],
)
def test_files_of_digits_are_made_where_they_are_used(run, kinds, sets, pool, made):
    values = [f"stage3.ood_sets={sets}", "all.download=none", f"oe.oe_data_path={pool}"]
    _, commands = run("digits", "--ipc", 1, "--seeds", 1, "--kinds", kinds, "--set", *values)
    makes = [words for words in commands if words[0] == "scripts/dataset_outliers.py"]
    assert len(makes) == bool(made)
    for words in makes:
        args = dataset_outliers.get_args_parser().parse_args(words[1:])
        assert (args.download, args.oe is not None, args.ood is not None) == ("none", made == "oe", made == "ood")


@pytest.mark.parametrize("method", ["DSA", "DM", "MTT"])
def test_all_recipes_of_outliers(run, method):
    """Every recipe of a method gives commands that are accepted."""
    flags = ["--ipc", 2, "--seeds", 4, "--kinds", "poe", "poe-corrupt", "poe-again"]
    status, commands = run("digits outliers", "--method", method, *flags)
    assert status == 0
    distilled = args_of(commands, "main_poe.py")
    recipes = {(a.init_oe, a.clamp_oe, a.mix_corruptions, a.spread_oe, a.expert_lambda_oe) for a in distilled}
    assert len(recipes) == len(distilled) == (4 if method == "MTT" else 5)
    mixed = {args.save_path.split("/")[1]: args.mix_corruptions for args in distilled}
    for args in args_of(commands, "train_model_synthetic_oe.py"):
        other = args.outliers == "corrupt" or args.corrupt_again
        assert args.mix_corruptions == (other and mixed[args.save_path.split("/")[1]])
    weights = {args.buffer_path: args.lambda_oe for args in args_of(commands, "train_experts.py")}
    assert sorted(weights.values()) == ([0.5, 2] if method == "MTT" else [])
    for args in distilled if method == "MTT" else []:  # the experts are those that the recipe wants
        assert weights[args.buffer_path] == (args.expert_lambda_oe or args.lambda_oe)
    (study,) = [words for words in commands if words[0] == "scripts/study.py"]
    assert study[study.index("--base") + 1] == "poe"
    assert study[study.index("--prefixes") + 1 : study.index("--kinds")] == [*mixed]
    with pytest.raises(UserError, match=f"--recipes: with --method {method}, unknown recipe 'nothing'"):
        run("digits outliers", "--method", method, "--recipes", "nothing")


def test_rows_of_baselines_and_of_outliers_that_are_not_distilled(run):
    kinds = [
        "poe-corrupt",
        "oe-initial",
        "plain-kcenter",
        "random",
        "random-real",
        "whole",
        "whole-corrupt",
        "poe-again",
    ]
    kinds.append("oe-initial-again")
    values = ["stage2.epoch_eval_train=9", "whole.epoch_eval_train=3"]
    status, commands = run("cifar10", "--ipc", 1, 2, "--seeds", 4, "--kinds", *kinds, "--set", *values)
    assert status == 0
    rows = {}
    for args in args_of(commands, "train_model_synthetic_oe.py", "train_model_synthetic_no_oe.py"):
        *_, ipc, kind, _, _ = args.save_path.split("/")
        args = vars(args) | {"oe_data_path": bool(args.oe_data_path)}
        names = ("train_on", "outliers", "corrupt_again", "oe_data_path", "epoch_eval_train", "load_path")
        rows[ipc, kind] = tuple(args.get(name) for name in names)
    source = {images: f"out/ipc2/{images}/seed4/1-distilled" for images in ("poe", "oe", "plain")}
    expected = {
        "poe-corrupt": ("distilled", "corrupt", False, False, 9, source["poe"]),
        "oe-initial": ("distilled", "initial", False, True, 9, source["oe"]),
        "plain-kcenter": ("distilled", "kcenter", False, False, 9, source["plain"]),
        "random": ("random", "none", False, False, 9, None),
        "random-real": ("random", "real", False, False, 9, None),
        "poe-again": ("distilled", "distilled", True, False, 9, source["poe"]),
        "oe-initial-again": ("distilled", "initial", True, True, 9, source["oe"]),
    }
    assert {kind: row for (ipc, kind), row in rows.items() if ipc == "ipc2"} == expected
    assert [kind for ipc, kind in rows if ipc == "out"] == ["whole", "whole-corrupt"]  # they do not depend on ipc
    assert rows["out", "whole"][:1] + rows["out", "whole"][4:5] == ("whole", 3)
    assert [w[0] for w in commands].count("main_poe.py") == 2
    columns = [words for words in commands if words[0] == "scripts/compare.py"]
    assert [sum(word.endswith("out/whole") for word in words) for words in columns] == [1, 1]


def test_a_real_table_is_stopped_and_resumed(forks, tmp_path):
    """On Digits: a signal while it distils, and the same command again."""
    command = [forks.python, TABLES / "table.py", TABLES / "digits.yaml", TABLES / "digits-studies.yaml", "--jobs", 2]
    command += ["--ipc", 1, "--seeds", 1, "--networks", 1, "--kinds", "poe", "--out", "out", "--set", "all.model=MLP"]
    command += ["all.compile=off", "stage1.epoch_eval_train=2", "stage2.epoch_eval_train=2", "stage1.Iteration=150"]
    command += ["stage1.batch_real=16", "outliers.batch_oe=16"]
    command = [*map(str, command), "stage3.ood_sets=uniform"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    folder = tmp_path / "out/ipc1/poe/seed1"
    end = time.monotonic() + 120
    while time.monotonic() < end and not [*folder.glob("1-distilled/**/metrics.jsonl")]:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert "$ python main_poe.py" in first.communicate(timeout=120)[0]
    assert first.returncode == 128 + signal.SIGTERM
    assert not (folder / "2-networks").exists()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("--resume latest") == 1
    assert "resume" in (folder / "1-distilled.log").read_text()
    assert "| poe" in (tmp_path / "out/ipc1/table/compare.md").read_text()
    assert "<th>poe</th>" in (tmp_path / "out/ipc1/table/compare.html").read_text()
