"""Keyed random generators: what is drawn depends on the seed and on what it is drawn for, on nothing else."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TypeVar

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
    """`kind` (`torch.randn` or `torch.rand`) of `shape`, drawn on `device`, where it depends on `seed` alone.

    For draws that are too large to be made on the CPU and sent; they differ between kinds of devices.
    """
    return kind(tuple(shape), generator=torch.Generator(device).manual_seed(seed), device=device)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`; to a GPU through pinned memory, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def send_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """CPU tensors on `device`, through one transfer for each of their types."""
    return list(tensors) if device.type == "cpu" else packed(tensors, lambda flat: send(flat, device))


def packed(tensors: Sequence[torch.Tensor], transfer: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """`[transfer(t) for t in tensors]`, with one call of `transfer` for all tensors of a type."""
    done: dict[int, torch.Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        which = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = transfer(torch.cat([tensors[i].flatten() for i in which]))
        parts = flat.split([tensors[i].numel() for i in which])
        done |= {i: part.view(tensors[i].shape) for i, part in zip(which, parts, strict=True)}
    return [done[i] for i in range(len(tensors))]


class Draw:
    """A dataclass of what was drawn: some fields are tensors, or have tensors in them; `send_draws` moves those."""


AnyDraws = TypeVar("AnyDraws")


def tensors_of(draws: object) -> list[torch.Tensor]:
    """The tensors in a `Draw`, and in lists and dicts of draws."""
    if isinstance(draws, torch.Tensor):
        return [draws]
    return [tensor for part in _parts(draws).values() for tensor in tensors_of(part)]


def with_tensors(draws: AnyDraws, tensors: Iterator[torch.Tensor]) -> AnyDraws:
    """The same draws with the next of `tensors` in the places of theirs."""
    if isinstance(draws, torch.Tensor):
        return next(tensors)
    parts = {key: with_tensors(part, tensors) for key, part in _parts(draws).items()}
    if isinstance(draws, Draw):
        return replace(draws, **parts)
    if isinstance(draws, list):
        return list(parts.values())
    return parts if isinstance(draws, dict) else draws


def _parts(draws: object) -> dict:
    """What is in a `Draw`, a list or a dict, by name, position or key; nothing in anything else."""
    if isinstance(draws, Draw):
        return {f.name: getattr(draws, f.name) for f in fields(draws)}
    if isinstance(draws, list):
        return dict(enumerate(draws))
    return draws if isinstance(draws, dict) else {}


def send_draws(draws: AnyDraws, device: torch.device) -> AnyDraws:
    """The draws with their tensors on `device`, sent together."""
    return with_tensors(draws, iter(send_together(tensors_of(draws), device)))
