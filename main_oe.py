r"""Stage 1, TrustDD with outlier exposure: distil images, and outliers from a pool of real ones.

    python main_oe.py --dataset CIFAR10 --model ConvNet --ipc 10 --init real --method DSA \
        --dsa_strategy color_crop_cutout_flip_scale_rotate --lambda_oe 0.5 --num_oe_per_class 10000
"""

import argparse

from utils.core.run_script import run_script
from utils.outliers.sources import load_outlier_pool
from utils.runs.resume import add_resume
from utils.settings import arguments
from utils.settings.outliers import Pool
from utils.settings.parser import Parser
from utils.stages.stage1 import run_stage1


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(__doc__.split("\n\n")[1], description="Distil a data set and real outliers (OE).")
    arguments.add_stage1(parser, "result-oe", Pool)
    add_resume(parser, "iterations")
    return parser


def main(args: argparse.Namespace) -> None:
    """Distil with a pool of real images as outliers."""
    fetch = args.download == "all"
    run_stage1(
        args,
        make_outliers=lambda real: load_outlier_pool(args.oe_data_path, real, args.num_oe_per_class, args.seed, fetch),
    )


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "main_oe.py")
