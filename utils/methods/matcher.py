"""Gradients on a network's weights, differentiated once more by the images that they come from.

The real gradients are computed slot by slot: batching them would turn the weight gradients into grouped convolutions,
which are slower. The synthetic side uses `torch.func` for many slots together where that is faster. With `torch.func`
alone it can also be compiled; a second backward pass by autograd could not be. The tests compare all ways with the loop
of `scripts/textbook.py`.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from utils.compute import distributed
from utils.compute.cpu_batches import BatchSplitter
from utils.compute.device import Compiled, Compute
from utils.compute.transfer import send
from utils.core.errors import UserError, one_line
from utils.data.augment import apply_by_slot
from utils.methods.distances import match_loss
from utils.training.losses import in_float32

BATCHED_PIXELS_CPU = 5 * 32 * 32  # most pixels of one slot's synthetic images for which batching slots is faster
CHUNK_IMAGES = 128  # synthetic images differentiated twice together, to bound the memory
NO_CLASS = -1  # the label of outliers

Augmentation = Callable[[Tensor], Tensor]
BySlot = Sequence[Augmentation] | Mapping[int, Augmentation]
Params = dict[str, Tensor]
Way = Literal["compiled", "batched", "slot by slot"]  # how the synthetic side is computed, the fastest first


def slot_loss(logits: Tensor, slot: Tensor) -> Tensor:
    """Cross-entropy of a batch `[n, num_classes]` whose images are all of one class, or all outliers.

    `slot`: int64 scalar, the class; or `NO_CLASS`, for the cross-entropy to the uniform distribution. One function
    serves both, so that it is compiled once.
    """
    log = F.log_softmax(in_float32(logits), dim=1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    target = torch.where(slot == NO_CLASS, 1 / logits.shape[1], (classes == slot).to(log.dtype))
    return -(log * target).sum(dim=1).mean()


class Matcher:
    """Matching losses of a network, and their gradients with respect to synthetic images.

    The weights of `net` may change between calls. `batched`: whether the synthetic side takes many slots together;
    None: where that is faster.
    """

    def __init__(self, net: nn.Module, metric: str, compute: Compute, batched: bool | None = None):
        self.net, self.metric = net, metric
        self.splitter = BatchSplitter(net, compute.precision)
        self.real_loss = compute.function(lambda images, slot: slot_loss(net(images), slot))
        self.compiled_side = replace(compute, precision="fp32").function(self._losses_and_gradient)
        # PyTorch's second derivative of a layer norm under vmap is wrong (seen in 2.14); a test compares them
        self.batched = False if any(isinstance(m, nn.LayerNorm) for m in net.modules()) else batched
        self.compiles = compute.compiled and self.batched is not False

    def __call__(
        self, images_syn: Tensor, batches: Iterable[Tensor], transforms: BySlot, outliers: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Match all slots with the gradients of real images, or of real outliers; each process takes some of the slots.

        Args:
            images_syn: `[slots, ipc, C, H, W]`.
            batches: the real images `[n, C, H, W]` of each slot of this process, in order, read one by one.
            transforms: applied to both the real and the synthetic images of a slot (the Siamese rule).
        Returns:
            The losses `[slots]`, and the gradient of their sum with respect to `images_syn`; the same on all processes.
        """
        losses = images_syn.new_zeros(len(images_syn))
        gradient = torch.zeros_like(images_syn)
        slots, size = list(distributed.own_share(len(images_syn))), max(1, CHUNK_IMAGES // images_syn.shape[1])
        batches = iter(batches)
        for chunk in chunks(slots, size, pad=self.way(images_syn) == "compiled"):
            own = list(dict.fromkeys(chunk))  # without the repeated slots that pad a chunk
            index = send(torch.tensor(chunk), images_syn.device)
            labels = torch.full_like(index, NO_CLASS) if outliers else index
            real = [self.real_gradient(transforms[s](next(batches)), labels[i]) for i, s in enumerate(own)]
            real += real[:1] * (len(chunk) - len(own))
            targets = [torch.stack(parameter) for parameter in zip(*real, strict=True)]
            part = self._match(images_syn[index], [transforms[s] for s in chunk], labels, targets)
            losses[index[: len(own)]], gradient[index[: len(own)]] = (values[: len(own)] for values in part)
        distributed.sum_(losses, gradient)
        return losses, gradient

    def way(self, images: Tensor) -> Way:
        """The fastest way for synthetic images `[slots, ipc, C, H, W]` that has not failed.

        On CUDA many slots together are always faster than one: kernel launches take most of the time. On a CPU only if
        they are few or small: else grouped convolutions are slower (by a tenth for ConvNet at ipc 10).
        """
        if self.compiles and not (Compiled.failed and isinstance(self.compiled_side, Compiled)):
            return "compiled"
        pixels = images.shape[1] * images.shape[3] * images.shape[4]
        faster = images.device.type == "cuda" or pixels <= BATCHED_PIXELS_CPU
        return "batched" if (faster if self.batched is None else self.batched) else "slot by slot"

    def real_gradient(self, images: Tensor, slot: Tensor) -> list[Tensor]:
        """Gradient of `slot_loss` on real images with respect to all parameters, in parameter order.

        On a CPU it may be the mean over equal parts of the batch (BatchNorm is frozen, so images are independent).
        """
        count, total = self.splitter.count(images), []
        for part in images.chunk(count):
            grads = torch.autograd.grad(self.real_loss(part, slot), list(self.net.parameters()))
            grads = [g.float() if g.dtype == torch.bfloat16 else g.clone() for g in grads]  # a CUDA graph overwrites it
            total = [sum_.add_(g) for sum_, g in zip(total, grads, strict=True)] if total else grads
        return [g / count for g in total] if count > 1 else total

    def _match(
        self, images: Tensor, transforms: Sequence[Augmentation], labels: Tensor, targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses and image gradient of one chunk of slots; `targets`: by parameter, `[slots, …]`.

        A way that fails, perhaps for lack of memory, gives way to the next for good.
        """
        images, way = images.detach().requires_grad_(), self.way(images)
        try:
            if way == "compiled":
                augmented = apply_by_slot(images, transforms)
                direction, losses = self.compiled_side(augmented.detach(), labels, self._params(), targets)
                return losses, torch.autograd.grad(augmented, images, direction)[0]
            if way == "batched":
                losses = self._losses(apply_by_slot(images, transforms), labels, self._params(), targets)
            else:
                slots = zip(transforms, images, labels, *targets, strict=True)
                losses = torch.stack([self._slot_loss(t(x), slot, target) for t, x, slot, *target in slots])
            return losses.detach(), torch.autograd.grad(losses.sum(), images)[0]
        except (RuntimeError, NotImplementedError, UserError) as error:
            if way == "slot by slot":
                raise
            warnings.warn(f"matching continues, but more slowly: not {way}: {one_line(error)}", stacklevel=2)
        if way == "compiled":
            self.compiles = False
        else:
            self.batched = False
        return self._match(images, transforms, labels, targets)

    def _slot_loss(self, images: Tensor, slot: Tensor, target: Sequence[Tensor]) -> Tensor:
        loss = slot_loss(self.net(images), slot)
        found = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
        return match_loss(found, target, self.metric)

    def _params(self) -> Params:
        return {name: p.detach() for name, p in self.net.named_parameters()}

    def _pure_slot_loss(self, params: Params, images: Tensor, slot: Tensor, target: Sequence[Tensor]) -> Tensor:
        """`_slot_loss` for `torch.func`."""
        found = grad(lambda p: slot_loss(functional_call(self.net, p, (images,)), slot))(params)
        return match_loss(list(found.values()), target, self.metric)

    def _losses(self, images: Tensor, labels: Tensor, params: Params, targets: list[Tensor]) -> Tensor:
        """Losses of augmented images `[slots, ipc, C, H, W]`."""
        return vmap(lambda x, slot, *target: self._pure_slot_loss(params, x, slot, target))(images, labels, *targets)

    def _losses_and_gradient(
        self, images: Tensor, labels: Tensor, params: Params, targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the losses with respect to augmented images, and the losses. Only when compiled is this as fast
        as `_losses` and a backward pass."""

        def one(images: Tensor, slot: Tensor, *target: Tensor) -> tuple[Tensor, Tensor]:
            return grad_and_value(lambda x: self._pure_slot_loss(params, x, slot, target))(images)

        return vmap(one)(images, labels, *targets)


def chunks(slots: list[int], size: int, pad: bool) -> list[list[int]]:
    """`slots` in as few parts as possible of at most `size`, of equal length as far as possible.

    With `pad`, a shorter last part repeats its first slot: compiled code is made for one length.
    """
    if not slots:
        return []
    length = -(-len(slots) // -(-len(slots) // size))
    parts = [slots[i : i + length] for i in range(0, len(slots), length)]
    return [part + part[:1] * (length - len(part)) for part in parts] if pad else parts
