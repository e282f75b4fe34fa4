"""Labelled real images to train on beside distilled ones: random, herding and k-center coresets, and the whole set."""

import torch
from torch import nn

from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.training_sets.coresets import herding, k_center
from utils.training_sets.features import unit_features

CORESETS = {"herding": herding, "kcenter": k_center}


def random_images(real: RealData, ipc: int, seed: int, exp: int) -> SyntheticSet:
    """`ipc` random training images of each class: those that experiment `exp` with `--init real` starts from."""
    slots = range(real.num_classes)
    return _of_indices(
        real, [real.choose(c, ipc, generator(seed, "match", exp, "initial", "images", c)) for c in slots], ipc
    )


def coreset(kind: str, real: RealData, ipc: int, net: nn.Module) -> SyntheticSet:
    """`ipc` training images of each class, chosen in the features of `net`.

    Args:
        kind: one of `CORESETS`.
    Raises:
        UserError: when a class has fewer than `ipc` images.
    """
    chosen = []
    for indices in real.class_indices:
        features = unit_features(net, real.train_batch, indices)
        chosen.append(indices[CORESETS[kind](features, min(ipc, len(indices)))])
    return _of_indices(real, chosen, ipc)


def check_ipc(real: RealData, ipc: int) -> None:
    """Raise `UserError` when a class has fewer than `ipc` training images."""
    smallest = min(map(len, real.class_indices))
    if smallest < ipc:
        raise UserError(f"--ipc {ipc}: the smallest class of {real.name} has {smallest} training images; lower --ipc")


def _of_indices(real: RealData, chosen: list[torch.Tensor], ipc: int) -> SyntheticSet:
    check_ipc(real, ipc)
    labels = torch.arange(real.num_classes).repeat_interleave(ipc)
    return SyntheticSet(real.train_batch(torch.cat(chosen)).cpu(), labels)
