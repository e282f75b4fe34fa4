"""The settings of each script: the groups of flags that it has, and what differs from their defaults."""

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, Self

from utils.core.errors import UserError, blame, one_line
from utils.core.files import check_file
from utils.exchange.assumptions import Assumptions
from utils.methods import METHODS
from utils.methods.method import MethodEntry
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS
from utils.runs.resume import Checkpoints
from utils.settings.common import (
    Corrupted,
    Data,
    Images,
    Network,
    OutlierTraining,
    Parts,
    Pool,
    Reads,
    Speed,
    Training,
    TrainsNetworks,
    Writes,
)
from utils.settings.distillation import Distilling
from utils.settings.fields import Need, Settings, as_words, flag, flags_of, with_default, with_shown_default
from utils.settings.ood_test import OODSets, Scores, Test
from utils.settings.parser import one_of
from utils.settings.reading import SettingsParser
from utils.settings.training_set import (
    MADE,
    OF_DISTILLED,
    OUTLIERS,
    READS_A_RUN,
    READS_A_SET,
    Experiment,
    TrainingOutliers,
    TrainsOn,
    used_by,
)

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {"strong": ("MTT", {"expert_lambda_oe": 2.0})}  # method and flags


@dataclass(frozen=True)
class MethodChoice(Settings):
    """Method."""

    method: str = flag(
        "DC",
        "; ".join(f"{entry.name}: {entry.help}" for entry in METHODS.values()),
        one_of("method", METHODS),
        often=True,
        always=True,
    )
    method_file: str | None = flag(
        None,
        "a Python file that registers a further method (docs/methods.md); its code is run, so use only your own",
        may_change=True,
    )


def _most_derived(classes: Iterable[type]) -> list[type]:
    """The classes, each once, that no other of them is derived from."""
    found = list(dict.fromkeys(classes))
    return [cls for cls in found if not any(other is not cls and issubclass(other, cls) for other in found)]


@dataclass(frozen=True)
class Stage1Settings(MethodChoice, *_most_derived(entry.settings for entry in METHODS.values())):
    """Settings of `main.py`: those of all methods."""

    def defaults(self) -> dict[str, Any]:
        """The defaults of the method."""
        return super().defaults() | METHODS[self.method].defaults

    def completed(self, given: Mapping[str, Any]) -> Self:
        """The defaults of the method and of the recipe, where no flag was given."""
        _check_used(METHODS[self.method], given)
        method, of_recipe = RECIPES.get(self.outlier_recipe, (self.method, {}))
        if self.method != method:
            raise UserError(
                f"--outlier_recipe {self.outlier_recipe}: --method {self.method} has no such; --method {method} has"
            )
        known = {f.name for f in fields(self)}
        entry = METHODS[self.method]
        usual = {**entry.defaults, **of_recipe, **entry.derived(self)}
        return replace(self, **{n: value for n, value in usual.items() if n in known and n not in given})

    def used(self) -> set[str]:
        """The names of the flags that the method uses."""
        users = {f.name: _users(f.name) for f in flags_of(type(self))}
        return {name for name, of_flag in users.items() if not of_flag or self.method in of_flag}


@dataclass(frozen=True)
class Stage1SettingsOE(Stage1Settings):
    """Settings of `main_oe.py`."""

    outliers: str = "oe"
    save_path: str = with_default(Writes, "save_path", "result-oe")


@dataclass(frozen=True)
class Stage1SettingsPOE(Stage1Settings):
    """Settings of `main_poe.py`."""

    outliers: str = "poe"
    save_path: str = with_default(Writes, "save_path", "result-poe")


@dataclass(frozen=True)
class Stage2Settings(
    MethodChoice,
    TrainsNetworks,
    Reads,
    Writes,
    Experiment,
    TrainsOn,
    Assumptions,
    OutlierTraining,
    TrainingOutliers,
    Pool,
    Corrupted,
    Checkpoints,
):
    """Settings of `train_model_synthetic_oe.py`."""

    NEEDS: ClassVar = {
        Reads: (READS_A_SET, READS_A_RUN),
        Assumptions: (OF_DISTILLED,),
        "exp_idx": (  # it is part of random's seed
            Need(lambda s: s.train_on in ("distilled", "random") or not s.exp_idx, READS_A_SET.why),
        ),
        Parts: (
            Need(
                lambda s: s.train_on in ("random", "herding", "kcenter"),
                "only --train_on random, herding and kcenter shrink images; a distilled set says itself how many parts "
                "its images hold",
            ),
        ),
        OutlierTraining: (used_by(*(kind for kind in OUTLIERS if kind != "none")),),
        "oe_data_path": (used_by("initial", "kcenter", "real"),),
        "num_oe_per_class": (
            Need(lambda s: bool(s.oe_data_path), "it cuts the pool of --oe_data_path, which is not given"),
        ),
        Corrupted: (
            used_by(*MADE, again=True),
            Need(
                lambda s: not s.oe_data_path or s.corrupt_again,
                "it is for outliers made of training images, not of --oe_data_path; give one of them",
            ),
        ),
    }

    num_eval: int = with_default(Training, "num_eval", 5)
    factor: int = with_default(Parts, "factor", 1, often=False)
    save_path: str = with_default(Writes, "save_path", "result-model-synthetic-oe")
    oe_data_path: str | None = with_default(Pool, "oe_data_path", None, often=False)
    corruptions: tuple[str, ...] = with_default(Corrupted, "corruptions", DEFAULT_CORRUPTIONS, often=False)

    def completed(self, given: Mapping[str, Any]) -> Self:
        """The settings that follow from the kind of the training set.

        With a set by its path, `--ipc` left out becomes that of the set, and `--method` what names the folder and
        augments.
        """
        self.check_assumptions()
        self._check_outliers(given)
        ipc = None if self.distilled and "ipc" not in given else self.ipc
        method = self.method
        if "method" not in given and (self.distilled or self.train_on != "distilled"):
            method = "DSA" if self.dsa_strategy else "DC"
        return replace(self, ipc=ipc, method=method)

    def _check_outliers(self, given: Mapping[str, Any]) -> None:
        """Refuse outliers that the training set does not have."""
        kind = self.outliers
        if self.train_on != "distilled" and kind == "distilled":
            others = " ".join(name for name in OUTLIERS if name != kind)
            raise UserError(f"--outliers distilled: --train_on {self.train_on} has none; choose one of {others}")
        if self.train_on == "whole" and kind in ("initial", "kcenter") and "ipc" not in given:
            raise UserError(f"--outliers {kind}: give --ipc, the number of outliers for each class slot")


WITHOUT_OUTLIERS = (
    Need(
        lambda s: s.outliers != "none",
        "train_model_synthetic_no_oe.py trains without outliers; leave it out, or use train_model_synthetic_oe.py",
        of_script=True,
    ),
)


@dataclass(frozen=True)
class Stage2SettingsNoOE(Stage2Settings):
    """Settings of `train_model_synthetic_no_oe.py`."""

    NEEDS: ClassVar = dict.fromkeys((OutlierTraining, TrainingOutliers, Pool, Corrupted), WITHOUT_OUTLIERS)

    outliers: str = "none"
    save_path: str = with_default(Writes, "save_path", "result-model-synthetic-no-oe")


@dataclass(frozen=True)
class Stage3Settings(MethodChoice, Data, Network, Images, Speed, Reads, Writes, Test, OODSets, Scores):
    """Settings of `test_ood_model_syn.py`."""

    precision: str = with_default(Speed, "precision", "fp32")
    save_path: str = with_default(Writes, "save_path", "result-test-ood-synthetic")


def script_parser(settings: type[Settings], doc: str, description: str) -> SettingsParser:
    """The parser of a script, with the flags of methods; `doc`: of the script, whose second paragraph is an example."""
    prepare = _load_method_file if issubclass(settings, MethodChoice) else None
    parser = SettingsParser(settings, doc.split("\n\n")[1], prepare, description=description)
    _tell_methods(parser)
    return parser


def _used(entry: MethodEntry) -> set[str]:
    """The names of the flags of methods that a method uses."""
    return {f.name for f in flags_of(entry.settings)} - set(entry.unused)


def _users(name: str) -> list[str]:
    """The methods that use a flag; empty for a flag that all use, or none."""
    users = [entry.name for entry in METHODS.values() if name in _used(entry)]
    return [] if len(users) == len(METHODS) else users


def _check_used(entry: MethodEntry, given: Mapping[str, Any]) -> None:
    """Refuse given flags of other methods."""
    own = _used(entry)
    for name in given:
        if name not in own and (users := _users(name)):
            do = "does" if len(users) == 1 else "do"
            raise UserError(f"--{name}: --method {entry.name} does not use it; {', '.join(users)} {do}. Leave it out")


def _tell_methods(parser: SettingsParser) -> None:
    """Name in the help of each flag the methods that use it, and the defaults that differ by method."""
    if not issubclass(parser.settings, Distilling):
        return
    common = {f.name for f in flags_of(Distilling)}
    usual = {f.name: f for f in flags_of(parser.settings)}
    for action in parser._actions:
        name, default = action.dest, usual[action.dest].default if action.dest in usual else None
        if (users := _users(name)) and name not in common | parser.hidden:
            action.help = f"{', '.join(users)}: {action.help}"
        others = [f"{entry.name}: {entry.defaults[name]}" for entry in METHODS.values() if name in entry.defaults]
        if others:
            parser.defaults_of_methods.add(name)
        if others and name not in parser.hidden:
            plain = action.help.removesuffix(with_shown_default("", default))
            action.help = f"{plain} (left out: {', '.join(others)}; else {default})"


def _load_method_file(parser: SettingsParser, arguments: list[str]) -> None:
    """Run the file of `--method_file`, which registers a method, and add that method's flags to the parser.

    Raises:
        UserError: when the file is missing, fails, or registers nothing.
    """
    named = [word.removeprefix("--method_file=") for word in arguments if word.startswith("--method_file=")]
    named += [arguments[i + 1] for i, word in enumerate(arguments[:-1]) if word == "--method_file"]
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
    for entry in new if issubclass(parser.settings, Distilling) else ():  # only stage 1 has flags of methods
        own = [cls for cls in entry.settings.__mro__ if cls not in parser.settings.__mro__]
        declared = {name for cls in own for name in vars(cls).get("__annotations__", ())}
        if taken := declared & {f.name for f in flags_of(parser.settings)}:
            raise UserError(
                f"--method_file: {path} defines --{min(taken)}, which is another flag already; give it another name"
            )
        parser.extend(entry.settings)


def carried(source: Settings, target: type[Settings], *groups: type[Settings], **more: Any) -> Settings:
    """Settings of the next stage: what names the run, and what of the data, the network and `groups` was changed."""
    usual = source.defaults()
    known = {f.name for f in flags_of(target)} - {"download"}
    names = {f.name for group in (Data, Network, *groups) for f in flags_of(group)} & known | {"compile"}
    kept = {name: getattr(source, name) for name in names if getattr(source, name) != usual[name]}
    named = {name: getattr(source, name) for name in ("method", "method_file", "dataset", "model", "ipc")}
    return target(**named | kept | more)


def command_of(script: str, settings: Settings) -> str:
    """The shell command of a script, with the interpreter and the folder of this script as they were called."""
    return shlex.join([sys.orig_argv[0], str(Path(sys.argv[0]).with_name(script)), *as_words(settings)])
