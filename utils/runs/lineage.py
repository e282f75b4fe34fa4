"""Links between runs: finding the folder of an earlier stage, and tracing results to their sources.

The `args.json` of stage 3 names the folder of its networks; that of stage 2 names the distilled set.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError
from utils.files.text_files import read_json
from utils.runs.run_folder import ARGS

TRAINED_ON = "trained_on.pt"  # in a folder of stage 2: the set, where no file of stage 1 holds it
STAGE1_ROOTS = ("result", "result-oe", "result-poe")
STAGE2_ROOTS = ("result-model-synthetic-no-oe", "result-model-synthetic-oe")


def find_run_folder(
    roots: Sequence[str | Path],
    parts: Sequence[str | int],
    folder: str | None,
    holds: str,
    flag_roots: str,
    only_oe: bool = False,
) -> Path:
    """Find a run folder that an earlier stage wrote.

    Args:
        roots: the save paths to search.
        parts: method, dataset, model and ipc, the sub-folders of a root.
        folder: its name; None for the newest.
        holds: a glob pattern of a file that the folder must hold.
        flag_roots: the flag that sets `roots`, for the message, e.g. `--load_path`.
        only_oe: leave out runs of scripts without outliers.
    Raises:
        UserError: when there is none, `folder` is not a plain name, or several roots have one of that name.
    """
    if folder is not None and (Path(folder).name != folder or folder in ("", ".", "..")):
        raise UserError(f"--folder: {folder!r} is not the name of a folder; give the name alone, e.g. 20230206-232257")
    places = [Path(root).joinpath(*map(str, parts)) for root in roots]
    named = [place / folder for place in places] if folder else [p for place in places for p in _folders(place)]
    there = [path for path in named if path.is_dir() and not (only_oe and _is_plain(path))]
    found = [path for path in there if any(path.glob(holds))]
    where = ", ".join(map(str, places))
    if not found:
        what = (f"--folder: no {folder}" if folder else "no run folder") + (" with outliers" if only_oe else "")
        bare = f" ({', '.join(map(str, there[:3]))} has no {holds})" if there else ""
        raise UserError(f"{what} under {where}{bare}. Run the earlier stage first, or give {flag_roots} and --folder")
    if folder and len(found) > 1:
        raise UserError(
            f"--folder: {folder} exists {len(found)} times: {', '.join(map(str, found))}. Give {flag_roots}"
        )
    return max(found, key=lambda path: (path.stat().st_mtime, path.name))


def _is_plain(folder: Path) -> bool:
    """Whether a run is known to be of a script without outliers, which has no `--lambda_oe`."""
    flags = args_or_nothing(folder).get("flags")
    return isinstance(flags, dict) and "lambda_oe" not in flags


def _folders(place: Path) -> list[Path]:
    return [p for p in place.iterdir() if p.is_dir()] if place.is_dir() else []


def args_or_nothing(folder: Path) -> dict:
    """The content of a run folder's `args.json`; empty if it is missing or cannot be read as a JSON object."""
    try:
        return read_json(folder / ARGS, "--folder")
    except UserError:
        return {}


def distilled_set_of(networks: Path) -> tuple[Path, int]:
    """The distilled set that the networks of a stage-2 folder were trained on, and the index of its experiment.

    Raises:
        UserError: when `args.json` does not name the set, or the file is gone.
    """
    about = args_or_nothing(networks)
    path, flags = stored_set_path(networks, about), about.get("flags")
    if not isinstance(path, str):
        raise UserError(f"{networks} does not say which distilled set its networks were trained on")
    exp_idx = about.get("experiment", flags.get("exp_idx", 0) if isinstance(flags, dict) else 0)
    if not os.path.isfile(path):
        raise UserError(f"{networks} was trained on {path}, which is gone")
    return Path(path), exp_idx if isinstance(exp_idx, int) else 0


def stored_set_path(networks: Path, about: dict) -> str | None:
    """The file of the set that the networks of a stage-2 folder were trained on, as `about` (its `args.json`) says.

    A set that lies in the folder itself has moved with it.
    """
    path = about.get("distilled_set")
    if not isinstance(path, str):
        return None
    own = networks / TRAINED_ON
    return str(own) if os.path.basename(path) == TRAINED_ON and own.is_file() else path


def sources_of(results: Path) -> list[Path]:
    """The sources of a stage-3 folder, as far as they are known: the folder of its networks, and the distilled set."""
    networks = args_or_nothing(results).get("networks")
    if not isinstance(networks, str):
        return []
    about = args_or_nothing(Path(networks))
    sources = (networks, about.get("distilled_set"), about.get("images_from"))
    return [Path(p).resolve() for p in sources if isinstance(p, str)]
