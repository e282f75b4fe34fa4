"""What goes beyond the published method: how outliers start, where they are kept, and networks that are trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import made, named, whole_and_resumed

from networks import get_network, initialize
from utils.compute.device import Compute
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import DSA, parse_strategy
from utils.data.synthetic import SyntheticSet
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.outliers.corruptions import MixedCorruption, corrupt, draw_mixed
from utils.outliers.sources import PseudoOutliers, k_center_outliers
from utils.training.coresets import k_center
from utils.training.network_pool import NetworkPool
from utils.training.trainer import TrainSettings

STRATEGY = DSA(parse_strategy("color_crop_cutout_flip_scale_rotate"))
SETTINGS = GradientSettings(
    model="ConvNetD1", ipc=2, seed=4, batch_real=6, batch_oe=5, init="real", dsa_strategy=named(STRATEGY)
)
METHODS = {"DSA": GradientMatching, "DM": DistributionMatching}


# --- mixed corruptions -----------------------------------------------------------------------------------------------


def test_mixed_corruptions_by_a_slow_loop():
    images = torch.rand(60, 3, 16, 16, generator=generator(0))
    before, names = images.clone(), ("jigsaw", "invert", "pixelate")
    drawn = draw_mixed(names, tuple(images.shape), generator(1), images.device)
    out = drawn(images)
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
    first, again, other = (draw_mixed(names, (8, 3, 16, 16), generator(s), images.device)(images) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_source_of_mixed_corruptions(tiny_real):
    source = PseudoOutliers(tiny_real, ("jigsaw", "invert"), mixed=True)
    drawn = source.choose(0, 30, generator(1))
    assert isinstance(drawn.corruption, MixedCorruption)
    pixels = tiny_real.images_train[drawn.index] / 255
    accepted = [tiny_real.normalize(corrupt(pixels, name)) for name in ("jigsaw", "invert")]
    for i, image in enumerate(source.batch(drawn)):
        assert min((a[i] - image).abs().max() for a in accepted) < 1e-5
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
def test_kcenter_starts_depend_on_seed_and_experiment(tiny_real, kind):

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


# --- the pool of networks --------------------------------------------------------------------------------------------


def images_of(real, ipc: int = 2) -> SyntheticSet:
    index = torch.cat([i[:ipc] for i in real.class_indices])
    return SyntheticSet(real.train_batch(index), real.labels_train[index], real.train_batch(index + 1))


def make_pool(real, size: int = 2, epochs: int = 2, last: int = 6) -> NetworkPool:
    return NetworkPool(real, "ConvNetD1", size, epochs, last, TrainSettings(1, 0.05, batch=64), 3, Compute())


def trained(state: dict, real, synthetic: SyntheticSet, epochs: int) -> dict:
    """A network from `state`, trained by the slow way: whole batches, SGD with momentum by PyTorch."""
    net = get_network("ConvNetD1", 3, 3, (16, 16), generator(0))
    net.load_state_dict(state)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        logits, rest = net(synthetic.images), net(synthetic.images_oe)
        loss = F.cross_entropy(logits, synthetic.labels) - 0.5 * F.log_softmax(rest, 1).mean(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict()


def fresh(real, exp: int, it: int) -> dict:
    net = get_network("ConvNetD1", 3, 3, (16, 16), generator(0))
    initialize(net, generator(3, "pool", exp, it))
    return net.state_dict()


def close(a: dict, b: dict) -> bool:
    return all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_networks_take_turns_and_are_replaced(tiny_real):
    """Turn 0 is trained by 2 epochs each time; turn 1 begins with 3 more; with 6 or more a network is replaced."""
    synthetic, pool = images_of(tiny_real), make_pool(tiny_real)
    expected, ages = [None, None], [0, 0]
    for it in range(9):
        turn = it % 2
        head_start = 3 * turn if expected[turn] is None else 0
        if expected[turn] is None or ages[turn] >= 6:
            expected[turn], ages[turn] = fresh(tiny_real, 5, it), 0
        expected[turn] = trained(expected[turn], tiny_real, synthetic, 2 + head_start)
        ages[turn] += 2 + head_start
        found = pool.next_network(5, it, synthetic)
        assert close(found, expected[turn])
        assert pool.ages == ages
        expected[turn] = {name: t.clone() for name, t in found.items()}  # rounding does not add up
    assert not close(pool.states[0], pool.states[1])


@pytest.mark.parametrize("kind", METHODS)
def test_a_pool_resumes_with_the_same_bits(tiny_real, kind):
    settings = replace(SETTINGS, network_pool=2, pool_epochs=2, pool_last_epoch=4, clamp_oe=True)

    def make():
        return made(METHODS[kind], tiny_real, PseudoOutliers(tiny_real), settings)

    whole, second = whole_and_resumed(make, stop=3, end=6)
    for a, b in ((whole.image_syn, second.image_syn), (whole.image_oe, second.image_oe)):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="1 networks instead of 2"):
        second.load_state_dict(0, second.state_dict() | {"pool": {"networks": [None], "ages": [0]}})


@pytest.mark.parametrize("kind", METHODS)
def test_another_experiment_has_other_networks(tiny_real, kind):
    method = made(
        METHODS[kind],
        tiny_real,
        PseudoOutliers(tiny_real),
        replace(SETTINGS, network_pool=2, pool_epochs=1, pool_last_epoch=4),
    )
    method.start(0)
    method.iterate(0)
    first = method.pool.states[0]
    method.start(1)
    assert method.pool.states == [None, None]
    method.iterate(0)
    assert not close(first, method.pool.states[0])


# --- flags -----------------------------------------------------------------------------------------------------------

SHORT = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 2, "--init", "real", "--batch_real", 16]
SHORT += ["--dsa_strategy", "crop_scale", "--Iteration", 2, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 2]


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_through_stage_1(in_process, tmp_path, method):
    recipe = ["--init_oe", "kcenter", "--clamp_oe", "--mix_corruptions", "--network_pool", 2, "--pool_epochs", 1]
    recipe += [] if method == "DM" else ["--outer_loop", 1]
    out = in_process("main_poe.py", *SHORT, "--batch_oe", 8, "--method", method, *recipe)
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
        ("main.py", ["--method", "DM", "--pool_epochs", 3], "--pool_epochs: --network_pool 0 has no networks"),
        ("main_poe.py", ["--method", "MTT", "--network_pool", 2], "--network_pool: --method MTT does not use it"),
        ("main_poe.py", ["--method", "DM", "--init_oe", "kcenter", "--init", "noise"], "--init_oe kcenter: its"),
        ("main_poe.py", ["--method", "DM", "--clamp_oe", "--zca"], "--clamp_oe: whitened images"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_followed(refused, tmp_path, name, flags, message):
    short = [f for f in SHORT if f not in ("--batch_real", 16)]
    assert message in refused(name, *short, *flags)
    assert not list(tmp_path.iterdir())
