"""Resuming a run: restore its flags from its folder, compare its inputs, and build the command that resumes it.

The state itself is restored by `utils/stages/loop.py` (stage 1) and `utils/training/network_training.py` (stage 2).
"""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.compute import distributed
from utils.core.errors import UserError, one_line, require
from utils.runs.lineage import args_or_nothing, started
from utils.runs.run_folder import ARGS, read_args
from utils.settings.fields import Settings, flag, flag_words, flags_of
from utils.settings.reading import SettingsParser, flags_as_words


@dataclass(frozen=True)
class Checkpoints(Settings):
    """Checkpoints."""

    checkpoint_interval: int = flag(
        50,
        "iterations (stage 1) or epochs (stage 2) between two checkpoints; use a lower value if jobs are killed often. "
        "One is also written when the last is ten minutes old",
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
        root = Path(given.get("save_path", cls().save_path))
        folder = _latest(root, parser.prog) if latest else Path(given["resume"])
        about = read_args(folder)
        told = f"--resume: {folder} is a run of {about['script']}, not of {parser.prog}; resume it with that"
        require(about["script"] == parser.prog, told)
        stored = about["flags"]
        code = stored.get("method_file")
        if code is not None and "method_file" not in given:
            raise UserError(f"--resume: {folder} was started with --method_file {one_line(code)}; give that file again")
        may_change = {f.name for f in flags_of(cls) if f.metadata.get("may_change")}
        changed = {name: value for name, value in given.items() if name in may_change}
        for name in given.keys() - changed.keys() - {"resume", *(["save_path"] if latest else [])}:
            value = list(given[name]) if isinstance(given[name], tuple) else given[name]
            told = f"--{name}: given is {value}, but {folder} was started with {stored.get(name)}"
            require(stored.get(name) == value, f"{told}; leave the flag out, or start a new run")
        restored, _ = parser.values_of(flags_as_words(parser, stored, "--resume", folder / ARGS))
        return restored | changed | {"resume": str(folder)}


def _latest(root: Path, script: str) -> Path:
    """The run folder of this script under `root` that was started last."""
    folders = [path.parent for path in root.rglob(ARGS)] if os.path.isdir(root) else []
    found = [folder for folder in folders if args_or_nothing(folder).get("script") == script]
    require(found, f"--resume latest: no run of {script} under {root}; give the folder, or --save_path")
    return max(found, key=lambda folder: (started(folder), folder.name))


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Check that a resumed run reads the same inputs as when it was started.

    Args:
        inputs: for each flag that names an input, the `fingerprint` of what was read.
    Raises:
        UserError: when one differs, as the results would mix two inputs.
    """
    before = read_args(folder).get("inputs")
    for name, found in inputs.items():
        told = f"--{name}: the data differ from those {folder} was started with; give those, or start a new run"
        require(not isinstance(before, dict) or before.get(name) == found, told)


def resume_command(folder: Path) -> str:
    """The shell command that resumes a run, with the interpreter and the script as they were called.

    For a run on several machines, it is the command for this machine, with its `--node_rank`.
    """
    start = ["torchrun", *_launcher_flags()] if distributed.world_size() > 1 else [sys.orig_argv[0]]
    code = args_or_nothing(folder).get("flags", {}).get("method_file")  # it is run as code, so it must be given again
    again = [*flag_words("resume", str(folder)), *flag_words("method_file", code)]
    return shlex.join([*start, sys.argv[0], *again])


def _launcher_flags() -> list[str]:
    """The torchrun flags that start the same number of processes and machines, from its environment variables."""
    env = os.environ
    machines, here = int(env.get("GROUP_WORLD_SIZE", "1")), env.get("LOCAL_WORLD_SIZE", str(distributed.world_size()))
    if machines == 1:
        return ["--standalone", "--nproc_per_node", here]
    rendezvous = ["--master_addr", env.get("MASTER_ADDR", "HOST"), "--master_port", env.get("MASTER_PORT", "29500")]
    rank = ["--node_rank", env.get("GROUP_RANK", "0")]
    return ["--nnodes", str(machines), "--nproc_per_node", here, *rank, *rendezvous]
