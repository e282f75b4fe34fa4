"""Settings of stage 2: what networks are trained on."""

from dataclasses import dataclass

from utils.settings.fields import Need, Settings, flag, main_flag
from utils.settings.parser import count

OUTLIERS = ("distilled", "initial", "kcenter", "corrupt", "real", "none")
MADE = ("initial", "kcenter", "corrupt", "real")

READS_A_SET = Need(lambda s: s.train_on == "distilled", "--train_on {train_on} reads no distilled set; leave it out")
READS_A_RUN = Need(lambda s: not s.distilled, "--distilled takes its place; give one of them")
OF_DISTILLED = Need(lambda s: s.distilled, "it describes the files of --distilled, which is not given")


def used_by(*kinds: str, again: bool = False) -> Need:
    """The need of a flag that only some kinds of `--outliers` use; `again`: `--corrupt_again` uses it, too."""
    also = " and --corrupt_again" if again else ""
    return Need(
        lambda s: s.outliers in kinds or (again and s.corrupt_again),
        f"--outliers {{outliers}} does not use it; --outliers {', '.join(kinds)}{also} do",
    )


@dataclass(frozen=True)
class Experiment(Settings):
    """Experiment."""

    exp_idx: int = flag(0, "which experiment of a res_….pt: it may hold several distilled sets", count(0))


@dataclass(frozen=True)
class TrainsOn(Settings):
    """Training set."""

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
        needs=Need(
            lambda s: s.train_on in ("herding", "kcenter"),
            "only --train_on herding and kcenter choose in features; leave it out",
        ),
    )
    distilled: tuple[str, ...] | None = flag(
        None,
        "a distilled set of any repository, instead of --folder and --load_path: a file, or a folder; images and "
        "labels may be two files (docs/evaluate.md lists the formats)",
        metavar="PATH",
        needs=Need(
            lambda s: s.train_on == "distilled", "--train_on {train_on} does not read it; leave one of them out"
        ),
    )


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
        metavar="PATH",
        needs=(
            OF_DISTILLED,
            Need(lambda s: s.outliers == "distilled", "--outliers {outliers} takes others; give one of them"),
        ),
    )
    corrupt_again: bool = flag(
        False,
        "corrupt the outliers of --outliers distilled, initial or kcenter once more in every epoch",
        needs=Need(
            lambda s: s.outliers in ("distilled", "initial", "kcenter"),
            "--outliers {outliers} stores none; --outliers distilled, initial, kcenter do",
        ),
    )
