"""The loop of stage 2: networks are trained one after another, tested meanwhile, and saved as checkpoints."""

import torch

from networks import initialize
from utils.compute import distributed
from utils.core.errors import Interrupted, RankError, UserError, one_line
from utils.core.files import save_pt
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.runs import signals
from utils.runs.checkpoints import Checkpointer
from utils.runs.progress import LOG_EVERY
from utils.runs.resume import resume_command
from utils.runs.run_folder import RunFolder
from utils.training.saved_networks import checkpoint_name, is_checkpoint_epoch
from utils.training.trainer import Trainer, accuracy_of

TEST_INTERVAL = 50  # epochs


class NetworkTraining:
    """Trains networks one after another; under `torchrun` each process trains some of them and writes their files.

    `resumes`: whether to continue from the checkpoints in `run`; each network has its own.
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

    def train_all(self, num_networks: int, interval: int = 50) -> list[tuple[float, float]]:
        """Train all networks; returns the best and the last test accuracy of each, as fractions.

        Args:
            interval: epochs between two checkpoints.
        Raises:
            Interrupted: after a signal; the network in training is saved if its epoch ends in time, else its newest
                checkpoint is kept.
            UserError: when a training diverges, or a checkpoint is not of this run.
        """
        indices = distributed.own_share(num_networks)
        networks = [
            NetworkInTraining(self, i, Checkpointer(self.run, f"checkpoint_network{i}", interval)) for i in indices
        ]
        try:
            with signals.catch():
                if self.resumes:
                    self._restore(networks)
                for network in networks:
                    if not network.done:
                        self._train(network)
                results = distributed.gather({n.index: (n.best, n.newest) for n in networks})
        except Interrupted:
            self.run.log("stopped; to resume:")
            self.run.log(resume_command(self.run.path))
            raise
        except UserError as error:
            raise RankError(error) from None
        return list(results.values())

    def _restore(self, networks: list["NetworkInTraining"]) -> None:
        for network in networks:
            network.restore()
        epochs = distributed.gather({network.index: network.epoch for network in networks})
        if all(epoch == self.trainer.settings.epochs for epoch in epochs.values()):
            self.run.log(f"{self.run.path} is finished: all networks are trained")
        self.run.keep_metrics(lambda line: line["epoch"] <= epochs[line["network"]])
        distributed.barrier()  # no process may append before that

    def _train(self, network: "NetworkInTraining") -> None:
        key = ("network", network.index)
        if network.state is None:
            initialize(self.trainer.net, generator(self.seed, *key))
        else:
            self.trainer.load_state_dict(network.state)
        what = f"network {network.index}"
        with self.run.progress(self.trainer.settings.epochs, what, network.epoch, TEST_INTERVAL) as progress:

            def after_epoch(epoch: int, loss: torch.Tensor) -> None:
                progress.step(loss=loss)
                network.after_epoch(epoch, loss)

            with signals.interruptible():
                self.trainer.train(self.synthetic, self.seed, key, after_epoch, network.epoch)
        self.run.log_own(f"{what}: best tested accuracy {100 * network.best:.2f} % (epoch {network.best_epoch})")


class NetworkInTraining:
    """Tests a network while it trains, and writes its checkpoints: those for stage 3, and the one to resume from."""

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
        """Test every 50 epochs and after the last; write the best network from epoch `first` on, and those for stage 3.

        Saves a checkpoint after a test, when one is due, and after a signal.

        Raises:
            Interrupted: after a signal.
            UserError: when the training has diverged.
        """
        tests = epoch % TEST_INTERVAL == 0 or epoch == self.epochs
        saves = tests or self.checkpointer.due(epoch) or signals.received()
        self.epoch = epoch
        if saves or epoch % LOG_EVERY == 0:
            self._check_finite(loss, "its loss is")
        logits = self.trainer.predict(self.real.test_images) if tests else None
        with signals.interruptible(False):
            if logits is not None:
                self._note_test(logits, loss.item())
            if is_checkpoint_epoch(epoch, self.epochs):
                self._save(f"epoch{epoch}")
            if saves:
                self.checkpointer.save(self._position() | ({} if self.done else {"state": self.trainer.state_dict()}))
        if not self.done:
            signals.check()

    def _note_test(self, logits: torch.Tensor, loss: float) -> None:
        """Log the test accuracy, and write the network if it is the best so far."""
        self._check_finite(logits, "its outputs are")
        self.newest = accuracy_of(logits, self.real.labels_test)
        self.run.metric(network=self.index, epoch=self.epoch, loss=loss, accuracy=self.newest)
        if self.epoch >= self.first and self.newest > self.best:
            self.best, self.best_epoch = self.newest, self.epoch
            self._save("best")

    def _check_finite(self, values: torch.Tensor, what: str) -> None:
        if not torch.isfinite(values).all():
            raise UserError(
                f"--lr_net {self.trainer.settings.lr:g}: network {self.index} diverged by epoch {self.epoch}: {what} "
                "not finite. Lower --lr_net"
            )

    def _save(self, which: str) -> None:
        """Write the network for stage 3; `which` is `best` or `epoch<e>`."""
        state = {name: tensor.cpu() for name, tensor in self.trainer.net.state_dict().items()}
        save_pt(self.run.path / checkpoint_name(self.real.name, self.training.model, self.index, which), state)

    def _position(self) -> dict:
        return {"epoch": self.epoch, "best": self.best, "best_epoch": self.best_epoch, "newest": self.newest}

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one.

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
                self.trainer.load_state_dict(self.state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = one_line(error, 100)
            raise UserError(f"--resume: {self.checkpointer.path} is not of this run: {reason}") from None
        self.run.log_own(f"network {self.index}: resumed at epoch {self.epoch}")
