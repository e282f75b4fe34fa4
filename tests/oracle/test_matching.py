"""Distances by numpy, image gradients by finite differences."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import made, named
from torch import nn

from networks import get_network
from utils.compute.device import Compute
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import DSA, DSA_ENTRIES, identity
from utils.methods.distances import METRICS, match_loss
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.methods.matcher import NO_CLASS, Matcher, slot_loss
from utils.outliers.sources import PseudoOutliers
from utils.training.losses import joint_loss, uniform_cross_entropy

STRATEGY = DSA(tuple(DSA_ENTRIES))


def gradients(seed: int) -> list[torch.Tensor]:
    shapes = [(4, 3, 3, 3), (4,), (4, 2, 5), (5, 16), (5,)]
    return [torch.randn(s, generator=generator(seed, i), dtype=torch.float64) for i, s in enumerate(shapes)]


def numpy_distance(a: list[np.ndarray], b: list[np.ndarray], metric: str) -> float:
    if metric == "ours":
        total = 0.0
        for x, y in zip(a, b, strict=True):
            if x.ndim < 2:
                continue
            for row_x, row_y in zip(x.reshape(len(x), -1), y.reshape(len(y), -1), strict=True):
                total += 1 - row_x @ row_y / (np.linalg.norm(row_x) * np.linalg.norm(row_y) + 1e-6)
        return total
    x, y = (np.concatenate([g.ravel() for g in grads]) for grads in (a, b))
    if metric == "mse":
        return float(((x - y) ** 2).sum())
    return 1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_match_loss_by_numpy(metric):
    a, b = gradients(1), gradients(2)
    expected = numpy_distance([g.numpy() for g in a], [g.numpy() for g in b], metric)
    assert match_loss(a, b, metric).item() == pytest.approx(expected, rel=1e-12)
    assert match_loss(a, a, metric).item() == pytest.approx(0, abs=1e-5)


def test_zero_gradients_are_at_distance_one_per_row():
    zeros = [torch.zeros(4, 3), torch.zeros(4)]
    assert match_loss(zeros, [torch.ones(4, 3), torch.ones(4)], "ours").item() == 4


def test_uniform_cross_entropy_identity():
    """It equals the cross-entropy with the uniform distribution as soft target, and log K at constant logits."""
    logits = torch.randn(6, 9, generator=generator(0), dtype=torch.float64)
    expected = F.cross_entropy(logits, torch.full((6, 9), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(uniform_cross_entropy(logits), expected)
    assert uniform_cross_entropy(torch.full((3, 9), 4.2)).item() == pytest.approx(np.log(9), rel=1e-6)


def test_losses_of_bfloat16_networks_are_in_float32():
    """Also of outliers, and on a CPU; float64 stays."""
    net, images = torch.nn.Linear(4, 10), torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 9
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(images)
        joint = joint_loss(logits, torch.arange(3), 0.3)
        of_slots = [slot_loss(logits, torch.tensor(slot)) for slot in (NO_CLASS, 2)]
    z = logits.double()
    assert logits.dtype == torch.bfloat16
    expected = [-z.log_softmax(1).mean(), -z.log_softmax(1)[:, 2].mean()]
    torch.testing.assert_close(of_slots, [e.float() for e in expected], rtol=1e-6, atol=0)
    expected = F.nll_loss(z[:3].log_softmax(1), torch.arange(3)) - 0.3 * z[3:].log_softmax(1).mean()
    torch.testing.assert_close(joint, expected.float(), rtol=1e-6, atol=0)
    assert joint_loss(z, torch.arange(3), 0.3).dtype == torch.float64


def test_joint_loss_parts():
    logits, labels = torch.randn(7, 5, generator=generator(0)), torch.tensor([0, 4, 2])
    expected = F.cross_entropy(logits[:3], labels) + 0.3 * uniform_cross_entropy(logits[3:])
    torch.testing.assert_close(joint_loss(logits, labels, 0.3), expected)
    torch.testing.assert_close(joint_loss(logits[:3], labels, 0.3), F.cross_entropy(logits[:3], labels))


class SmoothNet(nn.Module):
    """A tiny twice differentiable network: finite differences need one without kinks."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(3, 3)
        self.fc = nn.Linear(3 * 3 * 3, 4)

    def forward(self, x):
        x = F.avg_pool2d(torch.tanh(self.norm(self.conv(x))), 2)
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batched", [True, False])
def test_image_gradient_by_finite_differences(metric, outliers, batched):
    torch.manual_seed(0)
    net = SmoothNet().double()
    real = torch.randn(4, 5, 2, 6, 6, dtype=torch.float64)
    synthetic = torch.randn(4, 2, 2, 6, 6, dtype=torch.float64)
    transforms = [STRATEGY.draw(1, (6, 6), generator(i)) for i in range(4)]

    matcher = Matcher(net, metric, Compute(), batched)

    def total(images):
        losses, gradient = matcher(images, real, transforms, outliers)
        return losses.sum(), gradient

    value, gradient = total(synthetic)
    direction = torch.randn(synthetic.shape, generator=generator(9), dtype=torch.float64)
    step = 1e-5
    numeric = (total(synthetic + step * direction)[0] - total(synthetic - step * direction)[0]) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-8)
    assert value > 0


def test_matching_is_zero_at_the_real_images():
    net = get_network("ConvNetW32", 3, 3, (16, 16), generator(0)).double()
    real = torch.randn(3, 4, 3, 16, 16, dtype=torch.float64, generator=generator(1))
    matcher = Matcher(net, "ours", Compute())
    losses, _ = matcher(real.clone(), real, [identity] * 3)
    assert (
        0 <= losses.sum().item() < 0.05
    )  # not exactly 0: the 1e-6 in the denominator weighs on rows of small gradient
    losses, _ = matcher(real.flip(0), real, [identity] * 3)
    assert losses.sum().item() > 10


def settings(**kwargs) -> GradientSettings:
    return GradientSettings(
        **(
            {
                "model": "ConvNetW32",
                "ipc": 2,
                "batch_real": 8,
                "batch_oe": 8,
                "outer_loop": 1,
                "dsa_strategy": named(STRATEGY),
            }
            | kwargs
        )
    )


def test_first_update_is_sgd_with_the_matching_gradient(tiny_real):
    """One iteration with one outer step moves the images by minus lr times the gradient, both sets on their own."""
    method = made(GradientMatching, tiny_real, PseudoOutliers(tiny_real), settings(init="real", lr_img=0.3))
    method.start(0)
    before, before_oe = method.image_syn.detach().clone(), method.image_oe.detach().clone()
    losses = method.iterate(0)
    torch.testing.assert_close(method.image_syn.detach(), before - 0.3 * method.image_syn.grad)
    torch.testing.assert_close(method.image_oe.detach(), before_oe - 0.3 * method.image_oe.grad)
    assert set(losses) == {"loss", "loss_oe"}
    assert method.image_syn.grad.abs().max() > 0
    assert method.image_oe.grad.abs().max() > 0


def test_real_initialisation_takes_images_of_the_class(tiny_real):
    method = made(GradientMatching, tiny_real, None, settings(init="real", ipc=3))
    method.start(0)
    everything = tiny_real.train_batch(torch.arange(40))
    for slot in range(3):
        for image in method.image_syn.detach()[slot]:
            match = (everything - image).abs().amax((1, 2, 3)).argmin()
            assert torch.equal(everything[match], image)
            assert tiny_real.labels_train[match] == slot
    assert method.synthetic().labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_real_initialisation_needs_enough_images(tiny_real):
    with pytest.raises(UserError, match="smallest class of tiny has 13"):
        made(GradientMatching, tiny_real, None, settings(init="real", ipc=14)).start(0)


def test_batchnorm_is_frozen_for_matching(tiny_real):
    """Statistics come from one training-mode pass over 16 images of each class; matching leaves them alone."""
    method = made(GradientMatching, tiny_real, None, settings(model="ConvNetBN"))
    method.start(0)
    method.iterate(0)
    norms = [m for m in method.net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(not m.training and m.num_batches_tracked == 1 for m in norms)
    chosen = [method.real.choose(c, 16, method.generator("batchnorm", 0, 0, c)) for c in range(3)]
    images = tiny_real.train_batch(torch.cat(chosen))
    expected = 0.1 * method.net.features[0](images).mean((0, 2, 3))
    torch.testing.assert_close(norms[0].running_mean, expected, atol=1e-5, rtol=1e-4)


def test_same_seed_same_bits_and_keys_differ(tiny_real):
    def run(seed, exp=0):
        method = made(
            GradientMatching, tiny_real, PseudoOutliers(tiny_real), settings(seed=seed, outer_loop=2, inner_loop=1)
        )
        method.start(exp)
        method.iterate(0)
        return method.synthetic()

    first, second, other, next_exp = run(1), run(1), run(2), run(1, exp=1)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.images_oe, second.images_oe)
    assert not torch.equal(first.images, other.images)
    assert not torch.equal(first.images, next_exp.images)


def test_every_iteration_has_its_own_network(tiny_real):
    method = made(GradientMatching, tiny_real, None, settings())
    method.start(0)
    weights = []
    for it in range(2):
        method.iterate(it)
        weights.append(method.net.classifier.weight.detach().clone())
    assert not torch.equal(*weights)


def test_momentum_of_the_images_is_a_half(tiny_real):
    """The second step is minus lr times (gradient + half the first gradient)."""
    method = made(GradientMatching, tiny_real, None, settings(lr_img=0.2))
    method.start(0)
    method.iterate(0)
    first, before = method.image_syn.grad.clone(), method.image_syn.detach().clone()
    method.iterate(1)
    torch.testing.assert_close(method.image_syn.detach(), before - 0.2 * (method.image_syn.grad + 0.5 * first))


def test_the_siamese_rule_the_real_batch_is_transformed_as_the_synthetic_one():
    """With synthetic images equal to the real ones the loss is near zero only if both get the same transform."""
    net = get_network("ConvNetW32", 3, 3, (16, 16), generator(0)).double()
    real = torch.randn(3, 4, 3, 16, 16, dtype=torch.float64, generator=generator(1))
    for entry in ("color", "crop", "cutout", "flip", "scale", "rotate"):
        transforms = [DSA((entry,)).draw(1, (16, 16), generator(2, s)) for s in range(3)]
        losses, _ = Matcher(net, "ours", Compute())(real.clone(), real, transforms)
        assert losses.sum() < 0.1
        if entry != "flip":  # a draw may leave everything as it is
            untouched, _ = Matcher(net, "ours", Compute())(
                torch.stack([t(x) for t, x in zip(transforms, real, strict=True)]), real, [identity] * 3
            )
            assert untouched.sum() > 0.5


def test_training_between_steps_is_plain_sgd_on_both_sets(tiny_real):
    """`inner_loop` epochs, no momentum, no weight decay, lambda_oe as given: two epochs by hand."""
    tiny = replace(tiny_real, images_train=tiny_real.images_train.double() / 255)
    method = made(
        GradientMatching,
        tiny,
        PseudoOutliers(tiny),
        settings(dsa_strategy=None, outer_loop=2, inner_loop=2, lr_net=0.1, lambda_oe=0.8, init="real"),
    )
    method.net.double()
    method.start(0)
    net = get_network("ConvNetW32", 3, 3, (16, 16)).double()
    net.load_state_dict(method.net.state_dict())
    method.trainer.restart(0.1)
    synthetic = method.synthetic()
    method._train_network(method.generator("inner", 0, 0))
    g = method.generator("inner", 0, 0)
    for _ in range(2):
        order, order_oe = (torch.randperm(6, generator=g) for _ in range(2))
        loss = F.cross_entropy(net(synthetic.images[order]), synthetic.labels[order])
        loss = loss + 0.8 * uniform_cross_entropy(net(synthetic.images_oe[order_oe]))
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, grad in zip(net.parameters(), grads, strict=True):
                p -= 0.1 * grad
    for p, q in zip(net.parameters(), method.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("flags", "rate", "told"),
    [
        ({}, 0.01, None),
        ({"lr_net": 0.1}, 0.1, None),
        ({"lr_net": 0.1, "protocol": "idc"}, 0.1, 0.1),
        ({"lr_net": 0.001, "protocol": "ncfm"}, 0.01, 0.01),
        ({"lr_net": 0.001, "optimizer": "adamw"}, 0.01, 0.01),
        ({"lr_net": 0.1, "protocol": "ncfm", "optimizer": "sgd"}, 0.1, 0.1),
    ],
)
def test_the_inner_loop_takes_no_learning_rate_of_another_optimiser(flags, rate, told, tiny_real):
    method = made(GradientMatching, tiny_real, None, settings(outer_loop=2, inner_loop=2, **flags))
    assert method.trainer.settings.lr == rate
    text = f"the inner loop trains networks by SGD, at a learning rate of {told}"
    assert [n for n in method.notices if "inner loop" in n] == ([text] if told else [])


def test_a_set_to_start_from(tiny_real):
    start = made(GradientMatching, tiny_real, PseudoOutliers(tiny_real), settings(seed=5))
    start.start(0)
    given = start.synthetic().detached_cpu()
    method = made(GradientMatching, tiny_real, PseudoOutliers(tiny_real), settings(seed=6), initial=[given])
    method.start(1)
    assert torch.equal(method.synthetic().images, given.images)
    assert torch.equal(method.synthetic().images_oe, given.images_oe)
    method.iterate(0)
    assert not torch.equal(method.synthetic().images, given.images)
