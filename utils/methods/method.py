"""What a distillation method is: its interface to the stages, its settings, and its entry in the registry.

A method is a class with the members of `Method`, and a `MethodEntry` that says how it is built and which settings it
has; `with_experts` builds one that needs trained networks. The stages use nothing else. The registry is in
`utils/methods/__init__.py`.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from utils.compute.device import Compute, Workload
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import DSA
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.outliers.sources import OutlierSource
from utils.runs.lineage import args_or_nothing
from utils.settings.distillation import WITH_OUTLIERS, Distilling, ExpertSettings
from utils.settings.fields import Settings, as_words, flag
from utils.settings.parser import number
from utils.training.experts import ABOUT, ExpertBuffer, check_about, describe, expert_folder


class Method(Protocol):
    """One distillation: the synthetic images of an experiment, and their updates."""

    labels: Tensor  # int64 [num_classes·ipc], sorted
    outliers: OutlierSource | None
    initial: Sequence[SyntheticSet]  # distilled sets to start the experiments from, instead of real images or noise
    notices: Sequence[str]  # lines for the log of the run
    about: Mapping[str, object]  # plain values that describe the run
    fingerprints: Mapping[str, str]  # hashes of other inputs, by flag, which must be the same in a resumed run

    def start(self, exp: int) -> None:
        """Initialise the synthetic images (and outliers) of experiment `exp`."""

    def iterate(self, it: int) -> dict[str, Tensor]:
        """Update the images once; returns losses by name, `[slots]` or `[1]` each."""

    def synthetic(self) -> SyntheticSet:
        """The current synthetic set; later iterations may change its tensors in place."""

    def state_dict(self) -> dict:
        """Copies of all that later iterations depend on, except the settings: tensors and plain values."""

    def load_state_dict(self, exp: int, state: dict) -> None:
        """Continue experiment `exp` from a `state_dict`. Raises `ValueError` or `KeyError` if it is of another run."""


@dataclass(frozen=True)
class MethodInputs:
    """What a method is built from."""

    real: RealData
    outliers: OutlierSource | None  # None for plain distillation
    settings: Distilling  # of the script; an object of `MethodEntry.settings`
    augmentation: DSA | None = None  # that of `--dsa_strategy`, if the method uses it
    compute: Compute = field(default_factory=Compute)
    initial: Sequence[SyntheticSet] = ()  # see `Method`

    @property
    def kinds(self) -> int:
        """How many kinds of images are learned: 2 with outliers."""
        return 1 if self.outliers is None else 2

    @property
    def batch_images(self) -> int:
        """Real images and outliers of one matching step, over all slots."""
        s, real = self.settings, self.real
        per_class = min(s.batch_real, len(real.images_train) // real.num_classes)
        return real.num_classes * (per_class + s.batch_oe * (self.kinds - 1))


@dataclass(frozen=True)
class MethodEntry:
    """A method in the registry."""

    name: str
    help: str  # what it is, in a few words
    build: Callable[[MethodInputs], Method]
    workload: Callable[[MethodInputs], Workload]  # of one iteration in this process; `--compile auto` decides from it
    settings: type[Distilling] = Distilling  # a subclass adds the method's own flags
    defaults: Mapping[str, Any] = field(default_factory=dict)  # its defaults for common flags, by name
    derived: Callable[[Any], Mapping[str, Any]] = lambda settings: {}  # further ones, which follow from its own flags
    experts: Callable[[Any], ExpertSettings | None] = lambda settings: None  # those that are to be trained first
    unused: Sequence[str] = ()  # the common flags that it does not use
    augmentation: Literal["required", "optional", "unused"] = "optional"  # its use of `--dsa_strategy`

    def own(self, settings: Distilling) -> Distilling:
        """The method's settings out of those of a script, which has all methods' and may mix up what follows from
        them."""
        return self.settings(**{f.name: getattr(settings, f.name) for f in fields(self.settings)})


@dataclass(frozen=True)
class Spread(Settings):
    """Outliers apart."""

    spread_oe: float = flag(
        0.0,
        "weight of a term that keeps outliers apart in the features of the network; 0: without, as published",
        number(0),
        needs=WITH_OUTLIERS,
    )


@dataclass(frozen=True)
class MatchingSettings(Distilling, Spread):
    """Matching, class by class."""


def with_experts(kind: Callable[[MethodInputs, ExpertBuffer], Method]) -> Callable[[MethodInputs], Method]:
    """What builds a method for the registry whose class takes the experts that its settings name, too."""

    def build(inputs: MethodInputs) -> Method:
        """The method with its experts; a `UserError` tells that they are missing or of another kind."""
        s, real = inputs.settings, inputs.real
        folder = expert_folder(s.buffer_path, real, s.model)
        make = shlex.join(["python", "train_experts.py", *as_words(s.of_experts())])
        before = args_or_nothing(Path(s.resume)) if s.resume else {}
        most = before.get("num_experts", s.max_experts)  # more may have been trained since the run began
        shapes = [p.shape for p in real.network(s.model, generator(0)).parameters()]
        experts = ExpertBuffer(folder, shapes, most, make)
        about = inputs.outliers and inputs.outliers.describe()
        is_known = check_about(folder, describe(real, s.model, about, s.of_experts().lambda_oe))
        without = f"{folder} has no {ABOUT}"  # as published buffers
        if not is_known and inputs.outliers is not None:
            raise UserError(f"--buffer_path: {without}, so its experts have seen no outliers; make them with {make}")
        if s.last_epoch > experts.epochs:
            raise UserError(s.TOO_SHORT.format(s=s, experts=experts))
        accuracy = before["expert_accuracy"] if "expert_accuracy" in before else experts.accuracy(real, s.model)
        method = kind(inputs, experts)
        if accuracy is not None:
            found = f"{100 * accuracy:.2f} % on the test set after {len(experts.trajectories[0][1]) - 1} epochs"
            method.notices.append(f"experts: {len(experts.trajectories)}; the first reaches {found}")
        if not is_known:
            method.notices.append(f"{without}: experts are assumed to have seen images normalised as here")
        method.about = {"num_experts": len(experts.trajectories), "expert_accuracy": accuracy}
        method.fingerprints = {"buffer_path": experts.fingerprint()}
        return method

    return build
