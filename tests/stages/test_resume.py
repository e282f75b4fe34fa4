"""Runs that are killed, stopped or hindered go on as if nothing had been: real processes on Digits."""

import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_compiler

from utils.core.errors import UserError
from utils.data.datasets import load_dataset
from utils.outliers.sources import load_outlier_pool
from utils.runs.checkpoints import Checkpointer
from utils.runs.resume import _latest, resume_command
from utils.runs.run_folder import RunFolder, read_metrics
from utils.settings.fields import flag_words
from utils.settings.parser import Parser
from utils.stages import training_set

KILLS = int(os.environ.get("TRUSTDD_KILLS", "5"))  # of each kind, in each stage
NETWORK = "--dataset Digits --model MLP --ipc 1 --method DSA --dsa_strategy color_crop_cutout_scale_rotate"
ITERATIONS = 8 * KILLS
STAGE1 = f"{NETWORK} --init real --num_exp 2 --num_eval 2 --epoch_eval_train 30 --Iteration {ITERATIONS}"
STAGE1 = f"{STAGE1} --batch_real 8 --batch_oe 8 --outer_loop 2 --inner_loop 2 --eval_interval 15"
STAGE1 = f"{STAGE1} --checkpoint_interval 3".split()
STAGE2 = f"{NETWORK} --num_eval 2 --epoch_eval_train {80 * KILLS} --checkpoint_interval 7 --load_path".split()


KINDS = {"fifo": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir}


class Processes:
    """Starts scripts through `fork_server.py`, one at a time."""

    def __init__(self, forks):
        self.forks = forks

    def start(self, cwd, script, flags, kill_at=None, needs=()) -> int:
        self.log = cwd / "printed"
        self.process = self.forks.start([ROOT / script, *flags], cwd, self.log, kill_at=kill_at, needs=needs)
        return self.process.pid

    def wait(self) -> int:
        return self.process.wait()

    def run(self, *args, **kwargs) -> str:
        """Run to the end without an error; what was printed."""
        self.start(*args, **kwargs)
        status = self.wait()
        printed = self.log.read_text()
        assert status == 0, printed[-2000:]
        return printed


@pytest.fixture(scope="module")
def processes(forks):
    return Processes(forks)


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """Both stages without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    processes.run(folder, "main_poe.py", [*STAGE1, "--save_path", "one"])
    processes.run(folder, "train_model_synthetic_oe.py", [*STAGE2, folder / "one", "--save_path", "two"])
    return folder


def run_folder(root) -> Path:
    return next(root.rglob("args.json")).parent


def saved(cwd) -> int:
    """Changes with every checkpoint."""
    times = [0]
    for path in cwd.rglob("checkpoint*.pt"):
        with suppress(FileNotFoundError):  # it is renamed just now
            times.append(path.stat().st_mtime_ns)
    return max(times)


def kill_and_resume(processes, cwd, script, flags):
    """Kill a run at random moments, and at random calls of fsync and rename; resume it each time, to its end."""
    rng = random.Random(0)
    ways = [None] * KILLS + ["fsync", "replace"] * ((KILLS + 1) // 2)
    rng.shuffle(ways)
    resumed = []
    killed = 0
    for name in ways:
        kill = [name, rng.randrange(2, 9)] if name else None
        pid = processes.start(cwd, script, [*flags, *resumed], kill)
        if not name:
            for _ in range(rng.randrange(3)):
                before = saved(cwd)
                wait_for(lambda before=before: saved(cwd) != before)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(pid, signal.SIGKILL)
        killed += processes.wait() == -signal.SIGKILL
        if list(cwd.rglob("args.json")):
            flags, resumed = [], ["--resume", run_folder(cwd).relative_to(cwd)]
    processes.run(cwd, script, [*flags, *resumed])
    assert killed == len(ways), "the run was over before it was killed often enough"
    print(f"{killed} kills")


def lines(folder) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in found]


def same_tensors(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def load(path) -> dict:
    return torch.load(path, weights_only=True)


@needs_compiler
def test_compiled_distillation_ends_with_the_same_bits(processes, tmp_path):
    """Killed once, between its first iteration and its last."""
    flags = f"{NETWORK} --init real --num_exp 1 --num_eval 1 --epoch_eval_train 5 --Iteration 8 --compile on"
    flags += " --batch_real 8 --outer_loop 2 --inner_loop 2 --checkpoint_interval 1 --save_path one"
    flags, needs = flags.split(), ["torch._inductor.compile_fx"]
    results = []
    for name in ("whole", "killed"):
        (cwd := tmp_path / name).mkdir()
        if name == "killed":
            processes.start(cwd, "main.py", flags, ["fsync", 20], needs)
            assert processes.wait() == -signal.SIGKILL
            flags = ["--resume", run_folder(cwd).relative_to(cwd)]
        printed = processes.run(cwd, "main.py", flags, needs=needs)
        assert "torch.compile on" in printed
        results.append(load(next(run_folder(cwd).glob("res_*.pt"))))
    assert re.search("resumed at experiment 0, iteration [1-7]", printed)
    assert same_tensors(*(r["data"] for r in results))
    assert results[0]["accs_all_exps"] == results[1]["accs_all_exps"]


def test_killed_distillation_ends_with_the_same_bits(processes, whole, tmp_path):
    kill_and_resume(processes, tmp_path, "main_poe.py", [*STAGE1, "--save_path", "one"])
    expected, found = (run_folder(f / "one") for f in (whole, tmp_path))
    a, b = (load(next(f.glob("res_*.pt"))) for f in (expected, found))
    assert all(same_tensors(a[k], b[k]) for k in ("data", "data_oe", "accs_all_exps", "normalisation"))
    assert lines(expected) == lines(found)
    assert len(lines(found)) == 2 * (ITERATIONS + 1 + -(-ITERATIONS // 15))
    names = sorted(p.name for p in expected.glob("*.png"))
    assert names == sorted(p.name for p in found.glob("*.png"))
    assert all((expected / n).read_bytes() == (found / n).read_bytes() for n in names)
    assert "is finished" in processes.run(tmp_path, "main_poe.py", ["--resume", "latest", "--save_path", "one"])


SMALL = "--dataset Digits --model MLP --seed 3 --dsa_strategy color_crop_cutout_scale_rotate"
EXPERTS = f"{SMALL} --num_experts 2 --train_epochs 8 --batch_train 32 --batch_oe 8 --outliers poe".split()
OTHERS = f"{SMALL} --ipc 1 --num_exp 1 --num_eval 1 --epoch_eval_train 30 --Iteration 40 --eval_interval 10".split()
OTHERS += ["--checkpoint_interval", 3]
OF_METHOD = {
    "DM": ["--method", "DM", "--batch_real", 64, "--batch_oe", 64],
    "MTT": ["--method", "MTT", "--syn_steps", 10, "--max_start_epoch", 4, "--lr_img", 10],
    "TGDD": ["--method", "TGDD", "--feature_distance", "cf", "--batch_real", 32, "--batch_oe", 8],
}


def kill_often(processes, cwd, script, flags, times=3):
    """Kill a run at its calls of `os.replace`, which every checkpoint makes; then let it end."""
    resumed = []
    for n in (3, 5, 4)[:times]:
        processes.start(cwd, script, [*flags, *resumed], ["replace", n])
        assert processes.wait() == -signal.SIGKILL
        if script != "train_experts.py" and list(cwd.rglob("args.json")):
            flags, resumed = [], ["--resume", run_folder(cwd).relative_to(cwd)]
    processes.run(cwd, script, [*flags, *resumed])


@pytest.fixture(scope="module")
def experts(processes, tmp_path_factory):
    """The folder where experts were trained without interruption."""
    folder = tmp_path_factory.mktemp("experts")
    processes.run(folder, "train_experts.py", EXPERTS)
    return folder


def test_killed_experts_end_with_the_same_bits(processes, experts, tmp_path):
    kill_often(processes, tmp_path, "train_experts.py", EXPERTS)
    a, b = (sorted(folder.rglob("replay_buffer_*.pt")) for folder in (experts, tmp_path))
    assert len(a) == len(b) == 2
    assert all(same_tensors(load(x), load(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", OF_METHOD)
def test_killed_distillation_of_other_methods_ends_with_the_same_bits(processes, experts, tmp_path, method):
    flags = [*OTHERS, *OF_METHOD[method], *([] if method == "DM" else ["--buffer_path", experts / "buffers"])]
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    processes.run(tmp_path / "whole", "main_poe.py", flags)
    kill_often(processes, tmp_path / "cut", "main_poe.py", flags)
    expected, found = (run_folder(tmp_path / name) for name in ("whole", "cut"))
    a, b = (load(next(f.glob("res_*.pt"))) for f in (expected, found))
    assert all(same_tensors(a.get(k), b.get(k)) for k in ("data", "data_oe", "accs_all_exps", "lr_net"))
    assert ("lr_net" in a) == (method == "MTT")
    assert lines(expected) == lines(found)


def test_killed_training_ends_with_the_same_bits(processes, whole, tmp_path):
    flags = [*STAGE2, whole / "one", "--save_path", "two"]
    kill_and_resume(processes, tmp_path, "train_model_synthetic_oe.py", flags)
    expected, found = (run_folder(f / "two") for f in (whole, tmp_path))
    names = sorted(p.name for p in expected.glob("syn_trained_*.pt"))
    assert len(names) >= 2 * 2
    assert names == sorted(p.name for p in found.glob("syn_trained_*.pt"))
    assert all(same_tensors(load(expected / n), load(found / n)) for n in names)
    assert lines(expected) == lines(found)
    script = "train_model_synthetic_oe.py"
    assert "is finished" in processes.run(tmp_path, script, ["--resume", "latest", "--save_path", "two"])


@pytest.mark.parametrize("chosen", ["--outliers corrupt", "--train_on herding --outliers kcenter", "--corrupt_again"])
def test_killed_training_on_other_sets_ends_with_the_same_bits(processes, whole, tmp_path, chosen):
    """Outliers that are drawn in every epoch, and a set that is chosen anew but stored with the run."""
    script, source = "train_model_synthetic_oe.py", [] if "train_on" in chosen else ["--load_path", whole / "one"]
    flags = [*STAGE2[:-1], *source, *chosen.split(), "--save_path", "two"]
    expected, killed = tmp_path / "expected", tmp_path / "killed"
    for folder in (expected, killed):
        folder.mkdir()
    processes.run(expected, script, flags)
    kill_and_resume(processes, killed, script, flags)
    networks = [sorted((run_folder(f / "two")).glob("syn_trained_*.pt")) for f in (expected, killed)]
    assert len(networks[0]) >= 2 * 2
    assert [p.name for p in networks[0]] == [p.name for p in networks[1]]
    assert all(same_tensors(load(a), load(b)) for a, b in zip(*networks, strict=True))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(processes, whole, tmp_path, number, status):
    pid = processes.start(tmp_path, "main_poe.py", [*STAGE1, "--save_path", "one"])
    wait_for(lambda: list(tmp_path.rglob("checkpoint.pt")))
    os.kill(pid, number)
    assert processes.wait() == status
    *_, command = processes.log.read_text().strip().splitlines()
    words = shlex.split(command)
    assert Path(words[1]).name == "main_poe.py"
    before = len(lines(run_folder(tmp_path)))
    assert 0 < before < len(lines(run_folder(whole / "one")))
    processes.run(tmp_path, words[1], words[2:])
    assert lines(run_folder(tmp_path)) == lines(run_folder(whole / "one"))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_live_run_is_not_resumed(processes, refused, tmp_path):
    pid = processes.start(tmp_path, "main_poe.py", [*STAGE1, "--save_path", "one"])
    try:
        wait_for(lambda: list(tmp_path.rglob("checkpoint.pt")))
        error = refused("main_poe.py", "--resume", "latest", "--save_path", "one")
        assert f"is a live run of process {pid} on" in error
    finally:
        os.kill(pid, signal.SIGKILL)
        assert processes.wait() == -signal.SIGKILL
    processes.run(tmp_path, "main_poe.py", ["--resume", run_folder(tmp_path)])  # the lock died with its owner


def test_conflicting_flags_name_both_values(whole, refused):
    folder = run_folder(whole / "one")
    assert "--ipc: given is 5, but" in refused("main_poe.py", "--resume", folder, "--ipc", 5)
    error = refused("main_poe.py", "--resume", folder, "--corruptions", "invert")
    assert "given is ['invert'], but" in error
    assert "was started with ['jigsaw', 'invert', 'pixelate', 'gauss-speckle']" in error
    error = refused("main_poe.py", "--resume", folder, "--dsa_strategy", "None")
    assert "--dsa_strategy: given is None, but" in error
    assert "is a run of main_poe.py, not of main.py" in refused("main.py", "--resume", folder)
    assert "no run of main.py under result" in refused("main.py", "--resume", "latest")
    assert "is no run folder" in refused("main.py", "--resume", "nowhere")


def test_damaged_arguments(whole, refused, tmp_path):
    about = json.loads((run_folder(whole / "one") / "args.json").read_text())
    for damage, message in [
        (b"", "is damaged"),
        (b"[1]", "is damaged"),
        (b"[" * 100000, "is damaged"),
        (b"\xff\x00", "is damaged"),
        (json.dumps(about | {"flags": 3}).encode(), "it has no flags"),
        (json.dumps(about | {"flags": about["flags"] | {"ipc": -1}}).encode(), "--ipc"),
        (json.dumps(about | {"flags": about["flags"] | {"model": {"a": 1}}}).encode(), "--model"),
        (json.dumps(about | {"flags": about["flags"] | {"new": "x"}}).encode(), "does not know: --new=x"),
        (json.dumps(about | {"flags": about["flags"] | {"help": True}}).encode(), "does not know: --help=True"),
        (
            json.dumps(about | {"flags": about["flags"] | {"ipc": ["1", "junk"]}}).encode(),
            "--ipc=['1', 'junk']; give one",
        ),
        (
            json.dumps(about | {"flags": about["flags"] | {"tensorboard": ["x"]}}).encode(),
            "--tensorboard=['x']; give one",
        ),
        (json.dumps(about | {"flags": about["flags"] | {"is_parallel": 1}}).encode(), "does not know: --is_parallel=1"),
        (json.dumps(about | {"flags": about["flags"] | {"corruptions": ["--help"]}}).encode(), "--corruptions"),
    ]:
        (tmp_path / "args.json").write_bytes(damage)
        assert message in refused("main_poe.py", "--resume", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_are_no_file(kind, refused, tmp_path):
    path = tmp_path / "args.json"
    KINDS[kind](path)
    assert "it has no file args.json" in refused("main_poe.py", "--resume", tmp_path)
    assert "no run of main_poe.py under" in refused("main_poe.py", "--resume", "latest", "--save_path", tmp_path)


def test_a_path_that_is_too_long(refused):
    assert "no run of main.py under" in refused("main.py", "--resume", "latest", "--save_path", "x" * 400)
    assert "is no run folder" in refused("main.py", "--resume", "x" * 400)


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of a run folder of stage 1 or 2, with changes to its `args.json`."""

    def copy(stage, **changes) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(run_folder(whole / stage), folder)
        about = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(about | changes))
        return folder

    return copy


def test_save_path_only_finds_the_latest(whole, copied, in_process, refused):
    folder = copied("one")
    assert "is finished" in in_process("main_poe.py", "--resume", "latest", "--save_path", folder.parent)
    assert "--save_path: given is" in refused("main_poe.py", "--resume", folder, "--save_path", "elsewhere")


def test_the_latest_run_is_the_one_that_was_started_last(tmp_path):
    """Not the one whose files changed last."""
    for name, day, mtime in (("a", 1, 1.8e9), ("b", 3, 1.6e9), ("c", 2, 1.7e9)):
        folder = tmp_path / "one" / name
        folder.mkdir(parents=True)
        about = {"script": "main.py", "flags": {}, "started": f"2023-01-0{day}T00:00:00"}
        (folder / "args.json").write_text(json.dumps(about))
        os.utime(folder / "args.json", (mtime, mtime))
    assert _latest(tmp_path / "one", "main.py") == tmp_path / "one" / "b"


def test_inputs_that_changed_are_noticed(whole, copied, refused):
    inputs = json.loads((run_folder(whole / "one") / "args.json").read_text())["inputs"]
    assert set(inputs) == {"data_path"}
    folder = copied("one", inputs={"data_path": "0" * 64})
    assert "--data_path: the data differ from those" in refused("main_poe.py", "--resume", folder)


@pytest.mark.parametrize(
    ("outliers", "expected"), [("corrupt", {"data_path"}), ("initial", {"data_path", "load_path"})]
)
def test_the_whole_set_is_known_by_its_data(in_process, refused, monkeypatch, tmp_path, outliers, expected):
    """Its normalised images differ from device to device, and a run may be resumed on another; outliers are stored."""
    flags = [*SMALL.split(), "--train_on", "whole", "--outliers", outliers, "--num_eval", 1, "--epoch_eval_train", 1]
    in_process("train_model_synthetic_oe.py", *flags, *(["--ipc", 1] if outliers == "initial" else []))
    folder = run_folder(tmp_path)
    assert set(json.loads((folder / "args.json").read_text())["inputs"]) == expected
    # a resumed run reads them, and draws none: elsewhere others could be drawn
    monkeypatch.setattr(training_set, "initial_outliers", None)
    assert "resumed" in in_process("train_model_synthetic_oe.py", "--resume", folder)
    if outliers == "initial":
        torch.save(load(folder / "outliers.pt") + 1, folder / "outliers.pt")
        assert "the data differ from those" in refused("train_model_synthetic_oe.py", "--resume", folder)


@pytest.mark.parametrize("code", ["present", "older"])
def test_a_distilled_set_that_changed_or_moved(whole, copied, in_process, refused, tmp_path, code):
    """A run resumes with the set in its folder; one of older code has none, and takes that of stage 1 once more."""
    script = "train_model_synthetic_oe.py"
    (made,) = (whole / "one").rglob("res_*.pt")
    moved = tmp_path / "moved" / made.parent.relative_to(whole / "one")
    shutil.copytree(made.parent, moved)
    folder, elsewhere = copied("two"), ["--load_path", tmp_path / "moved"]
    if code == "older":
        (folder / "trained_on.pt").unlink()
    changed = moved / made.name if code == "older" else folder / "trained_on.pt"
    content = load(changed)
    (images, labels), *others = content["data"]
    torch.save(content | {"data": [[images + 1, labels], *others]}, changed)
    assert "--load_path: the data differ from those" in refused(script, "--resume", folder, *elsewhere)
    torch.save(content, changed)
    assert "is finished" in in_process(script, "--resume", folder, *elsewhere)
    shutil.rmtree(tmp_path / "moved")
    assert "is finished" in in_process(script, "--resume", folder)  # it holds the set by now


def test_a_run_of_stage_2_needs_stage_1_no_more(whole, processes, tmp_path):
    """It is stopped, and resumed to the same bits after its distilled set is gone."""
    shutil.copytree(whole / "one", tmp_path / "one")
    pid = processes.start(tmp_path, "train_model_synthetic_oe.py", [*STAGE2, tmp_path / "one", "--save_path", "two"])
    wait_for(lambda: saved(tmp_path / "two"))
    os.kill(pid, signal.SIGKILL)
    processes.wait()
    shutil.rmtree(tmp_path / "one")
    expected, found = (run_folder(f / "two") for f in (whole, tmp_path))
    processes.run(tmp_path, "train_model_synthetic_oe.py", ["--resume", found])
    networks = [sorted(folder.glob("syn_trained_*.pt")) for folder in (expected, found)]
    assert all(same_tensors(load(a), load(b)) for a, b in zip(*networks, strict=True))
    assert lines(expected) == lines(found)


def test_start_images_from_a_folder_elsewhere(whole, in_process, refused, tmp_path, monkeypatch):
    """Only an experiment that starts after the resume reads them again."""
    (made,) = (whole / "one").rglob("res_*.pt")
    shutil.copy(made, tmp_path / "start.pt")
    flags = [*STAGE1, "--load_path", "start.pt", "--save_path", tmp_path / "one", "--Iteration", 1, "--num_eval", 1]
    in_process("main_poe.py", *flags)
    folder = run_folder(tmp_path / "one")
    (tmp_path / "start.pt").rename(tmp_path / "moved.pt")
    assert "is finished" in in_process("main_poe.py", "--resume", folder)
    content = load(tmp_path / "moved.pt")
    torch.save(content | {"data": [[images + 1, labels] for images, labels in content["data"]]}, tmp_path / "other.pt")
    told = refused("main_poe.py", "--resume", folder, "--load_path", tmp_path / "other.pt")
    assert "--load_path: the data differ from those" in told
    assert json.loads((folder / "args.json").read_text())["flags"]["load_path"] == str(tmp_path / "start.pt")
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        state = load(folder / name) | {"exp": 0, "iteration": 0, "evaluated": False}
        torch.save(state | {"measures": {}, "finished": [], "accs": {}, "method": None}, folder / name)
    expected = load(next(folder.glob("res_*.pt")))["data"]
    assert f"--load_path: {tmp_path / 'start.pt'} is not there" in refused("main_poe.py", "--resume", folder)
    monkeypatch.chdir("/")
    in_process("main_poe.py", "--resume", folder, "--load_path", tmp_path / "moved.pt")
    assert same_tensors(load(next(folder.glob("res_*.pt")))["data"], expected)


def test_what_a_killed_process_left_is_removed(program, tmp_path):
    code = "import os, signal, sys; sys.path.insert(0, sys.argv[1]); from utils.core.files import save_text; "
    code += "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL); from pathlib import Path; "
    code += "save_text(Path('checkpoint.txt'), 'x')"
    subprocess.run(program(code, ROOT), cwd=tmp_path)
    (left,) = tmp_path.iterdir()
    kept = [tmp_path / ".notes.settings", tmp_path / "checkpoint.pt", tmp_path / ".a.unfinished"]
    kept[0].write_bytes(b"x")
    kept[1].write_bytes(b"x")
    kept[2].mkdir()
    RunFolder(tmp_path)
    assert not left.exists()
    assert all(path.exists() for path in kept)


def test_metrics_with_damaged_lines(tmp_path):
    run = RunFolder(tmp_path)
    good = [{"experiment": 0, "iteration": i} for i in range(3)]
    lines = [json.dumps(good[0]), '{"experiment": 0, "iter', json.dumps(good[1]), json.dumps(good[2])]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff{")
    assert read_metrics(run.path) == good
    run.keep_metrics(lambda line: line["iteration"] < 2)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == good[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_that_are_no_file(kind, copied, refused):
    folder = copied("one")
    (folder / "metrics.jsonl").unlink()
    KINDS[kind](folder / "metrics.jsonl")
    assert "metrics.jsonl" in refused("main_poe.py", "--resume", folder)


@pytest.mark.parametrize("name", [".lock", "logs.txt"])
def test_nothing_is_written_through_links(name, copied, refused, tmp_path):
    folder = copied("one")
    (tmp_path / "precious").write_text("precious")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "precious")
    assert "cannot write" in refused("main_poe.py", "--resume", folder)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_pipe_in_place_of_the_log(copied, refused):
    folder = copied("one")
    (folder / "logs.txt").unlink()
    os.mkfifo(folder / "logs.txt")
    assert "logs.txt" in refused("main_poe.py", "--resume", folder)


def test_a_start_set_that_the_run_did_not_have(whole, in_process, refused, tmp_path):
    (made,) = (whole / "one").rglob("res_*.pt")
    in_process("main_poe.py", *STAGE1, "--save_path", tmp_path / "one", "--Iteration", 1, "--num_eval", 1)
    folder = run_folder(tmp_path / "one")
    state = load(folder / "checkpoint.pt") | {"exp": 0, "iteration": 0, "evaluated": False}
    torch.save(state | {"measures": {}, "finished": [], "accs": {}, "method": None}, folder / "checkpoint.pt")
    error = refused("main_poe.py", "--resume", folder, "--load_path", made)
    assert "--load_path: the data differ from those" in error
    assert json.loads((folder / "args.json").read_text())["flags"]["load_path"] is None


def test_pools_and_ood_sets_that_changed(in_process, refused, tmp_path):
    pool = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    (tmp_path / "ood").mkdir()
    for path in ("pool.npy", "ood/mine.npy"):
        np.save(tmp_path / path, pool)
    flags = [*STAGE1, "--save_path", "one", "--Iteration", 0, "--num_eval", 1, "--oe_data_path", "pool.npy"]
    flags += ["--num_oe_per_class", 20, "--eval_ood", "mine", "--ood_path", "ood"]
    in_process("main_oe.py", *flags)
    folder = run_folder(tmp_path / "one")
    assert "is finished" in in_process("main_oe.py", "--resume", folder)
    used = load_outlier_pool(tmp_path / "pool.npy", load_dataset("Digits", "nowhere"), 20, 1).slices
    changed = pool.copy()
    changed[used[9, 19]] = 255 - changed[used[9, 19]]
    np.save(tmp_path / "pool.npy", changed)
    assert "--oe_data_path: the data differ" in refused("main_oe.py", "--resume", folder)
    np.save(tmp_path / "pool.npy", pool)
    np.save(tmp_path / "ood/mine.npy", 255 - pool)
    assert "--ood_path: the data differ" in refused("main_oe.py", "--resume", folder)


def test_the_command_of_a_folder_with_a_dash(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    for name in ("-odd name/x", "--y", "plain"):
        words = shlex.split(resume_command(Path(name)))
        found = Parser()
        found.add_argument("--resume")
        assert found.parse_args(words[words.index("main.py") + 1 :]).resume == name


@pytest.mark.parametrize("value", [1.23456789e-05, 3e-08, -2.5e-07, 1e22, 0.1, -3.0])
def test_a_number_is_the_same_as_a_word(value):
    _, word = flag_words("x", [value])
    assert float(word) == value
    assert "e" not in word  # argparse takes -1e-7 for a flag


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Such as some network drives: the run goes on without one."""

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    RunFolder(tmp_path).log("goes on")
    assert "goes on" in (tmp_path / "logs.txt").read_text()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    run = RunFolder(tmp_path)
    checkpointer = Checkpointer(run)
    for value in range(3):
        checkpointer.save({"value": value, "tensor": torch.arange(1000.0)})
    assert checkpointer.load()["value"] == 2
    data = bytearray(checkpointer.path.read_bytes())
    middle = data.index(torch.arange(500.0, 510.0).numpy().tobytes())
    data[middle] ^= 1  # in the tensor, where only a checksum tells
    checkpointer.path.write_bytes(data)
    assert checkpointer.load()["value"] == 1
    assert "checksums are wrong" in capsys.readouterr().out
    checkpointer.path.unlink()  # killed between the two renames
    assert checkpointer.load()["value"] == 1
    checkpointer.previous.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read: checkpoint-previous\.pt"):
        checkpointer.load()


def test_a_checkpoint_of_another_run(whole, refused, tmp_path):
    folder = run_folder(whole / "one")
    (tmp_path / "args.json").write_bytes((folder / "args.json").read_bytes())
    for change in (
        {"exp": 7},
        {"method": {"images": [torch.zeros(10, 1, 1, 9, 9)] * 2, "optimizers": []}},
        {"method": {"images": [torch.zeros(10, 1, 1, 8, 8)], "optimizers": []}},
        {"measures": 3},
        {"found": {}},
        {"finished": [1, 2]},
        {"exp": 1, "method": None, "finished": [[None, None]]},
        {"exp": 1, "method": None, "finished": [[torch.zeros(9, 1, 8, 8), None, None]]},
        {"exp": 1, "method": None, "finished": [[None, None]]},
        {"exp": 1, "method": None, "finished": [[torch.full((10, 1, 8, 8), float("nan"))] * 2]},
        {"iteration": "many"},
    ):
        torch.save(load(folder / "checkpoint.pt") | change, tmp_path / "checkpoint.pt")
        assert "is not of this run" in refused("main_poe.py", "--resume", tmp_path)
    torch.save([1], tmp_path / "checkpoint.pt")
    assert "can be read" in refused("main_poe.py", "--resume", tmp_path)


def test_a_file_of_flags_is_compared_with_the_run(copied, in_process, refused, tmp_path):
    folder = copied("one")
    assert "is finished" in in_process("main_poe.py", "--resume", folder, "--config", folder / "args.json")
    (tmp_path / "other.yaml").write_text("lr_img: 7.5")
    told = refused("main_poe.py", "--resume", folder, "--config", tmp_path / "other.yaml")
    assert "--lr_img: given is 7.5, but" in told


@pytest.mark.parametrize("flags", [{"matching": None, "moments_oe": 1}, {"matching": "separate", "network_pool": 0}])
def test_a_flag_that_is_gone_and_did_nothing(copied, in_process, flags):
    folder = copied("one")
    about = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(about | {"flags": about["flags"] | flags}))
    assert "is finished" in in_process("main_poe.py", "--resume", folder)


@pytest.mark.parametrize(("name", "value"), [("matching", "joint"), ("moments_oe", 2), ("outlier_recipe", "strong")])
def test_a_flag_that_is_gone(whole, refused, tmp_path, name, value):
    stored = json.loads((run_folder(whole / "one") / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(stored | {"flags": stored["flags"] | {name: value}}))
    error = refused("main_poe.py", "--resume", tmp_path)
    assert f"does not know: --{name}={value}. Leave it out, or use the commit that knew it" in error


def test_checkpoints_of_older_code(whole, refused, tmp_path):
    """They hold the momentum of the images, but no state of an optimiser."""
    folder = run_folder(whole / "one")
    (tmp_path / "args.json").write_bytes((folder / "args.json").read_bytes())
    images = [torch.zeros(10, 1, 1, 8, 8)] * 2
    old = {"exp": 0, "finished": [], "method": {"images": images, "momentum": [None] * 2}}
    torch.save(load(folder / "checkpoint.pt") | old, tmp_path / "checkpoint.pt")
    told = "older code wrote it; resume it with that, or start a new run"
    assert told in refused("main_poe.py", "--resume", tmp_path)
    older = {"started": True, "found": {}}
    content = {name: value for name, value in load(folder / "checkpoint.pt").items() if name != "measures"}
    torch.save(content | older, tmp_path / "checkpoint.pt")
    assert told in refused("main_poe.py", "--resume", tmp_path)
