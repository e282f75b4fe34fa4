"""Stage 2: train networks on a distilled set, keep their checkpoints; and what stage 3 needs to load them."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from networks import get_network, initialize
from utils.compute import distributed
from utils.compute.device import choose_compute, choose_device
from utils.core.errors import Interrupted, OwnError, UserError
from utils.core.rng import generator
from utils.data.datasets import RealData, load_dataset
from utils.data.synthetic import SyntheticSet, load_synthetic, result_name
from utils.files.atomic import fingerprint, save_pt
from utils.files.torch_files import read_pt
from utils.runs import signals
from utils.runs.checkpoints import Checkpointer
from utils.runs.resume import check_inputs, read_args, resume_command
from utils.runs.run_folder import LOG_EVERY, STAGE1_ROOTS, RunFolder, find_run_folder
from utils.stages.arguments import dsa_of
from utils.training.evaluator import mean_std, training_of
from utils.training.trainer import TEST_BATCH, Trainer, TrainSettings, accuracy_of, predict

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
    device = choose_device(args.device, args.deterministic)
    dsa = dsa_of(args)
    lambda_oe = args.lambda_oe if with_outliers else 0.0
    settings = training_of(
        args.model, args.dataset, dsa, args.epoch_eval_train, args.lr_net, args.batch_train, lambda_oe
    )
    path = _resumed_set(args) or find_distilled(args, with_outliers)
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
    tested = args.num_eval * -(-settings.epochs // TEST_INTERVAL) * len(real.images_test)
    trained = steps * len(synthetic.images) * (2 if with_outliers else 1)
    passes = (trained + tested / 2) / distributed.world()
    compute = choose_compute(args.compile, args.precision, device, args.model, real, passes, steps, "training")
    net = get_network(args.model, real.channel, real.num_classes, real.im_size, generator(args.seed)).to(device)
    inputs = {
        "data_path": real.fingerprint(),
        "load_path": fingerprint((synthetic.images, synthetic.labels, synthetic.images_oe)),
    }
    run = _run_folder(args, path, settings, device, inputs)
    run.log(f"computing: {compute}")
    trainer = Trainer(net, settings, compute)
    training = NetworkTraining(args.model, real, synthetic.to(device), trainer, args.seed, run, bool(args.resume))
    training.train_all(args.num_eval, args.checkpoint_interval)


def _resumed_set(args: argparse.Namespace) -> Path | None:
    """The distilled set of the run that is resumed; None where there is none, or flags say that it was moved."""
    if not args.resume:
        return None
    about = read_args(Path(args.resume))
    if any(getattr(args, name) != about["flags"].get(name) for name in ("load_path", "folder")):
        return None
    path = about.get("distilled_set")
    if not isinstance(path, str) or not os.path.isfile(path):
        raise UserError(
            f"--resume: the distilled set of {args.resume} is gone: {str(path)[:200]}. Put it back, or say by "
            "--load_path and --folder where it is now"
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
    run.log(f"distilled set: {path}, experiment {args.exp_idx}")
    run.log(f"the best checkpoint is chosen by accuracy on the test set, every {TEST_INTERVAL} epochs")
    return run


class NetworkTraining:
    """Trains networks one after another; under `torchrun` each process trains some of them and writes their files.

    `resumes`: go on from the checkpoints in `run`, of which each network has its own.
    """

    def __init__(
        self,
        model: str,
        real: RealData,
        synthetic: SyntheticSet,
        trainer: Trainer,
        seed: int,
        run: RunFolder,
        resumes: bool = False,
    ):
        self.model, self.real, self.synthetic, self.trainer = model, real, synthetic, trainer
        self.seed, self.run, self.resumes = seed, run, resumes

    def train_all(self, num_networks: int, interval: int = 50) -> list[float]:
        """Train all networks, and return their best tested accuracies.

        Raises:
            Interrupted: after a signal; the network in training is saved.
            UserError: when a training diverges.
        """
        indices = distributed.mine(num_networks)
        keepers = {i: _Keeper(self, i, Checkpointer(self.run, f"checkpoint_network{i}", interval)) for i in indices}
        try:
            with signals.catch():
                if self.resumes:
                    self._restore(keepers)
                for keeper in keepers.values():
                    if not keeper.done:
                        self._train(keeper)
                results = distributed.gather({i: (keeper.best, keeper.newest) for i, keeper in keepers.items()})
        except Interrupted:
            self.run.log("stopped; to go on:")
            self.run.log(resume_command(self.run.path))
            raise
        except UserError as error:
            raise OwnError(error) from None
        best, last = zip(*results.values(), strict=True)
        self.run.log(f"accuracy over {num_networks} networks: best {mean_std(best)}, last epoch {mean_std(last)}")
        return list(best)

    def _restore(self, keepers: dict[int, "_Keeper"]) -> None:
        for keeper in keepers.values():
            keeper.restore()
        epochs = distributed.gather({i: keeper.epoch for i, keeper in keepers.items()})
        if all(epoch == self.trainer.settings.epochs for epoch in epochs.values()):
            self.run.log(f"{self.run.path} is finished: all networks are trained")
        self.run.keep_metrics(lambda line: line["epoch"] <= epochs[line["network"]])
        distributed.barrier()  # nobody appends before that

    def _train(self, keeper: "_Keeper") -> None:
        key = ("network", keeper.index)
        if keeper.state is None:
            initialize(self.trainer.net, generator(self.seed, *key))
        else:
            self.trainer.load_state_dict(keeper.state, keeper.epoch)
        what = f"network {keeper.index}"
        with self.run.progress(self.trainer.settings.epochs, what, keeper.epoch, TEST_INTERVAL) as progress:

            def after_epoch(epoch: int, loss: torch.Tensor) -> None:
                progress.step(loss=loss)
                keeper.after_epoch(epoch, loss)

            self.trainer.train(self.synthetic, self.seed, key, after_epoch, keeper.epoch)
        self.run.log(f"{what}: best tested accuracy {100 * keeper.best:.2f} % (epoch {keeper.best_epoch})")


class _Keeper:
    """Tests a network while it trains, and writes its checkpoints: those for stage 3, and that to resume from."""

    def __init__(self, training: NetworkTraining, index: int, checkpointer: Checkpointer):
        self.training, self.index, self.checkpointer = training, index, checkpointer
        self.trainer, self.real, self.run = training.trainer, training.real, training.run
        self.epochs = epochs = self.trainer.settings.epochs
        self.first = min(100, epochs // 2)
        self.best, self.best_epoch, self.newest, self.epoch = -1.0, 0, float("nan"), 0
        self.state: dict | None = None

    @property
    def done(self) -> bool:
        """Whether the network is trained."""
        return self.epoch == self.epochs

    def after_epoch(self, epoch: int, loss: torch.Tensor) -> None:
        """Test every 50 epochs and after the last; keep the best from `first` on, and the epochs that are kept anyway.
        Save when it is time, and when a signal came."""
        tests = epoch % TEST_INTERVAL == 0 or epoch == self.epochs
        saves = tests or self.checkpointer.due(epoch) or signals.received()
        self.epoch = epoch
        if saves or epoch % LOG_EVERY == 0:
            self._must_be_finite(loss, "its loss is")
        if tests:
            self._test(loss.item())
        if is_checkpoint_epoch(epoch, self.epochs):
            self._save(f"epoch{epoch}")
        if saves:
            self.checkpointer.save(self._position() | ({} if self.done else {"state": self.trainer.state_dict()}))
        if signals.received() and not self.done:
            raise Interrupted(signals.received())

    def _test(self, loss: float) -> None:
        logits = self.trainer.predict(self.real.test_images)
        self._must_be_finite(logits, "its outputs are")
        self.newest = accuracy_of(logits, self.real.labels_test)
        self.run.metric(network=self.index, epoch=self.epoch, loss=loss, accuracy=self.newest)
        if self.epoch >= self.first and self.newest > self.best:
            self.best, self.best_epoch = self.newest, self.epoch
            self._save("best")

    def _must_be_finite(self, values: torch.Tensor, what: str) -> None:
        if not torch.isfinite(values).all():
            raise UserError(
                f"--lr_net {self.trainer.settings.lr:g}: network {self.index} diverged by epoch {self.epoch}: {what} "
                "not finite. Lower --lr_net"
            )

    def _save(self, which: str) -> None:
        state = {name: tensor.cpu() for name, tensor in self.trainer.net.state_dict().items()}
        save_pt(self.run.path / checkpoint_name(self.real.name, self.training.model, self.index, which), state)

    def _position(self) -> dict:
        return {"epoch": self.epoch, "best": self.best, "best_epoch": self.best_epoch, "newest": self.newest}

    def restore(self) -> None:
        """Take over the newest checkpoint, if there is one.

        Raises:
            UserError: when it is not of this run.
        """
        saved = self.checkpointer.load()
        if saved is None:
            return
        try:
            self.epoch, self.best_epoch = int(saved["epoch"]), int(saved["best_epoch"])
            self.best, self.newest = float(saved["best"]), float(saved["newest"])
            if not 0 <= self.epoch <= self.epochs:
                raise ValueError(f"epoch {self.epoch}")
            self.state = saved.get("state")
            if not self.done:
                self.trainer.load_state_dict(self.state, self.epoch)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"--resume: {self.checkpointer.path} is not of this run: {reason}") from None
        self.run.log(f"network {self.index}: resumed at epoch {self.epoch}")


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
