"""Where the time of an iteration goes, by PyTorch's profiler: the share of each kind of work.

    python scripts/dev/profile_works.py  # ConvNetW32, ipc 10: DSA, DM, MTT, TGDD, an expert, stages 2 and 3
    python scripts/dev/profile_works.py --model ConvNet --precision bf16 --out profile.json

The data are random pixels in the shape of CIFAR-10. A work runs twice before it is profiled, so that compiling does not
count. GFLOP/s: those of the convolutions and matrix products, in the time that they take; a large matrix product and a
large convolution of the same type show what the processor can do.
"""

import argparse
import json
import shlex
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from itertools import count as count_from
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import torch
from benchmark import machine
from benchmark_methods import snapshot_matching, trajectory_matching
from benchmark_works import SCORED, STRATEGY, Bench
from torch.nn.functional import conv2d
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from utils.compute.device import Compute
from utils.core.files import save_output
from utils.core.run_script import run_script
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.methods.method import MethodInputs
from utils.methods.snapshot_matching import SnapshotMatching
from utils.methods.trajectory_matching import TrajectoryMatching
from utils.ood.scorer import Scorer
from utils.outliers.sources import PseudoOutliers
from utils.report.tables import markdown_table
from utils.runs.run_folder import RunFolder
from utils.settings.common import Speed
from utils.settings.distillation import ExpertSettings
from utils.settings.fields import add_group, flags_of
from utils.settings.parser import Parser, count, one_of
from utils.stages.expert_training import ExpertTraining
from utils.training.trainer import Trainer

# kinds of work by parts of the names of operations, in this order; the kernels that the compiler makes are norm,
# activation and pooling, and stand under the name of the graph that calls them
KINDS = {
    "convolutions": ("conv", "mkldnn"),
    "matrix products": ("mm", "linear", "dot", "einsum"),
    "norm, activation, pooling": (
        "norm",
        "relu",
        "pool",
        "threshold",
        "cpp_fused",
        "compiled",
        "var_mean",
        "softmax",
        "inductor",
    ),
    "augmentation, batches": ("grid", "index", "gather", "flip", "affine", "stack", "cat", "clamp", "take", "scatter"),
    "draws": ("randperm", "rand", "normal", "uniform", "random"),
    "optimiser": ("sgd", "optimizer", "foreach", "addcmul"),
}
OTHER = "other operations"
PYTHON = "Python and waiting"
WORKS = ("dsa", "dm", "mtt", "tgdd", "expert", "stage2", "stage3")
EXPERT_IMAGES = 5120  # of the part of an epoch of an expert that is profiled


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Profile one iteration of each method, and stages 2 and 3.")
    parser.add_argument("--model", default="ConvNetW32", help="the network")
    parser.add_argument("--ipc", type=count(1), default=10, help="synthetic images per class")
    parser.add_argument("--works", nargs="+", type=one_of("work", WORKS), default=list(WORKS), help="what to profile")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", default=None, help="JSON file to write")
    add_group(parser.add_argument_group("speed"), flags_of(Speed))
    parser.set_defaults(compile="on", batch_real=256, outer_loop=1, inner_loop=1, repeats=1)
    return parser


def work_of(name: str, bench: Bench) -> Callable[[], object]:
    """What is profiled under a name; an outer step of DSA has its matching and an epoch of network training.

    `expert`: twenty steps on images and POE outliers.
    """
    real, outliers = bench.real, PseudoOutliers(bench.real)
    if name in ("dsa", "dm"):
        loops = {"outer_loop": 2, "inner_loop": 1} if name == "dsa" else {}
        settings = GradientSettings(model=bench.args.model, ipc=bench.ipc, init="real", **loops)
        kind = GradientMatching if name == "dsa" else DistributionMatching
        method = kind(MethodInputs(real, outliers, settings, STRATEGY, bench.compute))
    elif name == "mtt":
        method = trajectory_matching(TrajectoryMatching, real, bench.args.model, bench.ipc, bench.compute)
    elif name == "tgdd":
        method = snapshot_matching(SnapshotMatching, real, bench.args.model, bench.ipc, bench.compute)
    elif name == "expert":
        images, labels = (t[:EXPERT_IMAGES] for t in (real.images_train, real.labels_train))
        part = replace(real, images_train=images, labels_train=labels)
        settings = ExpertSettings(outliers="poe", mom=0.9, dsa_strategy="_".join(STRATEGY.strategy))
        run = RunFolder.create(bench.folder.name, "experts")
        experts = ExpertTraining(bench.net, part, PseudoOutliers(part), settings, bench.compute, run)
        return lambda: experts._epoch(0, 0).item()
    elif name == "stage2":
        trainer = Trainer(bench.net, bench.settings, bench.compute)
        return lambda: trainer.train(bench.synthetic, 0, ())
    else:
        scorer = Scorer(bench.net, ["msp"], 1.0, real.std, bench.compute.embedding(bench.net, SCORED))
        return lambda: scorer(real.test_images, SCORED)
    method.start(0)
    numbers = count_from(0)
    return lambda: method.iterate(next(numbers))["loss"].mean().item()


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Seconds by kind of work of one call; those in no operation are Python's."""
    for _ in range(2):
        work()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        began = time.perf_counter()
        work()
        total = time.perf_counter() - began
    seconds: dict[str, float] = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in recorded.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return seconds | {PYTHON: max(0.0, total - sum(seconds.values())), "total": total}


def kind_of(operation: str) -> str:
    """The kind of work that an operation belongs to."""
    name = operation.lower().removeprefix("aten::")
    if "compiledfxgraph" in name:  # the rest of the name is a hash
        name = "compiled"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def peak_gflops(dtype: torch.dtype) -> dict[str, int]:
    """GFLOP/s of a large matrix product and of a large convolution, which different libraries compute; best of five."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    images = torch.randn(64, 256, 32, 32).to(dtype, memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3).to(dtype, memory_format=torch.channels_last)
    works = {
        "matmul_gflops": (lambda: a @ b, 2 * 2048**3),
        "convolution_gflops": (lambda: conv2d(images, kernel, padding=1), 2 * images.numel() * kernel[0].numel()),
    }
    return {name: round(flops / min(timeit.repeat(work, number=1)) / 1e9) for name, (work, flops) in works.items()}


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations. PyTorch's `FlopCounterMode` follows modules, and fails without autograd."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count_flops = flop_registry.get(func._overloadpacket)
        if count_flops is not None:
            self.flops += count_flops(*args, **(kwargs or {}), out_val=out)
        return out


def gflop(work: Callable[[], object]) -> float:
    """The floating-point operations of convolutions and matrix products in one call, which is not compiled, in 10⁹."""
    with FlopCounter() as counter:
        work()
    return counter.flops / 1e9


def table(results: dict[str, dict[str, float]]) -> str:
    """Shares in percent, the seconds of each work, and the speed of its convolutions and matrix products."""
    kinds = [*KINDS, OTHER, PYTHON]
    rows = []
    for work, r in results.items():
        speed = r["gflop"] / (r["convolutions"] + r["matrix products"])
        rows.append([work, f"{r['total']:.2f}", *(f"{100 * r[k] / r['total']:.0f}" for k in kinds), f"{speed:.0f}"])
    return markdown_table(("work", "seconds", *(f"{kind}, %" for kind in kinds), "GFLOP/s"), rows)


def main(args: argparse.Namespace) -> None:
    """Profile, print the table, and write the JSON file if asked."""
    bench = Bench(args)
    about = machine(bench.device) | {"compute": str(bench.compute), "command": shlex.join(sys.argv)}
    dtype = torch.bfloat16 if bench.compute.precision == "bf16" else torch.float32
    about |= peak_gflops(dtype)
    results = {name: shares(work_of(name, bench)) for name in args.works}
    bench.compute = Compute(precision=bench.compute.precision)
    for name, of_work in results.items():
        of_work["gflop"] = gflop(work_of(name, bench))
    print(table(results))
    print(json.dumps(about))
    if args.out:
        save_output(args.out, json.dumps({"about": about, "flags": vars(args), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "profile_works.py")
