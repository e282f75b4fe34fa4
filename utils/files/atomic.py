"""Files that last: written whole or not at all, logs that reach the disk at once, folders with one owner."""

import hashlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

from utils.core.errors import UserError

_UNFINISHED = ".unfinished"
_MOST_LINES = 256 << 20  # bytes of a text file that is read


def atomic_write(path: Path, write: Callable[[BinaryIO], None], keep: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    With `keep`, what `path` was before is renamed to that.

    Raises:
        UserError: when the disk is full or the folder is read-only; `path` is then as it was before.
    """
    path = Path(path)
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED, delete=False
        ) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                if keep is not None and path.exists():
                    os.replace(path, keep)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else "not all of it could be written"  # torch.save's words for it
        raise UserError(f"cannot write {path}: {reason}. Free space or choose another --save_path") from None


def save_pt(path: Path, value: object, keep: Path | None = None) -> None:
    """`torch.save` that either completes or leaves the old file; with `keep` the old file is kept under that name."""
    atomic_write(path, lambda file: torch.save(value, file), keep)


def save_text(path: Path, text: str) -> None:
    """Write a text file that either completes or leaves the old one."""
    atomic_write(path, lambda file: file.write(text.encode()))


def append_line(path: Path, line: str) -> None:
    """Append a line, whole or not at all, and flush it to the disk.

    Raises:
        UserError: when the disk is full or the folder is read-only.
    """
    data = (line + "\n").encode(errors="replace")
    written = 0
    try:
        with open(path, "ab", buffering=0, opener=_open_itself) as file:
            try:
                while written < len(data):  # a disk that runs full takes a part
                    written += file.write(data[written:])
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(file.seek(0, os.SEEK_END) - written)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}. Free space or choose another --save_path") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; none where there is no file.

    Raises:
        UserError: when it cannot be read, or has more than 256 MiB.
    """
    if not os.path.lexists(path):
        return []
    try:
        return read_bytes(path, _MOST_LINES).decode(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}. Move it away") from None


def read_bytes(path: Path, most: int) -> bytes:
    """All of a regular file of at most `most` bytes.

    Raises:
        OSError: when it is something else, cannot be read, or is larger.
    """
    if not os.path.isfile(path):
        raise OSError("it is no regular file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError("it is too large")
    return data


def remove_files(folder: Path, pattern: str) -> None:
    """Take away the regular files of `folder` that match.

    Raises:
        UserError: when one cannot be removed.
    """
    for path in folder.glob(pattern):
        if path.is_file() and not path.is_symlink():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {path}: {error}") from None


def remove_unfinished(folder: Path) -> None:
    """Take away what `atomic_write` left in `folder` when its process was killed; for the owner of the folder."""
    remove_files(folder, f".*{_UNFINISHED}")


def _open_itself(path: str, flags: int) -> int:
    """For `open`: neither through a link, which could lead anywhere, nor waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o644)


def fingerprint(tensors: Iterable[torch.Tensor | None]) -> str:
    """SHA-256 of the types, shapes and values of tensors, in hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
        else:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


class RunLock:
    """Held as long as the process lives, however it dies, by whoever writes into a run folder."""

    def __init__(self, folder: Path):
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            path = folder / ".lock"
            self.file = open(path, "a+", encoding="utf-8", opener=_open_itself)  # noqa: SIM115 - as long as the process lives
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error}. Choose another --save_path") from None
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.seek(0)
            owner = self.file.read(200).strip() or "another process"
            self.file.close()
            raise UserError(f"--resume: {folder} is a live run of {owner}; wait for it, or stop it first") from None
        with suppress(OSError):  # who it is helps the reader of the message; on a full disk there is none
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.file.flush()
