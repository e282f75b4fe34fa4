"""The loop of stage 1: iterate, evaluate, save. It knows a method by the protocol of `utils/methods` alone."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from utils.compute import distributed
from utils.core.errors import Interrupted, UserError, one_line
from utils.data.distilled_file import DistilledFile, result_name
from utils.data.synthetic import SyntheticSet
from utils.methods import Method
from utils.report.plots import save_curves, save_grid
from utils.report.tables import counted, mean_std
from utils.runs import signals
from utils.runs.checkpoints import Checkpointer
from utils.runs.resume import resume_command
from utils.runs.run_folder import RunFolder, read_metrics
from utils.settings.arguments import Stage1Settings
from utils.settings.fields import as_dict
from utils.settings.method_choice import users_of_flags
from utils.stages.evaluation import EvalMeasures, Evaluator


@dataclass
class DistillState:
    """Where a distillation stands."""

    exp: int = 0  # the experiment that runs
    iteration: int = 0  # its updates so far
    method: dict | None = None  # the state of the method, None before the experiment has started
    evaluated: bool = False  # whether the images are evaluated as they are now
    measures: EvalMeasures = field(default_factory=dict)  # of the networks that evaluated them so far
    finished: list[SyntheticSet] = field(default_factory=list)  # the sets of the experiments before
    accs: dict[str, list[float]] = field(default_factory=dict)  # their accuracies, by model

    def all_accs(self) -> dict[str, list[float]]:
        """Accuracies by model: those of the experiments before, then those of this point."""
        return {
            model: self.accs.get(model, []) + [m["accuracy"] for m in networks.values()]
            for model, networks in self.measures.items()
        }

    def to_dict(self) -> dict:
        """Plain values and tensors, for a checkpoint."""
        return vars(self) | {"finished": [[s.images, s.images_oe, s.lr_net] for s in self.finished]}

    @classmethod
    def from_dict(cls, content: dict, num_exp: int, iterations: int, example: SyntheticSet) -> "DistillState":
        """The state in a checkpoint of a run of `num_exp` experiments; `example`: a set like the finished ones.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: when it is not of this run.
        """
        if "measures" not in content:
            raise ValueError("older code wrote it; resume it with that, or start a new run")
        parts = ("images", "images_oe", "lr_net")
        finished = [replace(example, **dict(zip(parts, stored, strict=False))) for stored in content["finished"]]
        plain = {"exp": int, "iteration": int, "measures": dict, "accs": dict}
        state = cls(**content | {n: kind(content[n]) for n, kind in plain.items()} | {"finished": finished})
        if not (0 <= state.exp <= num_exp and 0 <= state.iteration <= iterations and len(finished) == state.exp):
            raise ValueError(
                f"experiment {state.exp}, iteration {state.iteration}, {len(finished)} finished experiments"
            )
        if not all(is_like(getattr(s, part), getattr(example, part)) for s in finished for part in parts[:2]):
            raise ValueError("a finished set of another shape, or not finite")
        return state


def is_like(images: Tensor | None, example: Tensor | None) -> bool:
    """Whether images have the shape and type of others, and are finite; None is like None."""
    if images is None or example is None:
        return images is example
    return images.shape == example.shape and images.dtype == example.dtype and bool(torch.isfinite(images).all())


class Distillation:
    """All experiments of a run. Its state is saved at checkpoints, and when a signal stops it."""

    def __init__(self, method: Method, evaluator: Evaluator, settings: Stage1Settings, run: RunFolder):
        self.method, self.evaluator, self.settings, self.run = method, evaluator, settings, run
        self.real, self.state = evaluator.real, DistillState()
        self.checkpointer = Checkpointer(run, interval=settings.checkpoint_interval)
        self.path = run.path / result_name(settings.method, self.real.name, settings.model, settings.ipc)

    def run_all(self) -> None:
        """Distil, evaluate and save as the settings say; log the mean accuracies at the end. A signal stops it, after
        the state is saved."""
        s = self.settings
        if self.state.exp >= s.num_exp:
            self.run.log(f"{self.run.path} is finished: all {s.num_exp} experiments are done")
        try:
            with signals.catch():
                while self.state.exp < s.num_exp:
                    self._experiment()
        except Interrupted:
            self.save()
            self.run.log(f"stopped at experiment {self.state.exp}, iteration {self.state.iteration}; to resume:")
            self.run.log(resume_command(self.run.path))
            raise
        except RuntimeError:
            if distributed.world_size() > 1:  # another process has died, and this one waited for it
                self.save()
            raise
        for model, values in self.state.accs.items():
            about = f"{counted(len(values), 'network')}, {counted(s.num_exp, 'experiment')}"
            self.run.log(f"{model}: accuracy {mean_std(values)} % ({about})")
        if distributed.is_main():
            save_curves(
                self.run.path / "curves.png", read_metrics(self.run.path), self.method.about.get("expert_accuracy")
            )
        self.run.log(f"distilled set: {self.path}")

    def _experiment(self) -> None:
        s, state = self.settings, self.state
        if state.method is None:
            with signals.interruptible():
                self.method.start(state.exp)
                first = self.method.state_dict()
            state.method = first
        with self.run.progress(s.Iteration, f"exp {state.exp}", start=state.iteration) as progress:
            while True:
                last = state.iteration == s.Iteration
                if last or (state.iteration % s.eval_interval == 0 and not s.evaluates_only_the_last):
                    self._evaluate()
                signals.check()
                if last:
                    break
                progress.step(**self._iterate())
                if self.checkpointer.due(state.iteration):
                    self.save()
        finished = [*state.finished, self.method.synthetic().detached_cpu()]
        self.state = DistillState(state.exp + 1, finished=finished, accs=state.all_accs())
        self.save()

    def _iterate(self) -> dict[str, float]:
        """One update; returns the mean losses over slots. The state moves on only when the update is whole."""
        state = self.state
        with signals.interruptible():
            losses = self.method.iterate(state.iteration)
            problem = not_finite(losses, self.method.synthetic())
            after = self.method.state_dict()
        if problem:
            self._stop_diverged(problem)
        state.iteration, state.method, state.measures, state.evaluated = state.iteration + 1, after, {}, False
        means = {name: value.mean().item() for name, value in losses.items()}
        if distributed.is_main():
            self.run.metric(experiment=state.exp, iteration=state.iteration, **means)
        return means

    def _stop_diverged(self, problem: str) -> None:
        """Save the images as they were before this update, without a learning rate, which may be the cause; raise."""
        s, state = self.settings, self.state
        self.method.load_state_dict(state.exp, state.method)
        path = self.path.with_name(f"{self.path.stem}_last_finite.pt")
        self._write(path, [replace(self.method.synthetic().detached_cpu(), lr_net=None)], {})
        users, names = users_of_flags(), ("lr_img", "lr_img_oe", "lr_lr", "lr_net")
        rates = [f"--{n}" for n in names if s.method in users[n] and getattr(s, n) is not None]
        raise UserError(
            f"--lr_img {s.lr_img:g}: experiment {state.exp} diverged in iteration {state.iteration}: {problem} not "
            f"finite. Lower {' or '.join(rates)}; --load_path {path} starts from the last finite images"
        )

    def _evaluate(self) -> None:
        """Evaluate the present images unless that is done; save the distilled set and a picture."""
        state = self.state
        if state.evaluated:
            return
        synthetic = self.method.synthetic()

        def after_network() -> None:
            if self.checkpointer.late():
                self.save()

        when = f"iteration {state.iteration}" if state.iteration else "before distilling"
        self.run.log(f"exp {state.exp} {when}: training {counted(self.settings.num_eval, 'network')} on the images")
        self.evaluator.evaluate(synthetic.decoded(), state.exp, state.iteration, state.measures, after_network)
        for model, networks in state.measures.items():
            measures = {name: [m[name] for m in networks.values()] for name in next(iter(networks.values()))}
            values = {name.replace("auroc", "AUROC"): v for name, v in measures.items()}
            shown = ", ".join(f"{name} {mean_std(v)} %" for name, v in values.items())
            epochs = self.evaluator.settings.training[model].epochs
            what = f"{counted(len(networks), 'network')}, {epochs} epochs"
            self.run.log(f"exp {state.exp} {when}: {model} {shown} ({what})")
            if distributed.is_main():
                self.run.metric(experiment=state.exp, iteration=state.iteration, model=model, **measures)
        state.evaluated = True
        self._save_results(synthetic.detached_cpu())
        self.save()

    def _save_results(self, newest: SyntheticSet) -> None:
        """Write the distilled sets so far, and pictures of the newest."""
        s, state = self.settings, self.state
        self._write(self.path, [*state.finished, newest], state.all_accs())
        names, names_oe = self.real.class_names, getattr(self.method.outliers, "slot_names", ())
        pictures = {"vis": (newest.images, names), "vis_oe": (newest.images_oe, names_oe)}
        if newest.factor > 1:
            parts = newest.decoded()
            order = parts.labels.argsort(stable=True)  # decoding leaves them part by part; a row shows a class
            outliers = None if parts.images_oe is None else parts.images_oe[order]
            pictures |= {"vis_parts": (parts.images[order], names), "vis_parts_oe": (outliers, names_oe)}
        point = f"{self.real.name}_{s.model}_{s.ipc}ipc_exp{state.exp}_iter{state.iteration}"
        for prefix, (images, of_rows) in pictures.items():
            if images is not None and distributed.is_main():
                pixels = self.real.denormalize(images.to(self.real.device)).cpu()
                path = self.run.path / f"{prefix}_{s.method}_{point}.png"
                save_grid(path, pixels, len(pixels) // self.real.num_classes, of_rows)

    def _write(self, path: Path, sets: list[SyntheticSet], accs: dict[str, list[float]]) -> None:
        about = {"iteration": self.state.iteration, "experiment": self.state.exp, "flags": as_dict(self.settings)}
        if distributed.is_main():
            DistilledFile.write(path, sets, accs, self.real, about)

    def save(self) -> None:
        """Write a checkpoint."""
        if distributed.is_main():
            self.checkpointer.save(self.state.to_dict())

    def restore(self) -> bool:
        """Return to the newest checkpoint; False where the run was killed before its first."""
        content = self.checkpointer.load()
        distributed.barrier()  # nobody saves before everybody has read
        if content is None:
            self.run.log("resumed: killed before its first checkpoint, so from the beginning")
            self.run.keep_metrics(lambda line: False)
            return False
        labels, s = self.method.labels.cpu(), self.settings
        images = torch.empty(len(labels), self.real.channel, *self.real.im_size)
        outliers = None if self.method.outliers is None else images
        example = SyntheticSet(images, labels, outliers, factor=s.factor)
        try:
            self.state = state = DistillState.from_dict(content, s.num_exp, s.Iteration, example)
            if state.method is not None:
                self.method.load_state_dict(state.exp, state.method)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = one_line(error, 100)
            raise UserError(f"--resume: the checkpoint in {self.run.path} is not of this run: {reason}") from None

        def is_before(line: dict) -> bool:
            """Whether a line of `metrics.jsonl` will not be written again."""
            position, here = (line["experiment"], line["iteration"]), (state.exp, state.iteration)
            return position < here or (position == here and (state.evaluated or "model" not in line))

        self.run.keep_metrics(is_before)
        self.run.log(f"resumed at experiment {state.exp}, iteration {state.iteration}")
        return True


def not_finite(losses: dict[str, Tensor], synthetic: SyntheticSet) -> str:
    """Names what is no longer finite after an update, and in which slots; empty if all is finite.

    `losses`: by name, each with an entry per slot, or one.
    """
    values = {**losses, "images": synthetic.images.flatten(1).abs().amax(1)}
    if synthetic.images_oe is not None:
        values["outliers"] = synthetic.images_oe.flatten(1).abs().amax(1)
    finite = {name: torch.isfinite(v.flatten()) for name, v in values.items()}
    if torch.cat(list(finite.values())).all():  # one synchronisation
        return ""
    found = []
    for name, is_finite in finite.items():
        bad = (~is_finite).nonzero().flatten()
        if len(bad):
            slots = synthetic.labels[bad] if name in ("images", "outliers") else bad
            several = f" of slot {', '.join(map(str, slots.unique().tolist()))}" if len(is_finite) > 1 else ""
            found.append(name + several)
    return " and ".join(found)
