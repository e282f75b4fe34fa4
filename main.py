r"""Stage 1, plain: distil a data set into a few synthetic images per class.

    python main.py --dataset CIFAR10 --model ConvNet --ipc 10 --init real --method DSA \
        --dsa_strategy color_crop_cutout_flip_scale_rotate
"""

import argparse

from utils.core.run_script import run_script
from utils.runs.resume import add_resume
from utils.settings import arguments
from utils.settings.parser import Parser
from utils.stages.stage1 import run_stage1


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(__doc__.split("\n\n")[1], description="Distil a data set (no outliers).")
    arguments.add_stage1(parser, save_path="result")
    add_resume(parser, "iterations")
    return parser


def main(args: argparse.Namespace) -> None:
    """Distil without outliers."""
    run_stage1(args, make_outliers=lambda real: None)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "main.py")
