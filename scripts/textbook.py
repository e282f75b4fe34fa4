"""TrustDD in a page: DSA with pseudo-outliers (POE) on Digits, in the plainest loop. The first file to read.

    python scripts/textbook.py    # some minutes on two cores; expect 91 % and an AUROC of 81, with outliers 93 and 93

It distils ten images and ten outliers, trains two networks on them, one without and one with the outliers, and prints
their accuracy and how well they tell known images from unknown ones. The fast code of `utils` computes the same from
the same draws: the tests compare it with the functions of this file.

DC: Zhao et al., ICLR 2021; DSA: Zhao & Bilen, ICML 2021; Outlier Exposure: Hendrycks et al., ICLR 2019.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from networks import get_network
from utils.core.rng import generator
from utils.data.augment import DSA, Transform, identity
from utils.data.datasets import RealData, load_dataset
from utils.data.synthetic import SyntheticSet
from utils.methods.distances import match_loss
from utils.ood.generated import patches
from utils.ood.measures import ood_measures
from utils.ood.scores import msp
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS, corrupt
from utils.training.draws import Batch, draw_epoch

IPC, ITERATIONS = 1, 100
OUTER_LOOP, INNER_LOOP = 1, 1  # matching steps of an iteration, and epochs between two of them; at ipc 10: 10 and 50
BATCH, LAMBDA_OE, EPOCHS = 64, 0.5, 300
AUGMENTATION = DSA(("color", "crop", "cutout", "scale", "rotate"))
SEED = 1


def main() -> None:
    """Distil, train and test."""
    real = load_dataset("Digits", "data")
    synthetic = distil(real)
    for name, lambda_oe in (("without outliers", 0.0), ("with outliers", LAMBDA_OE)):
        accuracy, auroc = test(train_network(real, synthetic, lambda_oe), real)
        print(f"{name}: accuracy {100 * accuracy:.1f} %, AUROC (msp, on patches of photographs) {100 * auroc:.1f} %")


def distil(real: RealData) -> SyntheticSet:
    """Stage 1: move images and outliers until networks learn from them what they learn from real ones."""
    classes, size = real.num_classes, (real.channel, *real.im_size)
    labels = torch.arange(classes).repeat_interleave(IPC)
    images = torch.cat([real_images(real, c, IPC, "start") for c in range(classes)]).view(classes, IPC, *size)
    outliers = torch.cat([pseudo_outliers(real, c, IPC, "start") for c in range(classes)]).view(classes, IPC, *size)
    optimizers = [torch.optim.SGD([x.requires_grad_()], lr=0.1, momentum=0.5) for x in (images, outliers)]
    for iteration in range(ITERATIONS):
        net = get_network("ConvNetD1", real.channel, classes, real.im_size, generator(SEED, "network", iteration))
        for outer in range(OUTER_LOOP):
            losses = []
            for x, draw, optimizer in zip((images, outliers), (real_images, pseudo_outliers), optimizers, strict=True):
                key = (draw.__name__, iteration, outer)
                transforms = [
                    AUGMENTATION.draw(1, real.im_size, generator(SEED, "dsa", *key, c)) for c in range(classes)
                ]
                loss, x.grad = match_slots(
                    net, x, lambda c, d=draw, k=key: d(real, c, BATCH, *k), transforms, x is outliers, "ours"
                )
                optimizer.step()
                losses.append(sum(loss) / classes)
            if outer < OUTER_LOOP - 1:  # go on with a network that knows the images of now
                now = SyntheticSet(images.detach().flatten(0, 1), labels, outliers.detach().flatten(0, 1))
                train(net, now, INNER_LOOP, LAMBDA_OE, torch.optim.SGD(net.parameters(), lr=0.01), *key)
        if (iteration + 1) % 10 == 0:
            print(
                f"iteration {iteration + 1}: matching loss {losses[0]:.3f}, of the outliers {losses[1]:.3f}", flush=True
            )
    return SyntheticSet(images.detach().flatten(0, 1), labels, outliers.detach().flatten(0, 1))


def real_images(real: RealData, label: int, n: int, *key: int | str) -> torch.Tensor:
    """A batch of a class."""
    return real.train_batch(real.choose(label, n, generator(SEED, "real", *key, label)))


def pseudo_outliers(real: RealData, slot: int, n: int, *key: int | str) -> torch.Tensor:
    """POE: training images of any class, with the corruption of the slot: jigsaw, invert, pixelate or noise."""
    g = generator(SEED, "outliers", *key, slot)
    index = torch.randperm(len(real.images_train), generator=g)[:n]
    return real.normalize(corrupt(real.unit_train(index), DEFAULT_CORRUPTIONS[slot % len(DEFAULT_CORRUPTIONS)], g))


def match_slots(
    net: nn.Module,
    images_syn: torch.Tensor,
    real_batch: Callable[[int], torch.Tensor],
    transforms: Sequence[Callable],
    outliers: bool,
    metric: str,
) -> tuple[list[float], torch.Tensor]:
    """Losses of all slots and the gradient of their sum, one slot after another, with autograd throughout.

    A slot is a class's share of the set: its images `[ipc, C, H, W]`, or as many outliers. They should give the network
    the gradient that a batch of real images, or outliers, gives it: that is gradient matching (DC).

    Args:
        images_syn: `[slots, ipc, C, H, W]`; real_batch: the real images, or outliers, of a slot.
        transforms: one for each slot, for real and synthetic images alike: the Siamese rule (DSA, eq. 4).
    """
    parameters = list(net.parameters())

    def loss_of(images: torch.Tensor, slot: int) -> torch.Tensor:
        """Cross-entropy to the slot's class; of outliers to the uniform distribution (Outlier Exposure, section 4)."""
        logits = net(images)
        if outliers:
            uniform = torch.full_like(logits, 1 / logits.shape[1])
            return -(uniform * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
        return nn.CrossEntropyLoss()(logits, torch.tensor([slot] * len(images), device=images.device))

    images_syn = images_syn.detach().clone().requires_grad_()
    total: torch.Tensor | float = 0.0
    losses = []
    for slot, transform in enumerate(transforms):
        real = augment_images(real_batch(slot), transform)
        target = [g.detach().clone() for g in torch.autograd.grad(loss_of(real, slot), parameters)]
        synthetic = augment_images(images_syn[slot], transform)
        found = torch.autograd.grad(loss_of(synthetic, slot), parameters, create_graph=True)
        loss = match_loss(found, target, metric)  # a cosine distance for each unit of the network (DC, eq. 9)
        losses.append(loss.item())
        total = total + loss
    return losses, torch.autograd.grad(total, images_syn)[0]


def train_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    synthetic: SyntheticSet,
    batches: Sequence[Batch],
    lambda_oe: float,
) -> float:
    """One epoch of training on images and outliers, augmented image by image, the loss read at every step.

    The loss is the cross-entropy of the images, plus `lambda_oe` times that of the outliers to the uniform
    distribution (Outlier Exposure, section 4). TrustDD trains networks so while it distils, and after.

    Args:
        batches: which images, and which augmentation, each step takes (`draw_epoch`).
    """
    net.train()
    labelled = TensorDataset(synthetic.images, synthetic.labels)
    loader = DataLoader(labelled, batch_sampler=[b.index.tolist() for b in batches])
    others = None
    if synthetic.images_oe is not None:
        sampler = [b.index_oe.tolist() for b in batches]
        others = iter(DataLoader(TensorDataset(synthetic.images_oe), batch_sampler=sampler))
    total = 0.0
    for (x, y), drawn in zip(loader, batches, strict=True):
        x = augment_images(x, drawn.transform or identity)
        if others is not None:
            (outliers,) = next(others)
            x = torch.cat([x, augment_images(outliers, drawn.transform_oe or identity)])
        logits = net(x)
        loss = nn.CrossEntropyLoss()(logits[: len(y)], y)
        if others is not None:
            rest = logits[len(y) :]
            loss = loss + lambda_oe * (rest.logsumexp(1) - rest.mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(batches)


def augment_images(images: torch.Tensor, transform: Callable) -> torch.Tensor:
    """Apply a DSA draw image by image."""
    if not isinstance(transform, Transform):
        return transform(images)
    shared = len(transform.params) == 1
    rows = [transform.params if shared else transform.params[i : i + 1] for i in range(len(images))]
    return torch.cat([Transform(transform.entry, row)(images[i : i + 1]) for i, row in enumerate(rows)])


def train(
    net: nn.Module,
    synthetic: SyntheticSet,
    epochs: int,
    lambda_oe: float,
    optimizer: torch.optim.Optimizer,
    *key: int | str,
) -> None:
    """Some epochs on a set, each batch with an augmentation of its own for each image."""
    g = generator(SEED, "training", *key)
    for _ in range(epochs):
        train_epoch(net, optimizer, synthetic, draw_epoch(synthetic, 256, AUGMENTATION, g), lambda_oe)


def train_network(real: RealData, synthetic: SyntheticSet, lambda_oe: float) -> nn.Module:
    """Stage 2: a network from the synthetic set alone; its learning rate falls to a tenth half-way."""
    net = get_network("ConvNetD1", real.channel, real.num_classes, real.im_size, generator(SEED, "new network"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    train(net, synthetic, EPOCHS // 2, lambda_oe, optimizer, "first half")
    optimizer.param_groups[0]["lr"] /= 10
    train(net, synthetic, EPOCHS // 2, lambda_oe, optimizer, "second half")
    return net.eval()


@torch.no_grad()
def test(net: nn.Module, real: RealData) -> tuple[float, float]:
    """Stage 3: the accuracy on the test images, and the AUROC of telling them from patches of photographs.

    The score is minus the largest softmax probability: a network that is unsure takes an image for an outlier.
    """
    unknown = patches(real, len(real.images_test), generator(SEED, "patches"))
    accuracy = (net(real.test_images).argmax(1) == real.labels_test).float().mean().item()
    return accuracy, ood_measures(msp(net(real.test_images)).numpy(), msp(net(unknown)).numpy())["auroc"]


if __name__ == "__main__":
    main()
