"""Settings of stage 2: what networks are trained on."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.core.errors import UserError
from utils.exchange.convert import Assumptions
from utils.exchange.formats import FORMATS, SPACES
from utils.outliers.corruptions import CORRUPTIONS, DEFAULT_CORRUPTIONS
from utils.settings.fields import Need, flag
from utils.settings.parser import Parser, count, number, one_of

LARGEST_MEAN = 1e9  # of pixels, in any unit
TRAIN_ON = ("distilled", "random", "herding", "kcenter", "whole")
OUTLIERS = ("distilled", "initial", "kcenter", "corrupt", "real", "none")
STORED = ("distilled", "initial", "kcenter")
LABELS = ("probabilities", "logits")

READS_A_SET = Need(
    lambda args: args.train_on == "distilled", "--train_on {train_on} reads no distilled set; leave it out"
)
OF_DISTILLED = Need(
    lambda args: bool(args.distilled), "it describes the files of --distilled, which is not given"
)  # of the flags of `Foreign`


def used_by(*kinds: str, again: bool = False) -> Need:
    """The need of a flag that only some kinds of `--outliers` use; `again`: `--corrupt_again` uses it, too."""
    also = " and --corrupt_again" if again else ""
    return Need(
        lambda args: args.outliers in kinds or (again and args.corrupt_again),
        f"--outliers {{outliers}} does not use it; --outliers {', '.join(kinds)}{also} do",
    )


@dataclass(frozen=True)
class TrainingSet:
    """Training set."""

    exp_idx: int = flag(
        0,
        "which experiment of the distilled set to train on",
        count(0),
        need=Need(
            lambda args: args.train_on in ("distilled", "random") or not args.exp_idx,  # it is part of random's seed
            READS_A_SET.why,
        ),
    )
    train_on: str = flag(
        "distilled",
        "distilled images, or a baseline: --ipc random, herding or k-center real images per class, or the whole "
        "training set",
        one_of("training set", TRAIN_ON),
        names=TRAIN_ON,
        often=True,
    )
    features: str | None = flag(
        None,
        "network MODEL.pt in whose features herding and kcenter choose, or a folder: one is trained on the whole set "
        "and kept there; left out: features below --save_path",
        metavar="PATH",
        need=Need(
            lambda args: args.train_on in ("herding", "kcenter"),
            "only --train_on herding and kcenter choose in features; leave it out",
        ),
    )
    distilled: tuple[str, ...] | None = flag(
        None,
        "a distilled set of any repository, instead of --folder and --load_path: a file, or a folder; images and "
        "labels may be two files (docs/usage.md lists the formats)",
        many=True,
        action="extend",
        metavar="PATH",
    )


@dataclass(frozen=True)
class Foreign:
    """Sets of other repositories. What is assumed of them."""

    distilled_format: str | None = flag(
        None, f"{', '.join(FORMATS)}; left out: found out by looking", one_of("format", FORMATS), names=tuple(FORMATS)
    )
    distilled_space: str | None = flag(
        None,
        "what the numbers of the images are: normalised, unit (0 to 1) or zca (whitened); left out: by the format",
        one_of("space", SPACES),
        names=SPACES,
    )
    distilled_mean: tuple[float, ...] | None = flag(
        None,
        "mean per channel by which the images were normalised; left out: by the format and --dataset",
        number(-LARGEST_MEAN),
        many=True,
        metavar="X",
    )
    distilled_std: tuple[float, ...] | None = flag(
        None,
        "std per channel by which the images were normalised; left out: by the format and --dataset",
        number(0, exclusive=True),
        many=True,
        metavar="X",
    )
    distilled_factor: int | None = flag(
        None,
        "each image holds factor x factor smaller ones, which are enlarged (IDC); left out: by the format",
        count(1),
    )
    soft_labels: str | None = flag(
        None,
        "what labels [images, classes] are; left out: found out by looking",
        one_of("kind of labels", LABELS),
        names=LABELS,
    )
    label_temperature: float | None = flag(
        None,
        "temperature of the softmax that turns logits into soft labels; left out: 1",
        number(0, exclusive=True),
    )


def assumptions(flags: Mapping[str, Any]) -> Assumptions:
    """What the flags of `Foreign` say. Raises `UserError` where they contradict each other."""
    if (flags["distilled_mean"] is None) != (flags["distilled_std"] is None):
        raise UserError("--distilled_mean, --distilled_std: give both or none")
    if flags["distilled_mean"] and flags["distilled_space"] not in (None, "normalised"):
        raise UserError(
            f"--distilled_mean: --distilled_space {flags['distilled_space']} has none; leave one of them out"
        )
    return Assumptions(
        format=flags["distilled_format"],
        space=flags["distilled_space"],
        statistics=flags["distilled_mean"] and (tuple(flags["distilled_mean"]), tuple(flags["distilled_std"])),
        factor=flags["distilled_factor"],
        soft_labels=flags["soft_labels"],
        temperature=flags["label_temperature"],
    )


@dataclass(frozen=True)
class TrainingOutliers:
    """Outliers. Distilled ones, or one of their references."""

    outliers: str = flag(
        "distilled",
        "distilled; initial: those that a distillation starts from, not distilled; kcenter: the same number, chosen "
        "far apart from 10000 candidates; corrupt: the distilled images, corrupted anew in every epoch; real: real "
        "outliers anew in every epoch, an upper bound; none",
        one_of("kind of outliers", OUTLIERS),
        names=OUTLIERS,
        often=True,
    )
    distilled_oe: tuple[str, ...] | None = flag(
        None,
        "outliers of --distilled where they are in files of their own",
        many=True,
        action="extend",
        metavar="PATH",
        need=OF_DISTILLED,
    )
    corruptions: tuple[str, ...] = flag(
        DEFAULT_CORRUPTIONS,
        "how --outliers initial, kcenter, corrupt and real, and --corrupt_again, corrupt images: class 0 uses the "
        "first, and so on",
        one_of("corruption", CORRUPTIONS),
        many=True,
        need=used_by("initial", "kcenter", "corrupt", "real", again=True),
    )
    mix_corruptions: bool = flag(
        False,
        "draw the corruption of each of these outliers out of --corruptions, instead of one for each class",
        need=used_by("initial", "kcenter", "corrupt", "real", again=True),
    )
    corrupt_again: bool = flag(
        False,
        "corrupt the outliers of --outliers distilled, initial or kcenter once more, anew in every epoch",
        need=Need(
            lambda args: args.outliers in STORED,
            f"--outliers {{outliers}} stores none; --outliers {', '.join(STORED)} do",
        ),
    )
    oe_data_path: str | None = flag(
        None,
        "take --outliers initial, kcenter and real from this pool instead of corrupting training images",
        need=used_by("initial", "kcenter", "real"),
    )
    num_oe_per_class: int = flag(
        10000,
        "outliers of the pool for each class slot",
        count(1),
        need=Need(lambda args: bool(args.oe_data_path), "it cuts the pool of --oe_data_path, which is not given"),
    )


def complete_training_set(
    parser: Parser, args: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """Refuse two training sets; those of a resumed run were checked at its start.

    With a set by its path, `--ipc` left out becomes that of the set, and `--method` what names the folder and augments.
    """
    if args.resume:
        return args, given
    if args.distilled:
        for name in ("folder", "load_path", "is_load_oe"):
            if given.get(name):
                parser.error(f"--distilled: it takes the place of --{name}; give one of them")
        if args.train_on != "distilled":
            parser.error(f"--distilled: --train_on {args.train_on} does not read it; leave one of them out")
    assumptions(vars(args))
    if args.distilled and "ipc" not in given:
        args.ipc = None
    if "method" not in given and (args.distilled or args.train_on != "distilled"):
        args.method = "DSA" if args.dsa_strategy else "DC"
    return args, given


def complete_outliers(
    parser: Parser, args: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """Refuse two sources of outliers, and outliers that the training set does not have."""
    if args.resume:
        return args, given
    kind = args.outliers
    if args.train_on != "distilled" and kind == "distilled":
        others = " ".join(name for name in OUTLIERS if name != kind)
        parser.error(f"--outliers distilled: --train_on {args.train_on} has none; choose one of {others}")
    if "distilled_oe" in given and kind != "distilled":
        parser.error(f"--distilled_oe: --outliers {kind} takes others; give one of them")
    if args.train_on == "whole" and kind in ("initial", "kcenter") and "ipc" not in given:
        parser.error(f"--outliers {kind}: give --ipc, the number of outliers for each class slot")
    for name in ("corruptions", "mix_corruptions"):
        if name in given and args.oe_data_path and not args.corrupt_again:
            parser.error(f"--oe_data_path: --{name} is for outliers made of training images; give one of them")
    return args, given
