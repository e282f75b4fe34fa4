r"""Before stage 1 with --method MTT: train networks on the real set and keep their parameters after every epoch.

    python train_experts.py --dataset CIFAR10 --model ConvNet --num_experts 100 \
        --dsa_strategy color_crop_cutout_flip_scale_rotate

The same command again trains what is missing, also after a stop.
"""

from utils.compute import distributed
from utils.compute.compiling import Workload, batches
from utils.compute.device import choose_compute, choose_device
from utils.core.rng import generator
from utils.core.run_script import run_script
from utils.data.datasets import RealData
from utils.methods.experts import ExpertTraining, all_trained, describe, expert_folder, open_expert_run
from utils.settings.arguments import script_parser
from utils.settings.common import read_data
from utils.settings.distillation import source_of
from utils.settings.experts import ExpertSettings
from utils.settings.reading import SettingsParser
from utils.training.trainer import TEST_BATCH


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return script_parser(ExpertSettings, __doc__, "Train experts for --method MTT.")


def workload(s: ExpertSettings, real: RealData) -> Workload:
    """The work of this process, as if no expert had been trained before; each epoch ends in a test."""
    train, test = len(real.images_train), len(real.images_test)
    epochs = len(distributed.own_share(s.num_experts)) * s.train_epochs
    images = train * (1 if s.outliers == "none" else 1 + s.batch_oe / s.batch)
    steps = epochs * (batches(train, s.batch) + batches(test, TEST_BATCH))
    return Workload(epochs * (images + test / 2), steps, "training")


def main(settings: ExpertSettings) -> None:
    """Train the experts that are missing in the folder of this network and data set."""
    s = settings
    device = choose_device(s.device, s.deterministic)
    real = read_data(s).to(device)
    outliers = source_of(s, real)
    net = real.network(s.model, generator(s.seed))
    shape = (real.channel, *real.im_size)
    compute = choose_compute(s.compile, s.precision, device, net, shape, workload(s, real))
    about = describe(real, s.model, outliers, s.lambda_oe) | {"training": s.about()}
    folder = expert_folder(s.buffer_path, real, s.model)
    done = f"{s.num_experts} experts of {s.train_epochs} epochs: {folder}"
    if all_trained(folder, about, s.num_experts):
        if distributed.is_main():
            print(f"{done}, trained before")
        return
    run = open_expert_run(folder, about)
    for line in (f"experts: {run.path}", *real.lines()):
        run.log(line)
    run.log(f"computing: {compute}")
    ExpertTraining(net.to(device), real, outliers, s, compute, run).train_all()
    run.log(done)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "train_experts.py")
