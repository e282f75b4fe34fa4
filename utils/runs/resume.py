"""Going on with a run: its arguments come from its folder, and how its command is said."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from utils.compute import distributed
from utils.core.errors import UserError
from utils.core.parser import Parser
from utils.files.text_files import read_json
from utils.runs.run_folder import ARGS

MAY_CHANGE = (
    "device", "data_path", "oe_data_path", "ood_path", "load_path", "folder", "download", "checkpoint_interval",
    "tensorboard",
)  # fmt: skip
NOT_STORED = ("resume", "help", "is_parallel")


def add_resume(parser: Parser, steps: str) -> None:
    """The flags of a stage that can be resumed, behind all others; `steps` names what its interval counts."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--checkpoint_interval",
        type=_interval,
        default=50,
        help=f"{steps} between two checkpoints; lower it where jobs are killed often. Ten minutes are never exceeded",
    )
    known = {action.dest for action in parser._actions}
    group.add_argument(
        "--resume",
        default=None,
        metavar="FOLDER",
        help="run folder to go on with, or latest: the newest under --save_path. The flags come from the folder; of "
        f"others only {', '.join('--' + name for name in MAY_CHANGE if name in known)} may differ",
    )
    parser.complete = resumed


def _interval(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def resumed(parser: Parser, args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The arguments of the run that `--resume` names, checked like flags; as they are where nothing is resumed.

    Args:
        given: the flags that were on the command line.
    Raises:
        UserError: when there is no such run, it is another script's, or a flag conflicts with it.
    """
    if args.resume is None:
        return args
    latest = args.resume == "latest"
    folder = _latest(Path(args.save_path), parser.prog) if latest else Path(args.resume)
    about = read_args(folder)
    if about["script"] != parser.prog:
        raise UserError(f"--resume: {folder} is a run of {about['script']}, not of {parser.prog}; resume it with that")
    stored = about["flags"]
    no_conflict = ("resume", "save_path", *MAY_CHANGE) if latest else ("resume", *MAY_CHANGE)
    for name, value in given.items():
        if name not in no_conflict and stored.get(name) != value:
            raise UserError(
                f"--{name}: given is {value}, but {folder} was started with {stored.get(name)}; leave the flag out, or "
                "start a new run"
            )
    changed = {name: value for name, value in given.items() if name in MAY_CHANGE}
    args = argparse.ArgumentParser.parse_known_args(parser, _command_line(stored | changed, parser, folder))[0]
    args.resume = str(folder)
    return args


def _command_line(flags: dict, parser: Parser, folder: Path) -> list[str]:
    """Flags as words of a command line, so that the parser checks them.

    Raises:
        UserError: for a flag that the parser does not know, or what would be taken for one.
    """
    known = {action.dest: action.nargs for action in parser._actions if action.dest not in NOT_STORED}
    words = []
    for name, value in flags.items():
        if name == "resume" or value is None or value is False:
            continue
        values = [str(v) for v in value] if isinstance(value, list) else []
        fits = name in known and (isinstance(value, list) == (known[name] == "+"))
        if not fits or any(v.startswith("-") for v in values):
            said = f"--{name}={value}"
            raise UserError(f"--resume: {folder / ARGS} has what {parser.prog} does not know: {said[:160]}")
        if isinstance(value, list):
            words += [f"--{name}", *values]
        else:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    return words


def _latest(root: Path, script: str) -> Path:
    """The run folder of this script under `root` that was written to last."""
    found = []
    try:
        folders = [path.parent for path in root.rglob(ARGS)]
    except OSError:  # a name that is too long
        folders = []
    for folder in folders:
        try:
            if read_args(folder)["script"] == script:
                found.append((max(p.stat().st_mtime for p in folder.iterdir()), folder))
        except (UserError, OSError):
            continue
    if not found:
        raise UserError(f"--resume latest: no run of {script} under {root}; give the folder, or --save_path")
    return max(found)[1]


def read_args(folder: Path) -> dict:
    """What a run folder's `args.json` says, with at least `script` and `flags`.

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


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Compare what a resumed run reads with what it read when it was started.

    Args:
        inputs: for each flag that names an input, the `fingerprint` of what was read.
    Raises:
        UserError: when one differs; without that its results would be a mixture.
    """
    before = read_args(folder).get("inputs")
    for flag, found in inputs.items():
        if isinstance(before, dict) and before.get(flag) != found:
            raise UserError(
                f"--{flag}: what is there now is not what {folder} was started with; give that, or start a new run"
            )


def resume_command(folder: Path) -> str:
    """The shell line that goes on with a run, with the interpreter and the script as they were called."""
    if distributed.world() > 1:
        start = ["torchrun", "--standalone", "--nproc_per_node", str(distributed.world())]
    else:
        start = [sys.orig_argv[0]]
    where = [f"--resume={folder}"] if str(folder).startswith("-") else ["--resume", str(folder)]
    return shlex.join([*start, sys.argv[0], *where])
