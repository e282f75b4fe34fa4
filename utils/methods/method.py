"""What a distillation method is: its interface to the stages, its entry in the registry, and its flags.

A method is a class with the members of `Method`, and a `MethodEntry` that says how it is built and which flags it has.
The stages use nothing else. The registry is in `utils/methods/__init__.py`; here it is an argument, `methods`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from utils.compute.compiling import Workload
from utils.compute.device import Compute
from utils.core.errors import UserError, blame, one_line
from utils.core.files import check_file
from utils.data.augment import DSA
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.outliers.sources import OutlierSource
from utils.outliers.start import OutlierRecipe
from utils.settings.parser import Parser, count, number, one_of
from utils.training.network_pool import PoolSettings
from utils.training.trainer import LR_NET


class Method(Protocol):
    """One distillation: the synthetic images of an experiment, and their updates."""

    labels: torch.Tensor  # int64 [num_classes·ipc], sorted
    outliers: OutlierSource | None
    initial: Sequence[SyntheticSet]  # distilled sets to start the experiments from, instead of real images or noise
    notices: Sequence[str]  # lines for the log of the run
    about: Mapping[str, object]  # plain values that describe the run
    fingerprints: Mapping[str, str]  # hashes of other inputs, by flag, which must be the same in a resumed run

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
    """What a method is built from."""

    real: RealData
    outliers: OutlierSource | None  # None for plain distillation
    flags: Mapping[str, Any]  # all flags of the script, by name
    augmentation: DSA | None = None  # that of `--dsa_strategy`, if the method uses it
    compute: Compute = field(default_factory=Compute)
    initial: Sequence[SyntheticSet] = ()  # see `Method`


@dataclass(frozen=True)
class Flag:
    """A flag of one or several methods, as `argparse` takes it; methods that share a flag define equal `Flag`s."""

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str


@dataclass(frozen=True)
class MethodEntry:
    """A method in the registry."""

    name: str
    help: str  # what it is, in a few words
    build: Callable[[MethodInputs], Method]
    workload: Callable[[MethodInputs], Workload]  # of one iteration in this process; `--compile auto` decides from it
    flags: Sequence[Flag] = ()  # the method's own
    defaults: Mapping[str, Any] = field(default_factory=dict)  # its defaults for common flags, by name
    unused: Sequence[str] = ()  # the common flags that it does not use
    augmentation: Literal["required", "optional", "unused"] = "optional"  # its use of `--dsa_strategy`


Registry = dict[str, MethodEntry]  # by name of `--method`


def add_method_flags(parser: Parser, group: argparse._ArgumentGroup, methods: Registry) -> None:
    """Add the flags of all methods, each once, with the methods that use it; the help shows defaults that differ."""
    users: dict[Flag, list[str]] = {}
    for entry in methods.values():
        for flag in entry.flags:
            users.setdefault(flag, []).append(entry.name)
    for flag, names in users.items():
        _add_flag(group, flag, names)
    for action in parser._actions:
        others = [f"{e.name}: {e.defaults[action.dest]}" for e in methods.values() if action.dest in e.defaults]
        if others:
            action.help = f"{action.help} (left out: {', '.join(others)}; else %(default)s)"
    parser.completions.append(partial(_complete_flags, methods))


def add_method_choice(parser: Parser, group: argparse._ArgumentGroup, methods: Registry) -> None:
    """Add `--method` and `--method_file`."""
    group.add_argument(
        "--method",
        type=one_of("method", methods),
        default="DC",
        help="; ".join(f"{entry.name}: {entry.help}" for entry in methods.values()),
    )
    group.add_argument(
        "--method_file",
        default=None,
        help="a Python file that registers a further method (docs/methods.md); its code is run, so use only your own",
    )
    parser.preparations.append(partial(_load_method_file, methods))


def _add_flag(group: argparse._ArgumentGroup, flag: Flag, names: Sequence[str]) -> None:
    group.add_argument(f"--{flag.name}", type=flag.type, default=flag.default, help=f"{', '.join(names)}: {flag.help}")


def _load_method_file(methods: Registry, parser: Parser, words: list[str]) -> None:
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
    before = dict(methods)
    spec = spec_from_file_location("method_file", path, loader=SourceFileLoader("method_file", str(path)))
    try:
        spec.loader.exec_module(module_from_spec(spec))
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"--method_file: {path} fails: {reason}. Repair it") from None
    new = [entry for name, entry in methods.items() if before.get(name) is not entry]
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
    methods: Registry, parser: Parser, args: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """Set the method's defaults; refuse given flags that it does not use, and set the others to None."""
    entry = methods[args.method]
    used = {flag.name for flag in entry.flags}
    users: dict[str, list[str]] = {name: [] for name in entry.unused}
    for other in methods.values():
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


# --- flags and settings that several methods share ------------------------------------------------------------------

POOL_FLAGS = (
    Flag(
        "network_pool",
        count(0),
        0,
        "match on so many networks in turn, which train on the synthetic set; 0: on a fresh random network in every "
        "iteration, as published",
    ),
    Flag("pool_epochs", count(1), None, "epochs that a network of the pool trains before its turn; left out: 20"),
    Flag("pool_last_epoch", count(1), None, "epochs after which a network of the pool is replaced; left out: 200"),
)


SPREAD = Flag(
    "spread_oe",
    number(0),
    0.0,
    "weight of a term that keeps outliers apart in the features of the network; 0: without, as published",
)


def refuse_without_outliers(inputs: MethodInputs, **unused: Any) -> None:
    """Raise `UserError` for a flag of outliers, by name, that differs from the value it has as published."""
    for name, published in unused.items():
        if inputs.outliers is None and inputs.flags[name] not in (None, published):
            raise UserError(
                f"--{name} {inputs.flags[name]}: main.py distils no outliers; leave it out, or use main_oe.py or "
                "main_poe.py"
            )


def pool_settings(inputs: MethodInputs) -> PoolSettings | None:
    """The pool of the flags, or None; raises `UserError` for flags of a pool that there is not."""
    f = inputs.flags
    given = {"epochs": f["pool_epochs"], "last_epoch": f["pool_last_epoch"]}
    given = {name: value for name, value in given.items() if value is not None}
    if f["network_pool"]:
        return PoolSettings(f["network_pool"], **given)
    if given:
        raise UserError(f"--pool_{next(iter(given))}: --network_pool 0 has no networks to train; give their number")
    return None


@dataclass(frozen=True)
class MatchSettings:
    """The settings of gradient and distribution matching; each is described at the flag of its name."""

    model: str
    ipc: int
    seed: int = 1
    lr_img: float = 0.1
    lr_img_oe: float | None = None
    lr_net: float = 0.01
    batch_real: int = 256
    batch_oe: int = 256
    batch_train: int = 256
    lambda_oe: float = 0.5
    metric: str = "ours"
    init: str = "noise"
    outer_loop: int = 1
    inner_loop: int = 1
    dsa: DSA | None = None
    pool: PoolSettings | None = None
    recipe: OutlierRecipe = field(default_factory=OutlierRecipe)
    spread_oe: float = 0.0


def match_settings(inputs: MethodInputs, **more: Any) -> MatchSettings:
    """The settings from the flags that gradient and distribution matching share, and `more`."""
    f = inputs.flags
    refuse_without_outliers(inputs, spread_oe=0)
    same = ("model", "ipc", "seed", "lr_img", "batch_real", "batch_train", "init", "spread_oe")
    return MatchSettings(
        **{name: f[name] for name in same},
        lr_img_oe=f.get("lr_img_oe"),
        lr_net=f["lr_net"] or LR_NET,
        batch_oe=f.get("batch_oe", 0),
        lambda_oe=f.get("lambda_oe", 0.0),
        dsa=inputs.augmentation,
        pool=pool_settings(inputs),
        recipe=OutlierRecipe.of(f, inputs.augmentation),
        **more,
    )
