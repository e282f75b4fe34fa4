"""Several processes under `torchrun`; with one process, nothing here communicates."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.core.errors import UserError, one_line, under_torchrun

TIMEOUT = timedelta(days=7)  # ranks may wait long while one trains networks; torchrun ends all if one dies


def start(device_type: str) -> None:
    """Join the process group of `torchrun`: NCCL for GPUs, gloo for CPUs. Without `torchrun`, do nothing."""
    if not under_torchrun() or dist.is_initialized():
        return
    try:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
    except Exception as error:
        raise UserError(f"torchrun: the processes cannot reach each other: {one_line(error)}") from None


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is rank 0, the one that writes the files of a run and prints."""
    return rank() == 0


def own_share(count: int) -> range:
    """The indices below `count` that this process works on; each index belongs to exactly one process."""
    return range(rank(), count, world_size())


def sum_(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast_(*tensors: torch.Tensor) -> None:
    """Replace each tensor by that of rank 0, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def from_main(value: object) -> object:
    """Return the plain `value` of rank 0 on every process."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def main_first() -> Iterator[None]:
    """Let rank 0 run the block first, e.g. to download a file; then the others run it, or raise its `UserError`."""
    if not is_main() and (failure := from_main(None)):
        raise failure
    try:
        yield
    except Exception as error:
        if is_main():
            told = UserError("the first process failed; its message says why")
            from_main(error if isinstance(error, UserError) else told)
        raise
    if is_main():
        from_main(None)


def anywhere(condition: bool) -> bool:
    """Whether `condition` holds on any process, so that all of them decide alike, e.g. whether a file is missing."""
    return any(gather({rank(): condition}).values())


def barrier() -> None:
    """Wait until every process has called this."""
    gather({})


def gather(values: dict[int, object]) -> dict[int, object]:
    """Merge the plain values (by index) of all processes; return them, sorted by index, on every process."""
    parts = [values]
    if world_size() > 1:
        parts *= world_size()
        dist.all_gather_object(parts, values)
    return dict(sorted((i, value) for part in parts for i, value in part.items()))
