"""Labelled real images to train on beside distilled ones, and the networks in whose features they are chosen."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from utils.compute.device import Workload, choose_compute, kept_precision
from utils.core.errors import UserError, print_line, require
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.training.network_training import load_network, save_network
from utils.training.trainer import Trainer, TrainSettings

BATCH = 250
WHOLE_EPOCHS = 30  # of a network for features, on the whole training set
SMALL_EPOCHS = 300  # the same on a smaller set


def herding(points: torch.Tensor, n: int) -> torch.Tensor:
    """The `n` points whose running mean follows the mean of all most closely, chosen one after another.

    Welling, *Herding Dynamical Weights to Learn*, ICML 2009, as iCaRL uses it (Rebuffi et al., CVPR 2017, algorithm 4).
    Of `[N, D]` with `n` at most N, they are indices in the order of choice, int64 `[n]`, all different, on the CPU.
    """
    mean = points.mean(0)
    total = torch.zeros_like(mean)
    free = torch.ones(len(points), dtype=torch.bool, device=points.device)
    chosen = []
    for count in range(1, n + 1):
        distance = ((total + points) / count - mean).square().sum(1)
        best = int(distance.masked_fill(~free, torch.inf).argmin())
        chosen.append(best)
        free[best] = False
        total = total + points[best]
    return torch.tensor(chosen)


def k_center(points: torch.Tensor, n: int, before: torch.Tensor | None = None) -> torch.Tensor:
    """`n` points such that no other is far from all of them: each is the farthest from those chosen before.

    The greedy 2-approximation of Gonzalez (1985), as Sener & Savarese use it (ICLR 2018, algorithm 1). The first is the
    point nearest to the mean, unless there are points `before` `[M, D]` that are chosen already.
    Returns what `herding` does.
    """
    if before is None:
        nearest = torch.full((len(points),), torch.inf, device=points.device)
        chosen = [int((points - points.mean(0)).square().sum(1).argmin())]
    else:
        nearest = torch.cdist(points, before).square().amin(1)
        chosen = [int(nearest.argmax())]
    while len(chosen) < n:
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
        nearest[chosen[-1]] = -1.0  # for good: of equal points each is chosen once
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


CORESETS = {"herding": herding, "kcenter": k_center}


def check_ipc(real: RealData, ipc: int, factor: int = 1, cure: str = "lower --ipc") -> None:
    """Raise `UserError` when a class has fewer training images than the parts of `ipc` images take."""
    needed, smallest = ipc * factor**2, min(map(len, real.class_indices))
    flags = f"--ipc {ipc}" if factor == 1 else f"--ipc {ipc} --factor {factor}"
    has = f"the smallest class of {real.name} has {smallest} training images"
    require(smallest >= needed, f"{flags}: {has}, and it takes {needed} of each; {cure}")


def random_images(real: RealData, ipc: int, seed: int, exp: int) -> SyntheticSet:
    """`ipc` random training images of each class: those (or their parts) that experiment `exp` starts from."""
    keys = [("match", exp, "initial", "images", label) for label in range(real.num_classes)]
    return _of_indices(real, [real.choose(key[-1], ipc, generator(seed, *key)) for key in keys])


def coreset(kind: str, real: RealData, ipc: int, net: nn.Module) -> SyntheticSet:
    """`ipc` training images of each class, chosen by one of `CORESETS` in the features of `net`."""
    choose = CORESETS[kind]
    return _of_indices(
        real, [index[choose(unit_features(net, real.train_batch, index), ipc)] for index in real.class_indices]
    )


def whole_set(real: RealData) -> SyntheticSet:
    """All training images as one set, normalised, float32, on the device of `real`."""
    parts = torch.arange(len(real.images_train)).split(5000)
    return SyntheticSet(torch.cat([real.train_batch(part) for part in parts]), real.labels_train)


def _of_indices(real: RealData, chosen: Sequence[torch.Tensor]) -> SyntheticSet:
    labels = torch.arange(real.num_classes).repeat_interleave(len(chosen[0]))
    return SyntheticSet(real.train_batch(torch.cat(chosen)).cpu(), labels)


@torch.no_grad()
def unit_features(net: nn.Module, take: Callable[[torch.Tensor], torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """Features of length 1, float32 `[N, D]`, of the normalised images `take(index)`, on the device of `net`."""
    net.eval()
    return torch.cat([F.normalize(net.embed(take(part)).flatten(1)) for part in index.split(BATCH)])


@dataclass(frozen=True)
class FeatureNetworks:
    """Trains networks in whose features images are chosen."""

    model: str
    real: RealData
    settings: TrainSettings  # its epochs are ignored; they depend on the size of the set
    seed: int
    compile_flag: str
    precision: str

    def train(self, synthetic: SyntheticSet) -> nn.Module:
        """A network trained on the labelled images of a set, its weights and epochs drawn from the seed."""
        real, key, count = self.real, ("feature network",), len(synthetic.images)
        epochs = SMALL_EPOCHS if count < len(real.images_train) else WHOLE_EPOCHS
        net = real.network(self.model, generator(self.seed, *key))
        work = Workload(epochs * count, "training")
        print_line(f"training a network for features: {epochs} epochs of {count} images")
        shape = (real.channel, *real.im_size)
        with kept_precision():
            compute = choose_compute(self.compile_flag, self.precision, real.device, net, shape, work)
            trainer = Trainer(net.to(real.device), replace(self.settings, epochs=epochs), compute)
            trainer.train(synthetic.without_outliers().to(real.device), self.seed, key)
        return net.eval()

    def for_coresets(self, given: str | None, cache: Path) -> nn.Module:
        """The network of the file `given`, or one of the whole set that is kept in the folder `given` or `cache`."""
        if given is not None and given.endswith(".pt"):
            return load_network(Path(given), self.model, self.real, "--features")
        folder = cache if given is None else Path(given)
        about = f"{self.real.fingerprint()} {replace(self.settings, epochs=WHOLE_EPOCHS)} {self.seed}"
        about += " whitened" if self.real.zca is not None else ""
        path = folder / f"{self.real.name}_{self.model}_{hashlib.sha256(about.encode()).hexdigest()[:12]}.pt"
        if not path.is_file():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                advice = "Choose another folder with --features or --save_path"
                raise UserError(f"cannot make {folder}: {error}. {advice}") from None
            save_network(path, self.train(whole_set(self.real)))
        return load_network(path, self.model, self.real, "--features")
