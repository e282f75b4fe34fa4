"""Progress and results of a distillation, and their form in a checkpoint."""

from dataclasses import dataclass, field, replace

import torch

from utils.data.synthetic import SyntheticSet
from utils.stages.evaluation import EvalMeasures


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
        """Plain values and tensors."""
        return {
            "exp": self.exp,
            "iteration": self.iteration,
            "started": self.method is not None,
            "evaluated": self.evaluated,
            "found": self.measures,
            "finished": [[s.images, s.images_oe, s.lr_net] for s in self.finished],
            "accs": self.accs,
            "method": self.method or {},
        }

    @classmethod
    def from_dict(
        cls, content: dict, num_exp: int, iterations: int, models: tuple[str, ...], example: SyntheticSet
    ) -> "DistillState":
        """The state in a checkpoint, checked.

        Args:
            num_exp, iterations: of the run; models: the networks that it evaluates.
            example: a set with the shapes of a finished one, on the CPU.
        Raises:
            ValueError, KeyError, TypeError, AttributeError: when it is not of this run.
        """
        exp, iteration = int(content["exp"]), int(content["iteration"])
        if not (0 <= exp <= num_exp and 0 <= iteration <= iterations):
            raise ValueError(f"experiment {exp}, iteration {iteration}")
        finished = [_checked(example, *stored) for stored in content["finished"]]
        measures = {
            model: {int(i): {str(name): float(v) for name, v in values.items()} for i, values in networks.items()}
            for model, networks in content["found"].items()
        }
        accs = {model: [float(a) for a in values] for model, values in content["accs"].items()}
        if len(finished) != exp or {*measures, *accs} - {*models}:
            names = ", ".join(map(str, [*measures, *accs]))
            raise ValueError(f"{len(finished)} finished experiments, networks {names}")
        if any("accuracy" not in values for networks in measures.values() for values in networks.values()):
            raise ValueError("networks without an accuracy")
        method = dict(content["method"]) if content["started"] else None
        return cls(exp, iteration, method, bool(content["evaluated"]), measures, finished, accs)


def _checked(
    example: SyntheticSet, images: torch.Tensor, images_oe: torch.Tensor | None, lr_net: float | None = None
) -> SyntheticSet:
    """The set of a finished experiment."""
    if (images_oe is None) != (example.images_oe is None):
        raise ValueError("a finished set with outliers where there are none, or without where there are")
    for tensor in (images,) if images_oe is None else (images, images_oe):
        if tensor.shape != example.images.shape or tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ValueError("a finished set of another shape, or not finite")
    lr_net = None if lr_net is None else float(lr_net)
    return replace(example, images=images, images_oe=images_oe, lr_net=lr_net)
