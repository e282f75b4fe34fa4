r"""Stage 2 with outliers: train networks on distilled images and outliers, distilled or not.

    python train_model_synthetic_oe.py --method DSA --dataset CIFAR10 --model ConvNet --num_eval 5 --ipc 10 \
        --dsa_strategy color_crop_cutout_flip_scale_rotate --folder 20230206-232257 --is_load_oe --lambda_oe 0.5
"""

import argparse

from utils.core.run_script import run_script
from utils.runs.resume import add_resume
from utils.settings import arguments
from utils.settings.parser import Parser
from utils.stages.stage2 import run_stage2


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(__doc__.split("\n\n")[1], description="Train networks on a distilled set with outliers.")
    arguments.add_stage2(parser, "result-model-synthetic-oe", with_outliers=True)
    add_resume(parser, "epochs")
    return parser


def main(args: argparse.Namespace) -> None:
    """Train on images and on the outliers of `--outliers`."""
    run_stage2(args, outliers=args.outliers)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "train_model_synthetic_oe.py")
