"""Stopping a run from outside: the first SIGINT or SIGTERM lets the current step end, a second one ends all at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from utils.compute import distributed
from utils.core.errors import Interrupted, UserError

_received = 0


def received() -> int:
    """The number of the signal that this process got, 0 for none."""
    return _received


def check() -> None:
    """Raise `Interrupted` on every process if one of them got a signal. Under `torchrun` all must call it."""
    number = distributed.largest(_received)
    if number:
        raise Interrupted(number)


@contextmanager
def catch() -> Iterator[None]:
    """Note SIGINT and SIGTERM instead of dying of them; the second of them ends the process at once.

    Raises:
        Interrupted: instead of an error that came after a signal.
    """
    global _received
    _received = 0
    before = {number: signal.signal(number, _note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (Interrupted, UserError):
        raise
    except Exception:
        if not _received:
            raise
        raise Interrupted(_received, between_steps=False) from None  # a terminal's Ctrl-C also ends compilers at work
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received = 0


def _note(number: int, frame: object) -> None:
    global _received
    if _received:
        os._exit(128 + number)
    _received = number
    if distributed.rank() == 0:
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping after this step; a second signal stops at once, without saving\n".encode())
