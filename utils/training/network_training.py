"""The networks of stage 2: trained one after another, tested meanwhile, saved as checkpoints, and loaded from these."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from networks import initialize
from utils.compute import distributed
from utils.core.errors import Interrupted, UserError, blame, one_line, require
from utils.core.files import save_pt
from utils.core.rng import generator
from utils.core.torch_files import read_pt
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.runs import signals
from utils.runs.checkpoints import Checkpointer
from utils.runs.progress import LOG_EVERY
from utils.runs.resume import resume_command
from utils.runs.run_folder import RunFolder
from utils.training.trainer import TEST_BATCH, Trainer, accuracy_of, predict

TEST_INTERVAL = 50  # epochs
CHECKPOINT_INTERVAL = 200  # epochs between two that are kept
POSITION = ("epoch", "best", "best_epoch", "newest")  # of a network in its training


def checkpoint_name(dataset: str, model: str, index: int | str, which: str) -> str:
    """File name of network `index`; `which` is `best` or `epoch<e>`."""
    return f"syn_trained_{dataset}_{model}_exp{index}_{which}.pt"


def checkpoints_of(folder: Path, dataset: str, model: str) -> dict[int, set[str]]:
    """What a stage-2 folder keeps of each network, by its index: `best`, `epoch<e>`."""
    kept: dict[int, set[str]] = {}
    for path in folder.glob(checkpoint_name(dataset, model, "*", "*")):
        index, _, which = path.stem.rpartition("_exp")[2].partition("_")
        if index.isdecimal() and path.is_file():
            kept.setdefault(int(index), set()).add(which)
    return kept


def epochs_of(kept: set[str]) -> list[int]:
    """The epochs of the checkpoints of a network, sorted."""
    return sorted(int(which[5:]) for which in kept if which.startswith("epoch") and which[5:].isdecimal())


def is_checkpoint_epoch(epoch: int, epochs: int) -> bool:
    """Whether `epoch` (1 … epochs) is kept: the last, and multiples of 200 from three fifths of `epochs` on."""
    return epoch == epochs or (epoch % CHECKPOINT_INTERVAL == 0 and 5 * epoch >= 3 * epochs)


def save_network(path: Path, net: nn.Module) -> None:
    """Write the weights for `load_network`."""
    save_pt(path, {name: tensor.cpu() for name, tensor in net.state_dict().items()})


def load_trained(folder: Path, model: str, real: RealData, index: int, which: str) -> nn.Module:
    """Network `index` of a stage-2 folder, see `load_network`."""
    return load_network(folder / checkpoint_name(real.name, model, index, which), model, real, "--folder")


def load_network(path: Path, model: str, real: RealData, flag: str) -> nn.Module:
    """The network of a state dict that stage 2 wrote, on the device of `real`, in evaluation mode.

    A `UserError`, which `flag` begins, tells of a file that is missing, damaged, or of another network or data set.
    """
    net = real.network(model, generator(0))
    with blame(flag):
        state = read_pt(path)
        is_plain = isinstance(state, dict) and all(isinstance(k, str) for k in state)
        is_plain = is_plain and all(isinstance(v, Tensor) and not v.is_complex() for v in state.values())
        require(is_plain, f"{path} is no state dict; give what stage 2 wrote")
        try:
            net.load_state_dict(dict(state))  # a copy, without the version metadata that a file may attach
        except RuntimeError as error:
            raise UserError(f"{path} does not fit --model {model}: {one_line(error)}") from None
        net = net.to(real.device).eval()
        is_finite = torch.isfinite(predict(net, real.test_images[:TEST_BATCH])).all()
        require(is_finite, f"{path} holds NaN, or weights so large that its outputs are not finite; train it again")
    return net


@dataclass(frozen=True)
class NetworkTraining:
    """Trains networks one after another; under `torchrun` each process trains some of them and writes their files."""

    model: str
    real: RealData
    synthetic: SyntheticSet
    trainer: Trainer
    seed: int
    run: RunFolder
    resumes: bool  # whether to continue from the checkpoints in `run`; each network has its own

    def train_all(self, num_networks: int, interval: int) -> list[tuple[float, float]]:
        """Train all networks; returns the best and the last test accuracy of each, as fractions.

        There are `interval` epochs between two checkpoints. After a signal the network in training is saved if its
        epoch ends in time. A `UserError` tells of a training that diverges, or a checkpoint that is not of this run.
        """
        try:
            with signals.catch():
                networks = [NetworkInTraining(self, i, interval) for i in distributed.own_share(num_networks)]
                if self.resumes:
                    self._restore(networks)
                for network in networks:
                    network.train()
                results = distributed.gather({n.index: (n.best, n.newest) for n in networks})
        except Interrupted:
            self.run.log("stopped; to resume:")
            self.run.log(resume_command(self.run.path))
            raise
        return list(results.values())

    def _restore(self, networks: Sequence["NetworkInTraining"]) -> None:
        for network in networks:
            network.restore()
        epochs = distributed.gather({network.index: network.epoch for network in networks})
        if all(epoch == self.trainer.settings.epochs for epoch in epochs.values()):
            self.run.log(f"{self.run.path} is finished: all networks are trained")
        self.run.keep_metrics(lambda line: line["epoch"] <= epochs[line["network"]])
        distributed.barrier()  # no process may append before that


class NetworkInTraining:
    """A network that is tested while it trains, and written: for stage 3, and as a checkpoint to resume from."""

    def __init__(self, training: NetworkTraining, index: int, interval: int):
        self.training, self.trainer, self.run, self.index = training, training.trainer, training.run, index
        self.checkpointer = Checkpointer(self.run, f"checkpoint_network{index}", interval)
        self.epochs = self.trainer.settings.epochs
        self.epoch, self.best, self.best_epoch, self.newest = 0, -1.0, 0, float("nan")
        self.state: dict | None = None

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        saved = self.checkpointer.load()
        if saved is None:
            return
        try:
            self.epoch, self.best, self.best_epoch, self.newest = (saved[name] for name in POSITION)
            if not 0 <= self.epoch <= self.epochs:
                raise ValueError(f"it is of epoch {self.epoch}")
            if self.epoch < self.epochs:
                self.state = saved["state"]
                self.trainer.load_state_dict(self.state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = one_line(error, 100)
            raise UserError(f"--resume: {self.checkpointer.path} is not of this run: {reason}") from None
        self.run.log_own(f"network {self.index}: resumed at epoch {self.epoch}")

    def train(self) -> None:
        """Train what is left of the epochs."""
        if self.epoch == self.epochs:
            return
        seed, key, what = self.training.seed, ("network", self.index), f"network {self.index}"
        if self.state is None:
            initialize(self.trainer.net, generator(seed, *key))
        else:
            self.trainer.load_state_dict(self.state)
        with self.run.progress(self.epochs, what, self.epoch, TEST_INTERVAL) as progress:

            def after_epoch(epoch: int, loss: Tensor) -> None:
                progress.step(loss=loss)
                self._after_epoch(epoch, loss)

            with signals.interruptible():
                self.trainer.train(self.training.synthetic, seed, key, after_epoch, self.epoch)
        self.run.log_own(f"{what}: best tested accuracy {100 * self.best:.2f} % (epoch {self.best_epoch})")

    def _after_epoch(self, epoch: int, loss: Tensor) -> None:
        """Test every 50 epochs and after the last; save a checkpoint then, when one is due, and after a signal."""
        done = epoch == self.epochs
        tests = epoch % TEST_INTERVAL == 0 or done
        saves = tests or self.checkpointer.due(epoch) or signals.received()
        self.epoch = epoch
        if saves or epoch % LOG_EVERY == 0:
            self._check_finite(loss, "its loss is")
        logits = self.trainer.predict(self.training.real.test_images) if tests else None
        with signals.interruptible(False):
            if logits is not None:
                self._note_test(logits, loss.item())
            if is_checkpoint_epoch(epoch, self.epochs):
                self._save(f"epoch{epoch}")
            if saves:
                position = {name: getattr(self, name) for name in POSITION}
                self.checkpointer.save(position | ({} if done else {"state": self.trainer.state_dict()}))
        if not done:
            signals.check()

    def _note_test(self, logits: Tensor, loss: float) -> None:
        """Log the test accuracy, and write the network if it is the best from epoch 100 or half of the epochs on."""
        self._check_finite(logits, "its outputs are")
        self.newest = accuracy_of(logits, self.training.real.labels_test)
        self.run.metric(network=self.index, epoch=self.epoch, loss=loss, accuracy=self.newest)
        if self.epoch >= min(100, self.epochs // 2) and self.newest > self.best:
            self.best, self.best_epoch = self.newest, self.epoch
            self._save("best")

    def _check_finite(self, values: Tensor, what: str) -> None:
        if not torch.isfinite(values).all():
            raise UserError(
                f"--lr_net {self.trainer.settings.lr:g}: network {self.index} diverged by epoch {self.epoch}: {what} "
                "not finite. Lower --lr_net"
            )

    def _save(self, which: str) -> None:
        name = checkpoint_name(self.training.real.name, self.training.model, self.index, which)
        save_network(self.run.path / name, self.trainer.net)
