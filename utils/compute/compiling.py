"""`torch.compile`: when it saves time, and what happens when a compilation fails."""

import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from networks.convnet import ConvNet
from utils.compute.cpu_batches import convolution_outputs
from utils.core.errors import UserError, one_line

COMPILERS = ("c++", "g++", "clang++")
CUDA_STEPS = 500  # `auto` compiles longer runs than this on a GPU (not measured yet)
# Measured on two cores of a CPU: the seconds that compiling takes, and the seconds times threads that it saves for each
# number that a convolution puts out in one forward and backward pass of an image.
COMPILE_SECONDS = {"matching": 75.0, "training": 12.0, "testing": 3.0}
SAVED_SECONDS = 2 * 2e-9


@dataclass(frozen=True)
class Workload:
    """How long a run is, as far as it decides whether to compile.

    `passes`: images that go forward and backward through the network in this process; one that only goes forward counts
    half. `steps`: matching steps, training epochs or test batches. `kind`: a key of `COMPILE_SECONDS`.
    """

    passes: float
    steps: int
    kind: str


def faster_on_cpu(net: nn.Module) -> bool:
    """Whether compiled code is faster for this network on a CPU.

    It is for ConvNets that pool, 1.2 to 2 times. LeNet, AlexNet and VGG train more slowly (their poolings and their
    convolutions of many channels on few pixels); ResNets, an MLP and a ConvNet without pooling do not gain.
    """
    return isinstance(net, ConvNet) and any(isinstance(m, (nn.AvgPool2d, nn.MaxPool2d)) for m in net.modules())


def choose_compile(
    flag: str, device: torch.device, net: nn.Module, image_shape: tuple[int, ...], workload: Workload
) -> tuple[bool, str]:
    """Whether to compile, and why; the reason is empty unless `flag` is `auto`.

    `auto` compiles a run that is expected to save more time than compiling takes.

    Args:
        flag: `on`, `off` or `auto`.
    Raises:
        UserError: for `on` without a C++ compiler on a CPU.
    """
    if flag == "off":
        return False, ""
    if device.type == "cuda":
        why = f"auto: {workload.steps} steps; compiles from {CUDA_STEPS} on"
        return (True, "") if flag == "on" else (workload.steps >= CUDA_STEPS, why)
    compiler = next(filter(shutil.which, COMPILERS), None)
    if flag == "on" and compiler is None:
        raise UserError("--compile on: torch.compile needs a C++ compiler; install g++, or use --compile off")
    if flag == "on":
        failure = compiler_failure(compiler)
        if failure:
            raise UserError(f"--compile on: {compiler} fails: {failure}. Repair it, or use --compile off")
        return True, ""
    if compiler is None:
        return False, "auto: there is no C++ compiler"
    if not faster_on_cpu(net):
        return False, "auto: it does not make this network faster on a CPU"
    outputs = sum(convolution_outputs(net, image_shape))
    saves, costs = workload.passes * outputs * SAVED_SECONDS / torch.get_num_threads(), COMPILE_SECONDS[workload.kind]
    failure = compiler_failure(compiler) if saves > costs else ""
    if failure:
        warnings.warn(f"nothing is compiled: {compiler} fails: {failure}", stacklevel=2)
        return False, f"auto: {compiler} fails"
    return saves > costs, f"auto: saves about {saves:.0f} s, costs {costs:.0f} s"


@lru_cache
def compiler_failure(compiler: str) -> str:
    """The first line that a C++ compiler prints when it cannot compile an empty program; empty where it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "empty.cpp")
        with open(source, "w") as file:
            file.write("int main() { return 0; }\n")
        command = [compiler, source, "-o", os.path.join(folder, "empty")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            return one_line(error)
    lines = (done.stderr + done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else one_line(lines[0] if lines else f"exit status {done.returncode}")


class Compiled:
    """A compiled function of images `[N, C, H, W]` and more.

    The images are passed on in channels-last order, in which compiled convolutions and poolings are faster.

    A process that is killed while its compiler writes leaves a truncated library in the compiler's cache on the disk,
    and every later process that needs the same code fails to load it. When a compilation fails, that library is
    removed; if it fails again, a fresh cache is used; if it still fails, the compiler does not work here.

    Args:
        function: what is compiled.
        mode: of `torch.compile`.
        required: with a compiler that does not work, raise a `UserError` (`--compile on`) instead of warning once and
            running `function` as it is (`--compile auto`).
    """

    failed = False  # whether the compiler was found not to work, by any object of this class

    def __init__(self, function: Callable, mode: str | None, required: bool):
        self.function, self.mode, self.required = function, mode, required
        self.compiled = self._compile()

    def __call__(self, images: torch.Tensor, *rest: object) -> object:
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        for repair in (_remove_damaged_library, _use_fresh_cache, self._give_up):
            if Compiled.failed and not self.required:
                break
            try:
                return self.compiled(images, *rest)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                repair(str(error))
                torch._dynamo.reset()
                self.compiled = self._compile()
        return self.function(images, *rest)

    def _compile(self) -> Callable:
        for name in ("recompile_limit", "cache_size_limit"):  # its name before 2.7
            # one compilation per batch size: past the limit some would run eagerly, others of them after a resume
            if hasattr(torch._dynamo.config, name):
                setattr(torch._dynamo.config, name, 64)
        return torch.compile(self.function, mode=self.mode, dynamic=False)

    def _give_up(self, message: str) -> None:
        reason = compiler_message(message)
        if self.required:
            raise UserError(f"--compile on: torch.compile failed: {reason}. Repair the compiler or use --compile off")
        if not Compiled.failed:
            warnings.warn(f"torch.compile failed, so nothing is compiled: {reason}", stacklevel=3)
        Compiled.failed = True


def compiler_message(message: str) -> str:
    """The C++ compiler's own first line in an error of `torch.compile`, else the error's first line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    after = next((i + 1 for i, line in enumerate(lines) if line == "Output:"), 0)
    return one_line(lines[after] if after < len(lines) else message)


def _remove_damaged_library(message: str) -> None:
    """Remove the library of the compiler's cache that an error names."""
    named = re.search(r"(/\S+/torchinductor\S*\.so)", " ".join(message.split()))
    if named:
        with suppress(OSError):
            os.unlink(named[1])


_fresh_cache: tempfile.TemporaryDirectory | None = None


def _use_fresh_cache(message: str) -> None:
    global _fresh_cache
    if _fresh_cache is None:
        _fresh_cache = tempfile.TemporaryDirectory(prefix="torchinductor_", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _fresh_cache.name


def remove_fresh_cache() -> None:
    """Remove the cache that replaced a damaged one. An ordinary end of the process does so by itself."""
    if _fresh_cache is not None:
        _fresh_cache.cleanup()
