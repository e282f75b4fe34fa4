"""Matching of gradients (DC: Zhao et al., ICLR 2021; DSA: Zhao & Bilen, ICML 2021), for images and for outliers.

The real gradients are taken slot by slot: batching them would turn the weight gradients into grouped convolutions,
which are slower. The synthetic side, which is differentiated twice, goes through `torch.func` for many slots at once
where that is faster. `utils/plain.py` has the textbook loop that both are tested against.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from . import distributed
from .augment import apply_by_slot
from .devices import Compute
from .losses import uniform_cross_entropy
from .rng import send

EPSILON = 1e-6
METRICS = ("ours", "mse", "cos")
BATCHED_PIXELS_CPU = 5 * 32 * 32  # of one slot's synthetic images
CHUNK_IMAGES = 128  # synthetic images that are differentiated twice at once: bounds the memory


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


SlotLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def class_loss(logits: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a batch `[n, num_classes]` whose images are all of class `slot` (int64 scalar)."""
    return F.cross_entropy(logits, slot.expand(len(logits)))


def outlier_loss(logits: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Cross-entropy to uniform; all slots have the same."""
    return uniform_cross_entropy(logits)


class Matcher:
    """Matching losses of a network, and their gradients with respect to synthetic images.

    Args:
        net: the network; its weights may change between calls.
        loss: the training loss of a slot's batch.
        metric: one of `METRICS`.
        batched: whether the synthetic side takes many slots at once; None chooses. A network that cannot be batched is
            found out at the first call, and goes slot by slot from then on.
    """

    def __init__(self, net: nn.Module, loss: SlotLoss, metric: str, compute: Compute, batched: bool | None = None):
        self.net, self.loss, self.metric = net, loss, metric
        # the second derivative of a layer norm under vmap is wrong in PyTorch (seen in 2.14): a test compares them
        self.batched = False if any(isinstance(m, nn.LayerNorm) for m in net.modules()) else batched
        self.real_loss = compute.function(lambda images, slot: loss(net(images), slot))

    def __call__(
        self,
        images_syn: torch.Tensor,
        real_batch: Callable[[int], torch.Tensor],
        transforms: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Match all slots; under `torchrun` each process takes some of them.

        Args:
            images_syn: `[slots, ipc, C, H, W]`.
            real_batch: gives the real images `[n, C, H, W]` of a slot.
            transforms: one per slot, applied to its real and to its synthetic images alike (the Siamese rule).
        Returns:
            the losses `[slots]`, and the gradient of their sum with respect to `images_syn`; the same on all processes.
        """
        losses = images_syn.new_zeros(len(images_syn))
        gradient = torch.zeros_like(images_syn)
        slots = list(distributed.mine(len(images_syn)))
        size = max(1, CHUNK_IMAGES // images_syn.shape[1])
        for chunk in (slots[i : i + size] for i in range(0, len(slots), size)):
            index = send(torch.tensor(chunk), images_syn.device)
            targets = [self.real_gradient(transforms[s](real_batch(s)), index[i]) for i, s in enumerate(chunk)]
            part = self._match(images_syn[index], targets, [transforms[s] for s in chunk], index)
            losses[index], gradient[index] = part
        distributed.sum_(losses, gradient)
        return losses, gradient

    def real_gradient(self, images: torch.Tensor, slot: torch.Tensor) -> list[torch.Tensor]:
        """Gradient of the loss on real images with respect to all parameters, in parameter order."""
        grads = torch.autograd.grad(self.real_loss(images, slot), list(self.net.parameters()))
        return [g.float() if g.dtype == torch.bfloat16 else g.clone() for g in grads]

    def _match(
        self,
        images: torch.Tensor,
        targets: list[list[torch.Tensor]],
        transforms: Sequence[Callable],
        index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and image gradient of one chunk of slots."""
        images = images.detach().requires_grad_()
        if self.batched is None:
            self.batched = batching_pays(self.net, images)
        if self.batched:
            try:
                losses = self._batched_losses(apply_by_slot(images, transforms), targets, index)
            except (RuntimeError, NotImplementedError):  # an operation without a batching rule
                self.batched = False
        if not self.batched:
            parts = [
                self._slot_loss(t(x), *rest) for t, x, *rest in zip(transforms, images, targets, index, strict=True)
            ]
            losses = torch.stack(parts)
        return losses.detach(), torch.autograd.grad(losses.sum(), images)[0]

    def _slot_loss(self, images: torch.Tensor, target: list[torch.Tensor], slot: torch.Tensor) -> torch.Tensor:
        loss = self.loss(self.net(images), slot)
        found = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
        return match_loss(found, target, self.metric)

    def _batched_losses(
        self, images: torch.Tensor, targets: list[list[torch.Tensor]], index: torch.Tensor
    ) -> torch.Tensor:
        params = {name: p.detach() for name, p in self.net.named_parameters()}

        def one(images: torch.Tensor, slot: torch.Tensor, *target: torch.Tensor) -> torch.Tensor:
            found = grad(lambda p: self.loss(functional_call(self.net, p, (images,)), slot))(params)
            return match_loss(list(found.values()), target, self.metric)

        return vmap(one)(images, index, *map(torch.stack, zip(*targets, strict=True)))


def batching_pays(net: nn.Module, images: torch.Tensor) -> bool:
    """Whether the synthetic side of `images` `[slots, ipc, C, H, W]` is faster with all slots at once.

    On CUDA it is bound by launches, so it is. On a CPU it is where the images are few or small; beyond that the grouped
    convolutions are slower than those of one slot (a tenth for ConvNet at ipc 10).
    """
    if images.device.type == "cuda":
        return True
    return images.shape[1] * images.shape[3] * images.shape[4] <= BATCHED_PIXELS_CPU
