"""What the network families share: sizes, norms and initialisation."""

import math
from collections.abc import Callable

import torch
from torch import nn

from utils.core.errors import UserError


def feature_size(name: str, im_size: tuple[int, int], along: Callable[[int], int]) -> tuple[int, int]:
    """Height and width of the last feature map.

    Args:
        name: the network, for the error message.
        im_size: height and width of the images.
        along: maps one side of the input to that side of the feature map; below 1: the image is too small.
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
    """Whether `net` has BatchNorm: in training mode its output for an image depends on the rest of the batch."""
    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@torch.no_grad()
def initialize(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw every parameter of `net` anew, in place, from `generator` (CPU) with PyTorch's default distributions.

    Convolutions and linear layers: Kaiming uniform with a = sqrt(5), biases uniform in ±1/sqrt(fan_in). Norms: ones and
    zeros; running statistics are reset.

    Raises:
        TypeError: for any other module with parameters or buffers, which would keep their values.
    """
    parameters, draws = [], []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(module.weight[0].numel())  # kaiming_uniform_ with a = sqrt(5) has this very bound
            for parameter in filter(lambda p: p is not None, (module.weight, module.bias)):
                parameters.append(parameter)
                draws.append(torch.empty(parameter.numel()).uniform_(-bound, bound, generator=generator))
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
            module.reset_parameters()
        elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            name = type(module).__name__
            raise TypeError(f"networks/common.py: initialize does not know the parameters or buffers of {name}")
    device, flat = parameters[0].device, torch.cat(draws)  # one transfer for all
    flat = flat.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else flat.to(device)
    for parameter, draw in zip(parameters, flat.split([len(d) for d in draws]), strict=True):
        parameter.copy_(draw.view_as(parameter))
    return net
