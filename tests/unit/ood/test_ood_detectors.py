"""Scores through pytorch-ood: as the library computes them on the whole network; and the errors before any work."""

import json
import re
import sys
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pytorch_ood import detector as library
from pytorch_ood.metrics import OODMetrics
from pytorch_ood.metrics import functional as theirs
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from networks import get_network
from networks.convnet import ConvNet
from utils.compute import cpu_batches, device
from utils.compute.device import Compute
from utils.compute.version import versions, versions_line
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.download import fetch_pytorch_ood
from utils.data.synthetic import SyntheticSet
from utils.ood.evaluate import evaluate_ood, score_networks
from utils.ood.measures import best_temperature, calibration, ood_measures
from utils.ood.scorer import FitSet, Scorer, feature_map_shape, last_layer_name
from utils.ood.scores import ALL_SCORES, DETECTORS, SCORES, Model, require_library
from utils.ood.sets import OODSet
from utils.outliers.sources import TINYIMAGES, load_outlier_pool
from utils.report.results import results_of
from utils.report.tables import report_text
from utils.training.network_training import save_network
from utils.training.trainer import Trainer, TrainSettings, predict


def last_layer(net):
    return net.get_submodule(last_layer_name(net))


def fit_set(digits, per_class):
    index = torch.cat([digits.class_indices[c][:per_class] for c in range(10)])
    images = digits.train_batch(index)
    return FitSet("distilled set", digits.labels_train[index], lambda i: images[i])


@pytest.fixture(scope="module")
def trained(digits):
    """Two networks that know the digits somewhat: ten images per class, a few epochs."""
    fit = fit_set(digits, 10)
    synthetic = SyntheticSet(fit.take(torch.arange(100)), fit.labels)
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = ConvNet(1, 10, (8, 8), width=16, depth=2)
        Trainer(net, TrainSettings(40, lr=0.05)).train(synthetic, 1, ("t",))
        nets.append(net.eval())
    return nets


@pytest.fixture(scope="module")
def noise(digits):
    g = torch.Generator().manual_seed(0)
    return torch.randn(90, 1, 8, 8, generator=g)


def test_our_measures_are_pytorch_oods_and_sklearns(digits, trained, noise):
    """On trained networks. pytorch-ood takes the first recall of 95 % and trapezoids; the curves are the same."""
    for net in trained:
        scorer = Scorer(net, ("msp", "energy", "gen"), 1.0, digits.std).prepare(noise[:2], None, 64)
        inside, outside = scorer(digits.test_images, 64)[1], scorer(noise, 64)[1]
        for name in scorer.scores:
            found = ood_measures(inside[name], outside[name])
            scores = torch.tensor(np.r_[inside[name], outside[name]])
            labels = torch.cat([digits.labels_test, torch.full((len(noise),), -1)])
            out = (labels < 0).numpy()
            reference = OODMetrics().update(scores, labels).compute()
            assert found["auroc"] == pytest.approx(reference["AUROC"], abs=1e-6)
            assert found["auroc"] == pytest.approx(roc_auc_score(out, scores), abs=1e-6)
            for ours, sign, positive in (("out", 1, "ood"), ("in", -1, "id")):
                side = out if positive == "ood" else ~out
                precision, recall, _ = theirs.pr_curve(scores, labels, positive)
                assert reference[f"AUPR-{ours.upper()}"] == pytest.approx(
                    -torch.trapezoid(precision, recall).item(), abs=1e-6
                )
                step = -(recall.diff() * precision[:-1]).sum().item()
                assert found[f"aupr_{ours}"] == pytest.approx(step, abs=1e-6)
                assert found[f"aupr_{ours}"] == pytest.approx(average_precision_score(side, sign * scores), abs=1e-6)
                fpr, tpr, _ = theirs.roc_curve(sign * scores, torch.where(torch.tensor(side), -1, 0))
                nearest = tpr[1:][(tpr[1:] - 0.95).abs().argmin()].item()
                assert found[f"fpr_{ours}"] == pytest.approx(fpr[tpr == nearest].max().item(), abs=1e-6)
                by_sklearn = roc_curve(side, sign * scores, drop_intermediate=False)
                assert found[f"fpr_{ours}"] == pytest.approx(by_sklearn[0][by_sklearn[1] == nearest].max(), abs=1e-6)
            fpr, tpr, _ = theirs.roc_curve(scores, labels)
            first = fpr[tpr >= 0.95][0].item()
            assert reference["FPR95TPR"] == pytest.approx(first, abs=1e-6)


def alone(name, net, digits):
    """The detector as pytorch-ood's own documentation builds it, on whole modules."""
    head = last_layer(net)
    return {
        "entropy": lambda: library.Entropy(net),
        "gen": lambda: library.GEN(net),
        "klmatching": lambda: library.KLMatching(net),
        "openmax": lambda: library.OpenMax(net),
        "tscaling": lambda: library.TemperatureScaling(net),
        "knn": lambda: library.KNN(net.embed, k=10),
        "nnguide": lambda: library.NNGuide(net.embed, head, k=10),
        "mahalanobis": lambda: library.Mahalanobis(net.embed),
        "rmd": lambda: library.RMD(net.embed),
        "gmm": lambda: library.GMM(net.embed),
        "vim": lambda: library.ViM(net.embed, 32, head.weight, head.bias),
        "dice": lambda: library.DICE(net.embed, head.weight, head.bias, 0.9),
        "she": lambda: library.SHE(net.embed, head),
        "nci": lambda: library.NCI(net.embed, head),
        "fdbd": lambda: library.fDBD(net.embed, head),
        "pnml": lambda: library.PNML(net.embed, head),
        "lts": lambda: library.LTS(net.embed, head),
        "react": lambda: library.ReAct(net.features, lambda maps: head(maps.flatten(1))),
        "ash": lambda: library.ASH(net.features, lambda maps: head(maps.flatten(1))),
        "scale": lambda: library.SCALE(net.features, lambda maps: head(maps.flatten(1))),
        "vra": lambda: library.VRA(net.features, lambda maps: head(maps.flatten(1))),
        "rankfeat": lambda: library.RankFeat(net.features, lambda maps: head(maps.flatten(1))),
        "odin": lambda: library.ODIN(net, norm_std=list(digits.std)),
        "mahalanobis_odin": lambda: library.MahalanobisODIN(net.embed, norm_std=list(digits.std)),
        "gradnorm": lambda: library.GradNorm(net, param_filter=lambda n: n == "classifier.weight"),
        "graduncertainty": lambda: library.GradUncertainty(net),
    }[name]()


def temperature_by_lbfgs(logits, labels):
    """The best temperature, by the optimiser of PyTorch with a line search."""
    logits, scale = logits.double(), torch.ones((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([scale], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss():
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(logits * scale, labels)
        value.backward()
        return value

    optimiser.step(loss)
    return 1 / scale.item()


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_detector_scores_as_by_itself(name, digits, trained, noise):
    fit = fit_set(digits, 10)
    scorer = Scorer(trained[0], (name,), 1.0, digits.std).prepare(noise[:2], fit, 100)
    logits, scores = scorer(noise, 100)
    reference = alone(name, trained[0], digits)
    if DETECTORS[name].fits:
        reference.fit(DataLoader(TensorDataset(fit.take(torch.arange(100)), fit.labels), 100))
    if name == "tscaling":  # the library's own 50 steps end before the minimum
        fitted = predict(trained[0], fit.take(torch.arange(100)), 100)
        reference.t.data = torch.tensor(temperature_by_lbfgs(fitted, fit.labels))
    # openmax measures distances only to the classes that a batch is predicted to be of: here to all
    expected = reference.predict(torch.cat([noise, fit.take(torch.arange(100))])).detach().numpy()[:90]
    rtol = 1e-3 if name == "rmd" else 1e-4  # the library's is a difference of two distances in float32
    assert scores[name].shape == (90,)
    assert scores[name].dtype == np.float64
    np.testing.assert_allclose(scores[name], expected, rtol=rtol, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(logits, predict(trained[0], noise, 100).double().numpy())
    by_seven = scorer(noise[:35], 7)[1][name]
    np.testing.assert_allclose(by_seven, expected[:35], rtol=rtol, atol=1e-5 * np.abs(expected).max())


def ridge_inverse(centred, ridge=1e-6):
    """The inverse of the scatter of rows plus a ridge, by singular values: exact where the scatter has no inverse."""
    _, s, vt = np.linalg.svd(centred)
    variances = np.pad(s**2, (0, len(vt) - len(s)))
    return vt.T / (variances + ridge) @ vt


@pytest.mark.parametrize("images", [40, 400])
def test_distances_by_a_covariance_of_fewer_images_than_features(images):
    """Features of the size that networks have, 64 of them; the library alone misses the first case by far."""
    rng = np.random.default_rng(0)
    spread = np.exp(-np.arange(64) / 8) * 20
    labels = np.arange(images) % 4
    x, z = (rng.normal(size=(n, 64)) * spread + 5 for n in (images, 50))
    x[np.arange(images), labels] += 9
    x, z = x.astype(np.float32), z.astype(np.float32)
    centres = np.stack([x[labels == k].mean(0, dtype=float) for k in range(4)])
    within, overall = ridge_inverse(x - centres[labels]), ridge_inverse(x - x.mean(0, dtype=float))
    distances = np.stack([(((z - c) @ within) * (z - c)).sum(1) for c in centres])
    background = (((z - x.mean(0, dtype=float)) @ overall) * (z - x.mean(0, dtype=float))).sum(1)
    expected = {"mahalanobis": distances.min(0) / 2, "rmd": (distances - background).min(0)}
    features, labels = torch.from_numpy(x), torch.from_numpy(labels)
    for name, wanted in expected.items():
        score = DETECTORS[name].make(DETECTORS[name], Model(None, 1.0, (1.0,)))
        score.fit(features, labels)
        np.testing.assert_allclose(score(torch.from_numpy(z)).numpy(), wanted, rtol=1e-6)
    assert torch.get_default_dtype() is torch.float32
    alone = library.Mahalanobis(None).fit_features(features, labels).predict_features(torch.from_numpy(z))
    assert np.allclose(alone, expected["mahalanobis"], rtol=1e-2) == (images > 64)


def test_one_pass_serves_all_scores_of_logits_and_features(digits, trained, noise):
    passes = []
    names = [n for n in ALL_SCORES if n in SCORES or (DETECTORS[n].takes != "images" and n != "openmax")]
    scorer = Scorer(trained[0], names, 1.0, digits.std).prepare(noise[:2], fit_set(digits, 2), 64)
    scorer(noise, 64)  # also decides into how many parts a batch is split
    hook = trained[0].features.register_forward_hook(lambda *_: passes.append(1))
    try:
        scores = scorer(noise, 64)[1]
    finally:
        hook.remove()
    assert len(passes) == 2
    assert set(scores) == set(names)
    logits = predict(trained[0], noise, 64).double()
    for name in SCORES:
        np.testing.assert_array_equal(scores[name], SCORES[name](logits, 1.0).numpy())


def test_the_map_before_the_features():
    shapes = {}
    for name in ("ConvNet", "AlexNet", "ResNet18", "ResNet18_AP", "MLP", "LeNet"):
        net = get_network(name, 3, 10, (32, 32)).eval()
        shapes[name] = feature_map_shape(torch.zeros(1, 3, 32, 32), net.embed)
        assert np.prod(shapes[name]) == last_layer(net).in_features
    assert shapes["ConvNet"] == (128, 4, 4)
    assert shapes["AlexNet"] == (192, 4, 4)
    assert shapes["ResNet18"] == (512, 1, 1)
    assert shapes["ResNet18_AP"] == (512, 4, 4)
    assert shapes["MLP"] == (128, 1, 1)
    assert shapes["LeNet"] == (84, 1, 1)


def test_errors_come_before_work(digits, trained, noise, monkeypatch):
    mlp = get_network("MLP", 1, 10, (8, 8), generator(0))
    with pytest.raises(UserError, match=r"--score rankfeat: .* MLP ends in 128 features without one"):
        Scorer(mlp, ("rankfeat",), 1.0, digits.std).prepare(noise[:2], None, 64)
    with pytest.raises(UserError, match=r"--score openmax: .* 3 or more images of each class"):
        Scorer(trained[0], ("openmax",), 1.0, digits.std).prepare(noise[:2], fit_set(digits, 1), 64)
    hopeless = FitSet("distilled set", torch.arange(10), lambda i: noise[i])
    with pytest.raises(UserError, match=r"--score she: cannot be fitted on the distilled set"):
        Scorer(mlp, ("she",), 1.0, digits.std).prepare(noise[:2], hopeless, 64)
    require_library(("msp", "knn"))
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    require_library(("msp", "energy"))
    with pytest.raises(UserError, match=r"--score knn vim: .*pip install pytorch-ood"):
        require_library(("msp", "knn", "vim"))


@pytest.mark.parametrize(
    ("version", "refused"), [("0.3.3", True), ("0.4", False), ("0.4.0rc1", False), ("0.10", False)]
)
def test_an_older_version_is_refused_wherever_it_is_used(version, refused, monkeypatch, tmp_path):
    """With 0.3.3 some detectors gave other numbers. The version counts, as what pip says of it."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "pytorch-ood" else real(name))
    monkeypatch.setattr("utils.data.download._fetch_into", None)  # nothing is fetched
    needed = "pytorch-ood 0.3.3 is installed; 0.4 or newer is needed: pip install --upgrade pytorch-ood"
    uses = {
        "--score knn vim": lambda: require_library(("msp", "knn", "vim")),
        "fetching Textures": lambda: fetch_pytorch_ood("Textures", tmp_path),
        "--oe_data_path: fetching": lambda: load_outlier_pool(tmp_path / TINYIMAGES, None, 1, 0, download=True),
    }
    require_library(("msp", "energy"))
    for what, use in uses.items():
        try:
            use()
            message = ""
        except UserError as error:
            message = str(error)
        assert (message.startswith(what) and message.endswith(f": {needed}")) if refused else needed not in message


def test_versions_name_what_computed(monkeypatch):
    """Each library of requirements.txt that computes; the optional one where it was loaded."""
    computing = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow")
    assert {name: versions()[name] for name in computing} == {name: metadata.version(name) for name in computing}
    require_library(("knn",))
    assert versions()["pytorch-ood"] == metadata.version("pytorch-ood")
    assert f"pytorch-ood {metadata.version('pytorch-ood')}" in versions_line(versions())
    monkeypatch.delitem(sys.modules, "pytorch_ood")
    require_library(("msp",))
    assert "pytorch-ood" not in versions()


@pytest.mark.parametrize("compiled", [False, True])
def test_only_compiled_code_sees_padded_batches(digits, trained, noise, compiled, monkeypatch):
    """And batches of one size alone, of which there would be two."""
    net, seen = trained[0], []
    monkeypatch.setattr(device, "Compiled", lambda function, mode, required: function)
    monkeypatch.setattr(cpu_batches, "MAX_PART_ELEMENTS", 10**12)
    hook = net.features[0].register_forward_hook(lambda module, x, out: seen.append(len(out)))
    batch = len(noise) - 1
    try:
        logits, _ = Scorer(net, ["msp"], 1.0, digits.std, Compute(compiled).embedding(net, batch))(noise, batch)
    finally:
        hook.remove()
    assert seen[-2:] == [batch, batch if compiled else 1]  # before it, an image to learn its size
    np.testing.assert_allclose(logits, predict(net, noise).double().numpy(), atol=1e-5)


def test_temperature_scaling_repairs_the_calibration(digits, trained, noise):
    fit = FitSet("real training set", digits.labels_train, digits.train_batch)
    scorer = Scorer(trained[0], ("tscaling",), 1.0, digits.std).prepare(noise[:2], fit, 256)
    networks = score_networks({0: scorer}, digits, [], 256)
    errors = networks[0].errors
    row = f"{errors['temperature']:.2f} | {100 * errors['scaled_ece']:.2f}"
    assert row in " ".join(report_text(results_of(networks), ("tscaling",)).split())
    logits = predict(trained[0], digits.test_images, 256)
    scaled = calibration((logits.double() / errors["temperature"]).numpy(), digits.labels_test.numpy())
    assert {name: errors[f"scaled_{name}"] for name in scaled} == pytest.approx(scaled, rel=1e-6)
    every = predict(trained[0], digits.train_batch(torch.arange(len(digits.labels_train))), 256)
    assert errors["temperature"] == pytest.approx(temperature_by_lbfgs(every, digits.labels_train), rel=1e-3)
    assert errors["scaled_nll"] < errors["nll"]
    plain = Scorer(trained[0], ("msp",), 1.0, digits.std).prepare(noise[:2], None, 256)
    assert "temperature" not in score_networks({0: plain}, digits, [], 256)[0].errors


def test_a_temperature_needs_a_mistake():
    logits = np.eye(3)
    with pytest.raises(ValueError, match="right on all of them"):
        best_temperature(logits, np.arange(3))
    assert best_temperature(5 * logits, np.array([0, 1, 0])) > 1


def test_stage_3_in_bfloat16(in_process, monkeypatch, tmp_path):
    """`--precision` reaches the scores: they are near those of float32, and others."""
    monkeypatch.setattr(device, "has_bfloat16_instructions", lambda: True)
    shared = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 1, "--method", "DC"]
    in_process("main.py", *shared, "--init", "real", "--Iteration", 0, "--num_exp", 1, "--num_eval", 1,
               "--epoch_eval_train", 1)  # fmt: skip
    in_process("train_model_synthetic_no_oe.py", *shared, "--num_eval", 1, "--epoch_eval_train", 20)
    found = {}
    for precision in ("fp32", "bf16"):
        flags = ["--num_exp", 1, "--is_load_best", "--ood_sets", "gaussian", "--precision", precision]
        out = in_process("test_ood_model_syn.py", *shared, *flags, "--save_path", precision)
        assert re.search(rf"computing: .*, {precision}", out)
        (path,) = (tmp_path / precision).rglob("results.json")
        found[precision] = json.loads(path.read_text())["errors"][0]["nll"]
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)


def test_times_of_scores(in_process, refused, monkeypatch, tmp_path):
    """A row for each score; a dash where one cannot be fitted; times for 10,000 images from those of fewer."""
    shared = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 1, "--method", "DC"]
    in_process("main.py", *shared, "--init", "real", "--Iteration", 0, "--num_exp", 1, "--num_eval", 1,
               "--epoch_eval_train", 1)  # fmt: skip
    in_process("train_model_synthetic_no_oe.py", *shared, "--num_eval", 1, "--epoch_eval_train", 5)
    (folder,) = (tmp_path / "result-model-synthetic-no-oe/DC/Digits/ConvNetD1/1").iterdir()
    clock = iter(range(1000))  # each reading is a second later
    import score_times

    monkeypatch.setattr(score_times.time, "perf_counter", lambda: next(clock))
    out = in_process("score_times.py", folder, "--scores", "msp", "knn", "openmax", "--images", 20, "--out", "t.md")
    assert (tmp_path / "t.md").read_text() == out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:]]
    assert rows == [
        ["msp", "", "", "500.00"], ["knn", "1.00", "1.00", "500.00"], ["openmax", "-", "1.00", "500.00"]
    ]  # fmt: skip
    monkeypatch.setitem(DETECTORS, "openmax", replace(DETECTORS["openmax"], least=10**6))
    assert "| openmax | -" in in_process("score_times.py", folder, "--scores", "openmax")
    assert "is no run folder of stage 2" in refused("score_times.py", tmp_path)


# --- a network from anywhere ------------------------------------------------------------------------------------------


class Stranger(torch.nn.Module):
    """A network without `embed`, whose layers have other names; in one of two forms its last layer is not the last."""

    def __init__(self, net, scale=1.0):
        super().__init__()
        self.body, self.top, self.scale = net.features, net.classifier, scale

    def forward(self, images):
        return self.top(self.body(images).flatten(1)) * self.scale


def by_scikit_learn(inside, outside):
    labels, scores = np.repeat([0, 1], [len(inside), len(outside)]), np.r_[inside, outside]
    return {
        "auroc": roc_auc_score(labels, scores),
        "aupr_out": average_precision_score(labels, scores),
        "aupr_in": average_precision_score(1 - labels, -scores),
    }


def test_a_network_from_anywhere(digits, trained, noise):
    """Accuracy and measures as of an own forward pass and scikit-learn."""
    net = Stranger(trained[0])
    own = {"msp": lambda z: -z.softmax(1).amax(1), "energy": lambda z: -z.logsumexp(1)}
    with torch.no_grad():
        inside, outside = (net(x).double() for x in (digits.test_images, noise))
    for sets in ({"noise": noise}, [OODSet("noise", "here", len(noise), lambda: noise)]):
        found = evaluate_ood(net, digits, sets, (*own, "entropy"), batch=100)
        assert found.accuracy == pytest.approx((inside.argmax(1) == digits.labels_test).double().mean())
        assert found.errors["nll"] == pytest.approx(
            torch.nn.functional.cross_entropy(inside, digits.labels_test).item()
        )
        for name, score in own.items():
            expected = by_scikit_learn(score(inside).numpy(), score(outside).numpy())
            assert {m: found.measures["noise"][name][m] for m in expected} == pytest.approx(expected, abs=1e-9)
    assert set(found.measures["noise"]) == {"msp", "energy", "entropy"}


def test_test_images_are_no_ood_set(digits, trained, noise, capsys):
    """Whatever its name; a few of them are told."""
    some = torch.cat([noise[:30], digits.test_images[:3]])
    evaluate_ood(trained[0], digits, {"photos": some})
    assert "--ood_sets photos: 3 of its 33 images are test images of Digits" in capsys.readouterr().out
    with pytest.raises(UserError, match="photos: 3 of its 5 images are test images of Digits; leave it out"):
        evaluate_ood(trained[0], digits, {"photos": some[-5:]})
    for most in (1, 255):
        pixels = torch.linspace(0, most, 576).view(9, 1, 8, 8)
        with pytest.raises(
            UserError, match=rf"sets: photos has numbers from 0 to {most}, like pixels; give normalised"
        ):
            evaluate_ood(trained[0], digits, {"photos": pixels})
    with pytest.raises(UserError, match=r"sets: photos has numbers of the type torch.uint8, like pixels; give"):
        evaluate_ood(trained[0], digits, {"photos": pixels.byte()})
    with pytest.raises(UserError, match=r"sets: photos has images \[3, 8, 8\]; those of Digits are \[1, 8, 8\]"):
        evaluate_ood(trained[0], digits, {"photos": torch.randn(9, 3, 8, 8)})
    plain = replace(digits, mean=(0.0,), std=(1.0,))  # whose networks take pixels
    assert set(evaluate_ood(trained[0], plain, {"photos": torch.rand(9, 1, 8, 8)}).measures) == {"photos"}


def test_features_of_a_named_layer(digits, trained, noise):
    """What enters the last layer, wherever it stands: the same scores as through `embed`, also of fitted detectors."""
    scores = ("msp", "tscaling", "knn", "vim", "ash", "gradnorm", "mahalanobis_odin")
    fit = fit_set(digits, 10)
    expected = evaluate_ood(trained[0], digits, {"noise": noise}, scores, fit)
    found = evaluate_ood(Stranger(trained[0]), digits, {"noise": noise}, scores, fit, last_layer="top")
    for name in scores:
        np.testing.assert_allclose(found.out_scores["noise"][name], expected.out_scores["noise"][name], rtol=1e-4)
    unit = torch.nn.functional.normalize
    known, *others = (
        unit(trained[0].embed(x).detach()) for x in (fit.take(torch.arange(100)), digits.test_images, noise)
    )
    distances = [NearestNeighbors(n_neighbors=10).fit(known).kneighbors(x)[0][:, -1] for x in others]
    by_hand = by_scikit_learn(*distances)
    assert {m: found.measures["noise"]["knn"][m] for m in by_hand} == pytest.approx(by_hand, abs=1e-6)
    assert found.errors["temperature"] == pytest.approx(expected.errors["temperature"], rel=1e-4)


def test_detectors_are_fitted_on_the_training_images_if_nothing_else_is_given(digits, trained, noise):
    every = FitSet("real training set", digits.labels_train, digits.train_batch)
    given, left_out = (evaluate_ood(trained[0], digits, {"noise": noise}, ["gmm"], f).measures for f in (every, None))
    assert given == left_out


def test_networks_that_do_not_fit(digits, trained, noise):
    net, sets = Stranger(trained[0]), {"noise": noise}
    for scores, more, message in (
        (["mps"], {}, "unknown score 'mps'; did you mean msp"),
        (["knn"], {}, "--score knn: needs the last layer of the network: give last_layer"),
        (["gradnorm"], {}, "--score gradnorm: needs the last layer"),
        (["knn"], {"last_layer": "fc"}, "last_layer fc: is no linear layer of the network; it has top"),
        (["rankfeat"], {"last_layer": "top", "net": Stranger(trained[0], 2.0)}, "last_layer top: its outputs are not"),
        (["msp"], {"net": trained[0].features}, r"net: gives \[2, .*must give logits \[2, 10\]"),
        (["msp"], {"net": Tuple()}, r"net: gives tuple for 2 images"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_ood(more.pop("net", net), digits, sets, scores, fit_set(digits, 1), **more)


class Scaled(torch.nn.Module):
    """A network with an `embed` that does not lead to its logits by its last layer."""

    def __init__(self, net, last):
        super().__init__()
        self.embed = net.embed
        setattr(self, last, last_layer(net))
        self.last = last

    def forward(self, images):
        return 3 * getattr(self, self.last)(self.embed(images))


def test_an_embedding_that_is_not_what_the_last_layer_takes(digits, trained, noise):
    """It is not used in the place of the network, whether it looks like ours, gives a wrong size, or has another last
    layer."""
    narrow = Scaled(trained[0], "fc")
    narrow.forward = lambda images: 2 * trained[0](images)
    narrow.embed = lambda images: trained[0].embed(images)[:, :3]
    for net in (Scaled(trained[0], "fc"), Scaled(trained[0], "top"), narrow):
        found = evaluate_ood(net, digits, {"noise": noise})
        expected = torch.nn.functional.cross_entropy(net(digits.test_images), digits.labels_test).item()
        assert found.errors["nll"] == pytest.approx(expected, rel=1e-5)
        with pytest.raises(UserError, match="--score knn: needs the last layer of the network: give last_layer"):
            evaluate_ood(net, digits, {"noise": noise}, ["knn"], fit_set(digits, 1))
    with pytest.raises(UserError, match="last_layer fc: its outputs are not those of the network"):
        evaluate_ood(narrow, digits, {"noise": noise}, last_layer="fc")


class Tuple(torch.nn.Module):
    """A network that gives more than logits."""

    def forward(self, images):
        return images, images


def test_the_lines_in_the_documentation(digits, trained, tmp_path, monkeypatch):
    """They test a network of the user's on two generated sets and on a folder."""
    text = (ROOT / "docs" / "evaluate.md").read_text().partition("## A network\n")[2]
    (tmp_path / "my" / "photos").mkdir(parents=True)
    for i in range(5):
        Image.new("L", (12, 12), 50 * i).save(tmp_path / "my" / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    (networks := tmp_path / "result-quickstart/1/poe/2-networks/run").mkdir(parents=True)
    save_network(networks / "x_exp0_best.pt", digits.network("ConvNetD2", generator(3)))
    exec(lines, of_quickstart := {})
    assert type(of_quickstart["net"]).__name__ == "ConvNet"
    names = {"mine": Stranger(trained[0])}
    exec(re.sub(r"net = load_network.*", "net = mine", lines).replace('"blob"]', '"blob", "my/photos"]'), names)
    found = names["found"]
    assert found.accuracy != of_quickstart["found"].accuracy
    assert set(found.measures) == {"uniform", "blob", "photos"}
    assert 0.5 < found.accuracy <= 1
    assert len(found.out_scores["photos"]["energy"]) == 5


@pytest.mark.parametrize(("score", "gaps"), [("entropy", (20, 25)), ("gen", (18, 20)), ("klmatching", (25, 30))])
def test_sure_networks_do_not_tie(score, gaps, digits):
    """In float32 their probabilities are all 1, and so the library's scores are the same."""
    logits = torch.zeros(10 + len(gaps), 10)
    logits[range(10), range(10)] = 3.0  # of each class
    logits[10:, 3] = torch.tensor(gaps, dtype=torch.float32)
    fit = FitSet("some", torch.arange(10), lambda index: logits[index])
    found = Scorer(nn.Identity(), (score,), 1.0, digits.std).prepare(logits[:2], fit, 2)(logits[10:], 2)[1][score]
    detector = getattr(library, DETECTORS[score].cls)(None)
    if score == "klmatching":
        detector.fit_logits(logits[:10], torch.arange(10))
    assert detector.predict_logits(logits[10:]).unique().numel() == 1
    assert (np.diff(found) < 0).all() if score != "klmatching" else np.diff(found).all()
