"""Errors that a user can mend: one line, exit status 2, no traceback."""

import difflib
import os
import signal
import sys
from collections.abc import Iterable


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


def several() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def said_once(prog: str, message: object) -> int:
    """Print an error line, under `torchrun` by the first process alone; returns the exit status."""
    return said(prog, message) if os.environ.get("RANK", "0") == "0" else 2


def said(prog: str, message: object) -> int:
    """Print an error line; returns the exit status."""
    where = f"process {os.environ.get('RANK')}: " if several() else ""
    print(f"{prog}: error: {where}{' '.join(str(message).split())}", file=sys.stderr, flush=True)
    return 2


def _short(value: object, most: int = 160) -> str:
    """One printable line of at most `most` characters."""
    line = " ".join(str(value).split())
    return "".join(c if c.isprintable() else "?" for c in line[:most])


def _first_line(error: Exception) -> str:
    return _short((str(error).strip() or type(error).__name__).splitlines()[0])
