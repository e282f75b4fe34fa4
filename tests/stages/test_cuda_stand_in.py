"""Every stage on a CUDA device that a stand-in imitates (`tests/stages/cuda_stand_in.py`): devices do not mix, the
host does not wait, and the numbers are those of the CPU. What only a GPU can show is in scripts/dev/gpu_check.sh."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from conftest import made
from cuda_stand_in import CudaTensor, cuda_stand_in

import main
import main_oe
import main_poe
import test_ood_model_syn
import train_experts
import train_model_synthetic_oe
from networks import get_network
from utils.compute.device import Compute
from utils.core.rng import generator
from utils.data.augment import DSA
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.methods.snapshot_matching import SnapshotMatching, SnapshotSettings
from utils.methods.trajectory_matching import TrajectoryMatching, TrajectorySettings
from utils.outliers.sources import OutlierPool, PseudoOutliers
from utils.training.draws import draw_epoch
from utils.training.trainer import Trainer, TrainSettings

STRATEGY = "color_crop_cutout_flip_scale_rotate"
NETWORK = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 2, "--seed", 3]
LOOP = ["--init", "real", "--num_exp", 1, "--num_eval", 2, "--epoch_eval_train", 6, "--Iteration", 2]
EXPERTS = ["--num_experts", 1, "--train_epochs", 2, "--batch_train", 200]
OF_METHOD = {
    "DC": ["--outer_loop", 2, "--inner_loop", 2, "--batch_real", 16],
    "DSA": ["--dsa_strategy", STRATEGY, "--outer_loop", 2, "--inner_loop", 2, "--batch_real", 16],
    "DM": ["--dsa_strategy", STRATEGY, "--batch_real", 16],
    "MTT": ["--dsa_strategy", STRATEGY, "--syn_steps", 3, "--max_start_epoch", 1, "--batch_syn", 5],
}


def run(module, *flags) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        module.main(module.get_args_parser().parse_args())


@pytest.fixture
def gpu():
    with cuda_stand_in() as reads:
        yield reads


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a pool of outliers."""
    monkeypatch.chdir(tmp_path)
    np.save("pool.npy", np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8))
    return tmp_path


# --- the stand-in itself notices mistakes ----------------------------------------------------------------------------


def test_devices_do_not_mix(gpu):
    cuda, cpu = torch.ones(3, device="cuda"), torch.ones(3)
    assert cuda.device.type == "cuda"
    for mistake in (
        lambda: cuda + cpu,
        lambda: torch.cat([cpu, cuda]),
        lambda: cpu[torch.tensor([0], device="cuda")],
        lambda: torch.nn.Linear(3, 2)(cuda),
        lambda: torch.nn.Linear(3, 2).to("cuda")(cpu),
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: torch.optim.SGD([cuda.requires_grad_()], 0.1) and cuda.sub_(cpu),
    ):
        with pytest.raises(RuntimeError):
            mistake()
    with pytest.raises(TypeError):
        cuda.detach().numpy()
    assert (cuda + torch.tensor(1.0)).device.type == "cuda"  # a number may come from the CPU
    assert (cuda.cpu() + cpu).device.type == "cpu"


def test_what_the_host_waits_for_is_counted(gpu):
    cuda = torch.ones(3, device="cuda")
    assert not gpu
    cuda.sum().item()
    bool(cuda.any())
    cuda.cpu()
    cuda[torch.tensor([0])]
    cuda[cuda > 0]
    assert dict(gpu) == {"item": 1, "__bool__": 1, "cpu": 1, "index on the CPU": 1, "mask": 1}


def test_gradients_and_transforms_stay_on_the_device(gpu):
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0)).to("cuda")
    images = torch.randn(4, 1, 8, 8).to("cuda")
    net(images).sum().backward()
    assert all(isinstance(p, CudaTensor) and p.grad.device.type == "cuda" for p in net.parameters())
    gradient = torch.func.vmap(torch.func.grad(lambda x: net(x[None]).sum()))(images)
    assert gradient.device.type == "cuda"


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "oe", "poe"])
@pytest.mark.parametrize("method", OF_METHOD)
def test_distillation_on_cuda_equals_that_on_the_cpu(folder, method, kind):
    """To rounding; the noise of pseudo-outliers is drawn on the device, so these differ and are not compared."""
    script = {"plain": main, "oe": main_oe, "poe": main_poe}[kind]
    flags = [*NETWORK, *LOOP, "--method", method, *OF_METHOD[method], "--compile", "off", "--eval_ood", "patches"]
    pool = ["--oe_data_path", "pool.npy"]
    flags += {"plain": [], "oe": [*pool, "--num_oe_per_class", 30, "--batch_oe", 8], "poe": ["--batch_oe", 8]}[kind]
    if method == "MTT":
        outliers = ["--outliers", "none" if kind == "plain" else kind]
        outliers += {"plain": [], "oe": [*pool, "--num_oe_per_class", 30], "poe": []}[kind]
        outliers += [] if kind == "plain" else ["--batch_oe", 16]
        run(train_experts, *NETWORK[:4], *EXPERTS, "--dsa_strategy", STRATEGY, *outliers, "--compile", "off")
        flags = [f for f in flags if f not in ("--batch_oe", 8)]
    found = {}
    for device in ("cuda", "cpu"):
        if device == "cuda":
            with cuda_stand_in():
                run(script, *flags, "--device", "cuda", "--save_path", device)
        else:
            run(script, *flags, "--device", device, "--save_path", device)
        (path,) = (folder / device).rglob("res_*.pt")
        found[device] = DistilledFile.open(path).set()
        (about,) = (folder / device).rglob("args.json")
        assert json.loads(about.read_text())["device"].startswith(device)
    cuda, cpu = found["cuda"], found["cpu"]
    assert torch.isfinite(cuda.images).all()
    if kind != "poe":
        assert torch.allclose(cuda.images, cpu.images, atol=2e-3)
    if kind == "oe":
        assert torch.allclose(cuda.images_oe, cpu.images_oe, atol=2e-2)


def test_networks_and_measures_on_cuda_equal_those_on_the_cpu(folder):
    loop = [*NETWORK, *LOOP, "--method", "DM", "--dsa_strategy", STRATEGY, "--batch_real", 16, "--batch_oe", 8]
    run(main_poe, *loop, "--save_path", "one", "--compile", "off")
    train = [*NETWORK, "--method", "DM", "--dsa_strategy", STRATEGY, "--num_eval", 2, "--epoch_eval_train", 8]
    train += ["--load_path", "one", "--compile", "off"]
    test = [*NETWORK, "--method", "DM", "--num_exp", 2, "--is_load_best", "--ood_sets", "patches", "gaussian"]
    test += ["--score", "msp", "mls", "energy", "knn", "odin", "--compile", "off"]
    results = {}
    for device in ("cuda", "cpu"):
        flags = ["--device", device, "--save_path"]
        if device == "cuda":
            with cuda_stand_in():
                run(train_model_synthetic_oe, *train, *flags, "two-cuda")
                run(test_ood_model_syn, *test, *flags, "three-cuda", "--load_path", "two-cuda")
        else:
            run(train_model_synthetic_oe, *train, *flags, "two-cpu")
            run(test_ood_model_syn, *test, *flags, "three-cpu", "--load_path", "two-cpu")
        (path,) = (folder / f"three-{device}").rglob("results.json")
        results[device] = json.loads(path.read_text())
    for a, b in zip(results["cuda"]["rows"], results["cpu"]["rows"], strict=True):
        assert (a["set"], a["score"]) == (b["set"], b["score"])
        assert a["auroc"] == pytest.approx(b["auroc"], abs=5e-3)


def test_batchnorm_on_cuda(folder, gpu):
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8)
    labels = np.arange(60) % 3
    names = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez("data.npz", **dict(zip(names, (images, labels, images, labels), strict=True)))
    flags = ["--dataset", "npz", "--data_path", "data.npz", "--model", "ConvNetBN", "--ipc", 2, *LOOP]
    flags += ["--eval_mode", "SS", "--compile", "off", "--device", "cuda", "--batch_real", 8, "--batch_oe", 8]
    for method in ("DSA", "DM"):
        more = ["--outer_loop", 2, "--inner_loop", 1] if method == "DSA" else []
        run(main_poe, *flags, "--method", method, "--dsa_strategy", STRATEGY, *more, "--save_path", method)
        assert list((folder / method).rglob("res_*.pt"))


def test_a_run_on_cuda_resumes_on_the_cpu(folder):
    """Checkpoints hold CPU tensors, whatever the device."""
    flags = [*NETWORK, *LOOP, "--method", "DM", "--dsa_strategy", STRATEGY, "--batch_real", 16, "--compile", "off"]
    with cuda_stand_in():
        run(main, *flags, "--device", "cuda", "--save_path", "one")
    (checkpoint,) = (folder / "one").rglob("checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["exp"] == 1
    run(main, "--resume", "latest", "--save_path", "one", "--device", "cpu")


# --- inside an iteration ---------------------------------------------------------------------------------------------


def _method(kind: str, real, outliers):
    if kind == "MTT":
        settings = TrajectorySettings(model="ConvNetD1", ipc=2, syn_steps=3, batch_syn=8, dsa_strategy=STRATEGY)
        return made(TrajectoryMatching, real, outliers, settings, _Experts(real.device), compute=Compute(on_cuda=True))
    if kind in ("TGDD", "cf"):
        distance = "cf" if kind == "cf" else "mean"
        settings = SnapshotSettings(
            model="ConvNetD1", ipc=1, factor=2, batch_real=16, batch_oe=8, init="real", dsa_strategy=STRATEGY,
            feature_distance=distance,
        )  # fmt: skip
        return made(SnapshotMatching, real, outliers, settings, _Experts(real.device), compute=Compute(on_cuda=True))
    loops = {} if kind == "DM" else {"outer_loop": 2, "inner_loop": 1}
    loops |= {"spread_oe": 1.0} if kind == "spread" else {}
    settings = GradientSettings(
        model="ConvNetD1", ipc=2, batch_real=16, batch_oe=8, init="real", dsa_strategy=STRATEGY, **loops
    )
    method = DistributionMatching if kind == "DM" else GradientMatching
    return made(method, real, outliers, settings, compute=Compute(on_cuda=True))


class _Experts:
    """In the place of an `ExpertBuffer`."""

    trajectories = ((None, (None, None)),)

    def __init__(self, device):
        nets = [get_network("ConvNetD1", 1, 10, (8, 8), generator(seed)) for seed in (1, 2)]
        self.ends = [[p.detach().to(device) for p in net.parameters()] for net in nets]

    def segment(self, *_):
        return self.ends

    def snapshot(self, index, epoch, device):
        return self.ends[epoch]

    def fingerprint(self) -> str:
        return ""


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("kind", ["DSA", "spread", "DM", "MTT", "TGDD", "cf"])
def test_the_host_does_not_wait_inside_an_iteration(digits, gpu, kind, pool):
    real = digits.to("cuda")
    outliers = PseudoOutliers(real)
    if pool:
        images = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, device="cuda")
        outliers = OutlierPool(real, images, torch.arange(300).view(10, 30))
    method = _method(kind, real, outliers)
    method.start(0)
    method.iterate(0)  # what is made once
    gpu.clear()
    losses = method.iterate(1)
    # the bound of MTT's learning rate is looked at after the last step, where the loop reads the losses, too
    assert dict(gpu) == ({"__bool__": 1} if kind == "MTT" else {})
    assert all(loss.device.type == "cuda" for loss in losses.values())


@pytest.mark.parametrize("mix", ["none", "cutmix", "mixup"])
def test_the_host_does_not_wait_inside_an_epoch(digits, gpu, mix):
    real = digits.to("cuda")
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0)).to("cuda")
    trainer = Trainer(net, TrainSettings(3, augmentation=DSA.of(STRATEGY), mix=mix), Compute(on_cuda=True))
    index = torch.arange(20)
    images = SyntheticSet(real.train_batch(index), real.labels_train[:20], real.train_batch(index + 20))
    drawn = draw_epoch(images, 8, trainer.settings.augmentation, generator(0))
    assert drawn
    gpu.clear()
    trainer.train(images, 0, ("a",))
    assert dict(gpu) == {}


def test_inputs_of_compiled_functions_suit_cuda_graphs(digits, gpu, monkeypatch):
    """A recorded graph needs CUDA tensors of shapes seen before; its results must be copied before the next replay."""
    calls: set[tuple] = set()

    def recorded(self, function):
        def call(*args):
            flat = torch.utils._pytree.tree_flatten(args)[0]
            tensors = [a for a in flat if isinstance(a, torch.Tensor)]
            assert all(t.device.type == "cuda" for t in tensors if t.dim()), "a CPU tensor in a CUDA graph"
            calls.add((it, index, *(tuple(t.shape) for t in tensors)))
            for earlier in outputs:
                earlier.fill_(float("nan"))  # the next replay overwrites what the last one returned
            result = function(*args)
            outputs[:] = [t for t in torch.utils._pytree.tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
            outputs[:] = [t.detach() for t in outputs if t.is_floating_point()]
            return result

        outputs: list[torch.Tensor] = []
        index = next(numbers)
        return call

    numbers = itertools.count()
    monkeypatch.setattr(Compute, "function", recorded)
    real = digits.to("cuda")
    for kind in ("DSA", "DM", "MTT", "TGDD", "cf"):
        method = _method(kind, real, PseudoOutliers(real))
        method.compute = Compute(True, on_cuda=True)
        method.start(0)
        for it in range(3):
            losses = method.iterate(it)
            assert all(torch.isfinite(loss).all() for loss in losses.values())
        assert torch.isfinite(method.synthetic().images).all()
    shapes = [{call[1:] for call in calls if call[0] == it} for it in range(3)]
    assert shapes[0]
    assert shapes[1] <= shapes[0]
    assert shapes[2] <= shapes[0]
