"""Stage 2 from its flags to its run: train networks on a distilled set and keep their checkpoints."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from networks import get_network
from utils.compute import distributed
from utils.compute.compiling import Workload
from utils.compute.device import Compute, choose_compute, choose_device
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.datasets import RealData, load_dataset
from utils.data.synthetic import SyntheticSet, load_synthetic, result_name
from utils.files.torch_files import fingerprint
from utils.methods import augmentation_of
from utils.report.tables import mean_std
from utils.runs.lineage import STAGE1_ROOTS, find_run_folder
from utils.runs.resume import check_inputs
from utils.runs.run_folder import RunFolder, read_args
from utils.training.evaluator import training_of
from utils.training.network_training import TEST_INTERVAL, NetworkTraining
from utils.training.trainer import LR_NET, Trainer, TrainSettings


def find_distilled(args: argparse.Namespace, with_outliers: bool) -> Path:
    """The `res_….pt` that the flags of stage 2 name: under `--load_path`, else under the roots of stage 1.

    The newest one that fits a training with outliers is one that has some.
    """
    name = result_name(args.method, args.dataset, args.model, args.ipc)
    if args.load_path is not None:
        roots: Sequence[str] = [args.load_path]
    else:
        only_oe = args.is_load_oe or (with_outliers and args.folder is None)
        roots = STAGE1_ROOTS[1:] if only_oe else STAGE1_ROOTS
    parts = (args.method, args.dataset, args.model, args.ipc)
    return find_run_folder(roots, parts, args.folder, name, "--load_path") / name


def run_stage2(args: argparse.Namespace, with_outliers: bool) -> None:
    """Everything that a stage-2 script does after parsing."""
    device = choose_device(args.device, args.deterministic)
    augmentation = augmentation_of(args.method, args.dsa_strategy)
    lambda_oe = args.lambda_oe if with_outliers else 0.0
    places = {name: getattr(args, name) for name in ("load_path", "folder")}
    path = (args.resume and _resumed_set(Path(args.resume), places)) or find_distilled(args, with_outliers)
    real = load_dataset(args.dataset, args.data_path, args.im_size, args.download != "none", args.zca).to(device)
    synthetic = load_synthetic(path, args.exp_idx, real)
    if not with_outliers:
        synthetic = synthetic.without_outliers()
    elif synthetic.images_oe is None:
        raise UserError(
            f"--folder: {path} holds no outliers. Give a folder of main_oe.py or main_poe.py (--is_load_oe looks only "
            "there), or use train_model_synthetic_no_oe.py"
        )
    lr = args.lr_net or synthetic.lr_net or LR_NET
    settings = training_of(
        args.model, args.dataset, augmentation, args.epoch_eval_train, lr, args.batch_train, lambda_oe
    )
    compute = _choose_compute(args, settings, real, synthetic)
    net = get_network(args.model, real.channel, real.num_classes, real.im_size, generator(args.seed)).to(device)
    inputs = {
        "data_path": real.fingerprint(),
        "load_path": fingerprint((synthetic.images, synthetic.labels, synthetic.images_oe)),
    }
    run = _run_folder(args, path, settings, device, inputs)
    run.log(f"computing: {compute}")
    trainer = Trainer(net, settings, compute)
    training = NetworkTraining(args.model, real, synthetic.to(device), trainer, args.seed, run, bool(args.resume))
    best, last = zip(*training.train_all(args.num_eval, args.checkpoint_interval), strict=True)
    run.log(f"accuracy over {args.num_eval} networks: best {mean_std(best)} %, last epoch {mean_std(last)} %")


def _choose_compute(
    args: argparse.Namespace, settings: TrainSettings, real: RealData, synthetic: SyntheticSet
) -> Compute:
    """How the device computes, from how long the run is; a tested image counts half a pass."""
    steps = args.num_eval * settings.epochs
    tested = args.num_eval * -(-settings.epochs // TEST_INTERVAL) * len(real.images_test)
    trained = steps * len(synthetic.images) * (1 if synthetic.images_oe is None else 2)
    workload = Workload((trained + tested / 2) / distributed.world_size(), steps, "training")
    net = get_network(args.model, real.channel, real.num_classes, real.im_size, generator(0)).eval()
    return choose_compute(args.compile, args.precision, real.device, net, (real.channel, *real.im_size), workload)


def _resumed_set(folder: Path, places: dict[str, str | None]) -> Path | None:
    """The distilled set of the run in `folder`; None where the flags in `places` are not those it was started with."""
    about = read_args(folder)
    if any(value != about["flags"].get(name) for name, value in places.items()):
        return None
    path = about.get("distilled_set")
    if not isinstance(path, str) or not os.path.isfile(path):
        raise UserError(
            f"--resume: the distilled set of {folder} is gone: {str(path)[:200]}. Put it back, or "
            "give its place now with --load_path and --folder"
        )
    return Path(path)


def _run_folder(
    args: argparse.Namespace, path: Path, settings: TrainSettings, device: torch.device, inputs: dict[str, str]
) -> RunFolder:
    if args.resume:
        check_inputs(Path(args.resume), inputs)
        run = RunFolder(Path(args.resume))
        run.update_args(vars(args), distilled_set=str(path.resolve()))
        run.log("resumed")
        return run
    parts = (args.method, args.dataset, args.model, args.ipc)
    run = RunFolder.create(args.save_path, *parts, name=path.parent.name)  # one name leads through all stages
    about = {"device": str(device), "seed": args.seed, "epochs": settings.epochs, "inputs": inputs}
    run.save_args(vars(args), distilled_set=str(path.resolve()), **about)
    run.log(f"run folder: {run.path}")
    if run.path.name != path.parent.name:
        run.log(f"{path.parent.name} has been trained on before; stage 3 finds this run by --folder {run.path.name}")
    run.log(f"distilled set: {path}, experiment {args.exp_idx}; learning rate of the networks {settings.lr:g}")
    run.log(f"the best checkpoint is chosen by accuracy on the test set, every {TEST_INTERVAL} epochs")
    return run
