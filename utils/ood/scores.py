"""Scores of out-of-distribution detection, from logits. Higher means more out-of-distribution."""

from collections.abc import Callable

import torch


def msp(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Minus the maximum softmax probability (Hendrycks & Gimpel, ICLR 2017). `[N, K]` to `[N]`."""
    return -logits.softmax(1).amax(1)


def mls(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Minus the maximum logit (Hendrycks et al., ICML 2022)."""
    return -logits.amax(1)


def energy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`-T·logsumexp(z/T)` (Liu et al., NeurIPS 2020, eq. 4)."""
    return -temperature * (logits / temperature).logsumexp(1)


def xent(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`mean_k z - logsumexp z`, the negative cross-entropy to uniform (Hendrycks et al., ICLR 2019).

    Its largest value, `-log K` for K classes, is that of the uniform distribution.
    """
    return logits.mean(1) - logits.logsumexp(1)


SCORES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "msp": msp,
    "mls": mls,
    "energy": energy,
    "xent": xent,
}
