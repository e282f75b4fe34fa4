"""What tables need, and scripts of `scripts/dev`: the GPU check, with a stand-in for Python; cold starts."""

import json
import os
import re
import shlex
import subprocess
import sys

import benchmark
import check_inputs
import cold_starts
import dataset_outliers
import numpy as np
import profile_works
import pytest
from conftest import ROOT
from test_tables import PARSERS, parsed

from utils.core.errors import UserError
from utils.core.pixels import unit_images
from utils.data.datasets import load_dataset


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
folder=$2
if [ "$1" = scripts/runner.py ]; then shift 2; fi
printf '%q ' "$@" >> "$NOTES"; echo >> "$NOTES"
if [ -n "$SLOW" ]; then exec sleep "$SLOW"; fi
if [ -z "$STATUS" ]; then mkdir -p "$folder" && touch "$folder/done"; fi
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
    notes, stub = tmp_path / "notes", tmp_path / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text('__version__ = "0"\n')  # each part notes the version; the real one takes long

    def run(*parts, **variables):
        notes.write_text("")
        places = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), "DATA": "place"}
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(stand_in), "NOTES": str(notes)}
        env |= {"REAL": sys.executable, "SLOW": "", "PYTHONPATH": str(stub)}
        command = ["bash", str(ROOT / "scripts" / "dev" / "gpu_check.sh"), *parts]
        done = subprocess.run(command, env=env | places | variables, capture_output=True, text=True, timeout=120)
        found = sorted((tmp_path / "out").glob(f"gpu_check-Stand-in-{parts[-1]}.json"))
        steps = json.loads(found[0].read_text())["steps"] if found else []
        return done.returncode, [shlex.split(line) for line in notes.read_text().splitlines()], steps

    return run


def test_every_part_of_the_gpu_check_gives_flags_that_the_scripts_take(gpu_check):
    status, commands, steps = gpu_check("distil", "tgdd", "dm", "dsa", "expert", "mtt")
    assert status == 0
    assert len(commands) == 4 + 3 + 3 + 3 + 1 + 4
    for words in commands:
        args = parsed(words)
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
    assert {"iteration", "stage2", "stage3", "dm", "tgdd", "experts", "mtt", "memory"} == works


def test_the_benchmarks_have_the_flags_that_they_read():
    """`Bench` serves two scripts, with a parser each."""
    used = set(re.findall(r"args\.(\w+)", (ROOT / "scripts/dev/benchmark_works.py").read_text()))
    used |= set(re.findall(r"bench\.args\.(\w+)", (ROOT / "scripts/dev/benchmark_methods.py").read_text()))
    assert {"model", "ipc", "device", "compile", "precision", "deterministic"} <= used
    for script in (benchmark, profile_works):
        assert used <= vars(script.get_args_parser().parse_args([])).keys()


def test_a_part_of_the_gpu_check_is_interrupted_and_resumed(gpu_check):
    status, commands, steps = gpu_check("dsa", SLOW="20", LIMIT="1", DRIVER="2.5")  # a driver that loads first
    assert (status, len(commands), steps[0]["result"]) == (0, 1, "interrupted")
    status, commands, steps = gpu_check("dsa")
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
