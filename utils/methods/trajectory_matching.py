"""Trajectory matching: MTT (Cazenavette et al., CVPR 2022), with and without outliers.

One iteration takes the parameters of an expert at a random epoch, trains a student from there for a few steps on the
synthetic set, and moves the images, the outliers and the student's learning rate so that the student ends nearer to
the parameters that the expert has some epochs later. With outliers, expert and student have the same joint loss.

The published code keeps the graph of all steps in memory. The exact gradient needs the graph of only one step: the
forward pass keeps the student's parameters, and the backward pass recomputes each step from them, the last one first.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from networks import has_batchnorm
from utils.compute import distributed
from utils.compute.cpu_batches import BatchSplitter
from utils.compute.device import Compute, Workload
from utils.compute.transfer import Draw, send_draws
from utils.core.rng import generator
from utils.data.augment import identity
from utils.data.synthetic import SyntheticSet, decode_slots, on_stored
from utils.methods.learnable import LearnableSet
from utils.methods.method import MethodEntry, MethodInputs, with_experts
from utils.settings.distillation import OnExperts
from utils.settings.fields import flag
from utils.settings.parser import count, number
from utils.training.draws import Batch
from utils.training.experts import ExpertBuffer, without_running_statistics
from utils.training.losses import joint_loss, joint_parts
from utils.training.trainer import load_optimizer

LR_TEACHER = 0.01
SMALLEST_LR = 1e-6  # lower bound of the student's learning rate

Params = dict[str, Tensor]
Matched = tuple[Tensor, list[Tensor]]  # the loss, and gradients


@dataclass(frozen=True)
class TrajectorySettings(OnExperts):
    """Trajectory matching."""

    TOO_SHORT: ClassVar = (
        "--max_start_epoch {s.max_start_epoch}: with --expert_epochs {s.expert_epochs} it needs experts of "
        "{s.last_epoch} epochs; those in {experts.folder} have {experts.epochs}. Lower one of them, or train experts "
        "for longer"
    )

    expert_epochs: int = flag(2, "epochs of the expert that the student's steps are to match", count(1))
    syn_steps: int = flag(
        30, "steps of the student; more are slower, and each keeps a copy of the parameters", count(1)
    )
    max_start_epoch: int = flag(15, "the student starts at an epoch below this; more for a larger ipc", count(1))
    lr_lr: float = flag(1e-5, "learning rate of the student's learning rate; 0 keeps it fixed", number(0))
    lr_teacher: float | None = flag(
        None,
        "the student's initial learning rate; left out: that of the set of --load_path if it has one, else "
        f"{LR_TEACHER}",
        number(0, exclusive=True),
    )
    batch_syn: int | None = flag(
        None, "synthetic images per step; left out: all. Lower it if memory runs out", count(1)
    )

    @property
    def last_epoch(self) -> int:
        """The last epoch of the experts that is needed."""
        return self.max_start_epoch - 1 + self.expert_epochs


class StudentStep:
    """Gradients of one step of a student, as functions of its parameters and images.

    They are of the joint loss of augmented images followed by outliers `[n, C, H, W]`, of which `weight` is the weight;
    `labels` are those of the images. On a CPU they may be means over equal parts of the batch. A network with BatchNorm
    takes the batch whole: its statistics are those of the batch.
    """

    def __init__(self, net: nn.Module, compute: Compute):
        self.net = net
        whole, fp32 = has_batchnorm(net), replace(compute, precision="fp32")
        self.splitter = None if whole else BatchSplitter(net, compute.precision)
        self.backward_splitter = None if whole else BatchSplitter(net)
        self.part_gradient = compute.function(self._gradient)
        self.part_backward = fp32.function(self._backward)

    def gradient(self, images: Tensor, labels: Tensor, weight: float, params: Params) -> Params:
        """The gradient with respect to `params`."""
        parts = joint_parts(images, labels, self.splitter)
        return _mean([self.part_gradient(*part, weight, params) for part in parts])

    def backward(
        self, images: Tensor, labels: Tensor, weight: float, params: Params, v: Params
    ) -> tuple[Tensor, Tensor, Params]:
        """The value of `h = <gradient, v>`, and its gradients with respect to `images` and `params`."""
        parts = joint_parts(images, labels, self.backward_splitter)
        found = [self.part_backward(*part, weight, params, v) for part in parts]
        products, on_images, on_params = zip(*found, strict=True)
        if len(parts) == 1:
            return products[0], on_images[0], on_params[0]
        n = len(labels) // len(parts)  # a part's gradient: of its images, then of its outliers
        on_all = torch.cat([g[:n] for g in on_images] + [g[n:] for g in on_images]) / len(parts)
        return torch.stack(products).mean(), on_all, _mean(on_params)

    def _gradient(self, images: Tensor, labels: Tensor, weight: float, params: Params) -> Params:
        return grad(lambda p: joint_loss(functional_call(self.net, p, (images,)), labels, weight))(params)

    def _backward(
        self, images: Tensor, labels: Tensor, weight: float, params: Params, v: Params
    ) -> tuple[Tensor, Tensor, Params]:
        def product(x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
            """`h`, to be differentiated, and its value."""
            found = self._gradient(x, labels, weight, p)
            h = sum((found[name] * v[name]).sum() for name in v)
            return h, h.detach()

        (on_images, on_params), h = grad(product, argnums=(0, 1), has_aux=True)(images, params)
        return h, on_images, on_params


def _mean(found: Sequence[Params]) -> Params:
    if len(found) == 1:
        return found[0]
    return {name: torch.stack([params[name] for params in found]).mean(0) for name in found[0]}


class TrajectoryMatching(LearnableSet):
    """The synthetic images of one experiment, the student's learning rate, and the iterations that update them."""

    settings: TrajectorySettings

    def __init__(self, inputs: MethodInputs, experts: ExpertBuffer):
        super().__init__(inputs)
        s = self.settings
        self.experts = experts
        net = self.real.network(s.model, generator(s.seed))
        self.net = without_running_statistics(net).to(self.device).requires_grad_(False)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.step = StudentStep(self.net, inputs.compute)

    def _set_images(self, exp: int, images: Tensor, outliers: Tensor | None) -> None:
        super()._set_images(exp, images, outliers)
        start = self.initial[exp % len(self.initial)].lr_net if self.initial else None
        self.lr_student = torch.tensor(
            self.settings.lr_teacher or start or LR_TEACHER, device=self.device, requires_grad=True
        )
        self.optimizer_lr = torch.optim.SGD([self.lr_student], lr=self.settings.lr_lr, momentum=self.MOMENTUM)

    def iterate(self, it: int) -> dict[str, Tensor]:
        """One iteration; returns the matching loss and the student's learning rate, `[1]` each.

        Rank 0 computes it; the other processes receive its gradients.
        """
        s, loss, tensors = self.settings, torch.zeros(1, device=self.device), [*self._tensors(), self.lr_student]
        gradients = [torch.zeros_like(t) for t in tensors]
        if distributed.is_main():
            g = self.generator("segment", it)
            start, target = self.experts.segment(g, s.max_start_epoch, s.expert_epochs, self.device)
            loss, gradients = self._match(start, target, self._draw(it))
        distributed.broadcast_(loss, *gradients)
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        self.update(0)
        if self.image_oe is not None:
            self.update(1)
        self.optimizer_lr.step()
        if self.lr_student < SMALLEST_LR:
            warnings.warn(
                f"iteration {it}: --lr_lr {s.lr_lr:g} made the student's learning rate "
                f"{self.lr_student.item():.3g}; it is set to {SMALLEST_LR:g}. Lower --lr_lr",
                stacklevel=2,
            )
            self.lr_student.data.fill_(SMALLEST_LR)
        return {"loss": loss, "lr_net": self.lr_student.detach().clone()[None]}

    def _draw(self, it: int) -> list[Batch]:
        """The batches of images and outliers of every step of the student."""
        batches = self._batches("student", it)
        none = [(None, None)] * len(batches)
        outliers = none if self.image_oe is None else self._batches("student oe", it)
        return send_draws([Batch(*both, *oe) for both, oe in zip(batches, outliers, strict=True)], self.device)

    def _batches(self, what: str, it: int) -> list[tuple[Tensor, Draw | None]]:
        """Which images each step takes and how it augments them, from a random order that is drawn again when it is
        used up."""
        s, dsa, batches, order = self.settings, self.augmentation, [], torch.empty(0, dtype=torch.int64)
        g = self.generator(what, it)
        total = self.real.num_classes * s.decoded_ipc
        for _ in range(s.syn_steps):
            if not len(order):
                order = torch.randperm(total, generator=g)
            index, order = order.tensor_split([min(s.batch_syn or total, total)])
            batches.append((index, dsa and dsa.draw(len(index), self.real.im_size, g)))
        return batches

    def _match(self, start: Sequence[Tensor], target: Sequence[Tensor], batches: Sequence[Batch]) -> Matched:
        """The loss `[1]` and its gradients with respect to images, outliers (if there are any) and learning rate.

        With `v = ∂L/∂θ_N` and then, from the last step to the first, with `h = <∇_θ CE(θ_i; x_i), v>`:
        `∂L/∂α -= h`, `∂L/∂x_i -= α ∂h/∂x_i`, `v -= α ∂h/∂θ_i`.
        """
        lr, weight, factor = self.lr_student.detach(), self.settings.lambda_oe, self.settings.factor
        decoded = [decode_slots(t.detach(), factor) for t in self._tensors()]
        theta, goal = (dict(zip(self.names, params, strict=True)) for params in (start, target))
        scale = sum((theta[n] - goal[n]).square().sum() for n in self.names)
        thetas = []
        for batch in batches:
            images, labels, _ = self._inputs(decoded, batch)
            thetas.append(theta)
            found = self.step.gradient(images.detach(), labels, weight, theta)
            theta = {n: theta[n] - lr * found[n] for n in self.names}
        loss = sum((theta[n] - goal[n]).square().sum() for n in self.names) / scale
        v = {n: 2 * (theta[n] - goal[n]) / scale for n in self.names}
        gradients = [torch.zeros_like(t).flatten(0, 1) for t in decoded]
        on_lr = torch.zeros_like(lr)
        for batch, at in zip(reversed(batches), reversed(thetas), strict=True):
            images, labels, leaves = self._inputs(decoded, batch)
            h, on_images, on_params = self.step.backward(images.detach(), labels, weight, at, v)
            on_lr -= h
            on_leaves = torch.autograd.grad(images, leaves, on_images)
            for gradient, index, on_leaf in zip(gradients, (batch.index, batch.index_oe), on_leaves, strict=False):
                gradient.index_add_(0, index, -lr * on_leaf)
            v = {n: v[n] - lr * on_params[n] for n in self.names}
        of_tensors = zip(self._tensors(), decoded, gradients, strict=True)
        return loss[None], [*(on_stored(t, factor, g.view(d.shape)) for t, d, g in of_tensors), on_lr]

    def _inputs(self, decoded: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Augmented images followed by outliers, the labels, and the leaves that they were made from.

        `decoded`: the images and the outliers as networks see them, `[slots, n, C, H, W]`.
        """
        drawn = ((batch.index, batch.transform), (batch.index_oe, batch.transform_oe))[: len(decoded)]
        leaves = [t.flatten(0, 1)[index].requires_grad_() for t, (index, _) in zip(decoded, drawn, strict=True)]
        parts = [(transform or identity)(leaf) for leaf, (_, transform) in zip(leaves, drawn, strict=True)]
        return torch.cat(parts), batch.index.div(self.settings.decoded_ipc, rounding_mode="floor"), leaves

    def synthetic(self) -> SyntheticSet:
        """The current synthetic set, with the student's learning rate."""
        return replace(super().synthetic(), lr_net=self.lr_student.item())

    def state_dict(self) -> dict:
        """Like `LearnableSet.state_dict`, with the learning rate and its optimiser."""
        lr = {"value": self.lr_student.detach().clone(), "optimizer": deepcopy(self.optimizer_lr.state_dict())}
        return super().state_dict() | {"lr": lr}

    def load_state_dict(self, exp: int, state: dict) -> None:
        """Like `LearnableSet.load_state_dict`; `ValueError` also for a learning rate that is not a positive number."""
        super().load_state_dict(exp, state)
        value = state["lr"]["value"]
        if value.shape != () or value.dtype != torch.float32 or not 0 < value < torch.inf:
            raise ValueError("a learning rate that is not a positive number")
        with torch.no_grad():
            self.lr_student.copy_(value)
        load_optimizer(self.optimizer_lr, state["lr"]["optimizer"])


def _workload(inputs: MethodInputs) -> Workload:
    """Each step goes forward and backward once, then twice more for the second derivative."""
    s, total = inputs.settings, inputs.real.num_classes * inputs.settings.decoded_ipc
    images = min(s.batch_syn or total, total) * inputs.kinds
    return Workload(3.0 * s.syn_steps * images, "matching")


MTT_ENTRY = MethodEntry(
    "MTT",
    "trajectory matching on experts",
    with_experts(TrajectoryMatching),
    _workload,
    TrajectorySettings,
    defaults={"Iteration": 5000, "lr_img": 1000.0, "init": "real", "eval_interval": 100},
    experts=OnExperts.to_train,
    unused=("batch_real", "batch_oe"),
)
