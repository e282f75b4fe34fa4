"""How far can networks be trusted that are trained on a distilled set? Stages 2 and 3 and baselines in one command.

    python scripts/trust_report.py images_best.pt --dataset CIFAR10 --out report-mtt \
        --dsa_strategy color_crop_cutout_flip_scale_rotate

Networks are trained on the set, alone and with outliers, and on real images: random ones, coresets of the same size,
and the whole training set. The page OUT/compare.html puts them side by side. The same command resumes a stopped report.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.runner import Stage, run_stages
from utils.compute.device import PRECISIONS
from utils.core.run_script import run_script
from utils.data.datasets import RealData
from utils.exchange.convert import read_distilled
from utils.methods import METHODS
from utils.ood.scores import ALL_SCORES, require_library
from utils.ood.sets import OODSource
from utils.report.compare import ComparisonColumn, find_runs
from utils.settings.common import Data, Network, read_data
from utils.settings.fields import add_group
from utils.settings.parser import Parser, count, number, one_of
from utils.settings.training_set import Foreign, assumptions

BASELINES = ("random", "herding", "kcenter", "whole")
OUTLIERS = ("distilled", "again", "corrupt", "initial", "kcenter", "real")


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="The trust report of a distilled set.")
    parser.add_argument(
        "distilled", nargs="+", metavar="PATH", help="a distilled set of any repository, as --distilled"
    )
    parser.add_argument("--out", required=True, help="folder of the report; the same one again resumes it")
    parser.add_argument(
        "--method", default=None, type=one_of("method", METHODS), help="left out: DSA with --dsa_strategy, else DC"
    )
    parser.add_argument("--dsa_strategy", default=None, help="augmentation of training; give the one of the set")
    parser.add_argument("--distilled_oe", nargs="+", default=[], metavar="PATH", help="its outliers, if they are apart")
    parser.add_argument("--exp_idx", type=count(0), default=0, help="which experiment of a res_….pt")
    parser.add_argument(
        "--outliers",
        nargs="*",
        type=one_of("kind of outliers", OUTLIERS),
        default=["distilled", "corrupt"],
        help="columns of the set with outliers, as in stage 2; again: its own, corrupted again in every epoch; "
        "distilled and again are left out where the set has none",
    )
    parser.add_argument(
        "--baselines",
        nargs="*",
        type=one_of("baseline", BASELINES),
        default=list(BASELINES),
        help="columns of real images",
    )
    parser.add_argument("--num_eval", type=count(1), default=3, help="networks in each column")
    parser.add_argument("--epoch_eval_train", type=count(1), default=None, help="epochs; left out: as in stage 2")
    parser.add_argument("--whole_epochs", type=count(1), default=None, help="epochs on the whole set; left out: 30")
    parser.add_argument("--lambda_oe", type=number(0), default=0.5, help="weight of the outlier loss")
    _add_tests(parser)
    parser.add_argument("--precision", default="tf32", type=one_of("precision", PRECISIONS), help="as in stage 2")
    parser.add_argument(
        "--jobs", type=count(1), default=1, help="stages at once, each on a GPU of its own if there are"
    )
    for group in (Network, Data, Foreign):
        add_group(parser, group)
    return parser


def _add_tests(parser: Parser) -> None:
    """Flags of stage 3."""
    parser.add_argument("--ood_path", default="data/ood", help="folder of OOD sets")
    parser.add_argument("--ood_sets", nargs="+", default=None, help="OOD sets; left out: those of the paper")
    parser.add_argument(
        "--score", nargs="+", type=one_of("score", ALL_SCORES), default=["msp", "mls"], help="scores of stage 3"
    )
    parser.add_argument(
        "--fit_on",
        type=one_of("fitting set", ("distilled", "real")),
        default="distilled",
        help="what scores that are fitted are fitted on: the images of the column, or the real training set",
    )


def main(args: argparse.Namespace) -> None:
    """Read the set, train and test each column, and compare them."""
    real = read_data(args)
    assumed = assumptions(vars(args))
    found = read_distilled(args.distilled, real, assumed, args.exp_idx, args.distilled_oe, flag="PATH")
    source = OODSource(real, Path(args.ood_path), Path(args.data_path), args.download == "all", limit=1, seed=args.seed)
    source.find_all(args.ood_sets or source.default_names())  # before hours of training
    require_library(args.score)
    for line in found.lines:
        print(line)
    # ipc counts stored images: one of IDC that holds four small images counts once
    ipc = max(1, found.stored // real.num_classes)
    decoded = max(1, len(found.synthetic.images) // real.num_classes)
    out = Path(args.out)
    columns = _columns(args, ipc, found.synthetic.images_oe is not None)
    folders = {name: out / name.replace(" = ", " ").replace(" ", "-") for name in columns}
    stages = []
    for place, (name, train) in enumerate(columns.items(), 1):
        title = f"column {place} of {len(columns)}: {name}"
        networks = Stage(
            tuple(train), folders[name] / "networks", shares="features" * ("--features" in train), title=title
        )
        test = [*_test(args, ipc if "--train_on" in train else decoded), "--load_path", str(networks.folder)]
        stages.append(Stage(tuple(test), folders[name] / "measures", (networks,)))
    run_stages(stages, args.jobs)
    measures = [stage.folder for stage in stages]
    notes = at_chance(find_runs(measures, list(columns), []), real)
    command = ["scripts/compare.py", *map(str, measures), "--names", *columns, "--out", str(out), "--html"]
    run_stages([Stage((*command, *(["--notes", *notes] if notes else [])))])


def at_chance(columns: Sequence[ComparisonColumn], real: RealData) -> list[str]:
    """A line for each column whose networks are not more accurate than guessing, within two standard errors."""
    chance = 1 / real.num_classes
    error = math.sqrt(chance * (1 - chance) / len(real.images_test))
    lines = []
    for column in columns:
        accuracy = fmean(column.results.of_networks("accuracy"))
        if accuracy <= chance + 2 * error:
            lines.append(
                f"{column.name}: its accuracy, {100 * accuracy:.1f} %, is at chance level: guessing among "
                f"{real.num_classes} classes gives {100 * chance:.1f} ± {100 * error:.1f} %. Its networks have learned "
                "nothing."
            )
    return lines


def _columns(args: argparse.Namespace, ipc: int, has_outliers: bool) -> dict[str, list[str]]:
    """The command of stage 2 for each column, without the place where it writes."""
    common = [*_common(args), "--num_eval", str(args.num_eval), "--precision", args.precision]
    if args.dsa_strategy:
        common += ["--dsa_strategy", args.dsa_strategy]
    epochs = ["--epoch_eval_train", str(args.epoch_eval_train)] if args.epoch_eval_train else []
    whole = ["--epoch_eval_train", str(args.whole_epochs)] if args.whole_epochs else []
    given = ["--distilled", *args.distilled, "--exp_idx", str(args.exp_idx), *_foreign(args)]
    plain, with_oe = "train_model_synthetic_no_oe.py", "train_model_synthetic_oe.py"
    columns = {"distilled": [plain, *common, *epochs, *given]}
    for kind in args.outliers:
        own = kind in ("distilled", "again")
        if own and not has_outliers:
            continue
        apart = ["--distilled_oe", *args.distilled_oe] if own and args.distilled_oe else []
        outliers = ["--outliers", *(["distilled", "--corrupt_again"] if kind == "again" else [kind])]
        name = "with outliers corrupted again" if kind == "again" else f"with {kind} outliers"
        columns[name] = [with_oe, *common, *epochs, "--lambda_oe", str(args.lambda_oe), *given, *apart, *outliers]
    for name, kind in _baselines(args.baselines, ipc).items():
        own = whole if kind == "whole" else epochs
        features = ["--features", str(Path(args.out) / "features")] if kind in ("herding", "kcenter") else []
        columns[name] = [plain, *common, *own, "--ipc", str(ipc), "--train_on", kind, *features]
    return columns


def _baselines(kinds: Sequence[str], ipc: int) -> dict[str, str]:
    """The name of each column of real images, and what `--train_on` calls it.

    Herding and k-center begin with the same image, the one nearest to the mean, so at ipc 1 they are one column.
    """
    if ipc > 1 or not {"herding", "kcenter"} <= set(kinds):
        return {kind: kind for kind in kinds}
    return {"herding = kcenter" if kind == "herding" else kind: kind for kind in kinds if kind != "kcenter"}


def _common(args: argparse.Namespace) -> list[str]:
    """The flags that stages 2 and 3 share."""
    method = args.method or ("DSA" if args.dsa_strategy else "DC")
    flags = ["--dataset", args.dataset, "--data_path", args.data_path, "--model", args.model, "--method", method]
    flags += ["--seed", str(args.seed), "--device", args.device, "--download", args.download]
    flags += ["--im_size", str(args.im_size)] if args.im_size else []
    flags += ["--pixel_max", str(args.pixel_max)] if args.pixel_max else []
    return [*flags, *(["--zca"] if args.zca else [])]


def _foreign(args: argparse.Namespace) -> list[str]:
    """The flags of what is assumed of the set, as they were given."""
    flags = []
    for name in ("format", "space", "mean", "std", "factor"):
        value = getattr(args, f"distilled_{name}")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--distilled_{name}", *(f"{v:f}" if isinstance(v, float) else str(v) for v in values)]
    flags += ["--soft_labels", args.soft_labels] if args.soft_labels else []
    return [*flags, *(["--label_temperature", str(args.label_temperature)] if args.label_temperature else [])]


def _test(args: argparse.Namespace, ipc: int) -> list[str]:
    """The command of stage 3, without its folders."""
    flags = ["--ipc", str(ipc), "--num_exp", str(args.num_eval), "--is_load_best", "--ood_path", args.ood_path]
    sets = ["--ood_sets", *args.ood_sets] if args.ood_sets else []
    fit = ["--fit_on", "real"] if args.fit_on == "real" else []
    return ["test_ood_model_syn.py", *_common(args), *flags, *sets, "--score", *args.score, *fit]


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "trust_report.py")
