r"""Stage 1, TrustDD with outlier exposure: distil images, and outliers from a pool of real ones.

    python main_oe.py --dataset CIFAR10 --model ConvNet --ipc 10 --init real --method DSA \
        --dsa_strategy color_crop_cutout_flip_scale_rotate --lambda_oe 0.5 --num_oe_per_class 10000
"""

from utils.core.run_script import run_script
from utils.settings.arguments import Stage1SettingsOE, script_parser
from utils.settings.reading import SettingsParser
from utils.stages.stage1 import run_stage1


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return script_parser(Stage1SettingsOE, __doc__, "Distil a data set and real outliers (OE).")


def main(settings: Stage1SettingsOE) -> None:
    """Distil with a pool of real images as outliers."""
    run_stage1(settings)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "main_oe.py")
