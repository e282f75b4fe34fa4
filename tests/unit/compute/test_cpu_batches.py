"""Batches in parts give what whole batches give."""

import pytest
import torch

from networks import get_network
from utils.compute import cpu_batches as parts
from utils.compute.cpu_batches import BatchSplitter, convolution_outputs, equal_parts, in_parts
from utils.compute.device import Compute
from utils.core.rng import generator
from utils.data.synthetic import SyntheticSet
from utils.methods.matcher import Matcher
from utils.methods.trajectory_matching import StudentStep
from utils.training.trainer import Trainer, TrainSettings


def test_outputs_of_convolutions_by_hand():
    """Three convolutions of 32 channels, each after a pooling that halves the sides."""
    net = get_network("ConvNetW32", 3, 10, (32, 32), generator(0))
    assert convolution_outputs(net, (3, 32, 32)) == [32 * 32 * 32, 32 * 16 * 16, 32 * 8 * 8]
    assert convolution_outputs(get_network("MLP", 3, 10, (8, 8), generator(0)), (3, 8, 8)) == []
    assert next(net.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("lengths", "least", "count"),
    [
        ((256,), 8, 8),
        ((250,), 4, 5),
        ((100, 100), 7, 10),
        ((100, 0), 7, 10),
        ((100, 30), 4, 5),
        ((7, 3), 2, 1),
        ((9,), 1, 1),
        ((100, 30), 70, 10),
        ((8,), 50, 8),
    ],
)
def test_parts_are_equal(lengths, least, count):
    assert equal_parts(lengths, least) == count
    assert all(n % count == 0 for n in lengths)


def test_parts_fit(monkeypatch):
    net = get_network("ConvNetW32", 3, 10, (16, 16), generator(0))  # its largest output: 32 · 16 · 16 for each image
    monkeypatch.setattr(parts, "MAX_PART_ELEMENTS", 4 * 8192)
    cut = BatchSplitter(net)
    images = torch.zeros(16, 3, 16, 16)
    assert (cut.count(images), cut.count(images, 12, 4), cut.count(images[:4])) == (4, 4, 1)
    assert BatchSplitter(net, "bf16").count(images) == 2  # half the bytes
    assert cut.count(images.to("meta")) == 1
    assert BatchSplitter(get_network("MLP", 3, 10, (16, 16), generator(0))).count(images) == 1
    assert in_parts(lambda x: x + 1, images, 4).shape == images.shape


@pytest.mark.parametrize(("name", "width"), [("ConvNetW32", 32), ("ConvNetBN", 128)])
def test_training_and_matching_in_parts(name, width, tiny_real, monkeypatch):
    """A ConvNetBN is trained on whole batches: its statistics are those of the batch."""
    images, outliers = (tiny_real.train_batch(torch.arange(i, i + 12)).double() for i in (0, 12))
    synthetic = SyntheticSet(images, tiny_real.labels_train[:12], outliers)
    seen = []
    for most in (2**22, 3 * width * 16 * 16):
        monkeypatch.setattr(parts, "MAX_PART_ELEMENTS", most)
        net = get_network(name, 3, 3, (16, 16), generator(0)).double()
        trainer = Trainer(net, TrainSettings(2, batch=8))
        losses = [trainer.epoch(synthetic, generator(epoch)) for epoch in range(2)]
        logits = trainer.predict(tiny_real.test_images.double())
        matcher = Matcher(net.eval(), "ours", Compute())
        gradient = matcher.real_gradient(tiny_real.train_batch(torch.arange(12)).double(), torch.tensor(1))
        count = matcher.splitter.count(synthetic.images)
        seen.append([*losses, logits, *gradient])
    assert count > 1
    for whole, cut in zip(*seen, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("name", "width"), [("ConvNetW32", 32), ("ConvNetBN", 128)])
@pytest.mark.parametrize("soft", [False, True])
def test_steps_of_a_student_in_parts(name, width, soft, tiny_real, monkeypatch):
    """12 images and 8 outliers, in four parts of 3 and 2; a ConvNetBN takes them whole."""
    images = tiny_real.train_batch(torch.arange(20)).double()
    labels = tiny_real.labels_train[:12]
    if soft:
        labels = torch.eye(3, dtype=torch.float64)[labels] * 0.7 + 0.1
    net = get_network(name, 3, 3, (16, 16), generator(0)).double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as in MTT, with the statistics of the batch alone
            module.running_mean = module.running_var = module.num_batches_tracked = None
    params = {key: value.detach() for key, value in net.named_parameters()}
    v = {key: torch.randn(p.shape, generator=generator(1), dtype=torch.float64) for key, p in params.items()}
    step, seen, calls = StudentStep(net.requires_grad_(False), Compute()), [], []
    backward = step.part_backward
    step.part_backward = lambda *args: calls.append(len(args[0])) or backward(*args)
    for most in (2**22, 5 * width * 16 * 16):
        monkeypatch.setattr(parts, "MAX_PART_ELEMENTS", most)
        product, on_images, on_params = step.backward(images, labels, 0.5, params, v)
        gradient = step.gradient(images, labels, 0.5, params)
        seen.append([product, on_images, *on_params.values(), *gradient.values()])
    assert calls == [20, 20] if name == "ConvNetBN" else [20, 5, 5, 5, 5]
    for whole, cut in zip(*seen, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-10, rtol=1e-10)
