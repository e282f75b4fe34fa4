r"""Stage 2 without outliers: train networks on distilled images alone.

    python train_model_synthetic_no_oe.py --method DSA --dataset CIFAR10 --model ConvNet --num_eval 5 --ipc 10 \
        --dsa_strategy color_crop_cutout_flip_scale_rotate --folder 20230307-093217
"""

from utils.core.run_script import run_script
from utils.settings.arguments import Stage2SettingsNoOE, script_parser
from utils.settings.reading import SettingsParser
from utils.stages.stage2 import run_stage2


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return script_parser(Stage2SettingsNoOE, __doc__, "Train networks on a distilled set without outliers.")


def main(settings: Stage2SettingsNoOE) -> None:
    """Train on images alone; outliers in the file are ignored."""
    run_stage2(settings)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "train_model_synthetic_no_oe.py")
