"""Images in parts: decoding and encoding against PIL and slow loops, gradients, and every method on them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import made
from PIL import Image

from networks import get_network, initialize
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet, as_parts, check_factor, decode, decode_slots, encode, on_stored
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.methods.trajectory_matching import TrajectoryMatching, TrajectorySettings
from utils.outliers.sources import PseudoOutliers


def images(n, height, width=None, channel=2):
    return torch.randn(n, channel, height, width or height, generator=generator(n, height))


def resized(plane, width, height, how):
    """A plane of numbers, resized by PIL."""
    return torch.from_numpy(np.array(Image.fromarray(plane.numpy(), mode="F").resize((width, height), how)))


@pytest.mark.parametrize(
    ("factor", "height", "width"), [(2, 8, 8), (2, 8, 12), (3, 9, 9), (2, 7, 5), (3, 8, 8), (4, 16, 8)]
)
def test_decoding_is_cutting_and_enlarging(factor, height, width):
    stored = images(3, height, width)
    found = decode(stored, factor, fill=0.25)
    rows, columns = -(-height // factor), -(-width // factor)
    padded = torch.full((3, 2, rows * factor, columns * factor), 0.25)
    padded[:, :, :height, :width] = stored
    expected = []
    for i in range(factor):
        for j in range(factor):
            for image in padded:
                part = image[:, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                expected.append(torch.stack([resized(p, width, height, Image.Resampling.BILINEAR) for p in part]))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("factor", "size"), [(2, 8), (3, 9), (4, 16)])
def test_encoding_is_shrinking_by_area(factor, size):
    whole = images(2 * factor**2, size)
    stored, part = encode(whole, factor), size // factor
    assert stored.shape == (2, 2, size, size)
    for number, image in enumerate(whole):
        place, n = divmod(number, 2)
        i, j = divmod(place, factor)
        small = torch.stack([resized(p, part, part, Image.Resampling.BOX) for p in image])
        found = stored[n, :, i * part : (i + 1) * part, j * part : (j + 1) * part]
        torch.testing.assert_close(found, small, atol=1e-5, rtol=1e-5)
    assert torch.equal(as_parts(whole, factor), decode(stored, factor))


def test_parts_beyond_the_border_are_refused():
    """Those that decoding would only fill."""
    for side in (28, 32, 33):
        for factor in range(1, side // 2 + 1):
            if decode(torch.ones(1, 1, side, side), factor).flatten(1).amax(1).min() > 0:
                assert check_factor(factor, (side, side), "--factor") == factor
            else:
                with pytest.raises(UserError, match=f"--factor {factor}: images of {side}x{side} have no room"):
                    check_factor(factor, (side, side), "--factor")


def test_one_part_is_the_image():
    some = images(4, 6)
    for same in (decode(some, 1), encode(some, 1), as_parts(some, 1)):
        assert same is some


def test_the_gradient_on_stored_images():
    stored = images(6, 5).double().view(3, 2, 2, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decode_slots(x, 2), (stored,))
    weight = torch.randn_like(decode_slots(stored, 2))
    (expected,) = torch.autograd.grad((weight * decode_slots(stored, 2)).sum(), stored)
    torch.testing.assert_close(on_stored(stored, 2, weight), expected)


def test_slots_are_decoded_each_on_its_own():
    stored = images(6, 8).view(3, 2, 2, 8, 8)
    assert torch.equal(decode_slots(stored, 2), torch.stack([decode(of_slot, 2) for of_slot in stored]))


def test_a_set_in_parts(tiny_real, tmp_path):
    """Labels and outliers follow; the file gives the same set back."""
    labels = torch.arange(3).repeat_interleave(2)
    stored = SyntheticSet(images(6, 16, channel=3), labels, images(6, 16, channel=3) + 1, factor=2)
    seen = stored.decoded()
    assert (len(seen.images), seen.factor, seen.decoded() is seen) == (24, 1, True)
    for part, label in enumerate(seen.labels):
        assert label == labels[part % 6]
        assert torch.equal(seen.images_oe[part], decode(stored.images_oe, 2)[part])
    DistilledFile.write(tmp_path / "res_a.pt", [stored], {}, tiny_real, {})
    found = DistilledFile.open(tmp_path / "res_a.pt").set(0, tiny_real)
    assert found.factor == 2
    assert torch.equal(found.decoded().images, seen.images)


@pytest.mark.parametrize("factor", [0, 9, 2.0, "2", True, None])
def test_factors_that_are_damage(tiny_real, tmp_path, factor):
    stored = SyntheticSet(images(3, 16, channel=3), torch.arange(3))
    DistilledFile.write(tmp_path / "res_a.pt", [stored], {}, tiny_real, {})
    torch.save(torch.load(tmp_path / "res_a.pt", weights_only=True) | {"factor": factor}, tmp_path / "res_a.pt")
    with pytest.raises(UserError, match=r"res_a.pt is damaged: factor .*hold at most 8 parts a side"):
        DistilledFile.open(tmp_path / "res_a.pt").set(0)


def test_parts_that_are_too_small():
    assert check_factor(2, (5, 9), "--factor") == 2
    with pytest.raises(UserError, match="--factor 3: images of 5x9 hold at most 2 parts a side"):
        check_factor(3, (5, 9), "--factor")


class Ends:
    """Stands for experts: two sets of parameters."""

    trajectories = (None,)

    def __init__(self, net):
        self.ends = [initialize(net, generator(i)) and [p.detach().clone() for p in net.parameters()] for i in (1, 2)]

    def segment(self, g, max_start, length, device):
        return self.ends[0], [a + 0.1 * b for a, b in zip(*self.ends, strict=True)]

    def fingerprint(self):
        return ""


@pytest.mark.parametrize("kind", [GradientMatching, DistributionMatching, TrajectoryMatching])
def test_a_method_sees_the_parts(tiny_real, kind):
    """Its gradient is that on as many decoded images, brought back to the stored ones; so it is for outliers."""
    common = {"model": "ConvNetD1", "seed": 5, "init": "real", "lr_img": 0.1, "dsa_strategy": "color_crop_scale"}
    more = ()
    if kind is TrajectoryMatching:
        settings = TrajectorySettings(ipc=1, factor=2, syn_steps=3, lr_lr=0.0, **common)
        more = (Ends(get_network("ConvNetD1", 3, 3, (16, 16))),)
    else:
        settings = GradientSettings(ipc=1, factor=2, batch_real=6, batch_oe=5, outer_loop=1, spread_oe=1.0, **common)
    method = made(kind, tiny_real, PseudoOutliers(tiny_real), settings, *more)
    method.start(0)
    stored = [t.detach().clone() for t in (method.image_syn, method.image_oe)]
    seen = [decode_slots(t, 2) for t in stored]
    start = SyntheticSet(seen[0].flatten(0, 1), torch.arange(3).repeat_interleave(4), seen[1].flatten(0, 1))
    plain = made(kind, tiny_real, method.outliers, replace(settings, ipc=4, factor=1), *more, initial=[start])
    plain.start(0)
    found, expected = method.iterate(3), plain.iterate(3)
    torch.testing.assert_close(found["loss"], expected["loss"])
    for images_of, on_seen, before in zip(
        (method.image_syn, method.image_oe), (plain.image_syn.grad, plain.image_oe.grad), stored, strict=True
    ):
        expected = on_stored(before, 2, on_seen)
        assert (images_of.grad - expected).norm() < 1e-4 * expected.norm()
        torch.testing.assert_close(images_of.detach(), before - 0.1 * images_of.grad)
    assert method.synthetic().factor == 2


def test_real_images_in_parts_start_a_run(tiny_real):
    """The first ones of the same draw, shrunk."""
    settings = GradientSettings(model="ConvNetD1", ipc=2, factor=2, seed=3, init="real")
    method = made(DistributionMatching, tiny_real, PseudoOutliers(tiny_real), settings)
    method.start(1)
    for slot in range(3):
        drawn = tiny_real.choose(slot, 8, generator(3, "match", 1, "initial", "images", slot))
        assert torch.equal(method.image_syn[slot].detach(), encode(tiny_real.train_batch(drawn), 2))
    with pytest.raises(UserError, match=r"--ipc 4 --factor 2: the smallest class of tiny has 13 .*takes 16 of each"):
        made(DistributionMatching, tiny_real, None, replace(settings, ipc=4)).start(0)


def test_parts_that_cannot_be(tiny_real):
    settings = GradientSettings(model="ConvNetD1", ipc=1, factor=2, init="real")
    with pytest.raises(UserError, match="--factor 2: whitened images"):
        made(DistributionMatching, tiny_real.whitened(), None, settings)
    with pytest.raises(UserError, match="--factor 9: images of 16x16 hold at most 8"):
        made(DistributionMatching, tiny_real, None, replace(settings, factor=9))
