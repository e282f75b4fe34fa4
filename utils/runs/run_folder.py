"""Run folders: where they are, how files get into them, what is logged and how progress is shown."""

import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from utils.compute import distributed
from utils.core.errors import UserError
from utils.files.atomic import RunLock, append_line, read_lines, remove_unfinished, save_text
from utils.files.torch_files import read_json
from utils.runs.tensorboard import Scalars

VERSION = 1
STAGE1_ROOTS = ("result", "result-oe", "result-poe")
STAGE2_ROOTS = ("result-model-synthetic-no-oe", "result-model-synthetic-oe")
LOG_EVERY = 10
ARGS = "args.json"
METRICS = "metrics.jsonl"


class RunFolder:
    """A folder that belongs to one run: its log and its files. It is locked as long as the run lives."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.speaks = distributed.rank() == 0
        self.lock = RunLock(self.path) if self.speaks else None
        if self.speaks:
            remove_unfinished(self.path)
        self.scalars: Scalars | None = None  # set where --tensorboard is given

    @classmethod
    def create(cls, root: str | Path, *parts: str | int, name: str | None = None) -> "RunFolder":
        """Make `root/parts…/<name>`, by default named by the time, `YYYYMMDD-HHMMSS`; two runs never share one.

        A name that is taken gets a suffix: `-2`, `-3`, ….
        """
        parent = Path(root).joinpath(*map(str, parts))
        path = cls._make(parent, name) if distributed.rank() == 0 else None
        return cls(distributed.same(path))

    @staticmethod
    def _make(parent: Path, name: str | None) -> Path:
        name = name or datetime.now().strftime("%Y%m%d-%H%M%S")
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
        """Print a line, and append it with the time to `logs.txt`."""
        if self.speaks:
            print(message, flush=True)
        self.log_file_only(message)

    def log_file_only(self, message: str) -> None:
        """Append a line with the time to `logs.txt`."""
        if self.speaks:
            append_line(self.path / "logs.txt", f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {message}")

    def metric(self, **values: object) -> None:
        """Append an object with the time to `metrics.jsonl`; numbers that are not finite become null."""
        plain = {k: [_finite(x) for x in v] if isinstance(v, list) else _finite(v) for k, v in values.items()}
        line = {"time": datetime.now().isoformat(timespec="milliseconds"), **plain}
        append_line(self.path / METRICS, json.dumps(line))
        if self.scalars is not None:
            self.scalars.add(plain)

    def metrics(self) -> list[dict]:
        """The lines of `metrics.jsonl`, without what a crash damaged."""
        return [json.loads(line) for line in self._kept_lines(lambda line: True)]

    def keep_metrics(self, keep: Callable[[dict], bool]) -> None:
        """Take out of `metrics.jsonl` what a resumed run will write again, and a last line that a crash cut off."""
        if self.speaks:
            save_text(self.path / METRICS, "".join(line + "\n" for line in self._kept_lines(keep)))

    def _kept_lines(self, keep: Callable[[dict], bool]) -> list[str]:
        """The lines of `metrics.jsonl` that are whole and that `keep` wants."""
        kept = []
        for line in read_lines(self.path / METRICS):
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                value = json.loads(line)
                if _is_metric(value) and keep(value):
                    kept.append(line)
        return kept

    def save_args(self, flags: dict, **more: object) -> None:
        """Write the flags of the run to `args` (JSON, as the published code does), and to `args.json` with them what
        the result depends on, and `more`."""
        if not self.speaks:
            return
        save_text(self.path / "args", json.dumps(flags, indent=1, default=str) + "\n")
        about = {"script": Path(sys.argv[0]).name, "command": shlex.join(sys.orig_argv), "flags": flags}
        about |= {"started": datetime.now().isoformat(timespec="seconds"), "git_commit": git_commit()}
        about |= {"versions": versions(), "processes": distributed.world(), **more}
        save_text(self.path / ARGS, json.dumps(about, indent=1, default=str) + "\n")

    def update_args(self, flags: dict, **more: object) -> None:
        """Write to `args.json` what changed when the run was resumed, and by which command it was."""
        if not self.speaks:
            return
        about = read_json(self.path / ARGS, "--resume")
        resumed = about.get("resumed") if isinstance(about.get("resumed"), list) else []
        now = {"command": shlex.join(sys.orig_argv), "at": datetime.now().isoformat(timespec="seconds")}
        about |= {"flags": flags | {"resume": None}, "resumed": [*resumed, now | {"git_commit": git_commit()}], **more}
        save_text(self.path / ARGS, json.dumps(about, indent=1, default=str) + "\n")

    @contextmanager
    def progress(self, total: int, what: str, start: int = 0, every: int = LOG_EVERY) -> Iterator["Progress"]:
        """Show the progress of a loop: a bar on a terminal, else a log line every `every` steps."""
        progress = Progress(self, total, what, start, every)
        try:
            yield progress
        finally:
            progress.close()


def _is_metric(line: object) -> bool:
    """Whether a line of `metrics.jsonl` is such as `RunFolder.metric` writes."""
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


class Progress:
    """Counts the steps of a loop and shows the mean of each value since it was last shown.

    Values may be tensors on any device: they are added up there, and read only when they are shown.
    """

    def __init__(self, run: RunFolder, total: int, what: str, start: int, every: int):
        self.run, self.total, self.what, self.count, self.first = run, total, what, start, start
        self.every = every
        self.began = time.monotonic()
        self.sums: dict[str, torch.Tensor | float] = {}
        self.summed = 0
        self.noted = ""
        self.bar = None
        if sys.stderr.isatty() and run.speaks:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=what, initial=start, leave=False, dynamic_ncols=True)

    def step(self, **values: torch.Tensor | float) -> None:
        """Count one step."""
        self.count += 1
        self.summed += 1
        self.sums = {name: value + self.sums.get(name, 0) for name, value in values.items()}
        if self.bar is not None:
            self.bar.update()
        if self.count % self.every == 0 or self.count == self.total:
            self._show()

    def _show(self) -> None:
        text = "  ".join(f"{name} {float(total) / self.summed:.4f}" for name, total in self.sums.items())
        rate = (time.monotonic() - self.began) / (self.count - self.first)
        line = f"{self.what}: {self.count}/{self.total}  {text}  left {(self.total - self.count) * rate:.0f} s"
        self.sums, self.summed = {}, 0
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(filter(None, (text, self.noted))))
            self.run.log_file_only(line)
        else:
            self.run.log(line)

    def note(self, text: str) -> None:
        """Show `text` on the bar from now on."""
        self.noted = text
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.close()


def versions() -> dict[str, str | int | None]:
    """Versions of this program and of what its numbers depend on."""
    libraries = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"trustdd": VERSION, "python": platform.python_version(), **libraries, "cuda": torch.version.cuda}


def git_commit() -> str | None:
    """The commit of this code, with `+changes` where files differ from it; None where git does not know."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--exclude=*",
        "--abbrev=40",
        "--dirty=+changes",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def find_run_folder(
    roots: Sequence[str | Path], parts: Sequence[str | int], folder: str | None, holds: str, flag_roots: str
) -> Path:
    """Find a run folder that an earlier stage wrote.

    Args:
        roots: the save paths to look under.
        parts: method, dataset, model and ipc, the sub-folders of a root.
        folder: its name; None takes the newest one.
        holds: a glob pattern of a file that the folder must hold.
        flag_roots: how the message names the place that was searched, e.g. `--load_path`.
    Raises:
        UserError: when there is none, or when several roots have one of that name.
    """
    if folder is not None and (Path(folder).name != folder or folder in ("", ".", "..")):
        raise UserError(f"--folder: {folder!r} is not the name of a folder; give the name alone, e.g. 20230206-232257")
    places = [Path(root).joinpath(*map(str, parts)) for root in roots]
    named = [place / folder for place in places] if folder else [p for place in places for p in _folders(place)]
    there = [path for path in named if path.is_dir()]
    found = [path for path in there if any(path.glob(holds))]
    where = ", ".join(map(str, places))
    if not found:
        what = f"--folder: no {folder}" if folder else "no run folder"
        bare = f" ({', '.join(map(str, there[:3]))} has no {holds})" if there else ""
        raise UserError(f"{what} under {where}{bare}. Run the stage before, or give {flag_roots} and --folder")
    if folder and len(found) > 1:
        raise UserError(
            f"--folder: {folder} is there {len(found)} times: {', '.join(map(str, found))}. Give {flag_roots}"
        )
    return max(found, key=lambda path: (path.stat().st_mtime, path.name))


def _folders(place: Path) -> list[Path]:
    return [p for p in place.iterdir() if p.is_dir()] if place.is_dir() else []
