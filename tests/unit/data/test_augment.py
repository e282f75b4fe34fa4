"""Augmentation against formulas, slow loops, `affine_grid` by hand and finite differences."""

import math
from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.core.rng import generator
from utils.data import augment
from utils.data.augment import DC, DSA, DSA_ENTRIES, apply_by_slot, bilinear
from utils.settings.common import strategy

FULL = tuple(DSA_ENTRIES)
DC_ENTRIES = ("crop", "scale", "rotate", "noise")
SIZE = (12, 10)


def images(n=4, c=3, dtype=torch.float64):
    return torch.rand(n, c, *SIZE, generator=generator(0, "images"), dtype=dtype)


def test_color_formula():
    x, u = images().numpy(), torch.rand(4, 3, generator=generator(1), dtype=torch.float64)
    out = augment.color(torch.from_numpy(x), u).numpy()
    for i, (b, s, c) in enumerate(u.numpy()):
        y = x[i] + (b - 0.5)
        m = y.mean(0, keepdims=True)
        y = (y - m) * (2 * s) + m
        m = y.mean()
        np.testing.assert_allclose(out[i], (y - m) * (c + 0.5) + m, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4])
def test_crop_by_loop(n):
    x, offset = images(), torch.tensor([[2, -1], [0, 3], [-2, -2], [1, 0]])[:n]
    out = augment.shift(x, offset)
    for i in range(4):
        dr, dc = offset[i % n].tolist()
        for r in range(SIZE[0]):
            for c in range(SIZE[1]):
                inside = 0 <= r + dr < SIZE[0] and 0 <= c + dc < SIZE[1]
                expected = x[i, :, r + dr, c + dc] if inside else torch.zeros(3, dtype=x.dtype)
                assert torch.equal(out[i, :, r, c], expected)


def test_crop_range_is_whole_and_uniform():
    draws = torch.cat([DSA(("crop",)).draw(500, (32, 16), generator(i)).params for i in range(20)])
    rows, cols = draws.T
    assert sorted(set(rows.tolist())) == list(range(-4, 5))  # int(32·0.125+0.5) = 4
    assert sorted(set(cols.tolist())) == list(range(-2, 3))
    assert (rows.add(4).bincount() / len(rows) - 1 / 9).abs().max() < 0.02


@pytest.mark.parametrize("centre", [(0, 0), (6, 5), (12, 10), (3, 10)])
def test_cutout_by_loop(centre):
    x = images() + 1
    out = augment.cutout(x, torch.tensor([centre]))
    sides = [int(s * 0.5 + 0.5) for s in SIZE]
    for r in range(SIZE[0]):
        for c in range(SIZE[1]):
            zero = all(m - s // 2 <= p < m - s // 2 + s for p, m, s in zip((r, c), centre, sides, strict=True))
            assert torch.equal(out[:, :, r, c], torch.zeros_like(x[:, :, r, c]) if zero else x[:, :, r, c])


def test_flip():
    x = images()
    out = augment.flip(x, torch.tensor([0.1, 0.5, 0.49, 0.9]))
    for i, flipped in enumerate((True, False, True, False)):
        assert torch.equal(out[i], x[i].flip(2) if flipped else x[i])


@pytest.mark.parametrize("entry", ["scale", "rotate"])
def test_affine_entries_by_hand(entry):
    """Bilinear sampling with zeros outside, written as a loop over pixels in [-1, 1] coordinates."""
    x = images(2)
    draw = DSA((entry,)).draw(2, SIZE, generator(5))
    out = draw(x)
    h, w = SIZE
    for i in range(2):
        (a, b, _), (c, d, _) = draw.params[i].double().tolist()
        for r in range(h):
            for q in range(w):
                px, py = 2 * q / (w - 1) - 1, 2 * r / (h - 1) - 1
                sx, sy = (a * px + b * py + 1) * (w - 1) / 2, (c * px + d * py + 1) * (h - 1) / 2
                value = torch.zeros(3, dtype=x.dtype)
                for yy in (math.floor(sy), math.floor(sy) + 1):
                    for xx in (math.floor(sx), math.floor(sx) + 1):
                        if 0 <= yy < h and 0 <= xx < w:
                            value += (1 - abs(sy - yy)) * (1 - abs(sx - xx)) * x[i, :, yy, xx]
                torch.testing.assert_close(out[i, :, r, q], value, atol=1e-9, rtol=0)


def test_affine_parameters():
    scale = torch.cat([DSA(("scale",)).draw(100, SIZE, generator(i)).params for i in range(50)])
    for axis in (0, 1):
        factor = scale[:, axis, axis]
        assert 1 / 1.2 <= factor.min() < 0.84
        assert 1.19 < factor.max() <= 1.2
    assert (scale[:, 0, 0] - scale[:, 1, 1]).abs().max() > 0.1  # the axes are drawn apart
    rotate = torch.cat([DSA(("rotate",)).draw(100, SIZE, generator(i)).params for i in range(50)])
    angle = torch.rad2deg(torch.atan2(rotate[:, 1, 0], rotate[:, 0, 0]))
    assert 14.5 < angle.abs().max() <= 15
    torch.testing.assert_close(rotate[:, :, :2] @ rotate[:, :, :2].mT, torch.eye(2).expand(5000, 2, 2))


def test_affine_agrees_with_torch():
    x = images(3, dtype=torch.float32)
    draw = DSA(("rotate",)).draw(1, SIZE, generator(2))
    grid = F.affine_grid(draw.params.expand(3, 2, 3), x.shape, align_corners=True)
    assert torch.equal(draw(x), F.grid_sample(x, grid, align_corners=True))


@pytest.mark.parametrize("entry", FULL)
def test_one_draw_changes_both_batches_alike(entry):
    """One draw does the same to every image and to both batches; as many draws as images differ between images."""
    same = images(1).expand(6, -1, -1, -1)
    siamese = [DSA((entry,)).draw(1, SIZE, generator(i)) for i in range(8)]
    for draw in siamese:
        real, synthetic = draw(same), draw(same[:2])
        assert torch.equal(real[0].expand_as(real), real)
        assert torch.equal(real[:2], synthetic)
    plain = [DSA((entry,)).draw(6, SIZE, generator(i))(same) for i in range(8)]
    assert any(not torch.equal(out[0].expand_as(out), out) for out in plain)


@pytest.mark.parametrize("entry", FULL)
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_by_finite_differences(entry, n):
    x = torch.rand(3, 2, 5, 6, generator=generator(7), dtype=torch.float64, requires_grad=True)
    draw = DSA((entry,)).draw(n, (5, 6), generator(11))
    assert torch.autograd.gradcheck(draw, (x,))


def test_dc_gradients_by_finite_differences():
    x = torch.rand(6, 2, 9, 9, generator=generator(7), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(DC(DC_ENTRIES).draw(6, (9, 9), generator(1)), (x,))


def test_entries_are_picked_uniformly():
    picks = [DSA(FULL).draw(1, SIZE, generator(i)).entry for i in range(3000)]
    for entry in FULL:
        assert abs(picks.count(entry) / 3000 - 1 / 6) < 0.03


def test_apply_by_slot_equals_the_loop():
    x = torch.rand(9, 4, 3, *SIZE, generator=generator(3))
    draws = [DSA(FULL).draw(1, SIZE, generator(i)) for i in range(9)]
    expected = torch.stack([draw(part) for draw, part in zip(draws, x, strict=True)])
    torch.testing.assert_close(apply_by_slot(x, draws), expected, atol=1e-6, rtol=1e-6)


def test_dc_entries_one_per_image():
    x = images(8)
    draw = DC(DC_ENTRIES).draw(8, SIZE, generator(4))
    out, mean = draw(x), x.mean((2, 3), keepdim=True)
    for i, choice in enumerate(draw.choice.tolist()):
        entry = DC_ENTRIES[choice]
        if entry == "crop":
            dr, dc = draw.params["crop"][i].tolist()
            expected = mean[i].expand_as(x[i]).clone()
            rows = [r for r in range(SIZE[0]) if 0 <= r + dr < SIZE[0]]
            cols = [c for c in range(SIZE[1]) if 0 <= c + dc < SIZE[1]]
            for r in rows:
                for c in cols:
                    expected[:, r, c] = x[i, :, r + dr, c + dc]
        elif entry == "noise":
            assert 0 < (out[i] - x[i]).std() < 0.002
            continue
        else:
            grid = F.affine_grid(draw.params[entry][i][None].double(), (1, 3, *SIZE), align_corners=True)
            expected = (F.grid_sample((x[i] - mean[i])[None], grid, align_corners=True) + mean[i])[0]
        torch.testing.assert_close(out[i], expected)
    assert len(set(draw.choice.tolist())) > 1


def test_dc_strategy_by_data_set():
    assert augment.dc_augmentation("MNIST", "ConvNet").strategy == ("crop", "scale", "rotate")
    for dataset in ("CIFAR10", "MNIST"):
        assert augment.dc_augmentation(dataset, "ConvNetBN").strategy == ("crop", "noise")
    assert augment.dc_augmentation("CIFAR10", "ConvNet") is None


def test_unknown_entry():
    with pytest.raises(ArgumentTypeError, match="unknown entry 'cutot'; did you mean cutout"):
        strategy("color_cutot")


@pytest.mark.parametrize("entry", ["scale", "rotate"])
def test_deterministic_sampling_by_torch(entry):
    """The sampling of `--deterministic` gives the images and the gradients of `grid_sample`."""
    images = torch.randn(3, 2, 7, 9, dtype=torch.float64, generator=generator(0), requires_grad=True)
    theta = DSA((entry,)).draw(3, (7, 9), generator(1)).params.double()
    grid = F.affine_grid(theta, [3, 2, 7, 9], align_corners=True)
    expected = F.grid_sample(images, grid, padding_mode="zeros", align_corners=True)
    found = bilinear(images, grid)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=generator(2))
    grads = [torch.autograd.grad((out * weights).sum(), images)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)
