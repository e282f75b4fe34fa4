"""Moving random draws from the CPU to the device, in as few transfers as possible."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; from the CPU to a GPU through pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)  # to the CPU the host must wait, or it would read incomplete data
    if tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def send_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """CPU tensors on `device`, in one transfer per dtype."""
    return list(tensors) if device.type == "cpu" else packed(tensors, lambda flat: send(flat, device))


def packed(tensors: Sequence[torch.Tensor], transfer: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """`[transfer(t) for t in tensors]`, with one call of `transfer` per dtype."""
    done: dict[int, torch.Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        indices = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = transfer(torch.cat([tensors[i].flatten() for i in indices]))
        parts = flat.split([tensors[i].numel() for i in indices])
        done |= {i: part.view(tensors[i].shape) for i, part in zip(indices, parts, strict=True)}
    return [done[i] for i in range(len(tensors))]


class Draw:
    """Base class of dataclasses that hold random draws; `send_draws` moves the tensors in their fields."""


AnyDraws = TypeVar("AnyDraws")


def tensors_of(draws: object) -> list[torch.Tensor]:
    """The tensors in a `Draw`, and in lists, tuples and dicts of draws, in order."""
    if isinstance(draws, torch.Tensor):
        return [draws]
    return [tensor for part in _parts(draws).values() for tensor in tensors_of(part)]


def with_tensors(draws: AnyDraws, tensors: Iterator[torch.Tensor]) -> AnyDraws:
    """`draws` with their tensors replaced, in order, by `tensors`."""
    if isinstance(draws, torch.Tensor):
        return next(tensors)
    parts = {key: with_tensors(part, tensors) for key, part in _parts(draws).items()}
    if isinstance(draws, Draw):
        return replace(draws, **parts)
    if isinstance(draws, (list, tuple)):
        return type(draws)(parts.values())
    return parts if isinstance(draws, dict) else draws


def _parts(draws: object) -> dict:
    """The parts of a `Draw`, a list, a tuple or a dict, by name, position or key; empty for anything else."""
    if isinstance(draws, Draw):
        return {f.name: getattr(draws, f.name) for f in fields(draws)}
    if isinstance(draws, (list, tuple)):
        return dict(enumerate(draws))
    return draws if isinstance(draws, dict) else {}


def send_draws(draws: AnyDraws, device: torch.device) -> AnyDraws:
    """`draws` with their tensors on `device`, sent together."""
    if device.type == "cpu":  # where they were drawn
        return draws
    return with_tensors(draws, iter(send_together(tensors_of(draws), device)))


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrix products keep float32 precision: on CUDA, TF32 would round the mantissa to 10 bits."""
    return torch.float64 if device.type == "cuda" and dtype == torch.float32 else dtype
