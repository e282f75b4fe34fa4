"""What the network families share: sizes, norms and initialisation."""

import math
from collections.abc import Callable

import torch
from torch import nn

from utils.compute.transfer import send_together
from utils.core.errors import UserError


def feature_size(name: str, im_size: tuple[int, int], along: Callable[[int], int]) -> tuple[int, int]:
    """Height and width of the last feature map.

    Args:
        name: the network, for the error message.
        im_size: height and width of the images.
        along: maps one side of the input to that side of the feature map; below 1 means that nothing is left.
    Raises:
        UserError: naming the smallest size that works.
    """
    height, width = (along(side) for side in im_size)
    if min(height, width) < 1:
        smallest = next(side for side in range(1, 10_000) if along(side) >= 1)
        raise UserError(
            f"--model {name}: too deep for images of {im_size[0]}x{im_size[1]}; the smallest size it takes is "
            f"{smallest}x{smallest}. Choose a shallower network, e.g. ConvNetD1"
        )
    return height, width


def channel_norm(name: str, channels: int) -> nn.Module:
    """The norm of VGG, ResNet and AlexNet: `instance` (one group per channel) or `batch`."""
    return nn.BatchNorm2d(channels) if name == "batch" else nn.GroupNorm(channels, channels)


def has_batchnorm(net: nn.Module) -> bool:
    """Whether what `net` gives for an image depends, in training mode, on the other images of the batch."""
    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@torch.no_grad()
def initialize(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw every parameter of `net` anew, in place, from `generator` (CPU) with PyTorch's default distributions.

    Convolutions and linear layers: Kaiming uniform with a = sqrt(5), biases uniform in ±1/sqrt(fan_in). Norms: ones and
    zeros; running statistics are reset.
    """
    parameters, draws = [], []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            bound = 1 / math.sqrt(fan_in)  # kaiming_uniform_ with a = sqrt(5) has this very bound
            mine = [p for p in (module.weight, module.bias) if p is not None]
            parameters += mine
            draws += [torch.empty(p.shape).uniform_(-bound, bound, generator=generator) for p in mine]
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
            module.reset_parameters()
    for parameter, draw in zip(parameters, send_together(draws, parameters[0].device), strict=True):
        parameter.copy_(draw)
    return net
