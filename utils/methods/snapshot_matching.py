"""Distribution matching on trained networks: TGDD (AAAI 2026); with other flags DANCE (IJCAI 2024), NCFM (CVPR 2025).

One iteration takes a snapshot of an expert and moves the synthetic images of every class so that their features come
closer to those of real images of the class, slot by slot also for outliers. A later snapshot classifies the synthetic
images: its cross-entropy is added, and with outliers its joint loss. Experts are those of `train_experts.py`; with
outliers they have the joint loss, too. Images are updated together, and stay in the range of pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from utils.compute import distributed
from utils.compute.transfer import send, send_draws
from utils.core.rng import generator
from utils.data.augment import apply_by_slot, identity
from utils.data.synthetic import decode_slots, on_stored
from utils.methods.distances import characteristic, characteristic_distance
from utils.methods.distribution_matching import CHUNK_IMAGES, DistributionMatching, feature_workload
from utils.methods.method import MethodEntry, MethodInputs, Spread, with_experts
from utils.settings.distillation import ExpertSettings, OnExperts
from utils.settings.fields import flag, only
from utils.settings.parser import count, number
from utils.training.experts import ExpertBuffer, without_running_statistics
from utils.training.losses import joint_loss, joint_parts


@dataclass(frozen=True)
class SnapshotSettings(OnExperts, Spread):
    """Matching on trained networks."""

    ce_weight: float | None = flag(
        None, "weight of the classification loss of each class; left out: 2.5, from ipc 50 on 0.5", number(0)
    )
    snapshots: str = flag(
        "epochs",
        "epochs: the experts after a random epoch, and a tenth of the epochs later to classify; interpolate: between "
        "their first and last parameters, and the last to classify",
        names=("epochs", "interpolate"),
    )
    feature_distance: str = flag(
        "mean",
        "mean: squared distance of mean features; cf: distance of their characteristic functions (NCFM)",
        names=("mean", "cf"),
    )
    cf_frequencies: int = flag(
        1024,
        "frequencies of --feature_distance cf, others in each iteration",
        count(1),
        needs=only("feature_distance", "cf"),
    )
    published: bool = flag(
        False,
        "optimise the images as published: 10000 iterations of SGD with momentum 0.5, at 0.01 times --ipc on pixels "
        "between 0 and 1; left out: AdamW",
    )

    def of_experts(self) -> ExpertSettings:
        """One expert with momentum is enough."""
        enough = self.max_experts or 1
        return replace(super().of_experts(), num_experts=enough, train_epochs=12, mom=0.9, lr_teacher=0.02)

    @property
    def alpha(self) -> float:
        """The weight of the classification loss."""
        return self.ce_weight if self.ce_weight is not None else 0.5 if self.ipc >= 50 else 2.5


class SnapshotMatching(DistributionMatching):
    """The synthetic images of one experiment, and the iterations that match them on snapshots of experts."""

    GRADIENT_IN_BF16 = True  # AdamW takes little of a gradient but its sign
    KEEPS_PIXELS = True
    settings: SnapshotSettings

    def __init__(self, inputs: MethodInputs, experts: ExpertBuffer):
        super().__init__(inputs)
        s = self.settings
        self.experts = experts
        without_running_statistics(self.net)
        classifier = without_running_statistics(self.real.network(s.model, generator(s.seed)))
        self.classifier = classifier.to(self.device).requires_grad_(False)
        self.logits = inputs.compute.function(lambda images: self.classifier(images))
        two = torch.zeros(2, self.real.channel, *self.real.im_size, device=self.device)
        self.num_features = self.net.embed(two).flatten(1).shape[1]

    def optimizer(self, images: list[Tensor], lr: float) -> torch.optim.Optimizer:
        """AdamW without decay: gradients of snapshots differ in size by orders of magnitude. Or SGD, as published."""
        if self.settings.published:
            return super().optimizer(images, lr)
        return torch.optim.AdamW(images, lr=lr, weight_decay=0.0)

    def update(self, which: int) -> None:
        """Move the images or the outliers; with `--published` as SGD with this learning rate moves pixels in [0, 1]."""
        if self.settings.published and self.real.zca is None:
            self._tensors()[which].grad.div_(self.real.scale[1] ** 2)
        super().update(which)

    def load_network(self, it: int) -> None:
        """Give the two networks the parameters of this iteration, and draw the frequencies of `cf`."""
        s, experts = self.settings, self.experts
        g = self.generator("snapshot", it)
        index = int(torch.randint(len(experts.trajectories), (1,), generator=g))
        last = len(experts.trajectories[index][1]) - 1
        if s.snapshots == "epochs":
            epoch = 1 + int(torch.randint(last, (1,), generator=g))
            matched = experts.snapshot(index, epoch, self.device)
            later = experts.snapshot(index, min(last, epoch + max(1, round(last / 10))), self.device)
        else:
            share = float(torch.rand((), generator=g))
            later = experts.snapshot(index, last, self.device)
            first = experts.snapshot(index, 0, self.device)
            matched = [share * a + (1 - share) * b for a, b in zip(first, later, strict=True)]
        for net, params in ((self.net, matched), (self.classifier, later)):
            net.train()
            for parameter, value in zip(net.parameters(), params, strict=True):
                parameter.copy_(value)
        if s.feature_distance == "cf":
            self.frequencies = send(torch.randn(s.cf_frequencies, self.num_features, generator=g), self.device)

    def target(self, features: Tensor) -> Tensor:
        """The mean of the real features, or their characteristic function."""
        if self.settings.feature_distance == "mean":
            return super().target(features)
        return characteristic(features, self.frequencies)

    def distance(self, features: Tensor, targets: Tensor) -> Tensor:
        """DM's distance, or NCFM's."""
        if self.settings.feature_distance == "mean":
            return super().distance(features, targets)
        return characteristic_distance(features, targets, self.frequencies)

    def more_losses(self, it: int) -> dict[str, Tensor]:
        """Add the gradient of the weighted classification loss, summed over the slots as the losses of matching are, to
        that of images and outliers; returns its mean over the slots `[1]`.

        Rank 0 computes it; the other processes receive the gradients.
        """
        s, loss, kinds = self.settings, torch.zeros(1, device=self.device), self._tensors()
        gradients = [torch.zeros_like(images) for images in kinds]
        if distributed.is_main() and s.alpha:
            decoded = [decode_slots(images.detach(), s.factor) for images in kinds]
            value, found = self._classification(decoded, self.generator("classify", it))
            loss += value
            for images, gradient, on_decoded in zip(kinds, gradients, found, strict=True):
                gradient.copy_(on_stored(images, s.factor, s.alpha * len(images) * on_decoded))
        distributed.broadcast_(loss, *gradients)
        for images, gradient in zip(kinds, gradients, strict=True):
            images.grad += gradient
        return {"loss_ce": loss}

    def _classification(self, kinds: Sequence[Tensor], g: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """The joint loss of images, and perhaps of outliers, each `[slots, n, C, H, W]`, and its gradient on each.

        Every slot of each kind has an augmentation of its own, and every image parameters of its own.
        """
        slots, n, *_ = kinds[0].shape
        total, gradients = kinds[0].new_zeros(()), [torch.zeros_like(images) for images in kinds]
        drawn = [identity] * (slots * len(kinds))
        if self.augmentation is not None:
            drawn = send_draws([self.augmentation.draw(n, self.real.im_size, g) for _ in drawn], self.device)
        transforms = [drawn[first : first + slots] for first in range(0, len(drawn), slots)]
        labels = torch.arange(slots, device=self.device).repeat_interleave(n).view(slots, n)
        size = slots if self.has_batchnorm else max(1, CHUNK_IMAGES // (n * len(kinds)))
        for first in range(0, slots, size):
            part = slice(first, first + size)
            leaves = [images[part].detach().requires_grad_() for images in kinds]
            by_kind = [apply_by_slot(leaf, t[part]).flatten(0, 1) for leaf, t in zip(leaves, transforms, strict=True)]
            augmented, share = torch.cat(by_kind), len(leaves[0]) / slots
            value, on_augmented = self._joint_loss(augmented, labels[part].flatten())
            found = torch.autograd.grad(augmented, leaves, share * on_augmented)
            for gradient, of_part in zip(gradients, found, strict=True):
                gradient[part] = of_part
            total += share * value
        return total, gradients

    def _joint_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The joint loss of images followed by outliers, and its gradient on them; on a CPU, in parts."""
        seen, total = images.detach().requires_grad_(), images.new_zeros(())
        parts = joint_parts(seen, labels, None if self.has_batchnorm else self.splitter)
        for some, of_some in parts:
            loss = joint_loss(self.logits(some), of_some, self.settings.lambda_oe) / len(parts)
            loss.backward(inputs=[seen])
            total += loss.detach()
        return total, seen.grad


TGDD_ENTRY = MethodEntry(
    "TGDD",
    "DM on experts (train_experts.py)",
    with_experts(SnapshotMatching),
    partial(feature_workload, networks=2),
    SnapshotSettings,
    defaults={
        "Iteration": 2000, "lr_img": 0.02, "init": "real", "eval_interval": 1000, "factor": 2, "batch_real": 128,
        "batch_oe": 128, "num_exp": 1, "num_eval": 5,
    },
    derived=lambda s: {"Iteration": 10000, "lr_img": 0.01 * s.ipc} if s.published else {},
    experts=OnExperts.to_train,
    unused=("clamp_oe",),
)  # fmt: skip
