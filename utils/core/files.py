"""Files: atomic, durable writes; reading text, JSON, YAML and NumPy arrays without trusting them; CSV."""

import csv
import io
import json
import os
import secrets
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import yaml

from utils.core.errors import UserError, blame, one_line, require

UNFINISHED = ".unfinished"  # ends the names of the temporary files of `atomic_write`


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a `UserError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}. Free space or choose another folder") from None


def atomic_write(path: Path, write: Callable[[BinaryIO], None], keep: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    With `keep`, an existing file at `path` is first renamed to `keep`.
    A `UserError` tells of a full disk or a read-only folder; `path` is then unchanged.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}")
    with writing(path):
        try:
            with open(unfinished, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(unfinished, path)
        except RuntimeError as error:  # as torch.save says it
            raise OSError(f"not all of it could be written ({one_line(error)})") from None
        finally:
            with suppress(OSError):
                unfinished.unlink()  # after an error


def save_pt(path: Path, value: object, keep: Path | None = None) -> None:
    """Call `torch.save` atomically: a failure leaves the old file; with `keep`, it is kept under that name."""
    atomic_write(path, lambda file: torch.save(value, file), keep)


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically: a failure leaves the old file."""
    atomic_write(path, lambda file: file.write(text.encode(errors="replace")))


def save_output(path: str, text: str) -> None:
    """Write the text file of a flag `--out`; its folder is made. A `UserError` tells why it cannot be written."""
    with blame("--out"), writing(Path(path)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_text(Path(path), text)


def append_line(path: Path, line: str) -> None:
    """Append a line, whole or not at all; a `UserError` tells of a full disk or a read-only folder.

    It survives a crash of this process, but not a power cut in the next seconds, see `sync_file`.
    """
    data, written = (line + "\n").encode(errors="replace"), 0
    with writing(path), open(path, "ab", buffering=0, opener=open_no_link) as file:
        try:
            while written < len(data):  # a nearly full disk may accept only a part
                written += file.write(data[written:])
        except OSError:
            with suppress(OSError):
                file.truncate(file.seek(0, os.SEEK_END) - written)
            raise


def sync_file(path: Path) -> None:
    """Flush a file to the disk; do nothing if it does not exist."""
    with suppress(FileNotFoundError), open(path, "rb", opener=open_no_link) as file, suppress(OSError):
        os.fsync(file.fileno())


def remove_files(folder: Path, pattern: str) -> None:
    """Remove the files of `folder` that match a glob pattern; a `UserError` tells why one stays."""
    for path in folder.glob(pattern):
        if path.is_file():
            with writing(path):
                path.unlink(missing_ok=True)


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


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; none if it does not exist. A `UserError` tells why it cannot be read."""
    if not os.path.lexists(path):
        return []
    path = check_file(path)
    with _reading(path, "text"):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()


def read_json(path: Path, what: str) -> dict:
    """The JSON object in a file.

    A `UserError`, which `what` begins, tells of a file that is missing or damaged, or holds no object.
    """
    with blame(what):
        path = check_file(path)
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {one_line(error)}") from None
        require(isinstance(value, dict), f"{path} is damaged: it holds no JSON object")
        return value


class _Texts(yaml.BaseLoader):
    """Reads every value of YAML as the text that is written, and refuses a name that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The names and values of one level."""
        names = Counter(str(key.value).replace("-", "_") for key, _ in node.value)
        if twice := [name for name, times in names.items() if times > 1]:
            raise yaml.YAMLError(f"it gives {', '.join(twice)} twice; give each once")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> dict:
    """The names and values in a YAML file, at every level; values are texts and lists of them.

    A `UserError`, which `what` begins, tells of a file that is missing or damaged, holds no names, or one twice.
    """
    with blame(what):
        path = check_file(path)
        try:
            value = yaml.load(path.read_text(encoding="utf-8"), _Texts)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}. Mend it") from None
        require(isinstance(value, dict), f"{path} holds no names and values; write `name: value` in each line")
        return value


def read_npy(path: Path) -> np.ndarray:
    """Memory-map a `.npy` array (copy-on-write). A `UserError` tells of anything but a plain array."""
    path = check_file(path)
    with _reading(path, "a .npy array"):
        return np.lib.format.open_memmap(path, mode="c")


def read_npz(path: Path, keys: Sequence[str]) -> list[np.ndarray]:
    """The arrays `keys` of an `.npz` file. A `UserError` names the missing key or the damage."""
    path = check_file(path)
    with _reading(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        has = ", ".join(sorted(name.removesuffix(".npy") for name in names)[:10]) or "nothing"
        arrays = []
        for key in keys:
            told = f"it has no key {key!r}; it needs {', '.join(keys)} and has {has}"
            require(f"{key}.npy" in names, told)
            with archive.open(f"{key}.npy") as member:
                arrays.append(np.lib.format.read_array(member, allow_pickle=False))
                require(not member.read(1), "it is damaged")  # at the end zipfile compares the checksum
        return arrays


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into a `UserError`, and say nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise UserError(f"cannot read {path} as {what}: {one_line(error, 300)}") from None


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV. A text that a spreadsheet would compute gets an apostrophe before it; numbers stay as they are."""

    def inert(cell: object) -> object:
        """The cell, as a spreadsheet shows it and does not compute it."""
        try:
            float(cell)
        except (TypeError, ValueError):
            return f"'{cell}" if str(cell).startswith(("=", "+", "-", "@", "\t", "\r")) else cell
        return cell

    text = io.StringIO()
    csv.writer(text).writerows([inert(cell) for cell in row] for row in rows)
    return text.getvalue()
