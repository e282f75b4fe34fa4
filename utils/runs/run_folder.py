"""Run folders: how they are made and locked, and what is written into them: logs, metrics, arguments."""

import json
import math
import os
import shlex
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from statistics import fmean
from typing import IO

from utils.compute import distributed
from utils.compute.version import git_commit, versions
from utils.core import files
from utils.core.errors import UserError, print_line
from utils.runs.progress import LOG_EVERY, Progress

ARGS = "args.json"
LOCK = ".lock"
LOG = "logs.txt"
METRICS = "metrics.jsonl"


class RunFolder:
    """The folder of one run, with its logs and files. It is locked until the process ends."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.is_main = distributed.is_main()
        self.tensorboard = None  # the writer of --tensorboard
        if self.is_main:
            self.lock = lock(self.path)
            files.remove_files(self.path, f".*{files.UNFINISHED}")  # that a killed run left

    @classmethod
    def create(cls, root: str | Path, *parts: str | int, name: str | None = None, ending: str = "") -> "RunFolder":
        """Create `root/parts…/<name><ending>`; `name` defaults to the time, `YYYYMMDD-HHMMSS`. No two runs share one.

        A name that is taken gets a suffix: `-2`, `-3`, ….
        """
        name = (name or datetime.now().strftime("%Y%m%d-%H%M%S")) + ending
        path = _new_folder(Path(root).joinpath(*map(str, parts)), name) if distributed.is_main() else None
        return cls(distributed.from_main(path))

    def log(self, *messages: str, show: bool = True) -> None:
        """Append each message with the time to `logs.txt`, and print it if `show`. Only rank 0 does so."""
        if self.is_main:
            for message in messages:
                self._log(message, show)

    def log_own(self, message: str) -> None:
        """Like `log`, but on every rank, for messages about this process alone."""
        self._log(message if self.is_main else f"process {distributed.rank()}: {message}")

    def _log(self, message: str, show: bool = True) -> None:
        if show:
            print_line(message)
        files.append_line(self.path / LOG, f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {message}")

    def sync(self) -> None:
        """Flush all appended lines to the disk, before something relies on them, e.g. a checkpoint."""
        for name in (LOG, METRICS):
            files.sync_file(self.path / name)

    def metric(self, **values: object) -> None:
        """Append `values` and the time to `metrics.jsonl`, whatever the rank; non-finite numbers become null."""
        plain = {name: _finite(value) for name, value in values.items()}
        line = {"time": datetime.now().isoformat(timespec="milliseconds"), **plain}
        files.append_line(self.path / METRICS, json.dumps(line))
        if self.tensorboard is not None:
            self._add_events(plain)

    def keep_metrics(self, keep: Callable[[dict], bool]) -> None:
        """Drop the lines of `metrics.jsonl` that a resumed run writes again (`keep` is false), and damaged ones."""
        if self.is_main:
            kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if keep(line)]
            files.save_text(self.path / METRICS, "".join(kept))

    def start_tensorboard(self) -> None:
        """Write metrics as TensorBoard events, too; those that are there replace earlier events."""
        from torch.utils.tensorboard import SummaryWriter

        files.remove_files(self.path, "events.out.tfevents.*")
        self.tensorboard = SummaryWriter(str(self.path))
        for line in read_metrics(self.path):
            self._add_events(line)

    def _add_events(self, line: dict) -> None:
        """Each number, and the mean of each list, at its iteration and under its experiment."""
        prefix = f"experiment{line['experiment']}/" + (f"{line['model']}/" if "model" in line else "")
        for name, value in line.items():
            if isinstance(value, list) and (known := [v for v in value if v is not None]):
                value = fmean(known)
            if isinstance(value, (int, float)) and name not in ("iteration", "experiment"):
                self.tensorboard.add_scalar(prefix + name, value, line["iteration"])
        self.tensorboard.flush()

    def save_args(self, flags: dict, **more: object) -> None:
        """Write the flags to `args` (JSON, as in published runs); `args.json` adds the command, versions and `more`."""
        if not self.is_main:
            return
        about = {"script": Path(sys.argv[0]).name, "command": shlex.join(sys.orig_argv), "flags": flags}
        about |= {"started": _now(), "git_commit": git_commit(), "finished": None, "versions": versions()}
        _save_json(self.path / "args", flags)
        _save_json(self.path / ARGS, about | {"processes": distributed.world_size(), **more})

    def update_args(self, flags: dict, **more: object) -> None:
        """Record in `args.json` the command that resumed the run, the flags that now apply, and `more`."""
        if not self.is_main:
            return
        about = read_args(self.path)
        now = {"command": shlex.join(sys.orig_argv), "at": _now(), "git_commit": git_commit(), "versions": versions()}
        about |= {
            "flags": about["flags"] | flags | {"resume": None},
            "resumed": [*about.get("resumed", []), now],
            "finished": None,
            "processes": distributed.world_size(),
        }
        _save_json(self.path / ARGS, about | more)

    def finish(self) -> None:
        """Record in `args.json` that the run has come to its end, and when."""
        if self.is_main:
            _save_json(self.path / ARGS, read_args(self.path) | {"finished": _now()})

    def progress(
        self, total: int, what: str, start: int = 0, every: int = LOG_EVERY
    ) -> AbstractContextManager[Progress]:
        """The progress of a loop: a bar on a terminal, else a log line every `every` steps."""
        return closing(Progress(self.log, total, what, start, every, with_bar=self.is_main))


def _new_folder(parent: Path, name: str) -> Path:
    """Make the folder, with a suffix where there is one of that name."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in chain([""], (f"-{attempt}" for attempt in count(2))):
            with suppress(FileExistsError):
                (parent / f"{name}{suffix}").mkdir()
                return parent / f"{name}{suffix}"
    except OSError as error:
        raise UserError(f"--save_path: cannot make a folder in {parent}: {error}") from None


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def _save_json(path: Path, value: dict) -> None:
    files.save_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run folder's `metrics.jsonl`, without what a crash left of one. Takes no lock."""
    lines = []
    for text in files.read_lines(folder / METRICS):
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def _finite(value: object) -> object:
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_args(folder: Path) -> dict:
    """The content of a run folder's `args.json`, with at least `script` and `flags`.

    Raises:
        UserError: when there is none, or it is damaged.
    """
    path = Path(folder) / ARGS
    if not os.path.isfile(path):
        raise UserError(f"--resume: {folder} is no run folder: it has no file {ARGS}. Give the folder of a run")
    about = files.read_json(path, "--resume")
    if not isinstance(about.get("flags"), dict) or not isinstance(about.get("script"), str):
        raise UserError(f"--resume: {path} is damaged: it has no flags. Give the folder of another run")
    return about


def lock(folder: Path) -> IO:
    """Lock a run folder for this process, for as long as the file that is returned is open.

    Where there are no such locks, as on some network file systems, the run goes on without one. The package filelock
    leaves a file there that a killed run would never remove.

    Raises:
        UserError: when another process holds the lock, or the folder is read-only.
    """
    try:
        file = open(folder / LOCK, "a+", encoding="utf-8", opener=files.open_no_link)  # noqa: SIM115 - see above
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error}. Choose another folder") from None
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read(200).strip() or "another process"
        file.close()
        raise UserError(f"{folder} is a live run of {owner}; wait for it, or stop it first") from None
    except (ImportError, OSError):  # there are no such locks; Windows has none at all
        pass
    with suppress(OSError):  # the owner is only for the message; a full disk leaves it out
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file
