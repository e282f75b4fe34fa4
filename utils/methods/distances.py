"""Distances between two gradients of one network."""

from collections.abc import Sequence

import torch

EPSILON = 1e-6
METRICS = ("ours", "mse", "cos")


def match_loss(
    grads_syn: Sequence[torch.Tensor], grads_real: Sequence[torch.Tensor], metric: str = "ours"
) -> torch.Tensor:
    """Distance between two gradients of the same network.

    Args:
        grads_syn, grads_real: the gradients of all parameters, in parameter order.
        metric: `ours`: over parameters of two or more dimensions, rows = output units,
            `Σ_rows (1 - <a,b> / (|a||b| + 1e-6))` (DC, eq. 9 and appendix); `mse`: squared distance, and `cos`: one
            minus the cosine, of the concatenation of all parameters.
    Returns:
        A scalar, differentiable in both.
    Raises:
        ValueError: for an unknown metric.
    """
    if metric == "ours":
        terms = [_row_distance(a, b) for a, b in zip(grads_syn, grads_real, strict=True) if a.ndim > 1]
        return torch.stack(terms).sum()
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (grads_syn, grads_real))
    if metric == "mse":
        return (a - b).square().sum()
    if metric == "cos":
        return 1 - (a * b).sum() / (a.norm() * b.norm() + EPSILON)
    raise ValueError(f"unknown metric {metric!r}")


def _row_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.flatten(1), b.flatten(1)
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPSILON)).sum()
