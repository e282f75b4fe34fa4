"""Distilled outliers: how they may start, the range of pixels, and what keeps them away from one another."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.compute import distributed
from utils.core.errors import UserError
from utils.data.datasets import RealData
from utils.data.synthetic import decode_slots

SHARPNESS = 2.0  # t of the uniformity loss, as published


def check_start(init_oe: str, init: str, clamp_oe: bool, real: RealData, from_file: bool) -> None:
    """Raise `UserError` for flags that contradict each other; `from_file`: whether a distilled set is the start."""
    if init_oe == "kcenter" and from_file:
        raise UserError("--init_oe kcenter: the outliers start as those of --load_path; leave one of them out")
    if init_oe == "kcenter" and init != "real":
        raise UserError(f"--init_oe kcenter: its network needs images to train on; give --init real, not {init}")
    if clamp_oe and real.zca is not None:
        raise UserError("--clamp_oe: whitened images (--zca) have no range of pixels; leave one of them out")


def clamp_to_pixels(outliers: torch.Tensor, real: RealData) -> None:
    """Clamp outliers `[…, C, H, W]` in place to pixels in [0, 1]."""
    low, high = (real.normalize(torch.full((1, real.channel, 1, 1), v, device=real.device)) for v in (0.0, 1.0))
    outliers.clamp_(low[0], high[0])


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

    The outliers are `[slots, ipc, C, H, W]`; of outliers in parts the parts are kept apart.
    """
    if not weight:
        return
    some = outliers.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(closeness(net.embed(decode_slots(some, factor).flatten(0, 1)).flatten(1)), some)
    distributed.broadcast_(gradient)  # every process computed it, but may have rounded differently
    outliers.grad.add_(gradient, alpha=weight)
