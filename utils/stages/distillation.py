"""The loop of stage 1: distil, evaluate, save; its checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from utils.compute import distributed
from utils.core.errors import Interrupted, UserError
from utils.data.synthetic import SyntheticSet, result_name, save_synthetic
from utils.methods.gradient_matching import GradientMatching
from utils.report.plots import save_curves, save_grid
from utils.runs import signals
from utils.runs.checkpoints import Checkpointer
from utils.runs.progress import Progress
from utils.runs.resume import resume_command
from utils.runs.run_folder import RunFolder
from utils.training.evaluator import Evaluator, Found, mean_std


@dataclass(frozen=True)
class DistillSettings:
    """What the stage-1 loop needs to know beside its method; `flags` are stored in what it writes."""

    method: str
    model: str
    ipc: int
    num_exp: int
    iterations: int
    eval_interval: int
    eval_last_only: bool
    flags: dict


@dataclass
class Position:
    """How far a distillation is: `iteration` updates of experiment `exp` are done.

    `found`: measures of the networks evaluated at this point; `finished`, `accs`: what came of the experiments before.
    """

    exp: int = 0
    iteration: int = 0
    started: bool = False
    evaluated: bool = False
    found: Found = field(default_factory=dict)
    finished: list[SyntheticSet] = field(default_factory=list)
    accs: dict[str, list[float]] = field(default_factory=dict)


class Distillation:
    """All experiments of a run. Its state is saved at the checkpoints, and when a signal stops it."""

    def __init__(
        self,
        method: GradientMatching,
        evaluator: Evaluator,
        settings: DistillSettings,
        run: RunFolder,
        checkpointer: Checkpointer,
    ):
        self.method, self.evaluator, self.settings, self.run = method, evaluator, settings, run
        self.checkpointer = checkpointer
        self.real = evaluator.real
        self.at = Position()

    def run_all(self) -> None:
        """Distil, evaluate and save as the settings say; log the mean accuracies at the end.

        Raises:
            Interrupted: after a signal; the state is saved.
            UserError: when a run diverges.
        """
        s = self.settings
        if self.at.exp >= s.num_exp:
            self.run.log(f"{self.run.path} is finished: all {s.num_exp} experiments are done")
        try:
            with signals.catch():
                while self.at.exp < s.num_exp:
                    self._experiment()
        except Interrupted as stopped:
            if stopped.between_steps:
                self.save()
            self.run.log(f"stopped at experiment {self.at.exp}, iteration {self.at.iteration}; to go on:")
            self.run.log(resume_command(self.run.path))
            raise
        for model, values in self.at.accs.items():
            self.run.log(f"{model}: accuracy {mean_std(values)} ({len(values)} networks, {s.num_exp} experiments)")
        self._draw_curves()
        self.run.log(f"distilled set: {self._result}")

    def _draw_curves(self) -> None:
        """The losses and measures of the run over its iterations, as `curves.png`."""
        if distributed.rank():
            return
        try:
            save_curves(self.run.path / "curves.png", self.run.metrics())
        except ImportError:
            self.run.log("no curves.png: matplotlib is not installed (pip install matplotlib)")

    @property
    def starts_another(self) -> bool:
        """Whether an experiment is still to be started."""
        return self.at.exp + self.at.started < self.settings.num_exp

    @property
    def _result(self) -> Path:
        s = self.settings
        return self.run.path / result_name(s.method, self.real.name, s.model, s.ipc)

    def _experiment(self) -> None:
        """Experiment `at.exp`, from wherever it is."""
        s, at = self.settings, self.at
        if not at.started:
            self.method.start(at.exp)
            at.started = True
        with self.run.progress(s.iterations, f"exp {at.exp}", start=at.iteration) as progress:
            while True:
                last = at.iteration == s.iterations
                if last or (at.iteration % s.eval_interval == 0 and not s.eval_last_only):
                    self._evaluate(progress)
                if last:
                    break
                progress.step(**self._iterate())
                if self.checkpointer.due(at.iteration):
                    self.save()
                signals.check()
        accs = _joined(at.accs, at.found)
        finished = [*at.finished, self.method.synthetic().detached_cpu()]
        self.at = Position(at.exp + 1, finished=finished, accs=accs)
        self.save()

    def _iterate(self) -> dict[str, float]:
        """One update; returns the mean losses over slots."""
        at = self.at
        before = self.method.synthetic().detached_copy()
        losses = self.method.iterate(at.iteration)
        problem = not_finite(losses, self.method.synthetic())
        if problem:
            self._stop_diverged(problem, before)
        at.iteration += 1
        at.found, at.evaluated = {}, False
        means = {name: value.mean().item() for name, value in losses.items()}
        if not distributed.rank():
            self.run.metric(experiment=at.exp, iteration=at.iteration, **means)
        return means

    def _stop_diverged(self, problem: str, before: SyntheticSet) -> None:
        """Save the images as they were before this update, and raise."""
        flags = self.settings.flags
        path = self._result.with_name(self._result.stem + "_last_finite.pt")
        if not distributed.rank():
            about = {"iteration": self.at.iteration, "experiment": self.at.exp, "flags": flags}
            save_synthetic(path, [before.detached_cpu()], {}, self.real, about)
        raise UserError(
            f"--lr_img {flags['lr_img']:g}: experiment {self.at.exp} diverged in iteration {self.at.iteration}: "
            f"{problem} not finite (--lr_net {flags['lr_net']:g}). Lower --lr_img or --lr_net; --load_path {path} "
            "starts from the last finite images"
        )

    def _evaluate(self, progress: Progress) -> None:
        """Evaluate at this point, unless that is done; save the distilled set and a picture."""
        at = self.at
        if at.evaluated:
            return

        def after_network() -> None:
            if self.checkpointer.late():
                self.save()

        self.evaluator.evaluate(self.method.synthetic(), at.exp, at.iteration, at.found, after_network)
        for model, networks in at.found.items():
            measures = {name: [m[name] for m in networks.values()] for name in next(iter(networks.values()))}
            what = f"{len(networks)} networks, {self.evaluator.settings.training[model].epochs} epochs"
            values = {name.replace("auroc", "AUROC"): v for name, v in measures.items()}
            found = ", ".join(f"{name} {mean_std(v)}" for name, v in values.items())
            self.run.log(f"exp {at.exp} iteration {at.iteration}: {model} {found} ({what})")
            progress.note(f"{model}: " + ", ".join(f"{name} {100 * np.mean(v):.1f}" for name, v in values.items()))
            if not distributed.rank():
                self.run.metric(experiment=at.exp, iteration=at.iteration, model=model, **measures)
        at.evaluated = True
        self._save_result()
        self.save()

    def _save_result(self) -> None:
        """Write the distilled sets so far and a picture of the newest."""
        if distributed.rank():
            return
        s, at = self.settings, self.at
        sets = [*at.finished, self.method.synthetic().detached_cpu()]
        about = {"iteration": at.iteration, "experiment": at.exp, "flags": s.flags}
        save_synthetic(self._result, sets, _joined(at.accs, at.found), self.real, about)
        for prefix, images in (("vis", sets[-1].images), ("vis_oe", sets[-1].images_oe)):
            if images is not None:
                name = f"{prefix}_{s.method}_{self.real.name}_{s.model}_{s.ipc}ipc_exp{at.exp}_iter{at.iteration}.png"
                shown = self.real.denormalize(images.to(self.real.device)).cpu()
                save_grid(self.run.path / name, shown, s.ipc)

    def save(self) -> None:
        """Write a checkpoint."""
        if distributed.rank():
            return
        at = self.at
        self.checkpointer.save(
            {
                "exp": at.exp,
                "iteration": at.iteration,
                "started": at.started,
                "evaluated": at.evaluated,
                "found": at.found,
                "finished": [[s.images, s.images_oe] for s in at.finished],
                "accs": at.accs,
                "method": self.method.state_dict() if at.started else {},
            }
        )

    def restore(self) -> bool:
        """Go back to the newest checkpoint; False where the run was killed before its first.

        Raises:
            UserError: when the checkpoint is not of this run.
        """
        state = self.checkpointer.load()
        distributed.barrier()  # nobody saves before everybody has read
        if state is None:
            self.run.log("resumed: killed before its first checkpoint, so from the beginning")
            self.run.keep_metrics(lambda line: False)
            return False
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"--resume: the checkpoint in {self.run.path} is not of this run: {reason}") from None
        at = self.at

        def is_before(line: dict) -> bool:
            """Whether a line of `metrics.jsonl` will not be written again."""
            position = (line["experiment"], line["iteration"])
            done = at.evaluated if "model" in line else True
            return position < (at.exp, at.iteration) or (position == (at.exp, at.iteration) and done)

        self.run.keep_metrics(is_before)
        self.run.log(f"resumed at experiment {at.exp}, iteration {at.iteration}")
        return True

    def _restore(self, state: dict) -> None:
        exp, iteration = int(state["exp"]), int(state["iteration"])
        if not (0 <= exp <= self.settings.num_exp and 0 <= iteration <= self.settings.iterations):
            raise ValueError(f"experiment {exp}, iteration {iteration}")
        if state["started"]:
            self.method.load_state_dict(exp, state["method"])
        finished = [self._finished(*images) for images in state["finished"]]
        found = {
            model: {int(i): {str(name): float(v) for name, v in measures.items()} for i, measures in networks.items()}
            for model, networks in state["found"].items()
        }
        accs = {model: [float(a) for a in values] for model, values in state["accs"].items()}
        known = set(self.evaluator.models)
        if len(finished) != exp or set(found) - known or set(accs) - known:
            raise ValueError(f"{len(finished)} finished experiments, networks {', '.join(map(str, [*found, *accs]))}")
        if any("accuracy" not in measures for networks in found.values() for measures in networks.values()):
            raise ValueError("networks without an accuracy")
        self.at = Position(exp, iteration, bool(state["started"]), bool(state["evaluated"]), found, finished, accs)

    def _finished(self, images: torch.Tensor, images_oe: torch.Tensor | None) -> SyntheticSet:
        """The set of a finished experiment, checked."""
        shape = (len(self.method.labels), self.real.channel, *self.real.im_size)
        tensors = [images] if self.method.outliers is None else [images, images_oe]
        if any(tuple(t.shape) != shape or t.dtype != torch.float32 or not torch.isfinite(t).all() for t in tensors):
            raise ValueError("a finished set of another shape, or not finite")
        if self.method.outliers is None and images_oe is not None:
            raise ValueError("a finished set with outliers")
        return SyntheticSet(images, self.method.labels.cpu(), images_oe)


def _joined(accs: dict[str, list[float]], found: Found) -> dict[str, list[float]]:
    """Accuracies by model, those of `found` behind those before."""
    return {model: accs.get(model, []) + [m["accuracy"] for m in found[model].values()] for model in found}


def not_finite(losses: dict[str, torch.Tensor], synthetic: SyntheticSet) -> str:
    """What is no longer finite, and in which slots; empty if all is.

    Args:
        losses: by name, one per slot.
        synthetic: the images after the update.
    """
    values = {**losses, "images": synthetic.images.flatten(1).abs().amax(1)}
    if synthetic.images_oe is not None:
        values["outliers"] = synthetic.images_oe.flatten(1).abs().amax(1)
    if torch.isfinite(torch.cat(list(values.values()))).all():  # one synchronisation
        return ""
    bad = {name: (~torch.isfinite(v)).nonzero().flatten() for name, v in values.items()}
    slots = {name: (synthetic.labels[i] if name in ("images", "outliers") else i).tolist() for name, i in bad.items()}
    parts = [f"{name} of slot {', '.join(map(str, sorted(set(s))))}" for name, s in slots.items() if s]
    return " and ".join(parts)
