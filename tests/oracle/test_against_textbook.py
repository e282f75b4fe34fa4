"""The fast engine against the textbook loop of `scripts/textbook.py`."""

import re
from dataclasses import replace
from itertools import chain, product

import numpy as np
import pytest
import torch
from conftest import COMPILED, DEVICE, made, named, needs_compiler
from torch import nn

import networks
from networks import convnet, get_network, initialize
from networks.convnet import ConvNet
from scripts import textbook
from tests.oracle.plain_methods import PlainMatching
from utils.compute import transfer
from utils.compute.device import Compute, Workload, choose_compute, set_precision
from utils.compute.transfer import send_draws
from utils.core.rng import generator
from utils.data import augment, datasets
from utils.data.augment import DC, DSA, DSA_ENTRIES, identity
from utils.data.synthetic import SyntheticSet
from utils.methods import matcher
from utils.methods.distances import METRICS
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.methods.matcher import Matcher, chunks, slot_loss
from utils.ood.scorer import Scorer
from utils.outliers import corruptions, sources
from utils.outliers.sources import OutlierPool, PseudoOutliers
from utils.training.trainer import Trainer, TrainSettings, predict

STRATEGY = DSA(tuple(DSA_ENTRIES))
NORMS = ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"]


@pytest.fixture(autouse=True)
def full_precision():
    set_precision("fp32", DEVICE)


@pytest.fixture
def tiny_real(tiny_real):
    return tiny_real.to(DEVICE)


def problem(name, dtype, dsa=True, equal=False, ipc=2, seed=0):
    """A network of width 8, or that of its name; synthetic images; real batches of unequal (or `equal`) size; and one
    transform per slot."""
    more = convnet._SUFFIXES.get(name.removeprefix("ConvNet"))
    if more is None:
        net = get_network(name, 3, 5, (16, 16), generator(seed))
    else:
        net = initialize(ConvNet(3, 5, (16, 16), **{"width": 8} | more), generator(seed))
    net = net.to(DEVICE, dtype)
    g = generator(seed, "images")
    synthetic = torch.randn(5, ipc, 3, 16, 16, generator=g, dtype=dtype).to(DEVICE)
    real = [torch.randn(4 if equal else 4 + s, 3, 16, 16, generator=g, dtype=dtype).to(DEVICE) for s in range(5)]
    if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        net(torch.cat(real))
        net.eval()
    transforms = [STRATEGY.draw(1, (16, 16), generator(seed, s)) if dsa else identity for s in range(5)]
    return net, synthetic, real, transforms


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def compare(name, dtype, outliers, metric, tolerance, dsa=True, batched=(True, False), compute=None):
    """Compare each kind of `batched` with the textbook; returns the ways that were taken."""
    equal = compute is not None and compute.compiled  # each size is compiled on its own
    net, synthetic, real, transforms = problem(name, dtype, dsa, equal)
    expected_losses, expected = textbook.match_slots(net, synthetic, real.__getitem__, transforms, outliers, metric)
    ways = []
    for kind in batched:
        matcher = Matcher(net, metric, compute or Compute(), kind)
        losses, gradient = matcher(synthetic, real, transforms, outliers)
        assert relative(losses, torch.tensor(expected_losses, dtype=dtype, device=DEVICE)) < tolerance
        assert relative(gradient, expected) < tolerance
        ways.append(matcher.way(synthetic))
    return ways


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dsa", [False, True])
def test_engine_equals_the_textbook_in_float64(name, metric, outliers, dsa):
    ways = compare(name, torch.float64, outliers, metric, 1e-9, dsa)
    assert ways == ["slot by slot" if name == "ConvNetLN" else "batched", "slot by slot"]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dsa", [False, True])
def test_engine_equals_the_textbook_in_float32(name, metric, outliers, dsa):
    compare(name, torch.float32, outliers, metric, 1e-4, dsa)


@pytest.mark.parametrize("name", ["LeNet", "AlexNet", "MLP", "ResNet18"])
def test_other_families(name):
    slots, side = (2, 25) if name == "ResNet18" else (3, 32)  # its smallest size: it is the slowest by far
    net = get_network(name, 3, slots, (side, side), generator(0)).double()
    g = generator(1)
    synthetic, real = (torch.randn(slots, n, 3, side, side, generator=g, dtype=torch.float64) for n in (1, 2))
    losses, gradient = Matcher(net, "ours", Compute(), True)(synthetic, real, [identity] * slots)
    expected = textbook.match_slots(net, synthetic, real.__getitem__, [identity] * slots, False, "ours")
    assert relative(losses, torch.tensor(expected[0], dtype=torch.float64)) < 1e-9
    assert relative(gradient, expected[1]) < 1e-8


class Unbatchable(torch.autograd.Function):
    """The identity, without a batching rule."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_network_that_cannot_be_batched_falls_back(monkeypatch):
    net, synthetic, real, transforms = problem("ConvNetW32", torch.float64)
    embed = net.embed
    monkeypatch.setattr(net, "embed", lambda x: Unbatchable.apply(embed(x)))
    matcher = Matcher(net, "ours", Compute(), True)
    with pytest.warns(UserWarning, match="more slowly: not batched"):
        _, gradient = matcher(synthetic, real, transforms)
    assert matcher.way(synthetic) == "slot by slot"
    expected = textbook.match_slots(net, synthetic, real.__getitem__, transforms, False, "ours")
    assert relative(gradient, expected[1]) < 1e-9


@needs_compiler
@pytest.mark.parametrize(
    ("norm", "outliers", "metric", "dtype", "tolerance", "dsa"),
    [
        ("instance", False, "ours", torch.float32, 1e-4, True),
        ("group", True, "ours", torch.float64, 1e-9, True),
        ("none", False, "mse", torch.float64, 1e-9, True),
        ("batch", True, "cos", torch.float64, 1e-9, True),
        ("layer", False, "cos", torch.float32, 1e-4, True),
        ("none", True, "ours", torch.float32, 1e-4, False),
    ],
)
def test_compiled_engine_equals_the_textbook(norm, outliers, metric, dtype, tolerance, dsa, monkeypatch):
    """Five slots in compiled chunks of two, the last of them filled up."""
    narrow = lambda *args: ConvNet(3, 5, (16, 16), width=8, depth=1, norm=norm)  # noqa: E731
    monkeypatch.setitem(networks._NETWORKS, "narrow", narrow)
    monkeypatch.setattr("utils.methods.matcher.CHUNK_IMAGES", 4)
    ways = compare("narrow", dtype, outliers, metric, tolerance, dsa, batched=[None], compute=COMPILED)
    assert ways == ["slot by slot" if norm == "layer" else "compiled"]


@needs_compiler
def test_images_and_outliers_are_compiled_once(monkeypatch):
    narrow = lambda *args: ConvNet(3, 5, (16, 16), width=8, depth=1, norm="none")  # noqa: E731
    monkeypatch.setitem(networks._NETWORKS, "narrow", narrow)
    net, synthetic, real, transforms = problem("narrow", torch.float32, equal=True)
    matcher, graphs = Matcher(net, "ours", COMPILED), torch._dynamo.utils.counters["stats"]
    counted = [graphs["unique_graphs"]]
    for of_outliers in (False, True):
        matcher(synthetic, real, transforms, of_outliers)
        counted.append(graphs["unique_graphs"])
    assert matcher.way(synthetic) == "compiled"
    assert counted[0] < counted[1] == counted[2]


@pytest.mark.parametrize("name", ["ConvNetNN", "ConvNetBN", "ConvNetW32", "ConvNetGN", "ConvNetMP", "ConvNetASwish"])
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_compiled_equals_the_textbook(name, metric, monkeypatch):
    """The function that is compiled, before it is, on chunks of which the last is filled up."""
    monkeypatch.setattr("utils.compute.device.Compute.function", lambda self, function: function)
    monkeypatch.setattr("utils.methods.matcher.CHUNK_IMAGES", 4)
    for with_outliers, dsa in product((False, True), (False, True)):
        ways = compare(name, torch.float64, with_outliers, metric, 1e-9, dsa, [None], Compute(compiled=True))
        assert ways == ["compiled"]


def test_what_cannot_be_compiled_goes_on_eagerly(monkeypatch):
    def fails(*args):
        raise RuntimeError("no such\nkernel")

    net, synthetic, real, transforms = problem("ConvNetW32", torch.float64)
    matcher = Matcher(net, "ours", Compute(compiled=True))
    monkeypatch.setattr(matcher, "compiled_side", fails)
    monkeypatch.setattr(matcher, "real_loss", lambda images, slot: slot_loss(net(images), slot))
    with pytest.warns(UserWarning, match="more slowly: not compiled: no such kernel"):
        _, gradient = matcher(synthetic, real, transforms)
    assert matcher.way(synthetic) == "batched"
    expected = textbook.match_slots(net, synthetic, real.__getitem__, transforms, False, "ours")
    assert relative(gradient, expected[1]) < 1e-9


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize(("count", "size"), [(10, 12), (10, 4), (7, 5), (1, 1), (100, 12), (0, 3)])
def test_chunks_are_all_slots_in_equal_parts(count, size, fill):
    slots = list(range(3, 3 + count))
    parts = chunks(slots, size, fill)
    together = list(chain(*parts))
    assert sorted(set(together)) == slots
    assert all(len(part) <= size for part in parts)
    assert len({len(part) for part in parts[: None if fill else -1]}) <= 1
    assert fill or together == slots


@pytest.mark.parametrize("batched", [True, False])
def test_chunks_do_not_change_the_result(batched, monkeypatch):
    net, synthetic, real, transforms = problem("ConvNetW32", torch.float64)
    whole = Matcher(net, "ours", Compute(), batched)(synthetic, real, transforms)
    monkeypatch.setattr("utils.methods.matcher.CHUNK_IMAGES", 4)
    parts = Matcher(net, "ours", Compute(), batched)(synthetic, real, transforms)
    assert relative(parts[1], whole[1]) < 1e-12
    assert torch.allclose(parts[0], whole[0])


def on_meta(real, classes):
    """The data without their values: reading one back raises."""
    labels = torch.arange(len(real.labels_train)) % classes
    real = replace(real, num_classes=classes, labels_train=labels)
    there = real.to("meta")
    there.__dict__["class_indices"] = real.class_indices  # those live on the CPU
    return there


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN"])
@pytest.mark.parametrize("source", ["pool", "corruptions"])
def test_an_iteration_reads_nothing_back(tiny_real, name, source, monkeypatch):
    """Meta tensors have no values, so an iteration on them proves that the host never waits for one."""
    sgd, sent, counts = torch.optim.SGD, [], []
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, fused=None, **kwargs: sgd(*args, **kwargs))
    for module in (transfer, augment, corruptions, sources, datasets, matcher):
        monkeypatch.setattr(module, "send", lambda t, device: (sent.append(t.device != device), t.to(device))[1])
    monkeypatch.setattr(corruptions, "noise", lambda kind, shape, seed, device: kind(shape, device=device))
    for classes in (3, 6):
        real = on_meta(tiny_real, classes)
        noise = PseudoOutliers(real, ("gauss-speckle", "geo-mean", "pixelate"))
        pool = OutlierPool(real, real.images_train, torch.arange(36).view(classes, -1))
        settings = GradientSettings(
            model=name, ipc=2, batch_real=4, batch_oe=4, dsa_strategy=named(STRATEGY), outer_loop=3, inner_loop=2
        )
        method = made(GradientMatching, real, pool if source == "pool" else noise, settings)
        method.start(0)
        sent.clear()
        losses = method.iterate(0)
        assert losses["loss_oe"].shape == (classes,)
        assert losses["loss_oe"].device.type == "meta"
        counts.append(sum(sent))
    assert counts[1] <= 2 * counts[0]  # a few for each slot


@pytest.mark.parametrize("dsa", [STRATEGY, None])
def test_a_whole_iteration_equals_the_textbook(tiny_real, dsa):
    """Three outer steps with training in between, from the same keyed draws, with the textbook's parts."""
    tiny = replace(tiny_real, images_train=tiny_real.images_train.double() / 255)
    settings = GradientSettings(
        model="ConvNetW32",
        ipc=2,
        batch_real=8,
        batch_oe=8,
        init="real",
        dsa_strategy=dsa and named(dsa),
        outer_loop=3,
        inner_loop=2,
        lr_img=0.5,
    )
    methods = [made(GradientMatching, tiny, PseudoOutliers(tiny), settings) for _ in range(2)]
    for method in methods:
        method.net.double()
        method.start(0)
    fast, slow = methods
    losses = fast.iterate(0)
    expected = textbook_iteration(slow, settings)
    assert losses["loss"].mean().item() == pytest.approx(expected[0], rel=1e-7)
    assert losses["loss_oe"].mean().item() == pytest.approx(expected[1], rel=1e-7)
    assert relative(fast.image_syn.detach(), slow.image_syn.detach()) < 1e-7
    assert relative(fast.image_oe.detach(), slow.image_oe.detach()) < 1e-7


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN"])
@pytest.mark.parametrize("outliers", [True, False])
def test_the_textbook_that_the_benchmark_measures_does_the_same(tiny_real, name, outliers):
    tiny = replace(tiny_real, images_train=tiny_real.images_train.double() / 255)
    settings = GradientSettings(
        model=name,
        ipc=2,
        batch_real=8,
        batch_oe=8,
        init="real",
        dsa_strategy=named(STRATEGY),
        outer_loop=3,
        inner_loop=2,
        batch_train=4,
    )
    found = []
    for kind in (GradientMatching, PlainMatching):
        method = made(kind, tiny, PseudoOutliers(tiny) if outliers else None, settings)
        method.net.double()
        method.start(0)
        losses = [method.iterate(it) for it in range(2)]
        found.append([torch.stack([one[name].double() for one in losses]) for name in losses[0]])
        found[-1] += [method.synthetic().images] + [method.synthetic().images_oe] * outliers
    for fast, slow in zip(*found, strict=True):
        assert relative(fast, slow) < 1e-6  # the textbook's losses are read as float32


def textbook_iteration(method, s):
    """One iteration of `method` with `textbook.match_slots` and plain SGD steps; returns the mean losses."""
    from networks import initialize

    initialize(method.net, method.generator("network", 0))
    velocity = [torch.zeros_like(t) for t in (method.image_syn, method.image_oe)]
    sums = [0.0, 0.0]
    for outer in range(3):
        for which, (images, siamese) in enumerate(((method.image_syn, "siamese"), (method.image_oe, "siamese oe"))):
            transforms = [
                s.augmentation.draw(1, (16, 16), method.generator(siamese, 0, outer, c)) if s.augmentation else identity
                for c in range(3)
            ]

            def batch(slot, which=which, outer=outer):
                if which:
                    return method.outliers.draw(slot, 8, method.generator("real oe", 0, outer, slot))
                g = method.generator("real", 0, outer, slot)
                return method.real.train_batch(method.real.choose(slot, 8, g))

            losses, gradient = textbook.match_slots(method.net, images, batch, transforms, bool(which), "ours")
            sums[which] += sum(losses) / 9
            with torch.no_grad():
                velocity[which] = 0.5 * velocity[which] + gradient
                images -= 0.5 * velocity[which]
        if outer == 2:
            break
        g = method.generator("inner", 0, outer)
        for _ in range(2):
            textbook_epoch(method, s, g)
    return sums


def textbook_epoch(method, s, g):
    synthetic = method.synthetic()
    order, order_oe = (torch.randperm(6, generator=g) for _ in range(2))
    batches = [synthetic.images[order], synthetic.images_oe[order_oe]]
    if s.augmentation:
        batches = [textbook.augment_images(b, s.augmentation.draw(6, (16, 16), g)) for b in batches]
    logits = [method.net(b) for b in batches]
    loss = nn.functional.cross_entropy(logits[0], synthetic.labels[order])
    loss = loss - s.lambda_oe * logits[1].log_softmax(1).mean(1).mean()
    grads = torch.autograd.grad(loss, list(method.net.parameters()))
    with torch.no_grad():
        for p, grad in zip(method.net.parameters(), grads, strict=True):
            p -= 0.01 * grad


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Gives this machine a processor with some flags."""

    def has(flags):
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor : 0\nflags : fpu {flags}\n")
        monkeypatch.setattr(
            "builtins.open", lambda *a, original=open: original(path if a[0] == "/proc/cpuinfo" else a[0], *a[1:])
        )

    return has


@pytest.mark.parametrize(("flags", "has"), [("avx2 avx512_bf16", True), ("avx2 amx_bf16 x", True), ("avx2", False)])
def test_bf16_needs_a_processor_that_has_it(processor, flags, has):
    processor(flags)
    net = get_network("ConvNetD1", 1, 10, (8, 8))
    compute = choose_compute("off", "bf16", torch.device("cpu"), net, (1, 8, 8), Workload(1, "training"))
    assert compute.precision == ("bf16" if has else "fp32")
    assert ("AVX512-BF16" in str(compute)) == (not has)


@pytest.mark.parametrize(
    ("flags", "precision", "model", "kind", "told"),
    [
        ("avx512_bf16", "tf32", "ConvNetW32", "training", True),
        ("avx512_bf16", "tf32", "ConvNetW32", "testing", False),
        ("avx512_bf16", "tf32", "ConvNetNP", "training", False),  # it is not compiled
        ("avx512_bf16", "fp32", "ConvNetW32", "training", False),  # the user's own choice
        ("avx512_bf16", "bf16", "ConvNetW32", "training", False),
        ("avx2", "tf32", "ConvNetW32", "training", False),
    ],
)
def test_a_long_run_is_told_that_bf16_would_be_faster(monkeypatch, processor, flags, precision, model, kind, told):
    processor(flags)
    net = get_network(model, 3, 10, (32, 32))
    work = Workload(1e12, kind)
    line = str(choose_compute("auto", precision, torch.device("cpu"), net, (3, 32, 32), work))
    assert ("--precision bf16 would be faster" in line) == told


def test_bf16_is_near_and_matching_stays_in_float32():
    net, synthetic, real, transforms = problem("ConvNetW32", torch.float32)
    losses, gradient = Matcher(net, "ours", Compute(precision="bf16"))(synthetic, real, transforms)
    expected, _ = textbook.match_slots(net, synthetic, real.__getitem__, transforms, False, "ours")
    assert losses.dtype == gradient.dtype == torch.float32
    assert 1e-5 < relative(losses, torch.tensor(expected, device=DEVICE)) < 0.02  # rounding of float32 is below


@needs_compiler
def test_compiled_training_equals_eager(tiny_real, monkeypatch):
    g = torch.arange(12)
    synthetic = SyntheticSet(tiny_real.train_batch(g), tiny_real.labels_train[g], tiny_real.train_batch(g + 12))
    settings = TrainSettings(3, batch=6, augmentation=STRATEGY)
    nets = [get_network("ConvNetD1", 3, 3, (16, 16), generator(0)).to(DEVICE) for _ in range(2)]
    trainers = [Trainer(net, settings, compute) for net, compute in zip(nets, (Compute(), COMPILED), strict=True)]
    for epoch in range(3):
        losses = [t.epoch(synthetic, generator(epoch)).item() for t in trainers]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    monkeypatch.setattr("utils.training.trainer.TEST_BATCH", 4)  # of six images
    outs = [trainer.predict(tiny_real.test_images) for trainer in trainers]
    assert outs[0].shape == (6, 3)
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-3)


def test_what_is_drawn_together_is_what_is_drawn_apart(tiny_real):
    """120 epochs in blocks, from epoch 30 on, equal epochs that are drawn and augmented one at a time; bit for bit, but
    on CUDA, where the gradients of convolutions add up in no fixed order."""
    index = torch.arange(12)
    synthetic = SyntheticSet(tiny_real.train_batch(index), tiny_real.labels_train[index], tiny_real.train_batch(index))
    nets = [get_network("ConvNetD1", 3, 3, (16, 16), generator(0)).to(DEVICE) for _ in range(2)]
    trainers = [Trainer(net, TrainSettings(120, batch=5, augmentation=STRATEGY)) for net in nets]
    seen, apart = {}, {}
    trainers[0].train(synthetic, 1, ("k",), lambda epoch, loss: seen.update({epoch: loss.item()}), first_epoch=30)
    for epoch in range(30, 120):
        if epoch == 60:
            trainers[1].restart(0.001)
        apart[epoch + 1] = trainers[1].epoch(synthetic, generator(1, "k", "epoch", epoch)).item()
    tolerance = 1e-3 if DEVICE.type == "cuda" else 0
    assert list(seen) == list(apart)
    assert seen == pytest.approx(apart, rel=tolerance, abs=0)
    logits = [predict(net, tiny_real.test_images) for net in nets]
    torch.testing.assert_close(*logits, rtol=tolerance, atol=tolerance)


def test_transfers_in_one(monkeypatch):
    tensors = [torch.arange(6).view(2, 3), torch.rand(4), torch.tensor(7), torch.rand(0, 2), torch.rand(2, 1, 2)]
    calls = []

    def copied(flat, device):
        calls.append(flat.dtype)
        return flat.clone()

    monkeypatch.setattr(transfer, "send", copied)
    moved = send_draws(tensors, torch.device("cuda"))
    assert calls == [torch.int64, torch.float32]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(moved, tensors, strict=True))
    draw = DC(("crop", "noise")).draw(5, (8, 8), generator(0))
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(send_draws(draw, torch.device("cuda"))(images), draw(images))


@needs_compiler
def test_compiled_scores_equal_eager(tiny_real):
    """One compilation serves networks of other weights; the last batch is smaller."""
    nets = [get_network("ConvNetD1", 3, 3, (16, 16), generator(i)).eval().to(DEVICE) for i in range(2)]
    embed = COMPILED.embedding(nets[0], 4)
    for net in nets:
        eager, compiled = (Scorer(net, ["energy"], 1.0, (1.0,) * 3, e)(tiny_real.test_images, 4) for e in (None, embed))
        np.testing.assert_allclose(compiled[0], eager[0], atol=1e-4)
        np.testing.assert_allclose(compiled[1]["energy"], eager[1]["energy"], atol=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_features_in_bfloat16(tiny_real, compiled):
    """The last layer stays in float32, so that logits of eight bits do not tie."""
    net = get_network("ConvNetD1", 3, 3, (16, 16), generator(0)).eval().to(DEVICE)
    embed = replace(COMPILED, compiled=compiled, precision="bf16").embedding(net, 4)
    images = tiny_real.test_images[:3]
    features = embed(net, images).detach()
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.no_grad():
        expected = net.embed(images).float()
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0.02, atol=0.02)
    assert relative(features, net.embed(images).detach()) > 1e-4
    logits, _ = Scorer(net, ["msp"], 1.0, (1.0,) * 3, embed)(images, 4)
    np.testing.assert_allclose(logits, net.classifier(features).detach().double().cpu().numpy(), atol=1e-5)


def test_the_textbook_runs_on_digits(monkeypatch, capsys):
    """A few iterations and epochs: networks learn, and know the photographs better with outliers."""
    monkeypatch.setattr(textbook, "ITERATIONS", 10)
    monkeypatch.setattr(textbook, "EPOCHS", 100)
    textbook.main()
    loss, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"iteration 10: matching loss [\d.]+, of the outliers [\d.]+", loss)
    (plain, auroc), (with_outliers, better) = (map(float, re.findall(r"([\d.]+) %", line)) for line in lines)
    assert min(plain, with_outliers) > 70
    assert better > auroc
