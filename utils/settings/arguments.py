"""The settings of each script: the groups of flags that it has, and what differs from their defaults."""

import runpy
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from utils.core.errors import UserError, blame, one_line
from utils.core.files import check_file
from utils.exchange.assumptions import Assumptions
from utils.methods import METHODS
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS
from utils.runs.resume import Checkpoints
from utils.settings import common, training_set
from utils.settings.distillation import Distilling
from utils.settings.fields import OF_RUN, Need, Settings, as_words, flag, flags_of, main_flag, with_default
from utils.settings.ood_test import OODSets, Scores, Test
from utils.settings.parser import one_of, value_in, with_shown_default
from utils.settings.reading import SettingsParser


@dataclass(frozen=True)
class MethodChoice(Settings):
    """Method."""

    method: str = main_flag(
        "DC", "; ".join(f"{entry.name}: {entry.help}" for entry in METHODS.values()), one_of("method", METHODS)
    )
    method_file: str | None = flag(
        None,
        "a Python file that registers a further method (docs/methods.md); its code is run, so use only your own",
        may_change=True,
    )


KINDS = dict.fromkeys(entry.settings for entry in METHODS.values())


@dataclass(frozen=True)
class Stage1Settings(MethodChoice, *(kind for kind in KINDS if not kind.__subclasses__())):
    """Settings of `main.py`: those of all methods."""

    @classmethod
    def needs(cls) -> dict[str, list[Need]]:
        """What a flag needs; first of all, that the method uses it."""
        users = _users()
        return {n: [*([_need_of(users[n])] if n in users else []), *needs] for n, needs in super().needs().items()}

    @classmethod
    def help_of(cls, f: Field) -> str:
        """The methods that use the flag come first, the defaults that differ by method last."""
        users = [] if f.name in Distilling.__dataclass_fields__ else _users().get(f.name, [])
        text = f"{', '.join(users)}: {f.metadata['help']}" if users else f.metadata["help"]
        others = [f"{entry.name}: {entry.defaults[f.name]}" for entry in METHODS.values() if f.name in entry.defaults]
        if not others:
            return with_shown_default(text, f.default)
        return f"{text} (left out: {', '.join(others)}; else {f.default})"

    @classmethod
    def with_several_defaults(cls) -> set[str]:
        """The flags whose default depends on the method."""
        return {name for entry in METHODS.values() for name in entry.defaults}

    def defaults(self) -> dict[str, Any]:
        """The defaults of the method."""
        return super().defaults() | METHODS[self.method].defaults

    def completed(self, given: Mapping[str, Any]) -> Self:
        """The defaults of the method, where no flag was given."""
        entry = METHODS[self.method]
        usual = {**entry.defaults, **entry.derived(self)}
        return replace(self, **{name: value for name, value in usual.items() if name not in given})

    def used(self) -> set[str]:
        """The names of the flags that the method uses."""
        users = _users()
        return {f.name for f in flags_of(type(self)) if self.method in users.get(f.name, METHODS)}


@dataclass(frozen=True)
class Stage1SettingsOE(Stage1Settings):
    """Settings of `main_oe.py`."""

    outliers: str = "oe"
    save_path: str = with_default(common.Writes, "save_path", "result-oe")


@dataclass(frozen=True)
class Stage1SettingsPOE(Stage1Settings):
    """Settings of `main_poe.py`."""

    outliers: str = "poe"
    save_path: str = with_default(common.Writes, "save_path", "result-poe")


@dataclass(frozen=True)
class Stage2Settings(
    MethodChoice,
    common.TrainsNetworks,
    common.Reads,
    common.Writes,
    training_set.Experiment,
    training_set.TrainsOn,
    Assumptions,
    common.OutlierTraining,
    training_set.TrainingOutliers,
    common.Pool,
    common.Corrupted,
    Checkpoints,
):
    """Settings of `train_model_synthetic_oe.py`."""

    NEEDS: ClassVar = {
        common.Reads: (training_set.READS_A_SET, training_set.READS_A_RUN),
        Assumptions: training_set.OF_DISTILLED,
        "exp_idx": Need(  # it is part of random's seed
            lambda s: s.train_on in ("distilled", "random") or not s.exp_idx, training_set.READS_A_SET.why
        ),
        common.Parts: Need(
            lambda s: s.train_on in ("random", "herding", "kcenter"),
            "only --train_on random, herding and kcenter shrink images; a distilled set says itself how many parts its "
            "images hold",
        ),
        common.OutlierTraining: training_set.used_by(*(kind for kind in training_set.OUTLIERS if kind != "none")),
        "oe_data_path": training_set.used_by("initial", "kcenter", "real"),
        "num_oe_per_class": Need(lambda s: s.oe_data_path, "it cuts the pool of --oe_data_path, which is not given"),
        common.Corrupted: (
            training_set.used_by(*training_set.MADE, again=True),
            Need(
                lambda s: not s.oe_data_path or s.corrupt_again,
                "it is for outliers made of training images, not of --oe_data_path; give one of them",
            ),
        ),
    }

    num_eval: int = with_default(common.Training, "num_eval", 5)
    factor: int = with_default(common.Parts, "factor", 1, often=False)
    save_path: str = with_default(common.Writes, "save_path", "result-model-synthetic-oe")
    oe_data_path: str | None = with_default(common.Pool, "oe_data_path", None, often=False)
    corruptions: tuple[str, ...] = with_default(common.Corrupted, "corruptions", DEFAULT_CORRUPTIONS, often=False)

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
            others = " ".join(name for name in training_set.OUTLIERS if name != kind)
            raise UserError(f"--outliers distilled: --train_on {self.train_on} has none; choose one of {others}")
        if self.train_on == "whole" and kind in ("initial", "kcenter") and "ipc" not in given:
            raise UserError(f"--outliers {kind}: give --ipc, the number of outliers for each class slot")


@dataclass(frozen=True)
class Stage2SettingsNoOE(Stage2Settings):
    """Settings of `train_model_synthetic_no_oe.py`."""

    NEEDS: ClassVar = Stage2Settings.NEEDS | dict.fromkeys(
        (common.OutlierTraining, training_set.TrainingOutliers, common.Pool, common.Corrupted),
        Need(
            lambda s: False,
            "train_model_synthetic_no_oe.py trains without outliers; leave it out, or use train_model_synthetic_oe.py",
            of_script=True,
        ),
    )

    outliers: str = "none"
    save_path: str = with_default(common.Writes, "save_path", "result-model-synthetic-no-oe")


@dataclass(frozen=True)
class Stage3Settings(
    MethodChoice,
    common.Data,
    common.Network,
    common.Images,
    common.Speed,
    common.Reads,
    common.Writes,
    Test,
    OODSets,
    Scores,
):
    """Settings of `test_ood_model_syn.py`."""

    precision: str = with_default(common.Speed, "precision", "fp32")
    save_path: str = with_default(common.Writes, "save_path", "result-test-ood-synthetic")


def script_parser(settings: type[Settings], doc: str, description: str) -> SettingsParser:
    """The parser of a script, with the flags of methods; `doc`: of the script, whose second paragraph is an example."""
    example = doc.split("\n\n")[1]
    return SettingsParser(settings, _load_method_file, description=f"{description}\n\n{example}")


def _users() -> dict[str, list[str]]:
    """By the name of a flag, the methods that use it; those of no method are left out."""
    users: dict[str, list[str]] = {}
    for entry in METHODS.values():
        for f in flags_of(entry.settings):
            if f.name not in entry.unused:
                users.setdefault(f.name, []).append(entry.name)
    return users


def _need_of(methods: Sequence[str]) -> Need:
    """The need of a flag that these methods use."""
    users = f"{', '.join(methods)} {'does' if len(methods) == 1 else 'do'}"
    return Need(lambda s: s.method in methods, f"--method {{method}} does not use it; {users}. Leave it out")


def _load_method_file(parser: SettingsParser, words: list[str]) -> None:
    """Run the file of `--method_file`, which registers a method, and add that method's flags to the parser.

    Raises:
        UserError: when the file is missing, fails, or registers nothing.
    """
    name = value_in(words, "method_file")
    if name is None:
        return
    with blame("--method_file"):
        path = check_file(Path(name))
    before = dict(METHODS)
    try:
        runpy.run_path(str(path), run_name="method_file")
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
    names = {f.name for group in (common.Data, common.Network, *groups) for f in flags_of(group)} & known | {"compile"}
    kept = {name: getattr(source, name) for name in names if getattr(source, name) != usual[name]}
    named = {name: getattr(source, name) for name in (*OF_RUN, "method_file")}
    return target(**named | kept | more)


def command_of(script: str, settings: Settings) -> str:
    """The shell command of a script, with the interpreter and the folder of this script as they were called."""
    return shlex.join([sys.orig_argv[0], str(Path(sys.argv[0]).with_name(script)), *as_words(settings)])
