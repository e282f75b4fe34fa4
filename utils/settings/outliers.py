"""Settings of outliers in stage 1 and in the training of experts, and of their weight in network training."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.outliers.corruptions import CORRUPTIONS, DEFAULT_CORRUPTIONS
from utils.outliers.start import METHODS_OF_RECIPES, RECIPES, STARTS
from utils.settings.fields import flag
from utils.settings.parser import Parser, count, number, one_of


@dataclass(frozen=True)
class OutlierTraining:
    """Outliers in network training."""

    lambda_oe: float = flag(
        0.5, "weight of the outlier loss in network training; at 0 it counts nothing", number(0), often=True
    )


@dataclass(frozen=True)
class OutlierBatches:
    """Outliers in batches."""

    batch_oe: int = flag(256, "outliers per slot and step", count(1))


@dataclass(frozen=True)
class DistilledOutliers:
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
        names=tuple(RECIPES),
    )


@dataclass(frozen=True)
class Pool:
    """Outlier exposure."""

    oe_data_path: str = flag(
        "data/300K_random_images.npy",
        "the pool: .npy (uint8 NHWC), .npz (key images), or a folder of images",
        often=True,
    )
    num_oe_per_class: int = flag(
        10000, "outliers of the pool for each class slot; fewer if the pool is too small", count(1)
    )


@dataclass(frozen=True)
class Corrupted:
    """Pseudo-outlier exposure."""

    corruptions: tuple[str, ...] = flag(
        DEFAULT_CORRUPTIONS,
        f"how pseudo-outliers are made, out of {', '.join(CORRUPTIONS)}: class 0 uses the first, class 1 the second, "
        "and so on, from the first again after the last",
        one_of("corruption", CORRUPTIONS),
        many=True,
        often=True,
    )
    mix_corruptions: bool = flag(
        False, "draw the corruption of each pseudo-outlier out of --corruptions, instead of one for each class"
    )


def follow_recipe(
    parser: Parser, args: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """Set the flags of `--outlier_recipe` that were not given."""
    method = METHODS_OF_RECIPES.get(args.outlier_recipe, args.method)
    if args.method != method:
        parser.error(
            f"--outlier_recipe {args.outlier_recipe}: --method {args.method} has no such; --method {method} has"
        )
    for name, value in RECIPES.get(args.outlier_recipe, {}).items():
        if name not in given:
            setattr(args, name, value)
    return args, given
