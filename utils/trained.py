"""Stage 2: train networks on a distilled set, keep their checkpoints; and what stage 3 needs to load them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from networks import get_network, initialize

from . import distributed
from .datasets import RealData, load_dataset
from .devices import choose_compute, choose_device
from .distill import evaluation_settings, mean_std
from .errors import UserError
from .readers import read_pt
from .rng import generator
from .runs import STAGE1_ROOTS, RunFolder, find_run_folder, save_pt
from .synthetic import SyntheticSet, load_synthetic, result_name
from .training import TEST_BATCH, Trainer, predict

TEST_INTERVAL = 50
CHECKPOINT_INTERVAL = 200


def checkpoint_name(dataset: str, model: str, index: int, which: str) -> str:
    """File name of network `index`; `which` is `best` or `epoch<e>`."""
    return f"syn_trained_{dataset}_{model}_exp{index}_{which}.pt"


def is_checkpoint_epoch(epoch: int, epochs: int) -> bool:
    """Whether `epoch` (1 … epochs) is kept: the last, and multiples of 200 at or past three fifths."""
    return epoch == epochs or (epoch % CHECKPOINT_INTERVAL == 0 and 5 * epoch >= 3 * epochs)


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
    device = choose_device(args.device)
    lambda_oe = args.lambda_oe if with_outliers else 0.0
    settings = evaluation_settings(args, (args.model,), lambda_oe)[args.model]
    path = find_distilled(args, with_outliers)
    real = load_dataset(args.dataset, args.data_path, args.im_size, args.download != "none").to(device)
    synthetic = load_synthetic(path, args.exp_idx, real)
    if not with_outliers:
        synthetic = synthetic.without_outliers()
    elif synthetic.images_oe is None:
        raise UserError(
            f"--folder: {path} holds no outliers. Give a folder of main_oe.py or main_poe.py (--is_load_oe looks only "
            "there), or use train_model_synthetic_no_oe.py"
        )
    steps = args.num_eval * settings.epochs
    images = 3 * steps * len(synthetic.images) * (2 if with_outliers else 1)
    compute = choose_compute(args.compile, args.precision, device, args.model, real, steps, images)
    net = get_network(args.model, real.channel, real.num_classes, real.im_size, generator(args.seed)).to(device)
    parts = (args.method, args.dataset, args.model, args.ipc)
    run = RunFolder.create(args.save_path, *parts, name=path.parent.name)  # one name leads through all stages
    run.save_args(vars(args), distilled_set=str(path.resolve()), device=str(device), epochs=settings.epochs)
    run.log(f"run folder: {run.path}")
    if run.path.name != path.parent.name:
        run.log(f"{path.parent.name} has been trained on before; stage 3 finds this run by --folder {run.path.name}")
    run.log(f"distilled set: {path}, experiment {args.exp_idx}")
    run.log(f"computing: {compute}")
    run.log(f"the best checkpoint is chosen by accuracy on the test set, every {TEST_INTERVAL} epochs")
    trainer = Trainer(net, settings, compute)
    train_networks(args.model, real, synthetic.to(device), trainer, args.num_eval, args.seed, run)


def train_networks(
    model: str,
    real: RealData,
    synthetic: SyntheticSet,
    trainer: Trainer,
    num_networks: int,
    seed: int,
    run: RunFolder,
) -> list[float]:
    """Train `num_networks` networks, write their checkpoints into `run`, and return their best tested accuracies.

    Under `torchrun` each process trains some of them and writes the checkpoints of those.
    """
    results = {}
    for index in distributed.mine(num_networks):
        key = ("network", index)
        initialize(trainer.net, generator(seed, *key))
        keeper = _Keeper(trainer, real, run, model, index)
        with run.progress(trainer.settings.epochs, f"network {index}", every=TEST_INTERVAL) as progress:

            def after_epoch(epoch: int, loss: torch.Tensor, keeper=keeper, progress=progress) -> None:
                keeper.after_epoch(epoch)
                progress.step(loss=loss)

            trainer.train(synthetic, seed, key, after_epoch)
        run.log(f"network {index}: best tested accuracy {100 * keeper.best:.2f} % (epoch {keeper.best_epoch})")
        results[index] = (keeper.best, keeper.newest)
    best, last = zip(*distributed.gather(results), strict=True)
    run.log(f"accuracy over {num_networks} networks: best {mean_std(best)}, last epoch {mean_std(last)}")
    return list(best)


class _Keeper:
    """Tests a network while it trains and writes its checkpoints."""

    def __init__(self, trainer: Trainer, real: RealData, run: RunFolder, model: str, index: int):
        self.trainer, self.real, self.run = trainer, real, run
        self.epochs = epochs = trainer.settings.epochs
        self.model, self.index = model, index
        self.first = min(100, epochs // 2)
        self.best, self.best_epoch, self.newest = -1.0, 0, float("nan")

    def after_epoch(self, epoch: int) -> None:
        """Test every 50 epochs and after the last; keep the best from `first` on, and the epochs that are "
        "kept anyway."""
        if epoch % TEST_INTERVAL == 0 or epoch == self.epochs:
            self.newest = self.trainer.accuracy(self.real.test_images, self.real.labels_test)
            if epoch >= self.first and self.newest > self.best:
                self.best, self.best_epoch = self.newest, epoch
                self._save("best")
        if is_checkpoint_epoch(epoch, self.epochs):
            self._save(f"epoch{epoch}")

    def _save(self, which: str) -> None:
        state = {name: tensor.cpu() for name, tensor in self.trainer.net.state_dict().items()}
        save_pt(self.run.path / checkpoint_name(self.real.name, self.model, self.index, which), state)


def load_trained(folder: Path, model: str, real: RealData, index: int, which: str) -> nn.Module:
    """Network `index` of a stage-2 folder, on the device of `real`, in evaluation mode.

    Raises:
        UserError: when the checkpoint is missing, damaged, or of another network or data set.
    """
    path = folder / checkpoint_name(real.name, model, index, which)
    state = read_pt(path, "--folder")
    net = get_network(model, real.channel, real.num_classes, real.im_size, generator(0))
    plain = isinstance(state, dict) and all(isinstance(k, str) for k in state)
    if not plain or not all(isinstance(v, torch.Tensor) and not v.is_complex() for v in state.values()):
        raise UserError(f"--folder: {path} is no state dict; give a folder that stage 2 wrote")
    try:
        net.load_state_dict(dict(state))  # a copy: the versions that a file attaches to it are not needed
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--model {model}: {path} does not fit it: {reason}") from None
    if not all(torch.isfinite(v).all() for v in net.state_dict().values()):
        raise UserError(f"--folder: {path} holds NaN or infinite weights; train it again")
    net = net.to(real.device).eval()
    if not torch.isfinite(predict(net, real.test_images[:TEST_BATCH])).all():
        raise UserError(f"--folder: {path} holds weights so large that its outputs are not finite; train it again")
    return net
