"""One training step of a student, differentiated: by its parameters, and once more by the images that it trains on."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.func import functional_call, grad

from networks import has_batchnorm
from utils.compute.cpu_batches import BatchSplitter
from utils.compute.device import Compute
from utils.training.losses import joint_loss, joint_parts

Params = dict[str, torch.Tensor]


class StudentStep:
    """Gradients of one step of a student, as functions of its parameters and images.

    On a CPU they may be means over equal parts of the batch. A network with BatchNorm takes the batch whole: its
    statistics are those of the batch.
    """

    def __init__(self, net: nn.Module, compute: Compute):
        self.net = net
        whole, fp32 = has_batchnorm(net), replace(compute, precision="fp32")
        self.splitter = None if whole else BatchSplitter(net, compute.precision)
        self.backward_splitter = None if whole else BatchSplitter(net)
        self.part_gradient = compute.function(self._gradient)
        self.part_backward = fp32.function(self._backward)

    def gradient(self, images: torch.Tensor, labels: torch.Tensor, weight: float, params: Params) -> Params:
        """The gradient of the joint loss with respect to `params`.

        Args:
            images: augmented images followed by outliers `[n, C, H, W]`.
            labels: of the images. weight: of the outliers.
        """
        parts = joint_parts(images, labels, self.splitter)
        return _mean([self.part_gradient(*part, weight, params) for part in parts])

    def backward(
        self, images: torch.Tensor, labels: torch.Tensor, weight: float, params: Params, v: Params
    ) -> tuple[torch.Tensor, torch.Tensor, Params]:
        """The value of `h = <gradient, v>`, and its gradients with respect to `images` and `params`."""
        parts = joint_parts(images, labels, self.backward_splitter)
        found = [self.part_backward(*part, weight, params, v) for part in parts]
        products, on_images, on_params = zip(*found, strict=True)
        if len(parts) == 1:
            return products[0], on_images[0], on_params[0]
        n = len(labels) // len(parts)  # a part's gradient: of its images, then of its outliers
        on_all = torch.cat([g[:n] for g in on_images] + [g[n:] for g in on_images]) / len(parts)
        return torch.stack(products).mean(), on_all, _mean(on_params)

    def _gradient(self, images: torch.Tensor, labels: torch.Tensor, weight: float, params: Params) -> Params:
        return grad(lambda p: joint_loss(functional_call(self.net, p, (images,)), labels, weight))(params)

    def _backward(
        self, images: torch.Tensor, labels: torch.Tensor, weight: float, params: Params, v: Params
    ) -> tuple[torch.Tensor, torch.Tensor, Params]:
        def product(x: torch.Tensor, p: Params) -> tuple[torch.Tensor, torch.Tensor]:
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
