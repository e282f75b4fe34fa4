"""What `scripts/dev/benchmark.py` measures: tasks of the three stages, each by the textbook loop and by the engine."""

import argparse
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count as count_from
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from textbook_loop import Distillation, Images, msp_scores, test_accuracy, train_epoch
from torch.utils.data import DataLoader

from networks import get_network
from utils.compute.device import Workload, choose_compute, choose_device, set_keep_freed_memory
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import DSA, DSA_ENTRIES
from utils.data.datasets import RealData, load_dataset
from utils.data.synthetic import SyntheticSet
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.methods.method import MethodInputs
from utils.ood.scorer import Scorer
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS
from utils.outliers.sources import PseudoOutliers
from utils.runs.run_folder import RunFolder
from utils.stages.evaluation import EvalSettings, Evaluator
from utils.training.trainer import Trainer, TrainSettings, accuracy_of

STRATEGY = DSA(tuple(DSA_ENTRIES))
WORKS = ("startup", "iteration", "epoch", "test", "evaluation", "stage2", "stage3", "memory")
EVALUATED = 2  # networks of `evaluation`
SCORED = 256  # images per batch of `stage3`
WITH_PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak:", int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e6, "GB")
"""  # runs a script in a process whose peak of resident memory is its own; Linux only


def make_data(folder: Path, **sizes: int) -> None:
    """Write random images in the shape of CIFAR-10, as many of each class; `sizes`: how many of `train` and `test`."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in sizes.items():
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(n) % 10
    np.savez(folder / "cifar10.npz", **arrays)


def run_until(command: Sequence[object], line: str) -> None:
    """Run a Python script until it prints a line that begins so, then end it.

    Raises:
        UserError: when it ends without that line.
    """
    with subprocess.Popen([sys.executable, "-u", *map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        if not any(printed.startswith(line) for printed in process.stdout):
            raise UserError(f"startup: {command[0]} ended with {process.wait()} and did not print {line!r}")
        process.kill()


class Bench:
    """Everything that the measurements share."""

    def __init__(self, args: argparse.Namespace):
        self.device = choose_device(args.device, args.deterministic)
        self.args, self.ipc, self.batch, self.repeats = args, args.ipc, args.batch_real, args.repeats
        self.folder = tempfile.TemporaryDirectory()
        make_data(Path(self.folder.name), train=50_000, test=10_000)
        self.real: RealData = load_dataset("CIFAR10", self.folder.name).to(self.device)
        self.net = get_network(args.model, 3, 10, (32, 32), generator(0)).to(self.device)
        long = Workload(math.inf, "matching")  # so `--compile auto` compiles whatever that speeds up
        example = get_network(args.model, 3, 10, (32, 32), generator(0)).eval()
        self.compute = choose_compute(args.compile, args.precision, self.device, example, (3, 32, 32), long)
        shape = (10 * args.ipc, 3, 32, 32)
        images = [torch.randn(shape, generator=generator(i)).to(self.device) for i in (1, 2)]
        labels = torch.arange(10, device=self.device).repeat_interleave(args.ipc)
        self.synthetic = SyntheticSet(images[0], labels, images[1])
        self.settings = TrainSettings(50, augmentation=STRATEGY)

    def measure(self, slow: Callable[[], object], fast: Callable[[], object]) -> dict:
        """Time both in turn, in seconds. The first call of each is the warm-up."""
        times: dict[str, list[float]] = {"plain": [], "engine": []}
        warm = {}
        for repeat in range(self.repeats + 1):
            for name, work in (("plain", slow), ("engine", fast)):
                set_keep_freed_memory(name == "engine")
                seconds = self._seconds(work)
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
        """A process from its launch to the first update of POE, which it does with one outer step."""
        data = f"--data_path {self.folder.name} --model {self.args.model} --ipc {self.ipc}"
        slow = [ROOT / "scripts" / "dev" / "textbook_loop.py", *data.split()]
        flags = f"{data} --dataset CIFAR10 --init real --method DSA --dsa_strategy {'_'.join(STRATEGY.strategy)}"
        flags += " --Iteration 1 --outer_loop 1 --num_exp 1 --num_eval 1 --eval_mode P --epoch_eval_train 1"
        flags += f" --device {self.args.device} --compile off --save_path {self.folder.name}/out"
        fast = [ROOT / "main_poe.py", *flags.split()]
        return self.measure(lambda: run_until(slow, "updated"), lambda: run_until(fast, "exp 0: 1/1"))

    def iteration(self) -> dict:
        """A whole iteration of POE: a fresh network, and for each outer step the random draws, the matching of images
        and outliers, and the epochs of network training after it."""
        batches = {"batch_real": self.batch, "batch_oe": self.batch}
        loops = {"outer_loop": self.args.outer_loop, "inner_loop": self.args.inner_loop}
        settings = GradientSettings(model=self.args.model, ipc=self.ipc, **batches, **loops)
        slow = Distillation(
            *self._training_set(), self.args.model, self.ipc, settings.loops, STRATEGY.strategy, self.batch
        )
        fast = GradientMatching(MethodInputs(self.real, PseudoOutliers(self.real), settings, STRATEGY, self.compute))
        fast.start(0)
        numbers = count_from(0)
        # the losses are read, as in the stage-1 loop
        return self.measure(slow.iterate, lambda: fast.iterate(next(numbers))["loss"].mean().item())

    def _training_set(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """All training images normalised, their labels, and a stand-in for each corrupted copy."""
        images = self.real.train_batch(torch.arange(len(self.real.images_train)))
        return images, self.real.labels_train, [images] * len(DEFAULT_CORRUPTIONS)

    def _plain_epochs(self, epochs: int) -> None:
        optimizer = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            train_epoch(self.net, optimizer, self.synthetic, STRATEGY.strategy, self.settings.lambda_oe)

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
        images = real.images_test.permute(0, 2, 3, 1).cpu().numpy()
        return DataLoader(Images(images, real.labels_test.cpu().numpy(), real.mean, real.std), 256)

    def test(self) -> dict:
        """Accuracy on 10,000 test images."""
        loader = self._plain_loader()
        real = self.real
        trainer = Trainer(self.net, self.settings, self.compute)
        return self.measure(
            lambda: test_accuracy(self.net, loader),
            lambda: accuracy_of(trainer.predict(real.test_images), real.labels_test),
        )

    def evaluation(self) -> dict:
        """Train two networks for 50 epochs each and test them: a part of stage 1's evaluation."""
        loader = self._plain_loader()
        run = RunFolder.create(self.folder.name, "evaluation")
        run.is_main = False
        settings = EvalSettings(EVALUATED, {self.args.model: self.settings}, 0)
        evaluator = Evaluator(self.real, settings, run, self.compute)

        def slow() -> None:
            for _ in range(EVALUATED):
                self._plain_epochs(50)
                test_accuracy(self.net, loader)

        return self.measure(slow, lambda: evaluator.evaluate(self.synthetic, 0, 0, {}, lambda: None))

    def stage2(self) -> dict:
        """Fifty epochs and a test: a twentieth of stage 2's 1000 epochs with tests every 50."""
        loader = self._plain_loader()
        trainer = Trainer(self.net, self.settings, self.compute)

        def slow() -> None:
            self._plain_epochs(50)
            test_accuracy(self.net, loader)

        def fast() -> None:
            trainer.train(self.synthetic, 0, ())
            accuracy_of(trainer.predict(self.real.test_images), self.real.labels_test)

        return self.measure(slow, fast)

    def stage3(self) -> dict:
        """Scores of 10,000 images."""
        loader = self._plain_loader()
        scorer = Scorer(self.net, ["msp"], 1.0, self.real.std, self.compute.embedding(self.net, SCORED))
        return self.measure(lambda: msp_scores(self.net, loader), lambda: scorer(self.real.test_images, SCORED))

    def memory(self) -> float:
        """Peak memory, in GB, of a short `main_poe.py` in a separate process: resident, or reserved on the GPU."""
        args, folder = self.args, self.folder.name
        flags = f"--dataset CIFAR10 --model {args.model} --ipc {args.ipc} --batch_real {args.batch_real} --init real"
        flags += " --method DSA --dsa_strategy " + "_".join(STRATEGY.strategy)
        flags += " --Iteration 1 --outer_loop 2 --inner_loop 1 --num_exp 1 --num_eval 1 --epoch_eval_train 1"
        flags += f" --data_path {folder} --save_path {folder}/out --device {args.device}"
        flags += f" --compile {args.compile} --precision {args.precision}"
        command = [sys.executable, "-c", WITH_PEAK, "main_poe.py", *flags.split()]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
        pattern = r"peak GPU memory: (\S+) GB" if self.device.type == "cuda" else r"peak: (\S+) GB"
        return float(re.search(pattern, out)[1])
