"""Outliers that were not distilled: chosen by k-center, or new in every epoch of training."""

from dataclasses import replace

import torch
from torch import nn

from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.outliers.sources import FreshOutliers, OutlierSource, PseudoOutliers, draw_by_slot
from utils.training.coresets import k_center
from utils.training.features import unit_features

CANDIDATES = 10_000  # out of which k-center chooses


def with_k_center(
    synthetic: SyntheticSet, source: OutlierSource, real: RealData, ipc: int, seed: int, net: nn.Module
) -> SyntheticSet:
    """The set with `ipc·num_classes` outliers, chosen by k-center among 10,000 in the features of `net`."""
    candidates = torch.cat(_candidates(source, real, ipc, (seed,)))
    chosen = k_center(_features(net, candidates), ipc * real.num_classes)
    return replace(synthetic, images_oe=candidates[chosen.to(candidates.device)].cpu())


def k_center_by_slot(
    source: OutlierSource, real: RealData, ipc: int, key: tuple[int, ...], net: nn.Module
) -> torch.Tensor:
    """`ipc` outliers of each class slot, chosen by k-center: each slot's are far from those of the slots before, too.

    `key`: a seed, and what further numbers name the draw of the 10,000 candidates.
    They are normalised, `[num_classes, ipc, C, H, W]`, on the device of `real`.
    """
    outliers, before = [], None
    for candidates in _candidates(source, real, ipc, key):
        features = _features(net, candidates)
        chosen = k_center(features, ipc, before).to(candidates.device)
        outliers.append(candidates[chosen])
        before = features[chosen] if before is None else torch.cat([before, features[chosen]])
    return torch.stack(outliers).to(real.device)


def _candidates(source: OutlierSource, real: RealData, ipc: int, key: tuple[int, ...]) -> list[torch.Tensor]:
    each = max(ipc, CANDIDATES // real.num_classes)
    return draw_by_slot(source, real.num_classes, each, key[0], "candidates", *key[1:])


def _features(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return unit_features(net, lambda i: images[i.to(images.device)], torch.arange(len(images)))


def with_fresh(synthetic: SyntheticSet, source: OutlierSource, num_classes: int) -> SyntheticSet:
    """The set with other outliers of `source` in every epoch, as many as it has images."""
    fresh = FreshOutliers(source, num_classes, -(-len(synthetic.images) // num_classes))
    return replace(synthetic, images_oe=None, fresh_oe=fresh)


def with_corrupted_again(
    synthetic: SyntheticSet, real: RealData, corruptions: tuple[str, ...], mixed: bool = False
) -> SyntheticSet:
    """The set, trained in each epoch on a fresh corruption of its outliers; the originals stay in `images_oe`."""
    source = corrupted(synthetic.images_oe, real, corruptions, mixed)
    per_slot = -(-len(synthetic.images_oe) // real.num_classes)
    return replace(synthetic, fresh_oe=FreshOutliers(source, real.num_classes, per_slot))


def corrupted(
    images: torch.Tensor, real: RealData, corruptions: tuple[str, ...], mixed: bool = False
) -> PseudoOutliers:
    """A source of pseudo-outliers that corrupts given images in place of real training images.

    The images are normalised, `[N, C, H, W]`; what lies outside the range of pixels is clipped first.
    """
    unit = real.denormalize(images.to(real.device))
    unlabelled = torch.zeros(len(unit), dtype=torch.int64, device=real.device)
    return PseudoOutliers(replace(real, images_train=unit, labels_train=unlabelled), corruptions, mixed)
