"""Training networks on a synthetic set, and testing them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .augment import DC, DSA
from .losses import joint_loss
from .rng import generator
from .synthetic import SyntheticSet

TEST_BATCH = 500


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


def train_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    synthetic: SyntheticSet,
    settings: TrainSettings,
    g: torch.Generator,
) -> torch.Tensor:
    """One pass over the synthetic set; returns the mean loss of its batches, a scalar on the device.

    An InD batch and a batch of outliers, each augmented on its own, go through the network in one forward pass.
    """
    net.train()
    losses = []
    device = synthetic.images.device
    order = torch.randperm(len(synthetic.images), generator=g).to(device, non_blocking=True)
    outliers = synthetic.images_oe
    order_oe = None if outliers is None else torch.randperm(len(outliers), generator=g).to(device, non_blocking=True)
    for start in range(0, len(order), settings.batch):
        index = order[start : start + settings.batch]
        images = _augmented(synthetic.images[index], settings, g)
        if outliers is not None:
            part = outliers[order_oe[start : start + settings.batch]]
            images = torch.cat([images, _augmented(part, settings, g)])
        loss = joint_loss(net(images), synthetic.labels[index], settings.lambda_oe)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def _augmented(images: torch.Tensor, settings: TrainSettings, g: torch.Generator) -> torch.Tensor:
    if settings.augmentation is None or not len(images):
        return images
    return settings.augmentation.draw(len(images), tuple(images.shape[2:]), g)(images)


def train_network(
    net: nn.Module,
    synthetic: SyntheticSet,
    settings: TrainSettings,
    seed: int,
    key: tuple,
    after_epoch: Callable[[int, torch.Tensor], None] | None = None,
) -> nn.Module:
    """Train `net` in place on `synthetic` for `settings.epochs` epochs.

    Args:
        seed, key: every epoch draws from `generator(seed, *key, "epoch", epoch)`.
        after_epoch: called with the number of epochs done and the mean loss.
    """
    optimizer = None
    for epoch in range(settings.epochs):
        if optimizer is None or epoch == settings.epochs // 2:
            lr = settings.lr if epoch < max(settings.epochs // 2, 1) else settings.lr * 0.1
            optimizer = torch.optim.SGD(
                net.parameters(), lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay
            )
        loss = train_epoch(net, optimizer, synthetic, settings, generator(seed, *key, "epoch", epoch))
        if after_epoch is not None:
            after_epoch(epoch + 1, loss)
    return net


@torch.inference_mode()
def predict(net: nn.Module, images: torch.Tensor, batch: int = TEST_BATCH) -> torch.Tensor:
    """Logits `[N, num_classes]` of all images `[N, C, H, W]`, in evaluation mode; a last partial batch counts, too."""
    net.eval()
    return torch.cat([net(part) for part in images.split(batch)])


def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of images classified as their label."""
    return (predict(net, images).argmax(1) == labels).float().mean().item()
