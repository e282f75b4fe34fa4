"""Several processes under `torchrun`; with one process, nothing here communicates."""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.core.errors import UserError, one_line, under_torchrun

TIMEOUT = timedelta(hours=2)  # other ranks may wait long while one trains evaluation networks


def start(device_type: str) -> None:
    """Join the process group of `torchrun`: NCCL for GPUs, gloo for CPUs. Without `torchrun`, do nothing.

    Raises:
        UserError: when the processes cannot reach each other.
    """
    if not under_torchrun() or dist.is_initialized():
        return
    try:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
        atexit.register(stop)
    except Exception as error:
        raise UserError(f"torchrun: the processes cannot reach each other: {one_line(error)}") from None


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def main_first() -> Iterator[None]:
    """Let rank 0 run the block first, e.g. to download a file; the others wait and then run it, too.

    Raises:
        UserError: on the other processes the error of rank 0, if the block failed there.
    """
    if not is_main():
        if (failure := from_main(None)) is not None:
            raise failure
        yield
        return
    failure = UserError("the first process failed; its message says why")
    try:
        yield
        failure = None
    except UserError as error:
        failure = error
        raise
    finally:
        from_main(failure)


def anywhere(condition: bool) -> bool:
    """Whether `condition` holds on any process, so that all of them decide alike, e.g. whether a file is missing."""
    return any(gather({rank(): condition}).values())


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1, device="cuda" if dist.get_backend() == "nccl" else "cpu"))


def gather(values: dict[int, object]) -> dict[int, object]:
    """Merge the plain values (by index) of all processes; return them, sorted by index, on every process."""
    parts: list = [values]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, values)
    joined = {i: v for part in parts for i, v in part.items()}
    return dict(sorted(joined.items()))
