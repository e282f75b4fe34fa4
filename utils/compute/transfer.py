"""Moving what was drawn on the CPU to the device, in as few transfers as possible."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch


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
