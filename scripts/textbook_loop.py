"""Dataset distillation as its papers' scripts do it, for `scripts/benchmark.py`: what people run today.

One class after another; whole batches are augmented by tensor operations, with the parameters of scale and rotation in
Python lists; index permutations by numpy; `DataLoader`s over the synthetic set; the loss is read at every step; the
training set is read image by image at every start, and copied once for each corruption. `tests/textbook.py` is the
oracle of the tests; this one is faster, and is the one to compare times with.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from networks import get_network
from utils.data.synthetic import SyntheticSet
from utils.methods.distances import match_loss

BATCH = 256
RNG = np.random.default_rng(0)


# --- augmentation ----------------------------------------------------------------------------------------------------


def _random(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """A number in [0, 1) for each image, or one for all."""
    return torch.rand(1 if shared else len(x), 1, 1, 1, device=x.device)


def color(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Change brightness, saturation and contrast."""
    x = x + (_random(x, shared) - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (2 * _random(x, shared)) + mean
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (_random(x, shared) + 0.5) + mean


def crop(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Shift by at most an eighth of the side; what enters is zero."""
    n, _, height, width = x.shape
    most = (int(height / 8 + 0.5), int(width / 8 + 0.5))
    moves = [torch.randint(-m, m + 1, (1 if shared else n, 1, 1), device=x.device) for m in most]
    grid = torch.meshgrid(*(torch.arange(size, device=x.device) for size in (n, height, width)), indexing="ij")
    rows = (grid[1] + moves[0] + 1).clamp(0, height + 1)
    columns = (grid[2] + moves[1] + 1).clamp(0, width + 1)
    padded = F.pad(x, (1, 1, 1, 1))
    return padded.permute(0, 2, 3, 1).contiguous()[grid[0], rows, columns].permute(0, 3, 1, 2)


def cutout(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Set a square of half the side to zero."""
    n, _, height, width = x.shape
    size = (height // 2, width // 2)
    centres = [torch.randint(0, side + 1, (1 if shared else n, 1, 1), device=x.device) for side in (height, width)]
    grid = torch.meshgrid(*(torch.arange(s, device=x.device) for s in (n, *size)), indexing="ij")
    rows = (grid[1] + centres[0] - size[0] // 2).clamp(0, height - 1)
    columns = (grid[2] + centres[1] - size[1] // 2).clamp(0, width - 1)
    mask = torch.ones(n, height, width, device=x.device)
    mask[grid[0], rows, columns] = 0
    return x * mask.unsqueeze(1)


def flip(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Mirror left and right with probability 1/2."""
    return torch.where(_random(x, shared) < 0.5, x.flip(3), x)


def _warp(x: torch.Tensor, theta: list) -> torch.Tensor:
    grid = F.affine_grid(torch.tensor(theta, dtype=torch.float, device=x.device), x.shape, align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


def scale(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Stretch each side by a factor from 1/1.2 to 1.2."""
    factors = [_random(x, shared).flatten() * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2)]
    vertical, horizontal = (f.expand(len(x)) for f in factors)
    return _warp(x, [[[vertical[i], 0, 0], [0, horizontal[i], 0]] for i in range(len(x))])


def rotate(x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Turn by at most 15 degrees."""
    angles = ((_random(x, shared).flatten() - 0.5) * 2 * 15 / 180 * math.pi).expand(len(x))
    sines, cosines = torch.sin(angles), torch.cos(angles)
    return _warp(x, [[[cosines[i], sines[i], 0], [-sines[i], cosines[i], 0]] for i in range(len(x))])


AUGMENTATIONS = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def augment(x: torch.Tensor, strategy: Sequence[str], seed: int | None = None) -> torch.Tensor:
    """Apply one entry of the strategy; with a seed its parameters are the same for all images and every call."""
    if seed is not None:
        torch.manual_seed(seed)
    choice = RNG if seed is None else np.random.default_rng(seed)
    entry = strategy[choice.integers(len(strategy))]
    return AUGMENTATIONS[entry](x, seed is not None).contiguous()


# --- stage 1 ---------------------------------------------------------------------------------------------------------


class Distillation:
    """Gradient matching of images and pseudo-outliers.

    Args:
        images, labels: the training set, normalised float32 `[N, C, H, W]` on the device, and int64 `[N]`.
        copies: corrupted copies of `images`; slot c uses number c modulo their count.
        loops: outer and inner.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        copies: Sequence[torch.Tensor],
        model: str,
        ipc: int,
        loops: tuple[int, int],
        strategy: Sequence[str],
        batch: int = BATCH,
        lambda_oe: float = 0.5,
    ):
        self.images, self.copies, self.model, self.ipc, self.loops = images, copies, model, ipc, loops
        self.strategy, self.batch, self.lambda_oe = strategy, batch, lambda_oe
        self.classes = int(labels.max()) + 1
        self.of_class: list[list[int]] = [[] for _ in range(self.classes)]
        for index, label in enumerate(labels.tolist()):
            self.of_class[label].append(index)
        shape = (self.classes * ipc, *images.shape[1:])
        self.image_syn, self.image_oe = (torch.randn(shape, device=images.device, requires_grad=True) for _ in range(2))
        self.label_syn = torch.arange(self.classes, device=images.device).repeat_interleave(ipc)
        self.optimizers = [torch.optim.SGD([x], lr=0.1, momentum=0.5) for x in (self.image_syn, self.image_oe)]

    def real_batch(self, slot: int) -> torch.Tensor:
        """Random training images of a class."""
        return self.images[RNG.permutation(self.of_class[slot])[: self.batch]]

    def outlier_batch(self, slot: int) -> torch.Tensor:
        """Random images of the slot's corrupted copy."""
        copy = self.copies[slot % len(self.copies)]
        return copy[RNG.permutation(len(copy))[: self.batch]]

    def iterate(self) -> float:
        """One iteration; returns the mean loss of the images."""
        size = tuple(self.images.shape[2:])
        net = get_network(self.model, self.images.shape[1], self.classes, size).to(self.images.device)
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        total = 0.0
        for outer in range(self.loops[0]):
            total += self.match(net, self.image_syn, self.real_batch, self._class_loss, self.optimizers[0])
            self.match(net, self.image_oe, self.outlier_batch, self._uniform_loss, self.optimizers[1])
            if outer == self.loops[0] - 1:
                break
            synthetic = SyntheticSet(self.image_syn.detach().clone(), self.label_syn, self.image_oe.detach().clone())
            for _ in range(self.loops[1]):
                train_epoch(net, optimizer, synthetic, self.strategy, self.lambda_oe)
        return total / self.loops[0] / self.classes

    def match(
        self, net: nn.Module, synthetic: torch.Tensor, batch: Callable, loss_of: Callable, optimizer: torch.optim.SGD
    ) -> float:
        """One matching step of all classes; returns the sum of their losses."""
        parameters = list(net.parameters())
        total = torch.zeros((), device=synthetic.device)
        for slot in range(self.classes):
            real = batch(slot)
            own = synthetic[slot * self.ipc : (slot + 1) * self.ipc]
            if self.strategy:
                seed = int(RNG.integers(2**31))
                real, own = augment(real, self.strategy, seed), augment(own, self.strategy, seed)
            target = [g.detach().clone() for g in torch.autograd.grad(loss_of(net(real), slot), parameters)]
            found = torch.autograd.grad(loss_of(net(own), slot), parameters, create_graph=True)
            total = total + match_loss(found, target, "ours")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.item()

    @staticmethod
    def _class_loss(logits: torch.Tensor, slot: int) -> torch.Tensor:
        return nn.CrossEntropyLoss()(logits, torch.full((len(logits),), slot, device=logits.device))

    @staticmethod
    def _uniform_loss(logits: torch.Tensor, slot: int) -> torch.Tensor:
        return (logits.logsumexp(1) - logits.mean(1)).mean()


# --- network training ------------------------------------------------------------------------------------------------


def train_epoch(
    net: nn.Module, optimizer: torch.optim.Optimizer, synthetic: SyntheticSet, strategy: Sequence[str], lambda_oe: float
) -> float:
    """One epoch through `DataLoader`s; images and outliers are augmented, then go through the network together."""
    net.train()
    loader = DataLoader(TensorDataset(synthetic.images, synthetic.labels), BATCH, shuffle=True)
    others = DataLoader(TensorDataset(synthetic.images_oe), BATCH, shuffle=True)
    total = 0.0
    for (x, y), (outliers,) in zip(loader, others, strict=True):
        x, outliers = augment(x, strategy), augment(outliers, strategy)
        logits = net(torch.cat([x, outliers]))
        rest = logits[len(y) :]
        loss = nn.CrossEntropyLoss()(logits[: len(y)], y) + lambda_oe * (rest.logsumexp(1) - rest.mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y)
    return total / len(synthetic.labels)
