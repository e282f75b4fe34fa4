#!/usr/bin/env python3
"""Run a script with the arithmetic of `--precision bf16` on a processor that has no bf16 instructions.

    python scripts/emulate_bf16.py main_poe.py --precision bf16 --compile off --dataset Digits ...

It shows what bf16 does to the results, not how fast it is. Convolutions, matrix products, norms, activations and
pooling round what they take and give to bfloat16, in both directions, and sum in float32, as the instructions do. Not
for CUDA.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from utils.compute import device
from utils.core.errors import UserError
from utils.stages.entry import run_script

# those that autocast runs in bfloat16, and those whose inputs then are in bfloat16 already
ROUNDED = (
    torch.conv2d, F.linear, torch.matmul, torch.Tensor.matmul, torch.instance_norm, F.instance_norm, F.group_norm,
    torch.relu, F.relu, torch.sigmoid, F.avg_pool2d, F.max_pool2d,
)  # fmt: skip


def rounded(x: object) -> object:
    """A float32 tensor rounded to bfloat16 and back, as its gradient is on the way back; anything else unchanged."""
    is_float = isinstance(x, torch.Tensor) and x.dtype == torch.float32
    return x.to(torch.bfloat16).to(torch.float32) if is_float else x


class RoundingMode(TorchFunctionMode):
    """Within it, the operations of `ROUNDED` compute as in bfloat16 with float32 sums."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Call `func`, with operands and result rounded where it is one of `ROUNDED`."""
        kwargs = kwargs or {}
        if func not in ROUNDED:
            return func(*args, **kwargs)
        return rounded(func(*map(rounded, args), **{name: rounded(value) for name, value in kwargs.items()}))


def emulate() -> None:
    """From now on the program takes this processor for one with bf16 instructions, and rounds as they do."""

    def under_rounding(function: Callable) -> Callable:
        def run(*inputs: object) -> object:
            with RoundingMode():
                return function(*inputs)

        return run

    device.has_bfloat16_instructions = lambda: True
    device.Compute._autocast = staticmethod(under_rounding)


def main() -> None:
    """Run the script that the command line names, with the rest of it as its flags."""
    words = sys.argv[1:]
    if not words or not Path(words[0]).is_file():
        raise UserError("give a script and its flags, e.g. main_poe.py --precision bf16 --compile off")
    flags = " ".join(words).replace("=", " ").replace("-", "_")
    if "__precision bf16" in flags and "__compile off" not in flags:
        raise UserError("--compile: only --compile off can be emulated; give it")
    emulate()
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    run_script(main, "emulate_bf16.py")
