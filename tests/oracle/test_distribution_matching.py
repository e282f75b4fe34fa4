"""Distribution matching against a loop over classes in float64, image by image."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import COMPILED, DEVICE, made, named, needs_compiler

import networks
from networks import get_network, initialize
from networks.convnet import ConvNet
from scripts.textbook import augment_images
from tests.oracle.plain_methods import PlainDistributionMatching
from utils.compute.device import Compute
from utils.core.rng import generator
from utils.data.augment import DSA, DSA_ENTRIES, identity
from utils.methods import distribution_matching
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientSettings
from utils.outliers.sources import OutlierPool, PseudoOutliers

STRATEGY = DSA(tuple(DSA_ENTRIES))
SETTINGS = GradientSettings(
    model="ConvNetD1", ipc=3, seed=4, lr_img=0.5, batch_real=6, batch_oe=5, init="real", dsa_strategy=named(STRATEGY)
)


NARROW = {"NarrowBN": {"width": 32, "norm": "batch"}}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Networks that are quick because they are narrow."""
    for name, more in NARROW.items():
        monkeypatch.setitem(networks._NETWORKS, name, partial(ConvNet, **more))


def by_hand(method, it):
    """The loss and gradient of each set of images: one class after another, features by autograd in float64.

    With BatchNorm, whose features depend on the batch, all real images are embedded together, and all synthetic ones.
    """
    s, real = method.settings_of_test, method.real
    net = get_network(s.model, real.channel, real.num_classes, real.im_size, generator(s.seed))
    initialize(net, generator(s.seed, "match", 0, "network", it))
    net = net.double().train()
    results = []
    for images, what in ((method.image_syn, ""), (method.image_oe, " oe")):
        leaf = images.detach().double().requires_grad_()
        reals, synthetics = [], []
        for slot in range(real.num_classes):
            g = generator(s.seed, "match", 0, f"real{what}", it, 0, slot)
            if what:
                batch = method.outliers.draw(slot, s.batch_oe, g)
            else:
                order = torch.randperm(len(real.class_indices[slot]), generator=g)[: s.batch_real]
                batch = real.train_batch(real.class_indices[slot][order])
            siamese = generator(s.seed, "match", 0, f"siamese{what}", it, 0, slot)
            transform = s.augmentation.draw(1, real.im_size, siamese) if s.augmentation else identity
            reals.append(augment_images(batch.double(), transform))
            synthetics.append(augment_images(leaf[slot], transform))
        if method.has_batchnorm:
            reals, synthetics = (
                net.embed(torch.cat(parts)).split([len(p) for p in parts]) for parts in (reals, synthetics)
            )
        else:
            reals, synthetics = ([net.embed(x) for x in parts] for parts in (reals, synthetics))
        losses = [((a.mean(0) - b.mean(0)) ** 2).sum() for a, b in zip(reals, synthetics, strict=True)]
        (gradient,) = torch.autograd.grad(sum(losses), leaf)
        results.append((torch.stack(losses).detach(), gradient))
    return results


def make(real, settings=SETTINGS, compute=None, source="corruptions"):
    slices = torch.arange(12).view(3, 4)
    pool = OutlierPool(real, torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8), slices)
    outliers = {"corruptions": PseudoOutliers(real), "pool": pool, None: None}[source]
    method = made(DistributionMatching, real.to(DEVICE), outliers, settings, compute=compute)
    method.settings_of_test = settings
    method.start(0)
    return method


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("model", ["ConvNetD1", "NarrowBN", "MLP", "ConvNetW32"])
@pytest.mark.parametrize("dsa", [STRATEGY, None])
def test_loss_and_gradient(tiny_real, model, dsa, chunk, monkeypatch):
    monkeypatch.setattr(distribution_matching, "CHUNK_IMAGES", chunk)
    method = make(tiny_real, replace(SETTINGS, model=model, dsa_strategy=dsa and named(dsa)))
    for it in range(2):
        expected = by_hand(method, it)
        losses = method.iterate(it)
        for name, images, (loss, gradient) in zip(
            ("loss", "loss_oe"), (method.image_syn, method.image_oe), expected, strict=True
        ):
            torch.testing.assert_close(losses[name].double(), loss, rtol=1e-4, atol=1e-6)
            assert (images.grad.double() - gradient).norm() < 1e-4 * gradient.norm()


def test_a_pool_of_outliers_and_none(tiny_real):
    method = make(tiny_real, source="pool")
    losses = method.iterate(0)
    assert set(losses) == {"loss", "loss_oe"}
    plain = make(tiny_real, source=None)
    assert torch.equal(plain.iterate(0)["loss"], losses["loss"])  # outliers do not touch the images
    assert plain.image_oe is None


def test_updates_are_those_of_sgd_with_momentum(tiny_real):
    method = make(tiny_real, replace(SETTINGS, lr_img_oe=0.1))
    for images, lr in ((lambda: method.image_syn, 0.5), (lambda: method.image_oe, 0.1)):
        method.start(0)
        velocity = torch.zeros_like(images())
        for it in range(3):
            before = images().detach().clone()
            method.iterate(it)
            velocity = 0.5 * velocity + images().grad
            torch.testing.assert_close(images().detach(), before - lr * velocity)


@needs_compiler
def test_compiled_is_eager(tiny_real):
    eager, compiled = make(tiny_real), make(tiny_real, compute=COMPILED)
    for it in range(2):
        a, b = eager.iterate(it), compiled.iterate(it)
        torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(eager.image_syn.detach(), compiled.image_syn.detach(), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close(tiny_real):
    a, b = (make(tiny_real, compute=Compute(precision=p)).iterate(0)["loss"] for p in ("fp32", "bf16"))
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("model", ["ConvNetD1", "NarrowBN"])
def test_processes_share_the_slots(tiny_real, monkeypatch, model):
    """Each computes some; summed they are what one process computes. With BatchNorm each computes all."""
    settings = replace(SETTINGS, model=model)
    whole = make(tiny_real, settings)
    losses = whole.iterate(0)
    parts = []
    for rank in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("utils.compute.distributed.own_share", lambda n, rank=rank: range(rank, n, 2))
            method = make(tiny_real, settings)
            parts.append((method.iterate(0)["loss"], method.image_syn.grad))
    if model == "NarrowBN":
        assert all(torch.equal(loss, losses["loss"]) for loss, _ in parts)
    else:
        torch.testing.assert_close(parts[0][0] + parts[1][0], losses["loss"])
        torch.testing.assert_close(parts[0][1] + parts[1][1], whole.image_syn.grad)


def test_the_textbook_of_the_benchmark(tiny_real):
    """It computes the same."""
    method, slots = make(tiny_real), make(tiny_real)
    slots.__class__ = PlainDistributionMatching
    for it in range(2):
        a, b = method.iterate(it), slots.iterate(it)
        torch.testing.assert_close(a["loss_oe"], b["loss_oe"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(method.image_oe.detach(), slots.image_oe.detach(), rtol=1e-3, atol=1e-4)
