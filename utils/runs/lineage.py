"""Links between runs: the folder of an earlier stage, and the sources of results.

The `args.json` of stage 3 names the folder of its networks; that of stage 2 names the run that its images are from.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from utils.compute import distributed
from utils.core.errors import UserError, named, require
from utils.core.files import read_json
from utils.data.distilled_file import DistilledFile
from utils.runs.run_folder import ARGS

TRAINED_ON = "trained_on.pt"  # in a folder of stage 2: the set of its networks, but for the whole training set
PLAIN_SCRIPTS = ("main.py", "train_model_synthetic_no_oe.py")
STAGE1_ROOTS = ("result", "result-oe", "result-poe")
STAGE2_ROOTS = ("result-model-synthetic-no-oe", "result-model-synthetic-oe")


def find_run_folder(
    roots: Sequence[str | Path],
    parts: Sequence[str | int],
    folder: str | None,
    holds: str,
    only_oe: bool = False,
) -> tuple[Path, str]:
    """Find a run folder that an earlier stage wrote: of several, the finished one that was started last.

    Returns it, and a line for the log where several fit or it is not finished; else that line is empty.

    Args:
        roots: the save paths to search.
        parts: method, dataset, model and ipc, the sub-folders of a root.
        folder: its name; None for the newest, finished runs before others.
        holds: a glob pattern of a file that the folder must hold.
        only_oe: find only runs with outliers, those of main_oe.py, main_poe.py and stage 2 with outliers.
    Raises:
        UserError: when there is none, `folder` is not a plain name, or several roots have one of that name.
    """
    if folder is not None and (Path(folder).name != folder or folder in ("", "..")):
        raise UserError(f"--folder: {folder!r} is not the name of a folder; give the name alone, e.g. 20230206-232257")
    places = [Path(root).joinpath(*map(str, parts)) for root in roots]
    runs = [place / folder for place in places] if folder else [path for place in places for path in place.glob("*")]
    plain = PLAIN_SCRIPTS if only_oe else ()
    there = [path for path in runs if os.path.isdir(path) and args_or_nothing(path).get("script") not in plain]
    found = [path for path in there if any(path.glob(holds))]
    if not found:
        where = ", ".join(map(str, places))
        what = (f"--folder: no {folder}" if folder else "no run folder") + (" with outliers" if only_oe else "")
        bare = f" ({', '.join(map(str, there[:3]))} has no {holds})" if there else ""
        raise UserError(f"{what} under {where}{bare}. Run the earlier stage first, or give --load_path and --folder")
    if folder and len(found) > 1:
        several = ", ".join(map(str, found))
        raise UserError(f"--folder: {folder} exists {len(found)} times: {several}. Give --load_path")
    unfinished = {path for path in found if not args_or_nothing(path).get("finished", True)}  # older code says nothing
    found.sort(key=lambda path: (path not in unfinished, started(path), path.stat().st_mtime, path.name), reverse=True)
    note = _note(found, unfinished, folder is None)
    return distributed.from_main((found[0], note))  # a run may have ended while the processes looked


def _note(found: Sequence[Path], unfinished: set[Path], left_out: bool) -> str:
    """What to say of the choice of the first of several runs; `left_out`: `--folder`."""
    (first, *others), why = found, "stopped, or still running"
    if not left_out or not others:
        ways = "wait for its end, resume it, or choose another by --folder NAME"
        return f"{first} is not finished ({why}): {ways}" if first in unfinished else ""
    which = "the newest finished one" if args_or_nothing(first).get("finished") else "the newest one"
    which = f"not finished: {why}" if first in unfinished else which
    several = len({path.parent for path in found}) > 1
    shown = [f"{path if several else path.name}{' (not finished)' * (path in unfinished)}" for path in others]
    how = "--load_path ROOT --folder NAME" if several else "--folder NAME"
    return (
        f"--folder is left out and {len(found)} runs fit: {first} is taken ({which}). To choose another: {how}, "
        f"of {named(shown, 4)}"
    )


def started(folder: Path) -> float:
    """When a run was started, in seconds: by its `args.json`, else by its name, else when its folder last changed."""
    said = str(args_or_nothing(folder).get("started"))
    for text, form in ((said, "%Y-%m-%dT%H:%M:%S"), (folder.name[:15], "%Y%m%d-%H%M%S")):
        with suppress(ValueError):
            return datetime.strptime(text, form).timestamp()
    return folder.stat().st_mtime


def args_or_nothing(folder: Path) -> dict:
    """The content of a run folder's `args.json`; empty if it is missing or cannot be read as a JSON object."""
    try:
        return read_json(folder / ARGS, "--folder")
    except UserError:
        return {}


def root_of(folder: Path, parts: Sequence[str | int]) -> str | None:
    """The root below which `find_run_folder` finds a run folder, as seen from here; None if it lies elsewhere."""
    path = Path(os.path.abspath(folder))
    if path.parts[-1 - len(parts) : -1] != tuple(map(str, parts)):
        return None
    root, here = path.parents[len(parts)], Path.cwd()
    return str(root.relative_to(here) if root.is_relative_to(here) else root)


def set_of_networks(folder: Path) -> DistilledFile:
    """The file of the set that the networks of a stage-2 folder were trained on.

    Raises:
        UserError: when it is damaged, or not there: beside networks of the whole training set, and of older code.
    """
    path = folder / TRAINED_ON
    require(os.path.isfile(path), f"{folder} does not hold the set that its networks were trained on ({TRAINED_ON})")
    return DistilledFile.open(path)


def sources_of(results: Path) -> list[Path]:
    """The sources of a stage-3 folder, as far as they are known: the folder of its networks, and that of stage 1."""
    networks = args_or_nothing(results).get("networks")
    if networks is None:
        return []
    about = args_or_nothing(Path(networks))
    return [Path(path).resolve() for path in (networks, about.get("images_from")) if path]
