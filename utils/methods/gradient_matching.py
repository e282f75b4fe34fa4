"""Gradient matching: DC (Zhao et al., ICLR 2021) and DSA (Zhao & Bilen, ICML 2021), with and without outliers.

One iteration takes a fresh random network. Each outer step moves the synthetic images of every class so that the
gradient of their loss on the network's weights comes closer to that of real images of the class, then the outliers
likewise. Between two steps the network is trained on the synthetic set.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from utils.compute import distributed
from utils.compute.compiling import Workload, batches
from utils.compute.device import Compute
from utils.core.rng import generator
from utils.data.augment import identity
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.methods.distances import METRICS
from utils.methods.learnable import IterationDraws, LearnableSet, SlotDraw, StepDraw, shared_settings
from utils.methods.matcher import Matcher
from utils.methods.method import (
    POOL_FLAGS,
    SPREAD,
    Flag,
    MatchSettings,
    MethodEntry,
    MethodInputs,
    match_settings,
)
from utils.outliers.sources import OutlierSource
from utils.outliers.spread import push_apart
from utils.settings.parser import count, one_of
from utils.training.draws import Batch
from utils.training.network_pool import NetworkPool
from utils.training.trainer import Trainer, TrainSettings

# outer and inner loop by images per class, as published
LOOPS = {1: (1, 1), 2: (1, 1), 5: (10, 50), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


class GradientMatching(LearnableSet):
    """The synthetic images of one experiment, and the iterations that update them by gradient matching."""

    def __init__(
        self,
        real: RealData,
        outliers: OutlierSource | None,
        settings: MatchSettings,
        compute: Compute | None = None,
        initial: Sequence[SyntheticSet] = (),
    ):
        s = settings
        super().__init__(real, outliers, initial=initial, **shared_settings(s))
        compute = compute or Compute()
        self.settings = s
        self.net = real.network(s.model, generator(s.seed)).to(self.device)
        self.matcher = Matcher(self.net, s.metric, compute)
        training = TrainSettings(1, s.lr_net, s.batch_train, s.lambda_oe, s.dsa, momentum=0.0, weight_decay=0.0)
        self.trainer = Trainer(self.net, training, compute)
        pool_training = TrainSettings(1, s.lr_net, s.batch_train, s.lambda_oe, s.dsa)
        self.pool = s.pool and NetworkPool(real, s.model, s.pool, pool_training, s.seed, compute)
        self.draws = IterationDraws(real, outliers, s, self.trainer.has_batchnorm)
        self.about = {"outer_loop": s.outer_loop, "inner_loop": s.inner_loop}
        self.notices: list[str] = []

    def iterate(self, it: int) -> dict[str, torch.Tensor]:
        """One iteration on a fresh random network, or on one of the pool; returns losses `[slots]` by name, means over
        the outer steps."""
        self.reset_network(self.net, self.draws.generator(self.exp, "network", it), it)
        self.trainer.restart(self.settings.lr_net)
        losses = []
        for outer, drawn in enumerate(self.draws.steps(self.exp, it, self.synthetic())):
            losses.append(self._matching_step(drawn))
            if outer < self.settings.outer_loop - 1:
                self._train_network(drawn.epochs)
        if self.device.type == "cuda":
            self.draws.look_ahead(self.exp, it + 1, self.synthetic())
        return dict(zip(("loss", "loss_oe"), torch.stack(losses).mean(0).unbind(), strict=False))

    def _train_network(self, epochs: list[list[Batch]]) -> None:
        """Train on the synthetic set for some epochs: rank 0 trains, the others receive its weights."""
        if distributed.is_main():
            for _ in self.trainer.epochs(self.synthetic(), epochs):
                pass
        distributed.broadcast_(*(t.detach() for t in self.net.state_dict().values()))

    def _matching_step(self, drawn: StepDraw) -> torch.Tensor:
        """Update the images, then the outliers; returns their losses, `[1 or 2, slots]`."""
        self.net.train()
        if drawn.batchnorm is not None:
            self._set_batchnorm(drawn.batchnorm)
        batches = (self.real.train_batch(draw.real) for draw in drawn.images.values())
        losses = [self._update(self.image_syn, batches, drawn.images)]
        self.update_images()
        if self.outliers is not None:
            batches = (self.outliers.batch(draw.real) for draw in drawn.outliers.values())
            losses.append(self._update(self.image_oe, batches, drawn.outliers, outliers=True))
            push_apart(self.net, self.image_oe, self.settings.spread_oe)
            self.update_outliers()
        return torch.stack(losses)

    def _update(
        self,
        images: torch.Tensor,
        batches: Iterable[torch.Tensor],
        drawn: dict[int, SlotDraw],
        outliers: bool = False,
    ) -> torch.Tensor:
        """Set the gradient of the images or of the outliers; returns the losses of the slots.

        `batches`: the real batch of each slot in `drawn`.
        """
        transforms = {slot: draw.transform or identity for slot, draw in drawn.items()}
        losses, images.grad = self.matcher(images.detach(), batches, transforms, outliers)
        return losses

    def _set_batchnorm(self, index: torch.Tensor) -> None:
        """One training-mode pass over these training images, then freeze every BatchNorm."""
        with torch.no_grad():
            self.net(self.real.train_batch(index))
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def published_loops(ipc: int) -> tuple[int, int]:
    """Outer and inner loop as published for `ipc`, else outer = ipc and inner = 500 / ipc, rounded, at least 1."""
    return LOOPS.get(ipc, (ipc, max(1, round(500 / ipc))))


def _settings(inputs: MethodInputs) -> MatchSettings:
    f = inputs.flags
    outer, inner = published_loops(f["ipc"])
    return match_settings(
        inputs,
        metric=f["dis_metric"],
        outer_loop=outer if f["outer_loop"] is None else f["outer_loop"],
        inner_loop=inner if f["inner_loop"] is None else f["inner_loop"],
    )


def image_passes(settings: MatchSettings, real: RealData, with_outliers: bool) -> float:
    """How many images one iteration sends forward and backward through the network in this process."""
    s, kinds = settings, 2 if with_outliers else 1
    per_class = min(s.batch_real, len(real.images_train) // real.num_classes)
    matched = s.outer_loop * real.num_classes * (per_class + s.batch_oe * (kinds - 1))
    epochs = (s.outer_loop - 1) * s.inner_loop + (s.pool.epochs if s.pool else 0)
    trained = epochs * kinds * real.num_classes * s.ipc  # by rank 0
    return matched / distributed.world_size() + trained


def iteration_steps(settings: MatchSettings, num_classes: int) -> int:
    """How many steps one iteration takes: matching, and training of its network in between and in the pool."""
    s = settings
    epochs = (s.outer_loop - 1) * s.inner_loop + (s.pool.epochs if s.pool else 0)
    return s.outer_loop + epochs * batches(num_classes * s.ipc, s.batch_train)


def _build(inputs: MethodInputs) -> GradientMatching:
    settings = _settings(inputs)
    method = GradientMatching(inputs.real, inputs.outliers, settings, inputs.compute, inputs.initial)
    if settings.ipc not in LOOPS and None in (inputs.flags["outer_loop"], inputs.flags["inner_loop"]):
        loops = f"outer {settings.outer_loop}, inner {settings.inner_loop}"
        method.notices.append(f"ipc {settings.ipc} has no published loops: {loops} by rule")
    if inputs.flags["inner_loop"] and settings.outer_loop == 1:
        method.notices.append("--inner_loop is not used: with an outer loop of 1 no network is trained in between")
    return method


def _workload(inputs: MethodInputs) -> Workload:
    settings = _settings(inputs)
    passes = image_passes(settings, inputs.real, inputs.outliers is not None)
    return Workload(passes, iteration_steps(settings, inputs.real.num_classes), "matching")


FLAGS = (
    Flag("dis_metric", one_of("metric", METRICS), "ours", "distance between gradients"),
    Flag("outer_loop", count(1), None, "matching steps per iteration; left out: the published number for --ipc"),
    Flag(
        "inner_loop", count(0), None, "epochs of network training between two matching steps; left out: the published "
        "number for --ipc",
    ),
    *POOL_FLAGS,
    SPREAD,
)  # fmt: skip
DC_ENTRY = MethodEntry("DC", "gradient matching", _build, _workload, FLAGS, augmentation="unused")
DSA_ENTRY = replace(
    DC_ENTRY,
    name="DSA",
    help="gradient matching under Siamese augmentation, better from ipc 2 on",
    augmentation="required",
)
