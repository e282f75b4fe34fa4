r"""Stage 3: accuracy, error detection and OOD detection of the networks that stage 2 trained.

    python test_ood_model_syn.py --method DSA --dataset CIFAR10 --model ConvNet --num_exp 5 --ipc 10 --is_load_oe \
        --folder 20230206-232250 --is_load_best
"""

import argparse

from utils.core.run_script import run_script
from utils.settings import arguments
from utils.settings.parser import Parser
from utils.stages.stage3 import run_stage3


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(
        __doc__.split("\n\n")[1], description="Test trained networks: accuracy, error detection, OOD detection."
    )
    arguments.add_stage3(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure and report."""
    run_stage3(args)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "test_ood_model_syn.py")
