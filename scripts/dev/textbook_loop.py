"""Dataset distillation as its papers' scripts do it, for `scripts/dev/benchmark.py`: what people run today.

One class after another; whole batches are augmented by tensor operations (`textbook_augment.py`); index permutations by
numpy; `DataLoader`s over the synthetic set; the loss is read at every step; the training set is read image by image at
every start, and copied once for each corruption. `scripts/textbook.py` is the oracle of the tests; this one is
faster, and is the one to compare times with.

    python scripts/dev/textbook_loop.py --data_path DIR     # a process from its launch to the first update of POE

DIR holds `cifar10.npz`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from textbook_augment import AUGMENTATIONS, RNG, augment
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import Compose, Lambda, Normalize, ToTensor

from networks import get_network
from utils.data.synthetic import SyntheticSet
from utils.methods.distances import match_loss
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS, corrupt

BATCH = 256
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


# --- data ------------------------------------------------------------------------------------------------------------


class Images(Dataset):
    """uint8 images `[N, H, W, 3]` that become PIL images, then normalised tensors, one by one as they are asked for."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        corruption: str = "",
    ):
        steps = [ToTensor(), Normalize(mean, std)]
        if corruption:
            steps.insert(1, Lambda(lambda image: corrupt(image[None], corruption)[0]))
        self.images, self.labels, self.transform = images, labels, Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def read_all(dataset: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """All images `[N, C, H, W]` and labels, collected one by one."""
    pairs = [dataset[index] for index in range(len(dataset))]
    return torch.cat([image.unsqueeze(0) for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def read_poe(path: Path, corruptions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The training images of an npz file, their labels, and a copy of the images for each corruption."""
    with np.load(path) as file:
        arrays = file["train_images"], file["train_labels"].flatten()
    images, labels = read_all(Images(*arrays))
    return images, labels, [read_all(Images(*arrays, corruption=name))[0] for name in corruptions]


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


# --- testing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_accuracy(net: nn.Module, loader: DataLoader) -> float:
    """Fraction of right predictions, counted batch by batch."""
    net.eval()
    device = next(net.parameters()).device
    right, total = 0, 0
    for x, y in loader:
        right += (net(x.to(device)).argmax(1) == y.to(device)).sum().item()
        total += len(y)
    return right / total


@torch.no_grad()
def msp_scores(net: nn.Module, loader: DataLoader) -> np.ndarray:
    """Minus the largest softmax probability of every image, batch by batch."""
    net.eval()
    device = next(net.parameters()).device
    return np.concatenate([-F.softmax(net(x.to(device)), dim=1).cpu().numpy().max(axis=1) for x, _ in loader])


def main() -> None:
    """Read the data, make the corrupted copies, and do the first update of images and outliers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", type=Path, required=True, help="folder of cifar10.npz")
    parser.add_argument("--model", default="ConvNetW32", help="the network")
    parser.add_argument("--ipc", type=int, default=1, help="synthetic images per class")
    args = parser.parse_args()
    data = read_poe(args.data_path / "cifar10.npz", DEFAULT_CORRUPTIONS)
    loop = Distillation(*data, args.model, args.ipc, (1, 0), tuple(AUGMENTATIONS))
    print(f"updated: loss {loop.iterate():.4f}", flush=True)


if __name__ == "__main__":
    main()
