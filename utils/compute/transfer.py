"""Moving random draws from the CPU to the device, in as few transfers as possible."""

from dataclasses import fields
from typing import TypeVar

import torch
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_unflatten


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; from the CPU to a GPU through pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)  # to the CPU the host must wait, or it would read incomplete data
    if tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Draw:
    """Base class of dataclasses that hold random draws; `send_draws` moves the tensors in their fields."""

    def __init_subclass__(cls):
        register_pytree_node(
            cls, lambda draw: ([getattr(draw, f.name) for f in fields(draw)], None), lambda values, _: cls(*values)
        )


AnyDraws = TypeVar("AnyDraws")


def tensors_of(draws: object) -> list[torch.Tensor]:
    """The tensors in a `Draw`, and in lists, tuples and dicts of draws, in order."""
    return [leaf for leaf in tree_flatten(draws)[0] if isinstance(leaf, torch.Tensor)]


def send_draws(draws: AnyDraws, device: torch.device) -> AnyDraws:
    """`draws` with their tensors (those that `tensors_of` finds) on `device`, in one transfer per dtype."""
    if device.type == "cpu":  # where they were drawn
        return draws
    leaves, structure = tree_flatten(draws)
    for dtype in dict.fromkeys(t.dtype for t in tensors_of(draws)):
        indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.dtype == dtype]
        tensors = [leaves[i] for i in indices]
        flat = send(torch.cat([t.flatten() for t in tensors]), device)
        for i, t, part in zip(indices, tensors, flat.split([t.numel() for t in tensors]), strict=True):
            leaves[i] = part.view(t.shape)
    return tree_unflatten(leaves, structure)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrix products keep float32 precision: on CUDA, TF32 would round the mantissa to 10 bits."""
    return torch.float64 if device.type == "cuda" and dtype == torch.float32 else dtype
