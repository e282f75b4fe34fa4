r"""Stage 1, TrustDD with pseudo-outlier exposure: distil images, and outliers made by corrupting training images.

    python main_poe.py --dataset CIFAR10 --model ConvNet --ipc 10 --init real --method DSA \
        --dsa_strategy color_crop_cutout_flip_scale_rotate --lambda_oe 0.5
"""

from utils.core.run_script import run_script
from utils.settings.arguments import Stage1SettingsPOE, script_parser
from utils.settings.reading import SettingsParser
from utils.stages.stage1 import run_stage1


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return script_parser(Stage1SettingsPOE, __doc__, "Distil a data set and pseudo-outliers (POE).")


def main(settings: Stage1SettingsPOE) -> None:
    """Distil with corrupted training images as outliers."""
    run_stage1(settings)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "main_poe.py")
