"""The settings of each script: the groups of flags that it has, and what differs from their defaults."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, replace
from typing import Any, ClassVar, Self

from utils.core.errors import UserError
from utils.exchange.assumptions import Assumptions
from utils.methods import METHODS
from utils.outliers.corruptions import DEFAULT_CORRUPTIONS
from utils.runs.resume import Checkpoints
from utils.settings import common
from utils.settings.fields import Need, Settings, flag, main_flag, only, with_default
from utils.settings.method_choice import MethodChoice, load_method_file, users_of_flags
from utils.settings.parser import count, with_shown_default
from utils.settings.reading import SettingsParser

KINDS = dict.fromkeys(entry.settings for entry in METHODS.values())


@dataclass(frozen=True)
class Stage1Settings(MethodChoice, *(kind for kind in KINDS if not kind.__subclasses__())):
    """Settings of `main.py`: those of all methods."""

    @classmethod
    def needs(cls) -> dict[str, list[Need]]:
        """What a flag needs; first of all, that the method uses it."""
        of_methods = {name: [only("method", *users)] for name, users in users_of_flags().items()}
        return {name: of_methods.get(name, []) + needs for name, needs in super().needs().items()}

    @classmethod
    def help_of(cls, f: Field) -> str:
        """The methods that use the flag come first, the defaults that differ by method last."""
        users = users_of_flags().get(f.name, METHODS)
        text = f.metadata["help"] if len(users) == len(METHODS) else f"{', '.join(users)}: {f.metadata['help']}"
        others = [f"{entry.name}: {entry.defaults[f.name]}" for entry in METHODS.values() if f.name in entry.defaults]
        if not others:
            return with_shown_default(text, f.default)
        return f"{text} (left out: {', '.join(others)}; else {f.default})"

    def defaults(self) -> dict[str, Any]:
        """The defaults of the method, and what follows from its flags."""
        entry = METHODS[self.method]
        return super().defaults() | entry.defaults | entry.derived(self)

    def completed(self, given: Mapping[str, Any]) -> Self:
        """The defaults of the method, where no flag was given, and it would have an effect."""
        entry, needs = METHODS[self.method], self.needs()
        usual = {**entry.defaults, **entry.derived(self)}
        follow = [name for name in usual if name not in given and all(n.holds(self) for n in needs.get(name, ()))]
        return replace(self, **{name: usual[name] for name in follow})


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


OUTLIERS = ("distilled", "initial", "kcenter", "corrupt", "real", "none")


@dataclass(frozen=True)
class Experiment(Settings):
    """Experiment."""

    exp_idx: int = flag(0, "which experiment of a res_….pt: it may hold several distilled sets", count(0))


@dataclass(frozen=True)
class TrainingOutliers(Settings):
    """Outliers. Distilled ones, or one of their references."""

    outliers: str = main_flag(
        "distilled",
        "distilled; initial (start): those that a distillation starts from; kcenter: the same number, chosen far apart "
        "from 10000 candidates; corrupt (on the fly): the distilled images, corrupted in every epoch; real: real "
        "outliers, others in every epoch, an upper bound; none",
        names=OUTLIERS,
    )
    distilled_oe: tuple[str, ...] | None = flag(
        None,
        "outliers of --distilled where they are in files of their own",
        action="extend",
        metavar="PATH",
        needs=(only("distilled"), only("outliers", "distilled")),
    )
    corrupt_again: bool = flag(
        False,
        "corrupt the outliers of --outliers distilled, initial or kcenter once more in every epoch",
        needs=only("outliers", "distilled", "initial", "kcenter"),
    )


@dataclass(frozen=True)
class Stage2Settings(
    MethodChoice,
    common.TrainsNetworks,
    common.Reads,
    common.Writes,
    Experiment,
    Assumptions,
    common.OutlierTraining,
    TrainingOutliers,
    common.Pool,
    common.Corrupted,
    Checkpoints,
):
    """Training set. The settings of `train_model_synthetic_oe.py`."""

    NEEDS: ClassVar = {
        common.Reads: (
            only("train_on", "distilled"),
            Need(lambda s: not s.distilled, "--distilled takes its place; give one of them"),
        ),
        Assumptions: only("distilled"),
        "exp_idx": Need(  # it is part of random's seed
            lambda s: s.train_on in ("distilled", "random") or not s.exp_idx,
            only("train_on", "distilled", "random").why,
        ),
        "factor": Need(
            lambda s: s.train_on in ("random", "herding", "kcenter"),
            "only --train_on random, herding and kcenter shrink images; a distilled set says itself how many parts its "
            "images hold",
        ),
        common.OutlierTraining: only("outliers", *(kind for kind in OUTLIERS if kind != "none")),
        "oe_data_path": only("outliers", "initial", "kcenter", "real"),
        "num_oe_per_class": only("oe_data_path"),
        common.Corrupted: Need(
            lambda s: s.corrupt_again or (s.outliers not in ("distilled", "none") and not s.oe_data_path),
            "it is for --corrupt_again, and for outliers that stage 2 makes of training images, not of --oe_data_path",
        ),
    }

    train_on: str = main_flag(
        "distilled",
        "distilled images, or a baseline: --ipc random, herding or k-center real images per class, or the whole "
        "training set",
        names=("distilled", "random", "herding", "kcenter", "whole"),
    )
    features: str | None = flag(
        None,
        "network MODEL.pt in whose features herding and kcenter choose, or a folder: one is trained on the whole set "
        "and kept there; left out: features below --save_path",
        metavar="PATH",
        needs=only("train_on", "herding", "kcenter"),
    )
    distilled: tuple[str, ...] | None = flag(
        None,
        "a distilled set of any repository, instead of --folder and --load_path: a file, or a folder; images and "
        "labels may be two files (docs/evaluate.md lists the formats)",
        action="extend",
        metavar="PATH",
        needs=only("train_on", "distilled"),
    )
    num_eval: int = with_default(common.Training, "num_eval", 5)
    factor: int = with_default(common.Images, "factor", 1, often=False)
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
            others = " ".join(name for name in OUTLIERS if name != kind)
            raise UserError(f"--outliers distilled: --train_on {self.train_on} has none; choose one of {others}")
        if self.train_on == "whole" and kind in ("initial", "kcenter") and "ipc" not in given:
            raise UserError(f"--outliers {kind}: give --ipc, the number of outliers for each class slot")


@dataclass(frozen=True)
class Stage2SettingsNoOE(Stage2Settings):
    """Settings of `train_model_synthetic_no_oe.py`."""

    NEEDS: ClassVar = Stage2Settings.NEEDS | dict.fromkeys(
        (common.OutlierTraining, TrainingOutliers, common.Pool, common.Corrupted),
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
    common.OODSets,
    common.Scores,
):
    """Test. The settings of `test_ood_model_syn.py`."""

    batch_test: int = flag(256, "images per forward pass; lower it when memory is short")
    num_exp: int = main_flag(5, "how many of the trained networks to test")
    is_load_best: bool = main_flag(False, "test the best checkpoints instead of those of --epoch_train")
    epoch_train: int | None = flag(
        None,
        "which epoch's checkpoints to test; left out: the last that the networks have",
        needs=Need(lambda s: not s.is_load_best, "--is_load_best tests the best checkpoints; give one of them"),
    )
    precision: str = with_default(common.Speed, "precision", "fp32")
    save_path: str = with_default(common.Writes, "save_path", "result-test-ood-synthetic")
    factor: int = 1  # no flags of stage 3
    deterministic: bool = False


def script_parser(settings: type[Settings], doc: str, description: str) -> SettingsParser:
    """The parser of a script, with the flags of methods; `doc`: of the script, whose second paragraph is an example."""
    example = doc.split("\n\n")[1]
    return SettingsParser(settings, load_method_file, description=f"{description}\n\n{example}")
