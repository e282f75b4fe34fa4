"""Keyed random generators: what is drawn depends on the seed and on what it is drawn for, on nothing else."""

import hashlib

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """Return a fresh CPU generator that depends only on `seed` and `key`.

    The key says what the draw is for, e.g. `("real", experiment, iteration, outer_step, slot)`. Draws under different
    keys are independent, so a run that resumes in the middle, or is spread over processes, draws what an
    uninterrupted single process draws. The generator lives on the CPU whatever the device of the computation, so the
    draws are the same on every device.
    """
    digest = hashlib.blake2b(repr((int(seed), *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`; to a GPU through pinned memory, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
