"""The command line: help, both spellings of every flag, and every error as users see it."""

import importlib
import io
import json
import os
import subprocess
import sys

import make_flags
import numpy as np
import pytest
import torch
from conftest import ROOT

import main as stage1
import main_oe
import main_poe
import test_ood_model_syn
import train_experts
import train_model_synthetic_no_oe
import train_model_synthetic_oe
from utils.core.errors import print_line
from utils.core.run_script import run_script
from utils.methods import METHODS, MethodInputs
from utils.settings.fields import as_dict, as_words, flags_of, groups_of
from utils.settings.parser import Parser

SCRIPTS = {
    "main.py": stage1,
    "main_oe.py": main_oe,
    "main_poe.py": main_poe,
    "train_model_synthetic_oe.py": train_model_synthetic_oe,
    "train_model_synthetic_no_oe.py": train_model_synthetic_no_oe,
    "test_ood_model_syn.py": test_ood_model_syn,
}
DSA = ["--method", "DSA", "--dsa_strategy", "color_crop_cutout_scale_rotate"]
QUICK = ["--dataset", "Digits", "--model", "ConvNetD1", *DSA]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys):
    parser = SCRIPTS[name].get_args_parser()
    printed = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([flag])
        assert stopped.value.code == 0
        printed[flag] = capsys.readouterr().out
    short = printed["--help"].splitlines()
    assert len(short) <= 40
    assert short[2].startswith(f"    python {name} --")  # an example
    assert "(default: None)" not in printed["--help-all"]
    assert {"--dataset", "--model", "--ipc", "--method", "--save_path"} <= {w for line in short for w in line.split()}
    for action in parser._actions:
        if action.help != "==SUPPRESS==":
            assert action.help, f"{action.dest} has no help text"
            assert action.option_strings[-1] in printed["--help-all"]


def test_help_from_a_real_process(script):
    result = script("main_poe.py", "--help")
    assert result.returncode == 0
    assert "--corruptions" in result.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_spellings(name):
    parser = SCRIPTS[name].get_args_parser()
    usual = parser.settings()
    for action in parser._actions:
        flag = action.option_strings[-1]
        if "_" not in flag or action.help == "==SUPPRESS==":
            continue
        value = [] if action.nargs == 0 else ["3"]
        if action.choices or (action.type not in (None, int, float) and "3" not in flag):
            value = value and [_valid(action.dest, getattr(usual, action.dest))]
        users = [m for m, e in METHODS.items() if action.dest in {f.name for f in flags_of(e.settings)}]
        users = [m for m in users if action.dest not in METHODS[m].unused]
        method = ["--method", users[0]] if users else []
        if action.dest == "method_file":  # it must be there: see tests/unit/methods/test_methods.py
            continue
        both = (flag, flag[:2] + flag[2:].replace("_", "-"))
        with_it = COMPANIONS.get((action.dest, name), COMPANIONS.get(action.dest, []))
        spelled = [vars(parser.parse_args([*method, *with_it, f, *value])) for f in both]
        assert spelled[0] == spelled[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_of_a_file_are_those_of_the_command_line(name, tmp_path):
    """Every flag that differs from its default, written by the program and read back from `--config`."""
    words = ["--dataset", "Digits", "--model=MLP", "--ipc", "3", "--seed", "7", "--zca", "--dsa_strategy", "crop_scale"]
    words = words[:-2] if name.startswith("test_ood") else words
    parse = SCRIPTS[name].get_args_parser
    settings = parse().parse_args(words)
    (tmp_path / "flags.json").write_text(json.dumps({"flags": as_dict(settings)}))
    expected = vars(settings)
    found = vars(parse().parse_args(["--config", str(tmp_path / "flags.json")]))
    assert found == expected
    over = vars(parse().parse_args(["--ipc=4", "--config", str(tmp_path / "flags.json"), "--model", "LeNet"]))
    assert over == expected | {"ipc": 4, "model": "LeNet"}


WRITTEN = {
    "main.py": [
        "",
        "--seed 0 --Iteration 0",
        "--method TGDD --ce_weight 0",
        "--method DM --lr_img 0.1 --Iteration 1000",
        "--method MTT --lr_lr 3e-7 --max_experts 2",
        "--method TGDD --feature_distance cf --cf_frequencies 9 --eval_mode M",
    ],
    "main_oe.py": [
        "--lambda_oe 0",
        "--oe_data_path=-pool.npz --lambda_oe 2",
        "--eval_ood patches blob --ood_path a --zca",
    ],
    "main_poe.py": [
        "--method MTT --expert_lambda_oe 2",
        "--corruptions invert jigsaw --mix_corruptions --init_oe kcenter --init real --spread_oe 1e-5",
    ],
    "train_model_synthetic_oe.py": [
        "--distilled a.pt b.pt --dsa_strategy crop --distilled_mean -0.5 1e-3 0 --distilled_std 1 2 3",
        "--distilled a.pt --dsa_strategy crop --method DC --ipc 1",
        "--train_on random --outliers real --oe_data_path pool.npz --num_oe_per_class 3",
    ],
    "train_model_synthetic_no_oe.py": ["--train_on whole", "--folder=-name --load_path r --num_eval 20"],
    "test_ood_model_syn.py": ["--score msp energy --T 2 -x", "--ood_sets a b --download all -v --precision bf16"],
    "train_experts.py": ["--outliers poe --corruptions invert", "--outliers oe --decay --mom 0.9"],
}


@pytest.mark.parametrize(("name", "flags"), [(name, flags) for name, lines in WRITTEN.items() for flags in lines])
def test_settings_that_are_written_and_read_are_equal(name, flags, tmp_path):
    """As words of a command line, and as the flags of a file."""
    parse = (SCRIPTS | {"train_experts.py": train_experts})[name].get_args_parser
    settings = parse().parse_args(flags.split())
    assert parse().parse_args(as_words(settings)) == settings
    (tmp_path / "flags.json").write_text(json.dumps({"flags": as_dict(settings)}))
    assert parse().parse_args(["--config", str(tmp_path / "flags.json")]) == settings
    assert flags or not [word for word in as_words(settings) if word.startswith("--")][4:]  # what names the run


def test_of_a_flag_that_is_given_twice_the_last_one_counts():
    words = ["--corruptions", "jigsaw", "invert", "--corruptions", "invert", "--outliers", "corrupt"]
    parse = SCRIPTS["train_model_synthetic_oe.py"].get_args_parser().parse_args
    assert parse(words).corruptions == ("invert",)
    both = parse(["--distilled", "a.pt", "--distilled", "b.pt"])  # but the files of one set may be named one by one
    assert both.distilled == ("a.pt", "b.pt")


def test_yaml_knows_on_and_off(tmp_path):
    (tmp_path / "a.yaml").write_text("compile: off\nipc: 3\nzca: yes\nclamp_oe: no\n")
    found = SCRIPTS["main_poe.py"].get_args_parser().parse_args(["--config", str(tmp_path / "a.yaml")])
    assert (found.compile, found.ipc, found.zca, found.clamp_oe) == ("off", 3, True, False)


def test_yaml_is_read_as_a_command_line_is(tmp_path):
    """Digits, dates and zeros of a text are kept; an octal number is none."""
    text = "save_path: 2024_11_01\nload_path: 2024-02-30\nseed: 010\nlambda_oe: 1e-3\ndsa_strategy: None\n"
    (tmp_path / "a.yaml").write_text(f"{text}eval_ood: patches\nim_size: null\n")
    found = main_poe.get_args_parser().parse_args(["--config", str(tmp_path / "a.yaml")])
    assert (found.save_path, found.load_path, found.seed) == ("2024_11_01", "2024-02-30", 10)
    assert (found.lambda_oe, found.dsa_strategy, found.eval_ood, found.im_size) == (1e-3, None, ("patches",), None)


def test_a_default_in_a_file_is_that_of_the_method(tmp_path):
    """One of another method is a choice; one that has no effect here is none."""
    parse = stage1.get_args_parser().parse_args
    (tmp_path / "a.yaml").write_text("lr_img: 0.1\nIteration: 2000\nsyn_steps: 30\nbatch_oe: 256\n")
    found = parse(["--method", "TGDD", "--config", str(tmp_path / "a.yaml")])
    assert found == parse(["--method", "TGDD", "--lr_img", "0.1"])
    assert found.lr_img == stage1.get_args_parser().settings().lr_img


def test_the_flags_of_a_run_for_a_sister_script_or_another_method(tmp_path):
    """Not taken over: what had no effect there, the defaults of its method, and where that script writes."""
    path = tmp_path / "args.json"

    def stored(script, *words):
        settings = SCRIPTS[script].get_args_parser().parse_args(words)
        path.write_text(json.dumps({"script": script, "flags": as_dict(settings)}))

    def parsed(script, *words):
        parser = SCRIPTS[script].get_args_parser()
        parser.prog = script
        return parser.parse_args([*words, "--config", str(path)])

    stored("main.py", "--method", "TGDD", "--Iteration", "7", "--batch_real", "9")
    expected = main_poe.get_args_parser().parse_args(["--method", "TGDD", "--Iteration", "7", "--batch_real", "9"])
    assert parsed("main_poe.py") == expected
    assert (expected.batch_oe, expected.save_path) == (128, "result-poe")
    stored("main.py", "--method", "DM", "--Iteration", "7")
    found = parsed("main.py", "--method", "TGDD")
    assert found == stage1.get_args_parser().parse_args(["--method", "TGDD", "--Iteration", "7"])
    stored("main.py", "--save_path", "mine")
    assert parsed("main.py", "--method", "MTT").save_path == "mine"
    plain = stage1.get_args_parser().parse_args(["--method", "TGDD"])
    older = {f.name: getattr(plain, f.name) for f in flags_of(type(plain))}  # held all flags
    path.write_text(json.dumps({"script": "main.py", "flags": older}))
    assert older["batch_oe"] == 256
    assert parsed("main.py") == plain
    expected = stage1.get_args_parser().parse_args(["--method", "TGDD", "--published"])
    assert (parsed("main.py", "--published"), expected.Iteration) == (expected, 10000)
    path.write_text(json.dumps({"flags": {"compile": False, "moments_oe": 1}}))
    assert parsed("main.py").compile == "off"
    published = stage1.get_args_parser().parse_args(["--method", "TGDD", "--published", "--Iteration", "2000"])
    assert stage1.get_args_parser().parse_args(as_words(published)) == published


def test_a_file_of_flags_that_cannot_be(tmp_path, refused):
    (tmp_path / "a.json").write_text('{"ipcs": 3}')
    assert "--config: a.json has a flag that main.py does not know: --ipcs=3" in refused(
        "main.py", "--config", "a.json"
    )
    (tmp_path / "b.json").write_text("[1]")
    assert "--config: b.json" in refused("main.py", "--config", "b.json")
    assert "--config: c.json is not there" in refused("main.py", "--config=c.json")
    (tmp_path / "d.yaml").write_text("ipc: 3\nlr-img: 1\nlr_img: 2\n")
    assert "d.yaml: it gives lr_img twice; give each once" in refused("main.py", "--config", "d.yaml")
    (tmp_path / "e.yaml").write_text("ipc: [1, 10]")
    told = "--config: e.yaml has --ipc=['1', '10']; give one value"
    assert told in refused("main.py", "--config", "e.yaml")
    (tmp_path / "f.yaml").write_text("method_file: my_dm.py")
    told = "--config: f.yaml names --method_file my_dm.py, which is code; give that flag on the command line"
    assert told in refused("main.py", "--config", "f.yaml")
    (tmp_path / "g.yaml").write_text("[" * 5000)
    assert "--config: cannot read g.yaml" in refused("main.py", "--config", "g.yaml")


def test_help_shows_what_a_default_is(capsys):
    """Also 0; and a percent sign is one, in the help of any flag."""
    parser = Parser(description="A script.")
    parser.add_argument("place", help="100 % of it")
    parser.add_argument("--share", type=float, default=0.0, help="in %")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "100 % of it\n" in shown
    assert "in % (default: 0.0)" in shown


def test_the_page_of_flags_names_every_flag():
    """In each script that has it, in the group that declares it."""
    text = make_flags.page()
    for name in make_flags.SCRIPTS:
        parser = importlib.import_module(name).get_args_parser()
        for group, own in groups_of(parser.settings).items():
            for f in own:
                if f.name not in parser.hidden:
                    section = text.partition(f"\n## {group.__doc__.split('.')[0]} (")[2].partition("\n## ")[0]
                    assert f"| `--{f.name}" in section, (name, f.name)


FOREIGN = ["--distilled", "set.pt"]
MAINS = ("main.py", "main_oe.py", "main_poe.py")
OTHERS = "train_model_synthetic_oe.py"
COMPANIONS = {  # without which a flag would have no effect; by flag, or by flag and script
    **dict.fromkeys(("distilled_format", "distilled_space", "distilled_factor", "distilled_oe"), FOREIGN),
    **dict.fromkeys(("soft_labels", "label_temperature"), FOREIGN),
    "distilled_mean": [*FOREIGN, "--distilled_std", "1"],
    "distilled_std": [*FOREIGN, "--distilled_mean", "1"],
    **{("ood_path", name): ["--eval_ood", "patches"] for name in MAINS},
    "cf_frequencies": ["--feature_distance", "cf"],
    **{(flag, OTHERS): ["--outliers", "real"] for flag in ("oe_data_path", "mix_corruptions")},
    ("num_oe_per_class", OTHERS): ["--outliers", "real", "--oe_data_path", "pool.npz"],
}
VALID = {
    "fit_on": "real",
    "dsa_strategy": "crop_scale",
    "distilled_format": "mtt",
    "distilled_space": "unit",
    "soft_labels": "logits",
}


def _valid(name, default) -> str:
    """A value that a flag accepts, from its default."""
    default = default[0] if isinstance(default, tuple) else default
    return VALID.get(name) or str(default if default is not None else 3)


def test_values_of_flags_keep_their_dashes():
    args = main_poe.get_args_parser().parse_args(["--corruptions", "gauss-speckle", "--save-path=a-b_c"])
    assert (args.corruptions, args.save_path) == (("gauss-speckle",), "a-b_c")


STRATEGY = "color_crop_cutout_flip_scale_rotate"
PATHS = "--load-path a --save-path b --data-path c"
DOCUMENTED = {  # as people type them
    "main.py": f"--dataset CIFAR10 --model ConvNet --num_exp 3 --num_eval 5 --ipc 10 --init real --method DSA "
    f"--dsa_strategy {STRATEGY}",
    "main_oe.py": f"--dataset CIFAR10 --model ConvNet --num_exp 1 --num_eval 5 --ipc 10 --init real --method DSA "
    f"--dsa_strategy {STRATEGY} --seed 1 --lambda_oe 0.5 --num_oe_per_class 10000 --batch_real 256 --batch_oe 256",
    "main_poe.py": f"--dataset CIFAR10 --model ConvNet --num_exp 1 --num_eval 5 --ipc 10 --init real --method DSA "
    f"--dsa_strategy {STRATEGY} --seed 1 --lambda_oe 0.5 --batch_real 256 --batch_oe 256",
    "train_model_synthetic_no_oe.py": "--method DSA --dataset CIFAR100 --model ConvNet --num_eval 5 --ipc 20 "
    f"--dsa_strategy {STRATEGY} --folder 20230307-093217 --exp_idx 0",
    "train_model_synthetic_oe.py": "--method DSA --dataset CIFAR10  --model ConvNet --num_eval 5 --ipc 10 "
    f"--dsa_strategy {STRATEGY} --folder 20230206-232257 --exp_idx 0 --is_load_oe --lambda_oe 0.5",
    "test_ood_model_syn.py": "--method DSA --dataset CIFAR10 --model ConvNet --batch_test 256 --num_exp 5 --ipc 10 "
    "--is_load_oe --folder 20230206-232250 --is_load_best --num_ood_ratio 1",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_documented_lines_parse(name):
    args = SCRIPTS[name].get_args_parser().parse_args(f"{DOCUMENTED[name]} {PATHS}".split())
    assert (args.load_path, args.save_path, args.data_path) == ("a", "b", "c")
    assert args.method == "DSA"


def test_given_scores_are_never_dropped():
    from utils.settings.arguments import Stage3Settings
    from utils.stages.stage3 import scores_of

    assert scores_of(Stage3Settings()) == ("msp",)
    assert scores_of(Stage3Settings(use_xent=True)) == ("xent",)
    assert scores_of(Stage3Settings(score=("mls", "energy"), use_xent=True)) == ("mls", "energy", "xent")


def test_loops_by_ipc(digits):
    def loops(*flags):
        settings = stage1.get_args_parser().parse_args(["--model", "MLP", *flags])
        method = METHODS["DC"].build(MethodInputs(digits, None, settings))
        return method.outer_loop, method.inner_loop, " ".join(method.notices)

    assert loops("--ipc", "1")[:2] == (1, 1)
    assert loops("--ipc", "10") == (10, 50, "")
    assert loops("--ipc", "50")[:2] == (50, 10)
    outer, inner, notice = loops("--ipc", "7")
    assert (outer, inner) == (7, 71)
    assert "no published loops" in notice
    assert loops("--ipc", "7", "--outer_loop", "3", "--inner_loop", "0") == (3, 0, "")


WRONG = [
    ("main.py", ["--dataset", "CIFAR11"], ["--dataset", "unknown dataset 'CIFAR11'", "did you mean CIFAR10", "Digits"]),
    ("main.py", ["--model", "ConvNt"], ["--model", "did you mean ConvNet", "ResNet18_AP"]),
    ("main.py", ["--method", "DS"], ["--method", "unknown method 'DS'", "did you mean DSA", "DC, DSA, DM, MTT"]),
    ("main.py", ["--method", "DSA", "--dsa_strategy", "color_cutot"], ["--dsa_strategy", "cutout"]),
    ("main.py", ["--method", "DSA", "--dataset", "Digits"], ["--method DSA needs --dsa_strategy"]),
    ("main.py", ["--dis_metric", "l2"], ["--dis_metric", "ours, mse, cos"]),
    ("main_poe.py", ["--corruptions", "jigsaw", "pixelat"], ["--corruptions", "did you mean pixelate"]),
    ("test_ood_model_syn.py", ["--score", "msq"], ["--score", "did you mean msp", "energy"]),
    ("main.py", ["--ipc", "0"], ["--ipc", "'0' is not a whole number of at least 1"]),
    ("main.py", ["--num_eval", "-3"], ["--num_eval", "at least 1"]),
    ("main.py", ["--Iteration", "many"], ["--Iteration", "'many'"]),
    ("main.py", ["--lr_img", "nan"], ["--lr_img", "above 0"]),
    ("main_oe.py", ["--lambda_oe", "-1"], ["--lambda_oe", "from 0"]),
    ("main.py", ["--is-parallel"], ["torchrun"]),
    ("main.py", ["--is_parallel", "True"], ["torchrun"]),
    ("main.py", ["--no_such_flag"], ["unrecognized arguments"]),
    ("main.py", ["--device", "cuda:99"], ["--device cuda:99", "--device cpu"]),
    ("main.py", ["--device", "abacus"], ["--device abacus", "auto, cpu, cuda"]),
    ("main.py", [*QUICK, "--ipc", "200", "--init", "real"], ["--ipc 200", "smallest class of Digits has"]),
    (
        "main.py",
        ["--dataset", "Digits", "--model", "VGG11"],
        ["--model VGG11", "8x8", "smallest size it takes is 28x28"],
    ),
    ("main.py", ["--dataset", "Digits", "--eval_mode", "M"], ["--eval_mode M: LeNet: too deep for images of 8x8"]),
    ("main.py", [*QUICK, "--ipc", "100000000000"], ["out of memory", "--ipc"]),
    ("main.py", ["--dataset", "Digits", "--im_size", "9"], ["--im_size: only ImageFolder"]),
    ("main.py", ["--download", "none"], ["--data_path data: CIFAR10 is not there", "cifar10.npz"]),
    ("main.py", ["--dataset", "npz", "--data_path", "no.npz"], ["--data_path: no.npz is not there"]),
    ("main.py", [*QUICK, "--eval_ood", "blob", "patch"], ["--eval_ood: unknown", "did you mean patches"]),
    (
        "main.py",
        [*QUICK, "--eval_ood", "a/b"],
        ["--eval_ood: a/b is missing. Give a/b as seen from here or from data/ood; or choose"],
    ),
    ("main.py", [*QUICK, "--ood_path", "ood"], ["--ood_path: it has no effect without --eval_ood"]),
    ("main.py", [*QUICK, "--eval_ood", "blob", "iSUN"], ["--eval_ood: iSUN is missing. Put NAME/"]),
    ("main.py", [*QUICK, "--checkpoint_interval", "0"], ["--checkpoint_interval", "at least 1"]),
    ("main_oe.py", QUICK, ["--oe_data_path: data/300K_random_images.npy is not there", "--download all"]),
    ("main_oe.py", [*QUICK, "--oe_data_path", "bad.npy"], ["--oe_data_path: bad.npy holds float32 [5, 3]", "uint8"]),
    ("main_oe.py", [*QUICK, "--oe_data_path", "no.npz"], ["no.npz is not there", "a folder of images"]),
    (
        "main_oe.py",
        [*QUICK, "--oe_data_path", "small.npy", "--ipc", "3", "--init", "real"],
        ["--ipc 3: the outlier source has 2 outliers for each class"],
    ),
    ("train_model_synthetic_oe.py", [*QUICK, "--folder", "20200101-000000"], ["--folder: no 20200101-000000 under"]),
    ("train_model_synthetic_no_oe.py", [*QUICK, "--folder", "../x"], ["--folder: '../x' is not the name"]),
    ("test_ood_model_syn.py", ["--dataset", "Digits", "--folder", "20200101-000000"], ["result-model-synthetic-oe"]),
    ("test_ood_model_syn.py", ["--T", "2"], ["--T 2: only --score energy"]),
]


@pytest.mark.parametrize(("name", "flags", "expected"), WRONG, ids=[f"{w[0]} {' '.join(w[1])}"[:60] for w in WRONG])
def test_errors_are_one_line(name, flags, expected, tmp_path, refused):
    np.save(tmp_path / "bad.npy", np.zeros((5, 3), np.float32))
    np.save(tmp_path / "small.npy", np.full((29, 8, 8), 255, np.uint8))  # two for each class
    before = sorted(tmp_path.rglob("*"))
    error = refused(name, *flags)
    for text in expected:
        assert text in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["main_oe.py", "test_ood_model_syn.py"])
def test_error_from_a_real_process(name, script):
    result = script(name, "--ipc", "0")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith(f"{name}: error: ")
    assert result.stdout == ""


def test_distilled_set_of_another_data_set(tmp_path, refused):
    folder = tmp_path / "result" / "DSA" / "Digits" / "ConvNetD1" / "1" / "20230101-000000"
    folder.mkdir(parents=True)
    images, labels = torch.zeros(5, 1, 8, 8), torch.arange(5)
    torch.save({"data": [[images, labels]]}, folder / "res_DSA_Digits_ConvNetD1_1ipc.pt")
    for flags, message in (
        ([], "(5 classes, 0..4, images 1x8x8), not from 10 classes of 1x8x8"),
        (["--exp_idx", "3"], "--exp_idx 3"),
        (["--is_load_oe"], "no run folder with outliers under result-oe"),
    ):
        assert message in refused("train_model_synthetic_no_oe.py", *QUICK, *flags)
    assert not (tmp_path / "result-model-synthetic-no-oe").exists()


def test_import_needs_neither_pytorch_ood_nor_matplotlib():
    code = (
        "import sys; sys.modules['pytorch_ood'] = None; sys.modules['matplotlib'] = None; "
        "import main, main_oe, main_poe, train_model_synthetic_oe, test_ood_model_syn"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_names_that_the_terminal_cannot_show(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run_script(lambda: print("run folder: caf\xe9 \udcff", flush=True), "main.py")
    assert written.getvalue() == b"run folder: caf\\xe9 \\udcff\n"


@pytest.mark.parametrize("lines", ["print_line('b' * 9)", "print('b' * 9, flush=True)"])
def test_a_reader_that_goes_away(program, lines):
    """A run goes on, as its lines are in logs.txt, too; what only prints ends. Neither has a traceback."""
    code = f"""
import sys
from utils.core.errors import print_line
from utils.core.run_script import run_script
def main():
    print("a", flush=True)
    sys.stdin.read()  # until the reader has gone
    {lines}
    {lines}
    print("the end", file=sys.stderr)
run_script(main, "main.py")
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen(program(code), cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "a\n"
    process.stdout.close()
    process.stdin.close()
    error = process.stderr.read()
    status = process.wait(timeout=60)
    assert (error, status) == (("the end\n", 0) if lines.startswith("print_line") else ("", 141))


def test_another_broken_pipe_is_no_secret():
    def fails():
        raise BrokenPipeError("of a process of the compiler")

    with pytest.raises(BrokenPipeError):
        run_script(fails, "main.py")


def test_a_variable_of_torchrun_alone_changes_nothing(refused, monkeypatch):
    """Some schedulers set RANK for a single process."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for a first process"))
    monkeypatch.setenv("RANK", "1")
    assert "--ipc: '0' is not" in refused("main.py", "--ipc", "0")
    assert "no.npz" in refused("main.py", "--dataset", "npz", "--data_path", "no.npz")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "process" not in refused("main.py", "--ipc", "0")


@pytest.mark.parametrize(("text", "peer"), [("Connection closed by peer [1.2.3.4]", True), ("peer access is", False)])
def test_what_means_that_another_process_has_left(monkeypatch, capsys, text, peer):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("utils.core.run_script.leave", sys.exit)

    def fails():
        raise RuntimeError(text)

    with pytest.raises(SystemExit if peer else RuntimeError):
        run_script(fails, "main.py")
    assert ("another process of this run has ended" in capsys.readouterr().err) == peer


class Writes(io.RawIOBase):
    """A file that keeps each call of the operating system apart."""

    def __init__(self):
        self.calls = []

    def writable(self):
        return True

    def write(self, data):
        self.calls.append(bytes(data))
        return len(data)


def test_a_line_is_one_write_where_python_does_not_buffer():
    """Otherwise the lines of the processes of torchrun, which share one stdout, mix."""
    raw = Writes()
    print_line("run folder: a", io.TextIOWrapper(raw, write_through=True))
    assert [call for call in raw.calls if call] == [b"run folder: a\n"]


PROGRAMS = [p.stem for p in (*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py")) if "run_script(" in p.read_text()]
SPINS = [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]


UNTIL_TORCH = """
import importlib, os, sys
sys.path[:0] = ["scripts", "scripts/dev", "scripts/tables"]
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(script, os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Watch)
for script in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(script)
        sys.exit("does not import torch")
    os.wait()
"""


@pytest.fixture(scope="module")
def spins():
    """By what the user set and by script, which each imports in a process of its own: what is set before torch is."""
    found = {}
    for given, _ in SPINS:
        env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
        command = [sys.executable, "-c", UNTIL_TORCH, *PROGRAMS]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        found[str(given)] = [line.split() for line in done.stdout.splitlines()]
    return found


@pytest.mark.parametrize("script", PROGRAMS)
@pytest.mark.parametrize(("given", "expected"), SPINS)
def test_how_long_threads_spin_is_set_before_torch_is_imported(script, given, expected, spins):
    assert [value for name, value in spins[str(given)] if name == script] == [expected]
