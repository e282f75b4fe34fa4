"""What is drawn for a whole iteration is what is drawn one by one, by key."""

from dataclasses import replace

import pytest
import torch
from conftest import made, named

from utils.compute import transfer
from utils.compute.transfer import Draw, product_dtype
from utils.core.rng import generator, noise
from utils.data.augment import DSA, DSA_ENTRIES
from utils.methods import learnable
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.methods.learnable import IterationDraws
from utils.outliers.corruptions import Corruption, corrupt, draw_corruption
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


def equal(a, b) -> bool:
    """The same structure with the same numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple, dict)):
        return len(a) == len(b) and all(equal(a[k], b[k]) for k in (a if isinstance(a, dict) else range(len(a))))
    return equal(vars(a), vars(b)) if isinstance(a, Draw) else a == b


def test_every_draw_has_its_key(method):
    """By hand: the generators of `utils.core.rng`, one for each thing that is random."""
    steps = list(method.draws.steps(0, 7, method.synthetic()))
    assert [len(step.epochs) for step in steps] == [3, 3, 3, 0]
    for outer, step in enumerate(steps):
        for slot in range(3):

            def keyed(what, *key):
                return generator(1, "match", 0, what, 7, *key)

            indices = method.real.class_indices[slot]
            order = torch.randperm(len(indices), generator=keyed("real", outer, slot))
            assert torch.equal(step.images[slot].real, indices[order[:4]])
            assert equal(step.images[slot].transform, STRATEGY.draw(1, (16, 16), keyed("siamese", outer, slot)))
            expected = method.outliers.choose(slot, 5, keyed("real oe", outer, slot))
            assert equal(step.outliers[slot].real, expected)
            assert equal(step.outliers[slot].transform, STRATEGY.draw(1, (16, 16), keyed("siamese oe", outer, slot)))
        assert len(step.batchnorm) == sum(min(16, len(i)) for i in method.real.class_indices)
        g = generator(1, "match", 0, "inner", 7, outer)
        for (batch,) in step.epochs:
            assert torch.equal(batch.index, torch.randperm(6, generator=g))
            assert torch.equal(batch.index_oe, torch.randperm(6, generator=g))
            assert equal(batch.transform, STRATEGY.draw(6, (16, 16), g))
            assert equal(batch.transform_oe, STRATEGY.draw(6, (16, 16), g))


def test_one_transfer_of_each_type_for_an_iteration(method, monkeypatch):
    sent = []
    monkeypatch.setattr(transfer, "send", lambda t, device: (sent.append(t.dtype), t)[1])
    cuda = torch.device("cuda")
    monkeypatch.setattr(learnable, "send_draws", lambda draws, device: transfer.send_draws(draws, cuda))
    step_by_step = list(method.draws.steps(0, 0, method.synthetic()))
    assert not sent
    method.draws.together = True  # as for a GPU
    assert equal(list(method.draws.steps(0, 0, method.synthetic())), step_by_step)
    assert sorted(map(str, sent)) == ["torch.float32", "torch.int64"]


def test_drawn_ahead_is_drawn_in_time(method, monkeypatch):
    expected = list(method.draws.steps(0, 3, method.synthetic()))
    method.draws.together = True  # as for a GPU
    method.draws.look_ahead(0, 3, method.synthetic())
    with monkeypatch.context() as patch:
        patch.setattr(IterationDraws, "_step", None)  # nothing is drawn again
        assert equal(list(method.draws.steps(0, 3, method.synthetic())), expected)
    method.draws.look_ahead(0, 5, method.synthetic())  # for another iteration than the one that comes
    assert equal(list(method.draws.steps(0, 3, method.synthetic())), expected)
    assert method.draws.ahead is None


@pytest.mark.parametrize(("name", "kind"), [("gauss-speckle", torch.randn), ("uniform-speckle", torch.rand)])
def test_noise_of_a_draw_depends_on_its_seed_alone(tiny_real, name, kind):
    images = tiny_real.images_train / 255
    drawn = draw_corruption(name, tuple(images.shape), generator(2), torch.device("cuda"))
    assert isinstance(drawn.drawn, int)
    n = kind(images.shape, generator=torch.Generator().manual_seed(drawn.drawn))
    torch.testing.assert_close(drawn(images), (images + images * n).clamp(0, 1))
    assert torch.equal(drawn(images), drawn(images))
    assert not torch.equal(drawn(images), replace(drawn, drawn=drawn.drawn + 1)(images))
    assert equal(Corruption(name, n)(images), corrupt(images, name, torch.Generator().manual_seed(drawn.drawn)))
    assert noise(kind, (2, 3), 5, torch.device("cpu")).shape == (2, 3)


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
