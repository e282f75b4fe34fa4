"""How a run computes: on which device, in which precision, and whether with `torch.compile`."""

import ctypes
import hashlib
import logging
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from networks.convnet import ConvNet
from utils.compute import distributed
from utils.compute.cpu_batches import BatchSplitter, convolution_outputs, in_parts, padded_to
from utils.core.errors import UserError, one_line, under_torchrun

PRECISIONS = ("tf32", "fp32", "bf16")
# Measured on two CPU cores: the seconds that compiling takes, and the thread-seconds that it saves for each output
# element of a convolution in one forward and backward pass of an image.
COMPILE_SECONDS = {"matching": 75.0, "features": 25.0, "training": 12.0, "testing": 3.0}
SAVED_SECONDS = 2 * 2e-9
# The same on an H100. Only DM with POE was measured there, once: ConvNet, ipc 10, 6 ms of each iteration of 2,760
# passes. What short trainings of networks gain is not known.
CUDA_COMPILE_SECONDS, CUDA_SAVED_SECONDS = 21.0, 1.25e-11


@dataclass(frozen=True)
class Workload:
    """The length of a run in this process."""

    passes: float  # forward and backward passes of single images; a forward pass alone counts half
    kind: str  # a key of `COMPILE_SECONDS`


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
        costs, of_output = CUDA_COMPILE_SECONDS, CUDA_SAVED_SECONDS
    elif faster_on_cpu(net):
        costs, of_output = COMPILE_SECONDS[workload.kind], SAVED_SECONDS / torch.get_num_threads()
    else:
        return False, "auto: it does not make this network faster on a CPU"
    saves = workload.passes * sum(convolution_outputs(net, image_shape)) * of_output
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


@dataclass(frozen=True)
class Compute:
    """Compilation and precision of a run; results depend on them only by rounding."""

    compiled: bool = False  # matching, network training and testing use `torch.compile`
    # bf16 puts under autocast: network training, real gradients and embeddings, the student of MTT, stage 3's features.
    # The gradient of the synthetic images stays in float32, but for TGDD.
    precision: str = "fp32"
    on_cuda: bool = False
    why: str = ""  # the reason for the choice of `--compile auto`; empty if the user chose
    note: str = ""  # why the precision is not the one asked for, or that another would be faster

    def __str__(self) -> str:
        compiled = f"torch.compile {'on' if self.compiled else 'off'}{self.why and f' ({self.why})'}"
        return f"{compiled}, {self.precision}{self.note and f' ({self.note})'}"

    def for_network(self, net: nn.Module) -> "Compute":
        """The settings for another network: on a CPU, `auto` does not compile where that is no faster for `net`."""
        slower = self.compiled and self.why and not self.on_cuda and not faster_on_cpu(net)
        return replace(self, compiled=False) if slower else self

    def function(self, function: Callable) -> Callable:
        """`function` under autocast (`bf16`) and compiled, each if set; otherwise unchanged."""

        def under_autocast(images: torch.Tensor, *rest: object) -> torch.Tensor:
            with torch.autocast(images.device.type, torch.bfloat16):
                return function(images, *rest)

        wrapped = under_autocast if self.precision == "bf16" else function
        mode = "reduce-overhead" if self.on_cuda else None  # which records CUDA graphs
        return Compiled(wrapped, mode, required=not self.why) if self.compiled else wrapped

    def embedding(self, example: nn.Module, batch: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        """A function of a network and images that returns `net.embed(images)`, float32 `[N, D]`.

        If it is compiled, then once, for all networks like `example`, and for `batch` images, the most that it takes.
        """
        splitter = BatchSplitter(example, self.precision)
        function = self.function(lambda images, net: net.embed(images).float())

        def embed(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
            full = padded_to(images, batch) if self.compiled else images
            # a CUDA graph writes into the same memory at its next call, so the result is copied
            features = in_parts(lambda part: function(part, net).clone(), full, splitter.count(full))
            return features[: len(images)]

        return embed


def choose_device(text: str, deterministic: bool = False) -> torch.device:
    """Return the device `auto`, `cpu`, `cuda` or `cuda:N`, prepared; raise a `UserError` if it cannot be used.

    Under `torchrun` each process on a machine uses its own GPU, and all join the process group.
    `deterministic` makes the results on CUDA bit-identical in every run; on the CPU they always are.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", text):
        raise UserError(f"--device {text}: unknown device. Accepted: auto, cpu, cuda, cuda:N")
    device = torch.device(text)
    if device.type == "cpu":
        set_keep_freed_memory(True)
    else:
        if device.index is not None and under_torchrun():
            raise UserError(f"--device {text}: under torchrun each process takes a GPU of its own; use --device cuda")
        count, index = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", index if device.index is None else device.index)
        if device.index >= count:
            raise UserError(f"--device {text}: this machine has {count} CUDA devices; use --device cpu")
        torch.cuda.set_device(device)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
    distributed.start(device.type)
    return device


def set_precision(precision: str, device: torch.device) -> None:
    """Allow TF32 in matrix products and convolutions for `tf32` on CUDA; otherwise use float32."""
    tf32 = precision == "tf32" and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def kept_precision() -> Iterator[None]:
    """Give back, at the end, what `set_precision` had allowed before."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def choose_compute(
    compile_flag: str, precision: str, device: torch.device, net: nn.Module, shape: Sequence[int], workload: Workload
) -> Compute:
    """The `Compute` of a run by the flags `--compile` and `--precision`, see `choose_compile`.

    `net` is of the kind that the run trains or tests, on the CPU; `shape` is `(C, H, W)`.
    """
    set_precision(precision, device)
    compiled, why = choose_compile(compile_flag, device, net, shape, workload)
    note = ""
    if device.type == "cpu" and precision == "bf16" and not has_bfloat16_instructions():
        precision, note = "fp32", "bf16 would be slower: this processor has neither AVX512-BF16 nor AMX"
    if device.type == "cpu" and precision == "tf32":
        faster = compiled and workload.kind != "testing" and isinstance(net, ConvNet) and has_bfloat16_instructions()
        precision, note = "fp32", "--precision bf16 would be faster" if faster else ""
    return Compute(compiled, precision, device.type == "cuda", why, note)


def has_bfloat16_instructions() -> bool:
    """Whether the CPU computes in bfloat16, rather than emulating it. On an unknown system: False."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(processor_features().split())


def set_keep_freed_memory(keep: bool) -> None:
    """Let glibc reuse freed memory instead of returning it to the system at every step; without `keep`, undo this.

    By default the large activations of a CPU run are mapped and unmapped again, which costs a third of the time.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another C library
        return
    mallopt(m_mmap_max, 0 if keep else 65536)
    mallopt(m_trim_threshold, 2**31 - 1 if keep else 128 * 1024)
