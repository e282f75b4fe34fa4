"""Stopping a run by SIGINT (Ctrl-C) or SIGTERM (from schedulers).

After the first signal the run has `GRACE` seconds to reach the end of an iteration or epoch, where it saves and stops.
If it does not, `Interrupted` is raised in the middle of the computation, inside the blocks that `interruptible` marks.
`Distillation.run_all` (stage 1) then saves the state from before the block; stage 2 keeps the newest checkpoint of the
network. Both print the command that resumes the run. A later signal ends the process without saving. Repeats within
`REPEAT` seconds count as one: torchrun forwards a signal that its processes have already received.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from utils.compute import distributed
from utils.core.errors import Interrupted, UserError

GRACE = 1.5  # seconds
AGAIN = 0.5  # seconds between attempts: Python discards exceptions raised in a destructor
REPEAT = 5.0  # seconds
NOT_HANDLED = "not in the main thread: Ctrl-C and SIGTERM do not save; --resume continues from the last checkpoint"

_received = 0  # number of the first signal
_received_at = 0.0
_interruptible = False
_overdue = False  # whether the grace period is over


def received() -> int:
    """The number of the first signal that this process received, 0 for none."""
    return _received


def check() -> None:
    """Raise `Interrupted` if this process received a signal. Called where the state of the run is consistent."""
    if _received:
        raise Interrupted(_received)


@contextmanager
def interruptible() -> Iterator[None]:
    """Mark a long computation that may be interrupted, as the state from before it can still be saved.

    Raises:
        Interrupted: inside the block, when the grace period after a signal is over.
    """
    global _interruptible
    _interruptible = True
    try:
        _raise_if_overdue()
        yield
    finally:
        _interruptible = False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside `interruptible`: mark a part that must run to its end, such as writing files."""
    global _interruptible
    before, _interruptible = _interruptible, False
    try:
        yield
    finally:
        _interruptible = before
    _raise_if_overdue()


@contextmanager
def catch() -> Iterator[None]:
    """Handle SIGINT and SIGTERM as this module describes while the block runs.

    Python handles signals in the main thread alone. In any other, as in notebooks and web apps, a line says that they
    are not handled, and the block runs without.

    Raises:
        Interrupted: also in place of an error (except `UserError`) after a signal, e.g. of a compiler that Ctrl-C also
            stopped, or of a process that waited for a stopped one.
    """
    if threading.current_thread() is not threading.main_thread():
        if distributed.is_main():
            print(NOT_HANDLED, file=sys.stderr, flush=True)
        yield
        return
    _reset()
    handlers = {signal.SIGINT: _note, signal.SIGTERM: _note}
    if hasattr(signal, "SIGALRM"):
        handlers[signal.SIGALRM] = _grace_is_over
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except UserError:
        raise
    except Exception:
        if not _received:
            raise
        raise Interrupted(_received) from None
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _reset()


def _reset() -> None:
    global _received, _received_at, _interruptible, _overdue
    _received, _received_at, _interruptible, _overdue = 0, 0.0, False, False


def _note(number: int, frame: object) -> None:
    """The handler of SIGINT and SIGTERM."""
    global _received, _received_at
    now = time.monotonic()
    if _received:
        if now - _received_at > REPEAT:
            os._exit(128 + number)
        return
    _received, _received_at = number, now
    if distributed.is_main():
        name = signal.Signals(number).name
        os.write(
            2, f"\n{name}: stopping and saving; another signal after {REPEAT:.0f} s ends without saving\n".encode()
        )
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, GRACE, AGAIN)
    else:
        _grace_is_over(number, frame)


def _grace_is_over(number: int, frame: object) -> None:
    """The handler of the timer."""
    global _overdue
    _overdue = True
    _raise_if_overdue()


def _raise_if_overdue() -> None:
    if _overdue and _interruptible:
        raise Interrupted(_received)
