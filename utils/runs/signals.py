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
from types import SimpleNamespace

from utils.compute import distributed
from utils.core.errors import Interrupted, UserError

GRACE = 1.5  # seconds
AGAIN = 0.5  # seconds between attempts: Python discards exceptions raised in a destructor
REPEAT = 5.0  # seconds
HAS_TIMER = hasattr(signal, "setitimer")  # Windows has none: a run there stops at the end of an iteration or epoch
NOT_HANDLED = "not in the main thread: Ctrl-C and SIGTERM do not save; --resume continues from the last checkpoint"

# the number of the first signal since `catch` began, 0 for none; when it came; whether the computation may be stopped
_now = SimpleNamespace(received=0, at=0.0, interruptible=False)


def received() -> int:
    """The number of the first signal that this process received, 0 for none."""
    return _now.received


def check() -> None:
    """Raise `Interrupted` if this process received a signal. Called where the state of the run is consistent."""
    if _now.received:
        raise Interrupted(_now.received)


@contextmanager
def interruptible(may_stop: bool = True) -> Iterator[None]:
    """Mark a long computation that may be interrupted, as the state from before it can still be saved.

    Without `may_stop`: mark a part of one that must run to its end, such as writing files.

    Raises:
        Interrupted: inside the block, when the grace period after a signal is over.
    """
    before, _now.interruptible = _now.interruptible, may_stop
    try:
        _stop_if_overdue()
        yield
    finally:
        _now.interruptible = before
    _stop_if_overdue()


def _stop_if_overdue(*_: object) -> None:
    """Raise `Interrupted` where the grace period is over; also the handler of the timer."""
    if _now.interruptible and _now.received and time.monotonic() - _now.at >= GRACE:
        raise Interrupted(_now.received)


@contextmanager
def catch() -> Iterator[None]:
    """Handle SIGINT and SIGTERM as this module describes while the block runs.

    Python handles signals in the main thread alone. In any other, as in notebooks and web apps, a line says so.

    Raises:
        Interrupted: also in place of an error (except `UserError`) after a signal, e.g. of a compiler that Ctrl-C also
            stopped, or of a process that waited for a stopped one.
    """
    if threading.current_thread() is not threading.main_thread():
        if distributed.is_main():
            print(NOT_HANDLED, file=sys.stderr, flush=True)
        yield
        return
    handlers = {signal.SIGINT: _note, signal.SIGTERM: _note}
    if HAS_TIMER:
        handlers[signal.SIGALRM] = _stop_if_overdue
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except UserError:
        raise
    except Exception:
        check()
        raise
    finally:
        if HAS_TIMER:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _now.received = 0


def _note(number: int, _: object) -> None:
    """The handler of SIGINT and SIGTERM."""
    if _now.received:
        if time.monotonic() - _now.at > REPEAT:
            os._exit(128 + number)
        return
    _now.received, _now.at = number, time.monotonic()
    if distributed.is_main():
        name = signal.Signals(number).name
        text = f"\n{name}: stopping and saving; another signal after {REPEAT:.0f} s ends without saving\n"
        os.write(2, text.encode())
    if HAS_TIMER:
        signal.setitimer(signal.ITIMER_REAL, GRACE, AGAIN)
