"""Features of trained networks, in which coresets are chosen."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from utils.compute.compiling import Workload, batches
from utils.compute.device import choose_compute, kept_precision
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.training.saved_networks import load_network, save_network
from utils.training.trainer import Trainer, TrainSettings

BATCH = 250
WHOLE_EPOCHS = 30  # of the whole training set
SMALL_EPOCHS = 300  # of a small set, whose features choose outliers


@torch.no_grad()
def unit_features(net: nn.Module, take: Callable[[torch.Tensor], torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """Features of length 1, float32 `[N, D]`, of the images `take(index)`.

    `take` gives for int64 `[n]` normalised images `[n, C, H, W]`, on the device of `net`.
    """
    net.eval()
    return torch.cat([F.normalize(net.embed(take(part)).flatten(1)) for part in index.split(BATCH)])


def whole_set(real: RealData) -> SyntheticSet:
    """All training images as one set, normalised, float32, on the device of `real`."""
    parts = torch.arange(len(real.images_train)).split(5000)
    return SyntheticSet(torch.cat([real.train_batch(part) for part in parts]), real.labels_train)


@dataclass(frozen=True)
class FeatureNetworks:
    """Trains networks in whose features images are chosen."""

    model: str
    real: RealData
    settings: TrainSettings  # its epochs are ignored; `train` sets them
    seed: int
    compile_flag: str
    precision: str

    def train(self, synthetic: SyntheticSet, epochs: int | None = None) -> nn.Module:
        """A network trained on the labelled images of a set, its weights and epochs drawn from the seed.

        `epochs` left out: as many as suit the size of the set.
        """
        epochs = epochs or (SMALL_EPOCHS if len(synthetic.images) < len(self.real.images_train) else WHOLE_EPOCHS)
        real, key, count = self.real, ("feature network",), len(synthetic.images)
        net = real.network(self.model, generator(self.seed, *key))
        work = Workload(epochs * count, epochs * batches(count, self.settings.batch), "training")
        shape = (real.channel, *real.im_size)
        with kept_precision():
            compute = choose_compute(self.compile_flag, self.precision, real.device, net, shape, work)
            trainer = Trainer(net.to(real.device), replace(self.settings, epochs=epochs), compute)
            trainer.train(synthetic.without_outliers().to(real.device), self.seed, key)
        return net.eval()

    def for_coresets(self, given: str | None, cache: Path) -> nn.Module:
        """The network of the file `given`, or one that is trained on the whole training set once and kept.

        It is kept in the folder `given`, or in `cache`.
        """
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
            save_network(path, self.train(whole_set(self.real), WHOLE_EPOCHS))
        return load_network(path, self.model, self.real, "--features")
