"""Stage 1: distil, evaluate, save. The three main scripts differ in where their outliers come from, in nothing else."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from networks import get_network, initialize

from . import distributed
from .arguments import dsa_of, loops_of
from .augment import dc_augmentation
from .datasets import RealData, load_dataset
from .devices import Compute, choose_compute, choose_device
from .errors import UserError
from .methods import GradientMatching, MatchSettings
from .outliers import OutlierPool, PseudoOutliers
from .rng import generator
from .runs import LOG_EVERY, RunFolder
from .synthetic import SyntheticSet, load_start, result_name, save_synthetic
from .training import Trainer, TrainSettings
from .visualize import save_grid

EVAL_LOG = 500
Outliers = OutlierPool | PseudoOutliers | None

EVAL_MODES = {
    "M": ("MLP", "ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18"),
    "B": ("ConvNetBN", "ConvNetASwishBN", "AlexNetBN", "VGG11BN", "ResNet18BN"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "A": ("ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetASwish"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
}


def evaluation_models(mode: str, model: str) -> tuple[str, ...]:
    """The networks of `--eval_mode`."""
    if mode == "S":
        return (model.replace("BN", ""),)
    return EVAL_MODES.get(mode, (model,))


def mean_std(values: list[float]) -> str:
    """`mean ± std` in percent."""
    return f"{100 * np.mean(values):.2f} ± {100 * np.std(values):.2f} %"


@dataclass(frozen=True)
class DistillSettings:
    """What the stage-1 loop needs to know beside its method."""

    method: str
    model: str
    ipc: int
    num_exp: int
    iterations: int
    eval_interval: int
    eval_last_only: bool
    num_eval: int
    models_eval: tuple[str, ...]
    training: dict[str, TrainSettings]
    seed: int
    flags: dict


def evaluation_settings(
    args: argparse.Namespace, models: tuple[str, ...], lambda_oe: float
) -> dict[str, TrainSettings]:
    """How each evaluation network is trained: DSA's augmentation, DC's, or none; 1000 epochs with one, else 300."""
    settings = {}
    for model in models:
        augmentation = dsa_of(args) if args.method == "DSA" else dc_augmentation(args.dataset, model)
        epochs = args.epoch_eval_train or (1000 if augmentation else 300)
        settings[model] = TrainSettings(epochs, args.lr_net, args.batch_train, lambda_oe, augmentation)
    return settings


def run_stage1(args: argparse.Namespace, make_outliers: Callable[[RealData], Outliers]) -> None:
    """Everything that a main script does after parsing; `make_outliers` gives its source of outliers."""
    device = choose_device(args.device)
    match = _match_settings(args)
    models = evaluation_models(args.eval_mode, args.model)
    training = evaluation_settings(args, models, match.lambda_oe)
    real = load_dataset(args.dataset, args.data_path, args.im_size, args.download != "none").to(device)
    for model in models:  # a network that does not fit must be known before hours of distillation
        get_network(model, real.channel, real.num_classes, real.im_size, generator(args.seed))
    outliers = make_outliers(real)
    start = load_start(args.load_path, real, args.ipc, outliers is not None)
    steps = args.num_exp * args.Iteration * match.outer_loop
    images = 3 * steps * real.num_classes * (match.batch_real + match.batch_oe * (outliers is not None))
    compute = choose_compute(args.compile, args.precision, device, args.model, real, steps, images)
    method = GradientMatching(real, outliers, match, compute, start)
    settings = DistillSettings(
        args.method, args.model, args.ipc, args.num_exp, args.Iteration, args.eval_interval,
        args.eval_mode not in ("S", "SS"), args.num_eval, models, training, args.seed, vars(args),
    )  # fmt: skip
    run = RunFolder.create(args.save_path, args.method, args.dataset, args.model, args.ipc)
    run.save_args(vars(args), outer_loop=match.outer_loop, inner_loop=match.inner_loop, device=str(device))
    for line in _notices(args, models, loops_of(args)[2], outliers, compute):
        run.log(line)
    distill(method, real, settings, run, compute)


def _match_settings(args: argparse.Namespace) -> MatchSettings:
    outer_loop, inner_loop, _ = loops_of(args)
    return MatchSettings(
        args.model, args.ipc, args.seed, args.lr_img, args.lr_net, args.batch_real, getattr(args, "batch_oe", 0),
        args.batch_train, getattr(args, "lambda_oe", 0.0), args.dis_metric, args.init, outer_loop, inner_loop,
        dsa_of(args),
    )  # fmt: skip


def _notices(
    args: argparse.Namespace, models: tuple[str, ...], loops: str, outliers: Outliers, compute: Compute
) -> list[str]:
    """What the user should know before the run starts."""
    lines = [loops, outliers.notice if outliers else ""]
    if args.method == "DC" and args.dsa_strategy:
        lines.append(f"--dsa_strategy {args.dsa_strategy} is not used by --method DC")
    if args.eval_mode == "S" and models != (args.model,):
        lines.append(f"--eval_mode S evaluates {models[0]} instead of {args.model}; --eval_mode SS keeps BatchNorm")
    processes = f", {distributed.world()} processes" if distributed.world() > 1 else ""
    lines.append(f"computing: {compute}{processes}")
    return [line for line in lines if line]


def distill(
    method: GradientMatching, real: RealData, settings: DistillSettings, run: RunFolder, compute: Compute
) -> None:
    """Run all experiments; evaluate and save as the settings say; log the mean accuracy at the end."""
    run.log(f"run folder: {run.path}")
    finished: list[SyntheticSet] = []
    accs: dict[str, list[float]] = {model: [] for model in settings.models_eval}
    evaluator = Evaluator(real, settings, run, compute)
    for exp in range(settings.num_exp):

        def evaluate_and_save(it: int, exp: int = exp, before: dict = accs) -> tuple[SyntheticSet, dict]:
            found = evaluator.evaluate(method.synthetic(), exp, it)
            newest = method.synthetic().detached_cpu()
            _save(run, settings, real, [*finished, newest], _joined(before, found), exp, it)
            return newest, found

        newest, found = _experiment(method, exp, settings, run, evaluate_and_save)
        finished.append(newest)
        accs = _joined(accs, found)
    for model, values in accs.items():
        count = f"{len(values)} networks, {settings.num_exp} experiments"
        run.log(f"{model}: accuracy {mean_std(values)} ({count})")
    run.log(f"distilled set: {run.path / result_name(settings.method, real.name, settings.model, settings.ipc)}")


def _experiment(
    method: GradientMatching, exp: int, settings: DistillSettings, run: RunFolder, evaluate_and_save: Callable
) -> tuple[SyntheticSet, dict[str, list[float]]]:
    """One experiment; returns what was evaluated last: the synthetic set, and the accuracies on it."""
    method.start(exp)
    losses: dict[str, torch.Tensor] = {}
    with run.progress(settings.iterations, f"exp {exp}") as progress:
        for it in range(settings.iterations):
            evaluates = it % settings.eval_interval == 0 and not settings.eval_last_only
            if evaluates or it % LOG_EVERY == 0:
                check_finite(losses, method.synthetic(), exp, it)
            if evaluates:
                evaluate_and_save(it)
            losses = method.iterate(it)
            progress.step(**losses)
    check_finite(losses, method.synthetic(), exp, settings.iterations)
    return evaluate_and_save(settings.iterations)


def check_finite(losses: dict[str, torch.Tensor], synthetic: SyntheticSet, exp: int, it: int) -> None:
    """Stop a run whose losses or images are no longer finite; what was saved before stays.

    Raises:
        UserError: naming experiment, iteration and the first slot with such an image.
    """
    bad = [name for name, value in losses.items() if not torch.isfinite(value).item()]
    where = ""
    for what, images in (("images", synthetic.images), ("outliers", synthetic.images_oe)):
        if images is not None and not torch.isfinite(images).all():
            slot = int(synthetic.labels[~torch.isfinite(images).flatten(1).all(1)][0])
            where = f", {what} of slot {slot}"
            bad.append(what)
    if bad:
        raise UserError(
            f"--lr_img: experiment {exp} diverged by iteration {it}: {', '.join(bad)} not finite{where}. "
            "Lower --lr_img (or --lr_net); the images of the last evaluation are in the run folder"
        )


def _joined(accs: dict[str, list[float]], found: dict[str, list[float]]) -> dict[str, list[float]]:
    return {model: accs[model] + found[model] for model in accs}


class Evaluator:
    """Trains fresh networks on a synthetic set and tests them; under `torchrun` each process takes some of them."""

    def __init__(self, real: RealData, settings: DistillSettings, run: RunFolder, compute: Compute):
        self.real, self.settings, self.run = real, settings, run
        self.trainers: dict[str, Trainer] = {}
        self.compute = compute

    def evaluate(self, synthetic: SyntheticSet, exp: int, it: int) -> dict[str, list[float]]:
        """Test accuracies of `num_eval` networks of each evaluation model."""
        found = {}
        for model in self.settings.models_eval:
            found[model] = values = self._accuracies(model, synthetic, exp, it)
            epochs = self.settings.training[model].epochs
            what = f"{len(values)} networks, {epochs} epochs"
            self.run.log(f"exp {exp} iteration {it}: {model} accuracy {mean_std(values)} ({what})")
        return found

    def _accuracies(self, model: str, synthetic: SyntheticSet, exp: int, it: int) -> list[float]:
        s, real = self.settings, self.real
        trainer = self._trainer(model)
        indices = distributed.mine(s.num_eval)
        values = {}
        with self.run.progress(len(indices) * trainer.settings.epochs, f"evaluate {model}", every=EVAL_LOG) as progress:
            for index in indices:
                key = ("evaluate", exp, it, model, index)
                initialize(trainer.net, generator(s.seed, *key))
                trainer.train(synthetic, s.seed, key, lambda epoch, loss: progress.step(loss=loss))
                values[index] = trainer.accuracy(real.test_images, real.labels_test)
        return distributed.gather(values)

    def _trainer(self, model: str) -> Trainer:
        if model not in self.trainers:
            real = self.real
            net = get_network(model, real.channel, real.num_classes, real.im_size, generator(self.settings.seed))
            self.trainers[model] = Trainer(net.to(real.device), self.settings.training[model], self.compute)
        return self.trainers[model]


def _save(
    run: RunFolder,
    settings: DistillSettings,
    real: RealData,
    sets: list[SyntheticSet],
    accs: dict[str, list[float]],
    exp: int,
    it: int,
) -> None:
    """Write the distilled sets so far and a picture of the newest."""
    s = settings
    if distributed.rank():
        return
    about = {"iteration": it, "experiment": exp, "flags": s.flags}
    save_synthetic(run.path / result_name(s.method, real.name, s.model, s.ipc), sets, accs, real, about)
    for prefix, images in (("vis", sets[-1].images), ("vis_oe", sets[-1].images_oe)):
        if images is not None:
            name = f"{prefix}_{s.method}_{real.name}_{s.model}_{s.ipc}ipc_exp{exp}_iter{it}.png"
            save_grid(run.path / name, real.denormalize(images.to(real.device)).cpu(), s.ipc)
