"""Moving random draws from the CPU to the device."""

from dataclasses import fields
from typing import Any

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


def send_draws(draws: Any, device: torch.device) -> Any:
    """A `Draw`, or lists, tuples and dicts of draws, with their tensors on `device`, in one transfer per dtype."""
    if device.type == "cpu":  # where they were drawn
        return draws
    leaves, structure = tree_flatten(draws)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)):
        indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.dtype == dtype]
        tensors = [leaves[i] for i in indices]
        flat = send(torch.cat([t.flatten() for t in tensors]), device)
        for i, t, part in zip(indices, tensors, flat.split([t.numel() for t in tensors]), strict=True):
            leaves[i] = part.view(t.shape)
    return tree_unflatten(leaves, structure)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrix products keep float32 precision: on CUDA, TF32 would round the mantissa to 10 bits."""
    return torch.float64 if device.type == "cuda" and dtype == torch.float32 else dtype
