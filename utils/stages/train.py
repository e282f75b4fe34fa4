"""Stage 2 from its flags to its run: train networks on a distilled set and keep their checkpoints."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

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
from utils.training.trainer import LR_NET, Trainer


def find_distilled(
    parts: tuple[str, str, str, int], folder: str | None = None, load_path: str | None = None, only_oe: bool = False
) -> Path:
    """The `res_….pt` of the run `folder` (None: the newest that fits) under `load_path` or the roots of stage 1.

    Args:
        parts: method, data set, network and images per class.
        only_oe: look only where runs with outliers are written, when there is no `load_path`.

    Raises:
        UserError: when there is none.
    """
    roots: Sequence[str] = STAGE1_ROOTS[1:] if only_oe else STAGE1_ROOTS
    if load_path is not None:
        roots = [load_path]
    name = result_name(*parts)
    return find_run_folder(roots, parts, folder, name, "--load_path") / name


def run_stage2(args: argparse.Namespace, with_outliers: bool) -> None:
    """Everything that a stage-2 script does after parsing."""
    device = choose_device(args.device, args.deterministic)
    augmentation = augmentation_of(args.method, args.dsa_strategy)
    lambda_oe = args.lambda_oe if with_outliers else 0.0
    parts = (args.method, args.dataset, args.model, args.ipc)
    path = args.resume and _resumed_set(Path(args.resume), {"load_path": args.load_path, "folder": args.folder})
    only_oe = args.is_load_oe or (with_outliers and args.folder is None)  # the newest that fits has outliers then
    path = path or find_distilled(parts, args.folder, args.load_path, only_oe)
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
    work = _workload(args.num_eval, settings.epochs, real, synthetic)
    compute = _choose_compute(args.compile, args.precision, args.model, real, work)
    net = get_network(args.model, real.channel, real.num_classes, real.im_size, generator(args.seed)).to(device)
    inputs = {
        "data_path": real.fingerprint(),
        "load_path": fingerprint((synthetic.images, synthetic.labels, synthetic.images_oe)),
    }
    if args.resume:
        run = _resume(Path(args.resume), inputs, vars(args), path)
    else:
        about = {"device": str(device), "seed": args.seed, "epochs": settings.epochs, "inputs": inputs}
        run = _start(args.save_path, parts, path, vars(args), about)
        run.log(f"distilled set: {path}, experiment {args.exp_idx}; learning rate of the networks {settings.lr:g}")
    run.log(f"computing: {compute}")
    trainer = Trainer(net, settings, compute)
    training = NetworkTraining(args.model, real, synthetic.to(device), trainer, args.seed, run, bool(args.resume))
    best, last = zip(*training.train_all(args.num_eval, args.checkpoint_interval), strict=True)
    run.log(f"accuracy over {args.num_eval} networks: best {mean_std(best)} %, last epoch {mean_std(last)} %")


def _workload(num_networks: int, epochs: int, real: RealData, synthetic: SyntheticSet) -> Workload:
    """The work of a run in this process; a tested image counts half a pass."""
    steps = num_networks * epochs
    tested = num_networks * -(-epochs // TEST_INTERVAL) * len(real.images_test)
    trained = steps * len(synthetic.images) * (1 if synthetic.images_oe is None else 2)
    return Workload((trained + tested / 2) / distributed.world_size(), steps, "training")


def _choose_compute(compile_flag: str, precision: str, model: str, real: RealData, workload: Workload) -> Compute:
    """How the device computes, from how long the run is."""
    net = get_network(model, real.channel, real.num_classes, real.im_size, generator(0)).eval()
    return choose_compute(compile_flag, precision, real.device, net, (real.channel, *real.im_size), workload)


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


def _resume(folder: Path, inputs: dict[str, str], flags: dict, distilled_set: Path) -> RunFolder:
    """The run folder of `--resume`.

    Raises:
        UserError: when the data or the distilled set have changed since.
    """
    check_inputs(folder, inputs)
    run = RunFolder(folder)
    run.update_args(flags, distilled_set=str(distilled_set.resolve()))
    run.log("resumed")
    return run


def _start(save_path: str, parts: Sequence[str | int], distilled_set: Path, flags: dict, about: dict) -> RunFolder:
    """A new run folder, named as that of the distilled set, so that one name leads through all stages."""
    name = distilled_set.parent.name
    run = RunFolder.create(save_path, *parts, name=name)
    run.save_args(flags, distilled_set=str(distilled_set.resolve()), **about)
    run.log(f"run folder: {run.path}")
    if run.path.name != name:
        run.log(f"{name} has been trained on before; stage 3 finds this run by --folder {run.path.name}")
    run.log(f"the best checkpoint is chosen by accuracy on the test set, every {TEST_INTERVAL} epochs")
    return run
