"""Stages know the data of the stage before: classes, size and normalisation, beside an own forward pass."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from networks import get_network
from scripts import publish
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.datasets import RealData, load_dataset
from utils.data.distilled_file import DistilledFile
from utils.data.identity import class_order, renumbered
from utils.data.synthetic import SyntheticSet
from utils.data.whitening import fit_zca
from utils.exchange.assumptions import Assumptions
from utils.exchange.convert import read_distilled
from utils.report.card import Published

G = np.random.default_rng(0)
QUICK = "--num_exp 1 --num_eval 1 --epoch_eval_train 1 --Iteration 1".split()  # noqa: SIM905
MODEL = ["--model", "ConvNetD1", "--method", "DM"]
TEST = ["--num_exp", 1, "--is_load_best", "--ood_sets", "blob"]
PLAIN, STAGE3 = "train_model_synthetic_no_oe.py", "test_ood_model_syn.py"
COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (230, 20, 10)}


def folders(path, names, size: int = 12):
    """Noisy pictures of one colour for each class, whose folder may have another name."""
    for part, count in (("train", 6), ("test", 8)):
        for colour, name in zip(COLOURS, names, strict=True):
            (path / part / name).mkdir(parents=True)
            for number in range(count):
                noise = G.integers(-20, 20, (size, size, 3))
                pixels = (np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path / part / name / f"{number}.png")


def array_set(path, scale: float = 1.0, seed: int = 0):
    """An npz file of grey 8×8 digits, darker by `scale`."""
    digits = load_dataset("Digits", "nowhere")
    train, test = ((255 * scale * images[:, 0]).round().to(torch.uint8).numpy() for images in (
        digits.images_train, digits.images_test))  # fmt: skip
    labels = {"train_labels": digits.labels_train.numpy(), "test_labels": digits.labels_test.numpy()}
    np.savez(path, train_images=train, test_images=test, **labels)


def accuracy(root) -> float:
    """What the newest run of stage 3 measured, in percent."""
    path = max(root.glob("result-test-ood-synthetic/**/results.json"), key=lambda p: p.stat().st_mtime_ns)
    return 100 * (1 - json.loads(path.read_text())["errors"][0]["error"])


def own_accuracy(root, images: torch.Tensor, labels: torch.Tensor, normalise) -> float:
    """Accuracy of the network of stage 2 by a forward pass of its own, in percent."""
    state = torch.load(next(root.rglob("syn_trained_*_best.pt")), weights_only=True)
    net = get_network("ConvNetD1", images.shape[1], int(labels.max()) + 1, tuple(images.shape[2:]), generator(0))
    net.load_state_dict(state)
    with torch.no_grad():
        return 100 * (net.eval()(normalise(images)).argmax(1) == labels).float().mean().item()


def test_classes_of_other_names(in_process, refused, tmp_path):
    folders(tmp_path / "data", ("apple", "bread", "corn"))
    folders(tmp_path / "other", ("apple", "bread", "dates"))
    data = ["--dataset", "ImageFolder", "--im_size", 12, *MODEL]
    in_process("main.py", *data, "--data_path", "data", *QUICK, "--init", "real")
    error = refused(PLAIN, *data, "--data_path", "other", "--num_eval", 1, "--epoch_eval_train", 40)
    assert "--data_path: its classes are not those of" in error
    assert "it lacks corn, and has dates" in error
    in_process(PLAIN, *data, "--data_path", "data", "--num_eval", 1, "--epoch_eval_train", 40)
    in_process(STAGE3, *data, "--data_path", "data", *TEST)
    error = refused(STAGE3, *data, "--data_path", "other", *TEST)
    assert "the networks in" in error
    assert "it lacks corn, and has dates" in error


def test_forgotten_size(in_process, refused, tmp_path):
    folders(tmp_path / "data", tuple(COLOURS))
    data = ["--dataset", "ImageFolder", "--data_path", "data", *MODEL]
    in_process("main.py", *data, "--im_size", 12, *QUICK)
    assert "Give --im_size 12" in refused(PLAIN, *data, "--num_eval", 1, "--epoch_eval_train", 2)
    in_process(PLAIN, *data, "--im_size", 12, "--num_eval", 1, "--epoch_eval_train", 2)
    error = refused(STAGE3, *data, *TEST)
    assert "3 classes of 3x64x64 images do not fit" in error
    assert "give --im_size 12" in error


def test_the_statistics_of_the_training_are_used(in_process, tmp_path):
    """The new file is darker: by its own statistics the networks would see other images."""
    array_set(tmp_path / "a.npz")
    array_set(tmp_path / "b.npz", scale=0.4)
    data = ["--dataset", "npz", *MODEL, "--data_path"]
    in_process("main.py", *data, "a.npz", *QUICK, "--init", "real")
    in_process(PLAIN, *data, "a.npz", "--num_eval", 1, "--epoch_eval_train", 60)
    out = in_process(STAGE3, *data, "b.npz", *TEST)
    assert "images are normalised as in the training of the networks in" in out
    a, b = (load_dataset("npz", tmp_path / f"{name}.npz") for name in "ab")
    pixels = b.images_test / 255
    mean, std = ((a.images_train / 255).double().mean().item(), (a.images_train / 255).double().std().item())
    expected = own_accuracy(tmp_path, pixels, b.labels_test, lambda x: (x - mean) / std)
    by_its_own = own_accuracy(tmp_path, pixels, b.labels_test, b.normalize)
    assert accuracy(tmp_path) == pytest.approx(expected, abs=1e-4)
    assert abs(expected - by_its_own) > 1
    assert "images are normalised" not in in_process(STAGE3, *data, "a.npz", *TEST)


def test_the_whitening_of_the_training_is_used(in_process, tmp_path, refused):
    array_set(tmp_path / "a.npz")
    array_set(tmp_path / "b.npz", scale=0.4)
    data = ["--dataset", "npz", *MODEL, "--zca", "--data_path"]
    in_process("main.py", *data, "a.npz", *QUICK, "--init", "real")
    in_process(PLAIN, *data, "a.npz", "--num_eval", 1, "--epoch_eval_train", 60)
    assert "images are whitened as in the training" in in_process(STAGE3, *data, "b.npz", *TEST)
    a, b = (load_dataset("npz", tmp_path / f"{name}.npz") for name in "ab")
    zca = fit_zca([a.images_train / 255])
    expected = own_accuracy(tmp_path, b.images_test / 255, b.labels_test, zca.whiten)
    assert accuracy(tmp_path) == pytest.approx(expected, abs=1e-4)
    assert "was whitened by another data set" in refused(PLAIN, *data, "b.npz", "--num_eval", 1)
    next(tmp_path.rglob("trained_on.pt")).unlink()
    assert "gives another whitening than the networks in" in refused(STAGE3, *data, "b.npz", *TEST)


def test_networks_that_know_the_classes_in_another_order(in_process, tmp_path):
    """As if stage 2 had numbered the classes backwards: its last layer and its names are turned around."""
    data = ["--dataset", "Digits", *MODEL]
    in_process("main.py", *data, *QUICK, "--init", "real")
    in_process(PLAIN, *data, "--num_eval", 1, "--epoch_eval_train", 60)
    in_process(STAGE3, *data, *TEST)
    before = accuracy(tmp_path)
    path = next(tmp_path.rglob("syn_trained_*_best.pt"))
    state = torch.load(path, weights_only=True)
    torch.save({n: t.flip(0) if n.startswith("classifier") else t for n, t in state.items()}, path)
    args = path.parent / "args.json"
    about = json.loads(args.read_text())
    assert about["data"]["class_names"] == [str(n) for n in range(10)]
    about["data"]["class_names"].reverse()
    args.write_text(json.dumps(about))
    assert "classes in the order of the networks in" in in_process(STAGE3, *data, *TEST)
    assert accuracy(tmp_path) == before


def test_networks_that_do_not_say_what_they_know(in_process, tmp_path):
    data = ["--dataset", "Digits", *MODEL]
    in_process("main.py", *data, *QUICK)
    in_process(PLAIN, *data, "--num_eval", 1, "--epoch_eval_train", 2)
    next(tmp_path.rglob("result-model*/**/args.json")).unlink()
    assert "do not say what they were trained on: images are normalised by" in in_process(STAGE3, *data, *TEST)


@pytest.fixture
def named(tiny_real) -> RealData:
    return replace(tiny_real, class_names=("cat", "dog", "owl"))


@pytest.mark.parametrize("soft", [False, True])
def test_a_set_with_classes_in_another_order(named, tmp_path, soft):
    turned = replace(named, class_names=("owl", "cat", "dog"))  # class 0 of the set is class 2 of the data
    images = torch.randn(6, 3, 16, 16)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    if soft:
        labels = torch.eye(3)[labels] * 0.7 + 0.1
    DistilledFile.write(tmp_path / "res_a.pt", [SyntheticSet(images, labels)], {}, turned, {})
    for found in (
        DistilledFile.open(tmp_path / "res_a.pt").set(0, named),
        read_distilled([str(tmp_path / "res_a.pt")], named, Assumptions()).synthetic,
    ):
        assert found.hard_labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.equal(found.images, images[[2, 3, 4, 5, 0, 1]])
        if soft:
            torch.testing.assert_close(found.labels, torch.eye(3)[[0, 0, 1, 1, 2, 2]] * 0.7 + 0.1)
    with pytest.raises(
        UserError, match=r"--data_path: its classes are not those of .*res_a.pt: it lacks owl, and has pig"
    ):
        DistilledFile.open(tmp_path / "res_a.pt").set(0, replace(named, class_names=("cat", "dog", "pig")))


def test_a_published_set_keeps_its_classes(named, in_process, tmp_path):
    turned = replace(named, name="ImageFolder", class_names=("owl", "cat", "dog"))
    made = SyntheticSet(torch.randn(3, 3, 16, 16), torch.arange(3))
    DistilledFile.write(tmp_path / "res_a.pt", [made], {}, turned, {})
    in_process("scripts.publish", tmp_path / "res_a.pt", "--out", "published")
    real = replace(named, name="ImageFolder")
    found = read_distilled([str(tmp_path / "published")], real, Assumptions()).synthetic
    assert torch.equal(found.images, made.images[[1, 2, 0]])


def test_results_of_networks_that_know_the_classes_in_another_order_are_published(named, monkeypatch, tmp_path):
    """Their set is that of stage 1, with other numbers of the classes."""
    turned = replace(named, class_names=("owl", "cat", "dog"))
    made = SyntheticSet(torch.randn(6, 3, 16, 16), torch.arange(3).repeat_interleave(2), factor=2)
    DistilledFile.write(tmp_path / "res_a.pt", [made], {}, turned, {})
    known = DistilledFile.open(tmp_path / "res_a.pt").set(0, named)
    DistilledFile.write(tmp_path / "trained_on.pt", [known], {}, named, {})
    (tmp_path / "args.json").write_text(json.dumps({"networks": str(tmp_path), "flags": {"model": "MLP"}}))
    monkeypatch.setattr(publish, "load_results", lambda folder: folder)
    published = Published(made, named.mean, named.std, None, named.name, 3, class_names=turned.class_names)
    assert publish._results([str(tmp_path)], published) == {"MLP": tmp_path}
    other = replace(published, class_names=named.class_names)  # the same images under other names
    with pytest.raises(UserError, match="were trained on another set"):
        publish._results([str(tmp_path)], other)


def test_class_order():
    assert class_order(["b", "a"], ("a", "b"), "x") == [1, 0]
    assert class_order([], ("a", "b"), "x") is None
    assert class_order(None, ("a", "b"), "x") is None
    assert class_order(["a", "b"], (), "x") is None
    assert renumbered(torch.tensor([0, 1, 1]), [1, 0]).tolist() == [1, 0, 0]
    assert renumbered(torch.tensor([[0.2, 0.8]]), [1, 0]).tolist() == [[pytest.approx(0.8), pytest.approx(0.2)]]
