"""The registry of methods: defaults and flags by method, methods in files of their own."""

import re
import shlex

import pytest
from conftest import ROOT

import main as stage1
import main_poe
from utils.core.errors import UserError
from utils.methods import METHODS
from utils.runs.resume import resume_command
from utils.settings.method_choice import users_of_flags

NETWORK = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", "1", "--num_exp", "1", "--num_eval", "1"]
SHORT = [*NETWORK, "--epoch_eval_train", "3", "--Iteration", "3"]


@pytest.fixture(autouse=True)
def _same_methods_after():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def parsed(*flags):
    return stage1.get_args_parser().parse_args(list(map(str, flags)))


def test_defaults_of_a_method_hold_where_the_flag_is_not_given():
    assert (parsed().Iteration, parsed().lr_img, parsed().init) == (1000, 0.1, "noise")
    dm = parsed("--method", "DM")
    assert (dm.Iteration, dm.lr_img, dm.init, dm.eval_interval) == (20000, 1.0, "real", 2000)
    assert parsed("--method", "DM", "--lr_img", 0.1, "--init", "noise").lr_img == 0.1
    assert parsed("--method", "DM", "--Iteration", 1000).Iteration == 1000  # the default of the others
    mtt = parsed("--method", "MTT")
    assert (mtt.Iteration, mtt.lr_img, mtt.eval_interval, mtt.syn_steps) == (5000, 1000.0, 100, 30)
    users = users_of_flags()
    assert not any("DM" in users[name] for name in ("syn_steps", "dis_metric"))
    assert not any("MTT" in users[name] for name in ("dis_metric", "batch_real"))


def test_help_and_log_tell_the_defaults(capsys, in_process):
    with pytest.raises(SystemExit):
        parsed("--help-all")
    text = " ".join(capsys.readouterr().out.split())
    assert "(left out: DM: 20000, MTT: 5000, TGDD: 2000; else 1000)" in text
    assert "DC, DSA: distance between gradients" in text
    out = in_process("main.py", *NETWORK, "--epoch_eval_train", 3, "--method", "DM", "--Iteration", 2)
    assert "defaults of --method DM: --lr_img 1.0 --init real --eval_interval 2000" in out


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("main.py", ["--method", "DM", "--outer_loop", 3], "--outer_loop: --method DM does not use it; DC, DSA do"),
        ("main.py", ["--method", "DSA", "--syn_steps", 3], "--syn_steps: --method DSA does not use it; MTT does"),
        (
            "main.py",
            ["--method", "MTT", "--batch_real", 3],
            "--batch_real: --method MTT does not use it; DC, DSA, DM, TGDD do",
        ),
        ("main_poe.py", ["--method", "MTT", "--batch_oe", 3], "--batch_oe: --method MTT does not use it"),
        ("main.py", ["--method", "MT"], "unknown method 'MT'; did you mean MTT? Accepted: DC, DSA, DM, MTT"),
        ("main.py", ["--method", "MTT", "--syn_steps", 0], "--syn_steps: '0' is not a whole number of at least 1"),
    ],
)
def test_flags_that_a_method_does_not_use(refused, script, flags, message):
    assert message in refused(script, *flags)


def test_a_method_in_a_file_of_its_own(tmp_path, in_process):
    """The one that docs/extend.md shows, through all stages, with outliers and resumed."""
    text = (ROOT / "docs" / "extend.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 40
    path = tmp_path / "my_method.py"
    path.write_text(code)
    mine = ["--method", "Mean", "--method_file", path]
    out = in_process("main_poe.py", *SHORT, *mine, "--power", 2)
    assert "loss_oe" in out
    words = shlex.split(resume_command(next(tmp_path.glob("result-poe/Mean/Digits/ConvNetD1/1/*"))))
    assert words[-2:] == ["--method_file", str(path)]
    assert "2.0" in (next(tmp_path.glob("result-poe/Mean/Digits/ConvNetD1/1/*/args.json"))).read_text()
    with pytest.raises(UserError, match=r"was started with --method_file .*my_method.py; give that file again"):
        main_poe.get_args_parser().parse_args(["--resume", "latest"])
    assert "is finished" in in_process("main_poe.py", "--resume", "latest", "--method_file", path)
    two = [*NETWORK[:6], *mine, "--num_eval", 1, "--epoch_eval_train", 5]
    out = in_process("train_model_synthetic_oe.py", *two)
    _, three, *words = shlex.split(re.findall("^to test them: (.*)$", out, re.MULTILINE)[0])
    assert "accuracy" in in_process(three, *words)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "is not there"),
        ("", "registers no method; it must call utils.methods.register"),
        ("import nothing_like_it", "fails: ModuleNotFoundError: No module named 'nothing_like_it'. Repair it"),
        ("1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("def (", "fails: SyntaxError"),
    ],
)
def test_files_that_are_no_method(refused, tmp_path, code, message):
    path = tmp_path / "my_method.py"
    if code is not None:
        path.write_text(code)
    error = refused("main.py", "--method", "Mine", "--method_file", path)
    assert message in error
    assert "--method_file" in error


TWO_METHODS = """
from dataclasses import dataclass
from utils.compute.device import Workload
from utils.methods import MethodEntry, register
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.method import MatchingSettings
from utils.settings.fields import flag
@dataclass(frozen=True)
class Both(MatchingSettings):
    power: float = flag(2.0, "an exponent", float)
for name in ("A", "B"):
    work = lambda inputs: Workload(0, "matching")
    register(MethodEntry(name, "", DistributionMatching, work, Both, {"lr_img_oe": 0.5}))
"""


def test_a_file_with_two_methods(in_process, tmp_path):
    """They share a flag, and have a default of a flag that main.py lacks."""
    path = tmp_path / "two.py"
    path.write_text(TWO_METHODS)
    assert "accuracy" in in_process("main.py", *SHORT, "--method", "B", "--method_file", path, "--power", 3)


@pytest.mark.parametrize(("name", "known"), [("syn_steps", True), ("ipc", True), ("power", False)])
def test_a_flag_of_a_file_whose_name_is_taken(in_process, refused, tmp_path, name, known):
    path = tmp_path / "two.py"
    path.write_text(TWO_METHODS.replace("power: float", f"{name}: float"))
    words = ["main.py", *SHORT, "--method", "A", "--method_file", path]
    if known:
        assert f"two.py defines --{name}, which is another flag already" in refused(*words)
    else:
        assert "accuracy" in in_process(*words)


def test_an_inner_loop_that_is_not_used_is_told(in_process):
    words = [*SHORT, "--method", "DC", "--inner_loop", 3, "--Iteration", 0]
    assert "--inner_loop is not used" in in_process("main.py", *words)
    assert "--inner_loop is not used" not in in_process("main.py", *words, "--outer_loop", 2)
