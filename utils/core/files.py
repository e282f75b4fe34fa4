"""Files: atomic, durable writes that never follow links; text, JSON and CSV of bounded size."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

from utils.core.errors import UserError, blame, one_line, require

MAX_TEXT = 256 << 20  # bytes of a text file
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_UNFINISHED = ".unfinished"
_UMASK = os.umask(0o077)  # it can be read only by setting it
os.umask(_UMASK)


def atomic_write(path: Path, write: Callable[[BinaryIO], None], keep: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    With `keep`, an existing file at `path` is first renamed to `keep`.
    A `UserError` tells of a full disk or a read-only folder; `path` is then unchanged.
    """
    path, unfinished = Path(path), None
    try:
        handle, unfinished = tempfile.mkstemp(_UNFINISHED, f".{path.name}.", path.parent)
        with open(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o666 & ~_UMASK)
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(unfinished, path)
    except BaseException as error:
        if unfinished is not None:
            os.unlink(unfinished)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        reason = error if isinstance(error, OSError) else "not all of it could be written"  # RuntimeError of torch.save
        raise UserError(f"cannot write {path}: {reason}. Free space or choose another folder") from None


def save_pt(path: Path, value: object, keep: Path | None = None) -> None:
    """Call `torch.save` atomically: a failure leaves the old file; with `keep`, it is kept under that name."""
    atomic_write(path, lambda file: torch.save(value, file), keep)


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically: a failure leaves the old file."""
    atomic_write(path, lambda file: file.write(text.encode(errors="replace")))


def save_output(path: str, text: str) -> None:
    """Write the text file of a flag `--out`; its folder is made. A `UserError` tells why it cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make {Path(path).parent}: {error}") from None
    save_text(Path(path), text)


def append_line(path: Path, line: str, sync: bool = True) -> None:
    """Append a line, whole or not at all; a `UserError` tells of a full disk or a read-only folder.

    With `sync` it is on the disk when this returns.
    Without, it survives a crash of this process, but not a power cut in the next seconds.
    """
    data, written = (line + "\n").encode(errors="replace"), 0
    try:
        with open(path, "ab", buffering=0, opener=open_no_link) as file:
            try:
                while written < len(data):  # a nearly full disk may accept only a part
                    written += file.write(data[written:])
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(file.seek(0, os.SEEK_END) - written)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}. Free space or choose another folder") from None


def sync_file(path: Path) -> None:
    """Flush a file to the disk; do nothing if it does not exist."""
    with suppress(FileNotFoundError), open(path, "rb", opener=open_no_link) as file, suppress(OSError):
        os.fsync(file.fileno())


def remove_files(folder: Path, pattern: str) -> None:
    """Remove the regular files of `folder` that match a glob pattern; a `UserError` tells why one stays."""
    for path in folder.glob(pattern):
        if path.is_file() and not path.is_symlink():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {path}: {error}") from None


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files that a killed `atomic_write` left in `folder`; call it only with the folder locked."""
    remove_files(folder, f".*{_UNFINISHED}")


def open_no_link(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses symbolic links and never blocks on a named pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def check_file(path: Path) -> Path:
    """Return `path` if it is a regular file; raise a `UserError` otherwise."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, False also for names that are too long
        there = "not a file" if os.path.lexists(path) else "not there"
        raise UserError(f"{path} is {there}; give an existing file")
    return path


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file; an `OSError` if it is none, cannot be read, or has more than `most` bytes."""
    if not os.path.isfile(path):
        raise OSError("it is no regular file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError("it is too large")
    return data


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; none if it does not exist. A `UserError` tells why it cannot be read."""
    if not os.path.lexists(path):
        return []
    try:
        return read_bytes(path, MAX_TEXT).decode(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}. Move it away") from None


def read_json(path: Path, what: str, most: int = 1 << 20) -> dict:
    """The JSON object in a file of at most `most` bytes.

    A `UserError`, which `what` begins, tells of a file that is missing, damaged or too large, or holds no object.
    """
    with blame(what):
        path = check_file(path)
        try:
            value = json.loads(read_bytes(path, most))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {one_line(error)}") from None
        require(isinstance(value, dict), f"{path} is damaged: it holds no JSON object")
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
