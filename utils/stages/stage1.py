"""Stage 1, from flags to run: what the three main scripts share. They differ in their source of outliers."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from utils.compute import distributed
from utils.compute.compiling import Workload, batches
from utils.compute.device import Compute, choose_compute, choose_device
from utils.core.errors import UserError, blame
from utils.core.rng import generator
from utils.core.torch_files import fingerprint
from utils.data.datasets import RealData
from utils.data.distilled_file import DistilledFile
from utils.data.identity import identity
from utils.data.synthetic import SyntheticSet
from utils.methods import METHODS, Method, MethodInputs, augmentation_of
from utils.methods.learnable import check_class_sizes
from utils.ood.sets import OODSource
from utils.outliers.sources import OutlierSource
from utils.runs.checkpoints import Checkpointer
from utils.runs.lineage import next_command, root_of
from utils.runs.resume import check_inputs
from utils.runs.run_folder import RunFolder
from utils.runs.tensorboard import TensorBoardWriter, require_tensorboard
from utils.settings.arguments import passed_on
from utils.settings.common import read_data
from utils.stages.evaluation import EvalSettings, Evaluator, evaluation_models, training_of
from utils.stages.loop import Distillation, DistillSettings
from utils.training.trainer import TEST_BATCH


def run_stage1(args: argparse.Namespace, make_outliers: Callable[[RealData], OutlierSource | None]) -> None:
    """Everything that a main script does after parsing; `make_outliers` returns its source of outliers."""
    device = choose_device(args.device, args.deterministic)
    augmentation = augmentation_of(args.method, args.dsa_strategy)
    if args.tensorboard:
        require_tensorboard()
    args.load_path = args.load_path and os.path.abspath(args.load_path)  # a run may be resumed from another folder
    real = read_data(args).to(device)
    models = _evaluation_models(args.eval_mode, args.model, real)
    how = (args.epoch_eval_train, args.lr_net, args.batch_train, getattr(args, "lambda_oe", 0.0))
    training = {model: training_of(model, args.dataset, augmentation, *how) for model in models}
    outliers = make_outliers(real)
    if args.init == "real" and not args.load_path and not args.resume:
        check_class_sizes(real, outliers, args.ipc)
    start = [] if args.resume else _start(args.load_path, real, args.ipc, outliers is not None)
    ood = _ood_images(args.eval_ood or (), real, args.ood_path, args.data_path, args.download == "all", args.seed)
    evaluation = EvalSettings(args.num_eval, training, args.seed, ood)
    inputs = MethodInputs(real, outliers, vars(args), augmentation, initial=start)
    settings = DistillSettings(
        method=args.method,
        model=args.model,
        ipc=args.ipc,
        num_exp=args.num_exp,
        iterations=args.Iteration,
        eval_interval=args.eval_interval,
        eval_last_only=args.eval_mode not in ("S", "SS"),
        flags={k: v for k, v in vars(args).items() if k != "resume"},
    )
    inputs = replace(inputs, compute=_choose_compute(inputs, settings, evaluation))
    method = METHODS[args.method].build(inputs)
    run = _run_folder(settings, inputs, method, _fingerprints(inputs, ood) | dict(method.fingerprints))
    evaluator = Evaluator(real, evaluation, run, inputs.compute)
    checkpointer = Checkpointer(run, interval=args.checkpoint_interval)
    distillation = Distillation(method, evaluator, settings, run, checkpointer)
    restored = bool(args.resume) and _restore(distillation, inputs, args.load_path)
    if args.tensorboard and run.is_main:
        run.tensorboard = TensorBoardWriter(run.path, run.metrics())
    for line in [*([] if restored else _notices(inputs, method, evaluator.models)), _computing(inputs.compute)]:
        run.log(line)
    distillation.run_all()
    _end(run, vars(args), real.device, outliers is not None)


def _end(run: RunFolder, flags: dict, device: torch.device, with_outliers: bool) -> None:
    """Record that the run has ended, and log the command of the next stage."""
    run.finish()
    if device.type == "cuda":
        run.log(f"peak GPU memory: {torch.cuda.max_memory_reserved() / 1e9:.2f} GB")
    if command := stage2_command(flags, run.path, with_outliers):
        run.log(f"to train networks on it: {command}")


def stage2_command(flags: dict, folder: Path, with_outliers: bool) -> str | None:
    """The command that trains networks on the distilled set of a run folder; None where stage 2 would not find it."""
    own = ("num_eval", "epoch_eval_train", "lr_net", "batch_train", "dsa_strategy", "precision", "lambda_oe")
    kept = passed_on(flags, *own)
    root = root_of(folder, (flags["method"], flags["dataset"], flags["model"], flags["ipc"]))
    script = "train_model_synthetic_oe.py" if with_outliers else "train_model_synthetic_no_oe.py"
    where = {"is_load_oe": with_outliers, "load_path": root, "folder": folder.name}
    return root and next_command(script, kept | where)


def _evaluation_models(eval_mode: str, model: str, real: RealData) -> list[str]:
    """The networks of `--eval_mode`, each built once to be tried.

    Raises:
        UserError: when one does not take images of this size, which must be known before hours of distillation.
    """
    models = list(evaluation_models(eval_mode, model))
    for name in models:
        try:
            real.network(name, generator(0))
        except UserError as error:
            if name == model:
                raise
            reason = str(error).removeprefix(f"--model {name}: ").split(". ")[0]
            raise UserError(f"--eval_mode {eval_mode}: {name}: {reason}. Choose another mode, e.g. S") from None
    return models


def _choose_compute(inputs: MethodInputs, settings: DistillSettings, evaluation: EvalSettings) -> Compute:
    """How the device computes, from how long the run is."""
    real, flags = inputs.real, inputs.flags
    net = real.network(settings.model, generator(0)).eval()
    workload = total_workload(METHODS[settings.method].workload(inputs), settings, evaluation, inputs)
    shape = (real.channel, *real.im_size)
    return choose_compute(flags["compile"], flags["precision"], real.device, net, shape, workload)


def total_workload(
    iteration: Workload, settings: DistillSettings, evaluation: EvalSettings, inputs: MethodInputs
) -> Workload:
    """The work of a whole run in this process, from that of one iteration; a tested image counts half a pass."""
    s, real = settings, inputs.real
    per_epoch = (1 if inputs.outliers is None else 2) * real.num_classes * s.ipc
    times = 1 if s.eval_last_only else 1 + -(-s.iterations // s.eval_interval)
    networks = s.num_exp * times * evaluation.num_networks / distributed.world_size()
    trained = networks * sum(t.epochs for t in evaluation.training.values()) * per_epoch
    sizes = [len(real.images_test), *map(len, evaluation.ood.values())]
    tested = networks * len(evaluation.training) * sum(sizes) / 2
    iterations = s.num_exp * s.iterations
    updates = sum(t.epochs * batches(real.num_classes * s.ipc, t.batch) for t in evaluation.training.values())
    test_batches = len(evaluation.training) * sum(batches(size, TEST_BATCH) for size in sizes)
    most = s.num_exp * times * batches(evaluation.num_networks, distributed.world_size())  # so that all decide alike
    return Workload(
        iterations * iteration.passes + trained + tested,
        iterations * iteration.steps + most * (updates + test_batches),
        iteration.kind,
    )


def _ood_images(
    names: Sequence[str], real: RealData, ood_path: str, data_path: str, download: bool, seed: int
) -> dict[str, torch.Tensor]:
    """The images of the sets of `--eval_ood`, by name."""
    limit = len(real.images_test)
    source = OODSource(real, Path(ood_path), Path(data_path), download, limit, seed, flag="--eval_ood")
    return {ood.name: ood.load() for ood in source.find_all(names)}


def _fingerprints(inputs: MethodInputs, ood: dict[str, torch.Tensor]) -> dict[str, str]:
    """Fingerprints of all that a run reads, by flag."""
    prints = {"data_path": inputs.real.fingerprint()}
    outliers = inputs.outliers and inputs.outliers.fingerprint()
    if outliers:
        prints["oe_data_path"] = outliers
    if ood:
        prints["ood_path"] = fingerprint(ood.values())
    return prints | _start_fingerprint(inputs.initial)


def _start_fingerprint(start: Sequence[SyntheticSet]) -> dict[str, str]:
    """Fingerprint of the sets that experiments start from, if there are any."""
    return {"load_path": fingerprint(t for s in start for t in (s.images, s.images_oe))} if start else {}


def _run_folder(
    settings: DistillSettings, inputs: MethodInputs, method: Method, fingerprints: dict[str, str]
) -> RunFolder:
    """The folder of the run: that of `--resume`, or a new one."""
    s, flags, real = settings, dict(inputs.flags), inputs.real
    if flags["resume"]:
        check_inputs(Path(flags["resume"]), fingerprints)
        return RunFolder(Path(flags["resume"]))
    run = RunFolder.create(flags["save_path"], s.method, real.name, s.model, s.ipc)
    about = {"device": str(real.device), "seed": flags["seed"], "inputs": fingerprints, "data": identity(real)}
    run.save_args(flags, **about, **method.about)
    run.log(f"run folder: {run.path}")
    return run


def _start(load_path: str | None, real: RealData, ipc: int, with_outliers: bool) -> list[SyntheticSet]:
    """All experiments of the set from which a distillation starts; an empty list without `--load_path`."""
    if load_path is None:
        return []
    with blame("--load_path"):
        return DistilledFile.open(load_path, "").start(real, ipc, with_outliers)


def _restore(distillation: Distillation, inputs: MethodInputs, load_path: str | None) -> bool:
    """Continue from the run's checkpoint; False where there is none yet."""
    run, method = distillation.run, distillation.method
    restored = distillation.restore()
    if distillation.starts_another:
        method.initial = _start(load_path, inputs.real, inputs.flags["ipc"], inputs.outliers is not None)
        check_inputs(run.path, _start_fingerprint(method.initial))
    run.update_args(dict(inputs.flags))
    return restored


def _notices(inputs: MethodInputs, method: Method, models: Sequence[str]) -> list[str]:
    """What the user should know before the run starts; `models`: the networks that evaluate."""
    flags = inputs.flags
    entry = METHODS[flags["method"]]
    lines = [*inputs.real.lines(), *method.notices, method.outliers.notice if method.outliers else ""]
    defaults = " ".join(f"--{n} {v}" for n, v in entry.defaults.items() if flags.get(n) == v)
    if defaults:
        lines.append(f"defaults of --method {entry.name}: {defaults}")
    if flags["dsa_strategy"] and entry.augmentation == "unused":
        lines.append(f"--dsa_strategy {flags['dsa_strategy']} is not used by --method {flags['method']}")
    if flags["eval_mode"] == "S" and tuple(models) != (flags["model"],):
        lines.append(f"--eval_mode S evaluates {models[0]} instead of {flags['model']}; --eval_mode SS keeps BatchNorm")
    return [line for line in lines if line]


def _computing(compute: Compute) -> str:
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    return f"computing: {compute}{processes}"
