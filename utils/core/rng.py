"""Keyed random generators: a draw depends on the seed and on its key, which says what it is for."""

import hashlib
from collections.abc import Callable, Sequence

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """Return a fresh CPU generator that depends only on `seed` and `key`.

    The key says what the draw is for, e.g. `("real", experiment, iteration, outer_step, slot)`. Draws under different
    keys are independent, so a run that resumes in the middle, or is spread over processes, draws what an
    uninterrupted single process draws. The generator lives on the CPU whatever the device of the computation, so the
    draws are the same on every device (but for `noise`).
    """
    digest = hashlib.blake2b(repr((int(seed), *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_seed(g: torch.Generator) -> int:
    """The seed of a further generator, drawn from `g`."""
    return int(torch.randint(2**62, (1,), generator=g))


def noise(kind: Callable[..., torch.Tensor], shape: Sequence[int], seed: int, device: torch.device) -> torch.Tensor:
    """`kind` (`torch.randn` or `torch.rand`) of `shape`, drawn on `device` from `seed` alone.

    For draws that are too large to be made on the CPU and sent; they differ between kinds of devices.
    """
    return kind(tuple(shape), generator=torch.Generator(device).manual_seed(seed), device=device)
