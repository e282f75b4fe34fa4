"""How synthetic outliers are treated beyond the published method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from utils.core.errors import UserError
from utils.data.augment import DSA
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.outliers.not_distilled import k_center_by_slot
from utils.outliers.sources import OutlierSource
from utils.training.features import FeatureNetworks
from utils.training.trainer import TrainSettings

STARTS = ("random", "kcenter")
RECIPES: dict[str, dict[str, Any]] = {"published": {}, "strong": {"expert_lambda_oe": 2.0}}  # flags, by recipe
METHODS_OF_RECIPES = {"strong": "MTT"}  # those that only one method has


@dataclass(frozen=True)
class OutlierRecipe:
    """The defaults are the published method.

    `start`: `random`, or `kcenter` for outliers far apart in the features of a `model` that was trained on the initial
    images with augmentation `dsa`; `clamp`: whether outliers are kept in the range of pixels.
    """

    start: str = "random"
    clamp: bool = False
    model: str = ""
    dsa: DSA | None = None

    @classmethod
    def of(cls, flags: Mapping[str, Any], dsa: DSA | None) -> "OutlierRecipe":
        """The recipe of the flags of stage 1; a script without outliers lacks them."""
        return cls(flags.get("init_oe", "random"), flags.get("clamp_oe", False), flags["model"], dsa)

    def check(self, real: RealData, init: str, from_file: bool) -> None:
        """Raise `UserError` where the recipe cannot be followed; `from_file`: whether a distilled set is the start."""
        if self.start == "kcenter" and from_file:
            raise UserError("--init_oe kcenter: the outliers start as those of --load_path; leave one of them out")
        if self.start == "kcenter" and init != "real":
            raise UserError(f"--init_oe kcenter: its network needs images to train on; give --init real, not {init}")
        if self.clamp and real.zca is not None:
            raise UserError("--clamp_oe: whitened images (--zca) have no range of pixels; leave one of them out")

    def first_outliers(
        self, source: OutlierSource, images: SyntheticSet, real: RealData, seed: int, exp: int
    ) -> torch.Tensor:
        """The outliers of `start` kcenter, `[num_classes, ipc, C, H, W]`, normalised."""
        training = TrainSettings(1, augmentation=self.dsa)
        net = FeatureNetworks(self.model, real, training, seed, "off", "fp32").train(images)
        return k_center_by_slot(source, real, len(images.labels) // real.num_classes, (seed, exp), net)

    def project(self, outliers: torch.Tensor, real: RealData) -> None:
        """Clamp outliers `[…, C, H, W]` in place to pixels in [0, 1], if the recipe says so."""
        if self.clamp:
            low, high = (real.normalize(torch.full((1, real.channel, 1, 1), v, device=real.device)) for v in (0.0, 1.0))
            outliers.clamp_(low[0], high[0])
