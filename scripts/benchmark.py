"""Measure the engine beside the textbook loop (`utils/plain.py`): same process, same inputs, alternating.

    python scripts/benchmark.py                                  # ConvNetW32, ipc 2: about three minutes on two cores
    python scripts/benchmark.py --model ConvNet --ipc 10 --slots 2 --out assets/results/benchmark-convnet.json

Data are random pixels in the shape of CIFAR-10: times do not depend on the content. An iteration is put together from a
matching step and a training epoch. The textbook loop runs with the C library's default allocator, the engine with its
own setting (`set_keep_freed_memory`).
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.utils.data import DataLoader

from networks import get_network
from utils import plain
from utils.arguments import LOOPS, add_compute
from utils.augment import DSA, DSA_ENTRIES
from utils.datasets import RealData, load_dataset
from utils.devices import choose_compute, choose_device, set_keep_freed_memory
from utils.entry import run_script
from utils.files import save_text
from utils.flags import Parser, count, one_of
from utils.matching import Matcher, class_loss, outlier_loss
from utils.ood_detectors import Scorer
from utils.ood_report import markdown_table
from utils.outliers import DEFAULT_CORRUPTIONS, PseudoOutliers
from utils.rng import generator
from utils.synthetic import SyntheticSet
from utils.training import Trainer, TrainSettings

STRATEGY = DSA(tuple(DSA_ENTRIES))
STARTUP_SHARE = 20  # the textbook start-up is measured on a 20th of the images
WORKS = ("startup", "matching", "epoch", "evaluation", "stage2", "stage3")


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Measure the engine beside the textbook loop.")
    parser.add_argument("--model", default="ConvNetW32", help="the network")
    parser.add_argument("--ipc", type=count(1), default=2, help="synthetic images per class")
    parser.add_argument("--batch_real", type=count(1), default=256, help="real images per slot")
    parser.add_argument("--slots", type=count(1), default=10, help="class slots to match; fewer are faster, not truer")
    parser.add_argument("--repeats", type=count(1), default=3, help="measurements of each; the median counts")
    parser.add_argument("--works", nargs="+", type=one_of("work", WORKS), default=list(WORKS), help="what to measure")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", default=None, help="JSON file to write")
    add_compute(parser)
    parser.set_defaults(compile="on")
    return parser


class Bench:
    """Everything that the measurements share."""

    def __init__(self, args: argparse.Namespace):
        self.device = choose_device(args.device)
        self.model, self.ipc, self.batch, self.repeats = args.model, args.ipc, args.batch_real, args.repeats
        self.slots = min(args.slots, 10)
        self.folder = tempfile.TemporaryDirectory()
        rng = np.random.default_rng(0)
        self.npz = Path(self.folder.name) / "cifar10.npz"
        arrays = {}
        for part, n in (("train", 50_000), ("test", 10_000)):
            arrays[f"{part}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            arrays[f"{part}_labels"] = np.arange(n) % 10
        np.savez(self.npz, **arrays)
        self.real: RealData = load_dataset("CIFAR10", self.folder.name).to(self.device)
        self.net = get_network(args.model, 3, 10, (32, 32), generator(0)).to(self.device)
        long = (math.inf, sys.maxsize)  # a run long enough for `--compile auto` to compile what it speeds up
        self.compute = choose_compute(
            args.compile, args.precision, self.device, args.model, self.real, *long, "matching"
        )
        shape = (10 * args.ipc, 3, 32, 32)
        images = [torch.randn(shape, generator=generator(i)).to(self.device) for i in (1, 2)]
        labels = torch.arange(10, device=self.device).repeat_interleave(args.ipc)
        self.synthetic = SyntheticSet(images[0], labels, images[1])
        self.settings = TrainSettings(50, augmentation=STRATEGY)

    def measure(self, slow: Callable[[], object], fast: Callable[[], object], scale: float = 1.0) -> dict:
        """Seconds of both, alternating; `scale` multiplies the slow one's. The first call of each is the warm-up."""
        times: dict[str, list[float]] = {"plain": [], "engine": []}
        warm = {}
        for repeat in range(self.repeats + 1):
            for name, work in (("plain", slow), ("engine", fast)):
                set_keep_freed_memory(name == "engine")
                seconds = self._seconds(work) * (scale if name == "plain" else 1)
                if repeat:
                    times[name].append(seconds)
                else:
                    warm[name] = seconds
        ratios = [p / e for p, e in zip(times["plain"], times["engine"], strict=True)]
        return {
            "plain_s": float(np.median(times["plain"])),
            "engine_s": float(np.median(times["engine"])),
            "ratio": float(np.median(ratios)),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "engine_first_call_s": warm["engine"],
        }

    def _seconds(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    # --- the works ---------------------------------------------------------------------------------------------------

    def startup(self) -> dict:
        """From the file to the first batch of pseudo-outliers."""
        images = self.real.images_train[: 50_000 // STARTUP_SHARE].cpu()
        labels = self.real.labels_train.cpu()

        def slow() -> None:
            whole, _ = plain.read_all(plain.ImageByImage(images, labels, self.real.mean, self.real.std))
            plain.corrupt_all(whole.clamp(0, 1), DEFAULT_CORRUPTIONS)

        def fast() -> None:
            real = load_dataset("CIFAR10", self.folder.name).to(self.device)
            PseudoOutliers(real).draw(0, self.batch, generator(0))

        return self.measure(slow, fast, STARTUP_SHARE)

    def matching(self) -> dict:
        """One matching step: the images, then the outliers."""
        matchers = [Matcher(self.net, loss, "ours", self.compute) for loss in (class_loss, outlier_loss)]
        transforms = [STRATEGY.draw(1, (32, 32), generator(s)) for s in range(self.slots)]
        outliers = PseudoOutliers(self.real)
        sets = [
            s.view(10, self.ipc, 3, 32, 32)[: self.slots] for s in (self.synthetic.images, self.synthetic.images_oe)
        ]

        def images_of(slot: int) -> torch.Tensor:
            return self.real.train_batch(self.real.class_indices[slot][: self.batch])

        def outliers_of(slot: int) -> torch.Tensor:
            return outliers.draw(slot, self.batch, generator(slot))

        def slow() -> None:
            for which, batch in enumerate((images_of, outliers_of)):
                plain.match_slots(self.net, sets[which], batch, transforms, bool(which), "ours")

        def fast() -> None:
            for which, batch in enumerate((images_of, outliers_of)):
                matchers[which](sets[which], batch, transforms)

        return self.measure(slow, fast)

    def _plain_epochs(self, epochs: int) -> None:
        optimizer = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        s = self.synthetic
        for epoch in range(epochs):
            plain.train_epoch(
                self.net, optimizer, s.images, s.labels, s.images_oe, 256, 0.5, STRATEGY, generator(0, epoch)
            )

    def epoch(self) -> dict:
        """One epoch of network training on images and outliers (mean of ten)."""
        trainer = Trainer(self.net, self.settings, self.compute)

        def fast() -> None:
            for epoch in range(10):
                trainer.epoch(self.synthetic, generator(0, epoch))

        result = self.measure(lambda: self._plain_epochs(10), fast)
        return result | {k: result[k] / 10 for k in ("plain_s", "engine_s")}

    def _plain_loader(self) -> DataLoader:
        real = self.real
        return DataLoader(plain.ImageByImage(real.images_test, real.labels_test, real.mean, real.std), 256)

    def evaluation(self) -> dict:
        """Accuracy on 10,000 test images."""
        loader = self._plain_loader()
        real = self.real
        trainer = Trainer(self.net, self.settings, self.compute)
        return self.measure(
            lambda: plain.test_accuracy(self.net, loader),
            lambda: trainer.accuracy(real.test_images, real.labels_test),
        )

    def stage2(self) -> dict:
        """Fifty epochs and a test: a twentieth of stage 2's 1000 epochs with tests every 50."""
        loader = self._plain_loader()
        trainer = Trainer(self.net, self.settings, self.compute)

        def slow() -> None:
            self._plain_epochs(50)
            plain.test_accuracy(self.net, loader)

        def fast() -> None:
            trainer.train(self.synthetic, 0, ())
            trainer.accuracy(self.real.test_images, self.real.labels_test)

        return self.measure(slow, fast)

    def stage3(self) -> dict:
        """Scores of 10,000 images."""
        loader = self._plain_loader()
        scorer = Scorer(self.net, ["msp"], 1.0, self.real.std, self.compute.embedding(self.net))
        return self.measure(lambda: plain.msp_scores(self.net, loader), lambda: scorer(self.real.test_images, 256))


def iteration(results: dict[str, dict], ipc: int, slots: int) -> dict:
    """Stage 1's iteration from its parts: outer_loop matching steps, and (outer_loop - 1)·inner_loop epochs."""
    outer, inner = LOOPS.get(ipc, (ipc, max(1, round(500 / ipc))))
    parts = {k: outer * results["matching"][k] * 10 / slots + (outer - 1) * inner * results["epoch"][k]
             for k in ("plain_s", "engine_s")}  # fmt: skip
    return parts | {"ratio": parts["plain_s"] / parts["engine_s"]}


def peak_memory(args: argparse.Namespace, folder: str) -> float:
    """Peak resident memory, in GB, of `main_poe.py` over one iteration in a process of its own."""
    flags = (
        f"--dataset CIFAR10 --model {args.model} --ipc {args.ipc} --init real --Iteration 1 --num_exp 1 --num_eval 1"
    )
    flags += (
        f" --epoch_eval_train 1 --outer_loop 1 --data_path {folder} --save_path {folder}/out --device {args.device}"
    )
    flags += (
        f" --method DSA --dsa_strategy color_crop_cutout_flip_scale_rotate --compile off --batch_real {args.batch_real}"
    )
    subprocess.run([sys.executable, ROOT / "main_poe.py", *flags.split()], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def machine(device: torch.device) -> dict:
    """What the times were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def main(args: argparse.Namespace) -> None:
    """Measure, print the table, and write the JSON where asked."""
    memory = None
    bench = Bench(args)
    if "startup" in args.works:
        memory = peak_memory(args, bench.folder.name)
    results = {}
    for work in args.works:
        results[work] = getattr(bench, work)()
        print(f"{work}: {results[work]['ratio']:.2f}", flush=True)
    if {"matching", "epoch"} <= set(results):
        results["iteration"] = iteration(results, args.ipc, bench.slots)
    if bench.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e9
    about = machine(bench.device) | {"compute": str(bench.compute), "command": " ".join(sys.argv), "peak_gb": memory}
    rows = [
        [work, f"{r['plain_s']:.4f}", f"{r['engine_s']:.4f}", f"{r['ratio']:.2f}",
         f"{r.get('ratio_min', r['ratio']):.2f}-{r.get('ratio_max', r['ratio']):.2f}",
         f"{r['engine_first_call_s']:.1f}" if "engine_first_call_s" in r else ""]
        for work, r in results.items()
    ]  # fmt: skip
    print(markdown_table(("work", "plain, s", "engine, s", "ratio", "spread", "first call, s"), rows))
    print(json.dumps(about))
    if args.out:
        save_text(
            Path(args.out), json.dumps({"about": about, "flags": vars(args), "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "benchmark.py")
