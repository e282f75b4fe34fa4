"""What goes beyond the published method: how outliers start, and where they are kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import made, named

from networks import get_network
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import DSA, DSA_ENTRIES
from utils.data.synthetic import SyntheticSet
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.outliers.corruptions import corrupt, corrupt_mixed
from utils.outliers.sources import PseudoOutliers, distinct, k_center_outliers
from utils.training.coresets import k_center

STRATEGY = DSA(tuple(DSA_ENTRIES))
SETTINGS = GradientSettings(
    model="ConvNetD1", ipc=2, seed=4, batch_real=6, batch_oe=5, init="real", dsa_strategy=named(STRATEGY)
)
METHODS = {"DSA": GradientMatching, "DM": DistributionMatching}


# --- mixed corruptions -----------------------------------------------------------------------------------------------


def test_mixed_corruptions_by_a_slow_loop():
    images = torch.rand(60, 3, 16, 16, generator=generator(0))
    before, names = images.clone(), ("jigsaw", "invert", "pixelate")
    out = corrupt_mixed(images, names, generator(1))
    assert torch.equal(images, before)
    used = []
    for one, result in zip(images, out, strict=True):
        found = [name for name in names if torch.allclose(corrupt(one[None], name)[0], result, atol=1e-6)]
        assert len(found) == 1
        used += found
    assert all(10 <= used.count(name) <= 30 for name in names)


def test_noise_of_mixed_corruptions_repeats_with_the_seed():
    images = torch.rand(8, 3, 16, 16, generator=generator(0))
    names = ("gauss-speckle", "avg-mean")
    first, again, other = (corrupt_mixed(images, names, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_source_of_mixed_corruptions(tiny_real):
    source = PseudoOutliers(tiny_real, ("jigsaw", "invert"), mixed=True)
    drawn = source.draw(0, 30, generator(1))
    pixels = tiny_real.images_train[distinct(source.per_slot(), 30, generator(1))] / 255
    accepted = [tiny_real.normalize(corrupt(pixels, name)) for name in ("jigsaw", "invert")]
    nearest = [min(range(2), key=lambda k: (accepted[k][i] - image).abs().max()) for i, image in enumerate(drawn)]
    for k, i, image in zip(nearest, range(30), drawn, strict=True):
        assert (accepted[k][i] - image).abs().max() < 1e-5
    assert {*nearest} == {0, 1}
    assert source.describe() == {"kind": "poe", "corruptions": ["jigsaw", "invert"], "mixed": True}
    assert "mixed" not in PseudoOutliers(tiny_real).describe()


# --- the start and the range of outliers -----------------------------------------------------------------------------


def test_k_center_beside_points_chosen_before():
    points, before = (torch.randn(n, 4, generator=generator(n)) for n in (30, 3))
    chosen, centres = [], before.numpy()
    for _ in range(5):  # brute force: the point whose nearest centre is farthest
        distances = [min(np.linalg.norm(p - c) for c in centres) for p in points.numpy()]
        chosen.append(int(np.argmax(distances)))
        centres = np.vstack([centres, points[chosen[-1]].numpy()])
    assert k_center(points, 5, before).tolist() == chosen


def test_outliers_that_start_far_apart(digits):
    """Each slot's are of its corruption; all are farther apart, in the features, than random ones."""
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0)).eval()
    source = PseudoOutliers(digits, ("jigsaw", "invert"))
    chosen = k_center_outliers(source, 2, net, 1, 0).unflatten(0, (10, 2))
    assert chosen.shape == (10, 2, 1, 8, 8)
    pixels = digits.unit_train(torch.arange(len(digits.images_train)))
    for slot in range(10):
        accepted = digits.normalize(corrupt(pixels, ("jigsaw", "invert")[slot % 2]))
        for outlier in chosen[slot]:
            assert (accepted - outlier).abs().flatten(1).amax(1).min() < 1e-5

    def least_distance(images: torch.Tensor) -> float:
        with torch.no_grad():
            features = F.normalize(net.embed(images.flatten(0, 1)).flatten(1))
        return float(torch.pdist(features).min())

    random = torch.stack([source.draw(slot, 2, generator(9, slot)) for slot in range(10)])
    assert least_distance(chosen) > 2 * least_distance(random)


@pytest.mark.parametrize("kind", METHODS)
def test_kcenter_starts_depend_on_seed_and_experiment(tiny_real, kind, monkeypatch):
    monkeypatch.setattr("utils.outliers.sources.CANDIDATES", 120)  # as many as there are images
    monkeypatch.setattr("utils.training.coresets.SMALL_EPOCHS", 3)

    def start(seed: int, exp: int, init_oe: str) -> SyntheticSet:
        noisy = PseudoOutliers(tiny_real, ("gauss-speckle",))  # no two draws are the same
        method = made(METHODS[kind], tiny_real, noisy, replace(SETTINGS, seed=seed, init_oe=init_oe))
        method.start(exp)
        return method.synthetic()

    first, again, seed, exp = (start(s, e, "kcenter") for s, e in ((1, 0), (1, 0), (2, 0), (1, 1)))
    plain = start(1, 0, "random")
    assert torch.equal(first.images_oe, again.images_oe)
    assert torch.equal(first.images, plain.images)
    for other in (seed, exp, plain):
        assert not torch.equal(first.images_oe, other.images_oe)


def images_of(real, ipc: int = 2) -> SyntheticSet:
    index = torch.cat([i[:ipc] for i in real.class_indices])
    return SyntheticSet(real.train_batch(index), real.labels_train[index], real.train_batch(index + 1))


def test_a_distilled_set_is_a_start_of_its_own(tiny_real):
    start = images_of(tiny_real)
    settings = replace(SETTINGS, init_oe="kcenter")
    with pytest.raises(UserError, match="--init_oe kcenter: the outliers start as those of --load_path"):
        made(DistributionMatching, tiny_real, PseudoOutliers(tiny_real), settings, initial=[start])


@pytest.mark.parametrize("kind", METHODS)
def test_outliers_stay_in_the_range_of_pixels(tiny_real, kind):
    """After each update they are those of the free update, clipped."""
    found = []
    for clamp in (False, True):
        settings = replace(SETTINGS, lr_img_oe=50.0, clamp_oe=clamp)
        method = made(METHODS[kind], tiny_real, PseudoOutliers(tiny_real), settings)
        method.start(0)
        method.iterate(0)
        found.append(method.synthetic())
    free, kept = (tiny_real.denormalize(s.images_oe) for s in found)
    raw = found[0].images_oe * torch.tensor(tiny_real.std)[:, None, None]
    raw += torch.tensor(tiny_real.mean)[:, None, None]
    assert raw.min() < -0.1 or raw.max() > 1.1
    torch.testing.assert_close(kept, raw.clamp(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(kept, free.clamp(0, 1), atol=1e-5, rtol=0)
    assert torch.equal(found[0].images, found[1].images)


# --- flags -----------------------------------------------------------------------------------------------------------

SHORT = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 2, "--init", "real", "--batch_real", 16]
SHORT += ["--dsa_strategy", "crop_scale", "--Iteration", 2, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 2]


@pytest.mark.parametrize("method", METHODS)
def test_all_flags_of_outliers_through_stage_1(in_process, tmp_path, monkeypatch, method):
    monkeypatch.setattr("utils.training.coresets.SMALL_EPOCHS", 5)
    flags = ["--init_oe", "kcenter", "--clamp_oe", "--mix_corruptions"]
    flags += [] if method == "DM" else ["--outer_loop", 1]
    out = in_process("main_poe.py", *SHORT, "--batch_oe", 8, "--method", method, *flags)
    assert "loss_oe" in out
    (path,) = tmp_path.glob("result-poe/*/Digits/ConvNetD1/2/*/res_*.pt")
    content = torch.load(path, weights_only=True)
    std, mean = (torch.tensor(content["normalisation"][name]) for name in ("std", "mean"))
    pixels = content["data_oe"][0][0] * std + mean
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("main_poe.py", ["--method", "DM", "--init_oe", "kcenter", "--init", "noise"], "--init_oe kcenter: its"),
        ("main_poe.py", ["--method", "DM", "--clamp_oe", "--zca"], "--clamp_oe: whitened images"),
    ],
)  # fmt: skip
def test_flags_that_contradict_each_other(refused, tmp_path, name, flags, message):
    short = [f for f in SHORT if f not in ("--batch_real", 16)]
    assert message in refused(name, *short, *flags)
    assert not list(tmp_path.iterdir())
