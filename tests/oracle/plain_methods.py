"""The engine's methods with the same draws by the plain loops of `scripts/textbook.py`, for tests and benchmarks."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from scripts.textbook import match_slots, train_epoch
from utils.data.augment import DSA, identity
from utils.data.synthetic import decode
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientMatching
from utils.methods.snapshot_matching import SnapshotMatching
from utils.methods.trajectory_matching import TrajectoryMatching
from utils.outliers.distilled import clamp_to_pixels
from utils.training.draws import Batch, draw_epoch


class PlainMatching(GradientMatching):
    """Gradient matching with the same draws, by the textbook's loops."""

    def _update(self, which: int, it: int, outer: int) -> torch.Tensor:
        images, real = self._tensors()[which], list(self.batches(which, it, outer))
        transforms = list(self.transforms(which, it, outer).values())
        losses, images.grad = match_slots(
            self.net, images, real.__getitem__, transforms, which == 1, self.settings.dis_metric
        )
        return torch.tensor(losses, device=images.device)

    def _train_network(self, g: torch.Generator) -> None:
        optimizer, synthetic = torch.optim.SGD(self.net.parameters(), lr=self.trainer.settings.lr), self.synthetic()
        for _ in range(self.inner_loop):
            batches = draw_epoch(synthetic, self.settings.batch, self.augmentation, g)
            train_epoch(self.net, optimizer, synthetic, batches, self.settings.lambda_oe)


class PlainDistributionMatching(DistributionMatching):
    """Distribution matching with the same draws, one class after another; batches are augmented as published."""

    def _update(self, which: int, it: int) -> torch.Tensor:
        images = self._tensors()[which]
        leaf = images.detach().clone().requires_grad_()
        total, losses = torch.zeros(()), []
        for (slot, transform), batch in zip(self.transforms(which, it).items(), self.batches(which, it), strict=True):
            with torch.no_grad():
                target = self.net.embed(transform(batch)).mean(0)
            loss = ((target - self.net.embed(transform(leaf[slot])).mean(0)) ** 2).sum()
            losses.append(loss.item())
            total = total + loss
        images.grad = torch.autograd.grad(total, leaf)[0]
        return torch.tensor(losses)


class PlainTrajectoryMatching(TrajectoryMatching):
    """Trajectory matching with the same draws and the graph of all steps in memory, as published."""

    def _match(
        self,
        start: Sequence[torch.Tensor],
        target: Sequence[torch.Tensor],
        batches: Sequence[Batch],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        leaves = [t.detach().clone().flatten(0, 1).requires_grad_() for t in self._tensors()]
        lr = self.lr_student.detach().clone().requires_grad_()
        theta = [p.clone().requires_grad_() for p in start]
        for batch in batches:
            parts = [(batch.transform or identity)(leaves[0][batch.index])]
            if batch.index_oe is not None:
                parts.append((batch.transform_oe or identity)(leaves[1][batch.index_oe]))
            logits = functional_call(self.net, dict(zip(self.names, theta, strict=True)), (torch.cat(parts),))
            labels = self.labels[batch.index]
            loss = F.cross_entropy(logits[: len(labels)], labels)
            if batch.index_oe is not None:
                rest = logits[len(labels) :]
                loss = loss + self.settings.lambda_oe * (rest.logsumexp(1) - rest.mean(1)).mean()
            gradients = torch.autograd.grad(loss, theta, create_graph=True)
            theta = [p - lr * g for p, g in zip(theta, gradients, strict=True)]
        distance = sum(((a - b) ** 2).sum() for a, b in zip(theta, target, strict=True))
        loss = distance / sum(((a - b) ** 2).sum() for a, b in zip(start, target, strict=True))
        *on_images, on_lr = torch.autograd.grad(loss, [*leaves, lr])
        shaped = [g.view(t.shape) for g, t in zip(on_images, self._tensors(), strict=True)]
        return loss.detach()[None], [*shaped, on_lr]


class PlainSnapshotMatching(SnapshotMatching):
    """Matching on snapshots with the same real batches, as published loops do it: one class after another, each with an
    optimiser step of its own, and gradients on the weights of both networks, which nobody uses."""

    def iterate(self, it: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self.load_network(it)
        for net in (self.net, self.classifier):
            net.requires_grad_(True)
        losses, g = {}, self.generator("classify", it)
        kinds = zip(("loss", "loss_oe"), self._tensors(), self.optimizers, strict=False)
        for which, (name, images, optimizer) in enumerate(kinds):
            drawn = zip(self.transforms(which, it).items(), self.batches(which, it), strict=True)
            losses[name] = torch.tensor(
                [self._step(images, optimizer, slot, batch, transform, g) for (slot, transform), batch in drawn]
            )
            clamp_to_pixels(images.detach(), self.real)
        return losses

    def _step(
        self,
        images: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        slot: int,
        batch: torch.Tensor,
        transform: Callable,
        g: torch.Generator,
    ) -> float:
        s = self.settings
        parts = decode(images[slot], s.factor)
        target = self.net.embed(transform(batch)).mean(0).detach()
        loss = ((target - self.net.embed(transform(parts)).mean(0)) ** 2).sum()
        augment = identity if self.augmentation is None else self.augmentation.draw(len(parts), self.real.im_size, g)
        logits = self.classifier(augment(parts))
        if images is self.image_syn:
            classified = F.cross_entropy(logits, torch.full((len(parts),), slot))
        else:
            classified = s.lambda_oe * (logits.logsumexp(1) - logits.mean(1)).mean()
        optimizer.zero_grad()
        (loss + s.alpha * classified).backward()
        optimizer.step()
        return loss.item()


def train_expert_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    augmentation: DSA | None,
) -> float:
    """One epoch on the real set through a `DataLoader`, batches of 256 augmented as published; returns the loss."""
    net.train()
    total = 0.0
    loader = DataLoader(TensorDataset(images, labels), 256, shuffle=True)
    g = torch.Generator().manual_seed(0)
    for x, y in loader:
        if augmentation is not None:
            x = augmentation.draw(len(x), tuple(x.shape[2:]), g)(x)
        loss = nn.CrossEntropyLoss()(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)
