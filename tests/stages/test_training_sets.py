"""What stage 2 trains on: baselines, soft labels, outliers that were not distilled, and publishing."""

import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import pairwise_distances

from networks import get_network
from scripts import runner, trust_report
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import as_parts, decode, encode
from utils.exchange.assumptions import Assumptions
from utils.exchange.convert import read_distilled
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS, corrupt
from utils.outliers.sources import (
    FreshOutliers,
    PseudoOutliers,
    corrupted,
    initial_outliers,
    k_center_outliers,
    with_fresh,
)
from utils.report.card import _command
from utils.report.results import load_results
from utils.settings.arguments import Stage2Settings
from utils.stages import loop
from utils.stages.stage2 import find_distilled
from utils.stages.training_set import _start_of, labelled_images, outlier_source, with_outliers
from utils.training.coresets import FeatureNetworks, coreset, herding, k_center, random_images
from utils.training.draws import draw_epoch, with_fresh_outliers
from utils.training.losses import joint_loss
from utils.training.trainer import Trainer, TrainSettings

AUGMENT = ["--method", "DSA", "--dsa_strategy", "color_crop_cutout_scale_rotate"]
COMMON = ["--dataset", "Digits", "--model", "ConvNetD1", *AUGMENT, "--compile", "off"]
QUICK = [*COMMON, "--num_eval", 1, "--epoch_eval_train", 3]
PLAIN, WITH_OE = "train_model_synthetic_no_oe.py", "train_model_synthetic_oe.py"


@pytest.fixture
def made(digits, tmp_path) -> Path:
    """A distilled set of Digits, ipc 2, with outliers, as stage 1 writes it."""
    images = random_images(digits, 2, 5, 0)
    outliers = PseudoOutliers(digits)
    images = replace(images, images_oe=torch.cat([outliers.draw(c, 2, generator(5, c)) for c in range(10)]))
    folder = tmp_path / "made"
    folder.mkdir()
    path = folder / "res_DSA_Digits_ConvNetD1_2ipc.pt"
    DistilledFile.write(path, [images], {}, digits, {"flags": {}})
    return path


def run_folder(root: Path) -> Path:
    (path,) = {p.parent for p in root.rglob("args.json")}
    return path


def network(root: Path) -> dict:
    (path,) = root.rglob("syn_trained_*_exp0_best.pt")
    return torch.load(path, weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- coresets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_herding_by_a_slow_loop(seed):
    points = np.random.default_rng(seed).normal(size=(20, 3))
    chosen: list[int] = []
    for _ in range(6):
        gaps = {i: np.linalg.norm(points.mean(0) - points[[*chosen, i]].mean(0)) for i in range(20) if i not in chosen}
        chosen.append(min(gaps, key=gaps.get))
    assert herding(torch.from_numpy(points), 6).tolist() == chosen


@pytest.mark.parametrize("seed", range(5))
def test_k_center_by_a_slow_loop_and_its_bound(seed):
    points = np.random.default_rng(seed).normal(size=(14, 3))
    distances = pairwise_distances(points)
    chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
    for _ in range(3):
        chosen.append(max(range(14), key=lambda i: min(distances[i][j] for j in chosen)))
    assert k_center(torch.from_numpy(points), 4).tolist() == chosen

    def radius(centres) -> float:
        return distances[:, list(centres)].min(1).max()

    best = min(map(radius, itertools.combinations(range(14), 4)))
    assert best <= radius(chosen) <= 2 * best


def test_equal_points_are_chosen_once_each():
    assert sorted(k_center(torch.zeros(5, 2), 5).tolist()) == list(range(5))
    assert sorted(herding(torch.zeros(5, 2), 5).tolist()) == list(range(5))


def test_random_images_depend_on_the_seed_and_are_of_their_class(digits):
    first, again, other = (random_images(digits, 3, seed, 0) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    real = {
        image.numpy().tobytes(): int(y)
        for image, y in zip(digits.normalize(digits.images_train), digits.labels_train, strict=True)
    }
    assert [real[image.numpy().tobytes()] for image in first.images] == first.labels.tolist()


@pytest.mark.parametrize("kind", ["herding", "kcenter"])
def test_coresets_are_chosen_in_unit_features_of_each_class(digits, kind):
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0)).eval()
    found = coreset(kind, digits, 4, net)
    assert found.labels.tolist() == [c for c in range(10) for _ in range(4)]
    for c in (0, 7):
        images = digits.train_batch(digits.class_indices[c])
        with torch.no_grad():
            features = net.embed(images).flatten(1)
        features = features / features.square().sum(1, keepdim=True).sqrt()
        chosen = {"herding": herding, "kcenter": k_center}[kind](features, 4)
        assert torch.equal(found.images[found.labels == c], images[chosen])


def test_baselines_run_and_their_features_are_kept(in_process, tmp_path, monkeypatch):
    """One network for features serves both coresets."""
    monkeypatch.setattr("utils.training.coresets.WHOLE_EPOCHS", 6)
    accuracy = {}
    for kind in ("random", "herding", "kcenter", "whole"):
        more = ["--epoch_eval_train", 30 if kind == "whole" else 60, "--ipc", 5, "--train_on", kind]
        more += ["--features", "herding/features"] if kind == "kcenter" else []
        text = in_process(PLAIN, *COMMON, "--num_eval", 1, *more, "--save_path", kind)
        accuracy[kind] = float(re.search(r"networks?: best ([\d.]+)", text)[1])
        assert "baseline: " in text
    assert accuracy["whole"] > max(accuracy[k] for k in ("random", "herding", "kcenter")) > 60
    (kept,) = (tmp_path / "herding" / "features").iterdir()
    flags = ["--ipc", 5, "--train_on", "herding", "--features", kept]
    in_process(PLAIN, *COMMON, "--num_eval", 1, "--epoch_eval_train", 60, *flags, "--save_path", "again")
    assert same(network(tmp_path / "herding"), network(tmp_path / "again"))
    in_process(
        "test_ood_model_syn.py",
        *COMMON[:6],
        "--ipc",
        5,
        "--num_exp",
        1,
        "--is_load_best",
        "--load_path",
        "whole",
        "--ood_sets",
        "patches",
    )


# --- soft labels -----------------------------------------------------------------------------------------------------


def test_gradient_of_soft_labels_by_its_formula():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, generator=g).requires_grad_()
    labels = torch.rand(5, 4, dtype=torch.float64, generator=g)
    labels /= labels.sum(1, keepdim=True)
    joint_loss(logits, labels, 0.5).backward()
    with torch.no_grad():
        odds = logits.exp()
        expected = (odds / odds.sum(1, keepdim=True) - labels) / 5
    assert torch.allclose(logits.grad, expected, atol=1e-12)


def test_training_on_soft_labels_calibrates_as_they_say(digits):
    """Labels that give their class half the probability make networks half confident."""
    images = random_images(digits, 5, 1, 0)
    soft = torch.full((50, 10), 0.5 / 9)
    soft[torch.arange(50), images.labels] = 0.5
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0))
    trainer = Trainer(net, TrainSettings(epochs=300))
    trainer.train(replace(images, labels=soft), 0, ())
    confidence = trainer.predict(images.images).softmax(1)[torch.arange(50), images.labels].mean().item()
    assert confidence == pytest.approx(0.5, abs=0.05)


# --- outliers --------------------------------------------------------------------------------------------------------


def test_initial_outliers_are_those_that_distillation_starts_from(in_process, tmp_path):
    flags = ["--ipc", 2, "--seed", 4]
    loop = ["--init", "real", "--Iteration", 0, "--num_exp", 2, "--num_eval", 1, "--epoch_eval_train", 1]
    in_process("main_poe.py", *COMMON, *flags, *loop, "--save_path", "one")
    (path,) = (tmp_path / "one").rglob("res_*.pt")
    training = [*QUICK, *flags, "--load_path", "one", "--exp_idx", 1]
    in_process(WITH_OE, *training, "--outliers", "initial", "--save_path", "initial")
    in_process(WITH_OE, *training, "--save_path", "distilled")
    stored = DistilledFile.open(run_folder(tmp_path / "initial") / "trained_on.pt").set()
    assert torch.equal(stored.images_oe, DistilledFile.open(path).set(1).images_oe)
    assert same(network(tmp_path / "initial"), network(tmp_path / "distilled"))


def test_feature_networks_of_whitened_images_are_others(digits, tmp_path, monkeypatch):
    """And the network that chooses outliers in float32 leaves TF32 to the run as it was."""
    monkeypatch.setattr("utils.training.coresets.SMALL_EPOCHS", 5)
    asked = []
    for real in (digits, digits.whitened(), digits):
        networks = FeatureNetworks("MLP", real, TrainSettings(1), 1, "off", "fp32")
        torch.set_float32_matmul_precision("high")
        try:
            trained = networks.train(random_images(real, 1, 1, 0))
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision("highest")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FeatureNetworks, "train", lambda self, *a, net=trained: asked.append(self.real) or net)
            networks.for_coresets(None, tmp_path)
    assert [real is digits for real in asked] == [True, False]


def test_a_class_that_is_too_small_is_told_before_networks_train(digits):
    settings = Stage2Settings(train_on="herding", outliers="none", ipc=10_000)
    with pytest.raises(UserError, match="--ipc 10000: the smallest class of Digits"):
        labelled_images(settings, digits, lambda: None, lambda: pytest.fail("a network was trained"))


def test_k_center_spreads_outliers(digits):
    """The chosen ones are farther apart, in the features in which they are chosen, than random ones."""
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0)).eval()
    source = PseudoOutliers(digits)
    chosen = k_center_outliers(source, 2, net, 1, together=True)
    random = torch.cat([source.draw(c, 2, generator(9, c)) for c in range(10)])

    def least_distance(images: torch.Tensor) -> float:
        with torch.no_grad():
            features = torch.nn.functional.normalize(net.embed(images).flatten(1))
        return float(np.sort(pairwise_distances(features.numpy()), 1)[:, 1].min())

    assert len(chosen) == 20
    assert least_distance(chosen) > 2 * least_distance(random)


def test_corrupted_images_of_the_set_itself(digits):
    """Slot c has corruption c mod 4 of distilled images; without noise they are found among these."""
    images = random_images(digits, 4, 1, 0)
    source = corrupted(images.images, digits, ("jigsaw", "invert"))
    fresh = with_fresh(images, source).fresh_oe
    first, again, other = (fresh.make(generator(1, key)) for key in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    pixels = digits.denormalize(images.images)
    for slot in range(10):
        accepted = digits.normalize(corrupt(pixels, ("jigsaw", "invert")[slot % 2]))
        for outlier in first[4 * slot : 4 * slot + 4]:
            assert (accepted - outlier).abs().flatten(1).amax(1).min() < 1e-5


def test_outliers_that_are_corrupted_again(digits):
    """Those of an epoch are the stored ones, inverted: as many, clipped to the range of pixels first."""
    images = random_images(digits, 4, 1, 0)
    outliers = random_images(digits, 2, 5, 0).images
    outliers[0] *= 9  # far outside the range
    again = with_fresh(replace(images, images_oe=outliers), corrupted(outliers, digits, ("invert",)), keeps=True)
    assert again.num_outliers == len(outliers) == 20
    assert torch.equal(again.images_oe, outliers)  # they are kept, so that a resumed run finds them
    assert torch.equal(again.images, images.images)
    made = again.fresh_oe.make(generator(1))
    mean, std = (np.array(v).reshape(1, -1, 1, 1) for v in (digits.mean, digits.std))
    inverted = (1 - (outliers.numpy() * std + mean).clip(0, 1) - mean) / std
    distance = np.abs(made.numpy()[:, None] - inverted[None]).reshape(20, 20, -1).max(2)
    assert distance.min(1).max() < 1e-5
    assert len(set(distance.argmin(1))) > 8  # they are drawn from all of them


@pytest.mark.parametrize("kind", ["real", "corrupted again"])
def test_fresh_outliers_by_a_slow_loop(digits, kind):
    """Training with outliers made anew equals a loop that makes those of each epoch and trains on them alone."""
    images = random_images(digits, 2, 1, 0)
    if kind == "real":
        fresh = with_fresh(images, PseudoOutliers(digits))
    else:
        stored = replace(images, images_oe=random_images(digits, 2, 7, 0).images)
        fresh = with_fresh(stored, corrupted(stored.images_oe, digits, ("invert", "jigsaw")), keeps=True)
    settings = TrainSettings(epochs=7, batch=8)
    nets = [get_network("ConvNetD1", 1, 10, (8, 8), generator(0)) for _ in range(2)]
    Trainer(nets[0], settings).train(fresh, 3, ("a",))
    slow = Trainer(nets[1], settings)
    for epoch in range(7):
        if epoch == 3:
            slow.restart(0.001)
        outliers = fresh.fresh_oe.make(generator(3, "a", "outliers", epoch))
        slow.epoch(replace(images, images_oe=outliers), generator(3, "a", "epoch", epoch))
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_outliers_of_an_epoch_are_all_used(digits):
    source = FreshOutliers(PseudoOutliers(digits), 2)
    images = replace(random_images(digits, 2, 1, 0), fresh_oe=source)
    drawn = [draw_epoch(images, 8, None, generator(e)) for e in range(3)]
    held, moved = with_fresh_outliers(images, drawn, [generator(1, "o", e) for e in range(3)])
    assert len(held.images_oe) == 60
    for epoch, batches in enumerate(moved):
        used = torch.cat([b.index_oe for b in batches]).sort().values
        assert used.tolist() == list(range(20 * epoch, 20 * epoch + 20))
        assert torch.equal(held.images_oe[20 * epoch : 20 * epoch + 20], source.make(generator(1, "o", epoch)))


def test_more_outliers_than_images_make_no_larger_batches(digits):
    images = random_images(digits, 1, 1, 0)
    some = replace(images, images_oe=images.images.repeat(4, 1, 1, 1))
    batches = draw_epoch(some, 8, None, generator(0))
    assert [len(b.index_oe) for b in batches] == [len(b.index) for b in batches] == [8, 2]
    used = [i for epoch in range(40) for b in draw_epoch(some, 8, None, generator(epoch)) for i in b.index_oe.tolist()]
    assert {*used} == {*range(40)}


def test_few_outliers_fill_every_batch(digits):
    images = random_images(digits, 3, 1, 0)
    some = replace(images, images_oe=images.images[:7])
    batches = draw_epoch(some, 8, None, generator(0))
    assert [len(b.index_oe) for b in batches] == [len(b.index) for b in batches] == [8, 8, 8, 6]
    counts = torch.cat([b.index_oe for b in batches]).bincount(minlength=7)
    assert counts.max() - counts.min() <= 1


def test_every_kind_of_outliers_trains_and_resumes_finished(made, in_process, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.coresets.SMALL_EPOCHS", 5)
    nets = {}
    for kind in ("distilled", "initial", "kcenter", "corrupt", "real", "none"):
        text = in_process(WITH_OE, *QUICK, "--distilled", made, "--outliers", kind, "--save_path", kind)
        nets[kind] = network(tmp_path / kind)
        assert ("upper bound" in text) == (kind == "real")
        assert "is finished" in in_process(WITH_OE, "--resume", "latest", "--save_path", kind)
    in_process(PLAIN, *QUICK, "--distilled", made, "--save_path", "plain")
    assert same(nets.pop("none"), network(tmp_path / "plain"))
    assert not any(same(nets[a], nets[b]) for a, b in itertools.combinations(nets, 2))


@pytest.mark.parametrize("kind", ["distilled", "initial"])
def test_outliers_corrupted_again_train_and_resume_finished(made, in_process, tmp_path, kind):
    common = [WITH_OE, *QUICK, "--distilled", made, "--outliers", kind]
    once = in_process(*common, "--save_path", "once")
    again = in_process(*common, "--corrupt_again", "--save_path", "again")
    assert "corrupted again" in again
    assert "corrupted again" not in once
    assert run_folder(tmp_path / "again").name.endswith("-again")
    assert not same(network(tmp_path / "once"), network(tmp_path / "again"))
    stored = [DistilledFile.open(run_folder(tmp_path / name) / "trained_on.pt").set() for name in ("once", "again")]
    assert torch.equal(stored[0].images_oe, stored[1].images_oe)
    assert "is finished" in in_process(WITH_OE, "--resume", "latest", "--save_path", "again")


def test_outliers_of_a_pool(made, in_process, tmp_path):
    pool = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "pool.npy", pool)
    flags = ["--distilled", made, "--outliers", "initial", "--oe_data_path", "pool.npy"]
    in_process(WITH_OE, *QUICK, *flags, "--save_path", "pool")
    outliers = DistilledFile.open(run_folder(tmp_path / "pool") / "trained_on.pt").set().images_oe
    stored = torch.load(run_folder(tmp_path / "pool") / "trained_on.pt", weights_only=True)["normalisation"]
    mean, std = stored["mean"][0], stored["std"][0]
    pixels = ((outliers * std + mean) * 255).round().byte().numpy()[:, 0]
    assert {p.tobytes() for p in pixels} <= {p.tobytes() for p in pool}


def test_two_processes_train_on_the_set_of_the_first(in_process, torchrun, tmp_path):
    flags = [*QUICK, "--model", "MLP", "--num_eval", 2, "--ipc", 2, "--train_on", "herding", "--outliers", "kcenter"]
    process = torchrun(tmp_path, 2, WITH_OE, *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    (stored,) = tmp_path.rglob("trained_on.pt")
    in_process(WITH_OE, *flags, "--save_path", "alone")
    (alone,) = (tmp_path / "alone").rglob("trained_on.pt")
    first, second = DistilledFile.open(stored).set(), DistilledFile.open(alone).set()
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.images_oe, second.images_oe)
    networks = [sorted(p.parent.glob("syn_trained_*_best.pt")) for p in (stored, alone)]
    assert len(networks[0]) == len(networks[1]) == 2
    for a, b in zip(*networks, strict=True):
        a, b = (torch.load(path, weights_only=True) for path in (a, b))
        assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def test_a_changed_pool_is_noticed(made, in_process, refused, tmp_path):
    np.save(tmp_path / "pool.npy", np.full((40, 8, 8), 90, np.uint8))
    flags = ["--distilled", made, "--outliers", "real", "--oe_data_path", "pool.npy", "--save_path", "two"]
    in_process(WITH_OE, *QUICK, *flags)
    np.save(tmp_path / "pool.npy", np.full((40, 8, 8), 200, np.uint8))
    assert "--oe_data_path" in refused(WITH_OE, "--resume", "latest", "--save_path", "two")


def test_a_moved_run_keeps_its_set(in_process, tmp_path):
    in_process(PLAIN, *QUICK, "--ipc", 2, "--train_on", "random", "--save_path", "two")
    (tmp_path / "two").rename(tmp_path / "moved")
    assert "is finished" in in_process(PLAIN, "--resume", "latest", "--save_path", "moved")
    test = [*COMMON[:6], "--ipc", 2, "--num_exp", 1, "--is_load_best", "--load_path", "moved", "--ood_sets", "patches"]
    assert "real images chosen by random, 20 images" in in_process("test_ood_model_syn.py", *test, "--score", "knn")


def test_stage_2_prints_the_line_of_stage_3(made, in_process, tmp_path):
    text = in_process(WITH_OE, *QUICK, "--distilled", made, "--save_path", "two")
    _, script, *words = shlex.split(re.findall(r"^to test them: (.*)$", text, re.MULTILINE)[0])
    assert "| mean " in in_process(script, *words)


def test_fitted_scores_of_networks_on_the_whole_set(in_process, refused, tmp_path):
    in_process(PLAIN, *QUICK, "--ipc", 1, "--train_on", "whole", "--save_path", "two")
    test = [*COMMON[:6], "--ipc", 1, "--num_exp", 1, "--is_load_best", "--load_path", "two", "--ood_sets", "patches"]
    out = in_process("test_ood_model_syn.py", *test, "--score", "knn", "tscaling", "--save_path", "three")
    assert "knn, tscaling: fitted on the real training set" in out
    assert "tscaling: the networks were trained on these images" in out
    about = json.loads((run_folder(tmp_path / "three") / "args.json").read_text())
    assert about["fitted_on"] == "real training set"
    assert (
        "Test: detectors fitted on the real training set." in (run_folder(tmp_path / "three") / "report.md").read_text()
    )
    (protocol,) = load_results(run_folder(tmp_path / "three")).protocols
    assert protocol.endswith(", detectors fitted on the real training set")
    error = refused("test_ood_model_syn.py", *test, "--score", "knn", "--fit_on", "distilled")
    assert "--fit_on distilled: the networks in two/" in error
    out = in_process("test_ood_model_syn.py", *test, "--fit_on", "real")
    assert "--fit_on real: none of the scores msp is fitted" in out


def test_fitted_scores_of_networks_on_chosen_images(in_process, tmp_path):
    in_process(PLAIN, *QUICK, "--ipc", 3, "--train_on", "random", "--save_path", "two")
    test = [*COMMON[:6], "--ipc", 3, "--num_exp", 1, "--is_load_best", "--load_path", "two", "--ood_sets", "patches"]
    out = in_process("test_ood_model_syn.py", *test, "--score", "knn")
    assert "knn: fitted on the real images chosen by random, 30 images" in out


def test_one_name_leads_through_the_stages(in_process, tmp_path):
    loop = ["--init", "real", "--Iteration", 0, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 1]
    in_process("main_poe.py", *COMMON, "--ipc", 1, *loop, "--save_path", "one")
    name = run_folder(tmp_path / "one").name
    for kind in ("initial", "corrupt"):
        in_process(WITH_OE, *QUICK, "--ipc", 1, "--load_path", "one", "--outliers", kind, "--save_path", kind)
        assert run_folder(tmp_path / kind).name == f"{name}-{kind}"


def test_negative_means_survive_a_resume(made, in_process, tmp_path):
    flags = ["--distilled", made, "--distilled_mean", "-0.00001", "--distilled_std", "0.5"]
    in_process(PLAIN, *QUICK, *flags, "--save_path", "two")
    assert "is finished" in in_process(PLAIN, "--resume", "latest", "--save_path", "two")


# --- one set, many formats -------------------------------------------------------------------------------------------


def test_lossless_formats_train_the_same_networks(made, in_process, tmp_path, digits):
    content = torch.load(made, weights_only=True)
    images, labels = content["data"][0]
    bare = tmp_path / "bare"
    bare.mkdir()
    torch.save(images, bare / "images_best.pt")
    torch.save(labels, bare / "labels_best.pt")
    torch.save(content["data_oe"][0][0], tmp_path / "oe.pt")
    np.savez(tmp_path / "kip.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=np.eye(10)[labels])
    in_process("scripts.publish", made, "--out", "published")
    ways = {
        "res": [made],
        "mtt": [bare, "--distilled_oe", "oe.pt"],
        "kip": ["kip.npz", "--distilled_oe", "oe.pt"],
        "published": ["published"],
    }
    for name, flags in ways.items():
        in_process(WITH_OE, *QUICK, "--distilled", *flags, "--save_path", name)
    folder = tmp_path / "result" / "DSA" / "Digits" / "ConvNetD1" / "2" / "run"
    folder.mkdir(parents=True)
    shutil.copy(made, folder)
    in_process(WITH_OE, *QUICK, "--ipc", 2, "--folder", "run", "--save_path", "stage1")
    expected = network(tmp_path / "stage1")
    assert all(same(expected, network(tmp_path / name)) for name in ways)


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--distilled", "x.pt", "--folder", "y"], "--folder"),
        (["--distilled", "x.pt", "--load_path", "y"], "--load_path"),
        (["--distilled", "x.pt", "--train_on", "random", "--outliers", "none"], "--train_on random"),
        (["--distilled_space", "unit"], "--distilled"),
        (["--distilled", "x.pt", "--distilled_mean", "0.5"], "--distilled_std"),
        (["--distilled", "x.pt", "--distilled_mean", "0.5", "--distilled_std", "0"], "above 0"),
        (["--distilled", "x.pt", "--distilled_oe", "y.pt", "--outliers", "corrupt"], "--outliers corrupt"),
        (["--outliers", "distilled", "--corruptions", "invert"], "--corruptions"),
        (["--outliers", "distilled", "--mix_corruptions"], "it is for --corrupt_again, and for outliers"),
        (["--outliers", "real", "--oe_data_path", "pool.npy", "--mix_corruptions"], "--mix_corruptions"),
        (["--outliers", "corrupt", "--oe_data_path", "pool.npy"], "--oe_data_path"),
        (["--outliers", "real", "--oe_data_path", "pool.npy", "--corruptions", "invert"], "not of --oe_data_path"),
        (["--outliers", "real", "--num_oe_per_class", "5"], "--num_oe_per_class"),
        (
            ["--outliers", "corrupt", "--corrupt_again"],
            "--corrupt_again: --outliers corrupt does not use it",
        ),
        (["--outliers", "none", "--corrupt_again"], "distilled, initial, kcenter do. Leave it out"),
        (["--train_on", "random"], "--outliers distilled"),
        (["--train_on", "herding", "--outliers", "none", "--folder", "x"], "--folder"),
        (["--train_on", "random", "--outliers", "none", "--load_path", "x"], "--load_path"),
        (["--train_on", "whole", "--outliers", "initial"], "--ipc"),
        (["--outliers", "none", "--lambda_oe", "2"], "--lambda_oe"),
        (["--distilled", "x.pt", "--distilled_mean", "nan", "--distilled_std", "1"], "--distilled_mean"),
        (["--train_on", "random", "--outliers", "none", "--features", "x.pt"], "--features"),
        (["--outliers", "nearest"], "distilled, initial, kcenter, corrupt, real, none"),
        (["--distilled", "missing.pt"], "missing.pt"),
    ],
)
def test_flags_that_contradict_each_other(refused, tmp_path, flags, told):
    assert told in refused(WITH_OE, *QUICK, *flags)
    assert not list(tmp_path.iterdir())


def test_sets_that_do_not_fit(made, refused, tmp_path, digits):
    assert "--ipc 3" in refused(WITH_OE, *QUICK, "--ipc", 3, "--distilled", made)
    content = torch.load(made, weights_only=True)
    del content["data_oe"]
    torch.save(content, tmp_path / "res_plain.pt")
    message = refused(WITH_OE, *QUICK, "--distilled", tmp_path / "res_plain.pt")
    assert "holds no outliers" in message
    assert "--outliers" in message
    torch.save({"w": torch.ones(2)}, tmp_path / "net.pt")
    message = refused(PLAIN, *QUICK, "--ipc", 1, "--train_on", "kcenter", "--features", tmp_path / "net.pt")
    assert "--features" in message
    assert not list(tmp_path.rglob("args.json"))


# --- publishing and the report ---------------------------------------------------------------------------------------


@pytest.fixture
def published(made, in_process, tmp_path) -> Path:
    in_process("scripts.publish", made, "--out", "published", "--license", "mit", "--dsa_strategy", "crop_scale")
    return tmp_path / "published"


def test_published_set_is_read_back_to_the_bit(made, published, digits):
    expected = DistilledFile.open(made).set()
    found = read_distilled([str(published)], digits, Assumptions()).synthetic
    for name in ("images", "labels", "images_oe"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_published_pictures_are_the_images_in_8_bits(made, published, digits):
    expected = DistilledFile.open(made).set()
    for folder, images in (("images", expected.images), ("outliers", expected.images_oe)):
        files = sorted((published / folder).rglob("*.png"))
        found = np.stack([np.array(Image.open(f)) for f in files])
        pixels = (images[:, 0] * digits.std[0] + digits.mean[0]).clamp(0, 1).numpy() * 255
        assert np.abs(found - pixels).max() <= 0.5 + 1e-4
    assert Image.open(published / "preview.png").width > 8


def test_the_cards_own_code_runs(made, published, tmp_path, monkeypatch, digits):
    """In a folder that has nothing but the file that the card says is needed."""
    text = (published / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(published / "distilled.safetensors", alone)
    monkeypatch.chdir(alone)
    names: dict = {}
    exec(block, names)
    expected = DistilledFile.open(made).set()
    assert torch.equal(names["images"], expected.images)
    assert torch.equal(names["labels"], expected.labels)
    assert torch.equal(names["outliers"], expected.images_oe)
    pixels = digits.images_test[:5]
    assert torch.allclose(names["normalise"](pixels), digits.normalize(pixels), atol=1e-6)
    for part in ('license: "mit"', "dataset-distillation", "n<1K", "What it is not for", "--dsa_strategy crop_scale"):
        assert part in text
    assert str(tmp_path) not in text


def test_the_cards_training_command_trains_as_the_set_was_made(digits, in_process, tmp_path, monkeypatch):
    """With the method, its augmentation and the weight of the outliers."""
    loop = ["--init", "real", "--Iteration", 0, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 1]
    flags = ["--ipc", 1, *loop, "--lambda_oe", 0.25, f"--data-path={tmp_path}"]
    in_process("main_poe.py", *COMMON, *flags, "--save-path", tmp_path / "one")
    in_process("scripts.publish", run_folder(tmp_path / "one"), "--out", "SET", "--license", "a: b")
    text = (tmp_path / "SET" / "README.md").read_text(encoding="utf-8")
    assert 'license: "a: b"' in text
    assert str(tmp_path) not in text
    (command,) = re.findall(r"^python (train_model.*)$", text, re.MULTILINE)
    script, *words = command.split()
    in_process(script, *words, "--num_eval", 1, "--epoch_eval_train", 2, "--compile", "off", "--save_path", "two")
    about = json.loads((run_folder(tmp_path / "two") / "args.json").read_text())["flags"]
    assert (about["method"], about["dsa_strategy"], about["lambda_oe"]) == ("DSA", AUGMENT[3], 0.25)


def test_the_cards_command_has_the_flags_of_a_config():
    about = {"script": "main_poe.py", "command": "python main_poe.py --config x.yaml"}
    about["flags"] = {"ipc": 1, "zca": True, "clamp_oe": False, "data_path": "/home/me", "corruptions": ["a", "b"]}
    assert _command(about) == "python main_poe.py --ipc 1 --zca --data_path DATA_PATH --corruptions a b"


def test_a_set_of_a_stopped_run(digits, made, in_process, refused, tmp_path):
    """The card, and stage 2, say how far it came; what a run starts from is not published."""
    content = torch.load(made, weights_only=True)
    total = 9
    for name, at in (("first", 0), ("later", total - 1), ("last", total)):
        about = {"iteration": at, "experiment": 0, "flags": {"Iteration": total}}
        torch.save(content | {"about": about}, tmp_path / f"res_{name}.pt")
    assert "images that its run starts from" in refused("scripts.publish", "res_first.pt", "--out", "first")
    cards = {}
    for name in ("later", "last"):
        in_process("scripts.publish", f"res_{name}.pt", "--out", name)
        cards[name] = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert f"after iteration {total - 1} of {total}" in cards["later"]
    assert "stopped" not in cards["last"]
    settings = Stage2Settings(method="DSA", dataset="Digits", model="ConvNetD1", load_path=str(tmp_path / "root"))
    for name in ("later", "last"):
        folder = tmp_path / "root" / "DSA" / "Digits" / "ConvNetD1" / "1" / name
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / f"res_{name}.pt", folder / "res_DSA_Digits_ConvNetD1_1ipc.pt")
        of_run = replace(settings, folder=name)
        lines = labelled_images(of_run, digits, partial(find_distilled, of_run), None).lines
        assert ("its run was not finished: iteration 8 of 9" in lines) == (name == "later")
        by_path = Stage2Settings(dataset="Digits", model="ConvNetD1", distilled=(f"res_{name}.pt",), ipc=None)
        lines = labelled_images(by_path, digits, None, None).lines
        assert any("its run was not finished: iteration 8 of 9" in line for line in lines) == (name == "later")


@pytest.mark.parametrize(
    "damage",
    [
        {"normalisation": [1]},
        {"normalisation": {}},
        {"normalisation": {"zca": 3}},
        {"normalisation": {"mean": [0.1, 0.1], "std": [1.0, 1.0]}},
        {"num_classes": "ten"},
        {"num_classes": 3},
        {"num_classes": 10**9},
    ],
)
def test_damaged_sets_are_not_published(made, refused, tmp_path, damage):
    assert "--zca" in refused("scripts.publish", made, "--out", "published", "--zca")
    torch.save(torch.load(made, weights_only=True) | damage, made)
    assert str(made) in refused("scripts.publish", made, "--out", "published")
    assert not (tmp_path / "published").exists()


def test_the_card_of_a_whitened_set(tmp_path, in_process, monkeypatch, digits):
    white = digits.whitened()
    images = random_images(white, 1, 1, 0)
    DistilledFile.write(tmp_path / "res_x.pt", [replace(images, lr_net=0.03)], {}, white, {})
    in_process("scripts.publish", "res_x.pt", "--out", "published")
    text = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path / "published")
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], names)
    assert torch.allclose(
        names["normalise"](digits.images_test[:5]), white.normalize(digits.images_test[:5]), atol=1e-5
    )
    assert "learning rate 0.03" in text
    found = read_distilled([str(tmp_path / "published")], white, Assumptions()).synthetic
    assert found.lr_net == 0.03
    assert torch.equal(found.images, images.images)


def test_a_set_of_another_repository_is_published(made, in_process, refused, tmp_path, digits):
    images, labels = torch.load(made, weights_only=True)["data"][0]
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(torch.nn.functional.one_hot(labels).float() * 0.9 + 0.01, tmp_path / "labels_best.pt")
    in_process("scripts.publish", "images_best.pt", "--dataset", "Digits", "--method", "TESLA", "--out", "published")
    text = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    assert "another repository" in text
    assert "soft_labels" in text
    tensors = load_file(tmp_path / "published" / "distilled.safetensors")
    assert torch.equal(tensors["soft_labels"].argmax(1), labels)
    assert "exists" in refused("scripts.publish", "images_best.pt", "--dataset", "Digits", "--out", "published")


def test_trust_report_of_one_line(made, forks, tmp_path):
    forks.warm("pytorch_ood.detector")
    command = [forks.python, ROOT / "scripts" / "trust_report.py", made, "--dataset", "Digits", "--model", "MLP"]
    command += ["--num_eval", 1, "--epoch_eval_train", 2, "--baselines", "random", "--outliers", "distilled", "again"]
    command = [
        *map(str, [*command, "--ood_sets", "patches", "--score", "msp", "knn", "--fit_on", "real", "--out", "report"])
    ]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True).stdout
    page = (tmp_path / "report" / "compare.html").read_text(encoding="utf-8")
    for column in ("distilled", "with distilled outliers", "with outliers corrupted again", "random"):
        assert f"<th>{column}</th>" in page
    assert (
        f"<h1>How far can networks be trusted that are trained on {made.parent.name}/{made.name} (Digits)?</h1>" in page
    )
    assert '<p class="verdict">distilled: accuracy ' in page
    assert page.count("(detectors fitted on the real training set)") == 4
    assert first.count("$ python train_model") == 4
    assert first.count("--corrupt_again") == 1
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "$ python train_model" not in again
    missing = [*command[:-4], "--ood_sets", "Textures", "--out", "another"]
    early = subprocess.run(missing, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (early.returncode, "Textures" in early.stderr, "$ python" in early.stdout) == (2, True, False)
    assert "--precision" not in first  # stages 2 and 3 have defaults of their own
    other = subprocess.run([*command, "--seed", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert other.returncode == 2
    assert len(other.stderr.strip().splitlines()) == 1
    # networks that were made anew do not keep the measures of those before
    heavier = [*command, "--lambda_oe", "2"]
    told = subprocess.run(heavier, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "report/with-distilled-outliers was made with other flags" in told.stderr
    shutil.rmtree(tmp_path / "report" / "with-distilled-outliers" / "networks")
    told = subprocess.run(heavier, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "report/with-distilled-outliers was made with other flags" in told.stderr


def test_a_trust_report_has_no_column_twice_and_names_those_at_chance(digits, in_process, monkeypatch, tmp_path):
    """At ipc 1 herding and k-center choose the same images; black images teach nothing."""
    net = get_network("MLP", 1, 10, (8, 8), generator(3))
    first, second = (coreset(kind, digits, 1, net).images for kind in ("herding", "kcenter"))
    assert torch.equal(first, second)
    path = tmp_path / "res_DSA_Digits_MLP_1ipc.pt"
    DistilledFile.write(
        path, [replace(random_images(digits, 1, 5, 0), images=torch.zeros(10, 1, 8, 8))], {}, digits, {}
    )

    def run(words, *_):
        """Run a stage to its end, in this process."""
        print(in_process(words[0].removesuffix(".py").replace("/", "."), *words[1:]))
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(runner, "start", run)
    flags = [
        path,
        "--dataset",
        "Digits",
        "--model",
        "MLP",
        "--num_eval",
        1,
        "--epoch_eval_train",
        40,
        "--out",
        "report",
    ]
    flags += ["--outliers", "--baselines", "kcenter", "herding", "--ood_sets", "patches", "--score", "msp"]
    printed = in_process("scripts.trust_report", *flags).splitlines()
    columns = [line for line in printed if line.startswith("column ")]
    assert columns == ["column 1 of 2: distilled", "column 2 of 2: herding = kcenter"]
    (note,) = {line for line in printed if "at chance level" in line and not line.startswith("$ ")}
    shown = [100 * (1 - error_rate(tmp_path / "report" / name)) for name in ("distilled", "herding-kcenter")]
    assert note.startswith(f"distilled: its accuracy, {shown[0]:.1f} %, is at chance level")
    largest = digits.labels_test.bincount().max().item() / 360
    assert shown[0] < 100 * largest + 200 * math.sqrt(largest * (1 - largest) / 360) < shown[1]
    (tmp_path / "report" / "data.sha256").write_text("0" * 64)  # as of other data
    with pytest.raises(UserError, match="the report in report is of other images than --data_path holds now, with"):
        in_process("scripts.trust_report", *flags)
    for page in ("compare.html", "compare.md"):
        assert note in (tmp_path / "report" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        ("scripts.trust_report", ["nothing.pt", "--out", "report"], "PATH: nothing.pt is not there"),
        ("train_model_synthetic_no_oe.py", ["--distilled", "nothing.pt"], "--distilled: nothing.pt is not there"),
        (
            "train_model_synthetic_oe.py",
            ["--distilled", "there.pt", "--distilled_oe", "nothing.pt"],
            "--distilled_oe: nothing.pt is not there",
        ),
    ],
)
def test_a_set_that_is_not_there_is_told_before_data_are_downloaded(
    script, flags, told, refused, monkeypatch, tmp_path
):
    (tmp_path / "there.pt").touch()
    for where in ("scripts.trust_report.read_data", "utils.stages.stage2.read_data"):
        monkeypatch.setattr(where, lambda settings: pytest.fail("the data were read first"))
    assert told in refused(script, "--dataset", "CIFAR10", "--data_path", tmp_path, *flags)


def test_what_stage_3_would_refuse_is_refused_before_training(made, in_process, refused, monkeypatch, tmp_path):
    """A missing set is none of it with --skip_missing; and the whole training set is fitted on itself."""
    asked = []
    monkeypatch.setattr(trust_report, "run_stages", lambda stages, *_: asked.extend(stages))
    monkeypatch.setattr(trust_report, "find_runs", lambda *args: [])
    flags = [made, "--dataset", "Digits", "--model", "MLP", "--num_eval", 1, "--epoch_eval_train", 1, "--out", "report"]
    for more, message in (
        (["--ood_sets", "Textures", "patches"], "--ood_sets: Textures is missing"),
        (["--ood_sets", "Textures", "--skip_missing"], "--ood_sets: none is there"),
        (["--ood_sets", "patches", "--score", "tscaling"], "--score tscaling: networks are right on the images"),
        (["--ood_sets", "patches", "--T", 2], "--T 2: only --score energy has a temperature"),
        (["--baselines", "random", "--whole_epochs", 5], "--whole_epochs: there is no column of the whole set"),
        (["--distilled_oe", made, "--outliers", "corrupt"], "--distilled_oe: no column has them"),
    ):
        assert message in refused("scripts.trust_report", *flags, *more)
    assert not asked
    more = ["--skip_missing", "--score", "knn", "--fit_on", "distilled", "--baselines", "random", "whole"]
    in_process("scripts.trust_report", *flags, "--ood_sets", "Textures", "patches", *more)
    tests = [stage for stage in asked if stage.command[0] == "test_ood_model_syn.py"]
    (tmp_path / "other").mkdir()
    content = torch.load(made, weights_only=True)
    content["data"][0][0] += 0.5
    torch.save(content, tmp_path / "other" / made.name)
    other = ["other/" + made.name, *flags[1:], "--ood_sets", "patches"]
    told = "--out: the report in report is of other images than PATH holds now"
    assert told in refused("scripts.trust_report", *other)
    shutil.copy(made, tmp_path / "oe.pt")
    apart = [*flags[:-1], "apart", "--ood_sets", "patches", "--distilled_oe", "oe.pt"]
    in_process("scripts.trust_report", *apart)
    shutil.copy(tmp_path / "other" / made.name, tmp_path / "oe.pt")
    assert "--out: the report in apart is of other images" in refused("scripts.trust_report", *apart)
    fitted = {stage.folder.parent.name: "--fit_on" in stage.command for stage in tests}
    assert len(fitted) == 5
    assert [name for name, given in fitted.items() if not given] == ["whole"]


def test_a_trust_report_of_images_in_parts(digits, in_process, monkeypatch, tmp_path):
    """All columns see as many images, at the storage of the set, and are trained by the protocol."""
    path, commands = tmp_path / "res_TGDD_Digits_MLP_2ipc.pt", []
    DistilledFile.write(path, [replace(random_images(digits, 2, 5, 0), factor=2)], {}, digits, {})

    def run(words, *_):
        """Run a stage to its end, in this process."""
        commands.append(list(map(str, words)))
        print(in_process(words[0].removesuffix(".py").replace("/", "."), *words[1:]))
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(runner, "start", run)
    flags = [path, "--dataset", "Digits", "--model", "MLP", "--num_eval", 1, "--epoch_eval_train", 4]
    flags += ["--protocol", "ncfm", "--out", "report", "--outliers", "--baselines", "random"]
    printed = in_process("scripts.trust_report", *flags, "--ood_sets", "patches", "--score", "msp")
    trained = "ncfm, 4 epochs, augmentation none"  # and tested after the last
    assert f"Networks trained by protocol {trained}." in printed
    trained = [words for words in commands if words[0].startswith("train_model")]
    assert [words[words.index("--factor") + 1] for words in trained if "--train_on" in words] == ["2"]
    assert len(trained) == 2
    page = (tmp_path / "report" / "compare.html").read_text()
    assert "images per class" in page
    assert not re.search("<t[hd]>method", page)  # of the set it is not known
    (chosen,) = (tmp_path / "report" / "random").rglob("trained_on.pt")
    assert len(DistilledFile.open(chosen).set().images) == 80  # decoded


def error_rate(column: Path) -> float:
    """The error rate of the one network of a column."""
    (path,) = column.rglob("results.json")
    return json.loads(path.read_text())["errors"][0]["error"]


@pytest.mark.parametrize(
    ("more", "outliers"), [([], "distilled outliers"), (["--corrupt_again"], "distilled outliers, corrupted again")]
)
def test_results_of_the_card_are_those_of_stage_3(made, in_process, refused, tmp_path, more, outliers):
    in_process(WITH_OE, *QUICK, "--distilled", made, *more, "--save_path", "two")
    test = [*COMMON[:6], "--ipc", 2, "--num_exp", 1, "--is_load_best", "--load_path", "two", "--ood_sets", "patches"]
    in_process("test_ood_model_syn.py", *test, "--save_path", "three")
    in_process("scripts.publish", made, "--out", "published", "--results", run_folder(tmp_path / "three"))
    about = json.loads((run_folder(tmp_path / "two") / "args.json").read_text())
    for found, is_told in ((about["inputs"]["data_path"], False), ("0" * 64, True)):
        about["inputs"]["data_path"] = found
        (run_folder(tmp_path / "two") / "args.json").write_text(json.dumps(about))
        told = "were trained on other data than those of --data_path"
        assert (told in in_process("test_ood_model_syn.py", *test, "--save_path", "again")) == is_told
    in_process(PLAIN, *QUICK, "--ipc", 2, "--train_on", "random", "--save_path", "random")
    test[test.index("two")] = "random"
    in_process("test_ood_model_syn.py", *test, "--save_path", "four")
    other = run_folder(tmp_path / "four")
    assert "another set" in refused("scripts.publish", made, "--out", "x", "--results", other)
    networks = run_folder(tmp_path / "two")
    assert "is no folder of stage 3" in refused("scripts.publish", made, "--out", "x", "--results", networks)
    content = torch.load(made, weights_only=True)
    content["data_oe"][0][0].mul_(0.5)
    torch.save(content, tmp_path / "others.pt")
    three = run_folder(tmp_path / "three")
    error = refused("scripts.publish", tmp_path / "others.pt", "--out", "x", "--results", three)
    assert "were trained with other outliers" in error
    results = json.loads((run_folder(tmp_path / "three") / "results.json").read_text())
    text = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    accuracy = 100 * (1 - results["errors"][0]["error"])
    auroc = 100 * results["rows"][0]["auroc"]
    assert math.isfinite(accuracy)
    assert f"| {accuracy:.2f} " in text
    assert f"| {auroc:.2f} " in text
    assert "Networks trained by protocol dc, 3 epochs, the best checkpoints on the test set." in text
    assert re.search(rf"1 × ConvNetD1, {outliers}\b(?!, corrupted)", text)


PARTS = ["--dataset", "Digits", "--model", "ConvNetD1", "--method", "DM", "--dsa_strategy", "crop_scale", "--ipc", 1]


@pytest.fixture(scope="module")
def in_parts(digits, tmp_path_factory):
    """A set in 2×2 parts, as stage 1 writes it, and its folder."""
    root = tmp_path_factory.mktemp("parts")
    folder = root / "one" / "DM" / "Digits" / "ConvNetD1" / "1" / "name"
    folder.mkdir(parents=True)
    stored = replace(random_images(digits, 1, 5, 0), factor=2)
    stored = replace(stored, images_oe=random_images(digits, 1, 6, 0).images)
    path = folder / "res_DM_Digits_ConvNetD1_1ipc.pt"
    DistilledFile.write(path, [stored], {}, digits, {"flags": {}})
    (folder / "args.json").write_text(json.dumps({"script": "main_poe.py", "flags": {"method": "DM"}}))
    return path, stored


def weights_in(folder: Path) -> torch.Tensor:
    """The parameters of the best network of the run in a folder."""
    (path,) = folder.rglob("*best*.pt")
    return torch.cat([t.flatten() for t in torch.load(path, weights_only=True).values()])


def test_a_set_in_parts_through_publishing_and_back(in_parts, in_process, refused, tmp_path):
    """Networks are trained on the decoded set, and on what was published of it, to the bit."""
    path, _ = in_parts
    flags = [*PARTS, "--num_eval", 1, "--epoch_eval_train", 3]
    out = in_process("train_model_synthetic_oe.py", *flags, "--load_path", path.parents[5], "--save_path", "a")
    assert "each of its images holds 4 parts, and networks train on these" in out
    assert "an epoch has 40 images and as many outliers\n" in out
    in_process("scripts.publish", path, "--out", "published")
    card = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    assert "Every image and outlier holds 2×2 parts" in card
    assert "enlarged to 8×8" in card
    for name, source in (("b", path), ("c", "published")):
        words = [*flags[:-6], *flags[-4:], "--distilled", source, "--save_path", name]
        assert "decoding factor 2" in in_process("train_model_synthetic_oe.py", *words)
        assert torch.equal(weights_in(tmp_path / name), weights_in(tmp_path / "a"))
    error = refused("train_model_synthetic_oe.py", *flags, "--factor", 2)
    assert "--factor: only --train_on random, herding and kcenter shrink images; a distilled set says itself" in error
    error = refused("main_poe.py", *PARTS, "--load_path", path)
    assert "has images of 2x2 parts; give --factor 2" in error


def test_a_set_of_parts_from_elsewhere_keeps_its_storage(digits, in_process, tmp_path):
    """It is published decoded; baselines beside it still get the storage of the source."""
    pixels = random_images(digits, 2, 1, 0)
    torch.save([digits.denormalize(pixels.images), pixels.labels], tmp_path / "data.pt")
    in_process("scripts.publish", "data.pt", "--dataset", "Digits", "--out", "published")
    source, back = (read_distilled([str(tmp_path / name)], digits, Assumptions()) for name in ("data.pt", "published"))
    assert torch.equal(source.synthetic.images, back.synthetic.images)
    assert (back.factor, back.stored, back.ipc(10)) == (source.factor, source.stored, source.ipc(10)) == (2, 20, 2)


def test_results_of_other_labels_are_not_published(digits, in_process, refused, tmp_path):
    pixels = random_images(digits, 1, 1, 0)
    for name, labels in (("a", pixels.labels), ("b", pixels.labels.roll(1))):
        DistilledFile.write(tmp_path / f"res_{name}.pt", [replace(pixels, labels=labels)], {}, digits, {})
    flags = ["--dataset", "Digits", "--model", "MLP"]
    train = ["--distilled", "res_a.pt", "--num_eval", 1, "--epoch_eval_train", 1]
    in_process("train_model_synthetic_no_oe.py", *flags, *train)
    in_process("test_ood_model_syn.py", *flags, "--ipc", 1, "--method", "DC", "--num_exp", 1, "--ood_sets", "blob")
    (tested,) = (tmp_path / "result-test-ood-synthetic").rglob("results.json")
    in_process("scripts.publish", "res_a.pt", "--out", "a", "--results", tested.parent)
    told = "were trained on other labels, those of"
    assert told in refused("scripts.publish", "res_b.pt", "--out", "b", "--results", tested.parent)
    DistilledFile.write(tmp_path / "res_c.pt", [replace(pixels, lr_net=0.02)], {}, digits, {})
    told = "were trained at another learning rate, that of"
    assert told in refused("scripts.publish", "res_c.pt", "--out", "c", "--results", tested.parent)
    shutil.copy(tmp_path / "res_a.pt", tmp_path / "trained_on.pt")
    assert "is what stage 2 was given; publish the set" in refused("scripts.publish", "trained_on.pt", "--out", "d")
    pool = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    np.savez(tmp_path / "pool.npz", images=pool)
    first = [*train, "--outliers", "initial", "--save_path", "two"]
    in_process("train_model_synthetic_oe.py", *flags, *first)
    more = ["--resume", "latest", "--save_path", "two", "--oe_data_path", "pool.npz"]
    assert "began without a pool; leave it out" in refused("train_model_synthetic_oe.py", *more)


@pytest.mark.parametrize("kind", ["distilled", "corrupt", "none"])
def test_networks_keep_their_set_as_it_is_stored(in_parts, in_process, tmp_path, kind):
    """In parts, and with the outliers that they see; what stage 1 wrote besides is left out."""
    path, stored = in_parts
    flags = ["--num_eval", 1, "--epoch_eval_train", 1, "--load_path", path.parents[5], "--outliers", kind]
    in_process(WITH_OE, *PARTS, *flags, "--save_path", "two")
    (own,) = (tmp_path / "two").rglob("trained_on.pt")
    found = DistilledFile.open(own).set()
    assert found.factor == 2
    assert torch.equal(found.images, stored.images)
    assert (found.images_oe is None) == (kind != "distilled")
    assert own.stat().st_size < 1.1 * path.stat().st_size
    assert "is finished" in in_process(WITH_OE, "--resume", "latest", "--save_path", "two")


def test_a_run_that_goes_on_or_away_changes_nothing_for_its_networks(in_parts, in_process, refused, tmp_path):
    """Detectors are fitted on the set that they were trained on, which is in their folder, and drawn as before."""
    shutil.copytree(in_parts[0].parents[5], tmp_path / "one")
    (path,) = (tmp_path / "one").rglob("res_*.pt")
    train = [*PARTS, "--num_eval", 1, "--epoch_eval_train", 1, "--load_path", "one"]
    test = ["test_ood_model_syn.py", *PARTS[:6], "--ipc", 1, "--num_exp", 1, "--is_load_best", "--ood_sets", "blob"]
    for kind in ("distilled", "initial"):
        in_process(WITH_OE, *train, "--outliers", kind, "--save_path", kind)
        in_process(*test, "--load_path", kind, "--score", "knn", "--save_path", f"{kind}-ood")
    results = [run_folder(tmp_path / f"{kind}-ood") for kind in ("distilled", "initial")]
    in_process("scripts.publish", path, "--out", "published", "--results", *results)
    assert "1 × ConvNetD1, initial outliers" in (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    content = torch.load(path, weights_only=True)
    content["data"][0][0].mul_(0.5)
    torch.save(content, path)
    error = refused("scripts.publish", path, "--out", "x", "--results", results[0])
    assert "were trained on another set" in error
    for change in (lambda: None, lambda: shutil.rmtree(tmp_path / "one")):
        change()
        in_process(*test, "--load_path", "distilled", "--score", "knn", "--save_path", "again")
        again = run_folder(tmp_path / "again")
        assert load_results(again) == load_results(results[0])
        assert (again / "distilled.png").read_bytes() == (results[0] / "distilled.png").read_bytes()
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize("kind", ["initial", "kcenter", "corrupt", "none"])
def test_outliers_beside_a_set_in_parts(in_parts, digits, kind, by_path, tmp_path):
    """As many as the decoded set has, and shrunk like it where they are stored; the same for a set by its path."""
    path, stored = in_parts
    where = {"distilled": (str(path),), "ipc": None} if by_path else {"load_path": str(path.parents[5]), "ipc": 1}
    settings = Stage2Settings(method="DM", dataset="Digits", model="ConvNetD1", outliers=kind, is_load_oe=True, **where)
    chosen = labelled_images(settings, digits, partial(find_distilled, settings), None)
    assert chosen.ipc(10) == 1
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0)).eval()
    found = with_outliers(settings, chosen, digits, lambda: net).synthetic
    assert torch.equal(found.decoded().images, stored.decoded().images)
    assert found.num_outliers == found.decoded().num_outliers == (0 if kind == "none" else 40)
    if kind == "initial":
        source = PseudoOutliers(digits)
        assert _start_of(settings, chosen, source) == ("random" if by_path else "as distillation begins")
        for script, flags, told in (
            ("main_poe.py", {"corruptions": list(DEFAULT_CORRUPTIONS), "seed": 1}, "as distillation begins"),
            ("main_poe.py", {"init_oe": "kcenter"}, "random"),
            ("main_poe.py", {"init": "noise"}, "random"),
            ("main_poe.py", {"load_path": "res.pt"}, "random"),
            ("main_poe.py", {"seed": 2}, "random"),
            ("main_poe.py", {"corruptions": ["invert", "jigsaw"]}, "random"),
            ("main_poe.py", {"mix_corruptions": True}, "random"),
            ("main_oe.py", {}, "random"),
        ):
            (tmp_path / "args.json").write_text(json.dumps({"script": script, "flags": flags}))
            assert _start_of(settings, replace(chosen, origin=tmp_path), source) == told
        began = {"script": "main_oe.py", "flags": {}, "inputs": {"oe_data_path": "0" * 64}}
        (tmp_path / "args.json").write_text(json.dumps(began))
        np.savez(tmp_path / "pool.npz", images=np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8))
        of_pool = replace(settings, oe_data_path=str(tmp_path / "pool.npz"), num_oe_per_class=5)
        told = _start_of(of_pool, replace(chosen, origin=tmp_path), outlier_source(of_pool, digits))
        assert told == "random"
        pool = outlier_source(of_pool, digits)
        (tmp_path / "args.json").write_text(json.dumps(began | {"inputs": {"oe_data_path": pool.fingerprint()}}))
        assert _start_of(of_pool, replace(chosen, origin=tmp_path), pool) == "as distillation begins"
        (tmp_path / "args.json").write_text(json.dumps({"script": "main.py", "flags": {}}))
        told = _start_of(settings, replace(chosen, origin=tmp_path), source)
        assert told == "random; the distillation had none"
        assert with_outliers(settings, replace(chosen, origin=tmp_path), digits, lambda: net).start == ""
        (tmp_path / "args.json").write_text(json.dumps({"script": "main_poe.py", "flags": {"seed": 2}}))
        told = with_outliers(settings, replace(chosen, origin=tmp_path), digits, lambda: net).start
        assert told == "random, not those that distilling began with"
        assert with_outliers(settings, chosen, digits, lambda: net).start == ""
        whole = initial_outliers(PseudoOutliers(digits), 4, 1, 0)
        assert torch.equal(found.images_oe, as_parts(whole, 2))


def test_a_set_of_other_data_is_told(in_parts, digits, tmp_path):
    """Such as the same images with other labels, in a file of the same name."""
    path, _ = in_parts
    about = json.loads((path.parent / "args.json").read_text())
    shutil.copytree(path.parents[5], tmp_path / "root")
    copy = tmp_path / "root" / path.relative_to(path.parents[5])
    settings = Stage2Settings(method="DM", dataset="Digits", model="ConvNetD1", ipc=1, load_path=str(tmp_path / "root"))
    for inputs, told in (({"data_path": digits.fingerprint()}, False), ({"data_path": "0" * 64}, True), (None, False)):
        (copy.parent / "args.json").write_text(json.dumps(about | {"inputs": inputs}))
        lines = labelled_images(settings, digits, partial(find_distilled, settings), None).lines
        assert any("was distilled from other data than those of --data_path" in line for line in lines) == told


def test_fewer_classes_than_corruptions_are_told(digits):
    two = replace(digits, num_classes=2)
    told = "each of the 2 classes takes one of --corruptions, so these are not used: invert, pixelate; "
    told += "--mix_corruptions uses all"
    names = ("jigsaw", "rgb-ghost", "invert", "pixelate")
    assert PseudoOutliers(two, names).notice == told
    assert PseudoOutliers(two, names, mixed=True).notice == PseudoOutliers(digits, names).notice == ""


def test_a_baseline_of_parts(digits):
    """Four times as many real images, shrunk and enlarged."""
    settings = Stage2Settings(dataset="Digits", train_on="random", factor=2, ipc=3, outliers="none", seed=4)
    chosen = labelled_images(settings, digits, None, None)
    assert "baseline: 12 real images per class, shrunk to the parts of 3, chosen at random" in chosen.lines
    assert torch.equal(chosen.synthetic.images, as_parts(random_images(digits, 12, 4, 0).images, 2))
    assert chosen.ipc(10) == 3


def test_parts_that_are_cut_are_cut_in_every_class(digits):
    """Where the factor does not divide the side: each class is stored as a distillation stores it."""
    settings = Stage2Settings(dataset="Digits", train_on="random", factor=3, ipc=1, outliers="initial", seed=4)
    chosen = labelled_images(settings, digits, None, None)
    images = random_images(digits, 9, 4, 0).images
    expected = torch.cat([decode(encode(images[9 * k : 9 * k + 9], 3), 3) for k in range(10)])
    assert torch.equal(chosen.synthetic.images, expected)
    assert not torch.equal(expected, as_parts(images, 3))
    outliers = initial_outliers(PseudoOutliers(digits), 9, 4, 0)
    expected = torch.cat([as_parts(of_slot, 3) for of_slot in outliers.chunk(10)])
    assert torch.equal(with_outliers(settings, chosen, digits, None).synthetic.images_oe, expected)


def test_the_log_tells_of_a_pool_that_is_too_small(digits, tmp_path, in_process):
    np.save(tmp_path / "pool.npy", np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8))
    pool = str(tmp_path / "pool.npy")
    settings = Stage2Settings(dataset="Digits", train_on="random", outliers="initial", oe_data_path=pool)
    chosen = labelled_images(settings, digits, None, None)
    for kind in ("initial", "real"):
        lines = with_outliers(replace(settings, outliers=kind), chosen, digits, None).lines
        assert "the slices shrink to 5 (N // num_classes = 50 // 10)" in lines[-1]
    experts = ["--dataset", "Digits", "--model", "MLP", "--outliers", "oe", "--oe_data_path", "pool.npy"]
    out = in_process("train_experts.py", *experts, "--num_experts", 1, "--train_epochs", 1, "--batch_oe", 16)
    assert "the slices shrink to 5" in out


def test_pictures_of_parts_show_a_class_in_a_row(digits, in_process, monkeypatch, tmp_path):
    """The parts of its images, one part after the other."""
    drawn = {}
    monkeypatch.setattr(loop, "save_grid", lambda path, images, *_: drawn.update({path.name: images}))
    words = ["--dataset", "Digits", "--model", "MLP", "--method", "DM", "--ipc", 2, "--factor", 2, "--Iteration", 0]
    in_process("main_poe.py", *words, "--init", "real", "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 1)
    stored = DistilledFile.open(next(tmp_path.rglob("res_*.pt"))).set()
    for name, images in (("vis_parts_DM", stored.images), ("vis_parts_oe_DM", stored.images_oe)):
        (found,) = (pixels for file, pixels in drawn.items() if file.startswith(name))
        by_class = torch.cat([decode(of_class, 2) for of_class in images.split(2)])
        torch.testing.assert_close(found, digits.denormalize(by_class))
