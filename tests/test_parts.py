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
    ],
)
def test_parts_are_equal(lengths, least, count):
    assert equal_parts(lengths, least) == count
    assert all(n % count == 0 for n in lengths)


def test_parts_fit(monkeypatch):
    net = get_network("ConvNetW32", 3, 10, (16, 16), generator(0))  # its largest output: 32 · 16 · 16 for each image
    monkeypatch.setattr(parts, "BACKWARD", 4 * 8192)
    monkeypatch.setattr(parts, "FORWARD", 8 * 8192)
    cut = BatchSplitter(net)
    images = torch.zeros(16, 3, 16, 16)
    assert (cut.backward(images), cut.forward(images), cut.backward(images, 12, 4)) == (4, 2, 4)
    assert cut.backward(images.to("meta")) == 1
    assert BatchSplitter(get_network("MLP", 3, 10, (16, 16), generator(0))).backward(images) == 1
    assert in_parts(lambda x: x + 1, images, 4).shape == images.shape


@pytest.mark.parametrize(("name", "width"), [("ConvNetW32", 32), ("ConvNetBN", 128)])
def test_training_and_matching_in_parts(name, width, tiny_real, monkeypatch):
    """A ConvNetBN is trained on whole batches: its statistics are those of the batch."""
    images, outliers = (tiny_real.train_batch(torch.arange(i, i + 12)).double() for i in (0, 12))
    synthetic = SyntheticSet(images, tiny_real.labels_train[:12], outliers)
    seen = []
    for most in (2**22, 3 * width * 16 * 16):
        monkeypatch.setattr(parts, "BACKWARD", most)
        monkeypatch.setattr(parts, "FORWARD", most)
        net = get_network(name, 3, 3, (16, 16), generator(0)).double()
        trainer = Trainer(net, TrainSettings(2, batch=8))
        losses = [trainer.epoch(synthetic, generator(epoch)) for epoch in range(2)]
        logits = trainer.predict(tiny_real.test_images.double())
        matcher = Matcher(net.eval(), "ours", Compute())
        gradient = matcher.real_gradient(tiny_real.train_batch(torch.arange(12)).double(), torch.tensor(1))
        count = matcher.splitter.backward(synthetic.images)
        seen.append([*losses, logits, *gradient])
    assert count > 1
    for whole, cut in zip(*seen, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-10, rtol=1e-10)
