"""The networks of `--model`. Parameter names and shapes equal those of published dataset-condensation checkpoints."""

from utils.core.errors import UserError, unknown_name  # isort: skip (before torch: utils tells OpenMP how to wait)

import torch
from torch import nn

from . import convnet, resnet, small, vgg
from .common import has_batchnorm, initialize

__all__ = ["MODEL_NAMES", "get_network", "has_batchnorm", "initialize"]

_NETWORKS = {**convnet.NETWORKS, **small.NETWORKS, **vgg.NETWORKS, **resnet.NETWORKS}
MODEL_NAMES = tuple(_NETWORKS)


def get_network(
    name: str,
    channel: int,
    num_classes: int,
    im_size: tuple[int, int],
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Build the network `name` on the CPU, in training mode.

    Args:
        name: one of `MODEL_NAMES`.
        channel, im_size: the images are `[N, channel, *im_size]`.
        num_classes: the logits are `[N, num_classes]`.
        generator: draws the weights; None: torch's global generator does, as for any `nn.Module`.
    Raises:
        UserError: for an unknown name, or an `im_size` below the network's smallest (the message names it).
    """
    if name not in _NETWORKS:
        raise UserError(unknown_name("model", name, MODEL_NAMES))
    if generator is None:
        return _NETWORKS[name](channel, num_classes, tuple(im_size))
    with torch.device("meta"):
        net = _NETWORKS[name](channel, num_classes, tuple(im_size))
    return initialize(net.to_empty(device="cpu"), generator)
