"""Expert trajectories for trajectory matching (Cazenavette et al., CVPR 2022): training them, and their files.

An expert is a network trained on the real set; its trajectory is its parameters before the first epoch and after each.
The files have the published layout: `<buffer_path>/<dataset>[_NO_ZCA]/<model>/replay_buffer_<n>.pt` is a list of
trajectories, each a list of epochs, each a list of parameter tensors in parameter order, float32 on the CPU.
"""

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from networks import initialize
from utils.compute import distributed
from utils.compute.device import Compute
from utils.compute.transfer import send_draws
from utils.core.errors import UserError, one_line, rank_errors
from utils.core.files import read_json, save_pt, save_text
from utils.core.rng import generator
from utils.core.torch_files import fingerprint, read_pt
from utils.data.augment import identity
from utils.data.datasets import RealData
from utils.methods.method import MethodInputs
from utils.outliers.sources import OutlierSource
from utils.runs import signals
from utils.runs.lineage import args_or_nothing
from utils.runs.run_folder import RunFolder
from utils.settings.common import Data, Network
from utils.settings.distillation import WITH_OUTLIERS, Distilling
from utils.settings.experts import Buffers, ExpertSettings
from utils.settings.fields import as_words, flag, flags_of
from utils.settings.outliers import Corrupted, OutlierTraining, Pool
from utils.settings.parser import count, number
from utils.training.trainer import Trainer, TrainSettings, accuracy_of

ABOUT = "experts.json"
Params = list[torch.Tensor]


def expert_folder(buffer_path: str | Path, real: RealData, model: str) -> Path:
    """The folder of the experts of a model on a data set, named as in published buffers."""
    zca = "" if real.zca is not None else "_NO_ZCA"
    return Path(buffer_path) / f"{real.name}{zca}" / model


def describe(real: RealData, model: str, outliers: OutlierSource | None, lambda_oe: float | None = None) -> dict:
    """What experts and a distillation must have in common, stored in `experts.json`; `lambda_oe`: outlier weight."""
    return {
        "dataset": real.name,
        "model": model,
        "mean": list(real.mean),
        "std": list(real.std),
        "class_names": list(real.class_names),
        "zca": real.zca is not None,
        "outliers": {"kind": "none"} if outliers is None else outliers.describe() | {"lambda_oe": lambda_oe},
    }


def check_about(folder: Path, expected: dict, flag: str) -> bool:
    """Compare `experts.json` with what is expected; False if there is none, as in published buffers.

    Raises:
        UserError: naming what differs.
    """
    path = folder / ABOUT
    if not path.exists():
        return False
    stored = read_json(path, flag)
    for name, value in expected.items():
        unknown = name == "class_names" and not (value and stored.get(name))
        if not unknown and stored.get(name) != value:
            found, wanted = _differing(stored.get(name), value)
            raise UserError(
                f"{flag}: the experts in {folder} are of another kind: {name} {json.dumps(found)[:120]} "
                f"instead of {json.dumps(wanted)[:120]}. Give the {flag} of the right ones"
            )
    return True


def _differing(found: object, wanted: object) -> tuple[object, object]:
    """Of two dictionaries only what differs; other values as they are."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return found, wanted
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return {n: found.get(n) for n in names}, {n: wanted.get(n) for n in names}


# --- reading ---------------------------------------------------------------------------------------------------------


class ExpertBuffer:
    """The trajectories in a folder. They stay on the disk: a segment reads two epochs of one of them.

    Args:
        shapes: of the network's parameters, in order.
        most: use only the first `most` experts; None for all.
        how_to_make: the command for the message if there are none.
    Raises:
        UserError: when there are none, or they are damaged or do not fit the network.
    """

    def __init__(self, folder: Path, shapes: Sequence[torch.Size], most: int | None, how_to_make: str):
        self.paths = sorted(folder.glob("replay_buffer_*.pt"), key=lambda p: (len(p.name), p.name))
        if not self.paths:
            raise UserError(f"--buffer_path: no experts in {folder}; make them: {how_to_make}")
        self.folder, self.shapes = folder, [tuple(s) for s in shapes]
        self.trajectories: list[tuple[Path, list[Params]]] = []
        for path in self.paths:
            self.trajectories += [(path, trajectory) for trajectory in self._read(path)]
            if most is not None and len(self.trajectories) >= most:
                self.trajectories = self.trajectories[:most]
                break
        self.epochs = min(len(trajectory) for _, trajectory in self.trajectories) - 1

    def _read(self, path: Path) -> list[list[Params]]:
        """The trajectories of a file, memory-mapped and checked by shape."""
        content = read_pt(path, "--buffer_path", mmap=True)
        well_formed = isinstance(content, list) and content and all(isinstance(t, list) and t for t in content)
        if not well_formed or not all(isinstance(epoch, list) for t in content for epoch in t):
            raise UserError(f"--buffer_path: {path} is no buffer, a list of trajectories; make it again")
        for trajectory in content:
            for epoch in trajectory:
                shapes = [tuple(p.shape) if isinstance(p, torch.Tensor) else None for p in epoch]
                if shapes != self.shapes:
                    raise UserError(f"--buffer_path: {path} has experts of another --model or data set")
        return content

    def fingerprint(self) -> str:
        """SHA-256 over the trajectories: of each, the first parameter tensor of its last epoch."""
        return fingerprint(trajectory[-1][0] for _, trajectory in self.trajectories)

    def segment(self, g: torch.Generator, max_start: int, length: int, device: torch.device) -> tuple[Params, Params]:
        """The parameters at a random start epoch below `max_start` of a random expert, and `length` epochs later.

        Raises:
            UserError: when they are not finite.
        """
        index = int(torch.randint(len(self.trajectories), (1,), generator=g))
        start = int(torch.randint(max_start, (1,), generator=g))
        return self.snapshot(index, start, device), self.snapshot(index, start + length, device)

    def snapshot(self, index: int, epoch: int, device: torch.device) -> Params:
        """The parameters of an expert after `epoch` epochs.

        Raises:
            UserError: when they are not finite.
        """
        path, trajectory = self.trajectories[index]
        if not all(torch.isfinite(p).all() for p in trajectory[epoch]):  # on the CPU, so that a GPU is not waited for
            raise UserError(f"--buffer_path: {path} holds NaN or infinite numbers at epoch {epoch}; make it again")
        return [p.detach().to(device, torch.float32, copy=True) for p in trajectory[epoch]]


@dataclass(frozen=True)
class OnExperts(Distilling, Buffers):
    """Matching with experts."""

    expert_lambda_oe: float | None = flag(
        None,
        "weight of the outlier loss when the experts were trained; left out: --lambda_oe. With a larger one, training "
        "on the distilled outliers at --lambda_oe acts like training at this weight",
        number(0),
        needs=(WITH_OUTLIERS,),
    )
    max_experts: int | None = flag(None, "use only this many experts, the first ones; left out: all", count(1))

    @property
    def last_epoch(self) -> int:
        """The last epoch of the experts that is needed."""
        return 1

    def of_experts(self) -> ExpertSettings:
        """The settings of `train_experts.py` for experts that fit."""
        groups = (Data, Network, Buffers, OutlierTraining, Pool, Corrupted)
        shared = {f.name: getattr(self, f.name) for group in groups for f in flags_of(group)}
        if self.expert_lambda_oe is not None:
            shared["lambda_oe"] = self.expert_lambda_oe
        epochs = max(self.last_epoch, ExpertSettings.train_epochs)
        own = {"outliers": self.outliers, "train_epochs": epochs, "dsa_strategy": self.dsa_strategy}
        return ExpertSettings(**shared | own)


def experts_of(inputs: MethodInputs) -> tuple[ExpertBuffer, list[str]]:
    """The experts that the settings of a distillation name, and lines for its log.

    Raises:
        UserError: when there are none, they are damaged, or of another kind.
    """
    s, real = inputs.settings, inputs.real
    folder = expert_folder(s.buffer_path, real, s.model)
    how_to_make = shlex.join(["python", "train_experts.py", *as_words(s.of_experts())])
    most = s.max_experts
    if s.resume:  # more may have been trained since the run began
        most = args_or_nothing(Path(s.resume)).get("num_experts", most)
    shapes = [p.shape for p in real.network(s.model, generator(0)).parameters()]
    experts = ExpertBuffer(folder, shapes, most, how_to_make)
    expected = describe(real, s.model, inputs.outliers, s.of_experts().lambda_oe)
    if check_about(folder, expected, "--buffer_path"):
        return experts, []
    if inputs.outliers is not None:
        raise UserError(
            f"--buffer_path: {folder} has no {ABOUT}, so its experts have seen no outliers; make them with "
            f"{how_to_make}"
        )
    return experts, [f"{folder} has no {ABOUT}: experts are assumed to have seen images normalised as here"]


def without_running_statistics(net: nn.Module) -> nn.Module:
    """Let BatchNorm use batch statistics only: expert buffers hold parameters, but no running statistics."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return net


# --- training --------------------------------------------------------------------------------------------------------


class ExpertTraining:
    """Trains experts on the real set and, if there is a source of outliers, on outliers.

    Under `torchrun` each process trains some. Every epoch is kept in its own file until the trajectory is complete, so
    a killed training can be resumed.
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
        """Train the experts that are missing.

        Raises:
            Interrupted: after a signal; completed epochs are kept.
            UserError: when a training diverges.
        """
        with rank_errors(), signals.catch():
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
                if not all(torch.isfinite(t).all() for t in (loss, *self.net.parameters())):
                    raise UserError(
                        f"--lr_teacher {s.lr_teacher:g}: expert {index} diverged in epoch {epoch}; lower it, and "
                        f"delete {self.run.path} or give another --buffer_path"
                    )
                save_pt(folder / f"epoch_{epoch + 1}.pt", self.trainer.state_dict())
                progress.step(loss=loss, accuracy=accuracy)
                signals.check()
        states = [read_pt(folder / f"epoch_{e}.pt", "unfinished expert") for e in range(s.train_epochs + 1)]
        save_pt(path, [[self._parameters(state["net"]) for state in states]])
        shutil.rmtree(folder)
        what = (
            f"test accuracy {100 * accuracy:.2f} %" if done < s.train_epochs else f"its epochs are collected in {path}"
        )
        self.run.log_own(f"expert {index}: {what}")

    def _parameters(self, state: dict) -> Params:
        return [state[name].detach().cpu().float().clone() for name, _ in self.net.named_parameters()]

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

    def _set_lr(self, epoch: int) -> None:
        s = self.settings
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = s.lr_teacher * (0.1 if s.decay and epoch > s.train_epochs // 2 else 1.0)

    def _epoch(self, index: int, epoch: int) -> torch.Tensor:
        """Train one epoch on the real set; returns the mean batch loss."""
        s, real = self.settings, self.real
        g = generator(s.seed, "expert", index, "epoch", epoch)
        self._set_lr(epoch)
        self.net.train()
        losses = []
        for part in torch.randperm(len(real.images_train), generator=g).split(s.batch):
            images = self._augmented(real.train_batch(part), g)
            if self.outliers is not None:
                images = torch.cat([images, self._augmented(self._outlier_batch(g), g)])
            losses.append(self.trainer.step(images, real.labels_train[part.to(real.device)]))
        return torch.stack(losses).mean()

    def _augmented(self, images: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        augmentation = self.settings.augmentation
        transform = identity if augmentation is None else augmentation.draw(len(images), self.real.im_size, g)
        return (transform if augmentation is None else send_draws(transform, images.device))(images)

    def _outlier_batch(self, g: torch.Generator) -> torch.Tensor:
        """`batch_oe` outliers, as evenly over the slots as possible."""
        slots, n = self.real.num_classes, self.settings.batch_oe
        first = int(torch.randint(slots, (1,), generator=g))  # the first slot to get one of the rest, `n % slots`
        counts = [n // slots + ((slot - first) % slots < n % slots) for slot in range(slots)]
        drawn = [self.outliers.choose(slot, count, g) for slot, count in enumerate(counts) if count]
        return torch.cat([self.outliers.batch(d) for d in send_draws(drawn, self.real.device)])


def all_trained(folder: Path, about: dict, num_experts: int) -> bool:
    """Whether the folder has all experts, of the kind `about`, so that none must be trained and no lock is needed.

    Raises:
        UserError: when it holds experts of another kind, finished or begun.
    """
    if not _is_begun(folder):
        return False
    complete = all((folder / f"replay_buffer_{index}.pt").is_file() for index in range(num_experts))
    return check_about(folder, about, "--buffer_path") and complete and not any(folder.glob("unfinished_expert_*"))


def open_expert_run(folder: Path, about: dict) -> RunFolder:
    """Open the folder of an expert training: a new one, or one with experts of the same kind.

    Raises:
        UserError: when it cannot be made, or has experts of another or unknown kind.
    """
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--buffer_path: cannot make {folder}: {error}") from None
    distributed.barrier()
    _check_kind(folder, about)
    run = RunFolder(folder)
    if run.is_main:
        _check_kind(folder, about)  # what was there before the lock may have grown
        save_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    return run


def _is_begun(folder: Path) -> bool:
    """Whether a folder has an expert, or an epoch of one."""
    return any(folder.glob("replay_buffer_*.pt")) or any(folder.glob("unfinished_expert_*/epoch_1.pt"))


def _check_kind(folder: Path, about: dict) -> None:
    """Raise a `UserError` if what has begun in a folder is not known to be of the kind `about`."""
    if _is_begun(folder) and not check_about(folder, about, "--buffer_path"):
        raise UserError(f"--buffer_path: {folder} has experts without {ABOUT}, made elsewhere; give another folder")
