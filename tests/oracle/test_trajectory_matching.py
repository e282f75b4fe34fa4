"""Trajectory matching: exact gradients against the full graph in float64, memory, experts and their files."""

import json
import os
import pickle
import shlex
import shutil
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPILED, ROOT, made, named, needs_compiler

import networks
import train_experts
from networks import get_network, initialize
from networks.convnet import ConvNet
from tests.oracle.plain_methods import PlainTrajectoryMatching
from utils.compute.device import Compute
from utils.core.errors import Interrupted, UserError
from utils.core.rng import generator
from utils.data.augment import DSA, DSA_ENTRIES
from utils.data.distilled_file import DistilledFile
from utils.methods.trajectory_matching import SMALLEST_LR, TrajectoryMatching, TrajectorySettings
from utils.outliers.sources import PseudoOutliers
from utils.runs import signals
from utils.settings.distillation import ExpertSettings
from utils.stages import expert_training
from utils.stages.expert_training import ExpertTraining, open_expert_run
from utils.training.experts import ExpertBuffer, check_about, describe

STRATEGY = DSA(tuple(DSA_ENTRIES))
SETTINGS = TrajectorySettings(
    model="ConvNetD1", ipc=2, seed=4, lambda_oe=0.7, syn_steps=5, expert_epochs=1, max_start_epoch=2
)


NARROW = {"NarrowD1": {"width": 16, "depth": 1}, "NarrowBN": {"width": 32, "norm": "batch"}}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Networks that are quick because they are narrow."""
    for name, more in NARROW.items():
        monkeypatch.setitem(networks._NETWORKS, name, partial(ConvNet, **more))


class Ends:
    """Stands for experts: a start and a target near it."""

    trajectories = (None,)

    def __init__(self, net, dtype):
        weights = [initialize(net, generator(i)) and [p.detach().clone() for p in net.parameters()] for i in (1, 2)]
        self.start = [p.to(dtype) for p in weights[0]]
        self.target = [(a + 0.3 * b).to(dtype) for a, b in zip(*weights, strict=True)]

    def segment(self, g, max_start, length, device):
        return self.start, self.target

    def fingerprint(self):
        return "none"


def make(real, settings=SETTINGS, outliers=True, dtype=torch.float64, compute=None):
    net = get_network(settings.model, real.channel, real.num_classes, real.im_size)
    method = made(
        TrajectoryMatching,
        real,
        PseudoOutliers(real) if outliers else None,
        settings,
        Ends(net, dtype),
        compute=compute,
    )
    method.start(0)
    images = [t.detach().to(dtype) for t in method._tensors()]
    method._set_images(0, images[0], images[1] if outliers else None)
    method.lr_student.data = torch.tensor(0.05, dtype=dtype)
    method.net.to(dtype)
    return method


def full_graph(method, it):
    """The loss and its gradients on images, outliers and learning rate, by the textbook with its whole graph."""
    ends = method.experts.segment(None, 0, 0, None)
    loss, gradients = PlainTrajectoryMatching._match(method, *ends, method._draw(it))
    return loss[0], gradients


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("outliers", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("batch", [None, 4])  # of six images: it wraps around the order
def test_exact_gradients(tiny_real, outliers, steps, batch):
    settings = replace(SETTINGS, model="NarrowD1", syn_steps=steps, batch_syn=batch, dsa_strategy=named(STRATEGY))
    method = make(tiny_real, settings, outliers)
    for it in range(3):  # other augmentations each
        loss, gradients = full_graph(method, it)
        found, ours = method._match(*method.experts.segment(None, 0, 0, None), method._draw(it))
        assert relative(found[0], loss) < 1e-9
        for a, b in zip(ours, gradients, strict=True):
            assert relative(a.flatten(), b.flatten()) < 1e-9


@pytest.mark.parametrize("model", ["ConvNetW32", "NarrowBN", "MLP"])
def test_other_networks(tiny_real, model):
    method = make(tiny_real, replace(SETTINGS, model=model, dsa_strategy=named(STRATEGY), syn_steps=3))
    loss, gradients = full_graph(method, 0)
    found, ours = method._match(*method.experts.segment(None, 0, 0, None), method._draw(0))
    assert relative(found[0], loss) < 1e-9
    assert all(relative(a.flatten(), b.flatten()) < 1e-8 for a, b in zip(ours, gradients, strict=True))


@needs_compiler
def test_compiled(tiny_real):
    settings = replace(SETTINGS, dsa_strategy=named(STRATEGY), syn_steps=4, batch_syn=6)
    method = make(tiny_real, settings, compute=COMPILED)
    loss, gradients = full_graph(method, 0)
    found, ours = method._match(*method.experts.segment(None, 0, 0, None), method._draw(0))
    assert relative(found[0], loss) < 1e-9
    assert all(relative(a.flatten(), b.flatten()) < 1e-9 for a, b in zip(ours, gradients, strict=True))


def test_finite_differences(tiny_real):
    # with ReLU the loss jumps where an activation changes its sign
    method = make(tiny_real, replace(SETTINGS, model="ConvNetASwish", syn_steps=3, dsa_strategy=named(STRATEGY)))
    ends, drawn = method.experts.segment(None, 0, 0, None), method._draw(0)
    _, gradients = method._match(*ends, drawn)
    g = torch.Generator().manual_seed(0)
    for tensor, gradient in zip([*method._tensors(), method.lr_student], gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=g, dtype=torch.float64)
        size = 1e-6 if tensor is method.lr_student else 1e-5
        values = []
        for sign in (1, -1):
            tensor.data += sign * size * direction
            values.append(method._match(*ends, drawn)[0].item())
            tensor.data -= sign * size * direction
        assert (values[0] - values[1]) / (2 * size) == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


PEAK = """
import ctypes, sys
# with this threshold, freed tensors are returned to the system: what is resident is what is in use
ctypes.CDLL(None).mallopt(-3, 65536)
sys.path.insert(0, sys.argv[1]); sys.path[:0] = [sys.argv[1] + "/tests", sys.argv[1] + "/tests/oracle"]
import torch
from test_trajectory_matching import make, SETTINGS
from utils.data.datasets import RealData
from dataclasses import replace
from functools import partial
from pathlib import Path
g = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=g)
labels = torch.arange(60) % 10
real = RealData("tiny", 10, (0.4,) * 3, (0.2,) * 3, images, labels, images, labels)
method = make(real, replace(SETTINGS, model="ConvNetW32", ipc=3, syn_steps=int(sys.argv[2])), dtype=torch.float32)
def kilobytes(name): return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
before = kilobytes("VmRSS")
method.iterate(0)
print(kilobytes("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_steps(program):
    """That of an iteration, beside what its process had before."""
    grown = []
    for steps in (5, 15):
        command = program(PEAK, str(ROOT), str(steps))
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown.append(int(done.stdout))
    assert grown[1] < 1.2 * grown[0]


def test_batches_go_through_the_whole_set(tiny_real):
    """Of six images: 4 and 2 of one order, then another order."""
    method = make(tiny_real, replace(SETTINGS, batch_syn=4, syn_steps=6))
    drawn = method._draw(0)
    assert [len(batch.index) for batch in drawn] == [4, 2, 4, 2, 4, 2]
    for batches in ([batch.index for batch in drawn], [batch.index_oe for batch in drawn]):
        orders = [torch.cat(pair) for pair in zip(batches[::2], batches[1::2], strict=True)]
        assert all(sorted(o.tolist()) == list(range(6)) for o in orders)
        assert len({tuple(o.tolist()) for o in orders}) > 1


def test_the_learning_rate_is_learned_and_stays_positive(tiny_real):
    method = make(tiny_real, replace(SETTINGS, lr_lr=1e-3, lr_img=0.1))
    before = method.lr_student.item()
    _, gradients = full_graph(method, 0)
    out = method.iterate(0)
    assert method.lr_student.item() == pytest.approx(before - 1e-3 * gradients[-1].item())
    assert out["lr_net"].item() == method.synthetic().lr_net == method.lr_student.item()
    method.optimizer_lr.param_groups[0]["lr"] = 1e6 * (1 if method.lr_student.grad > 0 else -1)
    with pytest.warns(UserWarning, match=r"--lr_lr .* made the student's learning rate -.*it is set to 1e-06"):
        method.iterate(1)
    assert method.lr_student.item() == pytest.approx(SMALLEST_LR)


def test_state(tiny_real):
    a = make(tiny_real, dtype=torch.float32)
    a.iterate(0)
    b = make(tiny_real, dtype=torch.float32)
    b.load_state_dict(0, a.state_dict())
    assert a.iterate(1)["loss"] == b.iterate(1)["loss"]
    assert a.synthetic().lr_net == b.synthetic().lr_net
    assert torch.equal(a.image_oe, b.image_oe)
    for value in (torch.tensor(-1.0), torch.tensor(float("nan")), torch.zeros(2)):
        state = a.state_dict()
        state["lr"]["value"] = value
        with pytest.raises(ValueError, match="learning rate"):
            b.load_state_dict(0, state)


# --- experts ----------------------------------------------------------------------------------------------------------


def plain_sgd(real, settings, index, outliers):
    """The trajectory of an expert by a plain loop with torch's own SGD; augmentation and batches by their keys."""
    net = get_network("ConvNetD1", 3, 3, (16, 16))
    initialize(net, generator(settings.seed, "expert", index)).double()
    optimizer = torch.optim.SGD(net.parameters(), settings.lr_teacher, settings.mom, weight_decay=settings.l2)
    trajectory = [[p.detach().clone() for p in net.parameters()]]
    for epoch in range(settings.train_epochs):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_teacher * (
                0.1 if settings.decay and epoch >= settings.train_epochs // 2 + 1 else 1
            )
        g = generator(settings.seed, "expert", index, "epoch", epoch)
        for part in torch.randperm(len(real.images_train), generator=g).split(settings.batch_train):
            x = real.normalize(real.images_train[part])
            x = settings.augmentation.draw(len(x), (16, 16), g)(x)
            n, rest = len(x), None
            if outliers is not None:
                first = int(torch.randint(3, (1,), generator=g))
                counts = [settings.batch_oe // 3 + ((slot - first) % 3 < settings.batch_oe % 3) for slot in range(3)]
                rest = torch.cat([outliers.draw(slot, n, g) for slot, n in enumerate(counts)])
                x = torch.cat([x, settings.augmentation.draw(len(rest), (16, 16), g)(rest)])
            z = net(x)
            loss = F.cross_entropy(z[:n], real.labels_train[part])
            if rest is not None:
                loss = loss - settings.lambda_oe * (z[n:].log_softmax(1) / 3).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trajectory.append([p.detach().clone() for p in net.parameters()])
    return trajectory


def train(real, folder, settings, outliers, num=1):
    dtype = real.images_train.dtype
    net = get_network("ConvNetD1", 3, 3, (16, 16)).to(dtype if dtype.is_floating_point else torch.float32)
    run = open_expert_run(folder, describe(real, "ConvNetD1", outliers and outliers.describe()))
    ExpertTraining(net, real, outliers, replace(settings, num_experts=num), Compute(), run).train_all()
    run.lock.close()


@pytest.mark.parametrize("with_outliers", [True, False])
def test_an_expert_is_a_plain_sgd_loop(tiny_real, tmp_path, with_outliers):
    settings = ExpertSettings(
        train_epochs=4,
        lr_teacher=0.05,
        mom=0.5,
        l2=1e-3,
        decay=True,
        batch_train=16,
        batch_oe=7,
        dsa_strategy=named(STRATEGY),
    )
    unit = {name: getattr(tiny_real, name).double() / 255 for name in ("images_train", "images_test")}
    real = replace(tiny_real, **unit)  # in float64 rounding does not grow over the epochs
    outliers = PseudoOutliers(real) if with_outliers else None
    train(real, tmp_path / "b", settings, outliers, num=2)
    for index in range(2):
        (trajectory,) = torch.load(tmp_path / "b" / f"replay_buffer_{index}.pt")  # the published nesting
        expected = plain_sgd(real, settings, index, outliers)
        assert len(trajectory) == len(expected) == 5
        for epoch, by_hand in zip(trajectory, expected, strict=True):
            assert all(p.dtype == torch.float32 and not p.requires_grad for p in epoch)
            for a, b in zip(epoch, by_hand, strict=True):
                torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=1e-7)
    assert not list((tmp_path / "b").glob("unfinished*"))


def test_a_killed_training_resumes_with_the_same_bits(tiny_real, tmp_path, monkeypatch):
    settings = ExpertSettings(train_epochs=4, lr_teacher=0.05, mom=0.5, batch_train=16, dsa_strategy=named(STRATEGY))
    train(tiny_real, tmp_path / "whole", settings, None)
    original, calls = ExpertTraining._epoch, []

    def interrupted(self, index, epoch):
        calls.append(epoch)
        if len(calls) == 3:
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return original(self, index, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(signals, "GRACE", 0.05)
        patch.setattr(ExpertTraining, "_epoch", interrupted)
        with pytest.raises(Interrupted):
            train(tiny_real, tmp_path / "cut", settings, None)
    assert not list((tmp_path / "cut").glob("replay_buffer*"))
    with pytest.raises(UserError, match="no experts in"):
        ExpertBuffer(tmp_path / "cut", [], None, "train them")
    train(tiny_real, tmp_path / "cut", settings, None)
    a, b = (torch.load(tmp_path / d / "replay_buffer_0.pt")[0] for d in ("whole", "cut"))
    assert all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_epochs_that_older_code_left_are_refused(tiny_real, tmp_path):
    """They hold the momentum alone."""
    open_expert_run(tmp_path, describe(tiny_real, "ConvNetD1", None)).lock.close()
    (tmp_path / "unfinished_expert_0").mkdir()
    net = tiny_real.network("ConvNetD1", generator(0)).state_dict()
    for epoch in range(2):
        torch.save({"net": net, "momentum": []}, tmp_path / "unfinished_expert_0" / f"epoch_{epoch}.pt")
    with pytest.raises(UserError, match=r"--buffer_path: cannot continue .*_0: older code wrote it.*Delete it"):
        train(tiny_real, tmp_path, ExpertSettings(), None)


SHAPES = [(2, 3), (2,)]


def buffer(folder, content):
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "replay_buffer_0.pt")


def trajectory(epochs=4):
    return [[torch.full(s, float(e)) for s in SHAPES] for e in range(epochs)]


def test_published_buffers_are_read(tmp_path):
    """Several trajectories in a file, parameters that require a gradient, no experts.json."""
    parameters = [[torch.nn.Parameter(p) for p in epoch] for epoch in trajectory()]
    buffer(tmp_path / "b", [trajectory(), parameters, trajectory(6)])
    experts = ExpertBuffer(tmp_path / "b", SHAPES, None, "")
    assert (len(experts.trajectories), experts.epochs) == (3, 3)
    assert len(ExpertBuffer(tmp_path / "b", SHAPES, 2, "").trajectories) == 2
    seen = set()
    for seed in range(40):
        start, end = experts.segment(generator(seed), 2, 2, torch.device("cpu"))
        assert end[0][0, 0] - start[0][0, 0] == 2
        assert not start[0].requires_grad
        seen.add(start[0][0, 0].item())
    assert seen == {0.0, 1.0}


def own_memory():
    """Bytes of memory of this process that are not pages of files."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_buffers_stay_on_the_disk(tmp_path):
    """Forty epochs of two megabytes: the file is mapped, and a segment copies two of them."""
    shape = (500, 1000)
    buffer(tmp_path / "b", [[[torch.full(shape, float(e))] for e in range(40)]])
    before = own_memory()
    experts = ExpertBuffer(tmp_path / "b", [shape], None, "")
    start, end = experts.segment(generator(0), 1, 20, torch.device("cpu"))
    assert own_memory() - before < 20e6
    assert (start[0][0, 0], end[0][0, 0]) == (0, 20)
    start[0].fill_(7.0)
    assert experts.trajectories[0][1][0][0][0, 0] == 0


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-300]), "cannot read"),
        (lambda p: torch.save([], p), "is no buffer"),
        (lambda p: torch.save({"a": 1}, p), "is no buffer"),
        (lambda p: torch.save([[torch.zeros(2)]], p), "is no buffer"),
        (lambda p: torch.save([[[torch.zeros(2, 3)]]], p), "of another --model or data set"),
        (lambda p: torch.save([[[torch.zeros(3, 2), torch.zeros(2)]]], p), "of another --model or data set"),
        (lambda p: p.write_bytes(pickle.dumps(Evil())), "cannot read"),
        (lambda p: torch.save([[[Evil()]]], p), "cannot read"),
    ],
)
def test_spoilt_buffers(tmp_path, monkeypatch, spoil, message):
    monkeypatch.chdir(tmp_path)
    buffer(tmp_path / "b", [trajectory()])
    spoil(tmp_path / "b" / "replay_buffer_0.pt")
    with pytest.raises(UserError, match=f"--buffer_path: .*{message}"):
        ExpertBuffer(tmp_path / "b", SHAPES, None, "")
    assert not (tmp_path / "executed").exists()


def test_numbers_that_are_not_finite(tmp_path):
    content = [trajectory()]
    content[0][2][0][1, 1] = float("nan")
    buffer(tmp_path / "b", content)
    experts = ExpertBuffer(tmp_path / "b", SHAPES, None, "")
    with pytest.raises(UserError, match="holds NaN or infinite numbers at epoch 2"):
        experts.segment(generator(0), 1, 2, torch.device("cpu"))


# --- through the scripts ----------------------------------------------------------------------------------------------

DIGITS = [
    "--dataset",
    "Digits",
    "--model",
    "ConvNetD1",
    "--dsa_strategy",
    "color_crop_cutout_scale_rotate",
    "--seed",
    2,
]
TEACH = [*DIGITS, "--num_experts", 2, "--train_epochs", 6, "--batch_train", 64, "--lr_teacher", 0.05]
MTT = [*DIGITS, "--method", "MTT", "--ipc", 1, "--syn_steps", 8, "--max_start_epoch", 3, "--lr_img", 10]
STAGE1 = [*MTT, "--lr_teacher", 0.05, "--num_exp", 2, "--num_eval", 2, "--epoch_eval_train", 60, "--Iteration", 20]
TWO = [*DIGITS, "--method", "MTT", "--ipc", 1, "--num_eval", 1, "--epoch_eval_train", 20]
TEACH_POE = [*TEACH, "--outliers", "poe", "--batch_oe", 64]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A folder in which `train_experts.py` has trained the experts of `TEACH`."""
    folder = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_experts.main(train_experts.get_args_parser().parse_args(list(map(str, TEACH))))
    return folder


@pytest.fixture
def taught(trained_once, tmp_path):
    """The experts of `TEACH` where the scripts of a test look for them."""
    shutil.copytree(trained_once / "buffers", tmp_path / "buffers")


def test_from_experts_to_the_report(in_process, refused, tmp_path):
    error = refused("main_poe.py", *STAGE1)
    assert "--buffer_path: no experts in buffers/Digits_NO_ZCA/ConvNetD1; make them: python train_experts.py" in error
    words = error.split("make them: python ")[1].split()
    assert train_experts.get_args_parser().parse_args(words[1:]).outliers == "poe"
    out = in_process("train_experts.py", *TEACH_POE)
    assert "expert 1: test accuracy" in out
    about = json.loads((tmp_path / "buffers/Digits_NO_ZCA/ConvNetD1/experts.json").read_text())
    assert about["outliers"]["kind"] == "poe"
    assert "are of another kind: outliers" in refused("main.py", *STAGE1)
    assert "instead of" in refused("train_experts.py", *TEACH)  # plain ones beside those of POE
    assert "training" in refused("train_experts.py", *TEACH_POE, "--lr_teacher", 0.1)
    needs = refused("main_poe.py", *STAGE1, "--max_start_epoch", 6)
    assert "--max_start_epoch 6: with --expert_epochs 2 it needs experts of 7 epochs" in needs
    out = in_process("main_poe.py", *STAGE1)
    accuracies = [
        float(line.split("accuracy ")[1].split()[0])
        for line in out.splitlines()
        if "exp " in line and " accuracy " in line
    ]
    assert accuracies[1] > accuracies[0] + 5  # of the first experiment, after 20 iterations
    (path,) = tmp_path.glob("result-poe/MTT/Digits/ConvNetD1/1/*/res_*.pt")
    rates = [DistilledFile.open(path).set(i).lr_net for i in range(2)]
    assert all(0.03 < r < 0.08 for r in rates)
    assert f"learning rate {rates[1]:g}" in in_process("train_model_synthetic_oe.py", *TWO, "--exp_idx", 1)
    assert "learning rate 0.02" in in_process("train_model_synthetic_oe.py", *TWO, "--lr_net", 0.02)
    flags = [*DIGITS[:4], "--method", "MTT", "--ipc", 1, "--num_exp", 1, "--is_load_best", "--ood_sets", "patches"]
    out = in_process("test_ood_model_syn.py", *flags)
    assert "AUROC" in out
    assert "lr_net 0.02" in out
    assert "learning rate learned" in in_process("test_ood_model_syn.py", *flags, "--folder", path.parent.name)


def test_an_interrupted_distillation_ends_with_the_same_bits(in_process, taught, tmp_path, monkeypatch):
    flags = [*STAGE1, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 5, "--Iteration", 6]
    in_process("main.py", *flags, "--save_path", "whole")
    original = TrajectoryMatching._match

    def match(self, *args):
        calls.append(1)
        if len(calls) == 4:
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return original(self, *args)

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(signals, "GRACE", 0.05)
        patch.setattr(TrajectoryMatching, "_match", match)
        with pytest.raises(Interrupted):
            in_process("main.py", *flags, "--save_path", "cut")
    in_process("main.py", "--resume", "latest", "--save_path", "cut")
    a, b = (DistilledFile.open(next((tmp_path / d).rglob("res_*.pt"))).set() for d in ("whole", "cut"))
    assert torch.equal(a.images, b.images)
    assert a.lr_net == b.lr_net


def test_other_processes_take_over_the_gradients(tiny_real, monkeypatch):
    first = make(tiny_real, dtype=torch.float32)
    sent = []
    monkeypatch.setattr(
        "utils.compute.distributed.broadcast_", lambda *tensors: sent.extend(t.clone() for t in tensors)
    )
    first.iterate(0)
    received = iter(sent)
    monkeypatch.setattr("utils.compute.distributed.is_main", lambda: False)
    take = lambda *tensors: [t.copy_(next(received)) for t in tensors]  # noqa: E731
    monkeypatch.setattr("utils.compute.distributed.broadcast_", take)
    second = make(tiny_real, dtype=torch.float32)
    second.experts = SimpleNamespace(segment=None)
    second.iterate(0)
    assert torch.equal(first.image_syn, second.image_syn)
    assert torch.equal(first.lr_student, second.lr_student)


# --- what a review found ----------------------------------------------------------------------------------------------


def test_a_resumed_run_wants_the_same_experts(in_process, refused, taught, monkeypatch):
    original = TrajectoryMatching.iterate

    def iterate(self, it):
        if it == 2:
            raise KeyboardInterrupt
        return original(self, it)

    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryMatching, "iterate", iterate)
        with pytest.raises(KeyboardInterrupt):
            in_process("main.py", *STAGE1, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 3)
    os.rename("buffers", "moved")
    assert "--buffer_path: no experts in" in refused("main.py", "--resume", "latest")
    assert "stopped" not in in_process("main.py", "--resume", "latest", "--buffer_path", "moved")
    # those that were trained since are not used; others in their place are noticed
    in_process("train_experts.py", *TEACH, "--num_experts", 3, "--buffer_path", "moved")
    assert "is finished" in in_process("main.py", "--resume", "latest", "--buffer_path", "moved")
    folder = Path("moved/Digits_NO_ZCA/ConvNetD1")
    os.replace(folder / "replay_buffer_2.pt", folder / "replay_buffer_0.pt")
    error = refused("main.py", "--resume", "latest", "--buffer_path", "moved")
    assert "--buffer_path: the data differ from those" in error


def test_experts_that_are_there_need_no_lock(in_process, refused, taught, monkeypatch):
    """So several seeds of a table can run at once with the same experts."""
    opened = []
    original = expert_training.open_expert_run
    monkeypatch.setattr(expert_training, "open_expert_run", lambda *args: opened.append(args) or original(*args))
    assert "trained before" in in_process("train_experts.py", *TEACH)
    assert not opened
    error = refused("train_experts.py", *TEACH, "--lr_teacher", 0.5)
    assert 'are of another kind: training {"lr": 0.05} instead of {"lr": 0.5}' in error
    in_process("train_experts.py", *TEACH, "--num_experts", 3)
    assert len(opened) == 1


def test_the_command_that_makes_the_experts_is_whole(refused):
    flags = [*STAGE1, "--corruptions", "invert", "--lambda_oe", 3, "--max_start_epoch", 60]
    words = shlex.split(refused("main_poe.py", *flags, "--buffer_path", "a b").split("make them: ")[1])
    args = train_experts.get_args_parser().parse_args(words[2:])
    assert (args.outliers, args.corruptions, args.lambda_oe) == ("poe", ("invert",), 3)
    assert (args.train_epochs, args.buffer_path, args.seed) == (61, "a b", 2)


def test_experts_with_another_weight_of_outliers(in_process, refused):
    in_process("train_experts.py", *TEACH_POE, "--batch_oe", 16, "--num_experts", 1, "--train_epochs", 1)
    assert "are of another kind: outliers" in refused("main_poe.py", *STAGE1, "--lambda_oe", 3)


def test_experts_that_saw_stronger_outliers(in_process, refused, tmp_path):
    """`--expert_lambda_oe 2` takes other experts; the student keeps its own weight."""
    few = ["--Iteration", 2, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 3]
    assert "main.py distils no outliers" in refused("main.py", *STAGE1, "--expert_lambda_oe", 2)
    error = refused("main_poe.py", *STAGE1, "--expert_lambda_oe", 2)
    words = shlex.split(error.split("make them: ")[1])
    assert train_experts.get_args_parser().parse_args(words[2:]).lambda_oe == 2
    teach = [*TEACH_POE, "--batch_oe", 16, "--num_experts", 1, "--train_epochs", 4]
    in_process("train_experts.py", *teach, "--lambda_oe", 2)
    assert '"lambda_oe": 0.5}. Give' in refused("main_poe.py", *STAGE1)
    found = {}
    for name, flags in {"experts": ("--expert_lambda_oe", 2), "both": ("--lambda_oe", 2)}.items():
        in_process("main_poe.py", *STAGE1, *few, *flags, "--save_path", name)
        (file,) = (tmp_path / name).rglob("res_*.pt")
        found[name] = torch.load(file, weights_only=True)["data_oe"][0][0]
    assert not torch.equal(found["experts"], found["both"])


def test_experts_without_a_description(in_process, refused, taught, tmp_path):
    (tmp_path / "buffers/Digits_NO_ZCA/ConvNetD1/experts.json").unlink()
    short = [*STAGE1, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 2, "--Iteration", 1]
    assert "has no experts.json: experts are assumed to have seen" in in_process("main.py", *short)
    assert "so its experts have seen no outliers; make them with" in refused("main_poe.py", *short)
    assert "has experts without experts.json, made elsewhere" in refused("train_experts.py", *TEACH)


def test_flags_of_outliers_that_are_not_trained_on(refused):
    error = refused("train_experts.py", *TEACH, "--corruptions", "invert")
    assert "--corruptions: --outliers none does not use it; poe does" in error
    error = refused("train_experts.py", *TEACH, "--outliers", "poe", "--num_oe_per_class", 3)
    assert "--num_oe_per_class: --outliers poe does not use it; oe does" in error


def test_a_learning_rate_that_explodes_is_named(refused, taught):
    error = refused("main.py", *STAGE1, "--lr_lr", 1e30, "--num_eval", 1, "--epoch_eval_train", 2)
    assert "not finite. Lower --lr_img or --lr_lr; --load_path" in error
    assert "loss of slot" not in error


def test_experts_that_diverged_at_once_can_be_trained_anew(in_process, refused):
    """Nothing was trained yet, so the folder is of no kind yet."""
    error = refused("train_experts.py", *TEACH, "--lr_teacher", 1e30)
    assert "--lr_teacher 1e+30: expert 0 diverged in epoch 0; lower it, and delete buffers/Digits_NO_ZCA" in error
    assert "expert 1: test accuracy" in in_process("train_experts.py", *TEACH, "--train_epochs", 1)


def test_what_diverged_by_its_learning_rate_can_go_on(in_process, refused, taught):
    """The stored images are the last finite ones; the learning rate that threw them is not stored with them."""
    flags = [*MTT, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 1]
    path = refused("main.py", *flags, "--Iteration", 5, "--lr_lr", 1e30).split("--load_path ")[1].split()[0]
    assert DistilledFile.open(path).set().lr_net is None
    assert "accuracy" in in_process("main.py", *flags, "--Iteration", 1, "--load_path", path)


def test_a_stored_set_keeps_its_learning_rate(in_process, taught, tmp_path):
    """Where `--lr_teacher` is not given."""
    quick = [*MTT, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 1, "--Iteration", 0]
    in_process("main.py", *quick, "--lr_teacher", 0.4, "--save_path", "one")
    (first,) = (tmp_path / "one").rglob("res_*.pt")
    for flags, rate in (([], 0.4), (["--lr_teacher", 0.2], 0.2)):
        place = f"two{len(flags)}"
        in_process("main.py", *quick, "--load_path", first, *flags, "--save_path", place)
        (second,) = (tmp_path / place).rglob("res_*.pt")
        assert DistilledFile.open(second).set().lr_net == pytest.approx(rate)
    in_process("main.py", *quick, "--save_path", "three")
    (third,) = (tmp_path / "three").rglob("res_*.pt")
    assert DistilledFile.open(third).set().lr_net == pytest.approx(0.01)


def test_experts_of_other_labels_are_refused(tiny_real, tmp_path):
    """Two files of the same images differ in nothing else; older experts do not say it."""
    other = replace(tiny_real, labels_train=tiny_real.labels_train.sort().values.roll(1).clamp(max=1))
    about = describe(tiny_real, "MLP", None)
    (tmp_path / "experts.json").write_text(json.dumps(about))
    assert check_about(tmp_path, about)
    with pytest.raises(UserError, match=r"are of another kind: class_sizes \["):
        check_about(tmp_path, describe(other, "MLP", None))
    (tmp_path / "experts.json").write_text(json.dumps({n: v for n, v in about.items() if n != "class_sizes"}))
    assert check_about(tmp_path, describe(other, "MLP", None))
