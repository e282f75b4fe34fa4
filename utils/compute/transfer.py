"""Moving random draws from the CPU to the device, in as few transfers as possible."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_map_only


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

    def __init_subclass__(cls, **kwargs: object):
        super().__init_subclass__(**kwargs)
        register_pytree_node(
            cls, lambda draw: ([getattr(draw, f.name) for f in fields(draw)], None), lambda values, _: cls(*values)
        )


AnyDraws = TypeVar("AnyDraws")


def tensors_of(draws: object) -> list[torch.Tensor]:
    """The tensors in a `Draw`, and in lists, tuples and dicts of draws, in order."""
    return [leaf for leaf in tree_flatten(draws)[0] if isinstance(leaf, torch.Tensor)]


def with_tensors(draws: AnyDraws, tensors: Iterator[torch.Tensor]) -> AnyDraws:
    """`draws` with their tensors replaced, in order, by `tensors`."""
    return tree_map_only(torch.Tensor, lambda tensor: next(tensors), draws)


def send_draws(draws: AnyDraws, device: torch.device) -> AnyDraws:
    """`draws` with their tensors on `device`, sent together."""
    if device.type == "cpu":  # where they were drawn
        return draws
    return with_tensors(draws, iter(send_together(tensors_of(draws), device)))


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrix products keep float32 precision: on CUDA, TF32 would round the mantissa to 10 bits."""
    return torch.float64 if device.type == "cuda" and dtype == torch.float32 else dtype
