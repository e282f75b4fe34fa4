"""Outliers that keep away from one another: matching alone can leave many of them alike."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.compute import distributed
from utils.data.synthetic import decode_slots

SHARPNESS = 2.0  # t of the uniformity loss, as published


def closeness(features: torch.Tensor) -> torch.Tensor:
    """How close `features` `[N, D]` lie together on the unit sphere: `log mean_{i<j} exp(-2 |f_i - f_j|²)`, at most 0.

    It is the uniformity loss of Wang & Isola (ICML 2020), section 4.1.2. For N < 2 there is no pair, and it is 0.
    """
    if len(features) < 2:
        return features.new_zeros(())
    unit = F.normalize(features)
    kernel = (-SHARPNESS * (2 - 2 * unit @ unit.T)).exp()  # on CUDA the gradient of pdist takes N² D numbers
    pairs = len(unit) * (len(unit) - 1)  # each counted twice
    return ((kernel.sum() - kernel.diagonal().sum()) / pairs).log()


def push_apart(net: nn.Module, outliers: torch.Tensor, weight: float, factor: int = 1) -> None:
    """Add `weight` times the gradient of `closeness` of all outliers, in the features of `net`, to `outliers.grad`.

    The outliers are `[slots, ipc, C, H, W]`; of outliers in parts the parts are kept apart. The network has `embed`;
    its weights are not changed.
    """
    if not weight:
        return
    some = outliers.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(closeness(net.embed(decode_slots(some, factor).flatten(0, 1)).flatten(1)), some)
    distributed.broadcast_(gradient)  # every process computed it, but may have rounded differently
    outliers.grad.add_(gradient, alpha=weight)
