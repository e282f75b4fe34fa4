"""Gradient matching: DC (Zhao et al., ICLR 2021) and DSA (Zhao & Bilen, ICML 2021), with and without outliers.

One iteration takes a fresh random network. Each outer step moves the synthetic images of every class so that the
gradient of their loss on the network's weights comes closer to that of real images of the class, then the outliers
likewise. Between two steps the network is trained on the synthetic set.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from networks import initialize
from utils.compute import distributed
from utils.compute.device import Workload
from utils.core.rng import generator
from utils.data.synthetic import decode_slots, on_stored
from utils.methods.distances import METRICS
from utils.methods.learnable import LearnableSet
from utils.methods.matcher import Matcher
from utils.methods.method import MatchingSettings, MethodEntry, MethodInputs
from utils.outliers.distilled import push_apart
from utils.settings.fields import flag
from utils.settings.parser import count
from utils.training.trainer import LR_NET, PROTOCOLS, Trainer, TrainSettings

BATCHNORM_IMAGES = 16  # of each class, that set the statistics of BatchNorm
# outer and inner loop by images per class, as published
LOOPS = {1: (1, 1), 2: (1, 1), 5: (10, 50), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclass(frozen=True)
class GradientSettings(MatchingSettings):
    """Gradient matching."""

    dis_metric: str = flag("ours", "distance between gradients", names=METRICS)
    outer_loop: int | None = flag(
        None, "matching steps per iteration; left out: the published number for --ipc", count(1)
    )
    inner_loop: int | None = flag(
        None,
        "epochs of network training between two matching steps; left out: the published number for --ipc",
        count(0),
    )

    @property
    def loops(self) -> tuple[int, int]:
        """Outer and inner loop: those given, else those published for this ipc, else ipc and 500 / ipc, at least 1."""
        outer, inner = LOOPS.get(self.ipc, (self.ipc, max(1, round(500 / self.ipc))))
        outer = outer if self.outer_loop is None else self.outer_loop
        return outer, inner if self.inner_loop is None else self.inner_loop


class GradientMatching(LearnableSet):
    """The synthetic images of one experiment, and the iterations that update them by gradient matching."""

    settings: GradientSettings

    def __init__(self, inputs: MethodInputs):
        super().__init__(inputs)
        s = self.settings
        self.outer_loop, self.inner_loop = s.loops
        self.net = self.real.network(s.model, generator(s.seed)).to(self.device)
        self.matcher = Matcher(self.net, s.dis_metric, inputs.compute)
        is_sgd = (s.optimizer or PROTOCOLS[s.protocol].optimizer) == "sgd"  # else --lr_net is of another optimiser
        rate = s.lr_net if s.lr_net and is_sgd else LR_NET
        training = TrainSettings(1, rate, s.batch, s.lambda_oe, self.augmentation, momentum=0.0, weight_decay=0.0)
        self.trainer = Trainer(self.net, training, inputs.compute)
        self.about = {"outer_loop": self.outer_loop, "inner_loop": self.inner_loop}
        if s.ipc not in LOOPS and None in (s.outer_loop, s.inner_loop):
            loops = f"outer {self.outer_loop}, inner {self.inner_loop}"
            self.notices.append(f"ipc {s.ipc} has no published loops: {loops} by rule")
        if s.lr_net and (s.protocol, is_sgd) != ("dc", True) and self.outer_loop > 1:
            self.notices.append(f"the inner loop trains networks by SGD, at a learning rate of {rate:g}")
        if s.inner_loop and self.outer_loop == 1:
            self.notices.append("--inner_loop is not used: with an outer loop of 1 no network is trained in between")

    def iterate(self, it: int) -> dict[str, Tensor]:
        """One iteration on a fresh random network; returns losses `[slots]` by name, means over the outer steps."""
        initialize(self.net, self.generator("network", it))
        self.trainer.restart(self.trainer.settings.lr)
        losses = []
        for outer in range(self.outer_loop):
            losses.append(self._matching_step(it, outer))
            if outer < self.outer_loop - 1:
                self._train_network(self.generator("inner", it, outer))
        return dict(zip(("loss", "loss_oe"), torch.stack(losses).mean(0).unbind(), strict=False))

    def _train_network(self, g: torch.Generator) -> None:
        """Train on the synthetic set for some epochs: rank 0 trains, the others receive its weights."""
        if distributed.is_main():
            for _ in self.trainer.drawn_epochs(self.synthetic().decoded(), [g] * self.inner_loop):
                pass
        distributed.broadcast_(*(t.detach() for t in self.net.state_dict().values()))

    def _matching_step(self, it: int, outer: int) -> Tensor:
        """Update the images, then the outliers; returns their losses, `[1 or 2, slots]`."""
        self.net.train()
        if self.trainer.has_batchnorm:  # one pass over these images in training mode, then every BatchNorm is frozen
            generators = [self.generator("batchnorm", it, outer, c) for c in range(self.real.num_classes)]
            chosen = [self.real.choose(c, BATCHNORM_IMAGES, g) for c, g in enumerate(generators)]
            with torch.no_grad():
                self.net(self.real.train_batch(torch.cat(chosen)))
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        losses = [self._update(0, it, outer)]
        self.update(0)
        if self.outliers is not None:
            losses.append(self._update(1, it, outer))
            push_apart(self.net, self.image_oe, self.settings.spread_oe, self.settings.factor)
            self.update(1)
        return torch.stack(losses)

    def _update(self, which: int, it: int, outer: int) -> Tensor:
        """Set the gradient of the images (0) or of the outliers (1); returns the losses of the slots."""
        images, batches = self._tensors()[which], self.batches(which, it, outer)
        decoded = decode_slots(images.detach(), self.settings.factor)
        losses, gradient = self.matcher(decoded, batches, self.transforms(which, it, outer), outliers=which == 1)
        images.grad = on_stored(images, self.settings.factor, gradient)
        return losses


def _workload(inputs: MethodInputs) -> Workload:
    """Matching, which the processes share, and the training of networks in between by rank 0."""
    s, (outer, inner) = inputs.settings, inputs.settings.loops
    images = (outer - 1) * inner * inputs.kinds * inputs.real.num_classes * s.decoded_ipc
    passes = outer * inputs.batch_images / distributed.world_size() + images
    return Workload(passes, "matching")


DC_ENTRY = MethodEntry("DC", "gradient matching", GradientMatching, _workload, GradientSettings, augmentation="unused")
DSA_ENTRY = replace(
    DC_ENTRY,
    name="DSA",
    help="gradient matching under Siamese augmentation, better from ipc 2 on",
    augmentation="required",
)
