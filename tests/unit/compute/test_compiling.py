"""When `torch.compile` is used, and what happens when it fails."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, needs_compiler
from torch._dynamo.exc import BackendCompilerFailed

import main_poe
from networks import get_network
from utils.compute import device, distributed
from utils.compute.device import (
    COMPILE_SECONDS,
    SAVED_SECONDS,
    Compiled,
    Compute,
    Workload,
    choose_compile,
    faster_on_cpu,
)
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.methods import METHODS, MethodInputs
from utils.methods.gradient_matching import GradientSettings
from utils.outliers.sources import PseudoOutliers
from utils.stages import stage2
from utils.stages.evaluation import EvalSettings
from utils.stages.stage1 import total_workload
from utils.training.trainer import TrainSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def network(name="ConvNetW32"):
    return get_network(name, 3, 10, (32, 32), generator(0))


@pytest.mark.parametrize("what", COMPILE_SECONDS)
def test_auto_compiles_where_the_time_comes_back(what):
    breakeven = COMPILE_SECONDS[what] * torch.get_num_threads() / SAVED_SECONDS / (32 * (32 * 32 + 16 * 16 + 8 * 8))
    for share, expected in ((0.9, False), (1.1, True)):
        compiled, why = choose_compile("auto", CPU, network(), (3, 32, 32), Workload(share * breakeven, what))
        assert compiled is expected
        assert f"costs {COMPILE_SECONDS[what]:.0f} s" in why


@pytest.mark.parametrize(("iterations", "expected"), [(3400, False), (3600, True)])
def test_on_a_gpu_a_run_of_dm_is_compiled_from_3500_iterations_on(iterations, expected):
    """Measured there with POE at ipc 10: compiling takes 21 s and saves 6 ms of an iteration with 256 real images and
    outliers of each class."""
    images, labels = torch.zeros(3000, 3, 32, 32, dtype=torch.uint8), torch.arange(3000) % 10
    real = RealData("CIFAR10", 10, (0.5,) * 3, (0.2,) * 3, images, labels, images[:10], labels[:10])
    settings = main_poe.get_args_parser().parse_args(["--method", "DM", "--ipc", "10"])
    of_iteration = METHODS["DM"].workload(MethodInputs(real, PseudoOutliers(real), settings))
    work = replace(of_iteration, passes=iterations * of_iteration.passes)
    compiled, why = choose_compile("auto", CUDA, network("ConvNet"), (3, 32, 32), work)
    assert compiled is expected
    assert "costs 21 s" in why


@pytest.mark.parametrize(
    ("name", "helps"),
    [
        ("ConvNet", True),
        ("ConvNetMP", True),
        ("ConvNetBN", True),
        ("ConvNetNP", False),
        ("VGG11", False),
        ("MLP", False),
    ],
)
def test_networks_that_compiling_does_not_help_on_a_cpu(name, helps):
    net = network(name)
    assert faster_on_cpu(net) is helps
    assert choose_compile("auto", CPU, net, (3, 32, 32), Workload(1e15, "training"))[0] is helps
    assert choose_compile("on", CPU, net, (3, 32, 32), Workload(0, "training")) == (True, "")
    assert choose_compile("off", CPU, net, (3, 32, 32), Workload(1e15, "training")) == (False, "")
    assert choose_compile("auto", CUDA, net, (3, 32, 32), Workload(1e15, "training"))[0] is (name != "MLP")
    assert not choose_compile("auto", CUDA, net, (3, 32, 32), Workload(1e5, "training"))[0]
    chosen = Compute(compiled=True, why="auto: it pays")
    assert chosen.for_network(net).compiled is helps
    assert Compute(compiled=True).for_network(net).compiled  # the user did
    assert Compute(compiled=True, on_cuda=True, why="auto: it pays").for_network(net).compiled


def test_compiled_code_gets_images_in_channels_last_order(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: (seen.append(args), function(*args))[1])
    x = torch.rand(2, 3, 5, 4)
    out = Compute(compiled=True).function(lambda images, n: F.relu(images - n))(x, 0.5)
    assert torch.equal(out, F.relu(x - 0.5))
    assert seen[0][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[0][0], x)
    by_slot = torch.rand(2, 2, 3, 5, 4)
    Compute(compiled=True).function(lambda images: images)(by_slot)
    assert seen[1][0] is by_slot


class BackendError(BackendCompilerFailed):
    """As torch.compile raises it, whose own arguments differ between versions of PyTorch."""

    def __init__(self, text):
        Exception.__init__(self, text)


@pytest.mark.parametrize("required", [False, True])
def test_a_compilation_that_fails(required, monkeypatch):
    """An error for `--compile on`; for `auto` one warning, after which functions run as they are."""
    calls = []

    def compile_(function, **_):
        def compiled(x):
            calls.append(x)
            raise BackendError("cache/a.so: file too short")

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(Compiled, "failed", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "the/cache")
    functions = [Compiled(lambda x: x + 1, None, required) for _ in range(2)]
    if required:
        with pytest.raises(
            UserError, match=r"--compile on: .*file too short.* delete its cache, the/cache, .*--compile off"
        ):
            functions[0](torch.ones(1))
        return
    with pytest.warns(UserWarning, match=r"file too short.* delete its cache, the/cache") as warned:
        assert [f(torch.ones(1)) for f in functions] == [2, 2]
    assert len(warned) == 1
    assert len(calls) == 1  # the second does not try


@pytest.mark.parametrize("flag", ["auto", "on"])
def test_a_compiler_that_fails_does_not_end_a_run(flag, run_with_broken_compiler):
    """A script that exits with 1 in the compiler's place."""
    done = run_with_broken_compiler(flag)
    if flag == "on":
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert "--compile on: torch.compile failed: InvalidCxxCompiler: No working C++ compiler found" in done.stderr
        assert "Install or repair g++" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("nothing is compiled: torch.compile failed: InvalidCxxCompiler") == 1


@pytest.fixture(scope="module")
def warm_forks(forks):
    """Forked processes have imported what compiles; none has compiled anything."""
    forks.warm("torch._inductor.compile_fx")
    return forks


@pytest.fixture
def run_with_broken_compiler(warm_forks, program, tmp_path):
    """Distil in a process whose C++ compiler is a script that fails; `auto` is made to choose to compile."""

    def run(flag):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("c++", "g++", "clang++"):
            path = folder / name
            path.write_text("#!/bin/sh\nexit 1\n")
            path.chmod(0o755)
        flags = "--dataset Digits --model ConvNetD1 --ipc 1 --method DSA --dsa_strategy crop_scale --num_exp 1"
        flags += " --num_eval 1 --epoch_eval_train 2 --Iteration 1 --batch_real 16"
        code = "import sys; from utils.compute import device; device.COMPILE_SECONDS = dict.fromkeys("
        code += "device.COMPILE_SECONDS, 0.0); import main; from utils.core.run_script import run_script; "
        code += "run_script(lambda: main.main(main.get_args_parser().parse_args()), 'main.py')"
        env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CXX": ""}
        env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        env.pop("CXX")
        command = program(code, *flags.split(), "--compile", flag)
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=env)

    return run


def test_passes_of_a_run_by_hand(digits, monkeypatch):
    """Three experiments of 10 iterations with four matching steps and 5 epochs after three of them; evaluated at 0, 4,
    8 and 10 with two networks of 7 epochs."""
    loops = {"num_exp": 3, "Iteration": 10, "eval_interval": 4, "outer_loop": 4, "inner_loop": 5}
    run = GradientSettings(model="ConvNet", ipc=2, batch_real=64, batch_oe=32, **loops)
    evaluation = EvalSettings(2, {"ConvNet": TrainSettings(7)}, 1)

    def passes(run, outliers):
        inputs = MethodInputs(digits, outliers, run)
        total = total_workload(METHODS["DC"].workload(inputs), evaluation, inputs)
        assert total.kind == "matching"
        return total.passes

    outliers, tests = PseudoOutliers(digits), len(digits.images_test) / 2
    matched, trained, evaluated = 120 * 10 * (64 + 32), 30 * 3 * 5 * 40, 3 * 4 * 2 * (7 * 40 + tests)
    assert passes(run, outliers) == pytest.approx(matched + trained + evaluated)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert passes(run, outliers) == pytest.approx((matched + evaluated) / 4 + trained)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    last = replace(run, eval_mode="M", batch_real=10**6)
    per_class = len(digits.images_train) // 10
    expected = 120 * 10 * per_class + 30 * 3 * 5 * 20 + 3 * 2 * (7 * 20 + tests)
    assert passes(last, None) == pytest.approx(expected)


def test_compiled_code_is_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set, so that it is restored after the test")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device.use_lasting_cache()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_relative_to(tmp_path / "cache" / "trustdd")
    assert torch.__version__.replace("+", "-") in folder.name
    monkeypatch.setattr(device, "processor_features", lambda: "another")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    device.use_lasting_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != str(folder)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/the/users")
    device.use_lasting_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/the/users"


def test_a_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set, so that it is restored after the test")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path / "file"), "~/.cache"):  # the second is what a user without a home has
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        device.use_lasting_cache()
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@needs_compiler
def test_a_second_process_compiles_nothing_anew(warm_forks, program, tmp_path, monkeypatch):
    """It finds everything in the cache of the first, which was started anew: no new library is written."""
    code = (
        "import torch; from utils.compute.device import Compiled; "
        "f = Compiled(lambda x: (x * 2).relu().sum(), None, True); print(f(torch.ones(2, 3, 4, 4)).item())"
    )
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    libraries = []
    for command in ([sys.executable, "-c", code], program(code)):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == "192.0", done.stderr
        libraries.append({path: path.stat().st_mtime_ns for path in (tmp_path / "trustdd").rglob("*.so")})
    assert libraries[0]
    assert libraries[0] == libraries[1]


def test_passes_of_stage_2_by_hand(digits, monkeypatch):
    """Six networks of 300 epochs on 20 images and 20 outliers, shared by two processes, tested every 50."""
    synthetic = SyntheticSet(torch.zeros(20, 1, 8, 8), torch.arange(20) % 10, torch.zeros(20, 1, 8, 8))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found = stage2.stage2_workload(6, TrainSettings(300), digits, synthetic)
    trained, tests = 3 * 300 * 40, -(-300 // stage2.TEST_INTERVAL)
    assert found.passes == trained + 3 * tests * len(digits.images_test) / 2


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        # ten slots of 64 real images and 32 corrupted ones, which go forward alone, and ipc 2 of both kinds
        ("--method DM --batch_real 64 --batch_oe 32", 10 * 96 / 2 + 40),
        # ten steps of 20 images and 20 outliers, three passes each
        ("--method MTT --syn_steps 10", 3 * 10 * 40),
    ],
)
def test_passes_of_an_iteration_by_hand(digits, flags, passes):
    parser = main_poe.get_args_parser()
    args = parser.parse_args(f"--dataset Digits --model ConvNetD1 --ipc 2 {flags}".split())
    found = METHODS[args.method].workload(MethodInputs(digits, PseudoOutliers(digits), args))
    assert found.passes == passes
