"""Run folders: how they are made and locked, and what is written into them: logs, metrics, arguments."""

import errno
import json
import math
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from utils.compute import distributed
from utils.compute.version import git_commit, versions
from utils.core.errors import UserError, print_line
from utils.core.files import append_line, open_no_link, read_json, read_lines, remove_unfinished, save_text, sync_file
from utils.runs.progress import LOG_EVERY, Progress
from utils.runs.tensorboard import TensorBoardWriter

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

ARGS = "args.json"
LOCK = ".lock"
METRICS = "metrics.jsonl"
SYNC_SECONDS = 1.0  # between two flushes of a log to the disk


class RunFolder:
    """The folder of one run, with its logs and files. It is locked until the process ends."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.is_main = distributed.is_main()
        self.lock = RunLock(self.path) if self.is_main else None
        if self.is_main:
            remove_unfinished(self.path)
        self.tensorboard: TensorBoardWriter | None = None  # set if --tensorboard is given
        self.synced: dict[str, float] = {}  # time of the last flush to the disk, by file name

    @classmethod
    def create(cls, root: str | Path, *parts: str | int, name: str | None = None, ending: str = "") -> "RunFolder":
        """Create `root/parts…/<name><ending>`; `name` defaults to the time, `YYYYMMDD-HHMMSS`. No two runs share one.

        A name that is taken gets a suffix: `-2`, `-3`, ….
        """
        parent = Path(root).joinpath(*map(str, parts))
        path = cls._make(parent, name, ending) if distributed.is_main() else None
        return cls(distributed.from_main(path))

    @staticmethod
    def _make(parent: Path, name: str | None, ending: str) -> Path:
        name = (name or datetime.now().strftime("%Y%m%d-%H%M%S")) + ending
        try:
            parent.mkdir(parents=True, exist_ok=True)
            attempt = 1
            while True:
                path = parent / (name if attempt == 1 else f"{name}-{attempt}")
                try:
                    path.mkdir()
                    return path
                except FileExistsError:
                    attempt += 1
        except OSError as error:
            raise UserError(f"--save_path: cannot make a folder in {parent}: {error}") from None

    def log(self, message: str) -> None:
        """Print a line, and append it with the time to `logs.txt`. Only rank 0 does so."""
        if self.is_main:
            print_line(message)
        self.log_file_only(message)

    def log_own(self, message: str) -> None:
        """Like `log`, but on every rank, for messages about this process alone."""
        if self.is_main:
            self.log(message)
            return
        message = f"process {distributed.rank()}: {message}"
        print_line(message)
        self._append_log(message)

    def log_file_only(self, message: str) -> None:
        """Append a line with the time to `logs.txt`. Only rank 0 does so."""
        if self.is_main:
            self._append_log(message)

    def _append_log(self, message: str) -> None:
        self._append("logs.txt", f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {message}")

    def _append(self, name: str, line: str) -> None:
        """Append a line to a file of the folder; flush the file to the disk at most once a second."""
        now = time.monotonic()
        sync = now - self.synced.get(name, -SYNC_SECONDS) >= SYNC_SECONDS
        append_line(self.path / name, line, sync)
        if sync:
            self.synced[name] = now

    def sync(self) -> None:
        """Flush all appended lines to the disk, before something relies on them, e.g. a checkpoint."""
        for name in self.synced:
            sync_file(self.path / name)

    def metric(self, **values: object) -> None:
        """Append `values` and the time to `metrics.jsonl`, whatever the rank; non-finite numbers become null."""
        plain = {k: [_finite(x) for x in v] if isinstance(v, list) else _finite(v) for k, v in values.items()}
        line = {"time": datetime.now().isoformat(timespec="milliseconds"), **plain}
        self._append(METRICS, json.dumps(line))
        if self.tensorboard is not None:
            self.tensorboard.add(plain)

    def metrics(self) -> list[dict]:
        """The lines of `metrics.jsonl`, parsed; damaged ones are skipped."""
        return read_metrics(self.path)

    def keep_metrics(self, keep: Callable[[dict], bool]) -> None:
        """Drop damaged lines of `metrics.jsonl`, and those that a resumed run writes again (`keep` is false)."""
        if self.is_main:
            save_text(self.path / METRICS, "".join(line + "\n" for line in _kept_lines(self.path, keep)))

    def save_args(self, flags: dict, **more: object) -> None:
        """Write the flags to `args` (JSON, as in published runs); `args.json` adds the command, versions and `more`."""
        if not self.is_main:
            return
        save_text(self.path / "args", json.dumps(flags, indent=1, default=str) + "\n")
        about = {"script": Path(sys.argv[0]).name, "command": shlex.join(sys.orig_argv), "flags": flags}
        about |= {"started": datetime.now().isoformat(timespec="seconds"), "git_commit": git_commit()}
        about |= {"finished": None, "versions": versions(), "processes": distributed.world_size(), **more}
        save_text(self.path / ARGS, json.dumps(about, indent=1, default=str) + "\n")

    def update_args(self, flags: dict, **more: object) -> None:
        """Record in `args.json` the command that resumed the run, the flags that now apply, and `more`."""
        if not self.is_main:
            return
        about = read_args(self.path)
        resumed = about.get("resumed") if isinstance(about.get("resumed"), list) else []
        now = {"command": shlex.join(sys.orig_argv), "at": datetime.now().isoformat(timespec="seconds")}
        now |= {"git_commit": git_commit(), "versions": versions()}
        about |= {"flags": flags | {"resume": None}, "resumed": [*resumed, now], **more}
        save_text(self.path / ARGS, json.dumps(about | {"finished": None}, indent=1, default=str) + "\n")

    def finish(self) -> None:
        """Record in `args.json` that the run has come to its end, and when."""
        if not self.is_main:
            return
        about = read_args(self.path) | {"finished": datetime.now().isoformat(timespec="seconds")}
        save_text(self.path / ARGS, json.dumps(about, indent=1, default=str) + "\n")

    @contextmanager
    def progress(self, total: int, what: str, start: int = 0, every: int = LOG_EVERY) -> Iterator[Progress]:
        """Show the progress of a loop: a bar on a terminal, else a log line every `every` steps."""
        progress = Progress(self.log, self.log_file_only, total, what, start, every, with_bar=self.is_main)
        try:
            yield progress
        finally:
            progress.close()


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run folder's `metrics.jsonl`, parsed; damaged ones are skipped. Takes no lock."""
    return [json.loads(line) for line in _kept_lines(folder, lambda line: True)]


def _kept_lines(folder: Path, keep: Callable[[dict], bool]) -> list[str]:
    """The lines of `metrics.jsonl` that are whole and for which `keep` is true."""
    kept = []
    for line in read_lines(folder / METRICS):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            value = json.loads(line)
            if _is_metric(value) and keep(value):
                kept.append(line)
    return kept


def _is_metric(line: object) -> bool:
    """Whether a parsed line of `metrics.jsonl` has the form that `RunFolder.metric` writes."""
    if not isinstance(line, dict) or not isinstance(line.get("time", ""), str):
        return False
    counts = [line[name] for name in ("experiment", "iteration", "network", "epoch") if name in line]
    rest = [v for name, v in line.items() if name not in ("time", "model")]
    numbers = [x for v in rest for x in (v if isinstance(v, list) else [v])]
    return (
        isinstance(line.get("model", ""), str)
        and all(type(n) is int and 0 <= n < 1 << 31 for n in counts)
        and [] not in rest
        and all(x is None or (type(x) in (int, float) and abs(x) < math.inf) for x in numbers)
    )


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_args(folder: Path) -> dict:
    """The content of a run folder's `args.json`, with at least `script` and `flags`.

    Raises:
        UserError: when there is none, or it is damaged.
    """
    path = Path(folder) / ARGS
    if not os.path.isfile(path):
        raise UserError(f"--resume: {folder} is no run folder: it has no file {ARGS}. Give the folder of a run")
    about = read_json(path, "--resume")
    if not isinstance(about.get("flags"), dict) or not isinstance(about.get("script"), str):
        raise UserError(f"--resume: {path} is damaged: it has no flags. Give the folder of another run")
    return about


def is_live(folder: Path) -> bool:
    """Whether another process holds the lock of a run folder. Asking needs no right to write, and takes no lock."""
    path = Path(folder) / LOCK
    try:
        if not os.path.isfile(path):
            return False
        file = open(path, "rb", opener=open_no_link)  # noqa: SIM115 - closed below
    except OSError:  # a folder of somebody else
        return False
    with file:
        return _is_held(file, shared=True)  # several processes may ask at once


def _is_held(file: IO, shared: bool) -> bool:
    """Try to lock a file until it is closed; returns whether another process holds the lock.

    Where there are no such locks, as on some network file systems, nobody holds one.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


class RunLock:
    """The lock of a process on its run folder, released when the process ends; a `UserError` if another holds it.

    The package filelock would do less: it cannot ask without the right to write, and where a file system has no locks
    it leaves a file that a killed run would never remove.
    """

    def __init__(self, folder: Path):
        try:  # the file stays open as long as the process lives
            self.file = open(folder / LOCK, "a+", encoding="utf-8", opener=open_no_link)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error}. Choose another folder") from None
        if _is_held(self.file, shared=False):
            self.file.seek(0)
            owner = self.file.read(200).strip() or "another process"
            self.file.close()
            raise UserError(f"{folder} is a live run of {owner}; wait for it, or stop it first")
        with suppress(OSError):  # the owner is only for the message; a full disk leaves it out
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.file.flush()
