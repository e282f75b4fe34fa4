"""The three stages end to end on Digits, as users run them; and that distilling is worth it."""

import csv
import io
import json
import re
import shlex
import sys
from dataclasses import replace
from functools import cache, partial
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import made
from PIL import Image
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from networks import get_network
from utils.compute.device import Compute
from utils.core.errors import UserError
from utils.core.pixels import conform
from utils.core.rng import generator
from utils.data.augment import DSA
from utils.data.distilled_file import DistilledFile
from utils.data.download import FROM_PYTORCH_OOD, NotThere
from utils.data.synthetic import SyntheticSet
from utils.methods import augmentation_of
from utils.methods.distribution_matching import DistributionMatching
from utils.methods.gradient_matching import GradientMatching, GradientSettings
from utils.methods.trajectory_matching import TrajectoryMatching, TrajectorySettings
from utils.ood.generated import DRAWN
from utils.ood.measures import MEASURES, ood_measures
from utils.ood.scores import msp
from utils.ood.sets import FROM_TORCHVISION, PAPER_SETS, OODSource, validation_sets
from utils.outliers.corruptions import corrupt
from utils.outliers.sources import PseudoOutliers
from utils.report.results import load_results
from utils.runs import progress
from utils.runs.progress import Progress
from utils.runs.run_folder import RunFolder
from utils.settings.arguments import Stage1SettingsPOE, Stage2Settings
from utils.settings.commands import command_of
from utils.settings.distillation import ExpertSettings
from utils.stages.evaluation import EvalSettings, Evaluator, training_of
from utils.stages.expert_training import ExpertTraining, open_expert_run
from utils.stages.stage1 import stage2_command
from utils.stages.stage2 import _how_trained, stage3_command
from utils.training.experts import ExpertBuffer, describe
from utils.training.network_training import is_checkpoint_epoch, load_trained
from utils.training.trainer import Trainer, TrainSettings, accuracy_of, predict

STRATEGY = "color_crop_cutout_scale_rotate"
COMMON = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 1, "--method", "DSA"]
STAGE1 = [*COMMON, "--dsa_strategy", STRATEGY, "--init", "real", "--num_exp", 2, "--num_eval", 1, "--Iteration", 3]
STAGE1 += ["--epoch_eval_train", 4, "--eval_interval", 2, "--batch_real", 16]
STAGE2 = [*COMMON, "--dsa_strategy", STRATEGY, "--num_eval", 2, "--epoch_eval_train", 60]
STAGE3 = [*COMMON, "--num_exp", 2, "--is_load_best", "--ood_sets", "patches", "blob", "mine", "--ood_path", "ood"]
RUN = "DSA/Digits/ConvNetD1/1"


def ok(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return result


POE = ["--corruptions", "invert", "jigsaw", "--batch_oe", 16]
KINDS = {
    "plain": ("main.py", [], "result"),
    "oe": ("main_oe.py", ["--oe-data-path", "pool.npy", "--num_oe_per_class", 6], "result-oe"),
    "poe": (
        "main_poe.py",
        [*POE, "--eval_ood", "patches", "mine", "--ood_path", "ood", "--tensorboard"],
        "result-poe",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_stages(kind, script, in_process, pictures, refused, tmp_path):
    pool = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "pool.npy", pool)
    (tmp_path / "ood").mkdir()
    np.savez(tmp_path / "ood" / "mine.npz", images=pool)
    name, more, root = KINDS[kind]
    run = in_process if kind != "plain" else lambda *a: ok(script(*a)).stdout  # as users run it
    out = run(name, *STAGE1, *more)
    assert "exp 1 iteration 3: ConvNetD1 accuracy" in out
    (folder,) = (tmp_path / root / RUN).iterdir()
    check_distilled(folder, with_outliers=kind != "plain")
    if kind == "poe":
        assert re.search(r"exp 1 iteration 3: ConvNetD1 accuracy .* %, AUROC patches .* %, AUROC mine .* %", out)
        check_events(folder)
        run(name, "--resume", folder, "--tensorboard")
        check_events(folder)

    train = "train_model_synthetic_no_oe.py" if kind == "plain" else "train_model_synthetic_oe.py"
    run(train, *STAGE2, "--folder", folder.name, "--exp_idx", 1)
    root2 = tmp_path / ("result-model-synthetic-no-oe" if kind == "plain" else "result-model-synthetic-oe")
    trained = root2 / RUN / folder.name
    names = {p.name for p in trained.glob("syn_*.pt")}
    assert names == {f"syn_trained_Digits_ConvNetD1_exp{i}_{w}.pt" for i in (0, 1) for w in ("best", "epoch60")}

    run("test_ood_model_syn.py", *STAGE3, "--folder", folder.name, "--score", "msp", "energy", "-v")
    check_report(tmp_path / "result-test-ood-synthetic" / RUN / folder.name)
    error = refused("test_ood_model_syn.py", *STAGE3, "--num_exp", 3, "--folder", folder.name)
    assert "--num_exp 3: " in error
    assert "has 2 networks" in error


def check_distilled(folder, with_outliers):
    """What stage 1 wrote."""
    result = "res_DSA_Digits_ConvNetD1_1ipc.pt"
    assert {p.name for p in folder.iterdir()} >= {"args", "args.json", "logs.txt", "metrics.jsonl", result}
    assert json.loads((folder / "args").read_text())["Iteration"] == 3
    for it in (0, 2, 3):
        assert (folder / f"vis_DSA_Digits_ConvNetD1_1ipc_exp0_iter{it}.png").stat().st_size > 200
        assert (folder / f"vis_oe_DSA_Digits_ConvNetD1_1ipc_exp0_iter{it}.png").exists() == with_outliers
    content = torch.load(folder / result, weights_only=True)
    assert len(content["data"]) == 2
    assert len(content["accs_all_exps"]["ConvNetD1"]) == 2
    assert ("data_oe" in content) == with_outliers
    assert len(np.unique(np.asarray(Image.open(folder / "curves.png").convert("L")))) > 10


def check_report(folder):
    """What stage 3 wrote."""
    results = json.loads((folder / "results.json").read_text())
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["rows"]) == 2 * 2 * (3 + 7)
    assert {r["set"] for r in rows} >= {"patches", "blob", "mine", "val:jigsaw"}
    assert all(0 <= float(r[m]) <= 1 for r in rows for m in MEASURES)
    counts = results["about"]["ood_sets"]
    of_test = {name: found["images"] for name, found in counts.items() if found["kind"] == "ood"}
    assert of_test == {"patches": 360, "blob": 360, "mine": 60}
    log = (folder / "logs.txt").read_text()
    assert all(f"OOD set {n}: {found['images']} images, {found['source']}" in log for n, found in counts.items())
    report = (folder / "report.md").read_text()
    assert "| mean " in report
    assert report.startswith("# Digits: networks ")
    used = json.loads((folder / "args.json").read_text())["versions"]
    computing = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow")
    for name in computing:
        assert used[name] == metadata.version(name)
        assert re.search(rf"^Versions: .*\b{name} {re.escape(used[name])}[,.]", report, re.MULTILINE)
    assert (folder / "scores_msp.png").stat().st_size > 1000


def check_events(folder):
    """TensorBoard has the numbers of metrics.jsonl, once."""
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(folder))
    events.Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for tag, name in [("experiment1/loss", "loss"), ("experiment1/ConvNetD1/auroc patches", "auroc patches")]:
        found = [(e.step, e.value) for e in events.Scalars(tag)]
        expected = [(m["iteration"], np.mean(m[name])) for m in lines if m["experiment"] == 1 and name in m]
        assert found == [(step, pytest.approx(value, rel=1e-5)) for step, value in expected]
        assert len(found) == 3


def test_auroc_of_evaluations_by_scikit_learn(digits, tmp_path):
    source = OODSource(digits, tmp_path, tmp_path, False, 200, 1)
    (ood,) = source.find_all(["patches"])
    training = {"MLP": TrainSettings(20)}
    evaluator = Evaluator(digits, EvalSettings(1, training, 1, {ood.name: ood.load()}), RunFolder(tmp_path), Compute())
    index = torch.cat([c[:5] for c in digits.class_indices])
    found = {}
    evaluator.evaluate(SyntheticSet(digits.train_batch(index), digits.labels_train[index]), 0, 0, found, lambda: None)
    net = evaluator.trainers["MLP"].net
    confidence = [predict(net, x).double().softmax(1).amax(1).numpy() for x in (digits.test_images, ood.load())]
    expected = roc_auc_score(np.repeat([0, 1], [len(c) for c in confidence]), -np.concatenate(confidence))
    assert found["MLP"][0]["auroc patches"] == pytest.approx(expected, abs=1e-9)
    assert found["MLP"][0]["accuracy"] == pytest.approx(
        accuracy_of(predict(net, digits.test_images), digits.labels_test)
    )


def test_same_seed_same_bits_in_all_stages(in_process, tmp_path):
    """Twice the same commands: the same distilled set, the same networks, the same measures."""
    found = []
    for place in ("a", "b"):
        paths = [tmp_path / place / str(stage) for stage in (1, 2, 3)]
        in_process("main_poe.py", *STAGE1, "--batch_oe", 16, "--num_exp", 1, "--save_path", paths[0])
        flags = ["--load_path", paths[0], "--save_path", paths[1]]
        in_process("train_model_synthetic_oe.py", *STAGE2, "--num_eval", 1, *flags)
        flags = ["--load_path", paths[1], "--save_path", paths[2], "--ood_sets", "patches", "uniform"]
        in_process("test_ood_model_syn.py", *STAGE3, "--num_exp", 1, *flags)
        found.append([next(p.rglob(g)) for p, g in zip(paths, ("res_*.pt", "*best.pt", "results.csv"), strict=True)])
    (set_a, net_a, csv_a), (set_b, net_b, csv_b) = found
    a, b = DistilledFile.open(set_a).set(), DistilledFile.open(set_b).set()
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.images_oe, b.images_oe)
    nets = [torch.load(n, weights_only=True) for n in (net_a, net_b)]
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])
    assert csv_a.read_text() == csv_b.read_text()


def test_missing_ood_sets_are_all_named(in_process, refused, tmp_path):
    folder = tmp_path / "result-model-synthetic-no-oe" / RUN / "20230101-000000"
    folder.mkdir(parents=True)
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0))
    torch.save(net.state_dict(), folder / "syn_trained_Digits_ConvNetD1_exp0_best.pt")
    common = [*COMMON, "--num_exp", 1, "--is_load_best", "--download", "none"]
    flags = [*common, "--ood_sets", "patches", "iSUN", "LSUN_resize"]
    error = refused("test_ood_model_syn.py", *flags)
    assert "--ood_sets: iSUN, LSUN_resize are missing. Fetch LSUN_resize by --download all" in error
    assert "put NAME/ or NAME.npz (key images) into data/ood; or test without them by --skip_missing" in error
    everything = refused("test_ood_model_syn.py", *common)
    assert all(name in everything for name in (*PAPER_SETS, "CIFAR10", *DRAWN, "--download all", "--skip_missing"))
    assert len(everything) < 500
    assert not (tmp_path / "result-test-ood-synthetic").exists()
    printed = in_process("test_ood_model_syn.py", *flags, "--skip_missing")
    assert "| iSUN " in printed
    assert "missing" in printed
    error = refused("test_ood_model_syn.py", *common, "--ood_sets", "Texture")
    assert "error: --ood_sets: unknown OOD set 'Texture'; did you mean Textures" in error


def test_why_a_set_could_not_be_fetched(digits, tmp_path, monkeypatch):
    def fetch(name, *_):
        raise UserError(f"{name} could not be fetched: no network")

    monkeypatch.setattr("utils.ood.sets.fetch_pytorch_ood", fetch)
    with pytest.raises(UserError) as error:
        OODSource(digits, tmp_path, tmp_path, True, 20, 1).find_all(["Textures", "LSUN_resize", "blob"])
    text = "--ood_sets: Textures, LSUN_resize are missing (Textures could not be fetched: no network). Put NAME/ or"
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("kind", ["plain", "poe"])
def test_each_stage_prints_the_line_of_the_next(kind, in_process, tmp_path):
    """They run as they stand, from the same folder, and carry what was given before; so does a run that was resumed."""
    shared = [*COMMON, "--dsa_strategy", STRATEGY, "--data_path", "my data", "--seed", 7, "--device", "cpu", "--zca"]
    weight = ["--lambda_oe", 0.25, "--batch_oe", 16] if kind == "poe" else []
    flags = [*shared, *weight, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 5, "--Iteration", 1]
    flags += ["--batch_real", 16]
    out = in_process(KINDS[kind][0], *flags, "--save_path", tmp_path / "one")
    (folder,) = (tmp_path / "one" / RUN).iterdir()

    def follow(out: str, text: str) -> tuple[str, str, dict]:
        """Run the line that follows `text`; returns its script, its output, and its flags as the run stored them."""
        (line,) = re.findall(rf"^{text}: (.*)$", out, re.MULTILINE)
        _, name, *words = shlex.split(line)
        out = in_process(name, *words)
        (made,) = re.findall(r"^run folder: (.*)$", out, re.MULTILINE)
        return name, out, json.loads((tmp_path / made / "args.json").read_text())["flags"]

    name, out, found = follow(out, "to train networks on it")
    assert name == f"train_model_synthetic_{'oe' if weight else 'no_oe'}.py"
    expected = {"load_path": "one", "folder": folder.name, "num_eval": 1, "epoch_eval_train": 5, "zca": True, "seed": 7}
    expected |= {"dsa_strategy": STRATEGY, "is_load_oe": bool(weight), "data_path": "my data", "device": "cpu"}
    assert found.items() >= expected.items()
    assert found.get("lambda_oe") == (0.25 if weight else None)  # which has no effect without outliers
    _, out, found = follow(out, "to test them")
    expected = {"num_exp": 1, "ood_sets": list(DRAWN), "zca": True, "seed": 7, "data_path": "my data", "device": "cpu"}
    assert found.items() >= expected.items()
    assert "| mean " in out
    assert all(json.loads(p.read_text())["finished"] for p in tmp_path.rglob("args.json"))
    assert f"--folder {folder.name} --load_path one" in in_process(KINDS[kind][0], "--resume", folder)


def test_a_printed_line_calls_the_scripts_as_this_one_was_called(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["../.venv/bin/python", "-u", "../my code/main.py"])
    monkeypatch.setattr(sys, "argv", ["../my code/main.py"])
    settings = Stage2Settings(zca=True, folder="-a", seed=3, model="MLP", outliers="real", oe_data_path="a b")
    named = "--method DC --dataset CIFAR10 --model MLP --ipc 1 --zca --seed 3 --folder=-a --outliers real"
    line = f"../.venv/bin/python '../my code/two.py' {named} --oe_data_path 'a b'"
    assert command_of("two.py", settings) == line


@pytest.mark.parametrize(("given", "carried"), [({}, None), ({"num_eval": 20}, "20"), ({"num_eval": 3}, "3")])
def test_a_flag_that_differs_from_the_default_of_the_method_is_carried(given, carried, monkeypatch, tmp_path):
    """TGDD is evaluated by 5 networks, other methods by 20; stage 2 trains 5."""
    monkeypatch.chdir(tmp_path)
    settings = Stage1SettingsPOE(method="TGDD", **given).completed(given)
    line = stage2_command(settings, tmp_path / "one" / "TGDD" / "CIFAR10" / "ConvNet" / "1" / "name").split()
    assert (line[line.index("--num_eval") + 1] if "--num_eval" in line else None) == carried


def test_the_line_of_stage_3_names_the_sets_that_are_there(digits, tmp_path, monkeypatch):
    settings = Stage2Settings(dataset="Digits", model="MLP", num_eval=2)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "two" / "DC" / "Digits" / "MLP" / "1" / "name"

    def sets() -> str:
        return stage3_command(settings, folder, digits).partition(" --ood_sets ")[2].partition(" --")[0]

    assert sets() == " ".join(DRAWN)
    (tmp_path / "data" / "ood" / "Places365").mkdir(parents=True)
    Image.new("L", (8, 8), 255).save(tmp_path / "data" / "ood" / "Places365" / "a.png")
    np.savez(tmp_path / "data" / "ood" / "iSUN.npz", images=np.full((30, 8, 8), 255, np.uint8))
    (tmp_path / "data" / "ood" / "LSUN_resize.npz").write_text("damaged")
    np.savez(tmp_path / "data" / "ood" / "mine.npz", images=np.full((30, 8, 8), 255, np.uint8))
    (tmp_path / "data" / "ood" / "notes.md").write_text("from elsewhere")
    assert sets() == "Places365 iSUN mine"
    (tmp_path / "data" / "ood" / "mine.npz").unlink()
    for name in (*PAPER_SETS, "CIFAR10"):
        np.savez(tmp_path / "data" / "ood" / f"{name}.npz", images=np.full((30, 8, 8), 255, np.uint8))
    assert sets() == ""  # all: the default
    assert stage3_command(settings, tmp_path / "moved", digits) is None


@pytest.mark.parametrize(("protocol", "best"), [("dc", True), ("idc", False), ("ncfm", False)])
def test_the_line_of_stage_3_tests_the_best_checkpoints_of_protocol_dc_alone(
    protocol, best, digits, monkeypatch, tmp_path
):
    """As DC published it; of the other protocols the tables show the last epoch."""
    monkeypatch.chdir(tmp_path)
    settings = Stage2Settings(dataset="Digits", model="MLP", protocol=protocol)
    line = stage3_command(settings, tmp_path / "two" / "DC" / "Digits" / "MLP" / "1" / "name", digits)
    assert ("--is_load_best" in line.split()) == best


@pytest.fixture
def networks_of(tmp_path):
    """A stage-2 folder of tiny networks, with these checkpoints of each, and an `args.json` unless `epochs` is None."""

    def make(*kept: tuple[object, ...], epochs=None):
        folder = tmp_path / "result-model-synthetic-no-oe" / RUN / "20230101-000000"
        folder.mkdir(parents=True)
        for index, names in enumerate(kept):
            net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0, index))
            for name in names:
                which = name if name == "best" else f"epoch{name}"
                torch.save(net.state_dict(), folder / f"syn_trained_Digits_ConvNetD1_exp{index}_{which}.pt")
        if epochs is not None:
            (folder / "args.json").write_text(json.dumps({"epochs": epochs, "flags": {}}))

    return make


TEST = ["test_ood_model_syn.py", *COMMON, "--ood_sets", "blob", "--num_exp"]


@pytest.mark.parametrize("epochs", [None, 200])
def test_the_last_epoch_is_tested_when_none_is_named(epochs, networks_of, in_process, tmp_path):
    networks_of((120, 160, 200, "best"), (120, 160, 200, "best"), epochs=epochs)
    out = in_process(*TEST, 2)
    assert "2 × epoch200 (--epoch_train is left out: 200 is the last epoch)" in out
    (about,) = (tmp_path / "result-test-ood-synthetic").rglob("args.json")
    assert json.loads(about.read_text())["flags"]["epoch_train"] == 200
    out = in_process(*TEST, 2, "--epoch_train", 160)
    assert re.search(r"2 × epoch160, protocol unknown$", out, re.MULTILINE)  # folders of older code do not say it


@pytest.mark.parametrize(
    ("flags", "start", "rate", "more"),
    [
        ({"lambda_oe": 0.5}, "", None, ""),
        ({"lambda_oe": 2.0}, "", None, ", lambda_oe 2.0"),
        ({"outliers": "none", "lambda_oe": 2.0, "method": "DC"}, "", None, ", augmentation none"),
        ({"method": "DC", "model": "ConvNetBN"}, "", None, ""),  # it has that of DC
        ({"outliers": "initial"}, "random, not its own", None, ", outliers random, not its own"),
        ({"mix": "mixup", "batch_train": 9}, "", None, ", mix mixup, batch_train 9"),
        ({}, "", 0.05, ", learning rate learned"),
        ({"lr_net": 0.02}, "", 0.05, ", lr_net 0.02"),
        ({"optimizer": "adamw"}, "", 0.05, ", optimizer adamw"),
    ],
)
def test_tables_say_what_is_out_of_the_ordinary(flags, start, rate, more, networks_of, in_process, tmp_path):
    """As stage 2 writes it; `rate` is the learning rate of the set, which SGD takes."""
    usual = {"method": "DSA", "dsa_strategy": "crop", "dataset": "Digits", "model": "ConvNetD1"}
    s, images = Stage2Settings(**usual | flags), SyntheticSet(torch.zeros(1, 1, 8, 8), torch.zeros(1), lr_net=rate)
    training = training_of(s, s.model, augmentation_of(s.method, s.dsa_strategy))
    training = replace(training, epochs=60, lr=training.learning_rate(images))
    networks_of((60,), epochs=60)
    (path,) = tmp_path.rglob("args.json")
    path.write_text(json.dumps({"epochs": 60, "flags": {}, "training": _how_trained(s, training, start)}))
    in_process(*TEST, 1)
    (tested,) = (tmp_path / "result-test-ood-synthetic").rglob("results.json")
    assert load_results(tested.parent).protocols == (f"dc, 60 epochs{more}",)


def test_all_networks_are_tested_at_the_same_epoch(networks_of, in_process):
    """A published folder, which does not say how long it trained: the largest epoch that all have, as numbers."""
    networks_of((800, 1000, "best"), (800, 1000), (800, "best"))
    assert "2 × epoch1000 (" in in_process(*TEST, 2)
    assert "3 × epoch800 (" in in_process(*TEST, 3)


def test_a_stopped_training_is_not_tested_at_an_earlier_epoch(networks_of, refused):
    networks_of((800, 1000, "best"), (800,), epochs=1000)
    error = refused(*TEST, 2)
    assert "--num_exp 2: " in error
    assert "has 1 networks of the kind epoch1000. Lower --num_exp" in error
    assert error.strip().endswith("the first network has: --epoch_train 800, --is_load_best")


def test_the_best_of_a_stopped_training_is_not_tested(networks_of, in_process, refused):
    """Its best epoch so far would stand in the table as one of a whole training."""
    networks_of((1000, "best"), (800, "best"), epochs=1000)
    assert "1 × best" in in_process(*TEST, 1, "--is_load_best")
    error = refused(*TEST, 2, "--is_load_best")
    assert "is not trained to epoch 1000. Resume its run, or wait for its end, or give --num_exp 1" in error


def test_checkpoints_that_are_not_there(networks_of, refused):
    networks_of((600, 1000, "best"), (600, 1000))
    error = refused(*TEST, 1, "--epoch_train", 300)
    assert "--epoch_train 300: no network in " in error
    assert error.strip().endswith("--epoch_train 600, --epoch_train 1000, --is_load_best")
    assert "has 1 networks of the kind best" in refused(*TEST, 2, "--is_load_best")
    assert "--num_exp 999999999999: " in refused(*TEST, 999999999999)


def test_networks_without_a_checkpoint_of_an_epoch(networks_of, refused):
    networks_of(("best",))
    assert "have no checkpoint of an epoch; give --is_load_best" in refused(*TEST, 1)


DSA_SETTINGS = DSA.of(STRATEGY)


@pytest.fixture(scope="module")
def experts(digits, tmp_path_factory):
    """Two trajectories of ConvNetD1 on Digits by whether they saw pseudo-outliers, as short as `distil` can take."""
    buffers = {}
    for with_outliers in (False, True):
        outliers = PseudoOutliers(digits) if with_outliers else None
        folder = tmp_path_factory.mktemp("experts") / "b"
        net = get_network("ConvNetD1", 1, 10, (8, 8))
        run = open_expert_run(folder, describe(digits, "ConvNetD1", outliers and outliers.describe()))
        settings = ExpertSettings(
            num_experts=2, train_epochs=5, lr_teacher=0.05, batch_train=64, batch_oe=64, dsa_strategy=STRATEGY
        )
        ExpertTraining(net, digits, outliers, settings, Compute(), run).train_all()
        buffers[with_outliers] = ExpertBuffer(folder, [p.shape for p in net.parameters()], None, "")
    return buffers


@pytest.fixture(scope="module")
def distilled(digits, experts):
    """Distils each set once."""
    return cache(partial(distil, digits, experts))


def distil(digits, experts, method, seed, with_outliers):
    """A distilled set of Digits, one image per class, and the real images that it started from."""
    outliers = PseudoOutliers(digits) if with_outliers else None
    common = {"model": "ConvNetD1", "ipc": 1, "seed": seed, "init": "real", "dsa_strategy": STRATEGY}
    if method == "MTT":
        settings = TrajectorySettings(lr_img=10.0, lr_teacher=0.05, syn_steps=8, max_start_epoch=4, **common)
        of_seed = made(TrajectoryMatching, digits, outliers, settings, experts[with_outliers])
    else:
        kind, lr = (GradientMatching, 0.1) if method == "DSA" else (DistributionMatching, 1.0)
        settings = GradientSettings(lr_img=lr, batch_real=32, batch_oe=32, **common)
        of_seed = made(kind, digits, outliers, settings)
    of_seed.start(0)
    before = of_seed.synthetic().detached_cpu()
    for it in range(30 if method == "MTT" else 45):
        of_seed.iterate(it)
    return before, of_seed.synthetic().detached_cpu()


@pytest.fixture(scope="module")
def trained():
    """Trains a network of a seed on a set, on equal sets once: all methods start from the same images."""
    networks = {}

    def train(synthetic, seed):
        synthetic = replace(synthetic, lr_net=None)  # the same training for all
        parts = (synthetic.images, synthetic.labels, synthetic.images_oe)
        key = (seed, *(part if part is None else part.numpy().tobytes() for part in parts))
        if key not in networks:
            networks[key] = get_network("ConvNetD1", 1, 10, (8, 8), generator(seed, "net"))
            trainer = Trainer(networks[key], TrainSettings(200, augmentation=DSA_SETTINGS))
            trainer.train(synthetic, seed, ("train",))
        return networks[key]

    return train


@pytest.mark.parametrize("method", ["DSA", "DM", "MTT"])
def test_distilled_images_beat_the_real_ones_they_started_from(digits, distilled, trained, method):
    """Same training, three seeds: the mean gains more than five points, and no seed loses."""
    gains = []
    for seed in (1, 2, 3):
        accs = []
        for synthetic in distilled(method, seed, with_outliers=False):
            net = trained(synthetic, seed)
            accs.append(accuracy_of(predict(net, digits.test_images), digits.labels_test))
        gains.append(accs[1] - accs[0])
    assert min(gains) > 0
    assert sum(gains) / 3 > 0.05


@pytest.mark.parametrize("method", ["DM", "MTT"])
def test_distilled_outliers_help_to_detect(digits, distilled, trained, method, tmp_path):
    """Mean AUROC (msp) on two OOD sets over three seeds: with pseudo-outliers more than two points above plain."""
    source = OODSource(digits, tmp_path, tmp_path, False, 200, 1)
    sets = [ood.load() for ood in source.find(["patches", "gaussian"])[0]]
    means = []
    for with_outliers in (False, True):
        aurocs = []
        for seed in (1, 2, 3):
            _, synthetic = distilled(method, seed, with_outliers=with_outliers)
            net = trained(synthetic, seed)
            inside = msp(predict(net, digits.test_images).double()).numpy()
            aurocs += [ood_measures(inside, msp(predict(net, x).double()).numpy())["auroc"] for x in sets]
        means.append(np.mean(aurocs))
    assert means[1] > means[0] + 0.02


def test_outliers_make_networks_unconfident_on_them(digits):
    """Trained with outliers, a network is nearer to uniform on them than one trained without; accuracy stays."""
    images = torch.stack([digits.class_indices[c][:10] for c in range(10)]).flatten()
    labels = torch.arange(10).repeat_interleave(10)
    g = generator(0)
    outliers = digits.normalize(corrupt(digits.unit_train(images), "jigsaw", g))
    held_out = digits.normalize(corrupt(digits.images_test, "jigsaw", g))
    confidence, accs = [], []
    for oe in (None, outliers):
        net = get_network("ConvNetD1", 1, 10, (8, 8), generator(1))
        synthetic = SyntheticSet(digits.train_batch(images), labels, oe)
        Trainer(net, TrainSettings(150, augmentation=DSA_SETTINGS)).train(synthetic, 1, ("t",))
        confidence.append(predict(net, held_out).softmax(1).amax(1).mean().item())
        accs.append(accuracy_of(predict(net, digits.test_images), digits.labels_test))
    assert confidence[1] < confidence[0] - 0.2
    assert accs[1] > accs[0] - 0.1


def test_epoch_by_a_slow_loop(tiny_real):
    """One epoch without augmentation equals plain SGD with momentum and weight decay on the same batches."""
    images = tiny_real.train_batch(torch.arange(10)).double()
    outliers = tiny_real.train_batch(torch.arange(20, 30)).double()
    synthetic = SyntheticSet(images, tiny_real.labels_train[:10], outliers)
    settings = TrainSettings(1, lr=0.05, batch=4, lambda_oe=0.7)
    nets = [get_network("ConvNetW32", 3, 3, (16, 16), generator(0)).double() for _ in range(2)]
    Trainer(nets[0], settings).epoch(synthetic, generator(1))

    g = generator(1)
    order, order_oe = torch.randperm(10, generator=g), torch.randperm(10, generator=g)
    velocity = [torch.zeros_like(p) for p in nets[1].parameters()]
    for start in (0, 4, 8):
        a, b = order[start : start + 4], order_oe[start : start + 4]
        log_p = nets[1](images[a]).log_softmax(1)
        log_q = nets[1](outliers[b]).log_softmax(1)
        loss = -log_p[torch.arange(len(a)), synthetic.labels[a]].mean() - 0.7 * log_q.mean()
        grads = torch.autograd.grad(loss, list(nets[1].parameters()))
        with torch.no_grad():
            for i, (p, grad) in enumerate(zip(nets[1].parameters(), grads, strict=True)):
                velocity[i] = 0.9 * velocity[i] + grad + 5e-4 * p
                p -= 0.05 * velocity[i]
    for p, q in zip(*(n.parameters() for n in nets), strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=1e-8)


def test_learning_rate_drops_after_half_the_epochs(digits, monkeypatch):
    rates, fresh = [], []
    step = torch.optim.SGD.step

    def spy(self, closure=None):
        rates.append(self.param_groups[0]["lr"])
        fresh.append(not self.state)
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    synthetic = SyntheticSet(digits.train_batch(torch.arange(5)), digits.labels_train[:5])
    Trainer(get_network("MLP", 1, 10, (8, 8)), TrainSettings(7, lr=0.1)).train(synthetic, 0, ())
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 4)
    assert fresh == [True, False, False, True, False, False, False]


def test_checkpoint_epochs():
    assert [e for e in range(1, 1001) if is_checkpoint_epoch(e, 1000)] == [600, 800, 1000]
    assert [e for e in range(1, 301) if is_checkpoint_epoch(e, 300)] == [200, 300]
    assert [e for e in range(1, 51) if is_checkpoint_epoch(e, 50)] == [50]


def test_trained_networks_load_strictly(tmp_path, digits):
    net = get_network("ConvNetD1", 1, 10, (8, 8), generator(0))
    path = tmp_path / "syn_trained_Digits_ConvNetD1_exp0_best.pt"
    torch.save(net.state_dict(), path)
    loaded = load_trained(tmp_path, "ConvNetD1", digits, 0, "best")
    assert torch.equal(predict(loaded, digits.test_images), predict(net, digits.test_images))
    for damage, message in (
        (lambda s: s | {"classifier.bias": torch.zeros(3)}, "does not fit"),
        (lambda s: s | {"classifier.bias": torch.full((10,), float("nan"))}, "NaN"),
        (lambda s: {k: v * 1e30 for k, v in s.items()}, "outputs are not finite"),
        (lambda s: [1], "no state dict"),
    ):
        torch.save(damage(net.state_dict()), path)
        with pytest.raises(ValueError, match=message):
            load_trained(tmp_path, "ConvNetD1", digits, 0, "best")


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 9, 11)])
def test_drawn_ood_sets(name, shape, digits, tmp_path):
    c, h, w = shape
    images = torch.randint(0, 256, (20, c, h, w), dtype=torch.uint8, generator=generator(0))
    real = replace(digits, images_train=images, images_test=images, mean=(0.5,) * c, std=(0.25,) * c)
    source = OODSource(real, tmp_path, tmp_path, False, 200, 1)
    (ood,), missing = source.find([name])
    out = ood.load()
    assert out.shape == (200, c, h, w)
    assert not missing
    assert torch.equal(out, ood.load())
    spread = {"gaussian": 0.48, "uniform": 3**-0.5, "rademacher": 1.0}
    if name in spread:
        assert out.std().item() == pytest.approx(spread[name], rel=0.05)
    if name == "rademacher":
        assert set(out.unique().tolist()) == {-1.0, 1.0}
    if name == "blob":
        values = out[out > -1]
        assert values.min() >= 0.5
        assert 0.05 < (out == -1).float().mean() < 0.95
    if name == "patches":
        assert len(out.flatten(1).unique(dim=0)) == 200
    else:
        assert out.min() >= -1
        assert out.max() <= 1


def test_local_ood_sets_are_seeded_subsets(digits, tmp_path):
    pool = np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "mine.npy", pool)
    source = OODSource(digits, tmp_path, tmp_path, False, 20, 1)
    out = source.find(["mine"])[0][0].load()
    everything = digits.normalize(conform(torch.from_numpy(pool)[:, None], 1, (8, 8)))
    matches = [(everything - image).abs().amax((1, 2, 3)).argmin().item() for image in out]
    assert len(set(matches)) == 20
    assert matches != sorted(matches)
    other = OODSource(digits, tmp_path, tmp_path, False, 20, 2).find(["mine"])[0][0].load()
    assert not torch.equal(out, other)


def test_validation_outliers_of_the_test_images(digits, tmp_path):
    source = OODSource(digits, tmp_path, tmp_path, False, 360, 1)
    sets = {s.name: s.load() for s in validation_sets(source)}
    assert set(sets) == {
        f"val:{n}" for n in ["avg-mean", "geo-mean", "jigsaw", "gauss-speckle", "pixelate", "rgb-ghost", "invert"]
    }
    expected = digits.normalize(1 - digits.images_test)
    assert torch.allclose(sets["val:invert"].flatten().sort().values, expected.flatten().sort().values, atol=1e-5)


def test_the_other_cifar_is_found_where_ood_sets_are(digits, tmp_path, monkeypatch):
    def load(name, root, download, *_):
        """As torchvision stores it, in one of two places; it is not downloaded."""
        assert not download
        if root != tmp_path / "ood":
            raise NotThere("it is not there")
        return torch.full((9, 1, 8, 8), 255, dtype=torch.uint8)

    monkeypatch.setattr("utils.ood.sets.load_test_images", load)
    source = OODSource(replace(digits, name="CIFAR10"), tmp_path / "ood", tmp_path / "data", True, 5, 1)
    sets = {ood.name: ood.load() for ood in validation_sets(source)}
    assert torch.equal(sets["val:invert"], digits.normalize(torch.zeros(5, 1, 8, 8)))


def test_a_single_validation_outlier_is_a_mean_of_two_images(digits, tmp_path):
    source = OODSource(digits, tmp_path, tmp_path, False, 1, 1)
    for ood in validation_sets(source):
        (image,) = ood.load()
        distances = (digits.test_images[:] - image).abs().flatten(1).amax(1)
        assert distances.min() > 0.01, ood.name


def test_default_ood_sets_can_all_be_had(digits, tmp_path):
    """Libraries fetch each of them; iSUN, which none has, is among them only where it is on the disk."""
    source = OODSource(digits, tmp_path, tmp_path, False, 20, 1)
    assert source.default_names()[-1] == "CIFAR10"
    assert set(source.default_names()) <= {*FROM_TORCHVISION, *FROM_PYTORCH_OOD}
    assert replace(source, real=replace(digits, name="CIFAR10")).default_names()[-1] == "CIFAR100"
    np.savez(tmp_path / "iSUN.npz", images=np.full((30, 8, 8), 255, np.uint8))
    assert "iSUN" in source.default_names()


def test_a_run_that_diverges_stops_loudly(refused, tmp_path):
    error = refused("main.py", *STAGE1, "--lr_img", 1e30, "--Iteration", 12, "--num_exp", 1)
    assert "--lr_img 1e+30: experiment 0 diverged in iteration 1: loss of slot 0, 1" in error
    saved = sorted(tmp_path.rglob("res_*.pt"))
    assert len(saved) == 2
    assert all(torch.isfinite(DistilledFile.open(path).set().images).all() for path in saved)
    start, last = (DistilledFile.open(path).set().images for path in saved)
    assert not torch.equal(start, last)  # the last finite images are one update further


def test_a_training_that_explodes_writes_no_network(in_process, refused, tmp_path):
    """The loss before the only update is finite, what the network gives after it is not."""
    in_process("main.py", *STAGE1, "--Iteration", 0, "--num_exp", 1, "--num_eval", 1)
    error = refused("train_model_synthetic_no_oe.py", *STAGE2, "--lr_net", 1e38, "--epoch_eval_train", 1)
    assert "--lr_net 1e+38: network 0 diverged by epoch 1: its outputs are not finite" in error
    assert not list(tmp_path.rglob("syn_trained_*.pt"))


def test_a_network_that_explodes_while_distilling_has_no_accuracy(in_process, tmp_path):
    """The share of class 0 would go into the means."""
    out = in_process("main.py", *STAGE1, "--Iteration", 0, "--num_exp", 1, "--num_eval", 2, "--lr_net", 1e38)
    assert out.count("its training diverged (outputs not finite); lower --lr_net") == 2
    assert "before distilling: ConvNetD1 accuracy - % (2 networks, 4 epochs)" in out
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    assert json.loads(metrics.read_text().splitlines()[-1])["accuracy"] == [None, None]


@pytest.mark.parametrize("flag", [["--is_load_oe"], []])
def test_runs_with_outliers_among_others_of_one_root(in_process, flag):
    """The newest is a plain one; stages 2 and 3 take the one with outliers where they are asked for it."""
    quick = ["--dataset", "Digits", "--model", "MLP", "--ipc", 1]
    one = [*quick, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 1, "--Iteration", 0, "--save_path", "all"]
    made = [in_process(script, *one) for script in ("main_poe.py", "main.py")]
    names = [re.search(r"^run folder: .*/(\S+)$", text, re.MULTILINE)[1] for text in made]
    expected = names[0] if flag else names[1]
    two = [*quick, "--num_eval", 1, "--epoch_eval_train", 1, "--load_path", "all", "--save_path", "two"]
    plain = in_process("train_model_synthetic_no_oe.py", *two, *flag)
    assert f"run folder: two/DC/Digits/MLP/1/{expected}" in plain
    with_oe = in_process("train_model_synthetic_oe.py", *two)
    assert f"run folder: two/DC/Digits/MLP/1/{names[0]}" in with_oe
    in_process("train_model_synthetic_no_oe.py", *two, "--folder", names[1])
    networks = [re.search(r"^run folder: .*/(\S+)$", text, re.MULTILINE)[1] for text in (plain, with_oe)]
    test = ["--num_exp", 1, "--is_load_best", "--load_path", "two", "--ood_sets", "blob"]
    out = in_process("test_ood_model_syn.py", *quick, *test, *flag)
    assert (f"/{networks[1]}, 1 × best" in out) == bool(flag)


def test_a_last_batch_of_one_image_at_batchnorm(refused):
    """ResNet18BN_AP ends in maps of one pixel on images of 8×8."""
    flags = ["--dataset", "Digits", "--model", "ResNet18BN_AP", "--train_on", "random", "--ipc", 1, "--batch_train", 3]
    error = refused("train_model_synthetic_no_oe.py", *flags, "--num_eval", 1, "--epoch_eval_train", 1)
    assert "--batch_train 3: the last batch of an epoch is a single image" in error


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress_lines(monkeypatch, total, first, other, **more):
    """The lines of a loop whose first step takes `first` seconds and all others `other`: those shown, those logged."""
    shown, logged, now = [], [], [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    loop = Progress(lambda line, *, show: (shown if show else logged).append(line), total, "exp 0", **more)
    for step in range(loop.count, total):
        now[0] += other if step > loop.first else first
        loop.step(loss=step)
    loop.close()
    return shown, logged


def test_the_time_left_leaves_out_the_first_step_which_compiles(monkeypatch):
    shown, _ = progress_lines(monkeypatch, 20_000, 600, 1)
    assert len(shown) == 50
    assert shown[0] == "exp 0: 400/20000  loss 199.5000  left 5:26 h"  # 19,600 s
    assert shown[-2].endswith("  left 6:40 min")
    assert shown[-1].endswith("  left 0:00 min")
    shown, _ = progress_lines(monkeypatch, 30, 100, 2)
    assert [line.split("  ")[0] for line in shown] == [f"exp 0: {n}/30" for n in (10, 20, 30)]
    assert shown[0].endswith("left 0:40 min")
    shown, _ = progress_lines(monkeypatch, 25, 100, 2, start=20, every=1)  # a run that was resumed
    assert shown[0] == "exp 0: 21/25  loss 20.0000"  # there is no pace yet
    assert shown[1].endswith("left 0:06 min")


def test_on_a_terminal_there_is_a_bar_instead(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown, logged = progress_lines(monkeypatch, 1000, 1, 1)
    assert (len(shown), len(logged)) == (0, 100)
    assert "exp 0" in sys.stderr.getvalue()
