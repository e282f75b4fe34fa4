"""Evaluation during distillation: fresh networks are trained on the synthetic set and tested."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from networks import get_network
from utils.compute import distributed
from utils.compute.device import Compute
from utils.core.errors import Interrupted
from utils.core.rng import generator
from utils.data.augment import DSA, dc_augmentation
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.ood.measures import ood_measures
from utils.ood.scores import msp
from utils.runs import signals
from utils.runs.progress import Progress
from utils.runs.run_folder import RunFolder
from utils.training.stacked import Together, training_together_pays
from utils.training.trainer import Trainer, TrainSettings, accuracy_of

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
        """Test the networks that `found` lacks, and add them to it; where it is faster, all of a model at once.

        Args:
            exp, it: the experiment and the number of its updates; they key what is random.
            found: measures so far, in place.
            after_network: called after each network (under `torchrun`: after each process has trained one), or after
                those that are trained at once.
        Raises:
            Interrupted: after a signal; networks that were in training are not in `found`.
        """
        for model in self.models:
            values = found.setdefault(model, {})
            todo = [index for index in range(self.settings.num_networks) if index not in values]
            trainer = self._trainer(model, synthetic)
            per_round = max(1, len(todo)) if trainer.at_once else distributed.world()
            rounds = range(0, len(todo), per_round)
            steps = len(rounds) * trainer.settings.epochs
            with self.run.progress(steps, f"evaluate {model}", every=EVAL_LOG) as progress:
                for first in rounds:
                    mine = todo[first : first + per_round][distributed.rank() :: distributed.world()]
                    keys = {index: ("evaluate", exp, it, model, index) for index in mine}
                    values |= distributed.gather(self._test(model, trainer, synthetic, keys, progress))
                    after_network()
                    signals.check()
            found[model] = dict(sorted(values.items()))

    def _test(
        self, model: str, trainer: Trainer, synthetic: SyntheticSet, keys: dict[int, tuple], progress: Progress
    ) -> dict[int, dict[str, float]]:
        """Train and test a network for each of `keys`; returns the measures of each."""

        def after_epoch(epoch: int, loss: torch.Tensor) -> None:
            """Show the progress, and stop after a signal."""
            progress.step(loss=loss.mean())
            if signals.received() and distributed.world() == 1:  # several processes stop together, after the network
                raise Interrupted(signals.received())

        found = {}
        for index in trainer.networks(synthetic, self.settings.seed, keys, after_epoch):
            logits = trainer.predict(self.real.test_images)
            if not torch.isfinite(logits).all():
                self.run.log(f"{model} network {index}: its training diverged (outputs not finite); lower --lr_net")
            ood = {f"auroc {name}": _auroc(logits, trainer.predict(x)) for name, x in self.settings.ood.items()}
            found[index] = {"accuracy": accuracy_of(logits, self.real.labels_test)} | ood
        return found

    def _trainer(self, model: str, synthetic: SyntheticSet) -> Trainer:
        if model not in self.trainers:
            real, settings = self.real, self.settings.training[model]
            net = get_network(model, real.channel, real.num_classes, real.im_size, generator(self.settings.seed))
            images = min(settings.batch, len(synthetic.images)) * (1 if synthetic.images_oe is None else 2)
            shape = (images, real.channel, *real.im_size)
            compute = self.compute.of(net)
            at_once = self.settings.num_networks > 1 and training_together_pays(net, shape, compute)
            kind = Together if at_once else Trainer
            self.trainers[model] = kind(net.to(real.device), settings, compute)
        return self.trainers[model]


def _auroc(logits: torch.Tensor, logits_ood: torch.Tensor) -> float:
    """AUROC of the score msp; NaN where a score is not finite."""
    inside, outside = (msp(z.double(), 1.0).cpu().numpy() for z in (logits, logits_ood))
    if not np.isfinite(np.concatenate([inside, outside])).all():
        return float("nan")
    return ood_measures(inside, outside)["auroc"]
