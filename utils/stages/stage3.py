"""Stage 3: accuracy, calibration, error detection and OOD detection of trained networks, as tables, files and plots."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from utils.compute import distributed
from utils.compute.device import Compute, Workload, choose_compute, choose_device
from utils.compute.version import versions, versions_line
from utils.core.errors import UserError, require
from utils.core.files import save_text
from utils.data.datasets import RealData
from utils.data.identity import as_trained_on
from utils.data.whitening import ZCA
from utils.ood.evaluate import NetworkScores, deviation, score_networks
from utils.ood.scorer import FitSet, Scorer
from utils.ood.scores import need_fitting, require_library
from utils.ood.sets import OODSet, OODSource, validation_sets
from utils.report import plots
from utils.report.results import Results, results_csv, results_json, results_of, ways_of_testing
from utils.report.tables import report_text, summary
from utils.runs.lineage import STAGE2_ROOTS, args_or_nothing, find_run_folder, set_of_networks
from utils.runs.run_folder import RunFolder
from utils.settings.arguments import Stage3Settings
from utils.settings.common import read_data
from utils.settings.fields import as_dict
from utils.training.network_training import checkpoint_name, checkpoints_of, epochs_of, load_trained


def run_stage3(settings: Stage3Settings) -> Results:
    """Everything that the stage-3 script does after parsing; under `torchrun` each process tests some networks."""
    s, device, scores = settings, choose_device(settings.device), scores_of(settings)
    folder, note = _find_networks(s)
    stage2 = Stage2Run(folder)
    s, which, chosen = stage2.checkpoints(s)
    stage2.check_whitening(s.zca)
    real, changed = stage2.as_trained_on(read_data(s).to(device))
    sets, missing = find_sets(real, s)
    fit = stage2.fit_set(s.fit_on, real) if need_fitting(scores) else None
    batch = min(s.batch_test, len(real.images_test))  # no set is larger than the test set, nor need a batch be
    own = distributed.own_share(s.num_exp)
    nets = {index: load_trained(folder, s.model, real, index, which) for index in own}
    example = next(iter(nets.values())) if nets else load_trained(folder, s.model, real, 0, which).cpu()
    compute = _choose_compute(s, example, real, len(nets), len(sets), fit)
    embed = compute.embedding(example, batch)
    scorers = {index: Scorer(net, scores, s.T, deviation(real), embed) for index, net in nets.items()}
    for scorer in scorers.values():
        scorer.prepare(real.test_images[:2], fit, batch)
    run = RunFolder.create(s.save_path, s.method, s.dataset, s.model, s.ipc, name=folder.name)
    run.save_args(as_dict(s), networks=str(folder.resolve()), device=str(device), fitted_on=fit and fit.name)
    training = stage2.training()
    tested = f"networks: {folder}, {s.num_exp} × {which}{chosen}, protocol {training['protocol']}"
    lines = [*real.lines(), *changed, *(line for ood in sets for line in ood.lines()), tested, f"computing: {compute}"]
    run.log(f"run folder: {run.path}", *filter(None, [note]), *lines, *_about_fitting(fit, scores, s.fit_on))
    with run.progress(len(sets), "OOD sets") as progress:
        networks = score_networks(scorers, real, sets, batch, run.log_own, progress.step)
    results = results_of(networks)
    results.missing = list(missing)
    if run.is_main:
        about = {"networks": str(folder), "checkpoints": which, "training": training, "fitted_on": fit and fit.name}
        about["ood_sets"] = {o.name: {"kind": o.kind, "images": o.count, "source": o.source} for o in sets}
        _write_report(results, scores, run, about | {"flags": as_dict(s)})
        _draw_plots(run, networks, folder, real.class_names)
    run.finish()
    run.log(summary(results))
    return results


def _choose_compute(
    s: Stage3Settings, net: nn.Module, real: RealData, num_networks: int, num_sets: int, fit: FitSet | None
) -> Compute:
    """Compilation and precision, by the images that the networks of this process look at."""
    tested, limit = len(real.images_test), len(real.images_test) // s.num_ood_ratio
    sizes = [tested, *[limit] * num_sets, 0 if fit is None else len(fit.labels)]
    work = Workload(num_networks * sum(sizes) / 2, "testing")
    return choose_compute(s.compile, s.precision, real.device, net, (real.channel, *real.im_size), work)


class Stage2Run:
    """What a stage-2 folder says of the networks in it. One of the published code, or made elsewhere, says nothing."""

    def __init__(self, folder: Path):
        self.folder, self.about = folder, args_or_nothing(folder)
        flags = self.about.get("flags")
        self.flags = flags if isinstance(flags, dict) else {}

    def checkpoints(self, s: Stage3Settings) -> tuple[Stage3Settings, str, str]:
        """The settings with `--epoch_train`, the checkpoints to test, `best` or `epoch<e>`, and how they were chosen.

        `--epoch_train` left out is set to the last epoch of the training, as the folder says; of a folder of the
        published code, which does not say it, to the last that all networks have.
        """
        kept = checkpoints_of(self.folder, s.dataset, s.model)
        first = kept.get(0, set())
        of_all = set.intersection(*(kept.get(index, set()) for index in range(min(s.num_exp, len(kept) + 1))))
        which, how = "best", ""
        if not s.is_load_best:
            if s.epoch_train is None:
                stored, epochs = self.about.get("epochs"), epochs_of(of_all or first)
                what = f"the networks in {self.folder} have no checkpoint of an epoch"
                require(epochs, f"--epoch_train: {what}; give --is_load_best")
                s = replace(s, epoch_train=stored if isinstance(stored, int) else epochs[-1])
                how = f" (--epoch_train is left out: {s.epoch_train} is the last epoch)"
            which = f"epoch{s.epoch_train}"
        if which in of_all:
            stopped = next((i for i in range(s.num_exp) if which == "best" and not self._is_trained(kept[i])), None)
            fewer = f", or give --num_exp {stopped}" if stopped else ""
            what = f"network {stopped} in {self.folder} is not trained to epoch {self.about.get('epochs')}"
            require(stopped is None, f"--is_load_best: {what}. Resume its run, or wait for its end{fewer}")
            return s, which, how
        has = sum(which in names for names in kept.values())
        others = [f"--epoch_train {epoch}" for epoch in epochs_of(first - {which})]
        others += ["--is_load_best"] * ("best" in first - {which} and self._is_trained(first))
        choose = f"choose what the first network has: {', '.join(others)}" if others else "lower --num_exp"
        if has:
            flag, what = f"--num_exp {s.num_exp}", f"{self.folder} has {has} networks of the kind {which}"
            raise UserError(f"{flag}: {what}. Lower --num_exp, train more networks in stage 2, or {choose}")
        flag = "--is_load_best" if which == "best" else f"--epoch_train {s.epoch_train}"
        no = f"no network in {self.folder} is of the kind {which}"
        raise UserError(f"{flag}: {no}. Train longer in stage 2, or {choose}")

    def _is_trained(self, kept: set[str]) -> bool:
        """Whether a network with these checkpoints was trained to its end, as far as the folder says it."""
        last = self.about.get("epochs")
        return bool(self.about.get("finished")) or not isinstance(last, int) or f"epoch{last}" in kept

    def training(self) -> dict:
        """How the networks were trained, as stage 2 says it: by which protocol, if it is known, and the like."""
        stored = self.about.get("training")
        return stored if isinstance(stored, dict) and "protocol" in stored else {"protocol": "unknown"}

    def check_whitening(self, zca: bool) -> None:
        """Networks must be tested on images as they were trained on."""
        trained = self.flags.get("zca")
        if trained is not None and bool(trained) != zca:
            how = "with it; give --zca" if trained else "without it; leave out --zca"
            raise UserError(f"--zca: the networks in {self.folder} were trained {how}")

    def as_trained_on(self, real: RealData) -> tuple[RealData, tuple[str, ...]]:
        """The data in the form in which the networks know it, and lines for the log."""
        what, stored = f"the networks in {self.folder}", self.about.get("data")
        if not isinstance(stored, dict):
            line = f"{what} do not say what they were trained on: images are normalised by --data_path's statistics"
            return real, (line,)
        known, lines = as_trained_on(real, stored, what, self._whitening)
        read = (self.about.get("inputs") or {}).get("data_path")
        if read and read != real.fingerprint():
            lines = (f"{what} were trained on other data than those of --data_path", *lines)
        return known, lines

    def _whitening(self) -> ZCA | None:
        """The whitening of the set that the networks were trained on, if that is there and holds it."""
        try:
            return set_of_networks(self.folder).normalisation().zca
        except UserError:
            return None

    def fit_set(self, which: str | None, real: RealData) -> FitSet:
        """The images that detectors are fitted on: the real training set, or the set that the networks were trained on.
        `which`: the value of `--fit_on`; None: the latter."""
        images = self.flags.get("train_on", "distilled")
        on_whole = images == "whole"
        told = f"--fit_on distilled: the networks in {self.folder} were trained on the whole real set; leave it out"
        require(which != "distilled" or not on_whole, told)
        if which == "real" or on_whole:
            return FitSet("real training set", real.labels_train, real.train_batch, on_whole)
        try:
            synthetic = set_of_networks(self.folder).set(0, real).decoded().to(real.device)
        except UserError as error:
            raise UserError(f"--fit_on distilled: {error}. Give --fit_on real, or train again") from None
        name = "distilled set" if images == "distilled" else f"real images chosen by {images}"
        return FitSet(name, synthetic.hard_labels, lambda index: synthetic.images[index], True)


def scores_of(s: Stage3Settings) -> tuple[str, ...]:
    """The scores that were given, and xent with `--use_xent`; msp if there is none."""
    names = [*(s.score or ()), *(["xent"] if s.use_xent else [])] or ["msp"]
    if s.T != 1.0 and "energy" not in names:
        raise UserError(f"--T {s.T:g}: only --score energy has a temperature; leave --T out or add energy")
    require_library(names)
    return tuple(dict.fromkeys(names))


def _find_networks(s: Stage3Settings) -> tuple[Path, str]:
    """The run folder of stage 2 whose networks are tested, and a line for the log, see `find_run_folder`."""
    roots = [s.load_path] if s.load_path is not None else STAGE2_ROOTS[1:] if s.is_load_oe else STAGE2_ROOTS
    parts, pattern = (s.method, s.dataset, s.model, s.ipc), checkpoint_name(s.dataset, s.model, 0, "*")
    return find_run_folder(roots, parts, s.folder, pattern, s.is_load_oe)


def find_sets(real: RealData, s: Stage3Settings) -> tuple[list[OODSet], dict[str, str]]:
    """The OOD sets that are there, those of the paper unless some are named, and what to do for each missing one."""
    limit = len(real.images_test) // s.num_ood_ratio
    few = f"nothing is left of {len(real.images_test)} test images"
    require(limit, f"--num_ood_ratio {s.num_ood_ratio}: {few}; lower it")
    source = OODSource(real, Path(s.ood_path), Path(s.data_path), s.download == "all", limit, s.seed)
    names, missing = s.ood_sets or source.default_names(), {}
    if s.skip_missing:
        sets, missing = source.find(list(dict.fromkeys(names)), skip_missing=True)
    else:
        sets = source.find_all(names, "test without them by --skip_missing")
    if s.validate:
        try:
            sets += validation_sets(source)
        except UserError as error:
            if not s.skip_missing:
                raise
            missing["validation outliers"] = str(error)
    require(sets, "--ood_sets: none is there. Sets that need no files: gaussian uniform rademacher blob patches")
    return sets, missing


def _about_fitting(fit: FitSet | None, scores: Sequence[str], given: str | None) -> list[str]:
    """Lines for the log: what detectors are fitted on; `given`: the value of `--fit_on`."""
    if fit is None:
        return [f"--fit_on {given}: none of the scores {', '.join(scores)} is fitted"] if given else []
    lines = [f"{', '.join(need_fitting(scores))}: fitted on the {fit.name}, {len(fit.labels)} images"]
    if "tscaling" in scores and fit.was_trained_on:
        lines.append("tscaling: the networks were trained on these images, so its temperature is too low")
    return lines


def _draw_plots(run: RunFolder, networks: Sequence[NetworkScores], folder: Path, classes: Sequence[str]) -> None:
    """Write `scores_<score>.png`, `roc_<score>.png`, `reliability.png`, and, if the set is there, `distilled.png`.

    A score is drawn for the sets on which it is finite for every network.
    """
    first = networks[0]
    for score, inside in first.in_scores.items():
        areas = {name: [n.measures[name][score]["auroc"] for n in networks] for name in first.measures}
        if finite := [name for name, of_networks in areas.items() if np.isfinite(of_networks).all()]:
            outside = {name: first.out_scores[name][score] for name in finite}
            plots.save_score_histograms(run.path / f"scores_{score}.png", score, inside, outside)
            plots.save_roc_curves(run.path / f"roc_{score}.png", score, networks, finite)
    plots.save_reliability(run.path / "reliability.png", networks)
    if pictures := plots.distilled_pictures(folder):
        plots.save_distilled(run.path / "distilled.png", pictures, classes)
    run.log("plots: " + ", ".join(sorted(path.name for path in run.path.glob("*.png"))))


def _write_report(results: Results, scores: Sequence[str], run: RunFolder, about: dict) -> None:
    """Write `results.json`, `results.csv` and `report.md`, and log the report."""
    how = ", ".join(f"{name} {value}" for name, value in about["training"].items() if value is not None)
    flags = about["flags"]
    text = f"# {flags['dataset']}: networks {flags['model']}, {flags['method']}, ipc {flags['ipc']}\n\n"
    text += report_text(results, scores) + f"\nNetworks: checkpoints {about['checkpoints']}; training: {how}.\n"
    text += f"\nTest: {', '.join(ways)}.\n" if (ways := ways_of_testing(about)) else ""
    text += f"\nWhat the measures are: docs/measures.md of TrustDD.\n\nVersions: {versions_line(versions())}.\n"
    run.log(*text.splitlines())
    save_text(run.path / "report.md", text)
    save_text(run.path / "results.json", results_json(results, about))
    save_text(run.path / "results.csv", results_csv(results))
    run.log(f"results: {run.path / 'results.json'}, results.csv, report.md")
