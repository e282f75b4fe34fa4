r"""Stage 1, TrustDD with pseudo-outlier exposure: distil images, and outliers made by corrupting training images.

    python main_poe.py --dataset CIFAR10 --model ConvNet --ipc 10 --init real --method DSA \
        --dsa_strategy color_crop_cutout_flip_scale_rotate --lambda_oe 0.5
"""

import argparse

from utils.core.run_script import run_script
from utils.outliers.sources import PseudoOutliers
from utils.runs.resume import add_resume
from utils.settings import arguments
from utils.settings.outliers import Corrupted
from utils.settings.parser import Parser
from utils.stages.stage1 import run_stage1


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(__doc__.split("\n\n")[1], description="Distil a data set and pseudo-outliers (POE).")
    arguments.add_stage1(parser, "result-poe", Corrupted)
    add_resume(parser, "iterations")
    return parser


def main(args: argparse.Namespace) -> None:
    """Distil with corrupted training images as outliers."""
    run_stage1(args, make_outliers=lambda real: PseudoOutliers(real, tuple(args.corruptions), args.mix_corruptions))


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "main_poe.py")
