"""The flags of outliers in stage 1, and of their weight in network training."""

import argparse
from collections.abc import Mapping
from typing import Any

from utils.outliers.corruptions import CORRUPTIONS, DEFAULT_CORRUPTIONS
from utils.outliers.start import METHODS_OF_RECIPES, RECIPES, STARTS
from utils.settings.parser import Parser, count, number, one_of


def add_outlier_weight(parser: Parser) -> None:
    """The flag of the outliers' weight in network training."""
    parser.add_argument(
        "--lambda_oe",
        type=number(0),
        default=0.5,
        help="weight of the outlier loss in network training; at 0 it counts nothing",
    )


def add_outliers(parser: Parser, distilled: bool = True) -> None:
    """Flags that OE and POE share in stage 1; `distilled`: whether the script distils outliers."""
    group = parser.add_argument_group("outliers")
    group.add_argument("--batch_oe", type=count(1), default=256, help="outliers per slot and step")
    if distilled:
        group.add_argument(
            "--lr_img_oe",
            type=number(0, exclusive=True),
            default=None,
            help="learning rate of the synthetic outliers; left out: --lr_img. Lower it if they become noise",
        )
        group.add_argument(
            "--init_oe",
            type=one_of("start of outliers", STARTS),
            default="random",
            help="which outliers --init real starts from: random ones, or kcenter: far apart in the features of a "
            "network trained on the initial images, out of 10000",
        )
        group.add_argument(
            "--clamp_oe", action="store_true", help="keep the outliers in the range of pixels, after each update"
        )
        group.add_argument(
            "--outlier_recipe",
            type=one_of("outlier recipe", RECIPES),
            default="published",
            help="a set of flags; strong, for MTT: --expert_lambda_oe 2 (what it did: docs/results.md)",
        )
        parser.completions.append(_follow_recipe)
    add_outlier_weight(parser)


def _follow_recipe(
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


def add_oe(parser: Parser) -> None:
    """Flags of outlier exposure: the pool."""
    group = parser.add_argument_group("outlier exposure")
    group.add_argument(
        "--oe_data_path",
        default="data/300K_random_images.npy",
        help="the pool: .npy (uint8 NHWC), .npz (key images), or a folder of images",
    )
    group.add_argument(
        "--num_oe_per_class",
        type=count(1),
        default=10000,
        help="outliers of the pool for each class slot; fewer if the pool is too small",
    )


def add_poe(parser: Parser) -> None:
    """Flags of pseudo-outlier exposure: the corruptions."""
    parser.add_argument(
        "--corruptions",
        nargs="+",
        type=one_of("corruption", CORRUPTIONS),
        default=list(DEFAULT_CORRUPTIONS),
        help=f"how pseudo-outliers are made, out of {', '.join(CORRUPTIONS)}: class 0 uses the first, class 1 the "
        "second, and so on, from the first again after the last",
    )
    parser.add_argument(
        "--mix_corruptions",
        action="store_true",
        help="draw the corruption of each pseudo-outlier out of --corruptions, instead of one for each class",
    )
