"""The distillation methods of stage 1: their interface to the stages, and the registry behind `--method`.

A method is a class with the members of `Method`, and a `MethodEntry` that says how it is built and which flags it has.
The stages use nothing else. To add a method, write a file that defines both and calls `register`. `METHOD_MODULES`
lists the built-in ones.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from utils.compute.compiling import Workload
from utils.compute.device import Compute
from utils.core.errors import UserError, blame, one_line
from utils.core.files import check_file
from utils.data.augment import DSA, parse_strategy
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.outliers.sources import OutlierSource
from utils.settings.parser import Parser, one_of

METHOD_MODULES = (
    "utils.methods.gradient_matching",
    "utils.methods.distribution_matching",
    "utils.methods.trajectory_matching",
)


class Method(Protocol):
    """One distillation: the synthetic images of an experiment, and their updates.

    `labels`: int64 `[num_classes·ipc]`, sorted; `initial`: distilled sets to start the experiments from, instead of
    real images or noise; `notices`: lines for the log of the run; `about`: plain values that describe the run;
    `fingerprints`: hashes of other inputs, by flag, which must be the same in a resumed run.
    """

    labels: torch.Tensor
    outliers: OutlierSource | None
    initial: Sequence[SyntheticSet]
    notices: Sequence[str]
    about: Mapping[str, object]
    fingerprints: Mapping[str, str]

    def start(self, exp: int) -> None:
        """Initialise the synthetic images (and outliers) of experiment `exp`."""

    def iterate(self, it: int) -> dict[str, torch.Tensor]:
        """Update the images once; returns losses by name, `[slots]` or `[1]` each."""

    def synthetic(self) -> SyntheticSet:
        """The current synthetic set; later iterations may change its tensors in place."""

    def state_dict(self) -> dict:
        """Copies of all that later iterations depend on, except the settings: tensors and plain values."""

    def load_state_dict(self, exp: int, state: dict) -> None:
        """Continue experiment `exp` from a `state_dict`. Raises `ValueError` or `KeyError` if it is of another run."""


@dataclass(frozen=True)
class MethodInputs:
    """What a method is built from.

    `outliers`: None for plain distillation; `flags`: all flags of the script, by name; `augmentation`: that of
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
    """A flag of one or several methods, as `argparse` takes it; methods that share a flag define equal `Flag`s."""

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str


@dataclass(frozen=True)
class MethodEntry:
    """A method in the registry.

    `help`: what it is, in a few words. `build`: makes the method. `workload`: the work of one iteration in this
    process, from which `--compile auto` decides. `flags`: the method's own flags. `defaults`: its defaults for common
    flags, by name; `unused`: the common flags that it does not use. `augmentation`: whether `--dsa_strategy` is
    required, optional or unused.
    """

    name: str
    help: str
    build: Callable[[MethodInputs], Method]
    workload: Callable[[MethodInputs], Workload]
    flags: Sequence[Flag] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unused: Sequence[str] = ()
    augmentation: Literal["required", "optional", "unused"] = "optional"


METHODS: dict[str, MethodEntry] = {}


def register(entry: MethodEntry) -> None:
    """Add a method to the registry; `--method` then accepts its name."""
    METHODS[entry.name] = entry


def add_method_flags(parser: Parser, group: argparse._ArgumentGroup) -> None:
    """Add the flags of all methods, each once, with the methods that use it; the help shows defaults that differ."""
    users: dict[Flag, list[str]] = {}
    for entry in METHODS.values():
        for flag in entry.flags:
            users.setdefault(flag, []).append(entry.name)
    for flag, names in users.items():
        _add_flag(group, flag, names)
    for action in parser._actions:
        others = [f"{e.name}: {e.defaults[action.dest]}" for e in METHODS.values() if action.dest in e.defaults]
        if others:
            action.help = f"{action.help} (left out: {', '.join(others)}; else %(default)s)"
    parser.completions.append(_complete_flags)


def add_method_choice(parser: Parser, group: argparse._ArgumentGroup) -> None:
    """Add `--method` and `--method_file`."""
    group.add_argument(
        "--method",
        type=one_of("method", METHODS),
        default="DC",
        help="; ".join(f"{entry.name}: {entry.help}" for entry in METHODS.values()),
    )
    group.add_argument(
        "--method_file",
        default=None,
        help="a Python file that registers a further method (docs/methods.md); its code is run, so use only your own",
    )
    parser.preparations.append(_load_method_file)


def _add_flag(group: argparse._ArgumentGroup, flag: Flag, names: Sequence[str]) -> None:
    group.add_argument(f"--{flag.name}", type=flag.type, default=flag.default, help=f"{', '.join(names)}: {flag.help}")


def _load_method_file(parser: Parser, words: list[str]) -> None:
    """Run the file of `--method_file`, which registers a method, and add that method's flags to the parser.

    Raises:
        UserError: when the file is missing, fails, or registers nothing.
    """
    own = "--method_file"
    named = [word.removeprefix(f"{own}=") for word in words if word.startswith(f"{own}=")]
    named += [words[i + 1] for i, word in enumerate(words[:-1]) if word == own]
    if not named:
        return
    with blame("--method_file"):
        path = check_file(Path(named[-1]))
    before = dict(METHODS)
    spec = spec_from_file_location("method_file", path, loader=SourceFileLoader("method_file", str(path)))
    try:
        spec.loader.exec_module(module_from_spec(spec))
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"--method_file: {path} fails: {reason}. Repair it") from None
    new = [entry for name, entry in METHODS.items() if before.get(name) is not entry]
    if not new:
        raise UserError(f"--method_file: {path} registers no method; it must call utils.methods.register")
    known = {action.dest for action in parser._actions}
    of_methods = {flag for entry in before.values() for flag in entry.flags}
    for entry in new:
        for flag in entry.flags if "Iteration" in known else ():  # only stage 1 has flags of methods
            if flag.name in known and flag not in of_methods:
                raise UserError(
                    f"--method_file: {path} defines --{flag.name}, which is another flag already; give it another name"
                )
            if flag.name not in known:
                _add_flag(parser.add_argument_group(entry.name), flag, [entry.name])
                known.add(flag.name)
                of_methods.add(flag)


def _complete_flags(
    parser: Parser, args: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """Set the method's defaults; refuse given flags that it does not use, and set the others to None."""
    entry = METHODS[args.method]
    used = {flag.name for flag in entry.flags}
    users: dict[str, list[str]] = {name: [] for name in entry.unused}
    for other in METHODS.values():
        for flag in other.flags:
            if flag.name not in used:
                users.setdefault(flag.name, []).append(other.name)
        for name in entry.unused:
            if name not in other.unused:
                users[name].append(other.name)
    for name, names in users.items():
        if given.get(name) is not None:
            do = "does" if len(names) == 1 else "do"
            parser.error(f"--{name}: --method {entry.name} does not use it; {', '.join(names)} {do}. Leave it out")
        if hasattr(args, name):
            setattr(args, name, None)
    for name, value in entry.defaults.items():
        if name not in given and hasattr(args, name):
            setattr(args, name, value)
    return args, given


def augmentation_of(method: str, dsa_strategy: str | None) -> DSA | None:
    """The Siamese augmentation that a method uses with this `--dsa_strategy`, or None.

    Raises:
        UserError: when the method requires a strategy and there is none.
    """
    use = METHODS[method].augmentation
    if use == "required" and dsa_strategy is None:
        raise UserError(f"--method {method} needs --dsa_strategy, e.g. color_crop_cutout_flip_scale_rotate")
    return None if use == "unused" or dsa_strategy is None else DSA(parse_strategy(dsa_strategy))


for _module in METHOD_MODULES:
    import_module(_module)
