"""`torch.compile`: when to use it, and how to recover when a compilation fails."""

import hashlib
import logging
import os
import platform
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from networks.convnet import ConvNet
from utils.compute.cpu_batches import convolution_outputs
from utils.core.errors import UserError, one_line

# On a GPU, `auto` compiles runs of at least this many steps. Measured on an H100 with DM (ConvNet, ipc 10): compiling
# takes 21 s and saves 6 ms an iteration (a single measurement). Taken for all other work, too, which was not measured.
CUDA_STEPS = 3500
# Measured on two CPU cores: the seconds that compiling takes, and the thread-seconds that it saves for each output
# element of a convolution in one forward and backward pass of an image.
COMPILE_SECONDS = {"matching": 75.0, "features": 25.0, "training": 12.0, "testing": 3.0}
SAVED_SECONDS = 2 * 2e-9


@dataclass(frozen=True)
class Workload:
    """The length of a run in this process."""

    passes: float  # forward and backward passes of single images; a forward pass alone counts half
    steps: int  # how often a batch goes through a network: matching steps, updates of networks, tested batches
    kind: str  # a key of `COMPILE_SECONDS`


def batches(images: int, size: int) -> int:
    """How many batches of `size` hold so many images; the last may hold fewer."""
    return -(-images // size)


def faster_on_cpu(net: nn.Module) -> bool:
    """Whether compiled code is faster for this network on a CPU: ConvNets with pooling become 1.2 to 2 times faster.

    LeNet, AlexNet and VGG become slower; ResNets, MLP and ConvNets without pooling do not gain.
    """
    return isinstance(net, ConvNet) and any(isinstance(m, (nn.AvgPool2d, nn.MaxPool2d)) for m in net.modules())


def choose_compile(
    flag: str, device: torch.device, net: nn.Module, image_shape: tuple[int, ...], workload: Workload
) -> tuple[bool, str]:
    """Whether to compile, and why, for the flag `auto`: if the expected saving exceeds the compile time."""
    if flag != "auto":
        return flag == "on", ""
    if device.type == "cuda":
        return workload.steps >= CUDA_STEPS, f"auto: {workload.steps} steps; compiles from {CUDA_STEPS} on"
    if not faster_on_cpu(net):
        return False, "auto: it does not make this network faster on a CPU"
    outputs = sum(convolution_outputs(net, image_shape))
    saves, costs = workload.passes * outputs * SAVED_SECONDS / torch.get_num_threads(), COMPILE_SECONDS[workload.kind]
    return saves > costs, f"auto: saves about {saves:.0f} s, costs {costs:.0f} s"


class Compiled:
    """A compiled function of images `[N, C, H, W]` and further arguments.

    Images are converted to channels-last order, in which compiled convolutions and pooling are faster.
    A compilation fails without a C++ compiler, or if a process was killed while it wrote into the compile cache. If it
    is `required` (`--compile on`), a `UserError` tells this; otherwise a warning does, and everything runs uncompiled.
    """

    failed = False  # whether any object of this class found the compiler broken

    def __init__(self, function: Callable, mode: str | None, required: bool):
        self.function, self.required = function, required
        use_lasting_cache()
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it says that a machine has no CUDA
        # each batch size is compiled; past the limit some would run uncompiled, different ones after a resume
        torch._dynamo.config.cache_size_limit = 64
        self.compiled = torch.compile(function, mode=mode, dynamic=False)

    def __call__(self, images: torch.Tensor, *rest: object) -> object:
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        if Compiled.failed and not self.required:
            return self.function(images, *rest)
        try:
            return self.compiled(images, *rest)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            said = str(error).rpartition("Output:")[2].strip().partition("\n")[0]  # by the compiler, if that is there
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torchinductor_*")
        what = f"torch.compile failed: {one_line(said)}. Install or repair g++, or delete its cache, {cache}"
        if self.required:
            raise UserError(f"--compile on: {what}, or use --compile off")
        warnings.warn(f"nothing is compiled: {what}", stacklevel=2)
        Compiled.failed = True
        return self.function(images, *rest)


def use_lasting_cache() -> None:
    """Keep compiled code in the user's cache folder, where later runs find it, unless `TORCHINDUCTOR_CACHE_DIR` is set.

    Each version of PyTorch and each kind of processor has its own, as machines may share a home folder.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ or not os.path.isabs(root):  # without a home, `~` stays
        return
    processor = hashlib.sha256(f"{platform.machine()} {processor_features()}".encode()).hexdigest()[:8]
    folder = os.path.join(root, "trustdd", f"torch-{torch.__version__}-{processor}".replace("+", "-"))
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def processor_features() -> str:
    """The names of the instructions that the processor has; on an unknown system only its name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
