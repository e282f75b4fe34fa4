"""Before stage 1 with experts: train networks on the real set and keep their parameters after every epoch."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from networks import initialize
from utils.compute import distributed
from utils.compute.device import Compute, Workload, choose_compute, choose_device
from utils.compute.transfer import send_draws
from utils.core.errors import UserError, one_line, print_line, require
from utils.core.files import read_json, save_pt, save_text
from utils.core.rng import generator
from utils.core.torch_files import read_pt
from utils.data.datasets import RealData
from utils.outliers.sources import OutlierSource
from utils.runs import signals
from utils.runs.run_folder import RunFolder
from utils.settings.common import read_data
from utils.settings.distillation import ExpertSettings, source_of
from utils.training.experts import ABOUT, check_about, describe, expert_folder
from utils.training.trainer import Trainer, TrainSettings, accuracy_of


def run_experts(settings: ExpertSettings) -> None:
    """Everything that `train_experts.py` does after parsing: train the experts that are missing in their folder."""
    device = choose_device(settings.device, settings.deterministic)
    _train_in_folder(settings, read_data(settings).to(device))


def train_missing(settings: ExpertSettings, real: RealData) -> None:
    """Train the experts that are missing; if there are others that were trained in another way, they are used, and a
    line says so."""
    folder = expert_folder(settings.buffer_path, real, settings.model)
    stored = read_json(folder / ABOUT, "--buffer_path") if (folder / ABOUT).exists() else {}
    trained, wanted = stored.get("training"), settings.about()
    if not any(folder.glob("replay_buffer_*.pt")) or trained == wanted:
        _train_in_folder(settings, real)
    elif distributed.is_main():
        known = trained if isinstance(trained, dict) else {}
        others = ", ".join(f"{name} {known.get(name, 'unknown')}" for name in wanted if known.get(name) != wanted[name])
        how = f"as they were trained: {others}" if known else "though they do not say how they were trained"
        print_line(f"the experts in {folder} are used {how}. Others need another --buffer_path")


def _train_in_folder(settings: ExpertSettings, real: RealData) -> None:
    """Train the experts that are missing in their folder; `real` is on the device."""
    s, outliers = settings, source_of(settings, real)
    net, shape = real.network(s.model, generator(s.seed)), (real.channel, *real.im_size)
    compute = choose_compute(s.compile, s.precision, real.device, net, shape, experts_workload(s, real))
    about = describe(real, s.model, outliers and outliers.describe(), s.lambda_oe) | {"training": s.about()}
    about |= {"num_oe_per_class": s.num_oe_per_class} if s.outliers == "oe" else {}
    folder = expert_folder(s.buffer_path, real, s.model)
    done = f"{s.num_experts} experts of {s.train_epochs} epochs: {folder}"
    files = [folder / f"replay_buffer_{index}.pt" for index in range(s.num_experts)]
    complete = all(path.is_file() for path in files) and not any(folder.glob("unfinished_expert_*"))
    if _is_begun(folder, about) and complete:  # without the lock, as nothing is written
        if distributed.is_main():
            print(f"{done}, trained before")
        return
    run = open_expert_run(folder, about)
    notices = [outliers.notice] if outliers and outliers.notice else []
    run.log(f"experts: {run.path}", *real.lines(), *notices, f"computing: {compute}")
    ExpertTraining(net.to(real.device), real, outliers, s, compute, run).train_all()
    run.log(done)


def experts_workload(s: ExpertSettings, real: RealData) -> Workload:
    """The work of this process, as if no expert had been trained before; each epoch ends in a test."""
    train, test = len(real.images_train), len(real.images_test)
    epochs = len(distributed.own_share(s.num_experts)) * s.train_epochs
    images = train * (1 if s.outliers == "none" else 1 + s.batch_oe / s.batch)
    return Workload(epochs * (images + test / 2), "training")


def open_expert_run(folder: Path, about: dict) -> RunFolder:
    """Open the folder of an expert training: a new one, or one with experts of the same kind."""
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--buffer_path: cannot make {folder}: {error}") from None
    distributed.barrier()
    run = RunFolder(folder)
    _is_begun(folder, about)  # by now, another process may have trained others
    if run.is_main:
        save_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    return run


def _is_begun(folder: Path, about: dict | None = None) -> bool:
    """Whether a folder has an expert, or an epoch of one; a `UserError` tells that they are of another kind than
    `about`, if that is given, or of an unknown one."""
    begun = any(folder.glob("replay_buffer_*.pt")) or any(folder.glob("unfinished_expert_*/epoch_1.pt"))
    if begun and about is not None and not check_about(folder, about):
        raise UserError(f"--buffer_path: {folder} has experts without {ABOUT}, made elsewhere; give another folder")
    return begun


class ExpertTraining:
    """Trains experts on the real set, and on outliers if there is a source; under `torchrun` each process trains some.

    Every epoch is kept in its own file until the trajectory is complete, so a killed training can be resumed.
    """

    def __init__(
        self,
        net: nn.Module,
        real: RealData,
        outliers: OutlierSource | None,
        settings: ExpertSettings,
        compute: Compute,
        run: RunFolder,
    ):
        s = settings
        self.net, self.real, self.outliers, self.settings, self.run = net, real, outliers, s, run
        training = TrainSettings(s.train_epochs, s.lr_teacher, s.batch, s.lambda_oe, s.augmentation, s.mom, s.l2)
        self.trainer = Trainer(net, training, compute)

    def train_all(self) -> None:
        """Train the experts that are missing. After a signal it stops; completed epochs are kept."""
        with signals.catch():
            for index in distributed.own_share(self.settings.num_experts):
                self._train(index, self.run.path / f"replay_buffer_{index}.pt")
                signals.check()
            distributed.barrier()

    def _train(self, index: int, path: Path) -> None:
        s, folder = self.settings, self.run.path / f"unfinished_expert_{index}"
        if path.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed before it removed this
            return
        folder.mkdir(exist_ok=True)
        done = self._restore(index, folder)
        with self.run.progress(s.train_epochs, f"expert {index}", start=done, every=1) as progress:
            for epoch in range(done, s.train_epochs):
                with signals.interruptible():
                    loss = self._epoch(index, epoch)
                    accuracy = accuracy_of(self.trainer.predict(self.real.test_images), self.real.labels_test)
                told = f"--lr_teacher {s.lr_teacher:g}: expert {index} diverged in epoch {epoch}"
                is_finite = all(torch.isfinite(t).all() for t in (loss, *self.net.parameters()))
                require(is_finite, f"{told}; lower it, and delete {self.run.path} or give another --buffer_path")
                save_pt(folder / f"epoch_{epoch + 1}.pt", self.trainer.state_dict())
                progress.step(loss=loss, accuracy=accuracy)
                signals.check()
        states = [read_pt(folder / f"epoch_{e}.pt", "unfinished expert")["net"] for e in range(s.train_epochs + 1)]
        names = [name for name, _ in self.net.named_parameters()]
        save_pt(path, [[[state[name].detach().cpu().float().clone() for name in names] for state in states]])
        shutil.rmtree(folder)
        trained = done < s.train_epochs
        what = f"test accuracy {100 * accuracy:.2f} %" if trained else f"its epochs are collected in {path}"
        self.run.log_own(f"expert {index}: {what}")

    def _restore(self, index: int, folder: Path) -> int:
        """Continue after the newest epoch in `folder`, or start; returns how many epochs are done."""
        done = 0
        while (folder / f"epoch_{done + 1}.pt").exists():
            done += 1
        if done and (folder / "epoch_0.pt").exists():
            try:
                self.trainer.load_state_dict(read_pt(folder / f"epoch_{done}.pt", "unfinished expert"))
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise UserError(f"--buffer_path: cannot continue {folder}: {one_line(error)}. Delete it") from None
            return done
        initialize(self.net, generator(self.settings.seed, "expert", index))
        self.trainer.restart(self.settings.lr_teacher)
        save_pt(folder / "epoch_0.pt", self.trainer.state_dict())
        return 0

    def _epoch(self, index: int, epoch: int) -> Tensor:
        """Train one epoch on the real set; returns the mean batch loss."""
        s, real, losses = self.settings, self.real, []
        g = generator(s.seed, "expert", index, "epoch", epoch)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = s.lr_teacher * (0.1 if s.decay and epoch > s.train_epochs // 2 else 1.0)
        self.net.train()
        for part in torch.randperm(len(real.images_train), generator=g).split(s.batch):
            images = self._augmented(real.train_batch(part), g)
            if self.outliers is not None:
                images = torch.cat([images, self._augmented(self._outlier_batch(g), g)])
            losses.append(self.trainer.step(images, real.labels_train[part.to(real.device)]))
        return torch.stack(losses).mean()

    def _augmented(self, images: Tensor, g: torch.Generator) -> Tensor:
        augmentation = self.settings.augmentation
        if augmentation is None:
            return images
        return send_draws(augmentation.draw(len(images), self.real.im_size, g), images.device)(images)

    def _outlier_batch(self, g: torch.Generator) -> Tensor:
        """`batch_oe` outliers, as evenly over the slots as possible."""
        slots, n = self.real.num_classes, self.settings.batch_oe
        first = int(torch.randint(slots, (1,), generator=g))  # the first slot to get one of the rest, `n % slots`
        counts = [n // slots + ((slot - first) % slots < n % slots) for slot in range(slots)]
        return torch.cat([self.outliers.draw(slot, count, g) for slot, count in enumerate(counts) if count])
