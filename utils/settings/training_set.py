"""The flags of stage 2 that say what networks are trained on."""

import argparse
from collections.abc import Mapping
from typing import Any

from utils.core.errors import UserError
from utils.exchange.convert import Assumptions
from utils.exchange.formats import FORMATS, SPACES
from utils.outliers.corruptions import CORRUPTIONS, DEFAULT_CORRUPTIONS
from utils.settings.parser import Parser, count, number, one_of

LARGEST = 1e9  # mean of pixels, in any unit
TRAIN_ON = ("distilled", "random", "herding", "kcenter", "whole")
OUTLIERS = ("distilled", "initial", "kcenter", "corrupt", "real", "none")
STORED = ("distilled", "initial", "kcenter")
FOREIGN = (
    "distilled_format", "distilled_space", "distilled_mean", "distilled_std", "distilled_factor", "soft_labels",
    "label_temperature", "distilled_oe",
)  # fmt: skip


def add_training_set(parser: Parser) -> None:
    """Flags of the images: a distilled set, from here or elsewhere, or a baseline."""
    group = parser.add_argument_group("training set")
    group.add_argument(
        "--train_on",
        type=one_of("training set", TRAIN_ON),
        default="distilled",
        help="distilled images, or a baseline: --ipc random, herding or k-center real images per class, or the whole "
        "training set",
    )
    group.add_argument(
        "--features",
        default=None,
        metavar="PATH",
        help="network MODEL.pt in whose features herding and kcenter choose, or a folder: one is trained on the whole "
        "set and kept there; left out: features below --save_path",
    )
    group = parser.add_argument_group("distilled set by its path")
    group.add_argument(
        "--distilled",
        nargs="+",
        action="extend",
        default=None,
        metavar="PATH",
        help="a distilled set of any repository, instead of --folder and --load_path: a file, or a folder; images and "
        "labels may be two files (docs/usage.md lists the formats)",
    )
    add_foreign(group)
    parser.completions.append(_complete_training_set)


def add_foreign(group: argparse._ArgumentGroup) -> None:
    """Flags of what is assumed of a distilled set of another repository."""
    group.add_argument(
        "--distilled_format", type=one_of("format", FORMATS), default=None, help="left out: found out by looking"
    )
    group.add_argument(
        "--distilled_space",
        type=one_of("space", SPACES),
        default=None,
        help="what the numbers of the images are: normalised, unit (0 to 1) or zca (whitened); left out: by the format",
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--distilled_{name}",
            nargs="+",
            type=number(-LARGEST) if name == "mean" else number(0, exclusive=True),
            default=None,
            metavar="X",
            help=f"{name} per channel by which the images were normalised; left out: by the format and --dataset",
        )
    group.add_argument(
        "--distilled_factor",
        type=count(1),
        default=None,
        help="each image holds factor x factor smaller ones, which are enlarged (IDC); left out: by the format",
    )
    group.add_argument(
        "--soft_labels",
        type=one_of("kind of labels", ("probabilities", "logits")),
        default=None,
        help="what labels [images, classes] are; left out: found out by looking",
    )
    group.add_argument(
        "--label_temperature",
        type=number(0, exclusive=True),
        default=None,
        help="temperature of the softmax that turns logits into soft labels; left out: 1",
    )


def assumptions(flags: Mapping[str, Any]) -> Assumptions:
    """What the flags of `add_foreign` say. Raises `UserError` where they contradict each other."""
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


def add_training_outliers(parser: Parser) -> None:
    """Flags of the outliers: distilled, or one of their references."""
    group = parser.add_argument_group("outliers")
    group.add_argument(
        "--outliers",
        type=one_of("kind of outliers", OUTLIERS),
        default="distilled",
        help="distilled; initial: those that a distillation starts from, not distilled; kcenter: the same number, "
        "chosen far apart from 10000 candidates; corrupt: the distilled images, corrupted anew in every epoch; real: "
        "real outliers anew in every epoch, an upper bound; none",
    )
    group.add_argument(
        "--distilled_oe",
        nargs="+",
        action="extend",
        default=None,
        metavar="PATH",
        help="outliers of --distilled where they are in files of their own",
    )
    _add_corruptions(group)
    group.add_argument(
        "--oe_data_path",
        default=None,
        help="take --outliers initial, kcenter and real from this pool instead of corrupting training images",
    )
    group.add_argument(
        "--num_oe_per_class", type=count(1), default=10000, help="outliers of the pool for each class slot"
    )
    parser.completions.append(_complete_outliers)


def _add_corruptions(group: argparse._ArgumentGroup) -> None:
    """Flags of how images become outliers, and outliers others."""
    group.add_argument(
        "--corruptions",
        nargs="+",
        type=one_of("corruption", CORRUPTIONS),
        default=list(DEFAULT_CORRUPTIONS),
        help="how --outliers initial, kcenter, corrupt and real, and --corrupt_again, corrupt images: class 0 uses the "
        "first, and so on",
    )
    group.add_argument(
        "--mix_corruptions",
        action="store_true",
        help="draw the corruption of each of these outliers out of --corruptions, instead of one for each class",
    )
    group.add_argument(
        "--corrupt_again",
        action="store_true",
        help="corrupt the outliers of --outliers distilled, initial or kcenter once more, anew in every epoch",
    )


def _complete_training_set(
    parser: Parser, args: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """Refuse flags that contradict each other or have no effect; those of a resumed run were checked at its start."""
    if args.resume:
        return args, given
    if args.distilled:
        for name in ("folder", "load_path", "is_load_oe"):
            if given.get(name):
                parser.error(f"--distilled: it takes the place of --{name}; give one of them")
        if args.train_on != "distilled":
            parser.error(f"--distilled: --train_on {args.train_on} does not read it; leave one of them out")
    for name in FOREIGN:
        if name in given and not args.distilled:
            parser.error(f"--{name}: it describes the files of --distilled, which is not given")
    for name in ("folder", "load_path", "is_load_oe", "exp_idx"):
        draws = name == "exp_idx" and args.train_on == "random"  # it keys the draw
        if given.get(name) and args.train_on != "distilled" and not draws:
            parser.error(f"--{name}: --train_on {args.train_on} reads no distilled set; leave it out")
    if "features" in given and args.train_on not in ("herding", "kcenter"):
        parser.error("--features: only --train_on herding and kcenter choose in features; leave it out")
    assumptions(vars(args))
    if args.distilled and "ipc" not in given:
        args.ipc = None  # that of the set
    if "method" not in given and (args.distilled or args.train_on != "distilled"):
        args.method = "DSA" if args.dsa_strategy else "DC"  # it names the folder, and what augments
    return args, given


def _complete_outliers(
    parser: Parser, args: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """Refuse two sources of outliers, and flags that have no effect."""
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
    users = {
        "lambda_oe": tuple(name for name in OUTLIERS if name != "none"),
        "corruptions": ("initial", "kcenter", "corrupt", "real"),
        "mix_corruptions": ("initial", "kcenter", "corrupt", "real"),
        "oe_data_path": ("initial", "kcenter", "real"),
        "num_oe_per_class": ("initial", "kcenter", "real"),
    }
    if args.corrupt_again:
        if kind not in STORED:
            parser.error(f"--corrupt_again: --outliers {kind} stores none; --outliers {', '.join(STORED)} do")
        users |= {"corruptions": OUTLIERS, "mix_corruptions": OUTLIERS}
    for name, kinds in users.items():
        if name in given and kind not in kinds:
            again = " and --corrupt_again" if "corruptions" in name else ""
            parser.error(f"--{name}: --outliers {kind} does not use it; --outliers {', '.join(kinds)}{again} do")
    for name in ("corruptions", "mix_corruptions"):
        if name in given and args.oe_data_path and not args.corrupt_again:
            parser.error(f"--oe_data_path: --{name} is for outliers made of training images; give one of them")
    if "num_oe_per_class" in given and not args.oe_data_path:
        parser.error("--num_oe_per_class: it cuts the pool of --oe_data_path, which is not given")
    return args, given
