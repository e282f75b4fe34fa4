"""From results back to what they were made from: stage 3's folder names its networks, stage 2's its distilled set."""

import os
from pathlib import Path

import torch

from utils.core.errors import UserError
from utils.data.datasets import SPECS
from utils.data.synthetic import load_synthetic
from utils.files.torch_files import read_json, read_pt
from utils.runs.run_folder import ARGS


def read_about(folder: Path) -> dict:
    """What a run folder's `args.json` says; empty where there is none or it is no JSON object."""
    try:
        return read_json(folder / ARGS, "--folder")
    except UserError:
        return {}


def distilled_set_of(networks: Path) -> tuple[Path, int]:
    """The distilled set that the networks of a stage-2 folder were trained on, and which experiment of it.

    Raises:
        UserError: when the folder does not say so, or the file is gone.
    """
    about = read_about(networks)
    path, flags = about.get("distilled_set"), about.get("flags")
    if not isinstance(path, str):
        raise UserError(f"{networks} does not say which distilled set its networks were trained on")
    exp_idx = flags.get("exp_idx", 0) if isinstance(flags, dict) else 0
    if not os.path.isfile(path):
        raise UserError(f"{networks} was trained on {path}, which is gone")
    return Path(path), exp_idx if isinstance(exp_idx, int) else 0


def sources_of(results: Path) -> list[Path]:
    """What a stage-3 folder was made from, as far as it can be told: its networks' folder and its distilled set."""
    networks = read_about(results).get("networks")
    if not isinstance(networks, str):
        return []
    about = read_about(Path(networks))
    return [Path(p).resolve() for p in (networks, about.get("distilled_set")) if isinstance(p, str)]


def distilled_pictures(networks: Path) -> list[tuple[str, torch.Tensor]]:
    """The distilled images and outliers behind a stage-2 folder, to look at.

    Returns:
        Titles and images `[num_classes, ipc, C, H, W]` in [0, 1]; nothing if they cannot be followed.
    """
    try:
        path, exp_idx = distilled_set_of(networks)
        synthetic = load_synthetic(path, exp_idx)
        mean, std = _normalisation(read_pt(path, "distilled set"), read_about(networks))
    except (UserError, KeyError):
        return []
    order = synthetic.labels.argsort(stable=True)
    classes = int(synthetic.labels.max()) + 1
    parts = [("distilled images", synthetic.images[order])]
    if synthetic.images_oe is not None:
        parts.append(("distilled outliers", synthetic.images_oe))
    shown = [(title, (images * std + mean).clamp(0, 1)) for title, images in parts if len(images) % classes == 0]
    return [(title, images.unflatten(0, (classes, -1))) for title, images in shown]


def _normalisation(content: dict, about: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation `[1, C, 1, 1]`: the file's own, or (published files have none) those of its data set."""
    if "normalisation" in content:
        values = (content["normalisation"]["mean"], content["normalisation"]["std"])
    else:
        spec = SPECS[about["flags"]["dataset"]]
        if spec.mean is None:
            raise KeyError("normalisation")
        values = (spec.mean, spec.std)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in values)
    return mean, std
