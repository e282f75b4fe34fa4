"""The loop of stage 2: networks are trained one after another, tested meanwhile, and saved as checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from networks import initialize
from utils.compute import distributed
from utils.core.errors import Interrupted, UserError, one_line, rank_errors
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.runs import signals
from utils.runs.checkpoints import Checkpointer
from utils.runs.progress import LOG_EVERY
from utils.runs.resume import resume_command
from utils.runs.run_folder import RunFolder
from utils.training.saved_networks import checkpoint_name, is_checkpoint_epoch, save_network
from utils.training.trainer import Trainer, accuracy_of

TEST_INTERVAL = 50  # epochs
POSITION = ("epoch", "best", "best_epoch", "newest")  # of a network in its training


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
            with rank_errors(), signals.catch():
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

            def after_epoch(epoch: int, loss: torch.Tensor) -> None:
                progress.step(loss=loss)
                self._after_epoch(epoch, loss)

            with signals.interruptible():
                self.trainer.train(self.training.synthetic, seed, key, after_epoch, self.epoch)
        self.run.log_own(f"{what}: best tested accuracy {100 * self.best:.2f} % (epoch {self.best_epoch})")

    def _after_epoch(self, epoch: int, loss: torch.Tensor) -> None:
        """Test every 50 epochs and after the last; save a checkpoint then, when one is due, and after a signal."""
        done = epoch == self.epochs
        tests = epoch % TEST_INTERVAL == 0 or done
        saves = tests or self.checkpointer.due(epoch) or signals.received()
        self.epoch = epoch
        if saves or epoch % LOG_EVERY == 0:
            self._check_finite(loss, "its loss is")
        logits = self.trainer.predict(self.training.real.test_images) if tests else None
        with signals.uninterrupted():
            if logits is not None:
                self._note_test(logits, loss.item())
            if is_checkpoint_epoch(epoch, self.epochs):
                self._save(f"epoch{epoch}")
            if saves:
                position = {name: getattr(self, name) for name in POSITION}
                self.checkpointer.save(position | ({} if done else {"state": self.trainer.state_dict()}))
        if not done:
            signals.check()

    def _note_test(self, logits: torch.Tensor, loss: float) -> None:
        """Log the test accuracy, and write the network if it is the best from epoch 100 or half of the epochs on."""
        self._check_finite(logits, "its outputs are")
        self.newest = accuracy_of(logits, self.training.real.labels_test)
        self.run.metric(network=self.index, epoch=self.epoch, loss=loss, accuracy=self.newest)
        if self.epoch >= min(100, self.epochs // 2) and self.newest > self.best:
            self.best, self.best_epoch = self.newest, self.epoch
            self._save("best")

    def _check_finite(self, values: torch.Tensor, what: str) -> None:
        if not torch.isfinite(values).all():
            raise UserError(
                f"--lr_net {self.trainer.settings.lr:g}: network {self.index} diverged by epoch {self.epoch}: {what} "
                "not finite. Lower --lr_net"
            )

    def _save(self, which: str) -> None:
        name = checkpoint_name(self.training.real.name, self.training.model, self.index, which)
        save_network(self.run.path / name, self.trainer.net)
