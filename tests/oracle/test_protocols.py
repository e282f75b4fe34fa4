"""Protocols of network training: what they set, CutMix and mixup by slow loops, schedules and optimisers by PyTorch."""

import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import Compute

from networks import get_network
from utils.core.rng import generator
from utils.data.augment import DSA
from utils.data.synthetic import SyntheticSet
from utils.settings.arguments import Stage2Settings
from utils.stages.evaluation import training_of
from utils.training.draws import augmented_batches, draw_epoch, draw_mix
from utils.training.trainer import PROTOCOLS, Trainer, TrainSettings, load_optimizer

STRATEGY = "color_crop_cutout_flip"


def a_set(n=12, classes=3, outliers=True) -> SyntheticSet:
    images = torch.randn(n, 3, 16, 16, generator=generator(1))
    labels = torch.arange(n) % classes
    return SyntheticSet(images, labels, torch.randn(n, 3, 16, 16, generator=generator(2)) if outliers else None)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (1000, 256, "sgd", 5e-4, "half", "none", None)),
        ({"protocol": "idc"}, (1000, 64, "sgd", 5e-4, "late", "cutmix", None)),
        ({"protocol": "ncfm"}, (2000, 128, "adamw", 0.01, "fifths", "cutmix", None)),
        ({"protocol": "ncfm", "mix": "none", "optimizer": "sgd", "batch_train": 7, "epoch_eval_train": 9},
         (9, 7, "sgd", 5e-4, "fifths", "none", None)),
    ],
)  # fmt: skip
def test_what_a_protocol_sets(flags, expected):
    dsa = DSA(tuple(STRATEGY.split("_")))
    found = training_of(Stage2Settings(dsa_strategy=STRATEGY, **flags), "ConvNet", dsa)
    values = (found.epochs, found.batch, found.optimizer, found.weight_decay, found.schedule, found.mix, found.lr)
    assert values == expected
    assert ("cutout" in found.augmentation.strategy) == (found.mix != "cutmix")
    assert [e for e in found.augmentation.strategy if e != "cutout"] == ["color", "crop", "flip"]


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_images_and_labels_are_mixed_alike(kind):
    """Image by image and pixel by pixel; the weight of the label is the share of pixels."""
    images, labels, seen = torch.randn(6, 2, 9, 7, generator=generator(3)), torch.eye(6), []
    for key in range(200):
        mix = draw_mix(kind, 6, (9, 7), generator(4, key))
        if mix is None:
            continue
        found, of_labels, weight = mix(images), mix.of_labels(labels), mix.weight.item()
        seen.append(weight)
        for i, j in enumerate(mix.partner.tolist()):
            if kind == "mixup":
                expected = weight * images[i] + (1 - weight) * images[j]
            else:
                expected, taken = images[i].clone(), 0
                top, bottom, left, right = mix.box
                for y in range(top, bottom):
                    for x in range(left, right):
                        expected[:, y, x] = images[j][:, y, x]
                        taken += 1
                assert weight == pytest.approx(1 - taken / 63)
            torch.testing.assert_close(found[i], expected)
            torch.testing.assert_close(of_labels[i], weight * labels[i] + (1 - weight) * labels[j])
    assert 70 < len(seen) < 130  # half of the batches
    assert min(seen) < 0.2 < 0.8 < max(seen)


def test_no_mix_draws_nothing():
    """So the draws of older runs stay as they were."""
    with_none, without = generator(5), generator(5)
    assert draw_mix("none", 4, (8, 8), with_none) is None
    assert torch.equal(torch.rand(3, generator=with_none), torch.rand(3, generator=without))


def test_outliers_are_not_mixed():
    """Batches of a mixed epoch: labels are probabilities, outliers come as they were drawn."""
    synthetic = a_set()
    batches = [draw_epoch(synthetic, 12, None, generator(6, key), "cutmix")[0] for key in range(12)]
    assert 0 < sum(b.mix is not None for b in batches) < 12
    for batch, (images, labels) in zip(
        batches, augmented_batches(synthetic.with_probabilities(), batches), strict=True
    ):
        assert torch.equal(images[12:], synthetic.images_oe[batch.index_oe])
        hard = F.one_hot(synthetic.labels[batch.index]).float()
        plain = synthetic.images[batch.index]
        torch.testing.assert_close(images[:12], plain if batch.mix is None else batch.mix(plain))
        torch.testing.assert_close(labels, hard if batch.mix is None else batch.mix.of_labels(hard))
        torch.testing.assert_close(labels.sum(1), torch.ones(12))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_training_by_a_protocol_is_a_plain_loop(protocol):
    """Ten epochs with PyTorch's own schedulers; `dc` also clears the momentum at half time."""
    synthetic, key = a_set(), ("network", 0)
    settings = training_of(Stage2Settings(protocol=protocol, epoch_eval_train=10, batch_train=5), "ConvNet", None)
    settings = replace(settings, augmentation=None)
    net, other = (get_network("ConvNetD1", 3, 3, (16, 16), generator(7)).double() for _ in range(2))
    synthetic = replace(synthetic, images=synthetic.images.double(), images_oe=synthetic.images_oe.double())
    trainer = Trainer(net, settings, Compute())
    trainer.train(synthetic, 8, key)
    if protocol == "ncfm":
        optimizer = torch.optim.AdamW(other.parameters(), 0.001, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(other.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    steps, factor = {"dc": ([5], 0.1), "idc": ([6, 8], 0.2), "ncfm": ([2, 4, 6, 8], 0.5)}[protocol]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, factor)
    for epoch in range(10):
        if protocol == "dc" and epoch == 5:
            optimizer = torch.optim.SGD(other.parameters(), 0.001, momentum=0.9, weight_decay=5e-4)
        batches = draw_epoch(synthetic, 5, None, generator(8, *key, "epoch", epoch), settings.mix)
        for batch in batches:
            images, labels = synthetic.images[batch.index], F.one_hot(synthetic.labels).double()[batch.index]
            if batch.mix is not None:
                images, labels = batch.mix(images), batch.mix.of_labels(labels)
            loss = F.cross_entropy(other(images), labels)
            logits = other(synthetic.images_oe[batch.index_oe])
            loss = loss - 0.5 * F.log_softmax(logits, 1).mean(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_state_of_adamw_is_restored():
    synthetic, kept = a_set(), {}
    settings = TrainSettings(6, None, 5, optimizer="adamw", schedule="fifths", mix="cutmix")
    first, second = (Trainer(get_network("ConvNetD1", 3, 3, (16, 16), generator(i)), settings) for i in (9, 10))

    def keep(epoch, loss):
        if epoch == 3:
            state = first.state_dict()
            kept["net"] = {name: t.clone() for name, t in state["net"].items()}
            kept["optimizer"] = torch.load(_saved(state["optimizer"]), weights_only=True)

    first.train(synthetic, 1, (), keep)
    second.load_state_dict(kept)
    second.train(synthetic, 1, (), first_epoch=3)
    for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(a, b)
    damaged = kept["optimizer"]
    damaged["state"][0]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match="another shape"):
        load_optimizer(second.optimizer, damaged)


def _saved(content):
    """What `torch.save` writes, as a file in memory."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file
