"""Stage 1, from flags to run: what the three main scripts share. They differ in their source of outliers."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from utils.compute import distributed
from utils.compute.device import Workload, choose_compute, choose_device
from utils.core.errors import blame, require
from utils.core.rng import generator
from utils.core.torch_files import fingerprint
from utils.data.datasets import RealData
from utils.data.distilled_file import DistilledFile
from utils.data.identity import identity
from utils.data.synthetic import SyntheticSet
from utils.methods import METHODS, Method, MethodInputs, augmentation_of
from utils.methods.learnable import check_class_sizes
from utils.ood.sets import OODSource
from utils.runs.lineage import root_of
from utils.runs.resume import check_inputs
from utils.runs.run_folder import RunFolder, read_args
from utils.settings.arguments import Stage1Settings, Stage2Settings, Stage2SettingsNoOE
from utils.settings.commands import carried, command_of
from utils.settings.common import Batches, OutlierTraining, Speed, Training, read_data
from utils.settings.distillation import source_of
from utils.settings.fields import as_dict
from utils.stages.evaluation import EvalSettings, Evaluator, evaluation_models, training_of
from utils.stages.expert_training import train_missing
from utils.stages.loop import Distillation


def run_stage1(settings: Stage1Settings) -> None:
    """Everything that a main script does after parsing."""
    s, entry = settings, METHODS[settings.method]
    device = choose_device(s.device, s.deterministic)
    augmentation = augmentation_of(s.method, s.dsa_strategy)
    missing = s.tensorboard and find_spec("tensorboard") is None
    require(not missing, "--tensorboard: needs the package tensorboard: pip install tensorboard")
    s = replace(s, load_path=s.load_path and os.path.abspath(s.load_path))  # it may be resumed from another folder
    real = read_data(s).to(device)
    training = {model: training_of(s, model, augmentation) for model in evaluation_models(s.eval_mode, s.model, real)}
    outliers = source_of(s, real)
    if s.init == "real" and not s.load_path and not s.resume:
        check_class_sizes(real, outliers, s.ipc, s.factor)
    inputs = MethodInputs(real, outliers, s, augmentation, initial=[] if s.resume else _start(s, real))
    evaluation = EvalSettings(s.num_eval, training, s.seed, _ood_images(s, real))
    net, shape = real.network(s.model, generator(0)).eval(), (real.channel, *real.im_size)
    workload = total_workload(entry.workload(inputs), evaluation, inputs)
    compute = choose_compute(s.compile, s.precision, device, net, shape, workload)
    inputs = replace(inputs, settings=entry.own(s), compute=compute)
    if experts := entry.experts(inputs.settings):
        train_missing(experts, real)
    method = entry.build(inputs)
    run = _run_folder(s, inputs, method, evaluation.ood)
    distillation = Distillation(method, Evaluator(real, evaluation, run, compute), s, run)
    if not (s.resume and _restore(distillation)):
        run.log(*_notices(s, method, real, next(iter(training))))
    if s.tensorboard and run.is_main:
        run.start_tensorboard()
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    run.log(f"computing: {compute}{processes}")
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
    groups = (Training, Batches, Speed, OutlierTraining)
    return command_of(script, carried(s, Stage2SettingsNoOE if plain else Stage2Settings, *groups, **where))


def total_workload(iteration: Workload, evaluation: EvalSettings, inputs: MethodInputs) -> Workload:
    """The work of a whole run in this process, from that of one iteration; a tested image counts half a pass."""
    s, real, trainings = inputs.settings, inputs.real, evaluation.training.values()
    iterations, images = s.num_exp * s.Iteration, real.num_classes * s.decoded_ipc
    networks = s.num_exp * (1 if s.evaluates_only_the_last else 1 + math.ceil(s.Iteration / s.eval_interval))
    networks *= evaluation.num_networks / distributed.world_size()
    tests = len(real.images_test) + sum(map(len, evaluation.ood.values()))
    passes = networks * sum(t.epochs * inputs.kinds * images + tests / 2 for t in trainings)
    return Workload(iterations * iteration.passes + passes, iteration.kind)


def _ood_images(s: Stage1Settings, real: RealData) -> dict[str, Tensor]:
    """The images of `--eval_ood`, made on the CPU: a run may be resumed on a GPU, which rounds in another way."""
    folders, download, limit = (Path(s.ood_path), Path(s.data_path)), s.download == "all", len(real.images_test)
    source = OODSource(real.to("cpu"), *folders, download, limit, s.seed, flag="--eval_ood")
    return {ood.name: ood.load().to(real.device) for ood in source.find_all(s.eval_ood or ())}


def _start(s: Stage1Settings, real: RealData) -> list[SyntheticSet]:
    """All experiments of the set from which a distillation starts; an empty list without `--load_path`."""
    if s.load_path is None:
        return []
    with blame("--load_path"):
        return DistilledFile.open(s.load_path, "").start(real, s.ipc, s.outliers != "none", s.factor)


def _start_fingerprint(start: Sequence[SyntheticSet]) -> dict[str, str]:
    return {"load_path": fingerprint(t for s in start for t in (s.images, s.images_oe))} if start else {}


def _run_folder(s: Stage1Settings, inputs: MethodInputs, method: Method, ood: dict[str, Tensor]) -> RunFolder:
    """The folder of the run: that of `--resume`, which must have read the same inputs, or a new one."""
    real, outliers = inputs.real, inputs.outliers
    prints = {
        "data_path": real.fingerprint(),
        "oe_data_path": outliers and outliers.fingerprint(),
        "ood_path": fingerprint(ood.values()) if ood else None,
        **_start_fingerprint(inputs.initial),
        **method.fingerprints,
    }
    prints = {flag: value for flag, value in prints.items() if value}
    if s.resume:
        check_inputs(Path(s.resume), prints)
        return RunFolder(Path(s.resume))
    run = RunFolder.create(s.save_path, s.method, real.name, s.model, s.ipc)
    about = {"device": str(real.device), "seed": s.seed, "inputs": prints, "data": identity(real)}
    run.save_args(as_dict(s), **about, **method.about)
    run.log(f"run folder: {run.path}")
    return run


def _restore(distillation: Distillation) -> bool:
    """Continue from the run's checkpoint; False where there is none yet."""
    run, method, s = distillation.run, distillation.method, distillation.settings
    restored, state = distillation.restore(), distillation.state
    is_new = s.load_path != read_args(run.path)["flags"].get("load_path")
    if is_new or state.exp + (state.method is not None) < s.num_exp:  # an experiment has not started yet
        method.initial = _start(s, distillation.real)
        check_inputs(run.path, _start_fingerprint(method.initial))
    run.update_args(as_dict(s), device=str(distillation.real.device))
    return restored


def _notices(s: Stage1Settings, method: Method, real: RealData, evaluated: str) -> list[str]:
    """What the user should know before the run starts; `evaluated`: the first network that evaluates."""
    entry, lines = METHODS[s.method], [*real.lines()]
    if s.factor > 1:
        lines.append(f"{s.ipc} images of {s.factor**2} parts per class: networks train on {s.decoded_ipc}")
    lines += method.notices
    if s.load_path and DistilledFile.open(s.load_path).normalisation().space is None:
        lines.append(
            "--load_path does not say how its images are normalised: by the statistics of --dataset, it is assumed"
        )
    if method.outliers and method.outliers.notice:
        lines.append(method.outliers.notice)
    defaults = " ".join(f"--{n} {v}" for n, v in entry.defaults.items() if getattr(s, n, None) == v)
    if defaults:
        lines.append(f"defaults of --method {entry.name}: {defaults}")
    if s.dsa_strategy and entry.augmentation == "unused":
        lines.append(f"--dsa_strategy {s.dsa_strategy} is not used by --method {s.method}")
    if s.eval_mode == "S" and evaluated != s.model:
        lines.append(f"--eval_mode S evaluates {evaluated} instead of {s.model}; --eval_mode SS keeps BatchNorm")
    return lines
