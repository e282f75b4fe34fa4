"""The textbook loop of the benchmark computes what the engine computes, but for random draws; and the profile."""

import numpy as np
import profile_works
import pytest
import textbook_augment
import textbook_loop
import torch

from networks import get_network
from scripts import textbook
from utils.core.rng import generator
from utils.data.augment import identity
from utils.data.synthetic import SyntheticSet
from utils.ood.scorer import Scorer
from utils.training.trainer import Trainer, TrainSettings, accuracy_of


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=generator(0))


@pytest.mark.parametrize("entry", textbook_augment.AUGMENTATIONS)
def test_siamese_draws_are_the_same_for_all_images_and_calls(images, entry):
    same = images[:1].expand(6, -1, -1, -1)
    first, again = (textbook_augment.augment(same, [entry], seed=5) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.allclose(first, first[:1].expand_as(first), atol=1e-6)
    free = torch.cat([textbook_augment.augment(same, [entry]) for _ in range(8)])
    assert not torch.allclose(free, free[:1].expand_as(free), atol=1e-3)


def test_augmentations_do_what_they_say(images):
    for _ in range(5):
        moved = textbook_augment.crop(images[:1], True)[0]
        rows = [r for r in range(-4, 5) for c in range(-4, 5) if torch.equal(_shifted(images[0], r, c), moved)]
        assert len(rows) == 1
        cut = textbook_augment.cutout(torch.ones(1, 3, 32, 32), True)
        assert 8 * 8 <= (cut[0, 0] == 0).sum() <= 16 * 16
        flipped = textbook_augment.flip(images, False)
        assert all(torch.equal(f, x) or torch.equal(f, x.flip(2)) for f, x in zip(flipped, images, strict=True))


def _shifted(image: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    out = torch.zeros_like(image)
    for r in range(32):
        for c in range(32):
            if 0 <= r + rows < 32 and 0 <= c + columns < 32:
                out[:, r, c] = image[:, r + rows, c + columns]
    return out


def test_matching_by_the_oracle(digits):
    """With batches of whole classes and without augmentation nothing is random but the order of images."""
    images, labels = digits.train_batch(torch.arange(len(digits.images_train))), digits.labels_train
    loop = textbook_loop.Distillation(images, labels, [images.flip(3)], "ConvNetD1", 2, (1, 1), (), batch=10**6)
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0))
    before = [x.detach().clone() for x in (loop.image_syn, loop.image_oe)]
    batches = (loop.real_batch, loop.outlier_batch)
    losses = (loop._class_loss, loop._uniform_loss)
    for kind in range(2):
        found = loop.match(
            net, (loop.image_syn, loop.image_oe)[kind], batches[kind], losses[kind], loop.optimizers[kind]
        )
        synthetic = before[kind].view(10, 2, 1, 8, 8)
        expected, gradient = textbook.match_slots(net, synthetic, batches[kind], [identity] * 10, bool(kind), "ours")
        assert found == pytest.approx(sum(expected), rel=1e-3)
        after = (loop.image_syn, loop.image_oe)[kind].detach()
        assert torch.allclose(after, before[kind] - 0.1 * gradient.flatten(0, 1), atol=1e-4)


def test_training_lowers_the_loss(digits):
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    index = torch.cat([i[:3] for i in digits.class_indices])
    images = SyntheticSet(digits.train_batch(index), digits.labels_train[index], torch.randn(30, 1, 8, 8))
    losses = [textbook_loop.train_epoch(net, optimizer, images, ("crop", "scale"), 0.5) for _ in range(40)]
    assert losses[-1] < losses[0] - 1


def test_images_read_one_by_one(tiny_real):
    """Accuracy and scores of the loop are the engine's, and so are the normalised images."""
    net = get_network("ConvNetW32", 3, 3, (16, 16), generator(0)).eval()
    arrays = tiny_real.images_test.permute(0, 2, 3, 1).numpy(), tiny_real.labels_test.numpy()
    dataset = textbook_loop.Images(*arrays, tiny_real.mean, tiny_real.std)
    images, labels = textbook_loop.read_all(dataset)
    torch.testing.assert_close(images, tiny_real.test_images)
    assert torch.equal(labels, tiny_real.labels_test)
    loader = torch.utils.data.DataLoader(dataset, 4)
    predicted = Trainer(net, TrainSettings(1)).predict(images)
    assert textbook_loop.test_accuracy(net, loader) == pytest.approx(accuracy_of(predicted, labels))
    scores = Scorer(net, ["msp"], 1.0, tiny_real.std)(images, 4)[1]["msp"]
    np.testing.assert_allclose(textbook_loop.msp_scores(net, loader), scores, atol=1e-5)


def test_corrupted_copies(tmp_path):
    """Each copy holds the whole training set, corrupted, then normalised."""
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", train_images=images, train_labels=np.arange(7)[:, None])
    read, labels, (inverted, jigsaw) = textbook_loop.read_poe(tmp_path / "cifar10.npz", ("invert", "jigsaw"))
    assert labels.tolist() == list(range(7))
    mean, std = (np.array(v, dtype=np.float32) for v in (textbook_loop.MEAN, textbook_loop.STD))
    pixels = images / np.float32(255)
    for found, expected in ((read, pixels), (inverted, _inverted(pixels))):
        np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), (expected - mean) / std, atol=1e-5)
    assert torch.equal(jigsaw.flatten(2).sort(2).values, read.flatten(2).sort(2).values)


def _inverted(pixels: np.ndarray) -> np.ndarray:
    """Channels 1 and 2 as one minus their values."""
    return np.concatenate([pixels[..., :1], 1 - pixels[..., 1:]], axis=3)


def test_shares_of_the_profile_add_up():
    images, weight = torch.randn(16, 8, 32, 32), torch.randn(8, 8, 3, 3)
    shares = profile_works.shares(lambda: torch.nn.functional.conv2d(images, weight))
    total = shares.pop("total")
    assert sum(shares.values()) == pytest.approx(total, rel=0.2)
    assert max(shares, key=shares.get) in ("convolutions", profile_works.PYTHON)
    assert shares["convolutions"] > 10 * shares["optimiser"]


def test_floating_point_operations_by_formula():
    """A convolution and its backward pass, which computes two gradients of the same cost, with and without autograd."""
    images, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    forward = 2 * (2 * 4 * 8 * 8) * (3 * 3 * 3)

    def work() -> torch.Tensor:
        return torch.nn.functional.conv2d(images, weight, padding=1).sum()

    assert profile_works.gflop(lambda: work().backward()) * 1e9 == pytest.approx(3 * forward)
    with torch.no_grad():
        assert profile_works.gflop(work) * 1e9 == pytest.approx(forward)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::addmm", "matrix products"),
        ("aten::native_group_norm", "norm, activation, pooling"),
        ("aten::grid_sampler_2d", "augmentation, batches"),
        ("aten::randperm", "draws"),
        ("Optimizer.step#SGD.step", "optimiser"),
        ("## Call CompiledFxGraph ft2aubyg3ipwmm ##", "norm, activation, pooling"),
        ("aten::empty", profile_works.OTHER),
    ],
)
def test_kinds_of_operations(name, kind):
    assert profile_works.kind_of(name) == kind
