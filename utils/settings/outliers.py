"""Settings of outliers in stage 1 and in the training of experts, and of their weight in network training."""

from dataclasses import dataclass

from utils.outliers.corruptions import CORRUPTIONS, DEFAULT_CORRUPTIONS
from utils.settings.fields import Settings, flag
from utils.settings.parser import count, number, one_of

STARTS = ("random", "kcenter")
RECIPES = ("published", "strong")


@dataclass(frozen=True)
class OutlierTraining(Settings):
    """Outliers in network training."""

    lambda_oe: float = flag(
        0.5, "weight of the outlier loss in network training; at 0 it counts nothing", number(0), often=True
    )


@dataclass(frozen=True)
class OutlierBatches(Settings):
    """Outliers in batches."""

    batch_oe: int = flag(256, "outliers per slot and step", count(1))


@dataclass(frozen=True)
class DistilledOutliers(Settings):
    """Distilled outliers."""

    lr_img_oe: float | None = flag(
        None,
        "learning rate of the synthetic outliers; left out: --lr_img. Lower it if they become noise",
        number(0, exclusive=True),
    )
    init_oe: str = flag(
        "random",
        "which outliers --init real starts from: random ones, or kcenter: far apart in the features of a network "
        "trained on the initial images, out of 10000",
        one_of("start of outliers", STARTS),
        names=STARTS,
    )
    clamp_oe: bool = flag(False, "keep the outliers in the range of pixels, after each update")
    outlier_recipe: str = flag(
        "published",
        "a set of flags; strong, for MTT: --expert_lambda_oe 2 (what it did: docs/results.md)",
        one_of("outlier recipe", RECIPES),
        names=RECIPES,
    )


@dataclass(frozen=True)
class Pool(Settings):
    """Outlier exposure."""

    oe_data_path: str | None = flag(
        "data/300K_random_images.npy",
        "the pool of real outliers: .npy (uint8 NHWC), .npz (key images), or a folder of images; without one, stage 2 "
        "corrupts training images",
        often=True,
        may_change=True,
    )
    num_oe_per_class: int = flag(
        10000, "outliers of the pool for each class slot; fewer if the pool is too small", count(1)
    )


@dataclass(frozen=True)
class Corrupted(Settings):
    """Pseudo-outlier exposure."""

    corruptions: tuple[str, ...] = flag(
        DEFAULT_CORRUPTIONS,
        f"how POE outliers are made, out of {', '.join(CORRUPTIONS)}: class 0 uses the first, class 1 the second, "
        "and so on, from the first again after the last",
        one_of("corruption", CORRUPTIONS),
        many=True,
        often=True,
    )
    mix_corruptions: bool = flag(
        False, "draw the corruption of each POE outlier out of --corruptions, instead of one for each class"
    )
