"""`torch.compile`: where it pays, and how a damaged cache of compiled code is got over."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import nn

from networks.convnet import ConvNet
from utils.compute.cpu_batches import convolution_outputs
from utils.core.errors import UserError
from utils.runs import signals

PAYS_CUDA = 500  # steps from which compiling is thought to pay on a GPU (not measured yet)
# measured on two cores of a CPU: seconds that compiling takes, and seconds times threads that it saves for each output
# of a convolution that an image brings about on its way there and back
COSTS_CPU = {"matching": 75.0, "training": 12.0, "testing": 3.0}
SAVES_CPU = 2 * 2e-9


def helps_on_cpu(net: nn.Module) -> bool:
    """Whether compiled code is faster for this network on a CPU.

    It is for ConvNets that pool, 1.2 to 2 times. LeNet, AlexNet and VGG train more slowly (their poolings and their
    convolutions of many channels on few pixels); ResNets, an MLP and a ConvNet without pooling do not gain.
    """
    return isinstance(net, ConvNet) and any(isinstance(m, (nn.AvgPool2d, nn.MaxPool2d)) for m in net.modules())


def choose_compile(
    flag: str, device: torch.device, net: nn.Module, image_shape: tuple[int, ...], passes: float, steps: int, what: str
) -> tuple[bool, str]:
    """Whether to compile, and why: `on`, `off`, or for `auto` where the run is long enough to win back the time that
    compiling takes.

    Args:
        passes: images that go through `net` there and back in this process; one that only goes there is half of one.
        steps: matching steps, training epochs or test batches of the run.
        what: of `COSTS_CPU`.
    Raises:
        UserError: for `on` without a C++ compiler on a CPU.
    """
    has_compiler = device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++")))
    if flag == "on" and not has_compiler:
        raise UserError("--compile on: torch.compile needs a C++ compiler; install g++, or use --compile off")
    if flag != "auto":
        return flag == "on", ""
    if device.type == "cuda":
        return steps >= PAYS_CUDA, f"auto: {steps} steps, it pays from {PAYS_CUDA} on"
    if not has_compiler:
        return False, "auto: there is no C++ compiler"
    if not helps_on_cpu(net):
        return False, "auto: it does not make this network faster on a CPU"
    saves = passes * sum(convolution_outputs(net, image_shape)) * SAVES_CPU / torch.get_num_threads()
    return saves > COSTS_CPU[what], f"auto: would save about {saves:.0f} s and cost {COSTS_CPU[what]:.0f}"


class Compiled:
    """A compiled function of images `[N, C, H, W]` and more, that gets over a damaged cache of compiled code.

    The images are handed on in channels-last order, in which the compiled convolutions and poolings are faster.

    A process that is killed while its compiler writes leaves a truncated library in Inductor's cache on the disk, and
    every later process that needs the same code fails to load it. What fails is removed and compiled again; then
    everything is compiled in a cache of its own.
    """

    def __init__(self, function: Callable, mode: str | None):
        self.function, self.mode = function, mode
        for name in ("recompile_limit", "cache_size_limit"):  # its name before 2.7
            # one compilation per batch size: past the limit some would run eagerly, others of them after a resume
            if hasattr(torch._dynamo.config, name):
                setattr(torch._dynamo.config, name, 64)
        self.compiled = torch.compile(function, mode=mode, dynamic=False)

    def __call__(self, images: torch.Tensor, *rest: object) -> object:
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        for mend in (_remove_damaged, _use_fresh_cache, _give_up):
            try:
                return self.compiled(images, *rest)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if signals.received():  # a terminal's Ctrl-C ended the compiler, too
                    raise
                mend(" ".join(str(error).split()))
                torch._dynamo.reset()
                self.compiled = torch.compile(self.function, mode=self.mode, dynamic=False)


def _remove_damaged(message: str) -> None:
    """Remove the library of Inductor's cache that an error names."""
    found = re.search(r"(/\S+/torchinductor\S*\.so)", message)
    if found:
        with suppress(OSError):
            os.unlink(found[1])


def _use_fresh_cache(message: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor_")


def _give_up(message: str) -> None:
    raise UserError(f"--compile: torch.compile failed: {message[:200]}. Use --compile off") from None
