"""Look at everything that the stages of a table will read, before the first one starts, and list all that is missing.

python scripts/check_inputs.py --dataset CIFAR10 --ood_sets CIFAR100 Textures --oe_data_path data/300K_random_images.npy
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from utils.core.errors import UserError
from utils.core.parser import Parser, one_of
from utils.data.datasets import DATASET_NAMES, SPECS, RealData, load_dataset
from utils.data.outliers import load_outlier_pool
from utils.ood.sets import OODSource
from utils.stages.entry import run_script


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="List all inputs that are missing.")
    parser.add_argument("--dataset", type=one_of("dataset", DATASET_NAMES), required=True, help="the data set")
    parser.add_argument("--data_path", default="data", help="where it is")
    parser.add_argument("--oe_data_path", default=None, help="the pool of outlier exposure, if it is used")
    parser.add_argument("--ood_path", default="data/ood", help="where the OOD sets are")
    parser.add_argument("--ood_sets", nargs="+", default=[], help="the OOD sets")
    parser.add_argument("--download", choices=("none", "data", "all"), default="data", help="what may be fetched")
    return parser


def stand_in(name: str) -> RealData:
    """Two black images in the shape of a data set that is missing: other inputs can then be looked at."""
    if name not in SPECS:
        raise UserError(f"--dataset {name}: nothing else can be looked at without it")
    spec = SPECS[name]
    images = torch.zeros(2, spec.channel, spec.side, spec.side, dtype=torch.uint8)
    scale = (1.0,) * spec.channel
    return RealData(name, spec.num_classes, scale, scale, images, torch.arange(2), images, torch.arange(2))


def main(args: argparse.Namespace) -> None:
    """Look at each input; one line lists what is missing."""
    problems = []
    try:
        real = load_dataset(args.dataset, args.data_path, download=args.download != "none")
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
            problems += [f"--ood_sets {name}: {what}" for what in source.find([name])[1].values()]
        except UserError as error:  # damaged
            problems.append(str(error))
    if problems:
        raise UserError(f"{len(problems)} inputs are missing. " + " | ".join(problems))


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "check_inputs.py")
