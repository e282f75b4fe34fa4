"""Stage 1, from flags to run: what the three main scripts share. They differ in their source of outliers."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from utils.compute import distributed
from utils.compute.device import Compute, Workload, batches, choose_compute, choose_device
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
from utils.runs.checkpoints import Checkpointer
from utils.runs.lineage import root_of
from utils.runs.resume import check_inputs
from utils.runs.run_folder import RunFolder
from utils.runs.tensorboard import TensorBoardWriter, require_tensorboard
from utils.settings.arguments import Stage1Settings, Stage2Settings, Stage2SettingsNoOE, carried, command_of
from utils.settings.common import Batches, Determinism, OutlierTraining, Speed, Training, TrainingProtocol, read_data
from utils.settings.distillation import source_of
from utils.settings.fields import as_dict
from utils.stages.evaluation import EvalSettings, Evaluator, evaluation_models, training_of
from utils.stages.expert_training import train_missing
from utils.stages.loop import Distillation
from utils.training.trainer import TEST_BATCH


def run_stage1(settings: Stage1Settings) -> None:
    """Everything that a main script does after parsing."""
    s, entry = settings, METHODS[settings.method]
    device = choose_device(s.device, s.deterministic)
    augmentation = augmentation_of(s.method, s.dsa_strategy)
    if s.tensorboard:
        require_tensorboard()
    s = replace(s, load_path=s.load_path and os.path.abspath(s.load_path))  # it may be resumed from another folder
    real = read_data(s).to(device)
    models = _evaluation_models(s.eval_mode, s.model, real)
    training = {model: training_of(s, model, augmentation) for model in models}
    outliers = source_of(s, real)
    if s.init == "real" and not s.load_path and not s.resume:
        check_class_sizes(real, outliers, s.ipc, s.factor)
    start = [] if s.resume else _start(s, real)
    evaluation = EvalSettings(s.num_eval, training, s.seed, _ood_images(s, real))
    inputs = MethodInputs(real, outliers, s, augmentation, initial=start)
    inputs = replace(inputs, compute=_choose_compute(inputs, evaluation))
    own = entry.own(s)
    if experts := entry.experts(own):
        train_missing(experts, real)
    method = entry.build(replace(inputs, settings=own))
    run = _run_folder(inputs, method, _fingerprints(inputs, evaluation.ood) | dict(method.fingerprints))
    evaluator = Evaluator(real, evaluation, run, inputs.compute)
    distillation = Distillation(method, evaluator, s, run, Checkpointer(run, interval=s.checkpoint_interval))
    restored = bool(s.resume) and _restore(distillation, inputs)
    if s.tensorboard and run.is_main:
        run.tensorboard = TensorBoardWriter(run.path, run.metrics())
    for line in [*([] if restored else _notices(inputs, method, evaluator.models)), _computing(inputs.compute)]:
        run.log(line)
    distillation.run_all()
    run.finish()
    if device.type == "cuda":
        run.log(f"peak GPU memory: {torch.cuda.max_memory_reserved() / 1e9:.2f} GB")
    if command := stage2_command(s, run.path):
        run.log(f"to train networks on it: {command}")


def stage2_command(s: Stage1Settings, folder: Path) -> str | None:
    """The command that trains networks on the distilled set of a run folder; None where stage 2 would not find it."""
    root = root_of(folder, (s.method, s.dataset, s.model, s.ipc))
    if root is None:
        return None
    plain = s.outliers == "none"
    script = "train_model_synthetic_no_oe.py" if plain else "train_model_synthetic_oe.py"
    where = {"is_load_oe": not plain, "load_path": root, "folder": folder.name}
    groups = (TrainingProtocol, Training, Batches, Speed, Determinism, OutlierTraining)
    return command_of(script, carried(s, Stage2SettingsNoOE if plain else Stage2Settings, *groups, **where))


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


def _choose_compute(inputs: MethodInputs, evaluation: EvalSettings) -> Compute:
    """How the device computes, from how long the run is."""
    s, real = inputs.settings, inputs.real
    net = real.network(s.model, generator(0)).eval()
    workload = total_workload(METHODS[s.method].workload(inputs), evaluation, inputs)
    return choose_compute(s.compile, s.precision, real.device, net, (real.channel, *real.im_size), workload)


def total_workload(iteration: Workload, evaluation: EvalSettings, inputs: MethodInputs) -> Workload:
    """The work of a whole run in this process, from that of one iteration; a tested image counts half a pass."""
    s, real = inputs.settings, inputs.real
    per_epoch = (1 if inputs.outliers is None else 2) * real.num_classes * s.decoded_ipc
    times = 1 if s.evaluates_only_the_last else 1 + -(-s.Iteration // s.eval_interval)
    networks = s.num_exp * times * evaluation.num_networks / distributed.world_size()
    trained = networks * sum(t.epochs for t in evaluation.training.values()) * per_epoch
    sizes = [len(real.images_test), *map(len, evaluation.ood.values())]
    tested = networks * len(evaluation.training) * sum(sizes) / 2
    iterations = s.num_exp * s.Iteration
    updates = sum(t.epochs * batches(real.num_classes * s.decoded_ipc, t.batch) for t in evaluation.training.values())
    test_batches = len(evaluation.training) * sum(batches(size, TEST_BATCH) for size in sizes)
    most = s.num_exp * times * batches(evaluation.num_networks, distributed.world_size())  # so that all decide alike
    return Workload(
        iterations * iteration.passes + trained + tested,
        iterations * iteration.steps + most * (updates + test_batches),
        iteration.kind,
    )


def _ood_images(s: Stage1Settings, real: RealData) -> dict[str, torch.Tensor]:
    """The images of the sets of `--eval_ood`, by name."""
    folders, download, limit = (Path(s.ood_path), Path(s.data_path)), s.download == "all", len(real.images_test)
    source = OODSource(real, *folders, download, limit, s.seed, flag="--eval_ood")
    return {ood.name: ood.load() for ood in source.find_all(s.eval_ood or ())}


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


def _run_folder(inputs: MethodInputs, method: Method, fingerprints: dict[str, str]) -> RunFolder:
    """The folder of the run: that of `--resume`, or a new one."""
    s, real = inputs.settings, inputs.real
    if s.resume:
        check_inputs(Path(s.resume), fingerprints)
        return RunFolder(Path(s.resume))
    run = RunFolder.create(s.save_path, s.method, real.name, s.model, s.ipc)
    about = {"device": str(real.device), "seed": s.seed, "inputs": fingerprints, "data": identity(real)}
    run.save_args(as_dict(s), **about, **method.about)
    run.log(f"run folder: {run.path}")
    return run


def _start(s: Stage1Settings, real: RealData) -> list[SyntheticSet]:
    """All experiments of the set from which a distillation starts; an empty list without `--load_path`."""
    if s.load_path is None:
        return []
    with blame("--load_path"):
        return DistilledFile.open(s.load_path, "").start(real, s.ipc, s.outliers != "none", s.factor)


def _restore(distillation: Distillation, inputs: MethodInputs) -> bool:
    """Continue from the run's checkpoint; False where there is none yet."""
    run, method = distillation.run, distillation.method
    restored = distillation.restore()
    if distillation.starts_another:
        method.initial = _start(inputs.settings, inputs.real)
        check_inputs(run.path, _start_fingerprint(method.initial))
    run.update_args(as_dict(inputs.settings))
    return restored


def _notices(inputs: MethodInputs, method: Method, models: Sequence[str]) -> list[str]:
    """What the user should know before the run starts; `models`: the networks that evaluate."""
    s, entry = inputs.settings, METHODS[inputs.settings.method]
    parts = f"{s.ipc} images of {s.factor**2} parts per class: networks train on {s.decoded_ipc}"
    lines = [
        *inputs.real.lines(),
        parts if s.factor > 1 else "",
        *method.notices,
        method.outliers.notice if method.outliers else "",
    ]
    defaults = " ".join(f"--{n} {v}" for n, v in entry.defaults.items() if getattr(s, n, None) == v)
    if defaults:
        lines.append(f"defaults of --method {entry.name}: {defaults}")
    if s.dsa_strategy and entry.augmentation == "unused":
        lines.append(f"--dsa_strategy {s.dsa_strategy} is not used by --method {s.method}")
    if s.eval_mode == "S" and tuple(models) != (s.model,):
        lines.append(f"--eval_mode S evaluates {models[0]} instead of {s.model}; --eval_mode SS keeps BatchNorm")
    return [line for line in lines if line]


def _computing(compute: Compute) -> str:
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    return f"computing: {compute}{processes}"
