"""Stage 2 from its flags to its run: train networks on a distilled set and keep their checkpoints."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils.compute import distributed
from utils.compute.device import Workload, choose_compute, choose_device
from utils.core.errors import UserError
from utils.core.files import save_pt
from utils.core.rng import generator
from utils.core.torch_files import fingerprint
from utils.data.augment import dc_augmentation
from utils.data.datasets import RealData
from utils.data.distilled_file import DistilledFile, result_name
from utils.data.identity import identity
from utils.data.synthetic import SyntheticSet
from utils.exchange.convert import TrainingSet
from utils.exchange.formats import check_there
from utils.methods import METHODS, augmentation_of
from utils.ood.generated import DRAWN
from utils.ood.sets import OODSource
from utils.report.tables import counted, mean_std
from utils.runs.lineage import STAGE1_ROOTS, TRAINED_ON, find_run_folder, root_of
from utils.runs.resume import check_inputs
from utils.runs.run_folder import RunFolder, read_args
from utils.settings.arguments import Stage2Settings, Stage3Settings
from utils.settings.commands import carried, command_of
from utils.settings.common import OOD_PATH, OutlierTraining, read_data
from utils.settings.fields import as_dict
from utils.stages.evaluation import training_of
from utils.stages.training_set import OUTLIERS, labelled_images, resumed_set, with_outliers
from utils.training.coresets import WHOLE_EPOCHS, FeatureNetworks
from utils.training.network_training import TEST_INTERVAL, NetworkTraining
from utils.training.trainer import LEARNING_RATES, LR_NET, Trainer, TrainSettings


def run_stage2(settings: Stage2Settings) -> None:
    """Everything that a stage-2 script does after parsing."""
    s = settings
    device = choose_device(s.device, s.deterministic)
    augmentation = augmentation_of(s.method, s.dsa_strategy)
    if not s.resume:  # before the data may be downloaded
        check_there(s.distilled, "--distilled")
        check_there(s.distilled_oe, "--distilled_oe")
    real = read_data(s).to(device)
    how = training_of(s, s.model, augmentation)
    of_features = TrainSettings(how.epochs, LR_NET, s.batch, 0.0, augmentation or dc_augmentation(s.dataset, s.model))
    networks = FeatureNetworks(s.model, real, of_features, s.seed, s.compile, s.precision)
    chosen = resumed_set(s, real)
    if chosen is None:
        cache = Path(s.save_path) / "features"
        chosen = labelled_images(s, real, partial(find_distilled, s), partial(networks.for_coresets, s.features, cache))
        chosen = with_outliers(s, chosen, real, partial(networks.train, chosen.synthetic.decoded()))
    s = replace(s, ipc=s.ipc or chosen.ipc(real.num_classes))
    synthetic = chosen.synthetic.decoded()
    training = replace(
        how,
        epochs=s.epoch_eval_train or (WHOLE_EPOCHS if s.train_on == "whole" else how.epochs),
        lr=how.learning_rate(synthetic),
        lambda_oe=0.0 if s.outliers == "none" else s.lambda_oe,
    )
    work = stage2_workload(s.num_eval, training, real, synthetic)
    net = real.network(s.model, generator(s.seed))
    compute = choose_compute(s.compile, s.precision, device, net, (real.channel, *real.im_size), work)
    run = (_resume if s.resume else _start)(s, chosen, real, training, _fingerprints(s, real, synthetic))
    run.log(f"computing: {compute}")
    trainer = Trainer(net.to(device), training, compute)
    of_run = NetworkTraining(s.model, real, synthetic.to(device), trainer, s.seed, run, bool(s.resume))
    best, last = zip(*of_run.train_all(s.num_eval, s.checkpoint_interval), strict=True)
    run.log(f"accuracy over {counted(s.num_eval, 'network')}: best {mean_std(best)} %, last epoch {mean_std(last)} %")
    run.finish()
    if run.is_main and (command := stage3_command(s, run.path, real)):
        run.log(f"to test them: {command}")


def find_distilled(s: Stage2Settings) -> tuple[Path, str]:
    """The `res_….pt` of a run under `--load_path`, else under the roots of stage 1: of `--folder`, else of the newest
    that fits, with outliers if those are wanted; and a line for the log, see `find_run_folder`."""
    only_oe = s.is_load_oe or (s.outliers == "distilled" and s.folder is None)
    roots = [s.load_path] if s.load_path is not None else STAGE1_ROOTS[1:] if only_oe else STAGE1_ROOTS
    parts = (s.method, s.dataset, s.model, s.ipc)
    folder, note = find_run_folder(roots, parts, s.folder, result_name(*parts), only_oe)
    return folder / result_name(*parts), note


def stage3_command(s: Stage2Settings, folder: Path, real: RealData) -> str | None:
    """The command that tests the networks of a run folder; None where stage 3 would not find the folder.

    The OOD sets are those of the paper and the files in `data/ood` that are at hand, or else those that need no files.
    With protocol dc the best checkpoints are tested, as published, with others those of the last epoch.
    """
    root = root_of(folder, (s.method, s.dataset, s.model, s.ipc))
    source = OODSource(real, Path(OOD_PATH), Path(s.data_path), False, limit=1, seed=1)
    names = source.default_names()
    there = source.at_hand(names)
    sets = None if there == names else tuple(there or DRAWN)
    where = {"num_exp": s.num_eval, "is_load_best": s.tests_best, "load_path": root, "folder": folder.name}
    where["ood_sets"] = sets
    return root and command_of("test_ood_model_syn.py", carried(s, Stage3Settings, **where, score=("msp", "mls")))


def stage2_workload(num_networks: int, settings: TrainSettings, real: RealData, synthetic: SyntheticSet) -> Workload:
    """The work of a run in this process; a tested image counts half a pass."""
    epochs, images, tests = settings.epochs, len(synthetic.images), math.ceil(settings.epochs / TEST_INTERVAL)
    passes = epochs * images * (2 if synthetic.num_outliers else 1) + tests * len(real.images_test) / 2
    return Workload(num_networks * passes / distributed.world_size(), "training")


def _fingerprints(s: Stage2Settings, real: RealData, synthetic: SyntheticSet) -> dict[str, str]:
    """Fingerprints of all that a run reads, by flag; `synthetic` is decoded. The images of the whole training set are
    those of `--data_path`; normalised, they differ from device to device."""
    prints, images = {"data_path": real.fingerprint()}, None if s.train_on == "whole" else synthetic.images
    if images is not None or synthetic.images_oe is not None:
        prints["load_path"] = fingerprint((images, synthetic.labels, synthetic.images_oe))
    pool = synthetic.fresh_oe and synthetic.fresh_oe.source.fingerprint()
    return prints | ({"oe_data_path": pool} if pool else {})


def _how_trained(s: Stage2Settings, training: TrainSettings, start: str) -> dict:
    """What tables say of the training, for `args.json`: its protocol, its epochs, and what is out of the ordinary."""
    names = ("optimizer", "schedule", "mix", "lr_net", "batch_train")
    changed = {name: getattr(s, name) for name in names if getattr(s, name)}
    if s.outliers != "none" and s.lambda_oe != OutlierTraining.lambda_oe:
        changed["lambda_oe"] = s.lambda_oe
    changed |= {} if training.augmentation else {"augmentation": "none"}
    changed |= {"outliers": start} if start else {}
    is_learned = not s.lr_net and training.lr != LEARNING_RATES[training.optimizer]
    changed |= {"learning rate": "learned"} if is_learned else {}
    return {"protocol": s.protocol, "epochs": training.epochs} | changed


def _keep_set(run: RunFolder, s: Stage2Settings, chosen: TrainingSet, real: RealData) -> None:
    """Write the set into the run folder, as stage 1 may go on; of the whole training set only its outliers."""
    if run.is_main and s.train_on != "whole":
        stored = replace(chosen.synthetic.detached_cpu(), fresh_oe=None)
        DistilledFile.write(run.path / TRAINED_ON, [stored], {}, real, {"flags": as_dict(s)})
    elif run.is_main and chosen.synthetic.images_oe is not None:
        save_pt(run.path / OUTLIERS, chosen.synthetic.images_oe.cpu())


def _resume(
    s: Stage2Settings, chosen: TrainingSet, real: RealData, training: TrainSettings, inputs: dict[str, str]
) -> RunFolder:
    """The run folder of `--resume`; a `UserError` tells that the data or the distilled set have changed since."""
    folder = Path(s.resume)
    if s.oe_data_path and not read_args(folder)["flags"].get("oe_data_path"):
        raise UserError(f"--oe_data_path: the run {folder} began without a pool; leave it out")
    check_inputs(folder, inputs)
    run = RunFolder(folder)
    if s.train_on != "whole" and not (folder / TRAINED_ON).is_file():  # of older code
        _keep_set(run, s, chosen, real)
    run.update_args(as_dict(s), device=str(real.device), training=_how_trained(s, training, chosen.start))
    run.log("resumed")
    return run


def _start(
    s: Stage2Settings, chosen: TrainingSet, real: RealData, training: TrainSettings, inputs: dict[str, str]
) -> RunFolder:
    """A new run folder, named as that of stage 1 if there is one, so that one name leads through all stages."""
    name = chosen.origin and chosen.origin.name
    kinds = (s.train_on, s.outliers, "again" if s.corrupt_again else "none")
    ending = "".join(f"-{kind}" for kind in kinds if kind not in ("distilled", "none"))
    run = RunFolder.create(s.save_path, s.method, s.dataset, s.model, s.ipc, name=name, ending=ending)
    _keep_set(run, s, chosen, real)
    about = {"device": str(real.device), "seed": s.seed, "epochs": training.epochs, "lr": training.lr}
    about |= {"images_from": chosen.origin and str(chosen.origin.resolve()), "data": identity(real)}
    about |= {"inputs": inputs, "training": _how_trained(s, training, chosen.start)}
    run.save_args(as_dict(s), **about)
    lines = [f"run folder: {run.path}"]
    if name and run.path.name != name + ending:
        lines.append(f"there is a folder {name}{ending} already; stage 3 finds this run by --folder {run.path.name}")
    lines += [*real.lines(), *chosen.lines]
    if s.dsa_strategy and METHODS[s.method].augmentation == "unused":
        lines.append(f"--dsa_strategy {s.dsa_strategy} is not used by --method {s.method}")
    images = len(chosen.synthetic.images) * chosen.synthetic.factor**2
    lines += [
        f"an epoch has {images} images{' and as many outliers' if chosen.synthetic.num_outliers else ''}",
        f"the best checkpoint is chosen on the test set, by tests every {TEST_INTERVAL} epochs and after the last",
        f"{training.epochs} epochs, batch {training.batch}, learning rate {training.lr:g}",
    ]
    run.log(*lines)
    return run
