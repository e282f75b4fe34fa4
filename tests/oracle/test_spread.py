"""Outliers that keep apart: their closeness by numpy, the push by finite differences, and its flag."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import made, named

from networks import get_network
from utils.core.rng import generator
from utils.data.augment import DSA, DSA_ENTRIES
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.outliers.distilled import closeness, push_apart
from utils.outliers.sources import PseudoOutliers

STRATEGY = DSA(tuple(DSA_ENTRIES))
SETTINGS = GradientSettings(
    model="ConvNetD1", ipc=2, seed=4, batch_real=6, batch_oe=5, init="real", dsa_strategy=named(STRATEGY)
)


def test_closeness_by_numpy():
    features = torch.randn(6, 5, generator=generator(0), dtype=torch.float64)
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(6) for j in range(i)]
    assert closeness(features).item() == pytest.approx(np.log(np.mean(pairs)), abs=1e-12)
    assert closeness(features[:1].expand(3, 5)).item() == pytest.approx(0.0, abs=1e-12)
    assert closeness(features[:1]) == 0


def test_the_push_is_the_gradient_of_closeness():
    net = get_network("ConvNetNN", 3, 4, (16, 16), generator(0)).double()
    outliers = torch.randn(3, 2, 3, 16, 16, generator=generator(1), dtype=torch.float64).requires_grad_()
    outliers.grad = torch.ones_like(outliers)
    push_apart(net, outliers, 0.0)
    assert torch.equal(outliers.grad, torch.ones_like(outliers))
    push_apart(net, outliers, 3.0)
    added = outliers.grad - 1
    where = tuple(np.unravel_index(added.abs().argmax().item(), added.shape))
    moved = []
    for step in (1e-5, -1e-5):
        shifted = outliers.detach().clone()
        shifted[where] += step
        with torch.no_grad():
            moved.append(closeness(net.embed(shifted.flatten(0, 1)).flatten(1)))
    slope = 3 * (moved[0] - moved[1]) / 2e-5
    assert abs(slope - added[where]) < 1e-4 * abs(slope)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", [GradientMatching, DistributionMatching])
def test_a_spread_keeps_outliers_apart_and_leaves_images(tiny_real, kind):
    found = []
    for weight in (0.0, 1000.0):
        settings = replace(SETTINGS, spread_oe=weight)
        method = made(kind, tiny_real, PseudoOutliers(tiny_real), settings)
        method.start(0)
        for it in range(5):
            method.iterate(it)
        found.append(method.synthetic())
    net = get_network("ConvNetD1", 3, 3, (16, 16), generator(99))
    with torch.no_grad():
        without, apart = (closeness(net.embed(s.images_oe).flatten(1)) for s in found)
    assert apart < without - 0.1
    assert torch.equal(found[0].images, found[1].images)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("main.py", ["--method", "DM", "--spread_oe", 1], "--spread_oe: main.py distils no outliers"),
        ("main_poe.py", ["--method", "MTT", "--spread_oe", 1], "--spread_oe: --method MTT does not use it"),
        ("main_poe.py", ["--method", "DC", "--spread_oe", -1], "--spread_oe"),
    ],
)
def test_flags_that_cannot_be_followed(refused, tmp_path, name, flags, message):
    assert message in refused(name, "--dataset", "Digits", "--model", "ConvNetD1", *flags)
    assert not list(tmp_path.iterdir())
