"""`torch.compile`: when to use it, and how to recover when a compilation fails."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from networks.convnet import ConvNet
from utils.compute.cpu_batches import convolution_outputs
from utils.core.errors import UserError, one_line

COMPILERS = ("c++", "g++", "clang++")
# On a GPU, `auto` compiles runs of at least this many steps. Measured on an H100 with DM (ConvNet, ipc 10): compiling
# takes 21 s and saves 6 ms an iteration (a single measurement). Taken for all other work, too, which was not measured.
CUDA_STEPS = 3500
# Measured on two CPU cores: the seconds that compiling takes, and the thread-seconds that it saves for each output
# element of a convolution in one forward and backward pass of an image.
COMPILE_SECONDS = {"matching": 75.0, "training": 12.0, "testing": 3.0}
SAVED_SECONDS = 2 * 2e-9


@dataclass(frozen=True)
class Workload:
    """The length of a run, from which `choose_compile` decides.

    `passes`: forward and backward passes of single images in this process; a forward pass alone counts half.
    `steps`: how often a batch goes through a network in this process. One is a matching step (of images and outliers
    together), a step of a student, an update of a network in training, or a batch that is only tested; networks that
    train simultaneously count singly. `kind`: a key of `COMPILE_SECONDS`. `bf16_passes`: the passes that `--precision
    bf16` speeds up; a forward pass alone counts a quarter.
    """

    passes: float
    steps: int
    kind: str
    bf16_passes: float = 0.0


def batches(images: int, size: int) -> int:
    """How many batches of `size` hold so many images; the last may hold fewer."""
    return -(-images // size)


def faster_on_cpu(net: nn.Module) -> bool:
    """Whether compiled code is faster for this network on a CPU.

    ConvNets with pooling become 1.2 to 2 times faster. LeNet, AlexNet and VGG become slower (because of their pooling,
    and convolutions of many channels on few pixels); ResNets, MLP and ConvNets without pooling do not gain.
    """
    return isinstance(net, ConvNet) and any(isinstance(m, (nn.AvgPool2d, nn.MaxPool2d)) for m in net.modules())


def choose_compile(
    flag: str, device: torch.device, net: nn.Module, image_shape: tuple[int, ...], workload: Workload
) -> tuple[bool, str]:
    """Whether to compile, and why; the reason is empty unless `flag` is `auto`.

    On a CPU, `auto` compiles if the expected saving exceeds the compile time; on a GPU, from `CUDA_STEPS` steps.

    Args:
        flag: `on`, `off` or `auto`.
    Raises:
        UserError: for `on` without a working C++ compiler on a CPU.
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
    """The first line that a C++ compiler prints when it fails on an empty program; an empty string if it works."""
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
    """A compiled function of images `[N, C, H, W]` and further arguments.

    Images are converted to channels-last order, in which compiled convolutions and pooling are faster.

    After a compilation that fails, everything runs uncompiled. It may fail because a process was killed while it wrote
    into the compile cache; the message names the folder.

    Args:
        function: the function to compile.
        mode: the mode of `torch.compile`.
        required: if the compiler is broken, raise a `UserError` (`--compile on`); otherwise warn once and run
            `function` uncompiled (`--compile auto`).
    """

    failed = False  # whether any object of this class found the compiler broken

    def __init__(self, function: Callable, mode: str | None, required: bool):
        self.function, self.mode, self.required = function, mode, required
        use_lasting_cache()
        say_nothing_of_cuda()
        self.compiled = self._compile()

    def __call__(self, images: torch.Tensor, *rest: object) -> object:
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        if not Compiled.failed or self.required:
            try:
                return self.compiled(images, *rest)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                self._give_up(str(error))
        return self.function(images, *rest)

    def _compile(self) -> Callable:
        for name in ("recompile_limit", "cache_size_limit"):  # the name before PyTorch 2.7
            # each batch size is compiled; past the limit some would run uncompiled, different ones after a resume
            if hasattr(torch._dynamo.config, name):
                setattr(torch._dynamo.config, name, 64)
        return torch.compile(self.function, mode=self.mode, dynamic=False)

    def _give_up(self, message: str) -> None:
        reason = f"torch.compile failed: {compiler_message(message)}"
        cure = (
            f"Repair the compiler, or delete its cache, {os.environ.get('TORCHINDUCTOR_CACHE_DIR', 'torchinductor_*')}"
        )
        if self.required:
            raise UserError(f"--compile on: {reason}. {cure}, or use --compile off")
        warnings.warn(f"nothing is compiled: {reason}. {cure}", stacklevel=3)
        Compiled.failed = True


def say_nothing_of_cuda() -> None:
    """Let PyTorch built for CUDA compile for a CPU without its line "No CUDA runtime is found".

    It prints that when it finds a CUDA toolkit, but no GPU, in this process and in those that it starts to compile. An
    empty path tells it not to look for one.
    """
    if torch.version.cuda and not torch.cuda.is_available():
        os.environ.pop("CUDA_HOME", None)
        os.environ["CUDA_PATH"] = ""


def use_lasting_cache() -> None:
    """Keep compiled code under the user's cache folder, where it outlives a restart, so that later runs find it there.

    By default PyTorch keeps it in the system's temporary folder. There is a folder for each version of PyTorch and each
    kind of processor, since a home folder may be shared by machines. A `TORCHINDUCTOR_CACHE_DIR` that is set stays.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    kind = f"torch-{torch.__version__}-{_processor()}".replace("+", "-")
    folder = os.path.join(root, "trustdd", kind)
    if not os.path.isabs(root):  # no home: `~` is not expanded
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def _processor() -> str:
    """Eight digits that tell processors with other instructions apart."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]


def compiler_message(message: str) -> str:
    """The first line of the C++ compiler's output in an error of `torch.compile`, else the error's first line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    after = next((i + 1 for i, line in enumerate(lines) if line == "Output:"), 0)
    return one_line(lines[after] if after < len(lines) else message)
