"""Keyed random generators: a draw depends only on the seed and on a key that names its purpose."""

import hashlib
from collections.abc import Callable, Sequence

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A fresh CPU generator that depends only on `seed` and `key`, e.g. `("real", experiment, iteration, slot)`.

    No draw depends on what was drawn before, so a resumed or distributed run draws the same as an uninterrupted single
    process. Draws are made on the CPU, so they are the same on every device (except `noise`).
    Of 100,000 keys about one pair draws the same: PyTorch's CPU generator uses 32 bits of the seed.
    """
    digest = hashlib.blake2b(repr((int(seed), *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_seed(g: torch.Generator) -> int:
    """A seed for another generator, drawn from `g`."""
    return int(torch.randint(2**62, (1,), generator=g))


def noise(kind: Callable[..., torch.Tensor], shape: Sequence[int], seed: int, device: torch.device) -> torch.Tensor:
    """`torch.randn` or `torch.rand` on `device`, for draws too large to transfer; CPU and CUDA draw other values."""
    return kind(tuple(shape), generator=torch.Generator(device).manual_seed(seed), device=device)
