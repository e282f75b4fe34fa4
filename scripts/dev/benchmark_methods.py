"""What `scripts/dev/benchmark.py` measures for methods: an iteration of DM, MTT and TGDD, an epoch of an expert."""

import multiprocessing
from collections.abc import Callable
from itertools import count as count_from
from pathlib import Path

import torch
from benchmark_works import STRATEGY, Bench

from networks import get_network, initialize
from tests.oracle import plain_methods
from utils.compute.device import Compute, set_keep_freed_memory
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.method import MatchingSettings, MethodInputs
from utils.methods.snapshot_matching import TGDD_ENTRY, SnapshotMatching
from utils.methods.trajectory_matching import TrajectoryMatching, TrajectorySettings
from utils.outliers.sources import PseudoOutliers
from utils.runs.run_folder import RunFolder
from utils.settings.distillation import ExpertSettings
from utils.stages.expert_training import ExpertTraining

STEPS = 30  # of the student of MTT


class RandomEnds:
    """Stands in for experts with two snapshots: their content does not change the time."""

    def __init__(self, net: torch.nn.Module):
        weights = []
        for seed in (1, 2):
            initialize(net, generator(seed))
            weights.append([p.detach().clone() for p in net.parameters()])
        self.start, self.target = weights[0], [a + 0.1 * b for a, b in zip(*weights, strict=True)]
        self.trajectories = [(None, [self.start, self.target])]

    def segment(self, *_: object) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The same two sets of parameters at every call."""
        return self.start, self.target

    def snapshot(self, index: int, epoch: int, device: torch.device) -> list[torch.Tensor]:
        """The parameters after an epoch."""
        return [p.to(device) for p in self.trajectories[index][1][epoch]]

    def fingerprint(self) -> str:
        """Empty: there are no expert files."""
        return ""


def _alternating(bench: Bench, methods: list) -> dict:
    """Time iterations of two methods in turn; the losses are read, as in the stage-1 loop."""
    for method in methods:
        method.start(0)
    numbers = [count_from(0), count_from(0)]

    def work(index: int) -> Callable[[], object]:
        return lambda: methods[index].iterate(next(numbers[index]))["loss"].mean().item()

    return bench.measure(work(0), work(1))


def dm(bench: Bench) -> dict:
    """An iteration of distribution matching, images and outliers (POE)."""
    batches = {"batch_real": bench.batch, "batch_oe": bench.batch}
    settings = MatchingSettings(model=bench.args.model, ipc=bench.ipc, lr_img=1.0, init="real", **batches)
    inputs = MethodInputs(bench.real, PseudoOutliers(bench.real), settings, STRATEGY, bench.compute)
    kinds = (plain_methods.PlainDistributionMatching, DistributionMatching)
    return _alternating(bench, [kind(inputs) for kind in kinds])


def trajectory_matching(kind: type, real: RealData, model: str, ipc: int, compute: Compute) -> TrajectoryMatching:
    """Trajectory matching of 30 steps with POE; `kind`: the engine's class or the textbook's."""
    settings = TrajectorySettings(model=model, ipc=ipc, init="real", lr_img=1000.0, syn_steps=STEPS)
    net = real.network(model, generator(0)).to(real.device)
    return kind(MethodInputs(real, PseudoOutliers(real), settings, STRATEGY, compute), RandomEnds(net))


def mtt(bench: Bench) -> dict:
    """An iteration of trajectory matching of 30 steps, images and outliers (POE); `…_gb`: its memory, measured
    uncompiled in a separate process."""
    kinds = (plain_methods.PlainTrajectoryMatching, TrajectoryMatching)
    result = _alternating(
        bench, [trajectory_matching(k, bench.real, bench.args.model, bench.ipc, bench.compute) for k in kinds]
    )
    peaks = [_peak(trajectory_matching, kind, bench) for kind in kinds]
    return result | {"plain_gb": peaks[0], "engine_gb": peaks[1]}


def snapshot_matching(kind: type, real: RealData, model: str, ipc: int, compute: Compute) -> SnapshotMatching:
    """Matching on snapshots with POE, of images in four parts; `kind`: the engine's class or the textbook's."""
    settings = TGDD_ENTRY.settings(**TGDD_ENTRY.defaults | {"model": model, "ipc": ipc})
    inputs = MethodInputs(real, PseudoOutliers(real), settings, STRATEGY, compute)
    return kind(inputs, RandomEnds(real.network(model, generator(0)).to(real.device)))


def tgdd(bench: Bench) -> dict:
    """An iteration of TGDD with POE, 128 real images and outliers per slot."""
    kinds = (plain_methods.PlainSnapshotMatching, SnapshotMatching)
    arguments = (bench.real, bench.args.model, bench.ipc, bench.compute)
    result = _alternating(bench, [snapshot_matching(kind, *arguments) for kind in kinds])
    peaks = [_peak(snapshot_matching, kind, bench) for kind in kinds]
    return result | {"plain_gb": peaks[0], "engine_gb": peaks[1]}


def _peak(make: Callable, kind: type, bench: Bench) -> float:
    """Peak resident memory of an iteration on a CPU, above that before it, in GB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_peak, args=(make, kind, bench.args.model, bench.ipc, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"{make.__name__}: the process that measures memory ended with {process.exitcode}")
    return queue.get()


def _measure_peak(make: Callable, kind: type, model: str, ipc: int, queue: multiprocessing.Queue) -> None:
    images = torch.zeros(max(2000, 20 * ipc), 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(len(images)) % 10
    real = RealData("random", 10, (0.5,) * 3, (0.25,) * 3, images, labels, images, labels)
    method = make(kind, real, model, ipc, Compute())
    method.start(0)
    set_keep_freed_memory(False)
    before = _resident("VmRSS")
    method.iterate(0)
    queue.put(_resident("VmHWM") - before)


def _resident(what: str) -> float:
    """Resident memory of this process in GB, now (`VmRSS`) or at its peak (`VmHWM`). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(what))


def experts(bench: Bench) -> dict:
    """An epoch of an expert on 50,000 images, without outliers and without testing."""
    real = bench.real
    net, other = (get_network(bench.args.model, 3, 10, (32, 32), generator(0)).to(bench.device) for _ in range(2))
    images = real.train_batch(torch.arange(len(real.images_train)))
    optimizer = torch.optim.SGD(other.parameters(), 0.01)
    run = RunFolder.create(bench.folder.name, "experts")
    training = ExpertTraining(
        net, real, None, ExpertSettings(dsa_strategy="_".join(STRATEGY.strategy)), bench.compute, run
    )
    numbers = count_from(0)
    return bench.measure(
        lambda: plain_methods.train_expert_epoch(other, optimizer, images, real.labels_train, STRATEGY),
        lambda: training._epoch(0, next(numbers) % 50).item(),
    )


METHOD_WORKS: dict[str, Callable[[Bench], dict]] = {"dm": dm, "mtt": mtt, "tgdd": tgdd, "experts": experts}
