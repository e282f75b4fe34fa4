"""All three stages for each kind of training set, ipc and seed, and the tables of the results.

    python scripts/tables/table.py scripts/tables/digits.yaml --ipc 1 --seeds 1 2 --jobs 2
    python scripts/tables/table.py scripts/tables/cifar10.yaml scripts/tables/outliers.yaml --method DM --dry_run

The values of a config file go before those of `scripts/tables/defaults.yaml`, which explains them, and a later file
before an earlier one. The same command again skips what is done and resumes what was stopped.
Results: OUT/ipc<n>/<kind>/seed<s>/{1-distilled,2-networks,3-ood}, and for each ipc OUT/ipc<n>/table/compare.html.
"""

import argparse
import hashlib
import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)


from scripts.kinds import DISTILLED, Kind, kind_named
from scripts.runner import DONE, VALUES, Stage, run_stages, to_run
from scripts.tables import check_inputs
from scripts.tables.config import merge, merged, words_of
from utils.core.errors import UserError, unknown_name
from utils.core.files import read_yaml
from utils.core.run_script import run_script
from utils.methods import METHODS
from utils.settings.arguments import Stage1Settings
from utils.settings.distillation import ExpertSettings
from utils.settings.fields import Settings
from utils.settings.parser import Parser, count, underscored, value_in
from utils.stages.stage3 import scores_of

HERE = Path(__file__).resolve().parent
LISTS = ("kinds", "ipc", "seeds", "lambdas", "detectors")
# flags in which the seeds of a kind may differ
PLACES = rf"--(seed|(load|buffer|data|oe_data|ood)_path|features|device)\b{VALUES}"
AT_TOP = dict.fromkeys(LISTS, "*") | dict.fromkeys(("networks", "method", "lambda_oe"))  # flags: their `nargs`
SCRIPTS = {"plain": "main.py", "oe": "main_oe.py", "poe": "main_poe.py"}  # of stage 1
STAGE3 = "test_ood_model_syn.py"
OF_EXPERTS = ("num_experts", "train_epochs", "mom", "lr_teacher")  # flags that a method may choose


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="All stages of a table: kinds of training sets, ipc and seeds.")
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files, e.g. scripts/tables/digits.yaml")
    parser.add_argument("--out", default=None, help="folder; left out: result-tables/ and the names of the files")
    for name, number in AT_TOP.items():
        parser.add_argument(f"--{name}", nargs=number, default=None, help=f"`{name}` of the config, see defaults.yaml")
    parser.add_argument("--recipes", nargs="+", default=None, help="which of the recipes; left out: all of the config")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="any other value, e.g. all.model=ConvNetW32 'stage3.score=msp mls'",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=count(1), default=1, help="stages at once, each on a GPU of its own if there are"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and run nothing")
    return parser


def main(args: argparse.Namespace) -> None:
    """Plan all stages, check the inputs, run what is not done, and make the tables."""
    out = Path(args.out or Path("result-tables", "-".join(Path(config).stem for config in args.configs)))
    tables, stages = plan(args, out)
    made = [stage for table in tables for stage in table.files()]
    if args.dry_run:
        wanted = to_run([*made, *stages])
        for stage in wanted:
            print(f"$ python {shlex.join(stage.words())}")
        print(f"# {len(wanted)} stages")
        return
    run_stages(made)
    for inputs in dict.fromkeys(tuple(table.inputs()) for table in tables):
        check_inputs.main(check_inputs.get_args_parser().parse_args(inputs))
    for test in to_run(stages):
        if test.command[0] == STAGE3:
            scores_of(_parsed(STAGE3, test.command[1:]))  # what they need is installed
    run_stages(stages, args.jobs)


def plan(args: argparse.Namespace, out: Path) -> tuple[list["Table"], list[Stage]]:
    """The table of each recipe, or the only one, and all stages; their flags are checked by the scripts' parsers."""
    given = _given(args)
    layers = [read_yaml(path, "CONFIG") for path in (HERE / "defaults.yaml", *map(Path, args.configs))]
    settings = merged([*layers, given])
    recipes = settings["recipes"]
    if not recipes:
        table = Table(out, out, settings)
        return [table], table.stages()
    chosen = args.recipes or [*recipes]
    for name in chosen:
        if name not in recipes:
            raise UserError(f"--recipes: with --method {settings['method']}, {unknown_name('recipe', name, recipes)}")
    tables = {name: Table(out / name, out, merged([*layers, recipes[name] or {}, given])) for name in chosen}
    stages = [stage for table in tables.values() for stage in table.stages()]
    measured = {(table.settings["all"].get("dataset"), *sorted(table["stage3.ood_sets"])) for table in tables.values()}
    return [*tables.values()], [*stages, *(_studies(out, tables, stages) if len(measured) == 1 else [])]


def _studies(out: Path, tables: dict[str, "Table"], stages: Sequence[Stage]) -> Iterator[Stage]:
    """For each ipc, the tables of all recipes side by side, if they are measured on the same sets."""
    goals = tuple(stage for stage in stages if stage.folder)
    for ipc in dict.fromkeys(ipc for table in tables.values() for ipc in table["ipc"]):
        some = {name: table for name, table in tables.items() if ipc in table["ipc"]}
        kinds = [*dict.fromkeys(kind for table in some.values() for kind in table["kinds"])]
        flags = ["--prefixes", *some, "--kinds", *kinds, "--scores", *next(iter(some.values()))["stage3.score"]]
        flags += ["--base", "poe"] if "poe" in kinds and len(kinds) > 1 else []
        folders = [str(table.out / f"ipc{ipc}") for table in some.values()]
        yield Stage(("scripts/study.py", *folders, *flags, "--out", str(out / f"study-ipc{ipc}.md")), before=goals)


@dataclass(frozen=True)
class Cell:
    """A cell of a table, and whether it is measured in another way."""

    kind: str
    ipc: str
    seed: str
    weight: str = ""  # of the outliers in stage 2, in the place of lambda_oe
    fit: str = ""  # what the scores of `detectors` are fitted on: distilled or real

    @property
    def whole(self) -> bool:
        """Whether it is of the whole training set, which does not depend on ipc."""
        return kind_named(self.kind).images == "whole"

    @property
    def folder(self) -> Path:
        """Its folder below that of the table."""
        part = f"lambda-{self.weight}" if self.weight else f"fit-{self.fit}" if self.fit else ""
        return Path("" if self.whole else f"ipc{self.ipc}", part, self.kind, f"seed{self.seed}")


@dataclass(frozen=True)
class Table:
    """The stages of one table."""

    out: Path
    shared: Path  # folder of experts and of the features of coresets
    settings: dict  # as in defaults.yaml

    def __getitem__(self, name: str) -> list[str]:
        """The words of a value; `section.name` for one in a section."""
        return words_of(reduce(dict.__getitem__, name.split("."), self.settings))

    def stages(self) -> list[Stage]:
        """The last stages of all cells, and after those of each ipc what puts them side by side."""
        found = []
        seeds = dict.fromkeys(str(int(s)) if re.fullmatch(r"[+-]?\d+", s) else s for s in self["seeds"])  # 01 is 1
        for ipc in self["ipc"]:
            cells = [Cell(kind, ipc, seed) for seed in seeds for kind in self["kinds"]]
            last = [self.measure(cell) for cell in cells]
            folders = dict.fromkeys(str((self.out / cell.folder).parent) for cell in cells)
            flags = ["--names", *self["kinds"], "--out", str(self.out / f"ipc{ipc}" / "table"), "--html"]
            found += [*last, Stage(("scripts/compare.py", *folders, *flags), before=tuple(last))]
            small = [cell for cell in cells if not cell.whole]
            found += [*self._sweep(ipc, small), *self._detect(small)]
        return found

    def _sweep(self, ipc: str, cells: Sequence[Cell]) -> list[Stage]:
        """Stages 2 and 3 with other weights of the outliers, for all kinds that have any."""
        weighed = [cell for cell in cells if kind_named(cell.kind).outliers != "none"]
        last = [self.measure(replace(cell, weight=weight)) for weight in self["lambdas"] for cell in weighed]
        here = self.out / f"ipc{ipc}"
        flags = [str(here / f"lambda-{weight}") for weight in self["lambdas"]]
        flags += ["--prefixes", *self["lambdas"], "--scores", *self["stage3.score"]]
        flags += ["--of_networks", "accuracy", "ece", "nll", "--out", str(here / "lambda.md")]
        return [*last, Stage(("scripts/study.py", *flags), before=tuple(last))] if last else []

    def _detect(self, cells: Sequence[Cell]) -> list[Stage]:
        """Stage 3 with the further detectors, fitted on either set."""
        fits = [fit for fit in ("distilled", "real") if self._detectors(fit)]
        return [self.measure(replace(cell, fit=fit)) for fit in fits for cell in cells]

    def _detectors(self, fit: str) -> list[str]:
        """Those to fit on a set; no temperature fits the distilled one, since networks are right on all its images."""
        return [score for score in self["detectors"] if (score, fit) != ("tscaling", "distilled")]

    def measure(self, cell: Cell) -> Stage:
        """Stage 3 of a cell; a `UserError` tells that other seeds of its kind were measured in another way."""
        trained = self.train(replace(cell, fit=""))
        own = {"score": self._detectors(cell.fit), "fit_on": cell.fit} if cell.fit else {}
        flags = self._flags(cell, {"num_exp": self["networks"], "load_path": [str(trained.folder)]}, "stage3", own)
        stage = self._stage(STAGE3, flags, self.out / cell.folder / "3-ood", trained)
        for done in sorted((self.out / cell.folder).parent.glob(f"seed*/3-ood/{DONE}")):
            stage.check_same(done, lambda text: re.sub(PLACES, "", text))
        return stage

    def train(self, cell: Cell) -> Stage:
        """Stage 2 of a cell."""
        kind = kind_named(cell.kind)
        flags: list[dict | str] = ["dsa_strategy", {"num_eval": self["networks"]}, "stage2"]
        before, shares = [], ""
        if kind.images in DISTILLED:
            before = [self.distil(Cell(kind.images, cell.ipc, cell.seed))]
            flags.append({"load_path": [str(before[0].folder)]})
        else:
            flags += [{"train_on": kind.images}]
            flags = [*flags, "whole"] if cell.whole else [self._storage(cell), *flags]
        if kind.images in ("herding", "kcenter"):
            flags.append({"features": [str(self.shared / "features")]})
            shares = f"features {cell.seed}"
        script = "train_model_synthetic_no_oe.py"
        if kind.outliers != "none":
            script = "train_model_synthetic_oe.py"
            flags += self._outliers(kind, cell.weight)
        return self._stage(
            script, self._flags(cell, *flags), self.out / cell.folder / "2-networks", *before, shares=shares
        )

    def _storage(self, cell: Cell) -> dict:
        """The flag with which real images take the storage of distilled ones: those in parts hold more images."""
        factor = _parsed("main.py", tuple(self._flags(cell, "dsa_strategy", "stage1"))).factor
        return {"factor": str(factor)} if factor > 1 else {}

    def _outliers(self, kind: Kind, weight: str) -> list[dict | str]:
        """The flags of stage 2 that choose outliers."""
        chosen: list[dict | str] = [{"lambda_oe": weight} if weight else "lambda_oe"]
        chosen += [{"outliers": kind.outliers}] if kind.outliers != "distilled" else []
        chosen += [{"corrupt_again": "true"}] if kind.again else []
        chosen += ["other_outliers"] if kind.outliers != "distilled" or kind.again else []
        return chosen + (["oe"] if kind.images == "oe" and kind.outliers in ("initial", "kcenter", "real") else [])

    def distil(self, cell: Cell) -> Stage:
        """Stage 1; if the method needs experts, those before it."""
        script = SCRIPTS[cell.kind]
        own = [] if cell.kind == "plain" else ["lambda_oe", "outliers", cell.kind]
        flags, before = self._flags(cell, "dsa_strategy", "stage1", *own), []
        if self["method"][0] in ("MTT", "TGDD"):
            before = [self.experts(cell.kind, _parsed(script, tuple(flags)))]
            flags += ["--buffer_path", str(before[0].folder)]
        return self._stage(script, flags, self.out / cell.folder / "1-distilled", *before)

    def experts(self, images: str, distils: Stage1Settings) -> Stage:
        """The experts of a method, as the flags of stage 1 lead to them, but for those of the section `experts`.

        Equal flags share a folder.
        """
        own = METHODS[distils.method].own(distils).of_experts()
        flags: list[dict | str] = ["all", "dsa_strategy", {"outliers": "none"}]
        if images != "plain":
            flags += [{"outliers": images, "lambda_oe": str(own.lambda_oe)}, images]
        usual = {n: str(v) for n in OF_EXPERTS if (v := getattr(own, n)) != getattr(ExpertSettings, n)}
        words = self._words(*flags, usual, "experts")
        name = f"{images}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}"
        return self._stage("train_experts.py", words, self.shared / "buffers" / name)

    def files(self) -> list[Stage]:
        """The commands that make files which are needed and not there."""
        wanted = [Path(*self["stage3.ood_path"], name) for name in self["stage3.ood_sets"]]
        wanted += [Path(path).with_suffix("") for path in self["oe.oe_data_path"] if self._needs_pool()]
        source = self._words(self._some("all", "data_path", "download"))
        missing = [f for f in self.settings["files"] if not Path(f).exists() and Path(f).with_suffix("") in wanted]
        return [Stage((*words_of(self.settings["files"][file]), *source)) for file in missing]

    def inputs(self) -> list[str]:
        """The flags of `check_inputs.py`."""
        pool = self._some("oe", "oe_data_path") if self._needs_pool() else {}
        sets = self._some("stage3", "ood_path", "ood_sets", "skip_missing", "validate")
        return self._words(self._some("all", "dataset", "data_path", "download", "pixel_max"), sets, pool)

    def _needs_pool(self) -> bool:
        return any(kind_named(kind).images == "oe" for kind in self["kinds"])

    def _some(self, section: str, *names: str) -> dict:
        return {name: value for name, value in self.settings[section].items() if name in names}

    def _flags(self, cell: Cell, *parts: dict | str) -> list[str]:
        """The flags of a stage of a cell; `parts` as in `_words`."""
        return self._words("all", {"ipc": "1" if cell.whole else cell.ipc, "seed": cell.seed}, "method", *parts)

    def _words(self, *parts: dict | str) -> list[str]:
        """Flags as words; each part holds flags, or names a section or a value. Later parts go before earlier ones."""
        found: dict = {}
        for part in parts:
            value = self.settings[part] if isinstance(part, str) else part
            found |= value if isinstance(value, dict) else {part: value}
        values = {name: words_of(value) for name, value in found.items()}
        values = {name: words for name, words in values.items() if words not in ([], ["false"])}
        return [w for name, words in values.items() for w in (f"--{name}", *([] if words == ["true"] else words))]

    def _stage(self, script: str, flags: Sequence[str], folder: Path, *before: Stage, shares: str = "") -> Stage:
        _parsed(script, tuple(flags))
        return Stage((script, *flags), folder, before, shares)


@cache
def _parsed(script: str, flags: tuple[str, ...]) -> Settings:
    """The flags as the script reads them; an unknown one ends this script with its message."""
    of_file = value_in(underscored(flags), "method_file") is not None  # it adds its flags to the parser
    return (_parser.__wrapped__ if of_file else _parser)(script).parse_args(flags)


@cache
def _parser(script: str) -> Parser:
    """The parser of a script, which names this one in its messages."""
    parser = importlib.import_module(Path(script).stem).get_args_parser()
    parser.prog = f"table.py: {script}"
    return parser


def _given(args: argparse.Namespace) -> dict:
    """The values of the command line, in the form of a config file."""
    given: dict = {name: value for name in AT_TOP if (value := getattr(args, name)) is not None}
    for text in args.set:
        path, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set: {text!r} has no value; give NAME=VALUE, e.g. stage1.Iteration=50")
        for name in reversed(path.split(".")):
            value = {name: value}
        given = merge(given, value)
    return given


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "table.py")
