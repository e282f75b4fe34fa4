"""Resuming a run: restore its flags from its folder, compare its inputs, and build the command that resumes it.

The state itself is restored by `utils/stages/loop.py` (stage 1) and `utils/training/network_training.py` (stage
2).
"""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.compute import distributed
from utils.core.errors import UserError, one_line
from utils.runs.lineage import args_or_nothing, started
from utils.runs.run_folder import ARGS, read_args
from utils.settings.fields import Settings, flag, flags_of
from utils.settings.parser import count
from utils.settings.reading import SettingsParser, flags_as_words

# flags that are gone: the value that did nothing, and the last commit that has the flag
DROPPED = {
    "matching": ("separate", "e2cb5ce705a47533bcdf883fb934c70e156a4aef"),
    "moments_oe": (1, "e2cb5ce705a47533bcdf883fb934c70e156a4aef"),
}


@dataclass(frozen=True)
class Checkpoints(Settings):
    """Checkpoints."""

    checkpoint_interval: int = flag(
        50,
        "iterations (stage 1) or epochs (stage 2) between two checkpoints; use a lower value if jobs are killed often. "
        "One is also written when the last is ten minutes old",
        count(1),
        may_change=True,
    )
    resume: str | None = flag(
        None,
        "run folder to resume, or latest: the newest under --save_path. The flags come from the folder; only those of "
        "places, the device and what is shown may differ",
        metavar="FOLDER",
    )

    @classmethod
    def restored(cls, parser: SettingsParser, given: dict[str, Any]) -> dict[str, Any] | None:
        """The values of the run that `--resume` names, checked like flags; None without `--resume`.

        `--method_file`, which is code, is never taken from a run folder.

        Raises:
            UserError: when there is no such run, it is another script's, a flag conflicts with it, or `--method_file`
                is missing.
        """
        if "resume" not in given:
            return None
        latest = given["resume"] == "latest"
        root = given.get("save_path", cls().save_path)
        folder = _latest(Path(root), parser.prog) if latest else Path(given["resume"])
        about = read_args(folder)
        if about["script"] != parser.prog:
            raise UserError(
                f"--resume: {folder} is a run of {about['script']}, not of {parser.prog}; resume it with that"
            )
        stored = _without_dropped(about["flags"], folder)
        code = stored.get("method_file")
        if code is not None and "method_file" not in given:
            raise UserError(f"--resume: {folder} was started with --method_file {one_line(code)}; give that file again")
        may_change = {f.name for f in flags_of(cls) if f.metadata.get("may_change")}
        changed = {name: value for name, value in given.items() if name in may_change}
        for name in given.keys() - changed.keys() - {"resume", *(["save_path"] if latest else [])}:
            value = list(given[name]) if isinstance(given[name], tuple) else given[name]
            if stored.get(name) != value:
                raise UserError(
                    f"--{name}: given is {value}, but {folder} was started with {stored.get(name)}; leave the flag "
                    "out, or start a new run"
                )
        restored = parser.values_of(flags_as_words(parser, stored, "--resume", folder / ARGS))
        return restored | changed | {"resume": str(folder)}


def _without_dropped(flags: dict, folder: Path) -> dict:
    """Stored flags without those that are gone; raises a `UserError` for one that was used."""
    for name, (neutral, commit) in DROPPED.items():
        if flags.get(name) not in (None, neutral):
            value = one_line(flags[name])
            raise UserError(
                f"--resume: {folder} was started with --{name} {value}, a flag that is gone; resume it with commit "
                f"{commit}, the last that has it"
            )
    return {name: value for name, value in flags.items() if name not in DROPPED}


def _latest(root: Path, script: str) -> Path:
    """The run folder of this script under `root` that was started last."""
    found = []
    try:
        folders = [path.parent for path in root.rglob(ARGS)]
    except OSError:  # a name that is too long
        folders = []
    for folder in folders:
        try:
            if read_args(folder)["script"] == script:
                found.append((started(folder), max(p.stat().st_mtime for p in folder.iterdir()), folder))
        except (UserError, OSError):
            continue
    if not found:
        raise UserError(f"--resume latest: no run of {script} under {root}; give the folder, or --save_path")
    return max(found)[-1]


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Check that a resumed run reads the same inputs as when it was started.

    Args:
        inputs: for each flag that names an input, the `fingerprint` of what was read.
    Raises:
        UserError: when one differs, as the results would mix two inputs.
    """
    before = read_args(folder).get("inputs")
    for name, found in inputs.items():
        if isinstance(before, dict) and before.get(name) != found:
            raise UserError(
                f"--{name}: the data differ from those {folder} was started with; give those, or start a new run"
            )


def resume_command(folder: Path) -> str:
    """The shell command that resumes a run, with the interpreter and the script as they were called.

    For a run on several machines, it is the command for this machine, with its `--node_rank`.
    """
    start = ["torchrun", *_launcher_flags()] if distributed.world_size() > 1 else [sys.orig_argv[0]]
    where = [f"--resume={folder}"] if str(folder).startswith("-") else ["--resume", str(folder)]
    return shlex.join([*start, sys.argv[0], *where, *_method_file(folder)])


def _method_file(folder: Path) -> list[str]:
    """The `--method_file` of a run, which is run as code and so must be given again."""
    flags = args_or_nothing(folder).get("flags")
    path = flags.get("method_file") if isinstance(flags, dict) else None
    return ["--method_file", path] if isinstance(path, str) else []


def _launcher_flags() -> list[str]:
    """The torchrun flags that start the same number of processes and machines, from its environment variables."""
    env = os.environ
    machines, here = int(env.get("GROUP_WORLD_SIZE", "1")), env.get("LOCAL_WORLD_SIZE", str(distributed.world_size()))
    if machines == 1:
        return ["--standalone", "--nproc_per_node", here]
    rendezvous = ["--master_addr", env.get("MASTER_ADDR", "HOST"), "--master_port", env.get("MASTER_PORT", "29500")]
    rank = ["--node_rank", env.get("GROUP_RANK", "0")]
    return ["--nnodes", str(machines), "--nproc_per_node", here, *rank, *rendezvous]
