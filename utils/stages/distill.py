"""Stage 1 from its flags to its run: what the three main scripts share beside their source of outliers."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from networks import get_network
from utils.compute import distributed
from utils.compute.device import Compute, choose_compute, choose_device
from utils.core.rng import generator
from utils.data.datasets import RealData, load_dataset
from utils.data.outliers import OutlierPool, PseudoOutliers
from utils.data.synthetic import SyntheticSet, load_start
from utils.files.torch_files import fingerprint
from utils.methods.gradient_matching import GradientMatching, MatchSettings
from utils.ood.sets import OODSource
from utils.runs.checkpoints import Checkpointer
from utils.runs.resume import check_inputs
from utils.runs.run_folder import RunFolder
from utils.runs.tensorboard import Scalars, require_tensorboard
from utils.stages.arguments import dsa_of, loops_of
from utils.stages.distillation import Distillation, DistillSettings
from utils.training.evaluator import EvalSettings, Evaluator, evaluation_models, training_of
from utils.training.trainer import TrainSettings

Outliers = OutlierPool | PseudoOutliers | None


def run_stage1(args: argparse.Namespace, make_outliers: Callable[[RealData], Outliers]) -> None:
    """Everything that a main script does after parsing; `make_outliers` gives its source of outliers."""
    device = choose_device(args.device, args.deterministic)
    match = _match_settings(args)
    training = _training(args, match)
    real = load_dataset(args.dataset, args.data_path, args.im_size, args.download != "none").to(device)
    for model in training:  # a network that does not fit must be known before hours of distillation
        get_network(model, real.channel, real.num_classes, real.im_size, generator(args.seed))
    outliers = make_outliers(real)
    args.load_path = args.load_path and os.path.abspath(args.load_path)  # a run may be resumed from another folder
    start = [] if args.resume else load_start(args.load_path, real, args.ipc, outliers is not None)
    settings = _settings(args)
    evaluation = EvalSettings(args.num_eval, training, args.seed, _eval_ood(args, real))
    passes = passes_of(settings, match, evaluation, real, outliers is not None)
    steps = args.num_exp * args.Iteration * match.outer_loop
    compute = choose_compute(args.compile, args.precision, device, args.model, real, passes, steps, "matching")
    method = GradientMatching(real, outliers, match, compute, start)
    if args.tensorboard:
        require_tensorboard()
    inputs = _inputs(real, outliers, evaluation.ood) | _start_inputs(start)
    run = _run_folder(args, match, real, inputs)
    evaluator = Evaluator(real, evaluation, run, compute)
    checkpointer = Checkpointer(run, interval=args.checkpoint_interval)
    distillation = Distillation(method, evaluator, settings, run, checkpointer)
    restored = bool(args.resume) and distillation.restore()
    if args.resume and distillation.starts_another:
        method.initial = load_start(args.load_path, real, args.ipc, outliers is not None)
        check_inputs(run.path, _start_inputs(method.initial))
    if args.resume:
        run.update_args(vars(args))
    if args.tensorboard and run.speaks:
        run.scalars = Scalars(run.path, run.metrics())
    for line in _notices(args, tuple(training), outliers, compute, resumed=restored):
        run.log(line)
    distillation.run_all()
    if device.type == "cuda":
        run.log(f"peak GPU memory: {torch.cuda.max_memory_reserved() / 1e9:.2f} GB")


def _settings(args: argparse.Namespace) -> DistillSettings:
    flags = {k: v for k, v in vars(args).items() if k != "resume"}
    last_only = args.eval_mode not in ("S", "SS")
    return DistillSettings(
        args.method, args.model, args.ipc, args.num_exp, args.Iteration, args.eval_interval, last_only, flags
    )


def _training(args: argparse.Namespace, match: MatchSettings) -> dict[str, TrainSettings]:
    """How each network of `--eval_mode` is trained."""
    return {
        model: training_of(
            model, args.dataset, match.dsa, args.epoch_eval_train, args.lr_net, args.batch_train, match.lambda_oe
        )
        for model in evaluation_models(args.eval_mode, args.model)
    }


def passes_of(
    run: DistillSettings, match: MatchSettings, evaluation: EvalSettings, real: RealData, with_outliers: bool
) -> float:
    """How many images a run sends through networks there and back, in this process; a tested image is half of one."""
    kinds = 2 if with_outliers else 1
    per_class = min(match.batch_real, len(real.images_train) // real.num_classes)
    steps = run.num_exp * run.iterations * match.outer_loop
    matched = steps * real.num_classes * (per_class + match.batch_oe * (kinds - 1))
    per_epoch = kinds * real.num_classes * match.ipc
    trained = run.num_exp * run.iterations * (match.outer_loop - 1) * match.inner_loop * per_epoch  # by rank 0
    times = 1 if run.eval_last_only else 1 + -(-run.iterations // run.eval_interval)
    network = sum(t.epochs * per_epoch + len(real.images_test) / 2 for t in evaluation.training.values())
    evaluated = run.num_exp * times * evaluation.num_networks * network
    return (matched + evaluated) / distributed.world() + trained


def _inputs(real: RealData, outliers: Outliers, ood: dict[str, torch.Tensor]) -> dict[str, str]:
    """Fingerprints of what every run reads, by flag."""
    inputs = {"data_path": real.fingerprint()}
    if isinstance(outliers, OutlierPool):
        inputs["oe_data_path"] = outliers.fingerprint()
    if ood:
        inputs["ood_path"] = fingerprint(ood.values())
    return inputs


def _start_inputs(start: Sequence[SyntheticSet]) -> dict[str, str]:
    """Fingerprint of the sets that experiments start from, if there are any."""
    return {"load_path": fingerprint(t for s in start for t in (s.images, s.images_oe))} if start else {}


def _eval_ood(args: argparse.Namespace, real: RealData) -> dict[str, torch.Tensor]:
    """The images of the sets of `--eval_ood`."""
    if not args.eval_ood:
        return {}
    source = OODSource(
        real, Path(args.ood_path), Path(args.data_path), args.download == "all", len(real.images_test), args.seed
    )
    return {ood.name: ood.load() for ood in source.find_all(args.eval_ood, "--eval_ood")}


def _run_folder(args: argparse.Namespace, match: MatchSettings, real: RealData, inputs: dict[str, str]) -> RunFolder:
    if args.resume:
        check_inputs(Path(args.resume), inputs)
        return RunFolder(Path(args.resume))
    run = RunFolder.create(args.save_path, args.method, args.dataset, args.model, args.ipc)
    loops = {"outer_loop": match.outer_loop, "inner_loop": match.inner_loop}
    run.save_args(vars(args), device=str(real.device), seed=args.seed, inputs=inputs, **loops)
    run.log(f"run folder: {run.path}")
    return run


def _match_settings(args: argparse.Namespace) -> MatchSettings:
    outer_loop, inner_loop, _ = loops_of(args)
    return MatchSettings(
        args.model, args.ipc, args.seed, args.lr_img, args.lr_net, args.batch_real, getattr(args, "batch_oe", 0),
        args.batch_train, getattr(args, "lambda_oe", 0.0), args.dis_metric, args.init, outer_loop, inner_loop,
        dsa_of(args),
    )  # fmt: skip


def _notices(
    args: argparse.Namespace, models: tuple[str, ...], outliers: Outliers, compute: Compute, resumed: bool
) -> list[str]:
    """What the user should know before the run starts; of a resumed one only what may be another than before."""
    processes = f", {distributed.world()} processes" if distributed.world() > 1 else ""
    computing = f"computing: {compute}{processes}"
    if resumed:
        return [computing]
    lines = [loops_of(args)[2], outliers.notice if outliers else ""]
    if args.method == "DC" and args.dsa_strategy:
        lines.append(f"--dsa_strategy {args.dsa_strategy} is not used by --method DC")
    if args.eval_mode == "S" and models != (args.model,):
        lines.append(f"--eval_mode S evaluates {models[0]} instead of {args.model}; --eval_mode SS keeps BatchNorm")
    return [line for line in lines if line] + [computing]
