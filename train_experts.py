r"""Before stage 1 with --method MTT: train networks on the real set and keep their parameters after every epoch.

    python train_experts.py --dataset CIFAR10 --model ConvNet --num_experts 100 \
        --dsa_strategy color_crop_cutout_flip_scale_rotate

The same command again trains what is missing, also after a stop.
"""

import argparse

from utils.compute import distributed
from utils.compute.compiling import Workload, batches
from utils.compute.device import choose_compute, choose_device
from utils.core.rng import generator
from utils.core.run_script import run_script
from utils.data.augment import DSA, parse_strategy
from utils.data.datasets import RealData
from utils.methods.experts import ExpertSettings, ExpertTraining, all_trained, describe, expert_folder, open_expert_run
from utils.outliers.sources import OutlierSource, PseudoOutliers, load_outlier_pool
from utils.settings import arguments
from utils.settings.common import read_data
from utils.settings.parser import Parser
from utils.training.trainer import TEST_BATCH


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(__doc__.split("\n\n")[1], description="Train experts for --method MTT.")
    arguments.add_experts(parser)
    return parser


def make_outliers(args: argparse.Namespace, real: RealData) -> OutlierSource | None:
    """The source of outliers that `--outliers` names, the same as that of the main script of this kind."""
    if args.outliers == "oe":
        fetch = args.download == "all"
        return load_outlier_pool(args.oe_data_path, real, args.num_oe_per_class, args.seed, fetch)
    return PseudoOutliers(real, tuple(args.corruptions), args.mix_corruptions) if args.outliers == "poe" else None


def workload(num_experts: int, settings: ExpertSettings, real: RealData, with_outliers: bool) -> Workload:
    """The work of this process, as if no expert had been trained before; each epoch ends in a test."""
    s, train, test = settings, len(real.images_train), len(real.images_test)
    epochs = len(distributed.own_share(num_experts)) * s.epochs
    images = train * (1 + s.batch_oe / s.batch if with_outliers else 1)
    steps = epochs * (batches(train, s.batch) + batches(test, TEST_BATCH))
    return Workload(epochs * (images + test / 2), steps, "training")


def main(args: argparse.Namespace) -> None:
    """Train the experts that are missing in the folder of this network and data set."""
    device = choose_device(args.device, args.deterministic)
    real = read_data(args).to(device)
    outliers = make_outliers(args, real)
    settings = ExpertSettings(
        epochs=args.train_epochs,
        lr=args.lr_teacher,
        momentum=args.mom,
        weight_decay=args.l2,
        decay=args.decay,
        batch=args.batch_train,
        batch_oe=args.batch_oe,
        lambda_oe=args.lambda_oe,
        seed=args.seed,
        augmentation=None if args.dsa_strategy is None else DSA(parse_strategy(args.dsa_strategy)),
    )
    net = real.network(args.model, generator(args.seed))
    work = workload(args.num_experts, settings, real, outliers is not None)
    compute = choose_compute(args.compile, args.precision, device, net, (real.channel, *real.im_size), work)
    about = describe(real, args.model, outliers, args.lambda_oe) | {"training": settings.about()}
    folder = expert_folder(args.buffer_path, real, args.model)
    done = f"{args.num_experts} experts of {args.train_epochs} epochs: {folder}"
    if all_trained(folder, about, args.num_experts):
        if distributed.is_main():
            print(f"{done}, trained before")
        return
    run = open_expert_run(folder, about)
    for line in (f"experts: {run.path}", *real.lines()):
        run.log(line)
    run.log(f"computing: {compute}")
    ExpertTraining(net.to(device), real, outliers, settings, compute, run).train_all(args.num_experts)
    run.log(done)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "train_experts.py")
