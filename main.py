r"""Stage 1, plain: distil a data set into a few synthetic images per class.

    python main.py --dataset CIFAR10 --model ConvNet --ipc 10 --init real --method DSA \
        --dsa_strategy color_crop_cutout_flip_scale_rotate
"""

from utils.core.run_script import run_script
from utils.settings.arguments import Stage1Settings, script_parser
from utils.settings.reading import SettingsParser
from utils.stages.stage1 import run_stage1


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return script_parser(Stage1Settings, __doc__, "Distil a data set (no outliers).")


def main(settings: Stage1Settings) -> None:
    """Distil without outliers."""
    run_stage1(settings)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "main.py")
