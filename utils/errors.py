"""Errors that a user can mend: one line, exit status 2, no traceback."""

import difflib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress


class UserError(ValueError):
    """A wrong flag, file or data set. The message is one line that says what was found and what to do."""


class OwnError(UserError):
    """What went wrong in this process of several alone, so that it must say it itself."""


def unknown_name(what: str, name: str, accepted: Iterable[str]) -> str:
    """The message for a name that is not among `accepted`; it lists them all and points at the nearest one."""
    accepted = list(accepted)
    by_lower = {a.lower(): a for a in reversed(accepted)}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    hint = f"; did you mean {by_lower[nearest[0]]}?" if nearest else ""
    return f"unknown {what} {name!r}{hint} Accepted: {', '.join(accepted)}"


class Interrupted(Exception):
    """A signal asked the run to stop.

    `number`: the signal's; `between_steps`: whether the state of the run is whole.
    """

    def __init__(self, number: int, between_steps: bool = True):
        super().__init__(signal.Signals(number).name)
        self.number, self.between_steps = number, between_steps


def run_script(main: Callable[[], None], prog: str) -> None:
    """Call `main()`; turn a `UserError` into one line on stderr and exit status 2, a signal into 128 and its number."""
    with suppress(AttributeError, OSError, RuntimeError, ValueError):  # no stderr, or one without a file behind it
        faulthandler.enable()  # a library that crashes says where
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # what stands in for them in a notebook or a test has no encoding
            stream.reconfigure(errors="backslashreplace")
    status = _status(main, prog)
    if _several():
        from . import distributed

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
        return _said(prog, error)
    except UserError as error:
        return said_once(prog, error)
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            return _said(
                prog,
                "out of memory: lower --batch_real, --batch_oe, --batch_train or --ipc, or choose a narrower --model",
            )
        if _several() and "peer" in str(error):
            _said(prog, "another process of this run has ended, and so does this one")
            return 1
        raise
    return 0


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def said_once(prog: str, message: object) -> int:
    """Print an error line, under `torchrun` by the first process alone; returns the exit status."""
    return _said(prog, message) if os.environ.get("RANK", "0") == "0" else 2


def _said(prog: str, message: object) -> int:
    where = f"process {os.environ.get('RANK')}: " if _several() else ""
    print(f"{prog}: error: {where}{' '.join(str(message).split())}", file=sys.stderr, flush=True)
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    """Python, CUDA and the CPU allocator of PyTorch each say it in their own way."""
    is_named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return is_named or "allocate memory" in str(error) or "not enough memory" in str(error)
