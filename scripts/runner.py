"""Run stages: each once, a stopped one from where it was, several at once. For scripts that run other scripts.

    python scripts/runner.py FOLDER main_poe.py --dataset Digits …    # one stage

A folder is done when it holds the file `done`: all commands that led to it. A stage that has begun has them in `begun`.
If other flags lead to other commands, the runner says so and stops before anything runs.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.core.errors import UserError
from utils.core.files import read_yaml, save_output, save_text
from utils.core.run_script import run_script
from utils.settings.fields import flags_of
from utils.settings.parser import Parser, underscored, value_in

DONE = "done"
BEGUN = "begun"
OF_FILES = {"config": "--content_of_config=", "method_file": "--content_of_method_file="}  # stand for what files hold
POLL = 0.05  # seconds between two looks at the processes
VALUES = r"(?:=\S+)?(?: (?!--|-[a-zA-Z]\b)\S+)*"  # of a flag, in a command


@dataclass(frozen=True)
class Stage:
    """A command of this project, and where its results go."""

    command: tuple[str, ...]  # a script and its flags, but for the folder
    folder: Path | None = None  # what it writes into; None: it is quick, keeps nothing, and runs every time
    before: tuple["Stage", ...] = ()  # the stages whose results it reads
    shares: str = ""  # stages that share something do not run at once
    title: str = ""  # a line to print when it starts

    @property
    def key(self) -> object:
        """What identifies it: the folder, or without one the command."""
        return self.folder or self.command

    def lines(self) -> list[str]:
        """The commands that lead to its folder, its own last; of files of flags and code also what they hold."""
        words = [*self.command]
        for name, mark in OF_FILES.items():
            path = Path(value_in(underscored(self.command), name) or "")
            if path.is_file():
                content = path.read_bytes()
                if name == "config":
                    values = read_yaml(path, "--config")  # JSON is YAML
                    content = json.dumps(values.get("flags", values), sort_keys=True).encode()
                words.append(f"{mark}{hashlib.sha256(content).hexdigest()[:12]}")
        return [*dict.fromkeys(line for stage in self.before for line in stage.lines()), shlex.join(words)]

    @property
    def text(self) -> str:
        """These commands, as a file holds them."""
        return "\n".join(self.lines()) + "\n"

    def is_done(self) -> bool:
        """Whether its folder is done.

        Raises:
            UserError: when the folder was made, or is to be resumed, by other commands.
        """
        if self.folder is None:
            return False
        done, begun = self.folder / DONE, self.folder / BEGUN
        if done.is_file() and self.check_same(done):
            return True
        if begun.is_file() and self.resumes:
            self.check_same(begun, _without_what_may_change)
        return False

    def check_same(self, path: Path, neutral: Callable[[str], str] = str) -> bool:
        """Compare the commands in a file `done` or `begun` with those of this stage, in any order of the flags; False
        if it is empty. `neutral` takes out of commands what may differ.

        Raises:
            UserError: when they differ.
        """
        text, own = path.read_text(encoding="utf-8"), self.text
        for mark in OF_FILES.values():
            if mark not in text or mark not in own:  # older code did not write it, or the file is gone
                text, own = (re.sub(rf" {mark}\S+", "", commands) for commands in (text, own))
        old, new = (_flags(neutral(_with_underscores(commands))) for commands in (text, own))
        if not text or old == new:
            return bool(text)
        raise UserError(
            f"--out: {path.parent.parent} was made with other flags: {_shown(old - new)}; now it has "
            f"{_shown(new - old)}. Give another --out, or remove it"
        )

    @property
    def is_made_anew(self) -> bool:
        """Whether it starts from nothing after it was stopped: it is quick, and does not resume."""
        return self.folder is not None and self.command[0] == "test_ood_model_syn.py"

    @property
    def resumes(self) -> bool:
        """Whether it was stopped in its folder, and continues there."""
        return self.folder is not None and not self.is_made_anew and any(self.folder.rglob("args.json"))

    def words(self) -> list[str]:
        """The whole command as it is to be run now: with its folder, and `--resume latest` if it was stopped."""
        if self.folder is None:
            return [*self.command]
        if self.command[0] == "train_experts.py":  # it resumes by itself
            return [*self.command, "--buffer_path", str(self.folder)]
        return [*self.command, "--save_path", str(self.folder), *(["--resume", "latest"] if self.resumes else [])]


def _with_underscores(commands: str) -> str:
    """Commands with `_` for `-` in the names of flags; the scripts take both."""
    return "\n".join(shlex.join(underscored(shlex.split(line))) for line in commands.splitlines())


def _without_what_may_change(commands: str) -> str:
    """Commands without the flags in which a resumed run may differ."""
    from utils.settings.arguments import Stage1Settings, Stage2Settings  # late: it is slow, and what resumes needs it

    fields = [*flags_of(Stage1Settings), *flags_of(Stage2Settings)]
    names = "|".join(sorted({f.name for f in fields if f.metadata.get("may_change")}))
    return re.sub(rf"--({names})\b{VALUES}", "", commands)


def _flags(commands: str) -> Counter[tuple[str, str]]:
    """The scripts of commands and their flags, each beside its script: stages have flags of the same names."""
    found = Counter()
    for line in commands.splitlines():
        script = line.split()[0]
        found.update((script, word) for word in (script, *re.findall(rf"(?<= )(?:--\w+|-[a-zA-Z]\b){VALUES}", line)))
    return found


def _shown(flags: Iterable[tuple[str, str]]) -> str:
    """Flags in a message, or the scripts if these differ."""
    words = [re.sub(r"--content_of_(\w+)=.*", r"another content of --\1", word) for _, word in flags]
    return ", ".join(dict.fromkeys([w for w in words if w.endswith(".py")] or words)) or "none"


def to_run(stages: Iterable[Stage]) -> list[Stage]:
    """The stages that are not done, each once and after those that it reads; a done one needs nothing before it."""
    found: dict[object, Stage] = {}

    def add(stage: Stage) -> None:
        if stage.key in found or stage.is_done():
            return
        for first in stage.before:
            add(first)
        found[stage.key] = stage

    for stage in stages:
        add(stage)
    return list(found.values())


def run_stages(stages: Iterable[Stage], jobs: int = 1) -> None:
    """Run those that are not done, `jobs` at once, each on a GPU of its own where there are several.

    Several at once write what they print to `<folder>.log`. A signal to this process goes to them. After one that
    failed no other starts, and this process ends with its exit status.
    """
    wanted = to_run(stages)
    for stage in wanted:
        _check_own(stage)
    pool = _Pool(wanted, jobs)
    before = {number: signal.signal(number, pool.forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        pool.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pool.status:
        sys.exit(pool.status)


class _Pool:
    """The stages that wait, and those that run, by place from 0."""

    def __init__(self, stages: Sequence[Stage], jobs: int):
        self.waiting, self.jobs = [*stages], jobs
        self.running: dict[int, tuple[Stage, subprocess.Popen]] = {}
        self.status = 0  # of the first that failed

    def run(self) -> None:
        """Start and watch them until all are done, or one has failed."""
        while self.running or (self.waiting and not self.status):
            self._start()
            time.sleep(POLL)
            self._collect()

    def forward(self, number: int, _: object = None) -> None:
        """Send a signal to all that run, and start no other."""
        self.status = self.status or 128 + number
        for _, process in self.running.values():
            process.send_signal(number)

    def _start(self) -> None:
        """Start what is ready, in order, on the free places."""
        for place in range(self.jobs):
            running = [stage for stage, _ in self.running.values()]
            unfinished = {stage.key for stage in (*self.waiting, *running)}
            shared = {stage.shares for stage in running if stage.shares}
            ready = (
                s for s in self.waiting if s.shares not in shared and unfinished.isdisjoint(b.key for b in s.before)
            )
            stage = None if self.status or place in self.running else next(ready, None)
            if stage is not None:
                self.waiting.remove(stage)
                words = stage.words()
                print(*[stage.title] if stage.title else [], f"$ python {shlex.join(words)}", sep="\n", flush=True)
                if stage.is_made_anew:
                    shutil.rmtree(stage.folder, ignore_errors=True)
                if stage.folder is not None:
                    save_output(str(stage.folder / BEGUN), stage.text)
                self.running[place] = stage, start(words, stage.folder, place, self.jobs)

    def _collect(self) -> None:
        """Mark those that ended as done, or note that they failed."""
        for place, (stage, process) in [*self.running.items()]:
            status = process.poll()
            if status is None:
                continue
            del self.running[place]
            if status:
                if self.jobs > 1:
                    where = f"see {stage.folder}.log" if stage.folder else f"{stage.command[0]} says why above"
                    print(f"exit status {status}: {where}", file=sys.stderr)
                self.status = self.status or (status if status > 0 else 128 - status)
            elif stage.folder is not None:
                save_text(stage.folder / DONE, (stage.folder / BEGUN).read_text(encoding="utf-8"))


def _check_own(stage: Stage) -> None:
    """Raise a `UserError` where a stage that is made anew would remove what this script may not have written."""
    folder = stage.folder
    if stage.is_made_anew and folder.is_dir() and any(folder.iterdir()) and not (folder / BEGUN).exists():
        raise UserError(
            f"--out: {folder} holds results that this script may not have written. Give another folder, or remove it "
            "if a table of an older version was stopped there"
        )


def start(words: Sequence[str], folder: Path | None, place: int, jobs: int) -> subprocess.Popen:
    """Start a command that writes into `folder` (if any), as the process at a place, one of `jobs` at once."""
    command = [sys.executable, *([str(ROOT / words[0]), *words[1:]] if words[0].endswith(".py") else words)]
    if jobs == 1 or folder is None:
        return subprocess.Popen(command)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
    if gpus := _gpus():
        environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.log"), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _gpus() -> list[str]:
    """The names of the GPUs that may be used, as in `CUDA_VISIBLE_DEVICES`."""
    import torch  # late: it is slow, and only several jobs need it

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(k) for k in range(torch.cuda.device_count())] if given is None else [w for w in given.split(",") if w]


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Run a stage once; the same command again does nothing, or resumes a stopped one.")
    parser.add_argument("folder", type=Path, help="what the stage writes into, in the place of its --save_path")
    parser.add_argument("script", help="a script of this project, e.g. main_poe.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="its flags")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run one stage."""
    run_stages([Stage((args.script, *args.flags), args.folder)])


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "runner.py")
