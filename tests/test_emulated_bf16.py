"""The emulation of bf16 beside PyTorch's own bf16 on this processor, which is slow but exact."""

import shlex
import sys

import pytest
import torch
from conftest import ROOT

from networks import get_network
from utils.compute.device import Compute
from utils.core.rng import generator

sys.path.insert(0, str(ROOT / "scripts"))
from emulate_bf16 import RoundingMode, rounded


def outputs(model, context):
    """Logits and gradients of a network within a context."""
    g = generator(1)
    net = get_network(model, 1, 10, (8, 8), generator(0))
    x, labels = torch.randn(16, 1, 8, 8, generator=g), torch.randint(10, (16,), generator=g)
    with context:
        logits = net(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    return logits.detach().float(), torch.cat([part.flatten() for part in gradients])


@pytest.mark.parametrize("model", ["ConvNetD1", "ConvNetD2", "MLP", "ConvNetBN", "ConvNetMP", "ConvNetAS"])
def test_as_autocast(model):
    exact = outputs(model, torch.autocast("cpu", torch.float32, enabled=False))
    own = outputs(model, torch.autocast("cpu", torch.bfloat16))
    emulated = outputs(model, RoundingMode())
    for full, half, found in zip(exact, own, emulated, strict=True):
        error = (half - full).norm()
        assert error > 0.001 * full.norm()
        assert (found - half).norm() < 0.5 * error


def test_rounding_goes_both_ways():
    x = torch.tensor([1.0 + 2**-9, 3.14159], requires_grad=True)
    y = rounded(x)
    assert y.tolist() == [1.0, 3.140625]
    (gradient,) = torch.autograd.grad(y, x, torch.tensor([1.0 + 2**-9, 1.0]))
    assert gradient.tolist() == [1.0, 1.0]
    assert rounded("text") == "text"


def test_a_run(script, tmp_path):
    flags = shlex.split("--dataset Digits --model ConvNetD1 --ipc 1 --method DM --batch_real 8 --seed 1 --num_exp 1")
    flags += shlex.split("--num_eval 1 --epoch_eval_train 1 --Iteration 2")
    images = {}
    for precision in ("fp32", "bf16"):
        words = [*flags, "--precision", precision, "--compile", "off", "--save_path", precision]
        ran = script("scripts/emulate_bf16.py", ROOT / "main.py", *words)
        assert ran.returncode == 0, ran.stderr
        assert f"torch.compile off, {precision}" in ran.stdout
        (file,) = (tmp_path / precision).rglob("res_*.pt")
        images[precision] = torch.load(file, weights_only=True)["data"][0][0]
    gap = (images["bf16"] - images["fp32"]).abs().max()
    assert 0 < gap < 0.1 * images["fp32"].abs().max()
    for words, message in (
        ([], "give a script"),
        ([ROOT / "main.py", "--precision=bf16"], "only --compile off can be emulated"),
    ):
        ran = script("scripts/emulate_bf16.py", *words)
        assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
        assert message in ran.stderr
    assert Compute(precision="bf16")._autocast.__qualname__.startswith("Compute")  # nothing is emulated here
