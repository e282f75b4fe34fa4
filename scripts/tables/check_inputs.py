"""Check all inputs of a table before its first stage starts, and list those that are missing or damaged.

    python scripts/tables/check_inputs.py --dataset CIFAR10 --ood_sets CIFAR100 Textures \
        --oe_data_path data/300K_random_images.npy
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import torch

from utils.core.errors import UserError
from utils.core.run_script import run_script
from utils.data.datasets import DATASET_NAMES, SPECS, RealData, Spec, load_dataset
from utils.ood.sets import OODSource, validation_sets
from utils.outliers.sources import load_outlier_pool
from utils.settings.parser import Parser, count, one_of

UNKNOWN = Spec(channel=3, side=64, num_classes=2, mean=None, std=None)


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="List all inputs that are missing or damaged.")
    parser.add_argument("--dataset", type=one_of("dataset", DATASET_NAMES), required=True, help="the data set")
    parser.add_argument("--data_path", default="data", help="its folder or file")
    parser.add_argument("--oe_data_path", default=None, help="the pool of outliers for OE, if it is used")
    parser.add_argument("--ood_path", default="data/ood", help="folder of the OOD sets")
    parser.add_argument("--ood_sets", nargs="+", default=[], help="the OOD sets")
    parser.add_argument("--skip_missing", action="store_true", help="OOD sets may be missing")
    parser.add_argument("--validate", action="store_true", help="validation outliers are needed, too")
    parser.add_argument("--pixel_max", type=count(1), default=None, help="the value of white, if it is not 255")
    parser.add_argument("--download", choices=("none", "data", "all"), default="data", help="what may be downloaded")
    return parser


def stand_in(name: str) -> RealData:
    """Two black images in the shape of a data set that is missing, so that the other inputs can be checked.

    The shape and classes of a data set of the user's own are not known without it; other inputs are fitted to any.
    """
    spec = SPECS.get(name, UNKNOWN)
    images = torch.zeros(2, spec.channel, spec.side, spec.side, dtype=torch.uint8)
    scale = (1.0,) * spec.channel
    return RealData(name, spec.num_classes, scale, scale, images, torch.arange(2), images, torch.arange(2))


def main(args: argparse.Namespace) -> None:
    """Check each input; a `UserError` lists what is missing or damaged in one line."""
    problems = []
    try:
        real = load_dataset(args.dataset, args.data_path, None, args.download != "none", pixel_max=args.pixel_max)
    except UserError as error:
        problems.append(str(error))
        real = stand_in(args.dataset)
    fetch = args.download == "all"
    if args.oe_data_path is not None:
        try:
            load_outlier_pool(args.oe_data_path, real, per_slot=1, seed=1, download=fetch)
        except UserError as error:
            problems.append(str(error))
    source = OODSource(
        real=real, ood_path=Path(args.ood_path), data_path=Path(args.data_path), download=fetch, limit=1, seed=1
    )
    for name in dict.fromkeys(args.ood_sets):
        try:
            missing = source.find([name])[1].values()
            problems += [] if args.skip_missing else [f"--ood_sets {name}: {what}" for what in missing]
        except UserError as error:  # unknown or damaged
            problems.append(str(error))
    if args.validate and not args.skip_missing and not problems:
        try:
            validation_sets(source)
        except UserError as error:
            problems.append(str(error))
    if problems:
        what = "1 input is" if len(problems) == 1 else f"{len(problems)} inputs are"
        raise UserError(f"{what} missing or damaged. " + " | ".join(problems))


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "check_inputs.py")
