"""What `scripts/dev/outlier_moves.py` says of a distillation, against numpy and SciPy."""

import json

import numpy as np
import pytest
import torch
from conftest import made
from scipy.spatial.distance import pdist

from networks import get_network
from utils.core.rng import generator
from utils.core.run_script import run_script
from utils.data.augment import DSA
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientSettings
from utils.outliers.sources import PseudoOutliers
from utils.training.trainer import Trainer, TrainSettings

FLAGS = [
    "--dataset",
    "Digits",
    "--model",
    "ConvNetD1",
    "--ipc",
    2,
    "--method",
    "DM",
    "--batch_real",
    16,
    "--batch_oe",
    8,
]
FLAGS += ["--dsa_strategy", "crop_scale", "--Iteration", 20, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 2]


@pytest.fixture
def moves(monkeypatch):
    import outlier_moves

    return outlier_moves


def test_the_values_of_a_run(in_process, moves, digits, tmp_path):
    in_process("main_poe.py", *FLAGS, "--lr_img_oe", 5, "--seed", 3)
    (path,) = tmp_path.glob("result-poe/*/Digits/ConvNetD1/2/*/args.json")
    values = moves.measure(*moves.read_run(path), 1, 3)
    (file,) = path.parent.glob("res_*.pt")
    content = torch.load(file, weights_only=True)
    images, labels = content["data"][0]
    outliers = content["data_oe"][0][0]

    method = made(
        DistributionMatching,
        digits,
        PseudoOutliers(digits),
        GradientSettings(model="ConvNetD1", ipc=2, seed=3, init="real"),
    )
    method.start(0)
    start = method.synthetic().images_oe
    assert values["moved"] == pytest.approx(np.sqrt(((outliers - start).numpy() ** 2).mean()), rel=1e-5)
    assert values["moved"] > 0.1

    mean, std = (np.array(content["normalisation"][name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    pixels = outliers.numpy() * std + mean
    assert values["outside"] == pytest.approx(((pixels < -1e-4) | (pixels > 1 + 1e-4)).mean(), abs=1e-3)
    lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_oe"] for line in lines if "loss_oe" in line]
    assert values["loss_first"] == pytest.approx(np.mean(losses[:2]))
    assert values["loss_last"] == pytest.approx(np.mean(losses[-2:]))

    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0))
    trainer = Trainer(net, TrainSettings(3, augmentation=DSA(("crop", "scale"))))
    trainer.train_fresh(SyntheticSet(images, labels), 3, ("moves", 0))
    with torch.no_grad():
        for name, shown in (("_start", start), ("", outliers)):
            features = net.embed(shown).flatten(1).numpy().astype(np.float64)
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            assert values[f"distance{name}"] == pytest.approx(pdist(features).mean(), rel=1e-4)
            logits = net(shown).numpy().astype(np.float64)
            powers = np.exp(logits - logits.max(1, keepdims=True))
            assert values[f"confidence{name}"] == pytest.approx((1 / powers.sum(1)).mean(), rel=1e-4)


def test_outliers_in_parts_start_as_the_run_did(in_process, moves, tmp_path):
    in_process("main_poe.py", *FLAGS, "--seed", 3, "--factor", 2, "--Iteration", 0)
    (path,) = tmp_path.glob("result-poe/*/Digits/ConvNetD1/2/*/args.json")
    _, start = moves.start_of(json.loads(path.read_text())["flags"])
    (file,) = path.parent.glob("res_*.pt")
    assert torch.equal(start, DistilledFile.open(file).set().decoded().images_oe)


def test_the_table(in_process, pictures, moves, tmp_path, capsys):
    for seed in (1, 2):
        in_process("main_poe.py", *FLAGS, "--lr_img_oe", 5, "--seed", seed)
    in_process("main.py", *FLAGS[:10], *FLAGS[12:])  # a set without outliers is no row
    out, picture = tmp_path / "moves.md", tmp_path / "moves.png"
    flags = ["--names", "two", "--networks", "1", "--epochs", "2", "--out", str(out), "--picture", str(picture)]
    moves.main(moves.get_args_parser().parse_args([str(tmp_path), *flags]))
    shown = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert out.read_text() == shown
    (row,) = [line.split("|") for line in shown.splitlines()[2:]]
    assert [cell.strip() for cell in row[1:3]] == ["two", "2"]
    assert len(row) - 2 == 2 + len(moves.COLUMNS)


def test_the_curves(in_process, pictures, moves, tmp_path, capsys):
    """A line for each seed, over the iterations of its runs; rows are told apart by iterations, too."""
    at = FLAGS.index("--Iteration") + 1
    for iterations, seed in ((20, 1), (5, 1), (5, 2)):
        flags = [*FLAGS[:at], iterations, *FLAGS[at + 1 :]]
        in_process("main_poe.py", *flags, "--lr_img_oe", 5, "--seed", seed)
    picture = tmp_path / "curves.png"
    flags = ["--names", "DM", "--networks", "1", "--epochs", "2", "--curves", str(picture)]
    moves.main(moves.get_args_parser().parse_args([str(tmp_path), *flags]))
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["DM, 5 iterations", "2"], ["DM, 20 iterations", "1"]]
    assert picture.read_bytes().startswith(b"\x89PNG")

    runs = [moves.read_run(path) for path in tmp_path.glob("result-poe/*/Digits/ConvNetD1/2/*/args.json")]
    measured = {"DM": [(run[0], moves.measure(*run, 1, 2)) for run in runs]}
    panels = moves.curves_of(measured)
    assert list(panels) == list(moves.CURVES)
    for flags, values in measured["DM"]:
        seed, iterations = flags["seed"], flags["Iteration"]
        assert panels["matching loss"]["DM"][seed][iterations] == values["loss_last"]
        outside = panels["pixels outside [0, 1], %"]["DM"][seed]
        assert outside[0] == 0  # they start as images
        assert outside[iterations] == 100 * values["outside"] > 0
        assert list(outside) == ([0, 5, 20] if seed == 1 else [0, 5])
        confidence = panels["confidence, %"]["DM"][seed]
        assert confidence[iterations] == 100 * values["confidence"]


def test_before_and_after(in_process, moves, digits, tmp_path):
    """Two runs of one seed share the start, which holds the images that distillation began with."""
    for name, more in (("one", ["--lr_img_oe", 5]), ("two", ["--lr_img_oe", 1e-30])):
        in_process("main_poe.py", *FLAGS, *more, "--save_path", tmp_path / name)
    firsts = []
    for name in ("one", "two"):
        (path,) = tmp_path.glob(f"{name}/*/Digits/ConvNetD1/2/*/args.json")
        firsts.append((name, *moves.read_run(path)[:2]))
    (start, first), (title, moved), (still, last) = moves.before_and_after(firsts)
    assert (start, title, still) == ("before", "one: after", "two: after")
    assert torch.equal(first, last)
    assert first.shape == (10, 2, 1, 8, 8)
    outliers = firsts[0][2].images_oe.numpy()
    mean, std = np.array(digits.mean), np.array(digits.std)
    expected = (outliers * std.reshape(1, -1, 1, 1) + mean.reshape(1, -1, 1, 1)).clip(0, 1)
    assert np.allclose(moved.flatten(0, 1).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("folders", "names", "message"),
    [
        (1, ["a", "b"], "--names: 2 names for 1"),
        (2, ["a", "a"], "--names: a a names two folders alike"),
        (1, ["a"], "holds no finished run"),
    ],
)
def test_bad_input(moves, tmp_path, capsys, folders, names, message):
    with pytest.raises(SystemExit) as stopped:
        run_script(
            lambda: moves.main(moves.get_args_parser().parse_args([str(tmp_path)] * folders + ["--names", *names])),
            "outlier_moves.py",
        )
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_only_finished_runs_count(in_process, moves, tmp_path):
    """An unfinished run holds the images of its last evaluation, at first those that it starts from."""
    in_process("main_poe.py", *FLAGS, "--lr_img_oe", 5)
    (path,) = tmp_path.glob("result-poe/*/Digits/ConvNetD1/2/*/args.json")
    (file,) = path.parent.glob("res_*.pt")
    with open(path.parent / "metrics.jsonl", "a") as metrics:
        metrics.write('{"experiment": 0, "los')  # cut off by a power cut
    assert moves.read_run(path) is not None
    assert DistilledFile.open(file).iterations_left() is None
    content = torch.load(file, weights_only=True)
    content["about"]["iteration"] = 7
    torch.save(content, file)
    assert DistilledFile.open(file).iterations_left() == (7, 20)
    assert moves.read_run(path) is None
    assert DistilledFile.open(file).iterations_left(1) is None


def test_networks_train_at_the_learning_rate_of_the_set(moves, digits, monkeypatch):
    rates = []
    original = Trainer.train_fresh
    monkeypatch.setattr(
        moves.Trainer,
        "train_fresh",
        lambda self, images, *a: rates.append((self.settings.lr, images.lr_net)) or original(self, images, *a),
    )
    images = digits.train_batch(torch.arange(10))
    synthetic = SyntheticSet(images, torch.arange(10), images, 0.03)
    flags = {"model": "ConvNetD1", "seed": 1, "method": "MTT", "dsa_strategy": "crop_scale"}
    moves.seen_by_networks(flags, digits, synthetic, [images], 1, 1)
    assert rates == [(None, 0.03)]
