"""The corruptions against numpy and PIL; the pool and its slices."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.core.errors import UserError
from utils.core.pixels import conform
from utils.core.rng import generator
from utils.outliers.corruptions import CORRUPTIONS, DEFAULT_CORRUPTIONS, corrupt
from utils.outliers.sources import OutlierPool, PseudoOutliers, distinct, load_outlier_pool


def images(n=6, c=3, h=32, w=32) -> torch.Tensor:
    return torch.rand(n, c, h, w, generator=generator(0, c, h, w))


@pytest.mark.parametrize("c", [1, 3])
def test_jigsaw_by_numpy(c):
    for x, out in zip(images(c=c).numpy(), corrupt(images(c=c), "jigsaw").numpy(), strict=True):
        a, b, d = x[:, 8:16, :16], x[:, :8, :16], x[:, 16:, :16]
        e, f, g = x[:, 16:, 16:], x[:, :16, 24:], x[:, :16, 16:24]
        upper = np.concatenate([np.concatenate([a, b], 1), d], 2)
        lower = np.concatenate([e, np.concatenate([f, g], 2)], 2)
        np.testing.assert_array_equal(out, np.concatenate([upper, lower], 1))


@pytest.mark.parametrize(("h", "w"), [(8, 8), (28, 28), (30, 26), (33, 31), (5, 7), (64, 64)])
def test_jigsaw_moves_every_pixel_once(h, w):
    x = torch.arange(h * w, dtype=torch.float32).view(1, 1, h, w)
    out = corrupt(x, "jigsaw")
    assert torch.equal(out.flatten().sort().values, x.flatten())
    assert not torch.equal(out, x)


@pytest.mark.parametrize("c", [1, 3])
def test_invert_and_ghost_by_numpy(c):
    x = images(c=c).numpy()
    inverted, ghost = (corrupt(torch.from_numpy(x), name).numpy() for name in ("invert", "rgb-ghost"))
    if c == 1:
        np.testing.assert_array_equal(inverted, 1 - x)
        np.testing.assert_array_equal(ghost, x[..., ::-1])
        return
    np.testing.assert_array_equal(inverted, np.stack([x[:, 0], 1 - x[:, 1], 1 - x[:, 2]], 1))
    np.testing.assert_array_equal(ghost, np.stack([x[:, 1, :, ::-1], x[:, 2], x[:, 0]], 1))


@pytest.mark.parametrize(("h", "w"), [(32, 32), (28, 28), (8, 8), (64, 64), (33, 47)])
def test_pixelate_agrees_with_pil(h, w):
    pixels = torch.randint(0, 256, (4, 3, h, w), dtype=torch.uint8, generator=generator(h, w))
    ours = corrupt(pixels / 255, "pixelate").permute(0, 2, 3, 1).numpy()
    small = (max(int(0.2 * w), 1), max(int(0.2 * h), 1))
    for image, out in zip(pixels.permute(0, 2, 3, 1).numpy(), ours, strict=True):
        pil = Image.fromarray(image).resize(small, Image.Resampling.BOX).resize((w, h), Image.Resampling.BOX)
        assert np.abs(np.asarray(pil) / 255 - out).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(("name", "draw"), [("gauss-speckle", torch.randn), ("uniform-speckle", torch.rand)])
def test_speckle_formula(name, draw):
    x = images()
    n = draw(x.shape, generator=generator(5)).numpy()
    expected = np.clip(x.numpy() + x.numpy() * n, 0, 1)
    np.testing.assert_allclose(corrupt(x, name, generator(5)).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("name", ["avg-mean", "geo-mean"])
def test_means_are_with_another_image(name):
    x = images(12)
    out = corrupt(x, name, generator(3)).numpy()
    partners = []
    for i in range(12):
        pairs = [(x[i] + x[j]) / 2 if name == "avg-mean" else (x[i] * x[j]).sqrt() for j in range(12)]
        errors = [np.abs(out[i] - p.numpy()).max() for p in pairs]
        partners.append(int(np.argmin(errors)))
        assert min(errors) < 1e-6
    assert all(i != j for i, j in enumerate(partners))
    assert len(set(partners)) == 12


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 3, 32, 32), (2, 3, 9, 11)])
def test_range_shape_repeatability_and_input_untouched(name, shape):
    x = torch.rand(shape, generator=generator(1))
    before = x.clone()
    first, second = corrupt(x, name, generator(2)), corrupt(x, name, generator(2))
    assert first.shape == x.shape
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6
    assert torch.equal(first, second)
    assert torch.equal(x, before)


def test_unknown_corruption():
    with pytest.raises(UserError, match="did you mean pixelate"):
        corrupt(images(), "pixellate")


def test_pseudo_outliers_are_corrupted_training_images(tiny_real):
    source = PseudoOutliers(tiny_real, DEFAULT_CORRUPTIONS)
    out = source.draw(5, 8, generator(1))  # slot 5 takes number 1, invert
    everything = tiny_real.normalize(corrupt(tiny_real.images_train / 255, "invert"))
    found = [(everything - image).abs().amax((1, 2, 3)).min().item() for image in out]
    assert max(found) < 1e-5
    assert len(source.draw(0, 1000, generator(1))) == 40  # no more than there are, each once
    assert torch.equal(out, source.draw(5, 8, generator(1)))


def pool_file(tmp_path, n=50, side=16, name="pool.npy"):
    array = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    np.save(tmp_path / name, array)
    return tmp_path / name, array


def test_slices_are_disjoint_and_random(tiny_real, tmp_path):
    path, array = pool_file(tmp_path)
    pool = load_outlier_pool(path, tiny_real, 10, seed=1)
    chosen = pool.slices.flatten().tolist()
    assert len(set(chosen)) == 30
    assert chosen != sorted(chosen)
    assert pool.notice == ""
    drawn = pool.draw(2, 4, generator(0))
    mine = tiny_real.normalize(torch.from_numpy(array[pool.slices[2]]).permute(0, 3, 1, 2) / 255)
    assert all((mine - image).abs().amax((1, 2, 3)).min() < 1e-6 for image in drawn)
    assert not torch.equal(pool.slices, load_outlier_pool(path, tiny_real, 10, seed=2).slices)


def test_small_pool_shrinks_the_slices(tiny_real, tmp_path):
    path, _ = pool_file(tmp_path, n=50)
    pool = load_outlier_pool(path, tiny_real, 10_000, seed=1)
    assert pool.slices.shape == (3, 16)
    assert "shrink to 16" in pool.notice
    assert len(pool.draw(0, 256, generator(0))) == 16
    path, _ = pool_file(tmp_path, n=2, name="two.npy")
    with pytest.raises(UserError, match="has 2 images; 3 classes need"):
        load_outlier_pool(path, tiny_real, 1, seed=1)


def test_pool_formats_agree(tiny_real, tmp_path):
    path, array = pool_file(tmp_path, n=6)
    np.savez(tmp_path / "pool.npz", images=array)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, image in enumerate(array):
        Image.fromarray(image).save(tmp_path / "folder" / "deep" / f"{i}.png")
    pools = [load_outlier_pool(p, tiny_real, 2, 1) for p in (path, tmp_path / "pool.npz", tmp_path / "folder")]
    draws = [p.draw(1, 2, generator(4)) for p in pools]
    torch.testing.assert_close(draws[0], draws[1])
    torch.testing.assert_close(draws[0], draws[2])


def test_pool_is_brought_to_the_shape_of_the_data(digits, tmp_path):
    path, _ = pool_file(tmp_path, n=30, side=32)
    pool = load_outlier_pool(path, digits, 3, 1)
    assert isinstance(pool, OutlierPool)
    assert pool.draw(0, 2, generator(0)).shape == (2, 1, 8, 8)


def test_conform_by_pil():
    """Grey values by PIL's own formula, sizes by PIL's antialiased bilinear filter."""
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    pil = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    grey = np.asarray(pil.convert("L")) / 255
    assert np.abs(conform(pixels, 1, (32, 32))[0, 0].numpy() - grey).max() < 1.01 / 255
    small = np.asarray(pil.resize((8, 8), Image.Resampling.BILINEAR)) / 255
    assert np.abs(conform(pixels, 3, (8, 8))[0].permute(1, 2, 0).numpy() - small).max() < 1.5 / 255
    assert torch.equal(conform(pixels[:, :1], 3, (32, 32))[0, 2], pixels[0, 0] / 255)


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 3, 8, 8), np.uint8), np.zeros((4, 8, 8, 3), np.float32), np.zeros(5, np.uint8)]
)
def test_pool_of_the_wrong_shape(bad, tiny_real, tmp_path):
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(UserError, match=r"--oe_data_path: .*must be uint8"):
        load_outlier_pool(tmp_path / "bad.npy", tiny_real, 1, 1)


def test_pool_of_objects_is_not_unpickled(tiny_real, tmp_path):
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}] * 9, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read"):
        load_outlier_pool(tmp_path / "bad.npy", tiny_real, 1, 1)


@pytest.mark.parametrize("name", ["avg-mean", "geo-mean"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_single_outlier_is_a_mean_of_two_images(name, mixed, tiny_real):
    """At one image per class, too, no training image passes for an outlier."""
    source = PseudoOutliers(tiny_real, (name,), mixed)
    (out,) = source.draw(0, 1, generator(4))
    first, second = tiny_real.images_train[distinct(source.per_slot(), 2, generator(4))] / 255
    mean = (first + second) / 2 if name == "avg-mean" else (first * second).sqrt()
    torch.testing.assert_close(out, tiny_real.normalize(mean[None])[0])


def test_no_mixed_mean_leaves_an_image_as_it_is(tiny_real):
    source = PseudoOutliers(tiny_real, ("invert", "avg-mean", "geo-mean"), mixed=True)
    for seed in range(20):
        outliers = source.draw(0, 4, generator(seed))
        assert len(outliers) == 4
        images = tiny_real.normalize(tiny_real.images_train / 255)
        distances = torch.cdist(outliers.flatten(1), images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        assert distances.min() > 0.01
