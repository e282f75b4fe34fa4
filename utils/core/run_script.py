"""How a script starts and ends: errors in one line, exit statuses."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from utils.core.errors import Interrupted, UserError, drop_output, print_error, under_torchrun

SIGPIPE = 13  # by number: Windows has no such signal
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError", "allocate memory", "not enough memory")  # Python, CUDA, the CPU
MEMORY_ADVICE = (
    "out of memory: lower --ipc or the flags of this script that begin with --batch_, or choose a narrower --model; "
    "--zca needs much for large images"
)


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
    except UserError as error:
        return print_error(prog, error)
    except (MemoryError, RuntimeError) as error:
        said = f"{type(error).__name__} {error}"
        if any(words in said for words in OUT_OF_MEMORY):
            return print_error(prog, MEMORY_ADVICE, wait=False)
        if under_torchrun() and ("by peer" in said or "ncclRemoteError" in said):  # as gloo and NCCL say it
            print_error(prog, "another process of this run has ended, so this one ends, too", wait=False)
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
