"""Evaluation during distillation: fresh networks are trained on the synthetic set and tested."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from networks import get_network, initialize

from . import distributed, interrupts
from .augment import DSA, dc_augmentation
from .datasets import RealData
from .devices import Compute
from .errors import Interrupted
from .ood_metrics import ood_measures
from .ood_scores import msp
from .rng import generator
from .runs import RunFolder
from .synthetic import SyntheticSet
from .training import Trainer, TrainSettings, accuracy_of

EVAL_LOG = 500
Found = dict[str, dict[int, dict[str, float]]]  # by evaluation model and number of the network: its measures

EVAL_MODES = {
    "M": ("MLP", "ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18"),
    "B": ("ConvNetBN", "ConvNetASwishBN", "AlexNetBN", "VGG11BN", "ResNet18BN"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "A": ("ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetASwish"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
}


def evaluation_models(mode: str, model: str) -> tuple[str, ...]:
    """The networks of `--eval_mode`."""
    if mode == "S":
        return (model.replace("BN", ""),)
    return EVAL_MODES.get(mode, (model,))


def training_of(
    model: str, dataset: str, dsa: DSA | None, epochs: int | None, lr: float, batch: int, lambda_oe: float
) -> TrainSettings:
    """How an evaluation network is trained: with DSA's augmentation, DC's, or none; without `epochs` 1000 with one,
    else 300."""
    augmentation = dsa or dc_augmentation(dataset, model)
    return TrainSettings(epochs or (1000 if augmentation else 300), lr, batch, lambda_oe, augmentation)


def mean_std(values: list[float]) -> str:
    """`mean ± std` in percent."""
    return f"{100 * np.mean(values):.2f} ± {100 * np.std(values):.2f} %"


@dataclass(frozen=True)
class EvalSettings:
    """`num_networks` networks of each model; `training`: how each model is trained; `ood`: images, by
    name, of the sets whose AUROC (score msp) is measured, too."""

    num_networks: int
    training: dict[str, TrainSettings]
    seed: int
    ood: dict[str, torch.Tensor] = field(default_factory=dict)


class Evaluator:
    """Trains fresh networks on a synthetic set and tests them; under `torchrun` each process takes some of them."""

    def __init__(self, real: RealData, settings: EvalSettings, run: RunFolder, compute: Compute):
        self.real, self.settings, self.run, self.compute = real, settings, run, compute
        self.models = tuple(settings.training)
        self.trainers: dict[str, Trainer] = {}

    def evaluate(
        self, synthetic: SyntheticSet, exp: int, it: int, found: Found, after_network: Callable[[], None]
    ) -> None:
        """Test the networks that `found` lacks, and add them to it.

        Args:
            exp, it: the experiment and the number of its updates; they key what is random.
            found: measures so far, in place.
            after_network: called after each network (under `torchrun`: after each process has trained one).
        Raises:
            Interrupted: after a signal; networks that were in training are not in `found`.
        """
        for model in self.models:
            values = found.setdefault(model, {})
            todo = [index for index in range(self.settings.num_networks) if index not in values]
            epochs = self.settings.training[model].epochs
            rounds = range(0, len(todo), distributed.world())
            with self.run.progress(len(rounds) * epochs, f"evaluate {model}", every=EVAL_LOG) as progress:
                for first in rounds:
                    mine = todo[first + distributed.rank() : first + distributed.rank() + 1]
                    values |= distributed.gather({i: self._test(model, synthetic, exp, it, i, progress) for i in mine})
                    after_network()
                    interrupts.check()
            found[model] = dict(sorted(values.items()))

    def _test(self, model: str, synthetic: SyntheticSet, exp: int, it: int, index: int, progress) -> dict[str, float]:
        """Train and test one network."""
        trainer = self._trainer(model)
        key = ("evaluate", exp, it, model, index)

        def after_epoch(epoch: int, loss: torch.Tensor) -> None:
            progress.step(loss=loss)
            if interrupts.received() and distributed.world() == 1:  # several processes stop together, after the network
                raise Interrupted(interrupts.received())

        initialize(trainer.net, generator(self.settings.seed, *key))
        trainer.train(synthetic, self.settings.seed, key, after_epoch)
        logits = trainer.predict(self.real.test_images)
        if not torch.isfinite(logits).all():
            self.run.log(f"{model} network {index}: its training diverged (outputs not finite); lower --lr_net")
        measures = {"accuracy": accuracy_of(logits, self.real.labels_test)}
        return measures | {f"auroc {name}": _auroc(logits, trainer.predict(x)) for name, x in self.settings.ood.items()}

    def _trainer(self, model: str) -> Trainer:
        if model not in self.trainers:
            real = self.real
            net = get_network(model, real.channel, real.num_classes, real.im_size, generator(self.settings.seed))
            self.trainers[model] = Trainer(net.to(real.device), self.settings.training[model], self.compute)
        return self.trainers[model]


def _auroc(logits: torch.Tensor, logits_ood: torch.Tensor) -> float:
    """AUROC of the score msp; NaN where a score is not finite."""
    inside, outside = (msp(z.double(), 1.0).cpu().numpy() for z in (logits, logits_ood))
    if not np.isfinite(np.concatenate([inside, outside])).all():
        return float("nan")
    return ood_measures(inside, outside)["auroc"]
