"""Stage 2 from its flags to its run: train networks on a distilled set and keep their checkpoints."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from utils.compute import distributed
from utils.compute.compiling import Workload, batches
from utils.compute.device import Compute, choose_compute, choose_device
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.core.torch_files import fingerprint
from utils.data.datasets import RealData
from utils.data.distilled_file import DistilledFile, result_name
from utils.data.identity import identity
from utils.data.synthetic import SyntheticSet
from utils.methods import METHODS, augmentation_of
from utils.ood.generated import DRAWN
from utils.ood.sets import OODSource
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS
from utils.report.tables import mean_std
from utils.runs.lineage import (
    STAGE1_ROOTS,
    TRAINED_ON,
    Found,
    find_run_folder,
    next_command,
    root_of,
    stored_set_path,
)
from utils.runs.resume import check_inputs
from utils.runs.run_folder import RunFolder, read_args
from utils.settings.arguments import OOD_PATH, passed_on
from utils.settings.common import read_data
from utils.settings.training_set import assumptions
from utils.stages.evaluation import training_of
from utils.stages.training_set import (
    Choice,
    TrainingSet,
    is_stored,
    labelled_images,
    pool_fingerprint,
    stored_set,
    with_outliers,
)
from utils.training.features import WHOLE_EPOCHS, FeatureNetworks
from utils.training.network_training import TEST_INTERVAL, NetworkTraining
from utils.training.trainer import LR_NET, TEST_BATCH, Trainer, TrainSettings


def find_distilled(
    parts: tuple[str, str, str, int],
    folder: str | None = None,
    load_path: str | None = None,
    only_oe: bool = False,
    exp_idx: int = 0,
) -> Found:
    """The `res_….pt` of the run `folder` (None: the newest that fits) under `load_path` or the roots of stage 1.

    Args:
        parts: method, data set, network and images per class.
        only_oe: look only for runs with outliers.
        exp_idx: the experiment that is wanted of it.

    Raises:
        UserError: when there is none.
    """
    roots: Sequence[str] = STAGE1_ROOTS[1:] if only_oe else STAGE1_ROOTS
    if load_path is not None:
        roots = [load_path]
    name = result_name(*parts)

    def left(run: Path) -> str:
        """How far the experiment came, if it did not come to its end."""
        position = DistilledFile.open(run / name).iterations_left(exp_idx)
        return f"after iteration {position[0]} of {position[1]}" if position else ""

    found = find_run_folder(roots, parts, folder, name, "--load_path", only_oe, left)
    return Found(found.path / name, found.note)


def run_stage2(args: argparse.Namespace, outliers: str) -> None:
    """Everything that a stage-2 script does after parsing; `outliers`: one of `OUTLIERS`."""
    device = choose_device(args.device, args.deterministic)
    augmentation = augmentation_of(args.method, args.dsa_strategy)
    real = read_data(args).to(device)
    choice = _choice(vars(args), outliers)
    how = training_of(args.model, args.dataset, augmentation, args.epoch_eval_train, LR_NET, args.batch_train, 0.0)
    networks = FeatureNetworks(args.model, real, how, args.seed, args.compile, args.precision)
    chosen = _resumed(args.resume, choice, {"load_path": args.load_path, "folder": args.folder}, real)
    if chosen is None:
        only_oe = args.is_load_oe or (outliers == "distilled" and args.folder is None)  # the newest of those with some
        parts = (args.method, args.dataset, args.model, args.ipc)
        stage1 = partial(find_distilled, parts, args.folder, args.load_path, only_oe, args.exp_idx)
        cache = Path(args.save_path) / "features"
        chosen = labelled_images(choice, real, stage1, partial(networks.for_coresets, args.features, cache))
        chosen = with_outliers(choice, chosen, real, partial(networks.train, chosen.synthetic))
    args.ipc = args.ipc or chosen.ipc(real.num_classes)
    settings = replace(
        how,
        epochs=args.epoch_eval_train or (WHOLE_EPOCHS if args.train_on == "whole" else how.epochs),
        lr=args.lr_net or chosen.synthetic.lr_net or LR_NET,
        lambda_oe=0.0 if outliers == "none" else args.lambda_oe,
    )
    work = stage2_workload(args.num_eval, settings, real, chosen.synthetic)
    compute = _choose_compute(args.compile, args.precision, args.model, real, work)
    net = real.network(args.model, generator(args.seed)).to(device)
    inputs = _fingerprints(real, chosen.synthetic)
    if args.resume:
        run = _resume(Path(args.resume), inputs, vars(args), chosen.path)
    else:
        about = {"device": str(device), "seed": args.seed, "epochs": settings.epochs, "inputs": inputs}
        about["data"] = identity(real)
        run = _start(vars(args), choice, chosen, real, about)
        run.log(f"{settings.epochs} epochs, batch {settings.batch}, learning rate {settings.lr:g}")
    run.log(f"computing: {compute}")
    trainer = Trainer(net, settings, compute)
    training = NetworkTraining(
        args.model, real, chosen.synthetic.to(device), trainer, args.seed, run, bool(args.resume)
    )
    best, last = zip(*training.train_all(args.num_eval, args.checkpoint_interval), strict=True)
    run.log(f"accuracy over {args.num_eval} networks: best {mean_std(best)} %, last epoch {mean_std(last)} %")
    _end(run, vars(args), real)


def _end(run: RunFolder, flags: Mapping[str, Any], real: RealData) -> None:
    """Record that the run has ended, and log the command of the next stage."""
    run.finish()
    if run.is_main and (command := stage3_command(flags, run.path, real)):
        run.log(f"to test them: {command}")


def stage3_command(flags: Mapping[str, Any], folder: Path, real: RealData) -> str | None:
    """The command that tests the networks of a run folder on OOD sets that are at hand: those of the paper, else those
    that need no files. None where stage 3 would not find the folder.
    """
    root = root_of(folder, (flags["method"], flags["dataset"], flags["model"], flags["ipc"]))
    source = OODSource(real, Path(OOD_PATH), Path(flags["data_path"]), False, limit=1, seed=1)
    names = source.default_names()
    there = source.at_hand(names)
    sets = None if len(there) == len(names) else there or list(DRAWN)
    where = {"num_exp": flags["num_eval"], "is_load_best": True, "load_path": root, "folder": folder.name}
    return root and next_command("test_ood_model_syn.py", passed_on(flags) | where | {"ood_sets": sets})


def _choice(flags: Mapping[str, Any], outliers: str) -> Choice:
    """What the flags of a stage-2 script choose to train on; a script without outliers lacks some of them."""
    return Choice(
        train_on=flags["train_on"],
        outliers=outliers,
        ipc=flags["ipc"],
        seed=flags["seed"],
        exp_idx=flags["exp_idx"],
        distilled=tuple(flags["distilled"] or ()),
        distilled_oe=tuple(flags.get("distilled_oe") or ()),
        assumed=assumptions(flags),
        corruptions=tuple(flags.get("corruptions", DEFAULT_CORRUPTIONS)),
        mixed=flags.get("mix_corruptions", False),
        oe_data_path=flags.get("oe_data_path"),
        num_oe_per_class=flags.get("num_oe_per_class", 10000),
        download=flags["download"] == "all",
        again=flags.get("corrupt_again", False),
    )


def _fingerprints(real: RealData, synthetic: SyntheticSet) -> dict[str, str]:
    """Fingerprints of all that a run reads, by flag."""
    prints = {
        "data_path": real.fingerprint(),
        "load_path": fingerprint((synthetic.images, synthetic.labels, synthetic.images_oe)),
    }
    pool = pool_fingerprint(synthetic)
    return prints | ({"oe_data_path": pool} if pool else {})


def stage2_workload(num_networks: int, settings: TrainSettings, real: RealData, synthetic: SyntheticSet) -> Workload:
    """The work of a run in this process; a tested image counts half a pass."""
    epochs, images, tests = settings.epochs, len(synthetic.images), batches(settings.epochs, TEST_INTERVAL)
    tested = num_networks * tests * len(real.images_test)
    trained = num_networks * epochs * images * (2 if synthetic.num_outliers else 1) / distributed.world_size()
    most = batches(num_networks, distributed.world_size())  # of a process, so that all of them decide alike
    steps = most * (epochs * batches(images, settings.batch) + tests * batches(len(real.images_test), TEST_BATCH))
    return Workload(trained + tested / 2 / distributed.world_size(), steps, "training")


def _choose_compute(compile_flag: str, precision: str, model: str, real: RealData, workload: Workload) -> Compute:
    """How the device computes, from how long the run is."""
    net = real.network(model, generator(0)).eval()
    return choose_compute(compile_flag, precision, real.device, net, (real.channel, *real.im_size), workload)


def _resumed(folder: str | None, choice: Choice, places: dict[str, str | None], real: RealData) -> TrainingSet | None:
    """The set of the run `folder`; None where it is to be chosen anew.

    That is for a new run, for the whole training set, and when `places` are not those that the run was started with.
    """
    if folder is None or choice.train_on == "whole":
        return None
    about = read_args(Path(folder))
    if any(value != about["flags"].get(name) for name, value in places.items()):
        return None
    path = stored_set_path(Path(folder), about)
    if not isinstance(path, str) or not os.path.isfile(path):
        raise UserError(
            f"--resume: the set that {folder} was trained on is gone: {str(path)[:200]}. Put it back"
            + (", or give its place now with --load_path and --folder" if Path(str(path)).name != TRAINED_ON else "")
        )
    return stored_set(choice, Path(path), real)


def _resume(folder: Path, inputs: dict[str, str], flags: dict, distilled_set: Path | None) -> RunFolder:
    """The run folder of `--resume`.

    Raises:
        UserError: when the data or the distilled set have changed since.
    """
    check_inputs(folder, inputs)
    run = RunFolder(folder)
    run.update_args(flags, **({"distilled_set": str(distilled_set.resolve())} if distilled_set else {}))
    run.log("resumed")
    return run


def _start(flags: dict, choice: Choice, chosen: TrainingSet, real: RealData, about: dict) -> RunFolder:
    """A new run folder, named as that of stage 1 if there is one, so that one name leads through all stages.

    A set that no file of stage 1 holds is written into it.
    """
    parts = (flags["method"], flags["dataset"], flags["model"], flags["ipc"])
    name = chosen.origin and chosen.origin.name
    kinds = (choice.train_on, choice.outliers, "again" if choice.again else "none")
    ending = "".join(f"-{kind}" for kind in kinds if kind not in ("distilled", "none"))
    run = RunFolder.create(flags["save_path"], *parts, name=name, ending=ending)
    path, experiment = chosen.path, choice.exp_idx
    if is_stored(choice, chosen):
        path, experiment = run.path / TRAINED_ON, 0
        if run.is_main:
            stored = replace(chosen.synthetic.detached_cpu(), fresh_oe=None)
            DistilledFile.write(path, [stored], {}, real, {"flags": flags})
    images_from = chosen.origin and str(chosen.origin.resolve())
    run.save_args(
        flags, distilled_set=path and str(path.resolve()), experiment=experiment, images_from=images_from, **about
    )
    run.log(f"run folder: {run.path}")
    if name and run.path.name != name + ending:
        run.log(f"there is a folder {name}{ending} already; stage 3 finds this run by --folder {run.path.name}")
    for line in (*real.lines(), *chosen.lines):
        run.log(line)
    if flags["dsa_strategy"] and METHODS[flags["method"]].augmentation == "unused":
        run.log(f"--dsa_strategy {flags['dsa_strategy']} is not used by --method {flags['method']}")
    run.log(f"the best checkpoint is chosen on the test set, by tests every {TEST_INTERVAL} epochs and after the last")
    return run
