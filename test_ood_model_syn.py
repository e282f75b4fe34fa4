r"""Stage 3: accuracy, error detection and OOD detection of the networks that stage 2 trained.

    python test_ood_model_syn.py --method DSA --dataset CIFAR10 --model ConvNet --num_exp 5 --ipc 10 --is_load_oe \
        --folder 20230206-232250 --is_load_best
"""

from utils.core.run_script import run_script
from utils.settings.arguments import Stage3Settings, script_parser
from utils.settings.reading import SettingsParser
from utils.stages.stage3 import run_stage3


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return script_parser(Stage3Settings, __doc__, "Test trained networks: accuracy, error detection, OOD detection.")


def main(settings: Stage3Settings) -> None:
    """Measure and report."""
    run_stage3(settings)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "test_ood_model_syn.py")
