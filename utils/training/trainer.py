"""Training networks on a synthetic set, and testing them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from networks import has_batchnorm, initialize
from utils.compute.cpu_batches import BatchSplitter, padded_to
from utils.compute.device import Compute
from utils.compute.transfer import send_draws
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import DC, DSA
from utils.data.synthetic import SyntheticSet
from utils.training.draws import Batch, augmented_batches, draw_epoch, with_fresh_outliers
from utils.training.losses import joint_loss, joint_parts

TEST_BATCH = 250
DRAWN_EPOCHS, DRAWN_IMAGES = 50, 2**18  # the most epochs that are drawn together, and the most images in them
FRESH_NUMBERS = 2**26  # the most numbers in the new outliers of the epochs that are drawn together
LR_NET = 0.01
AfterEpoch = Callable[[int, Tensor], None] | None  # called with the number of epochs done and the mean loss
LEARNING_RATES = {"sgd": LR_NET, "adamw": 0.001}
WEIGHT_DECAYS = {"sgd": 5e-4, "adamw": 0.01}
# the learning rate is multiplied by a factor after these shares of the epochs; with `half` the momentum starts anew
SCHEDULES = {"half": ((1 / 2,), 0.1), "late": ((2 / 3, 5 / 6), 0.2), "fifths": ((0.2, 0.4, 0.6, 0.8), 0.5)}
MIXES = ("none", "cutmix", "mixup")


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained on a synthetic set; the defaults are those of the DC paper, section 4.1."""

    epochs: int
    lr: float | None = LR_NET  # None: the learning rate of the synthetic set if it has one, else the optimiser's
    batch: int = 256
    lambda_oe: float = 0.5
    augmentation: DSA | DC | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: str = "sgd"  # of LEARNING_RATES
    schedule: str = "half"  # of SCHEDULES
    mix: str = "none"  # of MIXES

    def learning_rate(self, synthetic: SyntheticSet | None = None) -> float:
        """The learning rate on a set: the one given, that of the set for SGD, or the usual one."""
        of_set = synthetic.lr_net if synthetic is not None and self.optimizer == "sgd" else None
        return self.lr or of_set or LEARNING_RATES[self.optimizer]


PROTOCOLS = {  # of publications; the learning rate and the decay follow from the optimiser
    "dc": TrainSettings(1000, batch=256),  # DC, DSA, DM, MTT
    "idc": TrainSettings(1000, batch=64, schedule="late", mix="cutmix"),  # IDC, DREAM
    "ncfm": TrainSettings(2000, batch=128, optimizer="adamw", schedule="fifths", mix="cutmix"),  # NCFM
}


class Trainer:
    """Trains one network on synthetic sets."""

    def __init__(self, net: nn.Module, settings: TrainSettings, compute: Compute | None = None):
        self.net, self.settings = net, settings
        compute = compute or Compute()
        self.splitter, self.test_splitter = BatchSplitter(net, compute.precision), BatchSplitter(net)
        self.has_batchnorm = has_batchnorm(net)
        self.loss = compute.function(lambda images, labels, weight: joint_loss(net(images), labels, weight))
        self.forward = replace(compute, precision="fp32").function(net) if compute.compiled else None
        self.restart(settings.learning_rate())

    def restart(self, lr: float) -> None:
        """Start a fresh optimiser with learning rate `lr`."""
        s = self.settings
        common = {"lr": lr, "weight_decay": s.weight_decay, "fused": True}
        if s.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self.net.parameters(), **common)
        else:
            self.optimizer = torch.optim.SGD(self.net.parameters(), momentum=s.momentum, **common)

    def epochs(self, synthetic: SyntheticSet, drawn: Sequence[list[Batch]]) -> Iterator[Tensor]:
        """Train one epoch on each entry of `drawn`, its batches on the device; yields the mean batch loss of each.

        An InD batch and a batch of outliers are augmented separately and go through the network in one forward pass.
        """
        inputs = augmented_batches(synthetic, [batch for batches in drawn for batch in batches])
        for batches in drawn:
            self.net.train()
            yield torch.stack([self.step(*next(inputs)) for _ in batches]).mean()

    def drawn_epochs(
        self, synthetic: SyntheticSet, generators: Sequence[torch.Generator], fresh: Sequence[torch.Generator] = ()
    ) -> Iterator[Tensor]:
        """`epochs` with draws of each generator; `fresh`: generators of new outliers for each, if there are any."""
        s = self.settings
        drawn = [draw_epoch(synthetic, s.batch, s.augmentation, g, s.mix) for g in generators]
        if fresh:
            synthetic, drawn = with_fresh_outliers(synthetic, drawn, fresh)
        return self.epochs(synthetic, send_draws(drawn, synthetic.images.device))

    def epoch(self, synthetic: SyntheticSet, g: torch.Generator) -> Tensor:
        """Train one epoch over the synthetic set; returns the mean batch loss."""
        return next(self.drawn_epochs(synthetic, [g]))

    def predict(self, images: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, C, H, W]`, in evaluation mode."""
        batch = TEST_BATCH // self.test_splitter.count(images[:TEST_BATCH])
        return predict(self.net, images, batch, self.forward)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update on augmented images followed by outliers `[n, C, H, W]`, and labels of the images; the loss."""
        self.optimizer.zero_grad(set_to_none=True)  # before a recorded CUDA graph overwrites the gradients
        parts = joint_parts(images, labels, None if self.has_batchnorm else self.splitter)
        losses = []
        for some_images, some_labels in parts:
            loss = self._loss(some_images, some_labels)
            (loss / len(parts) if len(parts) > 1 else loss).backward()
            losses.append(loss.detach().clone())  # a recorded CUDA graph would overwrite it
        self.optimizer.step()
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        try:
            return self.loss(images, labels, self.settings.lambda_oe)
        except ValueError:
            if len(images) > 1:
                raise
        single = f"--batch_train {self.settings.batch}: the last batch of an epoch is a single image"
        raise UserError(f"{single}, too few for BatchNorm at this size; give another --batch_train")

    def train(
        self, synthetic: SyntheticSet, seed: int, key: tuple, after_epoch: AfterEpoch = None, first_epoch: int = 0
    ) -> None:
        """Train the network in place for `settings.epochs` epochs, of which those before `first_epoch` are done.

        Every epoch draws from `generator(seed, *key, "epoch", epoch)`, and new outliers from
        `generator(seed, *key, "outliers", epoch)`.
        """
        epochs, lr = self.settings.epochs, self.settings.learning_rate(synthetic)
        if not first_epoch:
            self.restart(lr)
        if self.settings.mix != "none":
            synthetic = synthetic.with_probabilities()
        shares, factor = SCHEDULES[self.settings.schedule]
        drops = [int(share * epochs) for share in shares]
        per_block = epochs_drawn_together(synthetic)
        for first in range(first_epoch, epochs, per_block):
            block = range(first, min(first + per_block, epochs))
            of_epochs, of_outliers = ([generator(seed, *key, what, e) for e in block] for what in ("epoch", "outliers"))
            losses = self.drawn_epochs(synthetic, of_epochs, of_outliers if synthetic.fresh_oe is not None else ())
            for epoch in block:
                rate = lr * factor ** sum(drop <= epoch for drop in drops) if epoch else lr
                if self.settings.schedule == "half" and epoch and epoch in drops:
                    self.restart(rate)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                loss = next(losses)
                if after_epoch is not None:
                    after_epoch(epoch + 1, loss)

    def train_fresh(self, synthetic: SyntheticSet, seed: int, key: tuple, after_epoch: AfterEpoch = None) -> None:
        """`train` a network whose weights are drawn from `generator(seed, *key)`."""
        initialize(self.net, generator(seed, *key))
        self.train(synthetic, seed, key, after_epoch)

    def state_dict(self) -> dict:
        """The network and its optimiser."""
        return {"net": dict(self.net.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`; a `ValueError`, `RuntimeError` or `KeyError` tells that it does not fit."""
        self.net.load_state_dict(dict(state["net"]))
        load_optimizer(self.optimizer, state.get("optimizer"))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict | None) -> None:
    """Continue with the state of a `state_dict`, but not with its parameter groups, which come from the flags.

    A `ValueError`, `KeyError`, `TypeError` or `AttributeError` tells that it is of other parameters, or of older code.
    """
    if state is None:
        raise ValueError("older code wrote it; resume it with that, or start a new run")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
    for parameter, of_parameter in optimizer.state.items():
        tensors = {name: value for name, value in of_parameter.items() if isinstance(value, Tensor)}
        if any(value.ndim and value.shape != parameter.shape for value in tensors.values()):
            raise ValueError("momentum of another shape than its parameter")
        of_parameter |= {name: value.clone() for name, value in tensors.items()}  # those of a file may share memory


def epochs_drawn_together(synthetic: SyntheticSet) -> int:
    """How many epochs are drawn together: fewer the larger the set is; what is drawn does not depend on it."""
    images = len(synthetic.images) + synthetic.num_outliers
    fresh = 1 if synthetic.fresh_oe is None else synthetic.num_outliers * synthetic.images[0].numel()
    return max(1, min(DRAWN_EPOCHS, DRAWN_IMAGES // images, FRESH_NUMBERS // fresh))


@torch.no_grad()
def predict(net: nn.Module, images: Tensor, batch: int = TEST_BATCH, forward: Callable | None = None) -> Tensor:
    """Logits `[N, num_classes]` of all images `[N, C, H, W]`, in evaluation mode, including a last partial batch.

    `forward` is a compiled `net`, if there is one. Its batches all have one size: the last is padded with zeros.
    """
    net.eval()
    if forward is None:
        return torch.cat([net(part) for part in images.split(batch)])
    return torch.cat([forward(padded_to(part, batch)).float().clone() for part in images.split(batch)])[: len(images)]


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Fraction of rows of `logits` `[N, num_classes]` whose largest entry is at the label."""
    return (logits.argmax(1) == labels).float().mean().item()
