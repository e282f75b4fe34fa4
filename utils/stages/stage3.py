"""Stage 3: accuracy, calibration, error detection and OOD detection of trained networks, as tables, files and plots."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from torch import nn

from utils.compute import distributed
from utils.compute.device import Workload, batches, choose_compute, choose_device
from utils.compute.version import versions, versions_line
from utils.core.errors import UserError, rank_errors
from utils.core.files import save_text
from utils.data.datasets import RealData
from utils.data.distilled_file import DistilledFile
from utils.data.identity import as_trained_on
from utils.data.whitening import ZCA
from utils.ood.evaluate import deviation, score_networks
from utils.ood.scorer import FitSet, Scorer
from utils.ood.scores import need_fitting, require_library
from utils.ood.sets import OODSet, OODSource, validation_sets
from utils.report.plots import (
    distilled_pictures,
    save_distilled,
    save_reliability,
    save_roc_curves,
    save_score_histograms,
)
from utils.report.results import PlotData, Results, results_csv, results_json, results_of
from utils.report.tables import report_text, summary
from utils.runs.lineage import STAGE2_ROOTS, Found, args_or_nothing, distilled_set_of, find_run_folder
from utils.runs.run_folder import RunFolder
from utils.settings.arguments import Stage3Settings
from utils.settings.common import read_data
from utils.settings.fields import as_dict
from utils.training.network_training import checkpoint_name, checkpoints_of, epochs_of, load_trained


def run_stage3(settings: Stage3Settings) -> Results:
    """Everything that the stage-3 script does after parsing; under `torchrun` each process tests some networks."""
    s, scores = settings, _scores(settings.score, settings.use_xent)
    device = choose_device(s.device)
    if s.T != 1.0 and "energy" not in scores:
        raise UserError(f"--T {s.T:g}: only --score energy has a temperature; leave --T out or add energy")
    require_library(scores)
    parts = (s.method, s.dataset, s.model, s.ipc)
    folder, note = _find_networks(parts, s.folder, s.load_path, s.is_load_oe)
    s, which, chosen = _which_checkpoints(folder, s)
    _check_whitening(folder, s.zca)
    trained_on = cache(partial(distilled_set_of, folder))  # the file is opened once
    real, changed = _as_trained_on(folder, read_data(s).to(device), trained_on)
    limit = _images_per_set(len(real.images_test), s.num_ood_ratio)
    source = OODSource(real, Path(s.ood_path), Path(s.data_path), s.download == "all", limit, s.seed)
    sets, missing = _find_sets(source, s.ood_sets, s.skip_missing, s.validate)
    fit = _fit_set(s.fit_on, folder, real, trained_on) if need_fitting(scores) else None
    batch = min(s.batch_test, len(real.images_test))  # no set is larger than the test set, nor need a batch be
    sizes = [len(real.images_test), *[limit] * len(sets), 0 if fit is None else len(fit.labels)]
    with rank_errors():
        nets = _load_networks(folder, s.model, real, s.num_exp, which)
        example = next(iter(nets.values())) if nets else load_trained(folder, s.model, real, 0, which).cpu()
        work, shape = stage3_workload(len(nets), sizes, batch), (real.channel, *real.im_size)
        compute = choose_compute(s.compile, s.precision, device, example, shape, work)
        embed = compute.embedding(example, batch)
        scorers = {index: Scorer(net, scores, s.T, deviation(real), embed) for index, net in nets.items()}
        for scorer in scorers.values():
            scorer.prepare(real.test_images[:2], fit, batch)
    run = RunFolder.create(s.save_path, *parts, name=folder.name)
    run.save_args(as_dict(s), networks=str(folder.resolve()), device=str(device), fitted_on=fit and fit.name)
    run.log(f"run folder: {run.path}")
    training = _training_of(folder)
    tested = f"networks: {folder}, {s.num_exp} × {which}{chosen}, protocol {training['protocol']}"
    about = [note, *real.lines(), *changed, *(line for ood in sets for line in ood.lines()), tested]
    for line in filter(None, [*about, f"computing: {compute}", *_about_fitting(fit, scores, s.fit_on)]):
        run.log(line)
    with rank_errors(), run.progress(len(sets), "OOD sets") as progress:
        networks = score_networks(scorers, real, sets, batch, run.log_own, progress.step)
    results, measured = results_of(networks)
    results.missing = list(missing)
    if run.is_main:
        about = {"networks": str(folder), "checkpoints": which, "training": training, "ood_sets": _about_sets(sets)}
        _write_report(results, scores, run, about | {"flags": as_dict(s)})
        _draw_plots(run, measured, results, folder)
    run.finish()
    run.log(summary(results))
    return results


def _about_sets(sets: Sequence[OODSet]) -> dict[str, dict]:
    """What `results.json` says of each OOD set, by name."""
    return {ood.name: {"kind": ood.kind, "images": ood.count, "source": ood.source} for ood in sets}


def _about_fitting(fit: FitSet | None, scores: Sequence[str], given: str | None) -> list[str]:
    """Lines for the log: what detectors are fitted on; `given`: the value of `--fit_on`."""
    if fit is None:
        return [f"--fit_on {given}: none of the scores {', '.join(scores)} is fitted"] if given else []
    lines = [f"{', '.join(need_fitting(scores))}: fitted on the {fit.name}, {len(fit.labels)} images"]
    if "tscaling" in scores and fit.was_trained_on:
        lines.append("tscaling: the networks were trained on these images, so its temperature is too low")
    return lines


def _training_of(networks: Path) -> dict:
    """How the networks of a folder were trained: by which protocol, and for how many epochs, if it is known."""
    about = args_or_nothing(networks)
    flags = about.get("flags")
    if not isinstance(flags, dict):  # networks of the published code, or made elsewhere
        return {"protocol": "unknown"}
    changed = {name: flags[name] for name in ("optimizer", "schedule", "mix") if flags.get(name)}
    return {"protocol": flags.get("protocol", "dc"), "epochs": about.get("epochs")} | changed


def _load_networks(folder: Path, model: str, real: RealData, num_networks: int, which: str) -> dict[int, nn.Module]:
    """The trained networks that this process tests, by number; there may be none."""
    own = distributed.own_share(num_networks)
    return {index: load_trained(folder, model, real, index, which) for index in own}


def stage3_workload(num_networks: int, sizes: Sequence[int], batch: int) -> Workload:
    """The work of this process; `sizes`: how many images each set has (at most) that each network sees."""
    steps = num_networks * sum(batches(size, batch) for size in sizes)
    return Workload(num_networks * sum(sizes) / 2, steps, "testing")


def _scores(given: Sequence[str] | None, use_xent: bool) -> tuple[str, ...]:
    """The scores that were given, and xent with `--use_xent`; msp if there is none."""
    names = [*(given or ()), *(["xent"] if use_xent else [])]
    return tuple(dict.fromkeys(names or ["msp"]))


def _images_per_set(num_test: int, ratio: int) -> int:
    """How many images of each OOD set are tested.

    Raises:
        UserError: when none is left.
    """
    if num_test < ratio:
        raise UserError(f"--num_ood_ratio {ratio}: nothing is left of {num_test} test images; lower it")
    return num_test // ratio


Opened = Callable[[], tuple[DistilledFile, int]]  # the set that networks were trained on, see `distilled_set_of`


def _fit_set(which: str | None, networks: Path, real: RealData, trained_on: Opened) -> FitSet:
    """The images that detectors are fitted on: the real training set, or the distilled set behind the networks.

    `which` None: the set that the networks were trained on.
    """
    flags = args_or_nothing(networks).get("flags") or {}
    images = flags.get("train_on", "distilled")
    on_whole = images == "whole"
    if which == "distilled" and on_whole:
        raise UserError(
            f"--fit_on distilled: the networks in {networks} were trained on the whole real set; leave it out"
        )
    if which == "real" or on_whole:
        return FitSet("real training set", real.labels_train, real.train_batch, on_whole)
    try:
        file, exp_idx = trained_on()
        synthetic = file.set(exp_idx, real).decoded().to(real.device)
    except UserError as error:
        raise UserError(f"--fit_on distilled: {error}. Use --fit_on real") from None
    name = "distilled set" if images == "distilled" else f"real images chosen by {images}"
    return FitSet(name, synthetic.hard_labels, lambda index: synthetic.images[index], True)


def _find_networks(
    parts: tuple[str, str, str, int], folder: str | None, load_path: str | None, is_load_oe: bool
) -> Found:
    """The stage-2 folder that the flags name: under `--load_path`, else under the roots of stage 2."""
    _, dataset, model, _ = parts
    if load_path is not None:
        roots: Sequence[str] = [load_path]
    else:
        roots = STAGE2_ROOTS[1:] if is_load_oe else STAGE2_ROOTS
    return find_run_folder(roots, parts, folder, checkpoint_name(dataset, model, 0, "*"), "--load_path", is_load_oe)


def _which_checkpoints(folder: Path, s: Stage3Settings) -> tuple[Stage3Settings, str, str]:
    """The settings with `--epoch_train`, the checkpoints to test, `best` or `epoch<e>`, and how they were chosen.

    `--epoch_train` left out is set to the last epoch of the training, as the folder says; of a folder of the published
    code, which does not say it, to the last that all networks have.

    Raises:
        UserError: when one of the `--num_exp` networks has no such checkpoint.
    """
    kept = checkpoints_of(folder, s.dataset, s.model)
    first = kept.get(0, set())
    of_all = set.intersection(*(kept.get(index, set()) for index in range(min(s.num_exp, len(kept) + 1))))
    which, how = "best", ""
    if not s.is_load_best:
        if s.epoch_train is None:
            s = replace(s, epoch_train=_last_epoch(folder, of_all or first))
            how = f" (--epoch_train is left out: {s.epoch_train} is the last epoch)"
        which = f"epoch{s.epoch_train}"
    if which not in of_all:
        has = sum(which in names for names in kept.values())
        others = [f"--epoch_train {epoch}" for epoch in epochs_of(first - {which})]
        others += ["--is_load_best"] * ("best" in first - {which})
        choose = f"choose what the first network has: {', '.join(others)}" if others else "lower --num_exp"
        if has:
            raise UserError(
                f"--num_exp {s.num_exp}: {folder} has {has} networks of the kind {which}. Lower --num_exp, train "
                f"more networks in stage 2, or {choose}"
            )
        flag = "--is_load_best" if which == "best" else f"--epoch_train {s.epoch_train}"
        raise UserError(f"{flag}: no network in {folder} is of the kind {which}. Train longer in stage 2, or {choose}")
    return s, which, how


def _last_epoch(folder: Path, kept: set[str]) -> int:
    """The last epoch of the training, or, where the folder does not say, of the checkpoints `kept`."""
    stored, epochs = args_or_nothing(folder).get("epochs"), epochs_of(kept)
    if not epochs:
        raise UserError(f"--epoch_train: the networks in {folder} have no checkpoint of an epoch; give --is_load_best")
    return stored if isinstance(stored, int) else epochs[-1]


def _check_whitening(networks: Path, zca: bool) -> None:
    """Networks must be tested on images as they were trained on."""
    flags = args_or_nothing(networks).get("flags")
    trained = flags.get("zca") if isinstance(flags, dict) else None
    if trained is not None and bool(trained) != zca:
        how = "with it; give --zca" if trained else "without it; leave out --zca"
        raise UserError(f"--zca: the networks in {networks} were trained {how}")


def _as_trained_on(networks: Path, real: RealData, trained_on: Opened) -> tuple[RealData, tuple[str, ...]]:
    """The data in the form in which the networks of a folder know it, and lines for the log."""
    about, what = args_or_nothing(networks), f"the networks in {networks}"
    stored, flags = about.get("data"), about.get("flags")
    if isinstance(stored, dict):
        return as_trained_on(real, stored, what, partial(_whitening_of, trained_on))
    if isinstance(flags, dict) and real.name == "ImageFolder" and (flags.get("im_size") or 64) != real.im_size[0]:
        raise UserError(f"--im_size {real.im_size[0]}: {what} were trained on {flags.get('im_size') or 64}; give that")
    return real, (f"{what} do not say what they were trained on: images are normalised by --data_path's statistics",)


def _whitening_of(trained_on: Opened) -> ZCA | None:
    """The whitening of the set that networks were trained on, if that is there and holds it."""
    try:
        return trained_on()[0].normalisation().zca
    except UserError:
        return None


def _find_sets(
    source: OODSource, ood_sets: Sequence[str] | None, skip_missing: bool, validate: bool
) -> tuple[list[OODSet], dict[str, str]]:
    """The OOD sets that are there, those of the paper unless some are named, and what to do for each missing one."""
    names = ood_sets or source.default_names()
    missing: dict[str, str] = {}
    if skip_missing:
        sets, missing = source.find(list(dict.fromkeys(names)), skip_missing=True)
    else:
        sets = source.find_all(names, "test without them by --skip_missing")
    if validate:
        try:
            sets += validation_sets(source)
        except UserError as error:
            if not skip_missing:
                raise
            missing["validation outliers"] = str(error)
    if not sets:
        raise UserError("--ood_sets: none is there. Sets that need no files: gaussian uniform rademacher blob patches")
    return sets, missing


def _draw_plots(run: RunFolder, measured: PlotData, results: Results, networks: Path) -> None:
    """Write `scores_<score>.png`, `roc_<score>.png`, `reliability.png`, and, if the set is there, `distilled.png`."""
    try:
        for score, out_scores in measured.out_scores.items():
            finite = _finite(measured.in_scores[score], out_scores)
            if finite:
                first = {name: values[0] for name, values in finite.items()}
                save_score_histograms(run.path / f"scores_{score}.png", score, measured.in_scores[score][0], first)
                save_roc_curves(run.path / f"roc_{score}.png", score, measured.in_scores[score], finite)
        ece = float(np.mean(results.of_networks("ece")))
        save_reliability(run.path / "reliability.png", measured.reliability, ece)
        pictures = distilled_pictures(networks)
        if pictures:
            save_distilled(run.path / "distilled.png", pictures)
    except ImportError:
        run.log("no plots: matplotlib is not installed (pip install matplotlib)")
        return
    run.log("plots: " + ", ".join(sorted(path.name for path in run.path.glob("*.png"))))


def _finite(in_scores: Sequence[np.ndarray], out_scores: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """The sets on which the score of every network is finite; none if it is not on the test images."""
    if not all(np.isfinite(values).all() for values in in_scores):
        return {}
    return {n: values for n, values in out_scores.items() if all(np.isfinite(v).all() for v in values)}


def _write_report(results: Results, scores: Sequence[str], run: RunFolder, about: dict) -> None:
    """Write `results.json`, `results.csv` and `report.md`, and log the report."""
    how = ", ".join(f"{name} {value}" for name, value in about["training"].items() if value is not None)
    text = report_text(results, scores) + f"\nNetworks: checkpoints {about['checkpoints']}; training: {how}.\n"
    text += f"\nVersions: {versions_line(versions())}.\n"
    for line in text.splitlines():
        run.log(line)
    save_text(run.path / "report.md", text)
    save_text(run.path / "results.json", results_json(results, about))
    save_text(run.path / "results.csv", results_csv(results))
    run.log(f"results: {run.path / 'results.json'}, results.csv, report.md")
