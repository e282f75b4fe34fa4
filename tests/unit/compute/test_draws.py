"""Random draws: each from a generator of its own; and how they come to the device."""

import pytest
import torch
from conftest import made, named

from utils.compute import transfer
from utils.compute.transfer import product_dtype
from utils.core.rng import generator, noise
from utils.data.augment import DSA, DSA_ENTRIES
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.outliers import corruptions
from utils.outliers.corruptions import corrupt
from utils.outliers.sources import PseudoOutliers

STRATEGY = DSA(tuple(DSA_ENTRIES))
SETTINGS = GradientSettings(
    model="ConvNetBN", ipc=2, batch_real=4, batch_oe=5, dsa_strategy=named(STRATEGY), outer_loop=4, inner_loop=3
)


@pytest.fixture
def method(tiny_real):
    method = made(GradientMatching, tiny_real, PseudoOutliers(tiny_real), SETTINGS)
    method.start(0)
    return method


def test_every_draw_has_its_key(method):
    """By hand: the generators of `utils.core.rng`, one for each thing that is random."""

    def keyed(what, *key):
        return generator(1, "match", 0, what, 7, *key)

    for outer in range(2):
        transforms = [method.transforms(which, 7, outer) for which in range(2)]
        batches = [list(method.batches(which, 7, outer)) for which in range(2)]
        for slot in range(3):
            indices = method.real.class_indices[slot]
            order = torch.randperm(len(indices), generator=keyed("real", outer, slot))
            assert torch.equal(batches[0][slot], method.real.train_batch(indices[order[:4]]))
            assert torch.equal(batches[1][slot], method.outliers.draw(slot, 5, keyed("real oe", outer, slot)))
            for of_slots, what in zip(transforms, ("siamese", "siamese oe"), strict=True):
                expected = STRATEGY.draw(1, (16, 16), keyed(what, outer, slot))
                assert of_slots[slot].entry == expected.entry
                assert torch.equal(of_slots[slot].params, expected.params)


def test_the_network_is_trained_on_draws_of_its_own(method, monkeypatch):
    """Three epochs after each step but the last; each by hand from one generator, one after another."""
    trained = []

    def step(images, labels):
        trained.append((images, labels))
        return images.sum()

    monkeypatch.setattr(method.trainer, "step", step)
    synthetic = method.synthetic()
    for outer in range(2):
        method._train_network(method.generator("inner", 7, outer))
    for outer in range(2):
        g = generator(1, "match", 0, "inner", 7, outer)
        for images, labels in trained[3 * outer : 3 * outer + 3]:
            index, index_oe = (torch.randperm(6, generator=g) for _ in range(2))
            parts = [STRATEGY.draw(6, (16, 16), g)(x) for x in (synthetic.images[index], synthetic.images_oe[index_oe])]
            torch.testing.assert_close(images, torch.cat(parts))
            assert torch.equal(labels, synthetic.labels[index])
    assert len(trained) == 6
    calls = []
    monkeypatch.setattr(method, "_train_network", lambda g: calls.append(g.initial_seed()))
    method.iterate(7)
    assert calls == [generator(1, "match", 0, "inner", 7, outer).initial_seed() for outer in range(3)]


@pytest.mark.parametrize(("name", "kind"), [("gauss-speckle", torch.randn), ("uniform-speckle", torch.rand)])
def test_noise_on_a_gpu_depends_on_one_number_alone(name, kind, monkeypatch):
    asked = []
    monkeypatch.setattr(corruptions, "noise", lambda *of: (asked.append(of), torch.zeros(of[1], device="meta"))[1])
    for seed in (2, 2, 3):
        corrupt(torch.zeros(4, 3, 8, 8, device="meta"), name, generator(seed))
    first, again, other = asked
    assert first == again
    assert first[:2] == other[:2] == (kind, (4, 3, 8, 8))
    assert first[2] != other[2]
    images = torch.rand(4, 3, 8, 8, generator=generator(1))
    drawn = noise(kind, (4, 3, 8, 8), first[2], torch.device("cpu"))
    assert torch.equal(drawn, kind((4, 3, 8, 8), generator=torch.Generator().manual_seed(first[2])))
    expected = (images + images * drawn).clamp(0, 1)
    torch.testing.assert_close(corrupt(images, name, torch.Generator().manual_seed(first[2])), expected)


def test_tensors_in_tuples_are_sent_too(monkeypatch):
    draws = {"a": (torch.tensor([1]), [torch.tensor([2.0])]), "b": "text"}
    monkeypatch.setattr(transfer, "send", lambda tensor, device: tensor + 2)
    sent = transfer.send_draws(draws, torch.device("cuda"))
    assert isinstance(sent["a"], tuple)
    assert (sent["a"][0].item(), sent["a"][1][0].item(), sent["b"]) == (3, 4.0, "text")
    assert [sent["a"][0].dtype, sent["a"][1][0].dtype] == [torch.int64, torch.float32]


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False)])
def test_only_towards_a_gpu_the_host_does_not_wait(device, waits, monkeypatch):
    """Towards the CPU it would read numbers that are not there yet."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: (asked.append(kwargs), self)[1])
    transfer.send(torch.zeros(1), torch.device(device))
    assert asked == ([{}] if waits else [{"non_blocking": True}])


def test_matrix_products_of_corruptions_keep_float32_on_cuda():
    """TF32 has ten bits: `pixelate` would then differ from PIL by more than 1/255."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert product_dtype(torch.float32, cuda) == torch.float64
    assert product_dtype(torch.float32, cpu) == torch.float32
