"""What a table script measured: mean rows, and differences paired by seed, in markdown.

    python scripts/study.py result-tables/digits/ipc1 --base poe --kinds plain poe poe-initial
    python scripts/study.py A/ipc1 B/ipc1 --prefixes DSA DM --base poe --against poe-initial poe-corrupt --out study.md
    python scripts/study.py assets/results/digits-methods.csv/ipc1/DSA --base poe

A folder holds kinds, and each kind `seed<number>` folders, as the table scripts write them.
scripts/tables/keep_results.py copies the measures of such folders into a CSV file, in which a path names the kinds.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.kinds import KINDS
from utils.core.errors import UserError, unknown_name
from utils.core.files import save_output
from utils.core.run_script import run_script
from utils.report.results import odd_sizes, protocol_line
from utils.report.study import (
    NamedResults,
    StudyColumn,
    differences,
    mean_rows,
    places_of_kinds,
    read_kind,
    score_rows,
)
from utils.report.tables import OF_NETWORKS, OF_OOD
from utils.settings.parser import Parser, one_of


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Mean rows and paired differences of what a table script measured.")
    parser.add_argument(
        "folders", nargs="+", help="folders of kinds, e.g. result-tables/digits/ipc1, or CSV files of studies"
    )
    parser.add_argument("--prefixes", nargs="+", default=None, help="one word per folder that its rows begin with")
    parser.add_argument("--kinds", nargs="+", default=None, help="the kinds to show, in order; left out: all, by name")
    parser.add_argument("--base", default=None, help="the kind whose difference to each other kind is shown")
    parser.add_argument("--against", nargs="+", default=None, help="the kinds to compare --base with; left out: all")
    parser.add_argument(
        "--scores",
        nargs="+",
        default=None,
        help="OOD scores; left out: those of msp and mls that were measured, or with --by_score all",
    )
    parser.add_argument(
        "--of_networks", nargs="*", type=one_of("measure", OF_NETWORKS), default=["accuracy", "ece"],
        help=f"measures of the networks, out of {', '.join(OF_NETWORKS)}",
    )  # fmt: skip
    parser.add_argument(
        "--measures", nargs="+", type=one_of("measure", OF_OOD), default=["auroc", "fpr_in"],
        help=f"measures of OOD detection, out of {', '.join(OF_OOD)}",
    )  # fmt: skip
    parser.add_argument(
        "--by_score", type=one_of("measure", OF_OOD), default=None,
        help="instead, one table of this measure: a row for each score, a column for each kind",
    )  # fmt: skip
    parser.add_argument(
        "--by_set", type=one_of("measure", OF_OOD), default=None,
        help="instead of all measures this one: a column for each score and OOD set",
    )  # fmt: skip
    parser.add_argument(
        "--groups", nargs="+", metavar="NAME=SET,SET", type=group_of_sets, default=None,
        help="with --by_set: means over groups of OOD sets, in the place of each set",
    )  # fmt: skip
    parser.add_argument("--sets", action="store_true", help="show each OOD set, too, beside the mean")
    parser.add_argument("--out", default=None, help="markdown file to write")
    return parser


def group_of_sets(text: str) -> tuple[str, list[str]]:
    """A name and the OOD sets that it stands for; the check of `--groups`."""
    name, _, sets = text.partition("=")
    if not name or not all(sets.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no group; write NAME=SET,SET")
    return name, sets.split(",")


def main(args: argparse.Namespace) -> None:
    """Print the tables, and write them if asked."""
    text = study_text(args)
    print(text, end="")
    if args.out:
        save_output(args.out, text)


def study_text(args: argparse.Namespace) -> str:
    """The tables in markdown."""
    folders = [Path(folder) for folder in args.folders]
    if args.groups and not args.by_set:
        raise UserError("--groups: it needs --by_set MEASURE; give both")
    if args.prefixes and len(args.prefixes) != len(folders):
        raise UserError(f"--prefixes: {len(args.prefixes)} words for {len(folders)} folders; give one each")
    studies = read_studies(folders, args.prefixes or [""] * len(folders), args.kinds)
    kinds = list({id(kind): kind for study in studies for kind in study.values()}.values())
    if args.against and not args.base:
        raise UserError("--against: it names what --base is compared with; give --base")
    check_sets(kinds)
    if args.by_score:
        if unused := [name for name in ("base", "against", "by_set", "sets") if getattr(args, name)]:
            raise UserError(f"--{unused[0]}: --by_score is one table without it; leave one of them out")
        measured = dict.fromkeys(s for kind in kinds for results in kind.runs.values() for s in results.scores())
        if missing := [score for score in args.scores or [] if score not in measured]:
            raise UserError(f"--scores: no kind has {missing[0]}; they have {', '.join(measured)}")
        parts = [score_rows(kinds, args.scores or list(measured), args.by_score)]
    else:
        parts = tables(args, studies, kinds, args.scores or default_scores(kinds))
    trained = protocol_line([(kind.name, kind.protocols) for kind in kinds])
    return "\n\n".join([trained, *parts]) + "\n"


def tables(
    args: argparse.Namespace, studies: list[dict[str, NamedResults]], kinds: list[NamedResults], scores: list[str]
) -> list[str]:
    """The mean rows, the differences, and the rows of each OOD set, as the flags say."""
    for kind in kinds:
        for results in kind.runs.values():
            if missing := [score for score in scores if score not in results.scores()]:
                raise UserError(
                    f"--scores: {missing[0]} is not in {kind.name}, which has {', '.join(results.scores())}"
                )
    names = next(iter(kinds[0].runs.values())).ood_sets()
    columns = [*map(StudyColumn, args.of_networks), *columns_of(scores, args.measures, None)]
    if args.by_set:
        groups = args.groups or [("", [name]) for name in names]
        if odd := [name for _, sets in groups for name in sets if name not in names]:
            raise UserError(f"--groups: {unknown_name('OOD set', odd[0], names)}")
        columns = [StudyColumn(args.by_set, score, sets, group) for score in scores for group, sets in groups]
    parts = [mean_rows(kinds, columns)]
    if args.base:
        parts += paired(studies, args.base, args.against, columns)
    if args.sets:
        parts += [mean_rows(kinds, columns_of(scores, args.measures, name)) for name in names]
    return parts


def default_scores(kinds: list[NamedResults]) -> list[str]:
    """Those of msp and mls that every run measured; msp if there is none."""
    runs = [results for kind in kinds for results in kind.runs.values()]
    return [score for score in ("msp", "mls") if all(score in results.scores() for results in runs)] or ["msp"]


def check_sets(kinds: list[NamedResults]) -> None:
    """Raise `UserError` unless all were measured on the same OOD sets; means over others do not compare."""
    measured = [(f"{kind.name}, seed {seed}", results) for kind in kinds for seed, results in kind.runs.items()]
    first, known = measured[0]
    if odd := odd_sizes(measured):
        raise UserError(f"{odd}: means over other images do not compare; measure all on the same files")
    for name, results in measured:
        if odd := sorted({*known.ood_sets()} ^ {*results.ood_sets()}):
            raise UserError(
                f"{name}, was not measured on the same OOD sets as {first}: {', '.join(odd)} only in one of them; "
                "measure both on the same --ood_sets"
            )


def columns_of(scores: list[str], measures: list[str], name: str | None) -> list[StudyColumn]:
    """The columns of OOD detection, on the set `name`, or (None) in the mean."""
    return [StudyColumn(measure, score, name and [name]) for score in scores for measure in measures]


def read_studies(folders: list[Path], prefixes: list[str], names: list[str] | None) -> list[dict[str, NamedResults]]:
    """The kinds in each folder or CSV file, by name."""
    studies: list[dict[str, NamedResults]] = []
    read: dict[tuple[Path, str], NamedResults] = {}
    for folder, prefix in zip(folders, prefixes, strict=True):
        keys = {name: (place, title(name, prefix)) for name, place in places_of_kinds(folder, names).items()}
        read |= {key: read_kind(*key) for key in keys.values() if key not in read}
        studies.append({name: read[key] for name, key in keys.items()})
    found = {name for study in studies for name in study}
    if missing := [name for name in names or [] if name not in found]:
        raise UserError(f"--kinds: no folder {missing[0]} in {' or '.join(map(str, folders))}")
    if not found:
        raise UserError(f"{folders[0]} holds no kinds with results of stage 3; give folders that a table script wrote")
    return studies


def paired(
    studies: list[dict[str, NamedResults]], base: str, against: list[str] | None, columns: list[StudyColumn]
) -> list[str]:
    """A table of differences for each study that has the kind `base`."""
    parts = []
    if missing := [name for name in against or [] if not any(name in study for study in studies)]:
        raise UserError(f"--against: no folder holds {missing[0]}")
    for study in studies:
        others = [kind for name, kind in study.items() if name != base and name in (against or study)]
        if base in study and others:
            parts.append(differences(study[base], others, columns))
    if not parts:
        raise UserError(f"--base: no folder holds {base} and a kind to compare it with")
    return parts


def title(kind: str, prefix: str) -> str:
    """The row's name, e.g. `DSA, distilled`; a folder that is named otherwise is a row of that name."""
    if kind in KINDS:
        return KINDS[kind].title(prefix)
    return f"{prefix}, {kind}" if prefix else kind


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "study.py")
