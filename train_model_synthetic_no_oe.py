r"""Stage 2 without outliers: train networks on distilled images alone.

    python train_model_synthetic_no_oe.py --method DSA --dataset CIFAR10 --model ConvNet --num_eval 5 --ipc 10 \
        --dsa_strategy color_crop_cutout_flip_scale_rotate --folder 20230307-093217
"""

import argparse

from utils.core.run_script import run_script
from utils.runs.resume import add_resume
from utils.settings import arguments
from utils.settings.parser import Parser
from utils.stages.stage2 import run_stage2


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(__doc__.split("\n\n")[1], description="Train networks on a distilled set without outliers.")
    arguments.add_stage2(parser, save_path="result-model-synthetic-no-oe")
    add_resume(parser, "epochs")
    return parser


def main(args: argparse.Namespace) -> None:
    """Train on images alone; outliers in the file are ignored."""
    run_stage2(args, outliers="none")


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "train_model_synthetic_no_oe.py")
