"""Errors that a user can fix: one line, exit status 2, no traceback."""

import difflib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

PRINT_SECONDS = 5.0  # how long another process waits for the first one to print an error


class UserError(ValueError):
    """A wrong flag, file or data set. The message is one line that says what was found and what to do."""


def require(condition: object, message: str) -> None:
    """Raise a `UserError` with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def blame(flag: str) -> Iterator[None]:
    """Begin the message of a `UserError` that is raised inside with `flag: `, unless it begins with a flag."""
    try:
        yield
    except UserError as error:
        if flag and not str(error).startswith(("--", f"{flag}: ")):
            error.args = (f"{flag}: {error}",)
        raise


class Interrupted(BaseException):
    """The signal `number` asked the run to stop. It is no `Exception`, so that no library swallows it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def unknown_name(what: str, name: str, accepted: Iterable[str]) -> str:
    """The message for a name that is not in `accepted`; it lists them all and suggests the nearest, if one is close."""
    accepted = list(accepted)
    by_lower = {a.lower(): a for a in reversed(accepted)}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    hint = f"; did you mean {by_lower[nearest[0]]}?" if nearest else ""
    return f"unknown {what} {name!r}{hint or '.'} Accepted: {', '.join(accepted)}"


def one_line(value: object, most: int = 160) -> str:
    """A value or an error as one printable line of at most `most` characters; its type name if the text is empty."""
    text = " ".join(str(value).split()) or type(value).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def named(names: Sequence[str], most: int = 20) -> str:
    """The first `most` of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def under_torchrun() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def print_line(line: str, stream: TextIO | None = None) -> None:
    """Print a line (default: on stdout) in one write, so that processes do not mix their lines.

    If the reader of the stream has gone (`| head`), this line and the next ones are dropped.
    """
    try:
        print(f"{line}\n", end="", file=stream, flush=True)
    except BrokenPipeError:
        drop_output(stream or sys.stdout)


def drop_output(stream: TextIO) -> None:
    """Let a stream whose reader has gone write to nowhere, so that neither this program nor Python's exit fails."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(prog: str, message: object, wait: bool = True) -> int:
    """Print an error as one line on stderr; return the exit status, 2.

    Usually all processes of `torchrun` meet an error, and the first one prints it while the others `wait`.
    If `torchrun` has not ended them by then, only they met the error, and they print it.
    """
    if wait and under_torchrun() and os.environ["RANK"] != "0":
        time.sleep(PRINT_SECONDS)
    where = f"process {os.environ['RANK']}: " if under_torchrun() else ""
    print_line(f"{prog}: error: {where}{' '.join(str(message).split())}", sys.stderr)
    return 2
