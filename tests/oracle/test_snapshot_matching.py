"""Distribution matching on trained networks against float64 numpy and plain autograd, its snapshots, and resuming."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, made, named

import main
from networks import get_network, initialize
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import DSA, DSA_ENTRIES
from utils.data.synthetic import decode, decode_slots
from utils.methods import METHODS
from utils.methods.distances import CF_SCALE, characteristic
from utils.methods.snapshot_matching import TGDD_ENTRY, SnapshotMatching, SnapshotSettings
from utils.outliers.distilled import closeness
from utils.outliers.sources import PseudoOutliers
from utils.report import plots
from utils.settings.arguments import Stage1Settings
from utils.training.experts import ExpertBuffer

STRATEGY = DSA(tuple(DSA_ENTRIES))
SETTINGS = SnapshotSettings(
    model="ConvNetD1", ipc=1, seed=4, factor=2, lr_img=0.02, batch_real=6, batch_oe=5, init="real", lambda_oe=0.7
)


@pytest.fixture
def experts(tmp_path, request):
    """A buffer of two trajectories of 20 epochs each, of random weights; a parameter names another network."""
    trajectories = []
    for number in range(2):
        net = get_network(getattr(request, "param", "ConvNetD1"), 3, 3, (16, 16))
        trajectories.append([])
        for epoch in range(21):
            initialize(net, generator(number, epoch))
            trajectories[-1].append([p.detach().clone() for p in net.parameters()])
    torch.save(trajectories, tmp_path / "replay_buffer_0.pt")
    return ExpertBuffer(tmp_path, [p.shape for p in net.parameters()], None, "")


def make(real, experts, settings=SETTINGS, outliers=True):
    source = PseudoOutliers(real) if outliers else None
    method = made(SnapshotMatching, real.to(DEVICE), source, settings, experts)
    method.start(0)
    return method


def test_the_characteristic_function_is_that_of_numpy():
    features = torch.randn(3, 7, 5, generator=generator(1))
    frequencies = torch.randn(11, 5, generator=generator(2))
    f, t = features.double().numpy(), frequencies.double().numpy()
    f = f / np.linalg.norm(f, axis=-1, keepdims=True)
    expected = np.exp(1j * f @ t.T).mean(1)
    found = characteristic(features, frequencies).numpy()
    np.testing.assert_allclose(found, np.stack([expected.real, expected.imag], axis=1), atol=1e-6)


def test_the_published_distance_of_characteristic_functions(tiny_real, experts):
    """In the amplitudes and phases in which NCFM writes it (equation 5, with both halves equal)."""
    method = make(tiny_real, experts, replace(SETTINGS, feature_distance="cf", cf_frequencies=13))
    method.load_network(0)
    real, synthetic = (torch.randn(3, n, method.num_features, generator=generator(n)) for n in (9, 4))
    targets = torch.stack([method.target(of_slot) for of_slot in real])
    found = method.distance(synthetic, targets)
    a, b = (
        np.exp(1j * F.normalize(x, dim=-1).double().numpy() @ method.frequencies.double().numpy().T).mean(1)
        for x in (real, synthetic)
    )
    amplitude = 0.5 * (np.abs(a) - np.abs(b)) ** 2
    phase = np.abs(a) * np.abs(b) - a.real * b.real - a.imag * b.imag
    expected = CF_SCALE * np.sqrt(np.maximum(amplitude + phase, 0)).mean(-1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("snapshots", ["epochs", "interpolate"])
def test_which_snapshots_are_taken(tiny_real, experts, snapshots):
    """A tenth of the epochs lies between the two; or the first is on the line to the second, the last."""
    method = make(tiny_real, experts, replace(SETTINGS, snapshots=snapshots))
    trajectories = [t for _, t in experts.trajectories]
    seen = set()
    for it in range(60):
        method.load_network(it)
        matched, later = ([p.detach() for p in net.parameters()] for net in (method.net, method.classifier))
        if snapshots == "epochs":
            ((expert, epoch),) = [
                (i, e) for i, t in enumerate(trajectories) for e, ps in enumerate(t) if torch.equal(ps[0], matched[0])
            ]
            assert torch.equal(later[0], trajectories[expert][min(20, epoch + 2)][0])
            seen.add(epoch)
        else:
            (expert,) = [i for i, t in enumerate(trajectories) if torch.equal(t[-1][0], later[0])]
            first, last = trajectories[expert][0], trajectories[expert][-1]
            share = ((matched[0] - last[0]) / (first[0] - last[0])).mean()
            assert 0 <= share <= 1
            for a, b, p in zip(first, last, matched, strict=True):
                torch.testing.assert_close(p, share * a + (1 - share) * b, atol=1e-5, rtol=1e-4)
            seen.add(expert)
    assert (min(seen), max(seen)) == ((1, 20) if snapshots == "epochs" else (0, 1))


@pytest.mark.parametrize("outliers", [True, False])
def test_the_gradient_is_that_of_the_sum_of_both_losses(tiny_real, experts, outliers):
    """By one backward pass through decoding, augmentation, and both networks, in float64."""
    method = make(tiny_real, experts, replace(SETTINGS, dsa_strategy=named(STRATEGY)), outliers)
    stored = [t.detach().double().clone().requires_grad_() for t in method._tensors()]
    losses = method.iterate(3)
    net, classifier = (get_network("ConvNetD1", 3, 3, (16, 16)).double().train() for _ in range(2))
    for copy, original in ((net, method.net), (classifier, method.classifier)):
        copy.load_state_dict({name: t.double() for name, t in original.state_dict().items()})
    g, total = generator(4, "match", 0, "classify", 3), 0.0
    for kind, images in enumerate(stored):
        decoded = [decode(images[slot], 2) for slot in range(3)]
        transforms = method.transforms(kind, 3)
        for slot, real in enumerate(method.batches(kind, 3)):
            transform = transforms[slot]
            target = net.embed(transform(real.double())).mean(0)
            total = total + (net.embed(transform(decoded[slot])).mean(0) - target).square().sum()
        logits = classifier(torch.cat([STRATEGY.draw(4, (16, 16), g)(of_slot) for of_slot in decoded]))
        if kind == 0:
            total = total + 3 * 2.5 * F.cross_entropy(logits, torch.arange(3).repeat_interleave(4))
        else:
            total = total - 3 * 2.5 * 0.7 * logits.log_softmax(1).mean(1).mean()
    expected = torch.autograd.grad(total, stored)
    for images, gradient in zip(method._tensors(), expected, strict=True):
        assert (images.grad.double() - gradient).norm() < 1e-4 * gradient.norm()
    value = sum(loss.sum() for name, loss in losses.items() if name != "loss_ce") + 3 * 2.5 * losses["loss_ce"].sum()
    assert value.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("experts", ["ConvNetD1", "ConvNetBN"], indirect=True)
def test_images_and_outliers_are_classified_together(tiny_real, experts, request, monkeypatch):
    """With BatchNorm in one pass, as experts were trained; without it the parts of a pass change nothing."""
    model = request.node.callspec.params["experts"]
    method = make(tiny_real, experts, replace(SETTINGS, model=model, dsa_strategy=named(STRATEGY)))
    method.load_network(0)
    kinds = [decode_slots(t.detach(), 2) for t in method._tensors()]
    found, gradients = method._classification(kinds, generator(1))
    g, net = generator(1), method.classifier.double()
    leaves = [images.double().requires_grad_() for images in kinds]
    seen = [STRATEGY.draw(4, (16, 16), g)(of_slot) for images in leaves for of_slot in images]
    logits = net(torch.cat(seen)).log_softmax(1)
    labels = torch.arange(3).repeat_interleave(4)
    expected = F.nll_loss(logits[:12], labels) - 0.7 * logits[12:].mean(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        assert (gradient.double() - wanted).norm() < 1e-4 * wanted.norm()
    if model == "ConvNetD1":
        method.classifier.float()
        monkeypatch.setattr("utils.methods.snapshot_matching.CHUNK_IMAGES", 16)  # two of the three slots
        method.splitter.count = lambda images, *lengths: 4
        in_parts = method._classification(kinds, generator(1))
        torch.testing.assert_close(in_parts[0], found)
        torch.testing.assert_close(in_parts[1], gradients)


def test_images_stay_in_the_range_of_pixels_and_all_move_together(tiny_real, experts):
    method = make(tiny_real, experts, replace(SETTINGS, lr_img=5.0))
    before = [t.detach().clone() for t in method._tensors()]
    method.iterate(0)
    for images, old in zip(method._tensors(), before, strict=True):
        pixels = tiny_real.denormalize(images.detach().flatten(0, 1))
        assert -1e-5 < pixels.min() < 0.01
        assert 0.99 < pixels.max() < 1 + 1e-5
        assert not torch.equal(images.detach(), old)


@pytest.mark.parametrize("distance", ["mean", "cf"])
def test_a_resumed_run_has_the_same_bits(tiny_real, experts, distance):
    settings = replace(SETTINGS, feature_distance=distance, dsa_strategy=named(STRATEGY), cf_frequencies=8)
    whole, cut = (make(tiny_real, experts, settings) for _ in range(2))
    for it in range(4):
        whole.iterate(it)
        if it < 2:
            cut.iterate(it)
    second = made(SnapshotMatching, tiny_real.to(DEVICE), PseudoOutliers(tiny_real), settings, experts)
    second.load_state_dict(0, cut.state_dict())
    for it in (2, 3):
        second.iterate(it)
    for a, b in zip(whole._tensors(), second._tensors(), strict=True):
        assert torch.equal(a, b)


def test_outliers_are_kept_apart(tiny_real, experts):
    """The gradient of outliers grows by that of their closeness; that of images does not change."""
    method, apart = (make(tiny_real, experts, replace(SETTINGS, spread_oe=w)) for w in (0.0, 3.0))
    method.iterate(1)
    apart.iterate(1)
    stored = make(tiny_real, experts).image_oe.detach().clone().requires_grad_()
    decoded = torch.cat([decode(of_slot, 2) for of_slot in stored])
    (expected,) = torch.autograd.grad(3 * closeness(apart.net.embed(decoded)), stored)
    torch.testing.assert_close(apart.image_oe.grad - method.image_oe.grad, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(apart.image_syn.grad, method.image_syn.grad)


def test_one_published_step(tiny_real, experts):
    """SGD on pixels between 0 and 1, at 0.01 times ipc: the first step has no momentum yet."""
    entry, settings = TGDD_ENTRY, replace(SETTINGS, ipc=2, published=True)
    settings = replace(settings, **entry.derived(settings))
    assert (settings.Iteration, settings.lr_img) == (10000, 0.02)
    method = make(replace(tiny_real, std=(0.25, 0.5, 0.1)), experts, settings)
    before = method.real.denormalize(method.image_syn.detach().flatten(0, 1).clone())
    method.iterate(0)
    std = torch.tensor((0.25, 0.5, 0.1)).view(3, 1, 1)
    gradient = method.image_syn.grad.flatten(0, 1) * std**2  # which the update has divided by the square
    on_pixels = gradient / std  # the gradient with respect to pixels
    expected = (before - 0.02 * on_pixels).clamp(0, 1)
    found = method.real.denormalize(method.image_syn.detach().flatten(0, 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 1e-3


def test_missing_experts_are_trained(in_process, refused, tmp_path):
    """By the experts' settings of the method, whichever methods the script has besides."""
    short = ["--dataset", "Digits", "--model", "MLP", "--ipc", 1, "--epoch_eval_train", 1, "--Iteration", 1]
    short += ["--train_experts", "auto"]
    out = in_process("main.py", *short, "--method", "TGDD", "--published", "--buffer_path", "a")
    assert "expert 0: 12/12" in out
    about = json.loads((tmp_path / "a/Digits_NO_ZCA/MLP/experts.json").read_text())
    assert (about["training"]["momentum"], about["training"]["lr"], about["outliers"]["kind"]) == (0.9, 0.02, "none")
    (stored,) = tmp_path.glob("result/TGDD/**/args.json")
    flags = json.loads(stored.read_text())["flags"]
    assert (flags["lr_img"], flags["num_exp"], flags["num_eval"]) == (0.01, 1, 5)
    again = in_process("main.py", *short, "--method", "TGDD", "--buffer_path", "a", "--seed", 2)  # they serve all seeds
    assert "expert 0: " not in again
    assert "are used as they were trained: seed 1. Others need another --buffer_path" in again
    (tmp_path / "a/Digits_NO_ZCA/MLP/experts.json").unlink()  # as published buffers
    again = in_process("main.py", *short, "--method", "TGDD", "--buffer_path", "a", "--seed", 2)
    assert "are used though they do not say how they were trained. Others" in again
    (tmp_path / "a/Digits_NO_ZCA/MLP/experts.json").write_text(json.dumps(about))
    folder = tmp_path / "a/Digits_NO_ZCA/MLP"
    (folder / "unfinished_expert_0").mkdir()
    (folder / "replay_buffer_0.pt").rename(folder / "unfinished_expert_0" / "epoch_1.pt")
    # one that was stopped serves no other seed
    error = refused("main.py", *short, "--method", "TGDD", "--buffer_path", "a", "--seed", 2)
    assert 'are of another kind: training {"seed": 1} instead of {"seed": 2}' in error
    own = METHODS["MTT"].own(Stage1Settings(method="MTT", max_start_epoch=60))
    assert (own.of_experts().num_experts, own.of_experts().train_epochs) == (100, 61)


def test_weights_of_the_classification_loss():
    assert [replace(SETTINGS, ipc=ipc).alpha for ipc in (1, 10, 50)] == [2.5, 2.5, 0.5]
    assert replace(SETTINGS, ce_weight=0.0).alpha == 0


def test_experts_that_cannot_be(tiny_real, experts, tmp_path):
    content = torch.load(tmp_path / "replay_buffer_0.pt")
    for trajectory in content:
        for epoch in trajectory[1:]:
            epoch[0][0, 0, 0, 0] = float("nan")
    torch.save(content, tmp_path / "replay_buffer_0.pt")
    damaged = ExpertBuffer(tmp_path, experts.shapes, None, "")
    with pytest.raises(UserError, match="holds NaN or infinite numbers at epoch"):
        make(tiny_real, damaged).iterate(0)


def test_the_accuracy_of_an_expert(tiny_real, experts):
    """After its last epoch; there is none with BatchNorm, or where a parameter is not finite."""
    net, last = tiny_real.network("ConvNetD1"), experts.trajectories[0][1][-1]
    net.load_state_dict(dict(zip(dict(net.named_parameters()), last, strict=True)))
    pairs = zip(tiny_real.test_images, tiny_real.labels_test, strict=True)
    hits = [net(image[None]).argmax() == label for image, label in pairs]
    assert experts.accuracy(tiny_real, "ConvNetD1") == pytest.approx(float(torch.stack(hits).float().mean()))
    assert experts.accuracy(tiny_real, "ConvNetBN") is None
    last[0].view(-1)[0] = float("nan")
    assert experts.accuracy(tiny_real, "ConvNetD1") is None


def test_three_stages_and_missing_experts(in_process, refused, monkeypatch):
    """Without experts the line that makes them; with them, all stages."""
    short = ["--dataset", "Digits", "--model", "ConvNetD1", "--dsa_strategy", "crop_scale"]
    flags = [*short, "--method", "TGDD", "--ipc", 1, "--Iteration", 3, "--num_exp", 1, "--num_eval", 1]
    flags += ["--epoch_eval_train", 3, "--batch_real", 16, "--batch_oe", 16]
    error = refused("main_poe.py", *flags)
    assert "--buffer_path: no experts in buffers/Digits_NO_ZCA/ConvNetD1; make them: python train_experts.py" in error
    assert "--outliers poe" in error
    experts = ["--num_experts", 1, "--train_epochs", 2, "--outliers", "poe", "--mom", 0.9, "--batch_oe", 16]
    (accuracy,) = re.findall(r"expert 0: test accuracy (\S+) %", in_process("train_experts.py", *short, *experts))
    drawn = []
    monkeypatch.setattr(plots, "save_panels", lambda *args, references, **rest: drawn.append(references))
    out = in_process("main_poe.py", *flags)
    assert drawn == [{"accuracy, %": (pytest.approx(float(accuracy), abs=0.005), "the first expert")}]
    assert f"experts: 1; the first reaches {accuracy} % on the test set after 2 epochs" in out
    assert "1 images of 4 parts per class: networks train on 4" in out
    assert "loss_ce" in out
    two = ["--method", "TGDD", "--ipc", 1, "--num_eval", 1, "--epoch_eval_train", 3, "--protocol", "ncfm"]
    assert "each of its images holds 4 parts" in in_process("train_model_synthetic_oe.py", *short, *two)
    three = [*short[:4], "--method", "TGDD", "--ipc", 1, "--num_exp", 1, "--ood_sets", "patches"]
    assert "training: protocol ncfm, epochs 3" in in_process("test_ood_model_syn.py", *three)
    assert "--clamp_oe: --method TGDD does not use it" in refused("main_poe.py", *flags, "--clamp_oe")


def test_whitened_images_have_no_range_of_pixels(in_process, tmp_path):
    network = ["--dataset", "Digits", "--model", "ConvNetD1", "--zca"]
    in_process("train_experts.py", *network, "--num_experts", 1, "--train_epochs", 1)
    flags = ["--method", "TGDD", "--ipc", 1, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 1]
    flags += ["--Iteration", 2, "--factor", 1, "--lr_img", 9]
    in_process("main.py", *network, *flags)
    (path,) = tmp_path.glob("result/**/res_*.pt")
    images = torch.load(path)["data"][0][0]
    assert torch.isfinite(images).all()
    assert images.abs().max() > 9  # moved by 9 a step, which no pixel is kept from


@pytest.mark.parametrize(("method", "usual"), [("MTT", 100), ("TGDD", 1)])
def test_as_many_experts_as_are_used_are_trained(method, usual):
    for given, expected in ((None, usual), (3, 3)):
        words = ["--method", method, *(["--max_experts", str(given)] if given else [])]
        parsed = main.get_args_parser().parse_args([*words, "--train_experts", "auto"])
        settings = METHODS[method].own(parsed)
        assert settings.of_experts().num_experts == settings.to_train().num_experts == expected


def test_bad_input(in_process, refused, tmp_path):
    """One line each; and one image per class is enough for `cf`."""
    network = ["--dataset", "Digits", "--model", "ConvNetD1"]
    flags = [*network, "--method", "TGDD", "--ipc", 1, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 1]
    flags += ["--Iteration", 1, "--batch_real", 16]
    poe = [*flags, "--batch_oe", 16]
    experts = ["--num_experts", 1, "--train_epochs", 1, "--outliers", "poe", "--batch_oe", 16]
    in_process("train_experts.py", *network, *experts)
    folder = tmp_path / "buffers/Digits_NO_ZCA/ConvNetD1"
    in_process("main_poe.py", *poe, "--feature_distance", "cf", "--factor", 1)
    made = next(tmp_path.glob("result-poe/**/res_*.pt"))
    before = set(tmp_path.rglob("*"))
    for words, message in [
        (["--factor", 0], "argument --factor: '0' is not a whole number of at least 1"),
        (["--factor", 5], "--factor 5: images of 8x8 hold at most 4 parts a side"),
        (["--load_path", made], "has images of 1x1 parts; give --factor 1"),
        (["--protocol", "new"], "argument --protocol: unknown protocol 'new'"),
        (["--lambda_oe", 2], 'outliers {"lambda_oe": 0.5} instead of {"lambda_oe": 2.0}'),
        (["--corruptions", "invert"], 'instead of {"corruptions": ["invert"]}'),
        (["--model", "MLP"], "no experts in buffers/Digits_NO_ZCA/MLP"),
        (["--feature_distance", "l1"], "argument --feature_distance: unknown feature_distance 'l1'"),
    ]:
        assert message in refused("main_poe.py", *poe, *words)
    assert "of another kind: outliers" in refused("main.py", *flags)
    (content,) = torch.load(folder / "replay_buffer_0.pt")
    torch.save([content[:1]], folder / "replay_buffer_0.pt")
    assert "have a single snapshot; train them again" in refused("main_poe.py", *poe)
    assert set(tmp_path.rglob("*")) == before
