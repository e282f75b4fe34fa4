"""Labelled real images to train on beside distilled ones: random, herding and k-center coresets."""

import torch
from torch import nn

from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.training.features import unit_features


def herding(points: torch.Tensor, n: int) -> torch.Tensor:
    """The `n` points whose running mean follows the mean of all most closely, chosen one after another.

    Welling, *Herding Dynamical Weights to Learn*, ICML 2009, as iCaRL uses it (Rebuffi et al., CVPR 2017, algorithm 4).
    Of `[N, D]` with `n` at most N, they are indices in the order of choice, int64 `[n]`, all different, on the CPU.
    """
    mean = points.mean(0)
    total = torch.zeros_like(mean)
    free = torch.ones(len(points), dtype=torch.bool, device=points.device)
    chosen = []
    for count in range(1, n + 1):
        distance = ((total + points) / count - mean).square().sum(1)
        best = int(distance.masked_fill(~free, torch.inf).argmin())
        chosen.append(best)
        free[best] = False
        total = total + points[best]
    return torch.tensor(chosen)


def k_center(points: torch.Tensor, n: int, before: torch.Tensor | None = None) -> torch.Tensor:
    """`n` points such that no other is far from all of them: each is the farthest from those chosen before.

    The greedy 2-approximation of Gonzalez (1985), as Sener & Savarese use it (ICLR 2018, algorithm 1). The first is the
    point nearest to the mean, unless there are points `before` `[M, D]` that are chosen already.
    Of `[N, D]` with `n` at most N, they are indices in the order of choice, int64 `[n]`, all different, on the CPU.
    """
    if before is None:
        nearest = torch.full((len(points),), torch.inf, device=points.device)
        chosen = [int((points - points.mean(0)).square().sum(1).argmin())]
    else:
        nearest = torch.cdist(points, before).square().amin(1)
        chosen = [int(nearest.argmax())]
    while len(chosen) < n:
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
        nearest[chosen[-1]] = -1.0  # for good: of equal points each is chosen once
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


CORESETS = {"herding": herding, "kcenter": k_center}


def check_ipc(real: RealData, ipc: int) -> None:
    """Raise `UserError` when a class has fewer than `ipc` training images."""
    smallest = min(map(len, real.class_indices))
    if smallest < ipc:
        raise UserError(f"--ipc {ipc}: the smallest class of {real.name} has {smallest} training images; lower --ipc")


def random_images(real: RealData, ipc: int, seed: int, exp: int) -> SyntheticSet:
    """`ipc` random training images of each class: those that experiment `exp` with `--init real` starts from.

    For images in parts, `ipc` counts the parts.
    """
    keys = (("match", exp, "initial", "images", label) for label in range(real.num_classes))
    return _of_indices(real, [real.choose(key[-1], ipc, generator(seed, *key)) for key in keys])


def coreset(kind: str, real: RealData, ipc: int, net: nn.Module) -> SyntheticSet:
    """`ipc` training images of each class, chosen by one of `CORESETS` in the features of `net`."""
    choose = CORESETS[kind]
    chosen = [index[choose(unit_features(net, real.train_batch, index), ipc)] for index in real.class_indices]
    return _of_indices(real, chosen)


def _of_indices(real: RealData, chosen: list[torch.Tensor]) -> SyntheticSet:
    labels = torch.arange(real.num_classes).repeat_interleave(len(chosen[0]))
    return SyntheticSet(real.train_batch(torch.cat(chosen)).cpu(), labels)
