"""How a script begins and ends: errors in one line, exit statuses, leaving."""

import faulthandler
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from utils.compute import distributed
from utils.core.errors import Interrupted, OwnError, UserError, said, said_once, several


def run_script(main: Callable[[], None], prog: str) -> None:
    """Call `main()`; turn a `UserError` into one line on stderr and exit status 2, a signal into 128 and its number."""
    with suppress(AttributeError, OSError, RuntimeError, ValueError):  # no stderr, or one without a file behind it
        faulthandler.enable()  # a library that crashes says where
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # what stands in for them in a notebook or a test has no encoding
            stream.reconfigure(errors="backslashreplace")
    status = _status(main, prog)
    if several():
        distributed.leave(status)
    if status:
        sys.exit(status)


def _status(main: Callable[[], None], prog: str) -> int:
    """Call `main()`, say what the user can mend, and return the exit status."""
    try:
        main()
    except (Interrupted, KeyboardInterrupt) as stopped:
        return 128 + getattr(stopped, "number", signal.SIGINT)
    except OwnError as error:
        return said(prog, error)
    except UserError as error:
        return said_once(prog, error)
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            return said(
                prog,
                "out of memory: lower --batch_real, --batch_oe, --batch_train or --ipc, or choose a narrower --model",
            )
        if several() and "peer" in str(error):
            said(prog, "another process of this run has ended, and so does this one")
            return 1
        raise
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Python, CUDA and the CPU allocator of PyTorch each say it in their own way."""
    is_named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return is_named or "allocate memory" in str(error) or "not enough memory" in str(error)
