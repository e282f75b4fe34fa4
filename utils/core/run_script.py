"""How a script starts and ends: errors in one line, exit statuses."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from utils.core.errors import (
    Interrupted,
    RankError,
    UserError,
    drop_output,
    print_error,
    print_error_once,
    under_torchrun,
)

SIGPIPE = 13  # by number: Windows has no such signal


def run_script(main: Callable[[], None], prog: str) -> None:
    """Call `main()`; turn a `UserError` into one line on stderr and exit status 2, a signal into 128 and its number."""
    with suppress(AttributeError, OSError, RuntimeError, ValueError):  # no stderr, or one without a file behind it
        faulthandler.enable()  # a library that crashes names the place
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # what stands in for them in a notebook or a test has no encoding
            stream.reconfigure(errors="backslashreplace")
    status = _status(main, prog)
    if under_torchrun():
        leave(status)
    if status:
        sys.exit(status)


def leave(status: int) -> None:
    """Exit this process, one of several, with `status`, without the usual shutdown of Python and its libraries.

    A gloo thread that still holds a Python object during that shutdown would abort the process after its work is done
    (seen in about one run in a hundred). An interrupted process (status from 128) does not wait for the others.
    """
    if status < 128 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status(main: Callable[[], None], prog: str) -> int:
    """Call `main()`, print what the user can fix, and return the exit status."""
    try:
        main()
    except (Interrupted, KeyboardInterrupt) as stopped:
        return 128 + getattr(stopped, "number", signal.SIGINT)
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        drop_output(sys.stdout)
        return 128 + SIGPIPE
    except RankError as error:
        return print_error(prog, error)
    except UserError as error:
        return print_error_once(prog, error)
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            return print_error(
                prog,
                "out of memory: lower --ipc or the flags of this script that begin with --batch_, or choose a "
                "narrower --model; --zca needs much for large images",
            )
        if under_torchrun() and _is_broken_connection(error):
            print_error(prog, "another process of this run has ended, so this one ends, too")
            return 1
        raise
    return 0


def _reader_has_gone() -> bool:
    """Whether nobody reads stdout any more, as with `study.py … | head`."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def _is_broken_connection(error: Exception) -> bool:
    """Whether gloo or NCCL says that another process has left."""
    return "by peer" in str(error) or "ncclRemoteError" in str(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, of CUDA or of PyTorch's CPU allocator means that memory ran out."""
    is_named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return is_named or "allocate memory" in str(error) or "not enough memory" in str(error)
