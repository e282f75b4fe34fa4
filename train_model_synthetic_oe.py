r"""Stage 2 with outliers: train networks on distilled images and outliers, distilled or not.

    python train_model_synthetic_oe.py --method DSA --dataset CIFAR10 --model ConvNet --num_eval 5 --ipc 10 \
        --dsa_strategy color_crop_cutout_flip_scale_rotate --folder 20230206-232257 --is_load_oe --lambda_oe 0.5
"""

from utils.core.run_script import run_script
from utils.settings.arguments import Stage2Settings, script_parser
from utils.settings.reading import SettingsParser
from utils.stages.stage2 import run_stage2


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return script_parser(Stage2Settings, __doc__, "Train networks on a distilled set with outliers.")


def main(settings: Stage2Settings) -> None:
    """Train on images and on the outliers of `--outliers`."""
    run_stage2(settings)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "train_model_synthetic_oe.py")
