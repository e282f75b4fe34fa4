"""How far can networks be trusted that are trained on a distilled set? Stages 2 and 3 and baselines in one command.

    python scripts/trust_report.py images_best.pt --dataset CIFAR10 --out report-mtt \
        --dsa_strategy color_crop_cutout_flip_scale_rotate

Networks are trained on the set, alone and with outliers, and on real images: random ones, coresets of the same size,
and the whole training set. The page OUT/compare.html puts them side by side. The same command resumes a stopped report.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.runner import Stage, run_stages
from utils.core.errors import UserError, require
from utils.core.files import save_output
from utils.core.run_script import run_script
from utils.data.datasets import RealData
from utils.exchange.assumptions import Assumptions
from utils.exchange.convert import read_distilled
from utils.exchange.formats import SetFiles, check_there, find_files
from utils.methods import METHODS
from utils.report.compare import find_runs
from utils.report.study import NamedResults
from utils.settings.arguments import Experiment, Stage2Settings, Stage2SettingsNoOE, Stage3Settings
from utils.settings.common import (
    Batches,
    Data,
    Network,
    OODSets,
    OutlierTraining,
    Scores,
    Speed,
    Training,
    read_data,
)
from utils.settings.fields import Need, Settings, as_words, flag, flags_of, with_default
from utils.settings.parser import count, one_of
from utils.settings.reading import SettingsParser
from utils.stages.stage3 import find_sets, scores_of

BASELINES = ("random", "herding", "kcenter", "whole")
OUTLIERS = ("distilled", "again", "corrupt", "initial", "kcenter", "real")


@dataclass(frozen=True)
class Report(Settings):
    """Report."""

    distilled: tuple[str, ...] = flag(
        (), "a distilled set of any repository, as --distilled", positional=True, metavar="PATH"
    )
    out: str = flag("", "folder of the report; the same one again resumes it")
    method: str | None = flag(None, "left out: DSA with --dsa_strategy, else DC", one_of("method", METHODS))
    distilled_oe: tuple[str, ...] | None = flag(
        None,
        "its outliers, if they are apart",
        metavar="PATH",
        needs=Need(
            lambda s: not {"distilled", "again"}.isdisjoint(s.outliers),
            "no column has them; add distilled or again to --outliers",
        ),
    )
    outliers: tuple[str, ...] = flag(
        ("distilled", "corrupt"),
        "columns of the set with outliers, as in stage 2; again: its own, corrupted again in every epoch; distilled "
        "and again are left out where the set has none",
        one_of("kind of outliers", OUTLIERS),
        nargs="*",
    )
    baselines: tuple[str, ...] = flag(BASELINES, "columns of real images", one_of("baseline", BASELINES), nargs="*")
    whole_epochs: int | None = flag(
        None,
        "epochs on the whole set; left out: 30",
        count(1),
        needs=Need(lambda s: "whole" in s.baselines, "there is no column of the whole set; add whole to --baselines"),
    )
    jobs: int = flag(1, "stages at once, each on a GPU of its own if there are", count(1))


@dataclass(frozen=True)
class ReportSettings(
    Report,
    Data,
    Network,
    Training,
    Batches,
    Speed,
    Experiment,
    Assumptions,
    OutlierTraining,
    OODSets,
    Scores,
):
    """Settings of this script."""

    num_eval: int = with_default(Training, "num_eval", 3)
    score: tuple[str, ...] = with_default(Scores, "score", ("msp", "mls"))

    def completed(self, given: Mapping[str, Any]) -> Self:
        """The method that names folders, and augments."""
        require(self.out, "--out is missing; give the folder to make")
        self.check_assumptions()
        return replace(self, method=self.method or ("DSA" if self.dsa_strategy else "DC"))

    def of_stage(self, stage: type[Settings], **own: Any) -> list[str]:
        """The words of the command line of a stage; what is not in `own` is as here, if the stage has it."""
        names = {f.name for f in flags_of(stage)} & {f.name for f in flags_of(ReportSettings)} - {
            f.name for f in flags_of(Report)
        }
        names -= {"precision"} if self.precision == Speed.precision else set()  # stage 3 has a default of its own
        return as_words(stage(**{name: getattr(self, name) for name in names} | {"method": self.method} | own))


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return SettingsParser(ReportSettings, description="The trust report of a distilled set.")


def main(settings: ReportSettings) -> None:
    """Read the set, train and test each column, and compare them."""
    s = settings
    check_there(s.distilled, "PATH")  # before the data may be downloaded
    check_there(s.distilled_oe, "--distilled_oe")
    real = read_data(s)
    found = read_distilled(s.distilled, real, s, s.exp_idx, s.distilled_oe or (), flag="PATH")
    find_sets(real, s)  # before hours of training
    if "tscaling" in scores_of(s) and s.fit_on != "real":
        raise UserError(
            "--score tscaling: networks are right on the images that they were trained on, which fit no temperature; "
            "give --fit_on real, or leave it out"
        )
    for line in found.lines:
        print(line)
    ipc = found.ipc(real.num_classes)
    out = Path(s.out)
    files = find_files(s.distilled, s.distilled_format)
    _check_same(out, files, s.distilled_oe or ())
    _check_note(out / "data.sha256", real.fingerprint(), "--data_path")
    columns = _columns(s, ipc, found.factor, found.synthetic.images_oe is not None)
    folders = {name: out / name.replace(" = ", " ").replace(" ", "-") for name in columns}
    stages = []
    for place, (name, train) in enumerate(columns.items(), 1):
        title = f"column {place} of {len(columns)}: {name}"
        networks = Stage(
            tuple(train), folders[name] / "networks", shares="features" * ("--features" in train), title=title
        )
        own = {"ipc": ipc, "load_path": str(networks.folder), "fit_on": None if name == "whole" else s.fit_on}
        test = s.of_stage(Stage3Settings, num_exp=s.num_eval, is_load_best=s.tests_best, **own)
        stages.append(Stage(("test_ood_model_syn.py", *test), folders[name] / "measures", (networks,)))
    run_stages(stages, s.jobs)
    measures = [stage.folder for stage in stages]
    notes = at_chance(find_runs(measures, list(columns), []), real)
    name = "/".join(files.images.resolve().parts[-2:])  # images_best.pt alone says nothing
    title = f"How far can networks be trusted that are trained on {name} ({s.dataset})?"
    command = ["scripts/compare.py", *map(str, measures), "--names", *columns, "--out", str(out), "--html"]
    command += ["--title", title]
    run_stages([Stage((*command, *(["--notes", *notes] if notes else [])))])


def _check_same(out: Path, files: SetFiles, outliers: Sequence[str]) -> None:
    """Note which files the report in `out` is of; a `UserError` tells that they have changed since."""
    digest = hashlib.sha256()
    for place in (files.images, files.labels, files.lr, *map(Path, outliers)):
        inside = sorted(path for path in place.rglob("*") if path.is_file()) if place else []  # of a folder
        digest.update("\n".join(str(path.relative_to(place)) for path in inside).encode())
        for path in inside or filter(None, [place]):
            digest.update(path.read_bytes())
    _check_note(out / "set.sha256", digest.hexdigest(), "PATH")


def _check_note(note: Path, found: str, what: str) -> None:
    """Keep a fingerprint of `what` the report is of; a `UserError` tells that there is another."""
    if note.is_file() and note.read_text(encoding="utf-8").strip() != found:
        told = f"--out: the report in {note.parent} is of other images than {what} holds now, with these flags"
        raise UserError(f"{told}; give another --out")
    save_output(str(note), found + "\n")


def at_chance(columns: Sequence[NamedResults], real: RealData) -> list[str]:
    """A line for each column whose networks are not more accurate than guessing the largest class of the test set,
    within two standard errors."""
    chance = float(real.labels_test.bincount().max()) / len(real.labels_test)
    error = math.sqrt(chance * (1 - chance) / len(real.images_test))
    lines = []
    for column in columns:
        accuracy = fmean(value for run in column.runs.values() for value in run.of_networks("accuracy"))
        if accuracy <= chance + 2 * error:
            lines.append(
                f"{column.name}: its accuracy, {100 * accuracy:.1f} %, is at chance level: always "
                f"naming the largest class gives {100 * chance:.1f} ± {100 * error:.1f} %."
            )
    return lines


def _columns(s: ReportSettings, ipc: int, factor: int, has_outliers: bool) -> dict[str, list[str]]:
    """The command of stage 2 for each column, without the place where it writes.

    `ipc`, `factor`: stored images per class of the set, and parts a side of each; baselines get the same storage.
    """
    plain, with_oe = "train_model_synthetic_no_oe.py", "train_model_synthetic_oe.py"
    given = {"distilled": s.distilled, "ipc": None}
    columns = {"distilled": [plain, *s.of_stage(Stage2SettingsNoOE, **given)]}
    for kind in s.outliers:
        own = kind in ("distilled", "again")
        if own and not has_outliers:
            continue
        apart = {"distilled_oe": s.distilled_oe} if own else {}
        outliers = {"outliers": "distilled" if kind == "again" else kind, "corrupt_again": kind == "again"}
        told = {"again": "outliers corrupted again", "corrupt": "outliers on the fly", "initial": "random outliers"}
        name = f"with {told.get(kind, f'{kind} outliers')}"
        columns[name] = [with_oe, *s.of_stage(Stage2Settings, **given, **apart, **outliers)]
    foreign = dict.fromkeys((f.name for f in flags_of(Assumptions)), None)
    for name, kind in _baselines(s.baselines, ipc * factor**2).items():
        own = {"train_on": kind, "ipc": ipc, "exp_idx": 0, **foreign}
        if kind in ("herding", "kcenter"):
            own["features"] = str(Path(s.out) / "features")
        if kind == "whole":
            own["epoch_eval_train"] = s.whole_epochs
        else:
            own["factor"] = factor
        columns[name] = [plain, *s.of_stage(Stage2SettingsNoOE, **own)]
    return columns


def _baselines(kinds: Sequence[str], images: int) -> dict[str, str]:
    """The name of each column of real images, so many of each class, and what `--train_on` calls it.

    Herding and k-center begin with the same image, the one nearest to the mean, so with one image they are one column.
    """
    if images > 1 or not {"herding", "kcenter"} <= set(kinds):
        return {kind: kind for kind in kinds}
    return {"herding = kcenter" if kind == "herding" else kind: kind for kind in kinds if kind != "kcenter"}


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "trust_report.py")
