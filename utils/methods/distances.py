"""Distances by which synthetic images are matched to real ones: of gradients, and of features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("ours", "mse", "cos")  # of gradients
EPSILON = 1e-6
CF_SCALE = 300.0  # of the distance of characteristic functions, as published


def match_loss(grads_syn: Sequence[Tensor], grads_real: Sequence[Tensor], metric: str = "ours") -> Tensor:
    """Distance between two gradients of the same network.

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
    return 1 - (a * b).sum() / (a.norm() * b.norm() + EPSILON)


def _row_distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPSILON)).sum()


def mean_distance(features: Tensor, targets: Tensor) -> Tensor:
    """The squared distances `[slots]` of mean features (DM, eq. 6): of `[slots, n, D]` to targets `[slots, D]`."""
    return (features.mean(1) - targets).square().sum(1)


def characteristic(features: Tensor, frequencies: Tensor) -> Tensor:
    """The characteristic function of unit features `[…, n, D]` at frequencies `[T, D]`: `[…, 2, T]`, real and imaginary
    part of `mean_n exp(i t·f_n)`."""
    phases = F.normalize(features, dim=-1) @ frequencies.T
    return torch.stack([phases.cos().mean(-2), phases.sin().mean(-2)], dim=-2)


def characteristic_distance(features: Tensor, targets: Tensor, frequencies: Tensor) -> Tensor:
    """`300 mean_t sqrt(½ |Φ_r - Φ_s|²)` `[slots]`, which is NCFM's loss (section 3.3) written shorter.

    `features`: `[slots, n, D]`; `targets`: the characteristic functions `[slots, 2, T]` of real ones.
    """
    difference = characteristic(features, frequencies) - targets
    return CF_SCALE * (difference.square().sum(-2) / 2 + 1e-12).sqrt().mean(-1)
