"""Pictures of the distilled images and outliers behind results."""

from collections.abc import Callable
from pathlib import Path

import torch

from utils.core.errors import UserError
from utils.data.datasets import SPECS
from utils.data.synthetic import load_synthetic
from utils.exchange.readers import stored_space
from utils.exchange.spaces import to_unit
from utils.files.torch_files import read_pt
from utils.runs.lineage import args_or_nothing, distilled_set_of


def distilled_pictures(networks: Path) -> list[tuple[str, torch.Tensor]]:
    """The images and outliers that the networks of a stage-2 folder were trained on, as pictures.

    Returns:
        Titles and images `[num_classes, ipc, C, H, W]` in [0, 1]; empty if the set is missing or cannot be read.
    """
    try:
        path, exp_idx = distilled_set_of(networks)
        synthetic = load_synthetic(path, exp_idx)
        to_unit = _to_unit(read_pt(path, "distilled set"), args_or_nothing(networks), str(path))
    except (UserError, KeyError, TypeError, RuntimeError):
        return []
    flags = args_or_nothing(networks).get("flags") or {}
    images, outliers = (flags.get(name, "distilled") for name in ("train_on", "outliers"))
    order = synthetic.hard_labels.argsort(stable=True)
    classes = int(synthetic.hard_labels.max()) + 1
    parts = [(f"{images} images", synthetic.images[order])]
    if synthetic.images_oe is not None and outliers in ("distilled", "initial", "kcenter"):
        parts.append((f"{outliers} outliers", synthetic.images_oe))
    shown = [(title, to_unit(images).clamp(0, 1)) for title, images in parts if len(images) % classes == 0]
    return [(title, images.unflatten(0, (classes, -1))) for title, images in shown]


def _to_unit(content: dict, about: dict, where: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of normalisation, to [0, 1]: by what the file stores or, for published files, by its data set."""
    _, statistics, zca = stored_space(content.get("normalisation"), where)
    if statistics is None and zca is None:
        spec = SPECS[about["flags"]["dataset"]]
        if spec.mean is None:
            raise KeyError("normalisation")
        statistics = (spec.mean, spec.std)
    return lambda images: to_unit(images, statistics, zca)
