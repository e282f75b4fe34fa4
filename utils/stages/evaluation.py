"""Evaluation during distillation: fresh networks are trained on the synthetic set and tested."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from utils.compute import distributed
from utils.compute.device import Compute
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import DSA, dc_augmentation
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.ood.scores import msp
from utils.runs import signals
from utils.runs.progress import Progress
from utils.runs.run_folder import RunFolder
from utils.settings.arguments import Stage1Settings, Stage2Settings
from utils.settings.distillation import EVAL_MODES
from utils.training.trainer import PROTOCOLS, WEIGHT_DECAYS, Trainer, TrainSettings, accuracy_of

EVAL_LOG = 500
EvalMeasures = dict[str, dict[int, dict[str, float]]]  # by model and network index: accuracy, AUROCs; NaN: diverged


def evaluation_models(mode: str, model: str, real: RealData) -> tuple[str, ...]:
    """The names of the networks that `--eval_mode` asks for; a `UserError` tells of one that does not take images of
    this size, as that must be known before hours of distillation."""
    names = (model.replace("BN", ""),) if mode == "S" else EVAL_MODES.get(mode, (model,))
    for name in names:
        try:
            real.network(name, generator(0))
        except UserError as error:
            if name == model:
                raise
            reason = str(error).removeprefix(f"--model {name}: ").split(". ")[0]
            raise UserError(f"--eval_mode {mode}: {name}: {reason}. Choose another mode, e.g. S") from None
    return names


def training_of(s: Stage1Settings | Stage2Settings, model: str, dsa: DSA | None) -> TrainSettings:
    """How a network is trained on a synthetic set: with DSA's augmentation, DC's, or none.

    CutMix takes the place of cutout. `--epoch_eval_train` left out: 300 epochs without augmentation.
    """
    given = {name: getattr(s, name) for name in ("optimizer", "schedule", "mix") if getattr(s, name)}
    how, augmentation = replace(PROTOCOLS[s.protocol], **given), dsa or dc_augmentation(s.dataset, model)
    if how.mix == "cutmix" and dsa is not None:
        augmentation = DSA(tuple(entry for entry in dsa.strategy if entry != "cutout") or dsa.strategy)
    return replace(
        how,
        epochs=s.epoch_eval_train or (how.epochs if augmentation else 300),
        lr=s.lr_net,
        batch=s.batch_train or how.batch,
        lambda_oe=s.lambda_oe,
        augmentation=augmentation,
        weight_decay=WEIGHT_DECAYS[how.optimizer],
    )


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated."""

    num_networks: int  # fresh networks of each model
    training: dict[str, TrainSettings]  # of each model
    seed: int
    ood: dict[str, Tensor] = field(default_factory=dict)  # normalised images of each OOD set; for AUROC by msp


class Evaluator:
    """Trains fresh networks on a synthetic set and tests them; under `torchrun` each process takes some of them."""

    def __init__(self, real: RealData, settings: EvalSettings, run: RunFolder, compute: Compute):
        self.real, self.settings, self.run, self.compute = real, settings, run, compute
        self.trainers: dict[str, Trainer] = {}

    def evaluate(
        self, synthetic: SyntheticSet, exp: int, it: int, measures: EvalMeasures, after_network: Callable[[], None]
    ) -> None:
        """Train and test the networks that `measures` lacks, and add their measures to it, in place.

        `exp`, `it`: the experiment and its number of updates; they key the random draws. `after_network` is called
        after each network (under `torchrun`: after each process has trained one). Networks that a signal interrupts are
        not in `measures`.
        """
        per_round = distributed.world_size()
        for model, training in self.settings.training.items():
            values = measures.setdefault(model, {})
            todo = [index for index in range(self.settings.num_networks) if index not in values]
            rounds = [todo[first : first + per_round] for first in range(0, len(todo), per_round)]
            with self.run.progress(len(rounds) * training.epochs, f"evaluate {model}", every=EVAL_LOG) as progress:
                for of_round in rounds:
                    own = [of_round[i] for i in distributed.own_share(len(of_round))]
                    keys = {index: ("evaluate", exp, it, model, index) for index in own}
                    with signals.interruptible():
                        values |= distributed.gather(self._test(model, synthetic, keys, progress))
                    after_network()
                    signals.check()
            measures[model] = dict(sorted(values.items()))

    def _test(
        self, model: str, synthetic: SyntheticSet, keys: dict[int, tuple], progress: Progress
    ) -> dict[int, dict[str, float]]:
        """Train and test a network for each of `keys`; returns their measures by index."""
        if model not in self.trainers:
            net = self.real.network(model, generator(self.settings.seed))
            compute = self.compute.for_network(net)
            self.trainers[model] = Trainer(net.to(self.real.device), self.settings.training[model], compute)
        trainer = self.trainers[model]

        def after_epoch(epoch: int, loss: Tensor) -> None:
            """Show progress, and stop after a signal: networks in training are not kept."""
            progress.step(loss=loss.mean())
            signals.check()

        tested = {}
        for index, key in keys.items():
            trainer.train_fresh(synthetic, self.settings.seed, key, after_epoch)
            logits = trainer.predict(self.real.test_images)
            is_finite = bool(torch.isfinite(logits).all())
            if not is_finite:
                self.run.log_own(f"{model} network {index}: its training diverged (outputs not finite); lower --lr_net")
            ood = {f"auroc {name}": _auroc(logits, trainer.predict(x)) for name, x in self.settings.ood.items()}
            tested[index] = {"accuracy": accuracy_of(logits, self.real.labels_test) if is_finite else math.nan} | ood
        return tested


def _auroc(logits: Tensor, logits_ood: Tensor) -> float:
    """AUROC of the score msp; NaN where a score is not finite."""
    from sklearn.metrics import roc_auc_score

    scores = msp(torch.cat([logits, logits_ood]).double()).cpu().numpy()
    is_outside = np.arange(len(scores)) >= len(logits)
    return float(roc_auc_score(is_outside, scores)) if np.isfinite(scores).all() else float("nan")
