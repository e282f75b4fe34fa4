"""The distillation methods of stage 1: what the stages know of a method, and the registry by name of `--method`.

A method is a class with the members of `Method`, and a `MethodEntry` that says how it is built and which flags it has.
The stages call nothing else. A further method is a file that defines both and calls `register`; `METHOD_MODULES` names
the files of this room.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol

import torch

from utils.compute.compiling import Workload
from utils.compute.device import Compute
from utils.core.errors import UserError
from utils.data.augment import DSA, parse_strategy
from utils.data.datasets import RealData
from utils.data.outliers import OutlierSource
from utils.data.synthetic import SyntheticSet

METHOD_MODULES = ("utils.methods.gradient_matching",)


class Method(Protocol):
    """One distillation: the synthetic images of an experiment, and what updates them.

    `labels`: int64 `[num_classes·ipc]`, sorted; `initial`: distilled sets to start the experiments from, instead of
    real images or noise; `notices`: lines for the log of the run; `about`: plain values that describe the run.
    """

    labels: torch.Tensor
    outliers: OutlierSource | None
    initial: Sequence[SyntheticSet]
    notices: Sequence[str]
    about: Mapping[str, object]

    def start(self, exp: int) -> None:
        """Initialise the synthetic images (and outliers) of experiment `exp`."""

    def iterate(self, it: int) -> dict[str, torch.Tensor]:
        """Update the images once; returns losses by name, each with an entry per class slot, or one."""

    def synthetic(self) -> SyntheticSet:
        """The current synthetic set; later iterations may change its tensors in place."""

    def state_dict(self) -> dict:
        """Copies of all that the next iterations depend on, beside the settings: tensors and plain values."""

    def load_state_dict(self, exp: int, state: dict) -> None:
        """Continue experiment `exp` from a `state_dict`. Raises `ValueError` or `KeyError` if it is of another run."""


@dataclass(frozen=True)
class MethodInputs:
    """What a method is built from.

    `outliers`: None for plain distillation; `flags`: all flags of the script, by name; `augmentation`: of the flag
    `--dsa_strategy`, if the method uses it; `initial`: see `Method`.
    """

    real: RealData
    outliers: OutlierSource | None
    flags: Mapping[str, Any]
    augmentation: DSA | None = None
    compute: Compute = field(default_factory=Compute)
    initial: Sequence[SyntheticSet] = ()


@dataclass(frozen=True)
class Flag:
    """A flag of one or several methods, as `argparse` takes it; methods that share one give equal `Flag`s."""

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str


@dataclass(frozen=True)
class MethodEntry:
    """A method in the registry.

    `help`: what it is, in a few words. `build`: makes it. `workload`: the work of one iteration in this process, by
    which `--compile auto` decides. `flags`: flags of its own. `augmentation`: whether `--dsa_strategy` is required,
    may be given, or is not used.
    """

    name: str
    help: str
    build: Callable[[MethodInputs], Method]
    workload: Callable[[MethodInputs], Workload]
    flags: Sequence[Flag] = ()
    augmentation: Literal["required", "optional", "unused"] = "optional"


METHODS: dict[str, MethodEntry] = {}


def register(entry: MethodEntry) -> None:
    """Add a method to the registry; `--method` then accepts its name."""
    METHODS[entry.name] = entry


def add_method_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of all methods, each once, with the methods that use it in its help."""
    users: dict[Flag, list[str]] = {}
    for entry in METHODS.values():
        for flag in entry.flags:
            users.setdefault(flag, []).append(entry.name)
    for flag, names in users.items():
        group.add_argument(
            f"--{flag.name}", type=flag.type, default=flag.default, help=f"{', '.join(names)}: {flag.help}"
        )


def augmentation_of(method: str, dsa_strategy: str | None) -> DSA | None:
    """The Siamese augmentation of a method under the flag `--dsa_strategy`.

    Raises:
        UserError: when the method requires a strategy and there is none.
    """
    use = METHODS[method].augmentation
    if use == "required" and dsa_strategy is None:
        raise UserError(f"--method {method} needs --dsa_strategy, e.g. color_crop_cutout_flip_scale_rotate")
    return None if use == "unused" or dsa_strategy is None else DSA(parse_strategy(dsa_strategy))


for _module in METHOD_MODULES:
    import_module(_module)
