"""Several processes under `torchrun`; with one process every function here does nothing."""

import atexit
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.core.errors import UserError

TIMEOUT = timedelta(hours=2)  # rank 0 may train evaluation networks for long while others wait


def start(device_type: str) -> None:
    """Join the process group that `torchrun` prepared: NCCL for GPUs, gloo for CPUs. Without `torchrun` do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    try:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
        atexit.register(stop)
    except Exception as error:
        raise UserError(
            f"torchrun: the processes cannot reach each other: {str(error).splitlines()[0][:160]}"
        ) from None


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> None:
    """End this process, one of several, at once.

    Python and its libraries are not taken down one by one: a thread of gloo that still held a Python object then would
    abort the process after its work is done (about one run in a hundred).
    """
    stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 writes files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Number of this process on its machine, which is the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def mine(count: int) -> range:
    """The indices below `count` that this process works on; every index belongs to one process."""
    return range(rank(), count, world())


def sum_(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over processes, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast_(*tensors: torch.Tensor) -> None:
    """Replace each tensor by that of rank 0, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def same(value: object) -> object:
    """The plain value of rank 0."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def largest(value: int) -> int:
    """The largest of the processes' values."""
    if world() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    box = torch.tensor([value], device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box.item())


def barrier() -> None:
    """Go on when every process is here."""
    largest(0)


def gather(values: dict[int, object]) -> dict[int, object]:
    """Plain values by index, each known to one process, together and in order, on every process."""
    parts: list = [values]
    if world() > 1:
        parts = [None] * world()
        dist.all_gather_object(parts, values)
    joined = {i: v for part in parts for i, v in part.items()}
    return dict(sorted(joined.items()))
