"""Draw the figures of README and docs from the CSV files of assets/results.

    python scripts/tables/figures.py            # all of them, into assets/
    python scripts/tables/figures.py outliers detectors
    python scripts/tables/figures.py pipeline --pictures RUN/res_….pt data    # its pictures anew, of a set of CIFAR-10

Each has a white ground, marks that differ in shape as well as in colour, and axes that need not start at zero: dots,
not bars. Whiskers are one standard deviation over networks, or where it is said one standard error over seeds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.tables.drawing import BLACK, BLUE, GREY, RED, RESULTS, dots, dumbbells, values
from scripts.tables.pipeline import keep_pictures, pipeline
from utils.core.files import atomic_write
from utils.core.run_script import run_script
from utils.report.results import load_study_csv
from utils.report.study import StudyColumn, paired, places_of_kinds, read_kind
from utils.settings.parser import Parser, one_of

OUT = ROOT / "assets"
KINDS = {
    "plain": "none",
    "poe": "POE, distilled",
    "poe-initial": "POE, start",
    "poe-kcenter": "POE, k-center",
    "oe": "OE, distilled",
    "poe-corrupt": "POE, on the fly",
    "whole": "whole set, none",
    "whole-corrupt": "whole set, on the fly",
}


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Draw the figures of README and docs from the CSV files of assets/results.")
    parser.add_argument("figures", nargs="*", type=one_of("figure", FIGURES), help="which; left out: all")
    parser.add_argument(
        "--pictures", nargs=2, metavar=("RES", "DATA_PATH"),
        help="first write the pictures of the pipeline: of a distilled set of CIFAR-10 with POE outliers, and its data",
    )  # fmt: skip
    return parser


def outliers() -> Figure:
    """What outliers buy: AUROC, accuracy and ECE of each kind."""
    study = load_study_csv(RESULTS / "cifar10-dm-ipc10-convnet-bf16.csv")
    kinds = [kind for kind in KINDS if kind in study]
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1.2, 1.2])
    dots(axes[0], [values(study, kind, "auroc", "msp") for kind in kinds], "AUROC, msp (%) →")
    dots(axes[1], [values(study, kind, "accuracy") for kind in kinds], "accuracy (%) →", "s", BLACK)
    dots(axes[2], [values(study, kind, "ece") for kind in kinds], "← ECE (%)", "D", RED)
    axes[0].set_yticks(-np.arange(len(kinds)), [KINDS[kind] for kind in kinds])
    for axis in axes:
        axis.axhline(-5.5, color=GREY, linewidth=0.8, linestyle="--")
    figure.suptitle(
        "CIFAR-10, ConvNet, ten distilled images per class (DM): which outliers (bars: one deviation over networks)",
        fontsize=11,
    )
    return figure


def detectors() -> Figure:
    """Dumbbells: each score without outliers (hollow) and with those of POE (filled), fitted on either set."""
    study = load_study_csv(RESULTS / "cifar10-dm-ipc10-convnet-detectors.csv")
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    fits = {"fit-distilled": "fitted on the distilled images", "fit-real": "fitted on the real images"}
    for axis, (fit, title) in zip(figure.subplots(1, 2), fits.items(), strict=True):
        none, poe = f"{fit}/plain", f"{fit}/poe"
        scores = next(iter(study[none].values())).scores()
        means = {s: [values(study, kind, "auroc", s).mean() for kind in (none, poe)] for s in scores}
        defined = {score: pair for score, pair in means.items() if np.isfinite(pair).all()}
        order = dumbbells(axis, defined, ("none", "POE"), "mean AUROC (%)")
        axis.axvline(means["msp"][1], color=GREY, linewidth=0.8, linestyle=":")
        axis.get_yticklabels()[order.index("msp")].set_fontweight("bold")
        axis.set_title(title, fontsize=10)
    figure.suptitle(
        "CIFAR-10, ConvNet, DM   ○ without outliers   ■ with distilled POE outliers   dotted: msp with outliers",
        fontsize=10,
    )
    return figure


def calibration() -> Figure:
    """Dumbbells: ECE as trained (hollow) and with a temperature fitted on the real training images (filled)."""
    kinds = {
        "DM, none": ("cifar10-dm-ipc10-convnet-detectors.csv", "plain"),
        "DM, distilled (POE)": ("cifar10-dm-ipc10-convnet-detectors.csv", "poe"),
        "TGDD, 1,000 epochs, distilled (POE)": ("cifar10-tgdd-detectors.csv", "poe"),
        "TGDD, 1,000 epochs, on the fly": ("cifar10-tgdd-detectors.csv", "poe-corrupt"),
    }
    pairs = {}
    for name, (file, kind) in kinds.items():
        study = load_study_csv(RESULTS / file)
        pairs[name] = [values(study, f"fit-real/{kind}", measure).mean() for measure in ("ece", "scaled_ece")]
    figure = Figure(figsize=(6.4, 2.4), layout="constrained")
    axis = figure.subplots()
    dumbbells(axis, pairs, ("as trained", "with a temperature"), "ECE (%), CIFAR-10, ConvNet, ten images per class")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


MINUS = {  # what distilled outliers are compared with, and its mark
    "poe-initial": ("minus random ones (mostly the start)", "o"),
    "poe-corrupt": ("minus those made on the fly", "s"),
}


def worth() -> Figure:
    """Forest plot: distilled outliers minus others on the same images, paired by seed, two standard errors."""
    studies = {  # group of kinds in a CSV file: label, kind of the distilled outliers
        "digits-outlier-flags.csv/DSA/published": ("Digits, DSA, ipc 1", "poe"),
        "digits-methods.csv/ipc1/DC": ("Digits, DC, ipc 1", "poe"),
        "digits-methods.csv/ipc10/DC": ("Digits, DC, ipc 10", "poe"),
        "digits-methods.csv/ipc10/MTT": ("Digits, MTT, ipc 10", "poe"),
        "cifar10-dm-ipc10-convnet-bf16.csv": ("CIFAR-10, DM, ipc 10", "poe"),
        "digits-ipc10-dm-mixed-spread.csv": ("Digits, DM, ipc 10, --spread_oe 100", "poe"),
        "digits-tgdd.csv": ("Digits, TGDD, ipc 10", "poe"),
        "cifar10-tgdd-ablation.csv/tgdd": ("CIFAR-10, TGDD, ipc 10, ConvNetW32", "poe"),
        "cifar10-tgdd-ipc10.csv/convnet": ("CIFAR-10, TGDD, ipc 10, ConvNet", "poe"),
        "cifar10-w32-ipc10-strong-5networks.csv": (
            "CIFAR-10, MTT, ipc 10,\n--expert_lambda_oe 2, corrupted again",
            "poe-again",
        ),
        "fashion-mnist-w32-ipc10-strong.csv": ("FashionMNIST, MTT, ipc 10,\n--expert_lambda_oe 2", "poe"),
    }
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (measure, score) in zip(axes, (("auroc", "msp"), ("accuracy", "")), strict=True):
        column = StudyColumn(measure, score)
        for shift, (other, (label, marker)) in zip((0.14, -0.14), MINUS.items(), strict=True):
            rows = [
                (read_kind(RESULTS / group / kind, kind), read_kind(RESULTS / group / other, other))
                for group, (_, kind) in studies.items()
            ]
            gaps = [paired(*row, column) for row in rows]
            axis.errorbar(
                [g.mean() for g in gaps], shift - np.arange(len(gaps)),
                xerr=[2 * g.std(ddof=1) / np.sqrt(len(g)) for g in gaps],
                fmt=marker, color=BLUE if shift > 0 else RED, mfc="white" if shift > 0 else RED, capsize=2, label=label,
            )  # fmt: skip
        axis.axvline(0, color=BLACK, linewidth=0.8)
        axis.axhline(0.5 - list(studies).index("digits-ipc10-dm-mixed-spread.csv"), color=GREY, linewidth=0.8, ls="--")
        axis.set_title(f"{column.shown.title}: distilled minus others, points", fontsize=9)
        axis.grid(axis="x", linewidth=0.4, alpha=0.6)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(-np.arange(len(studies)), [label for label, _ in studies.values()], fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def sets() -> Figure:
    """Heat map: AUROC of each kind of outliers on each OOD set, near ones first (similar, says OpenOOD)."""
    study = load_study_csv(RESULTS / "cifar10-dm-ipc10-convnet-bf16.csv")
    kinds = [kind for kind in KINDS if kind in study]
    names = {"CIFAR100": "CIFAR-100\n(near)", "TinyImageNet_resize": "TinyImageNet\n(near)"}
    names |= {"Places": "Places\n(far)", "Textures": "Textures\n(far)"}
    cells = np.array([[values(study, kind, "auroc", "msp", [name]).mean() for name in names] for kind in kinds])
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(cells, cmap="Blues", aspect="auto", vmin=50, vmax=90)
    for y, x in np.ndindex(cells.shape):
        axis.text(x, y, f"{cells[y, x]:.1f}", ha="center", va="center", color="white" if cells[y, x] > 74 else BLACK)
    axis.set_xticks(range(len(names)), names.values(), fontsize=9)
    axis.set_yticks(range(len(kinds)), [KINDS[kind] for kind in kinds], fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(
        "AUROC (msp, %) by OOD set (near: similar to CIFAR-10); ConvNet, DM, ten images per class", fontsize=9
    )
    return figure


def tradeoff() -> Figure:
    """Accuracy against AUROC: a point for each method, outliers, network and ipc on CIFAR-10."""
    groups = {  # group of kinds: method, ipc, whether with the paper's ConvNet
        **{f"cifar10-w32-methods.csv/ipc1/{m}": (m, 1, False) for m in ("DC", "DSA", "DM", "MTT")},
        **{f"cifar10-w32-methods.csv/ipc10/{m}": (m, 10, False) for m in ("DC", "DSA", "DM")},
        "cifar10-w32-ipc10-mtt-plain.csv": ("MTT", 10, False),
        "cifar10-dm-ipc10-convnet-bf16.csv": ("DM", 10, True),
        "cifar10-tgdd-ipc10.csv/convnet": ("TGDD", 10, True),
        "cifar10-tgdd-ipc10.csv/convnet-1000-epochs": ("TGDD", 10, True),
        "cifar10-tgdd-ablation.csv/tgdd": ("TGDD", 10, False),
    }
    notes = {  # beside the mark that is most to the right
        ("cifar10-tgdd-ipc10.csv/convnet-1000-epochs", "TGDD"): "more\ntraining",
        ("cifar10-dm-ipc10-convnet-bf16.csv", "whole set"): "5 epochs",
        ("cifar10-tgdd-ipc10.csv/convnet", "whole set"): "20 epochs",
    }
    markers = {"DC": "v", "DSA": "^", "DM": "o", "MTT": "s", "TGDD": "D", "whole set": "*"}
    colors = {"plain": BLACK, "poe": BLUE, "poe-corrupt": RED, "whole": BLACK, "whole-corrupt": RED}
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axis = figure.subplots()
    for group, (method, ipc, paper) in groups.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for kind, place in places_of_kinds(RESULTS / group, list(colors)).items():
            row, shape = read_kind(place, kind), "whole set" if kind.startswith("whole") else method
            x, y = (100 * np.mean([*row.by_run(StudyColumn(*m)).values()]) for m in (("accuracy",), ("auroc", "msp")))
            axis.plot(
                x, y, markers[shape], color=colors[kind], mfc=colors[kind] if ipc == 10 else "white",
                markersize=(9 if paper else 5.5) + 3 * (shape == "whole set"),
            )  # fmt: skip
            lines.setdefault(shape, []).append((x, y))
        for shape, points in lines.items():
            axis.plot(*zip(*points, strict=True), color=GREY, linewidth=0.7, zorder=0)
            axis.annotate(notes.get((group, shape), ""), max(points), (8, -3), textcoords="offset points", fontsize=8)
    _trade_legend(axis, markers)
    axis.set_xlim(right=90)
    axis.set_xlabel("accuracy (%) →")
    axis.set_ylabel("mean AUROC, msp (%) →")
    axis.grid(linewidth=0.4, alpha=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("CIFAR-10: from the worst images to the best, accuracy and AUROC both rise", fontsize=10)
    return figure


def _trade_legend(axis: Axes, markers: dict[str, str]) -> None:
    """What form, colour, filling and size of a mark mean; `markers`: its form by the method."""
    for name, marker in markers.items():
        axis.plot([], [], marker, color=GREY, label=name, ls="")
    for name, color in (("without outliers", BLACK), ("distilled outliers", BLUE), ("on the fly", RED)):
        axis.plot([], [], "_", color=color, markeredgewidth=4, label=name, ls="")
    axis.plot([], [], color=GREY, linewidth=0.7, label="one method, with the same settings")
    axis.plot([], [], "o", color=GREY, mfc="white", label="one image per class", ls="")
    axis.plot([], [], "o", color=GREY, markersize=9, label="large: the paper's ConvNet", ls="")
    axis.plot([], [], "o", color=GREY, markersize=5.5, label="small: ConvNetW32", ls="")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def weight() -> Figure:
    """AUROC, ECE and accuracy by the weight of outliers in stage 2, two networks."""
    names = {
        "cifar10-dm-ipc10-convnet-lambda": ("ConvNet", "o", BLUE),
        "cifar10-dm-ipc10-w32-lambda": ("ConvNetW32", "s", RED),
    }
    figure = Figure(figsize=(8.6, 2.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, (label, marker, color) in names.items():
        study = load_study_csv(RESULTS / f"{name}.csv")
        weights = sorted((kind for kind in study if kind.replace(".", "").isdigit()), key=float)
        at = [float(w) for w in weights]
        for axis, (measure, score) in zip(axes, (("auroc", "msp"), ("ece", ""), ("accuracy", "")), strict=True):
            rows = [values(study, w, measure, score) for w in weights]
            means, spread = (np.array([of(row) for row in rows]) for of in (np.mean, np.std))
            axis.plot(at, means, marker=marker, color=color, label=label, markersize=5)
            axis.fill_between(at, means - spread, means + spread, color=color, alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("AUROC, msp (%)", "ECE (%)", "accuracy (%)"), strict=True):
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xticks([0, 0.1, 0.25, 0.5, 1, 2], ["0", ".1", ".25", ".5", "1", "2"])
        axis.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("--lambda_oe (dotted: published)", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        "CIFAR-10, DM, ten images per class, distilled POE outliers (shaded: one deviation over networks)", fontsize=10
    )
    return figure


def speed() -> Figure:
    """How many times as fast as the textbook loop: each work of the benchmarks, by precision."""
    names = {
        "cpu-avx512-w32-ipc2": ("ConvNetW32", {"iteration": "DSA", "stage2": "stage 2", "stage3": "scores"}),
        "cpu-avx512-convnet-ipc2": ("ConvNet", {"iteration": "DSA", "stage3": "scores"}),
        "cpu-avx512-methods-w32": ("ConvNetW32", {"dm": "DM", "mtt": "MTT", "experts": "expert"}),
        "cpu-avx512-methods-convnet": ("ConvNet", {"dm": "DM"}),
        "cpu-amx-tgdd": ("ConvNet", {"tgdd": "TGDD"}),
    }
    runs = json.loads((RESULTS / "benchmarks.json").read_text())
    rows: dict[str, list[float]] = {}
    for name, (network, works) in names.items():
        found = [runs[f"{name}{end}"]["results"] for end in ("", "-bf16")]
        rows |= {f"{title}, {network}": [results[work]["ratio"] for results in found] for work, title in works.items()}
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axis = figure.subplots()
    dumbbells(
        axis,
        rows,
        ("float32", "bf16"),
        "times as fast as the textbook loop that ran beside it (CPU, two cores, compiled)",
    )
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axis.minorticks_off()
    axis.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "pipeline": pipeline,
    "outliers": outliers,
    "detectors": detectors,
    "calibration": calibration,
    "worth": worth,
    "sets": sets,
    "tradeoff": tradeoff,
    "weight": weight,
    "speed": speed,
}


def main(args: argparse.Namespace) -> None:
    """Draw them, and say where they are."""
    if args.pictures:
        keep_pictures(*args.pictures)
    for name in args.figures or FIGURES:
        figure, path = FIGURES[name](), OUT / f"{name}.png"
        atomic_write(path, lambda file, figure=figure: figure.savefig(file, format="png", dpi=130))
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "figures.py")
