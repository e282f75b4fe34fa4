"""Training networks on a synthetic set, and testing them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from .augment import DC, DSA
from .devices import Compute
from .losses import joint_loss
from .rng import generator, send
from .synthetic import SyntheticSet

TEST_BATCH = 250


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained on a synthetic set.

    The learning rate drops to a tenth, with fresh momentum, after half the epochs (section 4.1 of the DC paper).
    """

    epochs: int
    lr: float = 0.01
    batch: int = 256
    lambda_oe: float = 0.5
    augmentation: DSA | DC | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4


class Trainer:
    """Trains one network on synthetic sets; its optimizer starts anew at each `restart`."""

    def __init__(self, net: nn.Module, settings: TrainSettings, compute: Compute | None = None):
        self.net, self.settings = net, settings
        compute = compute or Compute()
        self.loss = compute.function(lambda images, labels, weight: joint_loss(net(images), labels, weight))
        self.forward = replace(compute, precision="fp32").function(net) if compute.compiled else None
        self.restart(settings.lr)

    def restart(self, lr: float) -> None:
        """A fresh SGD with learning rate `lr`, without momentum from before."""
        s = self.settings
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=lr, momentum=s.momentum, weight_decay=s.weight_decay, fused=True
        )

    def epoch(self, synthetic: SyntheticSet, g: torch.Generator) -> torch.Tensor:
        """One pass over the synthetic set; returns the mean loss of its batches, a scalar on the device.

        An InD batch and a batch of outliers, each augmented on its own, go through the network in one forward pass.
        """
        self.net.train()
        losses = []
        device = synthetic.images.device
        outliers = synthetic.images_oe
        order = torch.randperm(len(synthetic.images), generator=g)
        order_oe = None if outliers is None else torch.randperm(len(outliers), generator=g)
        for start in range(0, len(order), self.settings.batch):
            index = order[start : start + self.settings.batch]
            index = send(index, device)
            images = self._augmented(synthetic.images[index], g)
            if outliers is not None:
                index_oe = send(order_oe[start : start + self.settings.batch], device)
                images = torch.cat([images, self._augmented(outliers[index_oe], g)])
            losses.append(self._step(images, synthetic.labels[index]))
        return torch.stack(losses).mean()

    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Fraction of test images `[N, C, H, W]` that the network classifies as their label."""
        return accuracy(self.net, images, labels, self.forward)

    def _augmented(self, images: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        augmentation = self.settings.augmentation
        if augmentation is None or not len(images):
            return images
        return augmentation.draw(len(images), tuple(images.shape[2:]), g)(images)

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self.loss(images, labels, self.settings.lambda_oe)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach().clone()  # a recorded CUDA graph would overwrite it

    def train(
        self,
        synthetic: SyntheticSet,
        seed: int,
        key: tuple,
        after_epoch: Callable[[int, torch.Tensor], None] | None = None,
        first_epoch: int = 0,
    ) -> None:
        """Train the network in place for `settings.epochs` epochs.

        Args:
            seed, key: every epoch draws from `generator(seed, *key, "epoch", epoch)`.
            after_epoch: called with the number of epochs done and the mean loss.
            first_epoch: how many are done already; the optimizer goes on as it is.
        """
        epochs, lr = self.settings.epochs, self.settings.lr
        if not first_epoch:
            self.restart(lr)
        for epoch in range(first_epoch, epochs):
            if epoch and epoch == epochs // 2:
                self.restart(lr * 0.1)
            loss = self.epoch(synthetic, generator(seed, *key, "epoch", epoch))
            if after_epoch is not None:
                after_epoch(epoch + 1, loss)


@torch.no_grad()
def predict(
    net: nn.Module, images: torch.Tensor, batch: int = TEST_BATCH, forward: Callable | None = None
) -> torch.Tensor:
    """Logits `[N, num_classes]` of all images `[N, C, H, W]`, in evaluation mode; a last partial batch counts, too.

    `forward` is a compiled `net`, if there is one. It sees batches of one size only: the last is filled up with zeros.
    """
    net.eval()
    if forward is None:
        return torch.cat([net(part) for part in images.split(batch)])
    missing = -len(images) % batch
    filled = torch.cat([images[-(len(images) % batch) :], images.new_zeros(missing, *images.shape[1:])])
    parts = [*images.split(batch)[:-1], filled] if missing else images.split(batch)
    return torch.cat([forward(part).float().clone() for part in parts])[: len(images)]


def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, forward: Callable | None = None) -> float:
    """Fraction of images classified as their label."""
    return (predict(net, images, TEST_BATCH, forward).argmax(1) == labels).float().mean().item()
