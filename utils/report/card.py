"""The README.md of a published distilled set: a dataset card of the Hugging Face hub that says how to use the set."""

import shlex
from dataclasses import dataclass, field

from utils.compute.version import versions, versions_line
from utils.data.augment import dc_augmentation
from utils.data.synthetic import SyntheticSet
from utils.data.whitening import ZCA
from utils.report.results import Results, protocol_line, shared_sets
from utils.report.study import NamedResults, StudyColumn, mean_rows
from utils.report.tables import markdown_table, render
from utils.settings.fields import flag_words
from utils.settings.parser import value_in

PATH_FLAGS = ("data_path", "oe_data_path", "ood_path", "buffer_path", "save_path", "load_path", "resume", "method_file")
SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
TAGS = ("dataset-distillation", "dataset-condensation")
OUTLIER_TAGS = ("out-of-distribution-detection", "outlier-exposure")


@dataclass(frozen=True)
class Published:
    """A set, the normalisation of its images, and what else its card says of it."""

    synthetic: SyntheticSet
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    zca: ZCA | None  # the images are whitened with it, instead of normalised by mean and std
    dataset: str
    num_classes: int
    origin: dict = field(default_factory=dict)  # the content of the run's args.json
    source: str = ""  # what was assumed of a set of another repository
    class_names: tuple[str, ...] = ()
    method: str = ""
    license: str = "unknown"
    strategy: str | None = None  # the augmentation of training
    results: dict[str, Results] = field(default_factory=dict)  # of stage 3, by title
    decoded: int = 1  # how many parts a side of one image of the source stand in the set as images of their own
    train_command: str = ""  # that trains networks on the set

    @property
    def flags(self) -> dict:
        """The flags of the run."""
        return self.origin.get("flags") or {}


def card(f: Published) -> str:
    """The text of the card, in markdown with the hub's front matter."""
    images, outliers = len(f.synthetic.images), f.synthetic.num_outliers
    by = f" by {f.method}" if f.method else ""
    title = f"{f.dataset} distilled{by}: {images} images" + (f", {outliers} outliers" if outliers else "")
    tags = [*TAGS, f.dataset.lower(), *filter(None, [f.method.lower()]), *(OUTLIER_TAGS if outliers else ())]
    augmented = f.strategy or dc_augmentation(f.dataset, f.flags.get("model", "ConvNet"))
    return render(
        "card.md.j2",
        f=f,
        s=f.synthetic,
        images=images,
        outliers=outliers,
        title=title,
        tags=tags,
        size=next((name for most, name in SIZES if images + outliers < most), "100K<n<1M"),
        epochs=1000 if augmented else 300,
        origin=_origin(f),
        measured=measured_table(f.results),
        measured_sets=", ".join(shared_sets(list(f.results.values()))),
    )


def _origin(f: Published) -> str:
    """A table of what made the set."""
    about = f.origin
    stopped = about.get("stopped")  # publish.py adds it
    rows = {
        "command": f"`{_command(about)}`",
        "stopped": f"after iteration {stopped[0]} of {stopped[1]}" if stopped else "",
        "commit of TrustDD": f"`{about.get('git_commit') or 'unknown'}`",
        "seed": str(f.flags.get("seed", "unknown")),
        "versions": versions_line(about.get("versions") or versions()),
        "date": str(about.get("started", "unknown")),
    }
    return markdown_table(["", ""], [row for row in rows.items() if row[1]])


def _command(about: dict) -> str:
    """The command, without the paths of the machine; with all flags where a `--config` gave some."""
    try:
        words = shlex.split(str(about.get("command", "")).partition(".py ")[2])
    except ValueError:
        words = []
    if value_in(words, "config"):
        words = [word for name, value in (about.get("flags") or {}).items() for word in flag_words(name, value)]
    paths = [f"--{name}" for name in PATH_FLAGS]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = [word.replace("-", "_").replace("__", "--", 1) for word in ["", *words]]  # --data-path is --data_path
    shown = [flag[2:].upper() if flag in paths else word for flag, word in zip(flags, words, strict=False)]
    return shlex.join(["python", str(about.get("script", "main.py")), *shown])


def measured_table(results: dict[str, Results]) -> str:
    """Accuracy and detection of networks trained on the set, as stage 3 measured them."""
    sets = shared_sets(list(results.values()))
    scores = dict.fromkeys(score for r in results.values() for score in r.scores()) if sets else ()
    columns = [StudyColumn("accuracy"), StudyColumn("ece")]
    columns += [StudyColumn(measure, score, sets) for score in scores for measure in ("auroc", "fpr_in")]
    rows = [NamedResults(f"{len(r.errors)} × {t}", {0: r}) for t, r in results.items()]
    trained = protocol_line([(row.name, row.protocols) for row in rows])
    return f"{mean_rows(rows, columns, 'networks')}\n\n{trained}"
