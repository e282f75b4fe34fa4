"""Networks trained at once are those that are trained one after another."""

from contextlib import nullcontext

import pytest
import torch
from conftest import COMPILED, DEVICE, needs_compiler
from torch import nn

from networks import get_network
from utils.compute.device import Compute
from utils.core.rng import generator
from utils.data.augment import DC, DC_ENTRIES, DSA, DSA_ENTRIES, apply_by_slot
from utils.data.synthetic import SyntheticSet
from utils.runs.run_folder import RunFolder
from utils.stages import evaluation as evaluator_module
from utils.stages.evaluation import EvalSettings, Evaluator
from utils.training.stacked import StackedTrainer, stacking_is_faster
from utils.training.trainer import Trainer, TrainSettings

STRATEGY = DSA(tuple(DSA_ENTRIES))


@pytest.fixture
def tiny_real(tiny_real):
    return tiny_real.to(DEVICE)


def synthetic_set(real, dtype=torch.float64, outliers=True):
    index = torch.arange(12)
    images, images_oe = (real.train_batch(i).to(dtype) for i in (index, index + 12))
    return SyntheticSet(images, real.labels_train[index], images_oe if outliers else None)


@pytest.mark.parametrize(
    ("name", "augmentation"),
    [
        *((name, a) for name in ("MLP", "ConvNetW32") for a in (STRATEGY, DC(DC_ENTRIES), None)),
        *((name, STRATEGY) for name in ("LeNet", "ConvNetNN", "ConvNetLN", "ConvNetGN", "ConvNetMP")),
    ],
)
def test_at_once_is_one_by_one(tiny_real, name, augmentation):
    """Batches of 5 of 12, the learning rate dropped in the middle, weight decay and momentum, with outliers."""
    settings = TrainSettings(2, batch=5, augmentation=augmentation)
    nets = [get_network(name, 3, 3, (16, 16), generator(0)).double().to(DEVICE) for _ in range(2)]
    keys = {2: ("a", 2), 5: ("a", 5), 6: ("b", 6)}
    results, losses = [], []
    for kind, net in zip((Trainer, StackedTrainer), nets, strict=True):
        trainer = kind(net, settings)
        found = {}
        seen = []
        for index in trainer.networks(synthetic_set(tiny_real), 1, keys, lambda e, loss, seen=seen: seen.append(loss)):
            found[index] = trainer.predict(tiny_real.test_images.double())
        results.append(found)
        losses.append(torch.stack(seen))
    assert list(results[0]) == list(results[1]) == [2, 5, 6]
    for index in keys:
        torch.testing.assert_close(results[0][index], results[1][index], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(losses[0].view(3, 2).T, losses[1], atol=1e-9, rtol=1e-9)
    assert not torch.allclose(results[1][2], results[1][5])


@needs_compiler
def test_compiled_at_once_is_one_by_one(tiny_real):
    net = get_network("MLP", 3, 3, (16, 16), generator(0)).double().to(DEVICE)
    found = []
    for trainer in (
        Trainer(net, TrainSettings(2, batch=5, augmentation=STRATEGY)),
        StackedTrainer(net, TrainSettings(2, batch=6, augmentation=STRATEGY), COMPILED),
        Trainer(net, TrainSettings(2, batch=6, augmentation=STRATEGY)),
    ):
        keys = {0: ("a", 0), 1: ("a", 1)}
        networks = trainer.networks(synthetic_set(tiny_real), 1, keys)
        found.append(torch.stack([trainer.predict(tiny_real.test_images.double()).float() for _ in networks]))
    torch.testing.assert_close(found[1], found[2], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found[0], found[2])


def test_what_cannot_be_trained_at_once_is_trained_one_by_one(tiny_real, monkeypatch):
    net = get_network("MLP", 3, 3, (16, 16), generator(0)).double().to(DEVICE)
    settings = TrainSettings(2, augmentation=STRATEGY)
    found = []
    for kind in (Trainer, StackedTrainer):
        trainer = kind(net, settings)
        if kind is StackedTrainer:
            monkeypatch.setattr(trainer, "loss", lambda *args: torch.zeros(2) @ torch.zeros(3))
        networks = trainer.networks(synthetic_set(tiny_real), 1, {0: ("a",), 3: ("b",)})
        context = pytest.warns(UserWarning, match="one after another, not simultaneously") if found else nullcontext()
        with context:
            found.append({index: trainer.predict(tiny_real.test_images.double()) for index in networks})
    assert list(found[1]) == [0, 3]
    assert list(trainer.networks(synthetic_set(tiny_real), 1, {1: ("c",)})) == [1]  # it is not tried again
    assert all(torch.equal(found[0][index], found[1][index]) for index in found[0])
    assert (trainer.stacked, trainer.optimizer, trainer.loss) == ({}, None, None)  # their memory is released


def test_without_outliers_and_without_networks(tiny_real):
    net = get_network("MLP", 3, 3, (16, 16), generator(0)).double().to(DEVICE)
    synthetic = synthetic_set(tiny_real, outliers=False)
    found = []
    for kind in (Trainer, StackedTrainer):
        trainer = kind(net, TrainSettings(2, augmentation=STRATEGY))
        (index,) = trainer.networks(synthetic, 1, {7: ("k",)})
        assert index == 7
        found.append(trainer.predict(tiny_real.test_images.double()))
        assert list(trainer.networks(synthetic, 1, {})) == []
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 4])
def test_slots_with_draws_of_their_own(n):
    """`apply_by_slot` with parameters for each image, or for all of a slot."""
    images = torch.rand(9, 4, 3, 8, 6, generator=generator(0))
    transforms = [STRATEGY.draw(n, (8, 6), generator(1, s)) for s in range(9)]
    assert len({t.entry for t in transforms}) > 2
    expected = torch.stack([t(x) for t, x in zip(transforms, images, strict=True)])
    torch.testing.assert_close(apply_by_slot(images, transforms), expected)


@pytest.mark.parametrize(
    ("name", "images", "compute", "pays"),
    [
        ("MLP", (400, 3, 32, 32), Compute(compiled=True), True),
        ("ConvNetD2", (20, 1, 8, 8), Compute(), True),
        ("ConvNetD2", (20, 1, 8, 8), Compute(compiled=True), False),
        ("ConvNetD2", (100, 1, 8, 8), Compute(), False),
        ("ConvNetW32", (20, 3, 32, 32), Compute(), False),
        ("ConvNet", (20, 3, 32, 32), Compute(on_cuda=True), True),
        ("ConvNet", (400, 3, 32, 32), Compute(on_cuda=True), False),
        ("ConvNetBN", (20, 3, 32, 32), Compute(on_cuda=True), False),
    ],
)
def test_where_it_is_done(name, images, compute, pays):
    net = get_network(name, *images[1:2], 10, images[2:], generator(0))
    assert stacking_is_faster(net, images, compute) is pays


def test_evaluation_at_once(tiny_real, tmp_path, monkeypatch):
    """Three networks in stage 1's evaluation: as alone, and saved once, when all are trained."""
    found = []
    for pays in (True, False):
        monkeypatch.setattr(evaluator_module, "stacking_is_faster", lambda *args, pays=pays: pays)
        run = RunFolder.create(str(tmp_path), "DC", "tiny", "MLP", 4)
        ood = {"noise": torch.randn(20, 3, 16, 16, generator=generator(3)).to(DEVICE)}
        settings = EvalSettings(3, {"MLP": TrainSettings(5, lr=0.001)}, 1, ood)
        evaluator = Evaluator(tiny_real, settings, run, Compute())
        found.append({"MLP": {0: {"accuracy": 0.5, "auroc noise": 0.5}}})
        calls = []
        evaluator.evaluate(
            synthetic_set(tiny_real, torch.float32), 0, 0, found[-1], lambda calls=calls: calls.append(1)
        )
        assert isinstance(evaluator.trainers["MLP"].net, nn.Module)
        assert len(calls) == (1 if pays else 2)
    assert list(found[0]["MLP"]) == [0, 1, 2]
    for index in range(3):
        assert found[0]["MLP"][index] == pytest.approx(found[1]["MLP"][index], abs=1e-3)
