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
    draws are the same on every device.
    """
    digest = hashlib.blake2b(repr((int(seed), *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


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
    """A dataclass of what was drawn, some of it in tensors, that can be moved to a device together."""

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the fields, those of draws within this one included."""
        values = [getattr(self, f.name) for f in fields(self)]
        nested = [v.tensors() if isinstance(v, Draw) else [v] * isinstance(v, torch.Tensor) for v in values]
        return [tensor for part in nested for tensor in part]

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> "Draw":
        """The same draw with the next of `tensors` in their places."""
        new = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Draw):
                new[f.name] = value.with_tensors(tensors)
            elif isinstance(value, torch.Tensor):
                new[f.name] = next(tensors)
        return replace(self, **new)


AnyDraw = TypeVar("AnyDraw", bound=Draw)


def send_draws(draws: Sequence[AnyDraw], device: torch.device) -> list[AnyDraw]:
    """The draws with their tensors on `device`, sent together."""
    there = iter(send_together([t for draw in draws for t in draw.tensors()], device))
    return [draw.with_tensors(there) for draw in draws]
