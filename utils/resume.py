"""Going on with a run: its arguments come from its folder, and how its command is said."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from . import distributed
from .errors import UserError
from .flags import Parser
from .runs import ARGS

MAY_CHANGE = ("device", "data_path", "oe_data_path", "ood_path", "download", "checkpoint_interval", "tensorboard")


def add_resume(parser: Parser, steps: str) -> None:
    """The flags of a stage that can be resumed; `steps` names what its interval counts."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--resume",
        default=None,
        metavar="FOLDER",
        help="run folder to go on with, or latest: the newest under --save_path. The flags come from the folder; of "
        f"others only {', '.join('--' + name for name in MAY_CHANGE)} may differ",
    )
    group.add_argument(
        "--checkpoint_interval",
        type=_interval,
        default=50,
        help=f"{steps} between two checkpoints; lower it where jobs are killed often. Ten minutes are never exceeded",
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
    folder = _latest(Path(args.save_path), parser.prog) if args.resume == "latest" else Path(args.resume)
    about = read_args(folder)
    if about["script"] != parser.prog:
        raise UserError(f"--resume: {folder} is a run of {about['script']}, not of {parser.prog}; resume it with that")
    stored = about["flags"]
    for name, value in given.items():
        if name not in ("resume", *MAY_CHANGE) and stored.get(name) != value:
            raise UserError(
                f"--{name}: given is {value}, but {folder} was started with {stored.get(name)}; leave the flag out, or "
                "start a new run"
            )
    changed = {name: value for name, value in given.items() if name in MAY_CHANGE}
    args, rest = argparse.ArgumentParser.parse_known_args(parser, _command_line(stored | changed))
    if rest:
        raise UserError(f"--resume: {folder / ARGS} has what {parser.prog} does not know: {' '.join(rest)[:160]}")
    args.resume = str(folder)
    return args


def _command_line(flags: dict) -> list[str]:
    """Flags as words of a command line, so that a parser checks them."""
    words = []
    for name, value in flags.items():
        if name == "resume" or value is None or value is False:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    return words


def _latest(root: Path, script: str) -> Path:
    """The run folder of this script under `root` that was written to last."""
    found = []
    for path in root.rglob(ARGS):
        try:
            if read_args(path.parent)["script"] == script:
                found.append((max(p.stat().st_mtime for p in path.parent.iterdir()), path.parent))
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
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("it is too large")
        about = json.loads(path.read_bytes())
        if not isinstance(about["flags"], dict) or not isinstance(about["script"], str):
            raise TypeError("it has no flags")
    except OSError:
        raise UserError(f"--resume: {folder} is no run folder: it has no {ARGS}. Give the folder of a run") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"--resume: {path} is damaged: {reason}. Give the folder of another run") from None
    return about


def resume_command(folder: Path) -> str:
    """The shell line that goes on with a run, with the interpreter and the script as they were called."""
    if distributed.world() > 1:
        start = ["torchrun", "--standalone", "--nproc_per_node", str(distributed.world())]
    else:
        start = [sys.orig_argv[0]]
    return shlex.join([*start, sys.argv[0], "--resume", str(folder)])
