"""The loop of stage 1: iterate, evaluate, save. It knows a method by the protocol of `utils/methods` alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from utils.compute import distributed
from utils.core.errors import Interrupted, UserError, one_line
from utils.data.distilled_file import DistilledFile, result_name
from utils.data.synthetic import SyntheticSet
from utils.methods import Method
from utils.report.plots import save_curves, save_grid
from utils.report.tables import counted, mean_std
from utils.runs import signals
from utils.runs.checkpoints import Checkpointer
from utils.runs.progress import Progress
from utils.runs.resume import resume_command
from utils.runs.run_folder import RunFolder
from utils.settings.arguments import Stage1Settings
from utils.settings.fields import as_dict
from utils.stages.evaluation import Evaluator
from utils.stages.loop_state import DistillState


class ResultFiles:
    """The files of a run that hold its results: distilled sets, pictures and curves. Only rank 0 writes."""

    def __init__(self, run: RunFolder, settings: Stage1Settings, evaluator: Evaluator):
        self.run, self.settings, self.real = run, settings, evaluator.real
        self.path: Path = run.path / result_name(settings.method, self.real.name, settings.model, settings.ipc)

    def save(self, state: DistillState, current: SyntheticSet) -> None:
        """Write the distilled sets so far, of which `current` is the newest, and pictures of that one."""
        if not distributed.is_main():
            return
        sets = [*state.finished, current.detached_cpu()]
        DistilledFile.write(self.path, sets, state.all_accs(), self.real, self._about(state))
        s = self.settings
        newest, parts = sets[-1], sets[-1].decoded() if sets[-1].factor > 1 else None
        pictures = {"vis": newest.images, "vis_oe": newest.images_oe}
        pictures |= {} if parts is None else {"vis_parts": parts.images, "vis_parts_oe": parts.images_oe}
        for prefix, images in pictures.items():
            if images is not None:
                point = f"exp{state.exp}_iter{state.iteration}"
                name = f"{prefix}_{s.method}_{self.real.name}_{s.model}_{s.ipc}ipc_{point}.png"
                pixels = self.real.denormalize(images.to(self.real.device)).cpu()
                save_grid(self.run.path / name, pixels, s.ipc)

    def save_last_finite(self, state: DistillState, before: SyntheticSet) -> Path:
        """Write the images from before the update that diverged, without a learning rate, which may have caused it.

        Returns the path.
        """
        path = self.path.with_name(self.path.stem + "_last_finite.pt")
        if distributed.is_main():
            DistilledFile.write(path, [replace(before.detached_cpu(), lr_net=None)], {}, self.real, self._about(state))
        return path

    def draw_curves(self) -> None:
        """The losses and measures of the run over its iterations, as `curves.png`."""
        if not distributed.is_main():
            return
        try:
            save_curves(self.run.path / "curves.png", self.run.metrics())
        except ImportError:
            self.run.log("no curves.png: matplotlib is not installed (pip install matplotlib)")

    def _about(self, state: DistillState) -> dict:
        return {"iteration": state.iteration, "experiment": state.exp, "flags": as_dict(self.settings)}


class Distillation:
    """All experiments of a run. Its state is saved at checkpoints, and when a signal stops it."""

    def __init__(
        self,
        method: Method,
        evaluator: Evaluator,
        settings: Stage1Settings,
        run: RunFolder,
        checkpointer: Checkpointer,
    ):
        self.method, self.evaluator, self.settings, self.run = method, evaluator, settings, run
        self.checkpointer = checkpointer
        self.files = ResultFiles(run, settings, evaluator)
        self.state = DistillState()

    def run_all(self) -> None:
        """Distil, evaluate and save as the settings say; log the mean accuracies at the end.

        Raises:
            Interrupted: after a signal; the state is saved.
            UserError: when a run diverges.
        """
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
        self.files.draw_curves()
        self.run.log(f"distilled set: {self.files.path}")

    @property
    def starts_another(self) -> bool:
        """Whether an experiment has not started yet."""
        return self.state.exp + (self.state.method is not None) < self.settings.num_exp

    def _experiment(self) -> None:
        """Run experiment `state.exp` from its present iteration to its end."""
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
                    self._evaluate(progress)
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
        """Save the images as they were before this update, and raise."""
        s = self.settings
        self.method.load_state_dict(self.state.exp, self.state.method)
        names = [name for name in ("lr_img", "lr_img_oe", "lr_lr", "lr_net") if name in s.used()]
        rates = [f"--{name}" for name in names if getattr(s, name) is not None]
        path = self.files.save_last_finite(self.state, self.method.synthetic())
        raise UserError(
            f"--lr_img {s.lr_img:g}: experiment {self.state.exp} diverged in iteration {self.state.iteration}: "
            f"{problem} not finite. Lower {' or '.join(rates)}; --load_path {path} "
            "starts from the last finite images"
        )

    def _evaluate(self, progress: Progress) -> None:
        """Evaluate the present images unless that is done; save the distilled set and a picture."""
        state = self.state
        if state.evaluated:
            return

        def after_network() -> None:
            if self.checkpointer.late():
                self.save()

        self.evaluator.evaluate(
            self.method.synthetic().decoded(), state.exp, state.iteration, state.measures, after_network
        )
        for model, networks in state.measures.items():
            measures = {name: [m[name] for m in networks.values()] for name in next(iter(networks.values()))}
            what = f"{counted(len(networks), 'network')}, {self.evaluator.settings.training[model].epochs} epochs"
            values = {name.replace("auroc", "AUROC"): v for name, v in measures.items()}
            shown = ", ".join(f"{name} {mean_std(v)} %" for name, v in values.items())
            when = f"iteration {state.iteration}" if state.iteration else "before distilling"
            self.run.log(f"exp {state.exp} {when}: {model} {shown} ({what})")
            progress.note(f"{model}: " + ", ".join(f"{name} {100 * np.mean(v):.1f}" for name, v in values.items()))
            if distributed.is_main():
                self.run.metric(experiment=state.exp, iteration=state.iteration, model=model, **measures)
        state.evaluated = True
        self.files.save(state, self.method.synthetic())
        self.save()

    def save(self) -> None:
        """Write a checkpoint."""
        if distributed.is_main():
            self.checkpointer.save(self.state.to_dict())

    def restore(self) -> bool:
        """Return to the newest checkpoint; False where the run was killed before its first.

        Raises:
            UserError: when the checkpoint is not of this run.
        """
        content = self.checkpointer.load()
        distributed.barrier()  # nobody saves before everybody has read
        if content is None:
            self.run.log("resumed: killed before its first checkpoint, so from the beginning")
            self.run.keep_metrics(lambda line: False)
            return False
        try:
            self._restore(content)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = one_line(error, 100)
            raise UserError(f"--resume: the checkpoint in {self.run.path} is not of this run: {reason}") from None
        state = self.state

        def is_before(line: dict) -> bool:
            """Whether a line of `metrics.jsonl` will not be written again."""
            position = (line["experiment"], line["iteration"])
            done = state.evaluated if "model" in line else True
            return position < (state.exp, state.iteration) or (position == (state.exp, state.iteration) and done)

        self.run.keep_metrics(is_before)
        self.run.log(f"resumed at experiment {state.exp}, iteration {state.iteration}")
        return True

    def _restore(self, content: dict) -> None:
        real, labels = self.evaluator.real, self.method.labels.cpu()
        images = torch.empty(len(labels), real.channel, *real.im_size)
        outliers = None if self.method.outliers is None else images
        example = SyntheticSet(images, labels, outliers, factor=self.settings.factor)
        s = self.settings
        self.state = DistillState.from_dict(content, s.num_exp, s.Iteration, self.evaluator.models, example)
        if self.state.method is not None:
            self.method.load_state_dict(self.state.exp, self.state.method)


def not_finite(losses: dict[str, torch.Tensor], synthetic: SyntheticSet) -> str:
    """Names what is no longer finite, and in which slots; empty if all is finite.

    Args:
        losses: by name, each with an entry per slot, or one.
        synthetic: the images after the update.
    """
    values = {**losses, "images": synthetic.images.flatten(1).abs().amax(1)}
    if synthetic.images_oe is not None:
        values["outliers"] = synthetic.images_oe.flatten(1).abs().amax(1)
    if torch.isfinite(torch.cat([v.flatten() for v in values.values()])).all():  # one synchronisation
        return ""
    bad = {name: (~torch.isfinite(v.flatten())).nonzero().flatten() for name, v in values.items()}
    slots = {name: (synthetic.labels[i] if name in ("images", "outliers") else i).tolist() for name, i in bad.items()}

    def named(name: str) -> str:
        """`name`, with its slots where there is more than one."""
        several = values[name].numel() > 1
        return f"{name} of slot {', '.join(map(str, sorted(set(slots[name]))))}" if several else name

    return " and ".join(named(name) for name, of_name in slots.items() if of_name)
