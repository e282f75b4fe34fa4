"""Where `torch.compile` is used, and a damaged cache of what it made."""

import inspect
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.exc import InductorError

from networks import get_network
from utils.compute.compiling import COSTS_CPU, SAVES_CPU, choose_compile, helps_on_cpu
from utils.compute.device import Compute
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.methods.match_draws import MatchSettings
from utils.stages.distill import passes_of
from utils.stages.distillation import DistillSettings
from utils.training.evaluator import EvalSettings
from utils.training.trainer import TrainSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def network(name="ConvNetW32"):
    return get_network(name, 3, 10, (32, 32), generator(0))


@pytest.mark.parametrize("what", COSTS_CPU)
def test_auto_compiles_where_the_time_comes_back(what, monkeypatch):
    monkeypatch.setattr("utils.compute.compiling.shutil.which", lambda name: "/usr/bin/" + name)
    breakeven = COSTS_CPU[what] * torch.get_num_threads() / SAVES_CPU / (32 * (32 * 32 + 16 * 16 + 8 * 8))
    for share, expected in ((0.9, False), (1.1, True)):
        compiled, why = choose_compile("auto", CPU, network(), (3, 32, 32), share * breakeven, 1, what)
        assert compiled is expected
        assert f"cost {COSTS_CPU[what]:.0f}" in why


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
def test_networks_that_compiling_does_not_help_on_a_cpu(name, helps, monkeypatch):
    monkeypatch.setattr("utils.compute.compiling.shutil.which", lambda name: "/usr/bin/" + name)
    net = network(name)
    assert helps_on_cpu(net) is helps
    assert choose_compile("auto", CPU, net, (3, 32, 32), 1e15, 1, "training")[0] is helps
    assert choose_compile("on", CPU, net, (3, 32, 32), 0, 1, "training") == (True, "")
    assert choose_compile("off", CPU, net, (3, 32, 32), 1e15, 1, "training") == (False, "")
    assert choose_compile("auto", CUDA, net, (3, 32, 32), 0, 500, "training")[0]
    assert not choose_compile("auto", CUDA, net, (3, 32, 32), 1e15, 499, "training")[0]
    chosen = Compute(compiled=True, why="auto: it pays")
    assert chosen.of(net).compiled is helps
    assert Compute(compiled=True).of(net).compiled  # the user did
    assert Compute(compiled=True, on_cuda=True, why="auto: it pays").of(net).compiled


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr("utils.compute.compiling.shutil.which", lambda name: None)
    compiled, why = choose_compile("auto", CPU, network(), (3, 32, 32), 1e15, 1, "training")
    assert not compiled
    assert str(Compute(compiled, why=why)) == "torch.compile off (auto: there is no C++ compiler), fp32"
    with pytest.raises(UserError, match=r"--compile on: .*install g"):
        choose_compile("on", CPU, network(), (3, 32, 32), 0, 1, "training")


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


@pytest.mark.parametrize(("failures", "message"), [(0, None), (1, None), (2, None), (3, "--compile: .* off")])
def test_a_damaged_cache_of_compiled_code(failures, message, monkeypatch, tmp_path):
    """The named library is removed, then a fresh cache is taken, then it is said."""
    library = tmp_path / "torchinductor_x" / "a.so"
    library.parent.mkdir()
    library.write_bytes(b"")
    calls = []

    def compile_(function, **_):
        def compiled(x):
            calls.append(x)
            if len(calls) <= failures:
                raise InductorError(ImportError(f"{library}: file too short"), inspect.currentframe())
            return function(x)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    function = Compute(compiled=True).function(lambda x: x + 1)
    if message:
        with pytest.raises(UserError, match=message):
            function(torch.ones(1))
    else:
        assert function(torch.ones(1)) == 2
        assert len(calls) == failures + 1
    assert library.exists() == (failures == 0)
    assert (os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before") == (failures < 2)


def test_passes_of_a_run_by_hand(digits, monkeypatch):
    """Three experiments of 10 iterations with four matching steps and 5 epochs after three of them; evaluated at 0, 4,
    8 and 10 with two networks of 7 epochs."""
    run = DistillSettings("DSA", "ConvNet", 2, 3, 10, 4, False, {})
    match = MatchSettings("ConvNet", 2, batch_real=64, batch_oe=32, outer_loop=4, inner_loop=5)
    evaluation = EvalSettings(2, {"ConvNet": TrainSettings(7)}, 1)
    tests = len(digits.images_test) / 2
    matched, trained, evaluated = 120 * 10 * (64 + 32), 30 * 3 * 5 * 40, 3 * 4 * 2 * (7 * 40 + tests)
    assert passes_of(run, match, evaluation, digits, True) == matched + trained + evaluated
    monkeypatch.setattr("utils.compute.distributed.world", lambda: 4)
    assert passes_of(run, match, evaluation, digits, True) == (matched + evaluated) / 4 + trained
    monkeypatch.setattr("utils.compute.distributed.world", lambda: 1)
    last = replace(run, eval_last_only=True)
    plain = passes_of(last, replace(match, batch_real=10**6), evaluation, digits, False)
    per_class = len(digits.images_train) // 10
    assert plain == 120 * 10 * per_class + 30 * 3 * 5 * 20 + 3 * 2 * (7 * 20 + tests)
