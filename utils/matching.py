"""Gradient matching (DC: Zhao et al., ICLR 2021; DSA: Zhao & Bilen, ICML 2021), for images and for outliers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from networks import get_network, initialize

from .augment import DSA, identity
from .datasets import RealData
from .errors import UserError
from .losses import uniform_cross_entropy
from .outliers import OutlierPool, PseudoOutliers
from .rng import generator
from .synthetic import SyntheticSet
from .training import TrainSettings, train_epoch

EPSILON = 1e-6
METRICS = ("ours", "mse", "cos")
BATCHNORM_IMAGES = 16
MOMENTUM_IMG = 0.5


def match_loss(
    grads_syn: Sequence[torch.Tensor], grads_real: Sequence[torch.Tensor], metric: str = "ours"
) -> torch.Tensor:
    """Distance of two gradients of the same network.

    Args:
        grads_syn, grads_real: the gradients of all parameters, in parameter order.
        metric: `ours`: over parameters of two or more dimensions, rows = output units,
            `Σ_rows (1 - <a,b> / (|a||b| + 1e-6))` (DC, eq. 9 and appendix); `mse`: squared distance, and `cos`: one
            minus the cosine, of the concatenation of all parameters.
    Returns:
        A scalar, differentiable in both.
    """
    if metric == "ours":
        terms = [_row_distance(a, b) for a, b in zip(grads_syn, grads_real, strict=True) if a.ndim > 1]
        return torch.stack(terms).sum()
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (grads_syn, grads_real))
    if metric == "mse":
        return (a - b).square().sum()
    if metric == "cos":
        return 1 - (a * b).sum() / (a.norm() * b.norm() + EPSILON)
    raise ValueError(f"unknown metric {metric!r}")


def _row_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.flatten(1), b.flatten(1)
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPSILON)).sum()


SlotLoss = Callable[[torch.Tensor, int], torch.Tensor]


def class_loss(logits: torch.Tensor, slot: int) -> torch.Tensor:
    """Cross-entropy of a batch whose images are all of class `slot`."""
    return F.cross_entropy(logits, torch.full((len(logits),), slot, device=logits.device))


def outlier_loss(logits: torch.Tensor, slot: int) -> torch.Tensor:
    """Cross-entropy to uniform; all slots have the same."""
    return uniform_cross_entropy(logits)


def slot_gradient(net: nn.Module, images: torch.Tensor, slot: int, loss: SlotLoss, create_graph: bool = False):
    """Gradient of `loss(net(images), slot)` with respect to all parameters of `net`, in parameter order."""
    return torch.autograd.grad(loss(net(images), slot), list(net.parameters()), create_graph=create_graph)


def matching_gradient(
    net: nn.Module,
    images_syn: torch.Tensor,
    real_batch: Callable[[int], torch.Tensor],
    transforms: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    loss: SlotLoss,
    metric: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matching loss of all slots, and its gradient with respect to the synthetic images.

    Args:
        images_syn: `[slots, ipc, C, H, W]`.
        real_batch: gives the real images `[n, C, H, W]` of a slot.
        transforms: one per slot, applied to its real and to its synthetic images alike (the Siamese rule).
        loss: the training loss of a slot's batch.
    Returns:
        the sum of the losses over slots (scalar, detached), and the gradient, shaped as `images_syn`.
    """
    total = images_syn.new_zeros(())
    gradient = torch.empty_like(images_syn)
    for slot, transform in enumerate(transforms):
        target = slot_gradient(net, transform(real_batch(slot)), slot, loss)
        images = images_syn[slot].detach().requires_grad_()
        found = slot_gradient(net, transform(images), slot, loss, create_graph=True)
        distance = match_loss(found, target, metric)
        gradient[slot] = torch.autograd.grad(distance, images)[0]
        total += distance.detach()
    return total, gradient


@dataclass(frozen=True)
class MatchSettings:
    """What gradient matching needs to know."""

    model: str
    ipc: int
    seed: int = 1
    lr_img: float = 0.1
    lr_net: float = 0.01
    batch_real: int = 256
    batch_oe: int = 256
    batch_train: int = 256
    lambda_oe: float = 0.5
    metric: str = "ours"
    init: str = "noise"
    outer_loop: int = 1
    inner_loop: int = 1
    dsa: DSA | None = None


class GradientMatching:
    """The synthetic images of one experiment and what updates them in one iteration.

    The stage-1 loop needs no more of a method than `start`, `iterate`, `synthetic` and the two of its state.
    """

    def __init__(self, real: RealData, outliers: OutlierPool | PseudoOutliers | None, settings: MatchSettings):
        self.real, self.outliers, self.settings = real, outliers, settings
        self.device = real.device
        net = get_network(settings.model, real.channel, real.num_classes, real.im_size, generator(settings.seed))
        self.net = net.to(self.device)
        self.has_batchnorm = any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        labels = torch.arange(real.num_classes, device=self.device)
        self.labels = labels.repeat_interleave(settings.ipc)
        self.training = TrainSettings(
            1, settings.lr_net, settings.batch_train, settings.lambda_oe, settings.dsa, momentum=0.0, weight_decay=0.0
        )
        self._check_init()

    def _check_init(self) -> None:
        smallest = min(len(i) for i in self.real.class_indices)
        if self.settings.init == "real" and smallest < self.settings.ipc:
            raise UserError(
                f"--ipc {self.settings.ipc}: the smallest class of {self.real.name} has {smallest} training "
                "images, and "
                "--init real takes that many of each; lower --ipc or use --init noise"
            )

    def start(self, exp: int) -> None:
        """Initialise the synthetic images of experiment `exp`: noise, or real images and real outliers."""
        self.exp = exp
        self.image_syn = self._initial("images", lambda slot, n, g: self.real.train_batch(self._choose(slot, n, g)))
        self.optimizers = [self._optimizer(self.image_syn)]
        self.image_oe = None
        if self.outliers is not None:
            self.image_oe = self._initial("outliers", self.outliers.draw)
            self.optimizers.append(self._optimizer(self.image_oe))

    def _initial(self, what: str, draw: Callable[[int, int, torch.Generator], torch.Tensor]) -> torch.Tensor:
        """`[num_classes, ipc, C, H, W]`."""
        s, shape = self.settings, (self.real.channel, *self.real.im_size)
        slots = []
        for slot in range(self.real.num_classes):
            g = self._generator("initial", what, slot)
            if s.init == "noise":
                slots.append(torch.randn(s.ipc, *shape, generator=g).to(self.device))
                continue
            batch = draw(slot, s.ipc, g)
            slots.append(batch[torch.arange(s.ipc) % len(batch)])  # a small slice of outliers may have fewer
        return torch.stack(slots)

    def _choose(self, slot: int, n: int, g: torch.Generator) -> torch.Tensor:
        """Indices of `n` different training images of a class, or of all if there are fewer."""
        indices = self.real.class_indices[slot]
        return indices[torch.randperm(len(indices), generator=g)[:n]]

    def _optimizer(self, images: torch.Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([images.requires_grad_()], lr=self.settings.lr_img, momentum=MOMENTUM_IMG)

    def _generator(self, *key: int | str) -> torch.Generator:
        return generator(self.settings.seed, "match", self.exp, *key)

    def iterate(self, it: int) -> dict[str, torch.Tensor]:
        """One iteration on a fresh random network; returns the mean matching losses per slot and outer step."""
        s = self.settings
        initialize(self.net, self._generator("network", it))
        optimizer = torch.optim.SGD(self.net.parameters(), lr=s.lr_net)
        losses = []
        for outer in range(s.outer_loop):
            losses.append(self._matching_step(it, outer))
            if outer == s.outer_loop - 1:
                break
            g = self._generator("inner", it, outer)
            synthetic = self.synthetic()
            for _ in range(s.inner_loop):
                train_epoch(self.net, optimizer, synthetic, self.training, g)
        means = torch.stack(losses).mean(0) / self.real.num_classes
        return dict(zip(("loss", "loss_oe"), means.unbind(), strict=False))

    def _matching_step(self, it: int, outer: int) -> torch.Tensor:
        """Update the images, then the outliers; returns their summed losses, `[1]` or `[2]`."""
        s = self.settings
        self.net.train()
        if self.has_batchnorm:
            self._set_batchnorm(it, outer)

        def images_of(slot: int) -> torch.Tensor:
            return self.real.train_batch(self._choose(slot, s.batch_real, self._generator("real", it, outer, slot)))

        def outliers_of(slot: int) -> torch.Tensor:
            return self.outliers.draw(slot, s.batch_oe, self._generator("real oe", it, outer, slot))

        losses = [self._update(self.image_syn, self.optimizers[0], images_of, class_loss, ("siamese", it, outer))]
        if self.outliers is not None:
            key = ("siamese oe", it, outer)
            losses.append(self._update(self.image_oe, self.optimizers[1], outliers_of, outlier_loss, key))
        return torch.stack(losses)

    def _update(self, images, optimizer, real_batch, loss, key) -> torch.Tensor:
        s = self.settings
        transforms = [identity] * self.real.num_classes
        if s.dsa is not None:
            slots = range(self.real.num_classes)
            transforms = [s.dsa.draw(1, self.real.im_size, self._generator(*key, slot)) for slot in slots]
        total, images.grad = matching_gradient(self.net, images.detach(), real_batch, transforms, loss, s.metric)
        optimizer.step()
        return total

    def _set_batchnorm(self, it: int, outer: int) -> None:
        """One training-mode pass over 16 real images of each class, then freeze every BatchNorm."""
        slots = range(self.real.num_classes)
        chosen = [self._choose(c, BATCHNORM_IMAGES, self._generator("batchnorm", it, outer, c)) for c in slots]
        with torch.no_grad():
            self.net(self.real.train_batch(torch.cat(chosen)))
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def synthetic(self) -> SyntheticSet:
        """The current synthetic set (views of the images that later iterations update)."""
        oe = None if self.image_oe is None else self.image_oe.detach().flatten(0, 1)
        return SyntheticSet(self.image_syn.detach().flatten(0, 1), self.labels, oe)
