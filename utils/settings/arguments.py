"""The flags of each script: which groups of settings it has, and what differs from their defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.methods import METHODS
from utils.methods.method import add_method_choice, add_method_flags
from utils.ood.scores import ALL_SCORES, DETECTORS, SCORES
from utils.settings.common import Data, Folders, Images, Network, Speed, Training, strategy
from utils.settings.fields import Need, add_group, flag
from utils.settings.outliers import Corrupted, DistilledOutliers, OutlierBatches, OutlierTraining, Pool, follow_recipe
from utils.settings.parser import Parser, add_config, count, number, one_of
from utils.settings.training_set import (
    OF_DISTILLED,
    OUTLIERS,
    READS_A_SET,
    Foreign,
    TrainingOutliers,
    TrainingSet,
    complete_outliers,
    complete_training_set,
    used_by,
)

OOD_PATH = "data/ood"
EVAL_MODES = ("S", "SS", "M", "B", "W", "D", "A", "P", "N")
INITS = ("noise", "real")
EXPERT_OUTLIERS = ("none", "oe", "poe")
FITS = ("distilled", "real")


@dataclass(frozen=True)
class Distillation:
    """Distillation."""

    eval_mode: str = flag(
        "S",
        "which networks evaluate: S the same without BatchNorm, SS exactly the same, M several architectures, B "
        "BatchNorm ones, W widths, D depths, A activations, P poolings, N norms",
        one_of("evaluation mode", EVAL_MODES),
        names=EVAL_MODES,
    )
    num_exp: int = flag(5, "independent distillations", count(1), often=True)
    Iteration: int = flag(1000, "updates of the synthetic images", count(0), often=True)
    eval_interval: int = flag(500, "updates between two evaluations; the last update is always evaluated", count(1))
    lr_img: float = flag(0.1, "learning rate of the synthetic images", number(0, exclusive=True))
    batch_real: int = flag(256, "real images per class and step; lower it when memory is short", count(1))
    init: str = flag(
        "noise",
        "noise or real images; real converges faster",
        one_of("initialisation", INITS),
        names=INITS,
        often=True,
    )
    eval_ood: tuple[str, ...] | None = flag(
        None,
        "evaluations also report the AUROC (score msp) on these OOD sets: any of stage 3, e.g. patches gaussian",
        many=True,
        metavar="SET",
    )
    ood_path: str = flag(
        OOD_PATH,
        "folder of the sets of --eval_ood",
        need=Need(lambda args: args.eval_ood, "it is the folder of the sets of --eval_ood, which is not given"),
    )
    tensorboard: bool = flag(False, "also write TensorBoard events into the run folder (needs tensorboard)")
    save_path: str = flag("result", "run folders are made in this folder", often=True)
    load_path: str | None = flag(
        None, "a res_….pt whose images (and outliers) are the start, instead of --init; continues with other flags"
    )


@dataclass(frozen=True)
class Experts:
    """Experts."""

    num_experts: int = flag(
        100, "how many networks to train; the paper used 100, fewer work, too", count(1), often=True
    )
    train_epochs: int = flag(
        50, "epochs of each; at least --max_start_epoch + --expert_epochs - 1", count(1), often=True
    )
    lr_teacher: float = flag(0.01, "learning rate", number(0, exclusive=True), often=True)
    mom: float = flag(0.0, "momentum", number(0), often=True)
    l2: float = flag(0.0, "weight decay", number(0))
    decay: bool = flag(False, "multiply the learning rate by 0.1 after epoch train_epochs // 2 + 1")
    batch_train: int = flag(256, "images in a batch", count(1))
    dsa_strategy: str | None = flag(None, "augmentation; take that of the distillation", strategy, often=True)
    buffer_path: str = flag("buffers", "the trajectories are written below this folder", often=True)
    outliers: str = flag(
        "none",
        "train on outliers, too: oe for main_oe.py, poe for main_poe.py",
        one_of("kind of outliers", EXPERT_OUTLIERS),
        names=EXPERT_OUTLIERS,
        often=True,
    )


@dataclass(frozen=True)
class Test:
    """Test."""

    batch_test: int = flag(256, "images per forward pass; lower it when memory is short", count(1))
    num_exp: int = flag(5, "how many of the trained networks to test", count(1), often=True)
    is_load_best: bool = flag(False, "test the best checkpoints instead of those of --epoch_train", often=True)
    epoch_train: int | None = flag(
        None,
        "which epoch's checkpoints to test; left out: the last that the networks have; --is_load_best tests the best "
        "instead",
        count(1),
    )


@dataclass(frozen=True)
class OODSets:
    """OOD sets."""

    ood_path: str = flag(
        OOD_PATH,
        "folder of OOD sets: <name>/ (images), <name>.npz (key images) or <name>.npy; and of the images in a list",
        often=True,
    )
    ood_sets: tuple[str, ...] | None = flag(
        None,
        "which sets, in order; left out: those of the paper. Names (gaussian uniform rademacher blob patches need no "
        "files), or paths: a folder, .npz, .npy, or a list (.txt, `path label` a line, as OpenOOD's)",
        many=True,
        often=True,
    )
    skip_missing: bool = flag(False, "test without the sets that are missing; the table names them")
    num_ood_ratio: int = flag(
        1, "N: use a fraction 1/N of as many OOD images as there are test images; 10 for a quick look", count(1)
    )
    validate: bool = flag(False, "also test on validation outliers, for choosing hyperparameters", short="-v")


@dataclass(frozen=True)
class Scores:
    """Scores."""

    score: tuple[str, ...] | None = flag(
        None,
        f"msp when left out; one or more of {', '.join(SCORES)}; or, with the package pytorch-ood, of "
        f"{', '.join(DETECTORS)}. Scores of logits or features share one forward pass; odin, mahalanobis_odin and the "
        "grad ones need their own",
        one_of("score", ALL_SCORES),
        many=True,
        often=True,
    )
    fit_on: str | None = flag(
        None,
        "what detectors are fitted on: the distilled set of these networks, or the real training set; left out: the "
        "set that they were trained on. knn, mahalanobis and the like need more images than a small ipc has",
        one_of("fitting set", FITS),
        names=FITS,
    )
    T: float = flag(1.0, "temperature of --score energy", number(0, exclusive=True))
    use_xent: bool = flag(False, "adds xent to --score", short="-x")


def add_common(parser: Parser) -> None:
    """Flags of every stage: the method, the data, the network and the images per class."""
    add_method_choice(parser, parser.add_argument_group("method"), METHODS)
    for group in (Data, Network, Images):
        add_group(parser, group)
    parser.often.add("method")
    add_config(parser)


def passed_on(flags: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The flags that the next stage is given as they were.

    These are what names the run, and those of stage 1 and 2 that differ from their defaults in stage 1, out of `names`
    and of these that all stages have.
    """
    parser = Parser()
    add_common(parser)
    for group in (Training, Speed, OutlierTraining):
        add_group(parser, group)
    known = ("data_path", "im_size", "pixel_max", "zca", "seed", "device", "compile", *names)
    changed = {n: flags[n] for n in known if n in flags and flags[n] != parser.get_default(n)}
    return {n: flags[n] for n in ("method", "method_file", "dataset", "model", "ipc")} | changed


def add_stage1(parser: Parser, save_path: str, source: type | None = None) -> None:
    """All flags of a stage-1 script; `source`: the group of its source of outliers, if it distils them."""
    add_common(parser)
    add_group(parser, Training)
    add_group(parser, Speed)
    add_group(parser, Distillation, save_path=save_path)
    add_method_flags(parser, parser.add_argument_group("methods"), METHODS)
    if source is not None:
        for group in (OutlierBatches, DistilledOutliers, OutlierTraining, source):
            add_group(parser, group)
        parser.completions.append(follow_recipe)


def add_experts(parser: Parser) -> None:
    """All flags of `train_experts.py`; those of outliers that `--outliers` does not use are refused."""
    add_config(parser)
    for group in (Data, Network, Experts, Speed):
        add_group(parser, group)
    for group, kinds in ((OutlierBatches, ("oe", "poe")), (OutlierTraining, ("oe", "poe")), (Pool, ("oe",)),
                         (Corrupted, ("poe",))):  # fmt: skip
        why = f"--outliers {{outliers}} does not use it; give --outliers {' or '.join(kinds)}"
        add_group(parser, group, Need(lambda args, kinds=kinds: args.outliers in kinds, why))


def add_stage2(parser: Parser, save_path: str, with_outliers: bool = False) -> None:
    """All flags of a stage-2 script; `with_outliers`: whether its networks see outliers."""
    add_common(parser)
    add_group(parser, Training, num_eval=5)
    add_group(parser, Speed)
    add_group(parser, Folders, READS_A_SET, omit=("save_path",))
    add_group(parser, Folders, omit=("folder", "load_path", "is_load_oe"), save_path=save_path)
    add_group(parser, TrainingSet)
    add_group(parser, Foreign, OF_DISTILLED)
    parser.completions.append(complete_training_set)
    if with_outliers:
        add_group(parser, OutlierTraining, used_by(*(name for name in OUTLIERS if name != "none")))
        add_group(parser, TrainingOutliers)
        parser.completions.append(complete_outliers)


def add_stage3(parser: Parser) -> None:
    """All flags of the stage-3 script."""
    add_common(parser)
    add_group(parser, Speed, omit=("deterministic",), precision="fp32")
    add_group(parser, Folders, save_path="result-test-ood-synthetic")
    for group in (Test, OODSets, Scores):
        add_group(parser, group)
