r"""Before stage 1 with --method MTT: train networks on the real set and keep their parameters after every epoch.

    python train_experts.py --dataset CIFAR10 --model ConvNet --num_experts 100 \
        --dsa_strategy color_crop_cutout_flip_scale_rotate

The same command again trains what is missing, also after a stop.
"""

from utils.core.run_script import run_script
from utils.settings.arguments import script_parser
from utils.settings.distillation import ExpertSettings
from utils.settings.reading import SettingsParser
from utils.stages.expert_training import run_experts


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return script_parser(ExpertSettings, __doc__, "Train experts for --method MTT and TGDD.")


def main(settings: ExpertSettings) -> None:
    """Train the experts that are missing in the folder of this network and data set."""
    run_experts(settings)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "train_experts.py")
