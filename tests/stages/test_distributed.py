"""Several gloo processes under torchrun give what one process gives; a dead process ends the run."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAUNCHER, ROOT

import main_poe
import test_ood_model_syn
import train_model_synthetic_oe
from utils.data.distilled_file import DistilledFile
from utils.runs.resume import resume_command

NETWORK = "--dataset Digits --model MLP --ipc 2 --method DSA --dsa_strategy color_crop_cutout_scale_rotate"
TRAINING = f"{NETWORK} --num_eval 3 --epoch_eval_train 8 --seed 3".split()
MATCHING = "--init real --num_exp 1 --batch_real 32 --batch_oe 32 --outer_loop 2 --inner_loop 2"
FLAGS = TRAINING + MATCHING.split()
ENDLESS = [*FLAGS, "--num_eval", 1, "--Iteration", 100000]
RESULTS = "result-test-ood-synthetic"


def run_alone(folder, module, *flags):
    """In this process, without a launcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        module.main(module.get_args_parser().parse_args(list(map(str, flags))))


@pytest.fixture(scope="module")
def runs(torchrun, tmp_path_factory):
    """Stage 1 with 1, 2 and 3 processes, of which 3 does not divide the ten slots; stage 2 with 1 and 2."""
    folders = {n: tmp_path_factory.mktemp(f"processes{n}") for n in (1, 2, 3)}
    run_alone(folders[1], main_poe, *FLAGS, "--Iteration", 3)
    run_alone(folders[1], train_model_synthetic_oe, *TRAINING)
    for processes, script, flags in [
        (2, "main_poe.py", [*FLAGS, "--Iteration", 3]),
        (3, "main_poe.py", [*FLAGS, "--Iteration", 3]),
        (2, "train_model_synthetic_oe.py", TRAINING),
    ]:
        process = torchrun(folders[processes], processes, script, *flags)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{out}\n{err}"
        assert out.count("run folder") == 1
    return folders


def test_matching_on_experts_with_several_processes(torchrun, tmp_path):
    """Images in parts; the first of the processes computes the classification loss, and trains the experts."""
    flags = f"{NETWORK.replace('DSA', 'TGDD', 1)} --num_exp 1 --num_eval 1 --epoch_eval_train 2 --Iteration 3".split()
    flags += ["--factor", 2, "--batch_real", 32, "--batch_oe", 32]
    flags += ["--train_experts", "auto", "--buffer_path", "buffers"]
    run_alone(tmp_path, main_poe, *flags)
    sets = [DistilledFile.open(found(tmp_path / "result-poe", "res_*.pt")[0]).set()]
    for processes in (2, 3):
        process = torchrun(tmp_path, processes, "main_poe.py", *flags, "--save_path", f"of{processes}")
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{out}\n{err}"
        sets.append(DistilledFile.open(found(tmp_path / f"of{processes}", "res_*.pt")[0]).set())
    for other in sets[1:]:
        assert other.factor == 2
        torch.testing.assert_close(sets[0].images, other.images, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sets[0].images_oe, other.images_oe, atol=1e-4, rtol=1e-4)


def found(folder, pattern):
    return sorted(folder.rglob(pattern))


@pytest.mark.parametrize("processes", [2, 3])
def test_same_images_and_accuracies(runs, processes):
    (one,), (many,) = (found(runs[n], "res_*.pt") for n in (1, processes))
    a, b = DistilledFile.open(one).set(), DistilledFile.open(many).set()
    torch.testing.assert_close(a.images, b.images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.images_oe, b.images_oe, atol=1e-4, rtol=1e-4)
    accs = [torch.load(p, weights_only=True)["accs_all_exps"]["MLP"] for p in (one, many)]
    assert len(accs[0]) == len(accs[1]) == 3
    assert accs[0] == pytest.approx(accs[1], abs=0.01)


def test_same_networks_and_one_folder(runs):
    """Three networks over two processes."""
    one, many = (found(runs[n], "syn_trained_*.pt") for n in (1, 2))
    assert [p.name for p in one] == [p.name for p in many]
    assert len(many) == 6
    assert len({p.parent for p in many}) == 1
    for a, b in zip(one, many, strict=True):
        a, b = (torch.load(p, weights_only=True) for p in (a, b))
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-2, rtol=1e-2)


def resume_networks(runs, folder):
    """Resume a copy of stage 2 with two processes, of which the second has network 1 alone."""
    shutil.copytree(runs[2], folder)
    (run,) = {p.parent for p in found(folder, "checkpoint_network1.pt")}
    for path in run.glob("*network1*.pt"):
        path.unlink()
    for path in run.glob("syn_trained_*_exp1_*.pt"):
        path.unlink()
    return run


def test_networks_of_one_process_go_on(torchrun, runs, tmp_path):
    run = resume_networks(runs, tmp_path / "copy")
    process = torchrun(tmp_path / "copy", 2, "train_model_synthetic_oe.py", "--resume", run)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    assert "is finished" not in out
    test_same_networks_and_one_folder(runs | {2: tmp_path / "copy"})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["network"] for line in lines) == [0, 1, 2]


def test_the_process_that_fails_says_it(torchrun, runs, tmp_path):
    run = resume_networks(runs, tmp_path / "copy")
    (run / "checkpoint_network1.pt").write_bytes(b"junk")
    process = torchrun(tmp_path / "copy", 2, "train_model_synthetic_oe.py", "--resume", run)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "error: process 1: --resume: no checkpoint in" in err
    assert "[rank0]" not in err


def test_a_wrong_flag_is_said_once(torchrun, tmp_path):
    process = torchrun(tmp_path, 2, "main_poe.py", *FLAGS, "--load_path", "nowhere.pt")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("main_poe.py: error: ") == 1
    assert not list(tmp_path.iterdir())


def test_a_process_that_dies_ends_the_run(forks, tmp_path):
    (folder := tmp_path / "run").mkdir()
    words = [*LAUNCHER, 2, ROOT / "main_poe.py", *ENDLESS]
    process = forks.start(words, folder, tmp_path / "printed")
    deadline = time.monotonic() + 120
    while not found(folder, "res_*.pt") and time.monotonic() < deadline:
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait() != 0
    err = (tmp_path / "printed").read_text()
    assert "SIGKILL" in err or "exitcode: -9" in err or "exitcode  : -9" in err
    (saved,) = found(folder, "res_*.pt")
    assert DistilledFile.open(saved).set().images.shape == (20, 1, 8, 8)


def test_a_signal_stops_every_process_and_saves(torchrun, tmp_path):
    process = torchrun(tmp_path, 2, "main_poe.py", *ENDLESS, "--checkpoint_interval", 1)
    try:
        deadline = time.monotonic() + 120
        while not found(tmp_path, "checkpoint.pt") and time.monotonic() < deadline:
            time.sleep(0.2)
        process.terminate()
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "stopped at experiment 0, iteration " in out
    *_, command = out.strip().splitlines()
    assert command.startswith("torchrun --standalone --nproc_per_node 2 ")
    assert torch.load(found(tmp_path, "checkpoint.pt")[0], weights_only=True)["evaluated"] in (True, False)


PROGRAM = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from utils.compute import distributed
from utils.compute.device import choose_device
from utils.core.errors import UserError, print_line
from utils.runs.run_folder import RunFolder
from utils.core.run_script import run_script
from utils.data.datasets import load_dataset
from utils.data.download import NotThere
from utils.ood.sets import OODSource

def main():
    try:
        choose_device("cuda:0")
    except UserError as error:
        print_line(f"refused: {{error}}")
    choose_device("cpu")
    with distributed.main_first():
        if not Path("fetched").exists():  # only the first process finds nothing
            time.sleep(0.5)
            print_line("fetching")
            Path("fetched").write_text("whole")
    try:
        with distributed.main_first():
            if distributed.is_main():
                raise NotThere("no network")
    except NotThere as error:
        print_line(f"{{distributed.rank()}} {{error}}")
    run = RunFolder.create("runs", name="a")
    run.log("common")
    run.log_own("own")
    source = OODSource(load_dataset("Digits", "."), Path(f"ood{{distributed.rank()}}"), Path("."), False, 10, 0)
    there, missing = source.find(["CIFAR100", "Textures", "patches"])  # Textures: for the second process only
    print_line(f"{{distributed.rank()}} has {{len(there)}} lacks {{sorted(missing)}}")

run_script(main, "program.py")
"""
OWN_ERROR = """
import sys
sys.path.insert(0, {root!r})
from utils.compute import distributed
from utils.compute.device import choose_device
from utils.core import errors
from utils.core.run_script import run_script

def main():
    choose_device("cpu")
    if distributed.rank() == 1:
        raise errors.UserError("seen here alone")
    distributed.barrier()

errors.PRINT_SECONDS = 0.1
run_script(main, "program.py")
"""


def test_an_error_that_the_first_process_does_not_meet(torchrun, tmp_path):
    (tmp_path / "program.py").write_text(OWN_ERROR.format(root=str(ROOT)))
    process = torchrun(tmp_path, 2, tmp_path / "program.py")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: process 1: seen here alone" in err


def test_what_one_process_does_for_all(torchrun, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    (tmp_path / "ood1").mkdir()
    np.save(tmp_path / "ood1" / "Textures.npy", np.full((3, 8, 8, 1), 255, np.uint8))
    process = torchrun(tmp_path, 2, tmp_path / "program.py")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("fetching") == 1
    assert "0 no network" in out
    assert "1 no network" in out
    for rank in range(2):
        assert f"{rank} has 1 lacks ['CIFAR100', 'Textures']" in out
    assert out.count("refused: --device cuda:0: under torchrun each process takes a GPU of its own") == 2
    lines = [line.split("] ", 1)[1] for line in (tmp_path / "runs/a/logs.txt").read_text().splitlines()]
    assert sorted(lines) == ["common", "own", "process 1: own"]


def test_stage_3_on_two_processes(torchrun, runs, tmp_path):
    """Three networks over two processes: the files of one."""
    flags = "--dataset Digits --model MLP --ipc 2 --method DSA --num_exp 3 --is_load_best --ood_sets patches blob"
    shutil.copytree(runs[2], tmp_path / "two")
    process = torchrun(tmp_path / "two", 2, "test_ood_model_syn.py", *flags.split(), "--score", "msp", "energy")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    assert out.count("results: ") == 1
    run_alone(tmp_path / "two", test_ood_model_syn, *flags.split(), "--score", "msp", "energy", "--save_path", "alone")
    a, b = (json.loads(found(tmp_path / "two" / d, "results.json")[0].read_text()) for d in (RESULTS, "alone"))
    assert [row["network"] for row in a["rows"]] == [row["network"] for row in b["rows"]]
    for x, y in zip(a["rows"] + a["errors"], b["rows"] + b["errors"], strict=True):
        assert x == pytest.approx(y)


def test_the_line_that_resumes_a_run_over_several_machines(monkeypatch):
    monkeypatch.setattr("utils.compute.distributed.world_size", lambda: 8)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    torchrun = {"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
    for name, value in (torchrun | {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    expected = "torchrun --nnodes 2 --nproc_per_node 4 --node_rank 1 --master_addr node0 --master_port 29500"
    assert resume_command(Path("run")) == f"{expected} main.py --resume run"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert resume_command(Path("run")) == "torchrun --standalone --nproc_per_node 4 main.py --resume run"
