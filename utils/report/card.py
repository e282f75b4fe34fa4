"""The README.md of a published distilled set: a dataset card of the Hugging Face hub that says how to use the set."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.compute.version import versions, versions_line
from utils.data.augment import dc_augmentation
from utils.report.results import Results, shared_sets
from utils.report.tables import markdown_table, mean_std

PATH_FLAGS = ("data_path", "oe_data_path", "ood_path", "buffer_path", "save_path", "load_path", "resume", "method_file")
SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))


@dataclass(frozen=True)
class CardFacts:
    """What the card says of a set.

    `shape`: `(C, H, W)`; `counts`: images and outliers; `labels`: `hard` or `soft`; `mean`, `std`: per channel, or
    `zca`: whitened instead; `learning_rate`: the stored one; `strategy`: the augmentation of training; `origin`: the
    content of the run's `args.json`, or empty; `source`: what was assumed of a set of another repository; `results`:
    by title, those of stage 3.
    """

    dataset: str
    method: str
    num_classes: int
    shape: tuple[int, int, int]
    counts: tuple[int, int]
    labels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    zca: bool = False
    learning_rate: float | None = None
    license: str = "unknown"
    strategy: str | None = None
    origin: dict = field(default_factory=dict)
    source: str = ""
    results: dict[str, Results] = field(default_factory=dict)


def card(f: CardFacts) -> str:
    """The text of the card, in markdown with the hub's front matter."""
    images, outliers = f.counts
    by = f" by {f.method}" if f.method else ""
    title = f"{f.dataset} distilled{by}: {images} images" + (f", {outliers} outliers" if outliers else "")
    parts = [
        _front_matter(f, title),
        f"# {title}",
        "![the images, a row for each class](preview.png)",
        _what(f),
        "## Load",
        _load(f),
        "## Train on it",
        _train(f),
        "## How it was made",
        _origin(f),
        "## Measured",
        _measured(f.results),
        "## What it is not for",
        _limits(f),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(f: CardFacts, title: str) -> str:
    size = next((name for most, name in SIZES if sum(f.counts) < most), "100K<n<1M")
    tags = [
        "dataset-distillation",
        "dataset-condensation",
        f.dataset.lower(),
        *([f.method.lower()] if f.method else []),
    ]
    tags += ["out-of-distribution-detection", "outlier-exposure"] if f.counts[1] else []
    lines = ["---", f"license: {_yaml(f.license)}", f"pretty_name: {_yaml(title)}"]
    lines += ["task_categories:", "- image-classification", "tags:", *(f"- {_yaml(tag)}" for tag in tags)]
    lines += ["size_categories:", f"- {size}", "---"]
    return "\n".join(lines)


def _yaml(text: str) -> str:
    """A string of YAML: plain if it is one word, else quoted."""
    return text if re.fullmatch(r"[A-Za-z][\w.-]*", text) else json.dumps(text)


def _what(f: CardFacts) -> str:
    images, outliers = f.counts
    shape = "×".join(map(str, f.shape))
    text = (
        f"{images} synthetic images of {shape} that stand for the training set of {f.dataset} ({f.num_classes} "
        f"classes), with {f.labels} labels."
    )
    if outliers:
        text += (
            f" {outliers} outliers come with them: networks learn to be uncertain on these (outlier exposure), so that "
            "they detect unknown images better."
        )
    return (
        f"{text}\n\nOnly `distilled.safetensors` is needed. The PNG files show the same images, clipped to the range "
        "of pixels and rounded to 8 bits."
    )


def _load(f: CardFacts) -> str:
    labels = "soft_labels" if f.labels == "soft" else "labels"
    kind = "probabilities [N, classes]" if f.labels == "soft" else "int64 [N]"
    lines = [
        "import torch",
        "from safetensors.torch import load_file",
        "",
        'distilled = load_file("distilled.safetensors")',
        f'images, labels = distilled["images"], distilled["{labels}"]  # float32 [N, C, H, W], normalised; {kind}',
    ]
    if f.counts[1]:
        lines.append('outliers = distilled["outliers"]  # normalised like the images')
    if f.zca:
        lines += [
            'mean, matrix = distilled["zca_mean"], distilled["zca_matrix"]',
            "normalise = lambda x: ((x.flatten(1) - mean) @ matrix).view_as(x)  # of pixels [N, C, H, W] from 0 to 1",
        ]
    else:
        lines += [
            f"mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in ({_numbers(f.mean)}, {_numbers(f.std)}))",
            "normalise = lambda x: (x - mean) / std  # of pixels [N, C, H, W] from 0 to 1",
        ]
    block = "```python\n" + "\n".join(lines) + "\n```"
    return (
        f"`pip install torch safetensors`, and in this folder:\n\n{block}\n\nThe images are not pixels. Apply "
        "`normalise` to test images, too."
    )


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(repr(float(v)) for v in values) + "]"


def _train(f: CardFacts) -> str:
    script = "train_model_synthetic_oe.py" if f.counts[1] else "train_model_synthetic_no_oe.py"
    flags = f.origin.get("flags") or {}
    command = ["python", script, "--distilled", "SET", "--dataset", f.dataset, "--model", flags.get("model", "ConvNet")]
    command += ["--method", f.method] if flags.get("method") == f.method else []
    command += ["--dsa_strategy", f.strategy] if f.strategy else []
    command += ["--im_size", str(flags["im_size"])] if flags.get("im_size") else []
    command += ["--zca"] if f.zca else []
    command += ["--lambda_oe", f"{flags.get('lambda_oe', 0.5):g}"] if f.counts[1] else []
    text = f"With the code of TrustDD (this folder is `SET`):\n\n```\n{shlex.join(command)}\n```"
    hints = [
        f"{_epochs(f)} epochs of SGD with batches of 256, learning rate "
        f"{0.01 if f.learning_rate is None else f.learning_rate:g}, momentum 0.9 and weight decay 0.0005; the learning "
        "rate drops to a tenth after half the epochs."
    ]
    if f.learning_rate is not None:
        hints.append("The learning rate was distilled, too; the command uses it.")
    if f.strategy:
        hints.append("Without the augmentation, accuracy falls by many points.")
    if f.counts[1]:
        hints.append(
            "The loss is the cross-entropy on the images plus `--lambda_oe` times the cross-entropy from the uniform "
            "distribution to the predictions on the outliers."
        )
    return f"{text}\n\n{' '.join(hints)}"


def _epochs(f: CardFacts) -> int:
    """The default of stage 2 with the flags of `_train`."""
    augmented = f.strategy or dc_augmentation(f.dataset, (f.origin.get("flags") or {}).get("model", "ConvNet"))
    return 1000 if augmented else 300


def _origin(f: CardFacts) -> str:
    if f.source:
        return f"Converted from the files of another repository. {f.source}"
    about = f.origin
    stopped = about.get("stopped")  # publish.py adds it
    rows = [
        ("command", f"`{_command(about)}`"),
        *([("stopped", f"after iteration {stopped[0]} of {stopped[1]}")] if stopped else []),
        ("commit of TrustDD", f"`{about.get('git_commit') or 'unknown'}`"),
        ("seed", str((about.get("flags") or {}).get("seed", "unknown"))),
        ("versions", versions_line(about.get("versions") or versions())),
        ("date", str(about.get("started", "unknown"))),
    ]
    return markdown_table(["", ""], [list(row) for row in rows])


def _command(about: dict) -> str:
    """The command, without the paths of the machine."""
    try:
        words = shlex.split(str(about.get("command", "")).partition(".py ")[2])
    except ValueError:
        words = []
    paths = [f"--{name}" for name in PATH_FLAGS]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = [word.replace("-", "_").replace("__", "--", 1) for word in ["", *words]]  # --data-path is --data_path
    shown = [flag[2:].upper() if flag in paths else word for flag, word in zip(flags, words, strict=False)]
    return shlex.join(["python", str(about.get("script", "main.py")), *shown])


def _measured(results: dict[str, Results]) -> str:
    """Accuracy and detection of networks trained on the set, as stage 3 measured them."""
    if not results:
        return "Nothing yet. `test_ood_model_syn.py` measures networks that were trained on it."
    scores = list(dict.fromkeys(score for r in results.values() for score in r.scores()))
    columns = [
        ("accuracy ↑", lambda r: [1 - e for e in r.of_networks("error")]),
        ("ECE ↓", lambda r: r.of_networks("ece")),
    ]
    sets = shared_sets(list(results.values()))
    for score in scores if sets else []:
        columns += [
            (f"mean AUROC ({score}) ↑", lambda r, s=score: r.per_network(None, s, "auroc", sets)),
            (f"mean FPR95 ({score}) ↓", lambda r, s=score: r.per_network(None, s, "fpr_in", sets)),
        ]
    rows = [[f"{len(r.errors)} × {title}", *(mean_std(of(r)) for _, of in columns)] for title, r in results.items()]
    named = f"means over these OOD sets: {', '.join(sets)}" if sets else "no OOD set was measured in all of them"
    return (
        markdown_table(["networks", *(name for name, _ in columns)], rows)
        + f"\n\nPercent, mean ± standard deviation over networks; {named}."
    )


def _limits(f: CardFacts) -> str:
    return "\n".join(
        [
            f"- It does not replace {f.dataset} where decisions about people or safety depend on the network: networks "
            "trained on it are far less accurate than on the whole set, and over-confident on anything unknown.",
            "- It protects no privacy: distilled images can resemble the images that they were made from.",
            "- It was made for one architecture; others train less well on it.",
            "- Numbers measured with other normalisation, augmentation or test images do not compare with those above.",
        ]
    )
