"""Optional: how synthetic outliers start, and clamping them to the range of pixels."""

import torch
from torch import nn

from utils.core.errors import UserError
from utils.data.augment import DSA
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.training.features import FeatureNetworks
from utils.training.trainer import TrainSettings


def check_start(init_oe: str, init: str, clamp_oe: bool, real: RealData, from_file: bool) -> None:
    """Raise `UserError` for flags that contradict each other; `from_file`: whether a distilled set is the start."""
    if init_oe == "kcenter" and from_file:
        raise UserError("--init_oe kcenter: the outliers start as those of --load_path; leave one of them out")
    if init_oe == "kcenter" and init != "real":
        raise UserError(f"--init_oe kcenter: its network needs images to train on; give --init real, not {init}")
    if clamp_oe and real.zca is not None:
        raise UserError("--clamp_oe: whitened images (--zca) have no range of pixels; leave one of them out")


def start_network(model: str, augmentation: DSA | None, images: SyntheticSet, real: RealData, seed: int) -> nn.Module:
    """The network in whose features `--init_oe kcenter` chooses: it is trained on the initial images."""
    return FeatureNetworks(model, real, TrainSettings(1, augmentation=augmentation), seed, "off", "fp32").train(images)


def clamp_to_pixels(outliers: torch.Tensor, real: RealData) -> None:
    """Clamp outliers `[…, C, H, W]` in place to pixels in [0, 1]."""
    low, high = (real.normalize(torch.full((1, real.channel, 1, 1), v, device=real.device)) for v in (0.0, 1.0))
    outliers.clamp_(low[0], high[0])
