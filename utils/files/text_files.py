"""Reading text and JSON files of bounded size, the check that a path is a regular file, and CSV for spreadsheets."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from utils.core.errors import UserError, one_line

MAX_TEXT = 256 << 20  # bytes of a text file
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def check_file(path: Path, flag: str) -> Path:
    """Return `path` if it is a regular file; raise a `UserError` that names `flag` otherwise."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, False also for names that are too long
        there = "not a file" if os.path.lexists(path) else "not there"
        raise UserError(f"{flag}: {path} is {there}; give an existing file")
    return path


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: when it is not a regular file, cannot be read, or is larger.
    """
    if not os.path.isfile(path):
        raise OSError("it is no regular file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError("it is too large")
    return data


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; an empty list if it does not exist.

    Raises:
        UserError: when it cannot be read, or has more than 256 MiB.
    """
    if not os.path.lexists(path):
        return []
    try:
        return read_bytes(path, MAX_TEXT).decode(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}. Move it away") from None


def read_json(path: Path, what: str, most: int = 1 << 20) -> dict:
    """The JSON object in a file of at most `most` bytes.

    Raises:
        UserError: when the file is missing, damaged, too large, or does not hold an object.
    """
    path = check_file(path, what)
    try:
        value = json.loads(read_bytes(path, most))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: {path} is damaged: {one_line(error)}") from None
    return value


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV. A text that a spreadsheet would compute gets an apostrophe before it; numbers stay as they are."""
    text = io.StringIO()
    csv.writer(text).writerows([_inert(cell) for cell in row] for row in rows)
    return text.getvalue()


def _inert(cell: object) -> object:
    if not isinstance(cell, str) or not cell.startswith(FORMULA_STARTS):
        return cell
    with suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"
