"""What SIGINT and SIGTERM do: a run saves and is gone, in the middle of an iteration and of an evaluation, too."""

import os
import signal
import subprocess
import threading
import time

import pytest
import torch
from conftest import ROOT

import main_poe
import train_model_synthetic_oe
from utils.core.errors import Interrupted
from utils.methods.gradient_matching import GradientMatching
from utils.methods.learnable import LearnableSet
from utils.runs import signals
from utils.training.trainer import Trainer

STRATEGY = "color_crop_cutout_scale_rotate"
COMMON = ["--dataset", "Digits", "--model", "MLP", "--ipc", "1", "--method", "DSA", "--dsa_strategy", STRATEGY]
STAGE1 = [*COMMON, "--init", "real", "--num_exp", "1", "--Iteration", "4", "--eval_interval", "2", "--num_eval", "2"]
STAGE1 += [
    "--epoch_eval_train",
    "6",
    "--batch_real",
    "16",
    "--batch_oe",
    "16",
    "--outer_loop",
    "3",
    "--inner_loop",
    "2",
]
STAGE2 = [*COMMON, "--num_eval", "2", "--epoch_eval_train", "60", "--checkpoint_interval", "20", "--load_path", "1"]


def run(module, flags):
    module.main(module.get_args_parser().parse_args(list(map(str, flags))))


def calls_before_a_signal(monkeypatch, owner, name, n):
    """The n-th call of a method sends SIGTERM to this process and then takes so long that the grace is over."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(0.01)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def tensors(folder, pattern):
    def flat(value):
        if isinstance(value, torch.Tensor):
            return [value]
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return [t for v in values for t in flat(v)]

    paths = sorted(folder.rglob(pattern))
    return {p.name: flat(torch.load(p, weights_only=True)) for p in paths}


def same(a, b):
    return a and a.keys() == b.keys() and all(all(map(torch.equal, a[n], b[n])) for n in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Stage 1 without a signal."""
    folder = tmp_path_factory.mktemp("whole")
    run(main_poe, [*STAGE1, "--save_path", folder])
    return folder


@pytest.mark.parametrize(
    ("owner", "name", "n", "iteration"),
    [
        (GradientMatching, "_matching_step", 5, 1),  # the second outer step of the second iteration
        (LearnableSet, "_initial", 2, 0),  # in the start, at the outliers
        (Trainer, "step", 3, 0),  # in an evaluation, before the first iteration
        (Trainer, "step", 18, 1),  # in the training between two matching steps
    ],
)
def test_a_signal_in_the_middle_saves_the_state_before(whole, tmp_path, monkeypatch, capsys, owner, name, n, iteration):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(signals, "GRACE", 0.05)
        calls_before_a_signal(patch, owner, name, n)
        with pytest.raises(Interrupted) as stopped:
            run(main_poe, [*STAGE1, "--save_path", "cut"])
    assert stopped.value.number == signal.SIGTERM
    (checkpoint,) = (tmp_path / "cut").rglob("checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["iteration"] == iteration
    assert "to resume:" in capsys.readouterr().out
    run(main_poe, ["--resume", "latest", "--save_path", "cut"])
    assert same(tensors(whole, "res_*.pt"), tensors(tmp_path / "cut", "res_*.pt"))


def test_a_signal_in_a_long_epoch_of_stage_2(whole, tmp_path, monkeypatch):
    """The newest checkpoint, of epoch 20, is what it resumes from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").symlink_to(whole)
    run(train_model_synthetic_oe, [*STAGE2, "--save_path", "whole"])
    with monkeypatch.context() as patch:
        patch.setattr(signals, "GRACE", 0.05)
        calls_before_a_signal(patch, Trainer, "step", 37)
        with pytest.raises(Interrupted):
            run(train_model_synthetic_oe, [*STAGE2, "--save_path", "cut"])
    (checkpoint,) = (tmp_path / "cut").rglob("checkpoint_network0.pt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 20
    run(train_model_synthetic_oe, ["--resume", "latest", "--save_path", "cut"])
    assert same(tensors(tmp_path / "whole", "syn_*.pt"), tensors(tmp_path / "cut", "syn_*.pt"))


def test_within_the_grace_the_iteration_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = GradientMatching.iterate

    def iterate(self, it):
        if it == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, it)

    with monkeypatch.context() as patch:
        patch.setattr(signals, "GRACE", 60.0)
        patch.setattr(GradientMatching, "iterate", iterate)
        with pytest.raises(Interrupted):
            run(main_poe, [*STAGE1, "--save_path", "cut"])
    (checkpoint,) = (tmp_path / "cut").rglob("checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["iteration"] == 2


PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from utils.runs import signals
signals.GRACE, signals.REPEAT = 0.1, float(sys.argv[2])
with signals.catch():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    print("still here", signals.received())
"""


@pytest.mark.parametrize(("repeat", "status", "printed"), [(60, 0, "still here 15\n"), (0.1, 143, "")])
def test_a_repeat_within_seconds_is_one_signal(program, repeat, status, printed):
    """torchrun passes on a signal that its processes have received already; later ones end the process."""
    command = program(PROGRAM, ROOT, repeat)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, printed)
    assert done.stderr.count("SIGTERM: stopping and saving") == 1


def test_an_error_after_a_signal_is_the_signal():
    """Ctrl-C in a terminal also ends the compiler, whose failure then is no error of the run."""

    def fail(interrupted):
        with signals.catch():
            if interrupted:
                os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("the compiler fails")

    with pytest.raises(Interrupted):
        fail(True)
    with pytest.raises(RuntimeError):
        fail(False)


def test_files_are_written_to_their_end(monkeypatch):
    monkeypatch.setattr(signals, "GRACE", 0.01)
    done = []

    def work():
        with signals.catch(), signals.interruptible():
            with signals.interruptible(False):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                done.append("written")
            done.append("never")

    with pytest.raises(Interrupted):
        work()
    assert done == ["written"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_python_swallows_is_repeated(monkeypatch):
    """What is raised in `__del__` and in callbacks of weak references is ignored; compilers use many of them."""
    monkeypatch.setattr(signals, "GRACE", 0.01)
    monkeypatch.setattr(signals, "AGAIN", 0.1)

    class Slow:
        def __del__(self):
            time.sleep(0.05)

    def work():
        with signals.catch(), signals.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            Slow()
            time.sleep(60)

    with pytest.raises(Interrupted):
        work()


def test_in_another_thread_a_run_goes_on_without_signals(tmp_path, monkeypatch, capfd):
    """As in notebooks and web apps: Python lets the main thread alone handle signals."""
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    failed = []

    def work():
        try:
            run(main_poe, [*STAGE1, "--save_path", "thread"])
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert len(list((tmp_path / "thread").rglob("res_*.pt"))) == 1
    assert capfd.readouterr().err.count("not in the main thread: ") == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
