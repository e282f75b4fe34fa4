"""Matching losses of all class slots and their gradient with respect to the synthetic images or outliers.

The real gradients are computed slot by slot: batching them would turn the weight gradients into grouped convolutions,
which are slower. The synthetic side, which is differentiated twice, uses `torch.func` for many slots together where
that is faster. With `torch.func` alone it can also be compiled; a second backward pass by autograd could not be. The
tests compare all strategies with the plain loop of `scripts/textbook.py`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, grad_and_value, vmap

from utils.compute import distributed
from utils.compute.compiling import Compiled
from utils.compute.cpu_batches import BatchSplitter
from utils.compute.device import Compute
from utils.compute.transfer import send
from utils.core.errors import UserError, one_line
from utils.data.augment import apply_by_slot
from utils.methods.distances import match_loss
from utils.training.losses import joint_loss

BATCHED_PIXELS_CPU = 5 * 32 * 32  # most pixels of one slot's synthetic images for which batching slots is faster
CHUNK_IMAGES = 128  # synthetic images differentiated twice together, to bound the memory
OUTLIERS = -1  # in place of the number of a class


SlotLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Augmentation = Callable[[torch.Tensor], torch.Tensor]
Params = dict[str, torch.Tensor]


def slot_loss(logits: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a batch `[n, num_classes]` whose images are all of one class, or all outliers.

    One function serves both, so that it is compiled once.

    Args:
        slot: int64 scalar, the class; or `OUTLIERS`, for the cross-entropy to the uniform distribution.
    """
    log = F.log_softmax(logits, dim=1)  # float32 under autocast
    classes = torch.arange(logits.shape[1], device=logits.device)
    target = torch.where(slot == OUTLIERS, 1 / logits.shape[1], (classes == slot).to(log.dtype))
    return -(log * target).sum(dim=1).mean()


class Strategy(Enum):
    """How the synthetic side is computed."""

    COMPILED = "compiled"
    BATCHED = "batched"
    BY_SLOT = "slot by slot"


class Matcher:
    """Matching losses of a network, and their gradients with respect to synthetic images.

    Args:
        net: the network; its weights may change between calls.
        metric: one of `METRICS`.
        batched: whether the synthetic side takes many slots together; None: where `batching_is_faster`.
        loss: the training loss of a slot's synthetic batch.

    `strategies`: those not ruled out yet, fastest first. When one fails, e.g. because the network cannot be compiled or
    batched, the next one is used from then on.
    """

    def __init__(
        self,
        net: nn.Module,
        metric: str,
        compute: Compute,
        batched: bool | None = None,
        loss: SlotLoss = slot_loss,
    ):
        self.net, self.loss, self.metric = net, loss, metric
        self.splitter = BatchSplitter(net, compute.precision)
        self.real_loss = compute.function(lambda images, slot: slot_loss(net(images), slot))
        self.compiled_side = replace(compute, precision="fp32").function(self._losses_and_gradient)
        # PyTorch's second derivative of a layer norm under vmap is wrong (seen in 2.14); a test compares them
        self.batched = False if any(isinstance(m, nn.LayerNorm) for m in net.modules()) else batched
        self.strategies = [Strategy.BY_SLOT]
        if self.batched is not False:
            self.strategies.insert(0, Strategy.BATCHED)
            if compute.compiled:
                self.strategies.insert(0, Strategy.COMPILED)

    def __call__(
        self,
        images_syn: torch.Tensor,
        real_batch: Callable[[int], torch.Tensor],
        transforms: Sequence[Augmentation] | Mapping[int, Augmentation],
        outliers: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Match all slots with the gradients of real images, or of real outliers.

        Args:
            images_syn: `[slots, ipc, C, H, W]`.
            real_batch: returns the real images `[n, C, H, W]` of a slot.
            transforms: by slot, applied to both its real and its synthetic images (the Siamese rule).
            outliers: whether all of these are outliers.
        Returns:
            As `match`.
        """

        def target(slot: int, label: torch.Tensor) -> list[torch.Tensor]:
            """The gradient of the slot's real batch."""
            return self.real_gradient(transforms[slot](real_batch(slot)), label)

        return self.match(images_syn, target, transforms, outliers)

    def match(
        self,
        images_syn: torch.Tensor,
        target: Callable[[int, torch.Tensor], list[torch.Tensor]],
        transforms: Sequence[Augmentation] | Mapping[int, Augmentation],
        outliers: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Match all slots; under `torchrun` each process takes some of them.

        Args:
            images_syn: `[slots, ipc, C, H, W]`.
            target: returns the gradient that a slot is to have, in parameter order, from its number, and from its class
                or `OUTLIERS`, an int64 scalar on the device.
            transforms: by slot, applied to its synthetic images.
            outliers: whether the synthetic images are outliers.
        Returns:
            The losses `[slots]`, and the gradient of their sum with respect to `images_syn`; the same on all processes.
        """
        losses = images_syn.new_zeros(len(images_syn))
        gradient = torch.zeros_like(images_syn)
        size = max(1, CHUNK_IMAGES // images_syn.shape[1])
        for chunk in chunks(
            list(distributed.own_share(len(images_syn))), size, pad=self.strategies[0] is Strategy.COMPILED
        ):
            index = send(torch.tensor(chunk), images_syn.device)
            labels = torch.full_like(index, OUTLIERS) if outliers else index
            real = {s: target(s, label) for s, label in dict(zip(chunk, labels, strict=True)).items()}
            targets = [torch.stack(parameter) for parameter in zip(*(real[s] for s in chunk), strict=True)]
            part = self._match(images_syn[index], [transforms[s] for s in chunk], labels, targets)
            own = index[: len(real)]  # without the repeated slots that pad a chunk
            losses[own], gradient[own] = (values[: len(real)] for values in part)
        distributed.sum_(losses, gradient)
        return losses, gradient

    def real_gradient(self, images: torch.Tensor, slot: torch.Tensor) -> list[torch.Tensor]:
        """Gradient of `slot_loss` on real images with respect to all parameters, in parameter order.

        On a CPU it may be the mean over equal parts of the batch (BatchNorm is frozen, so images are independent).
        """
        count = self.splitter.count(images)
        first, *rest = images.chunk(count)
        total = self._part_gradient(first, slot)
        for part in rest:
            for sum_, g in zip(total, self._part_gradient(part, slot), strict=True):
                sum_ += g
        return [g / count for g in total] if count > 1 else total

    def _part_gradient(self, images: torch.Tensor, slot: torch.Tensor) -> list[torch.Tensor]:
        grads = torch.autograd.grad(self.real_loss(images, slot), list(self.net.parameters()))
        return [g.float() if g.dtype == torch.bfloat16 else g.clone() for g in grads]  # a CUDA graph overwrites it

    def _match(
        self,
        images: torch.Tensor,
        transforms: Sequence[Augmentation],
        labels: torch.Tensor,
        targets: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and image gradient of one chunk of slots; `targets`: by parameter, `[slots, …]`."""
        images = images.detach().requires_grad_()
        while len(self.strategies) > 1:
            strategy = self.strategies[0]
            if not self._worthwhile(strategy, images):
                self.strategies.pop(0)
                continue
            try:
                return self._match_by(strategy, images, transforms, labels, targets)
            except (RuntimeError, NotImplementedError, UserError) as error:
                self.strategies.pop(0)
                reason = one_line(error)
                warnings.warn(f"matching continues, but more slowly: not {strategy.value}: {reason}", stacklevel=2)
        return self._match_by(self.strategies[0], images, transforms, labels, targets)

    def _worthwhile(self, strategy: Strategy, images: torch.Tensor) -> bool:
        """Whether a strategy is faster than the next one; the compiled one is, unless the compiler has failed."""
        if strategy is Strategy.COMPILED:
            return not (Compiled.failed and isinstance(self.compiled_side, Compiled))
        return self.batched is not None or batching_is_faster(images)

    def _match_by(
        self,
        strategy: Strategy,
        images: torch.Tensor,
        transforms: Sequence[Augmentation],
        labels: torch.Tensor,
        targets: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if strategy is Strategy.BY_SLOT:
            slots = zip(transforms, images, labels, *targets, strict=True)
            losses = torch.stack([self._slot_loss(t(x), slot, target) for t, x, slot, *target in slots])
            return losses.detach(), torch.autograd.grad(losses.sum(), images)[0]
        augmented = apply_by_slot(images, transforms)
        if strategy is Strategy.COMPILED:
            direction, losses = self.compiled_side(augmented.detach(), labels, self._params(), targets)
            return losses, torch.autograd.grad(augmented, images, direction)[0]
        losses = self._losses(augmented, labels, self._params(), targets)
        return losses.detach(), torch.autograd.grad(losses.sum(), images)[0]

    def _slot_loss(self, images: torch.Tensor, slot: torch.Tensor, target: Sequence[torch.Tensor]) -> torch.Tensor:
        loss = self.loss(self.net(images), slot)
        found = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
        return match_loss(found, target, self.metric)

    def _params(self) -> Params:
        return {name: p.detach() for name, p in self.net.named_parameters()}

    def _pure_slot_loss(
        self, params: Params, images: torch.Tensor, slot: torch.Tensor, target: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """`_slot_loss` for `torch.func`."""
        found = grad(lambda p: self.loss(functional_call(self.net, p, (images,)), slot))(params)
        return match_loss(list(found.values()), target, self.metric)

    def _losses(
        self, images: torch.Tensor, labels: torch.Tensor, params: Params, targets: list[torch.Tensor]
    ) -> torch.Tensor:
        """Losses of augmented images `[slots, ipc, C, H, W]`."""
        return vmap(lambda x, slot, *target: self._pure_slot_loss(params, x, slot, target))(images, labels, *targets)

    def _losses_and_gradient(
        self, images: torch.Tensor, labels: torch.Tensor, params: Params, targets: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of the losses with respect to augmented images, and the losses. Only when compiled is this as fast
        as `_losses` and a backward pass."""

        def one(images: torch.Tensor, slot: torch.Tensor, *target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return grad_and_value(lambda x: self._pure_slot_loss(params, x, slot, target))(images)

        return vmap(one)(images, labels, *targets)


@dataclass(frozen=True)
class Halves:
    """One augmentation for the first half of a batch, another for the second."""

    first: Augmentation
    second: Augmentation

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Augmented images `[N, C, H, W]`; N is even."""
        first, second = images.chunk(2)
        return torch.cat([self.first(first), self.second(second)])


class JointMatcher:
    """Matches, for each slot, the gradient of the training loss on images and outliers together.

    The target is the gradient of real images of the class plus `lambda_oe` times that of real outliers of the slot; the
    synthetic images and outliers of the slot are differentiated together. Where `Matcher` on each of them compares two
    directions, this compares the direction that a network would take.
    """

    def __init__(self, net: nn.Module, lambda_oe: float, metric: str, compute: Compute):
        def loss(logits: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
            return joint_loss(logits, slot.expand(len(logits) // 2), lambda_oe)

        self.lambda_oe = lambda_oe
        self.matcher = Matcher(net, metric, compute, loss=loss)

    def __call__(
        self,
        images: torch.Tensor,
        outliers: torch.Tensor,
        real_batches: tuple[Callable[[int], torch.Tensor], Callable[[int], torch.Tensor]],
        transforms: tuple[Mapping[int, Augmentation], Mapping[int, Augmentation]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Match all slots; under `torchrun` each process takes some of them.

        Args:
            images, outliers: the synthetic ones, `[slots, ipc, C, H, W]`.
            real_batches: return the real images, and the real outliers, `[n, C, H, W]` of a slot.
            transforms: by slot, those of the images and those of the outliers, real and synthetic (the Siamese rule).
        Returns:
            The losses `[slots]`, and the gradients of their sum with respect to `images` and to `outliers`.
        """

        def target(slot: int, label: torch.Tensor) -> list[torch.Tensor]:
            """The gradient of the slot's real images plus the weighted one of its real outliers."""
            labels = (label, torch.full_like(label, OUTLIERS))
            parts = (
                self.matcher.real_gradient(transform[slot](batch(slot)), kind)
                for kind, batch, transform in zip(labels, real_batches, transforms, strict=True)
            )
            return [g.add_(g_oe, alpha=self.lambda_oe) for g, g_oe in zip(*parts, strict=True)]

        together = {slot: Halves(transforms[0][slot], transforms[1][slot]) for slot in transforms[0]}
        losses, gradient = self.matcher.match(torch.cat([images, outliers], 1), target, together)
        return losses, *(half.contiguous() for half in gradient.chunk(2, dim=1))


def chunks(slots: list[int], size: int, pad: bool) -> list[list[int]]:
    """`slots` in as few parts as possible of at most `size`, of equal length as far as possible.

    With `pad`, a shorter last part is padded by repeating its first slot, because compiled code is made for one length.
    The repeated slot is computed again, with the same result.
    """
    if not slots:
        return []
    length = -(-len(slots) // -(-len(slots) // size))
    parts = [slots[i : i + length] for i in range(0, len(slots), length)]
    return [part + part[:1] * (length - len(part)) for part in parts] if pad else parts


def batching_is_faster(images: torch.Tensor) -> bool:
    """Whether the synthetic side of `images` `[slots, ipc, C, H, W]` is faster with all slots together.

    On CUDA always: kernel launches take most of the time. On a CPU only for few or small images: with more, grouped
    convolutions are slower than those of one slot (by a tenth for ConvNet at ipc 10).
    """
    if images.device.type == "cuda":
        return True
    return images.shape[1] * images.shape[3] * images.shape[4] <= BATCHED_PIXELS_CPU
