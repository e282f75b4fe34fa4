"""One matching loss for images and outliers, and outliers that keep apart: slow loops and finite differences."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COMPILED, needs_compiler, whole_and_resumed

import networks
from networks import get_network, initialize
from networks.convnet import ConvNet
from utils.compute.device import Compute
from utils.core.rng import generator
from utils.data.augment import DSA, DSA_ENTRIES
from utils.methods.distances import METRICS, match_loss
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientMatching
from utils.methods.match_draws import MatchSettings
from utils.methods.matcher import JointMatcher, Strategy
from utils.outliers.sources import PseudoOutliers
from utils.outliers.spread import closeness, push_apart

STRATEGY = DSA(tuple(DSA_ENTRIES))
SETTINGS = MatchSettings("ConvNetD1", 2, seed=4, batch_real=6, batch_oe=5, init="real", dsa=STRATEGY, joint=True)
LAMBDA = 0.3


def problem(name: str, dtype: torch.dtype):
    """A network, synthetic images and outliers, real ones (of unequal number), and the transforms of both."""
    net = get_network(name, 3, 4, (16, 16), generator(0)).to(dtype)
    g = generator(0, "images")
    synthetic = [torch.randn(4, 2, 3, 16, 16, generator=g, dtype=dtype) for _ in range(2)]
    real = [torch.randn(4, n, 3, 16, 16, generator=g, dtype=dtype) for n in (5, 7)]
    transforms = tuple(
        {slot: STRATEGY.draw(1, (16, 16), generator(1, kind, slot)) for slot in range(4)} for kind in range(2)
    )
    return net, synthetic, real, transforms


def slow_losses(net, synthetic, real, transforms, metric) -> torch.Tensor:
    """The loss of each slot by autograd, one term of the training loss after another."""

    def gradient(images, outliers, slot):
        logits, rest = net(transforms[0][slot](images)), net(transforms[1][slot](outliers))
        labels = torch.full((len(images),), slot)
        loss = F.nll_loss(F.log_softmax(logits, 1), labels) - LAMBDA * F.log_softmax(rest, 1).mean()
        return torch.autograd.grad(loss, list(net.parameters()), create_graph=True)

    return torch.stack(
        [
            match_loss(
                gradient(synthetic[0][slot], synthetic[1][slot], slot),
                [g.detach() for g in gradient(real[0][slot], real[1][slot], slot)],
                metric,
            )
            for slot in range(4)
        ]
    )


def compare(name, dtype, metric, tolerance, compute=None) -> JointMatcher:
    net, synthetic, real, transforms = problem(name, dtype)
    matcher = JointMatcher(net, LAMBDA, metric, compute or Compute())
    losses, *gradients = matcher(*synthetic, (real[0].__getitem__, real[1].__getitem__), transforms)
    leaves = [s.clone().requires_grad_() for s in synthetic]
    expected = slow_losses(net, leaves, real, transforms, metric)
    torch.testing.assert_close(losses, expected.detach(), rtol=tolerance, atol=tolerance)
    for found, slow in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert (found - slow).norm() < tolerance * slow.norm()
    return matcher


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetNN", "ConvNetLN"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batched", [True, False])
def test_joint_matching_by_a_slow_loop(name, metric, batched, monkeypatch):
    monkeypatch.setattr("utils.methods.matcher.batching_is_faster", lambda images: batched)
    matcher = compare(name, torch.float64, metric, 1e-9)
    assert (matcher.matcher.strategies[0] is Strategy.BATCHED) == (batched and name != "ConvNetLN")


@needs_compiler
def test_compiled_joint_matching(monkeypatch):
    narrow = lambda *args: ConvNet(3, 4, (16, 16), width=8, depth=1, norm="none")  # noqa: E731
    monkeypatch.setitem(networks._NETWORKS, "narrow", narrow)
    matcher = compare("narrow", torch.float32, "ours", 1e-4, COMPILED)
    assert matcher.matcher.strategies[0] is Strategy.COMPILED


def test_the_gradient_of_an_outlier_by_finite_differences():
    net, synthetic, real, transforms = problem("ConvNetNN", torch.float64)  # smooth enough: no normalisation
    batches = (real[0].__getitem__, real[1].__getitem__)
    matcher = JointMatcher(net, LAMBDA, "mse", Compute())
    gradient = matcher(*synthetic, batches, transforms)[2]
    slot, image, *pixel = np.unravel_index(gradient.abs().argmax().item(), gradient.shape)
    moved = []
    for step in (1e-5, -1e-5):
        outliers = synthetic[1].clone()
        outliers[(slot, image, *pixel)] += step
        moved.append(matcher(synthetic[0], outliers, batches, transforms)[0].sum())
    slope = (moved[0] - moved[1]) / 2e-5
    assert abs(slope - gradient[(slot, image, *pixel)]) < 1e-4 * abs(slope)


def test_an_iteration_of_joint_matching(tiny_real):
    """Images and outliers after one update, from the draws by their keys; both move by one loss."""
    method = GradientMatching(tiny_real, PseudoOutliers(tiny_real), SETTINGS)
    method.start(0)
    start = [method.image_syn.detach().clone(), method.image_oe.detach().clone()]
    losses = method.iterate(0)
    assert set(losses) == {"loss"}
    net = get_network("ConvNetD1", 3, 3, (16, 16), generator(4))
    initialize(net, generator(4, "match", 0, "network", 0))
    leaves, total = [s.clone().requires_grad_() for s in start], 0.0
    for slot in range(3):
        key = (0, 0, slot)
        index = tiny_real.choose(slot, 6, generator(4, "match", 0, "real", *key))
        outliers = method.outliers.draw(slot, 5, generator(4, "match", 0, "real oe", *key))
        first, second = (
            STRATEGY.draw(1, (16, 16), generator(4, "match", 0, k, *key)) for k in ("siamese", "siamese oe")
        )
        found, target = (
            torch.autograd.grad(
                F.cross_entropy(net(first(x)), torch.full((len(x),), slot))
                - 0.5 * F.log_softmax(net(second(o)), 1).mean(),
                list(net.parameters()),
                create_graph=True,
            )
            for x, o in ((leaves[0][slot], leaves[1][slot]), (tiny_real.train_batch(index), outliers))
        )
        total = total + match_loss(found, [t.detach() for t in target], "ours")
    for now, before, gradient in zip(
        (method.image_syn, method.image_oe), start, torch.autograd.grad(total, leaves), strict=True
    ):
        assert (now.detach() - before + 0.1 * gradient).norm() < 1e-3 * (0.1 * gradient).norm()
    assert abs(losses["loss"].sum() - total) < 1e-4 * abs(total)


def test_joint_matching_resumes_with_the_same_bits(tiny_real):
    settings = replace(SETTINGS, spread_oe=0.5)
    whole, second = whole_and_resumed(
        lambda: GradientMatching(tiny_real, PseudoOutliers(tiny_real), settings), stop=2, end=4
    )
    assert torch.equal(whole.image_syn, second.image_syn)
    assert torch.equal(whole.image_oe, second.image_oe)


# --- outliers that keep apart ----------------------------------------------------------------------------------------


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
        settings = replace(SETTINGS, joint=False, spread_oe=weight)
        method = kind(tiny_real, PseudoOutliers(tiny_real), settings)
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
        ("main.py", ["--method", "DC", "--matching", "joint"], "--matching joint: main.py distils no outliers"),
        ("main.py", ["--method", "DM", "--spread_oe", 1], "--spread_oe 1.0: main.py distils no outliers"),
        ("main_poe.py", ["--method", "DM", "--matching", "joint"], "--matching: --method DM does not use it"),
        ("main_poe.py", ["--method", "MTT", "--spread_oe", 1], "--spread_oe: --method MTT does not use it"),
        ("main_poe.py", ["--method", "DC", "--spread_oe", -1], "--spread_oe"),
        ("main_poe.py", ["--method", "DC", "--matching", "both"], "--matching: unknown matching 'both'"),
    ],
)
def test_flags_that_cannot_be_followed(refused, tmp_path, name, flags, message):
    assert message in refused(name, "--dataset", "Digits", "--model", "ConvNetD1", *flags)
    assert not list(tmp_path.iterdir())


def test_joint_matching_through_stage_1(in_process, tmp_path):
    out = in_process(
        "main_poe.py", "--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 2, "--init", "real", "--batch_real", 16,
        "--batch_oe", 8, "--dsa_strategy", "crop_scale", "--Iteration", 2, "--num_exp", 1, "--num_eval", 1,
        "--epoch_eval_train", 2, "--method", "DSA", "--matching", "joint", "--spread_oe", 0.1, "--outer_loop", 2,
        "--inner_loop", 1,
    )  # fmt: skip
    assert "loss" in out
    assert "loss_oe" not in out
    assert len(list(tmp_path.glob("result-poe/*/Digits/ConvNetD1/2/*/res_*.pt"))) == 1
