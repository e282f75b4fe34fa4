"""How a script starts and ends: errors in one line, exit statuses."""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from utils.compute import distributed
from utils.compute.compiling import remove_fresh_cache
from utils.core.errors import Interrupted, RankError, UserError, print_error, print_error_once, under_torchrun

PRINT_SECONDS = 5.0  # the first process prints an error of all; torchrun ends it when another one leaves before


def run_script(main: Callable[[], None], prog: str) -> None:
    """Call `main()`; turn a `UserError` into one line on stderr and exit status 2, a signal into 128 and its number."""
    with suppress(AttributeError, OSError, RuntimeError, ValueError):  # no stderr, or one without a file behind it
        faulthandler.enable()  # a library that crashes names the place
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # what stands in for them in a notebook or a test has no encoding
            stream.reconfigure(errors="backslashreplace")
    status = _status(main, prog)
    if under_torchrun():
        remove_fresh_cache()  # this exit skips what an ordinary one removes
        distributed.leave(status)
    if status:
        sys.exit(status)


def _status(main: Callable[[], None], prog: str) -> int:
    """Call `main()`, print what the user can fix, and return the exit status."""
    try:
        main()
    except (Interrupted, KeyboardInterrupt) as stopped:
        return 128 + getattr(stopped, "number", signal.SIGINT)
    except RankError as error:
        return print_error(prog, error)
    except UserError as error:
        status = print_error_once(prog, error)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(PRINT_SECONDS)
        return status
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            return print_error(
                prog,
                "out of memory: lower --ipc or the flags of this script that begin with --batch_, or choose a "
                "narrower --model; --zca needs much for large images",
            )
        if under_torchrun() and "peer" in str(error):
            print_error(prog, "another process of this run has ended, so this one ends, too")
            return 1
        raise
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, of CUDA or of PyTorch's CPU allocator means that memory ran out."""
    is_named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return is_named or "allocate memory" in str(error) or "not enough memory" in str(error)
