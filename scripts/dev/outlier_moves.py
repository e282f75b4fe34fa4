"""What distilling did to pseudo-outliers: how far they moved, whether they are images, and what networks say of them.

    python scripts/dev/outlier_moves.py result-tables/digits/ipc1/poe result-tables/digits/ipc10/poe --names one ten

Each folder holds stage-1 folders of main_poe.py with --init real, e.g. those of several seeds. The outliers that a run
started from are drawn again; of several experiments the first counts. Networks are trained on the distilled images
alone, and see the outliers before and after. `--picture` shows both for the first run of each folder. `--curves` draws
the measures over the iterations, if each folder holds runs of several --Iteration: a line for each seed.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import numpy as np
import torch
import torch.nn.functional as F

from utils.core.errors import UserError
from utils.core.files import read_json, save_output
from utils.core.rng import generator
from utils.core.run_script import run_script
from utils.data.datasets import RealData, load_dataset
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet, decode, encode
from utils.methods import augmentation_of
from utils.outliers.sources import PseudoOutliers, initial_outliers
from utils.report.plots import save_distilled, save_panels
from utils.report.tables import markdown_table, mean_std
from utils.runs.run_folder import read_metrics
from utils.settings.parser import Parser, count
from utils.training.trainer import Trainer, TrainSettings

COLUMNS = {  # title, factor and digits of each value
    "loss_first": ("matching loss, first tenth", 1, 2),
    "loss_last": ("last tenth", 1, 2),
    "moved": ("moved (RMS, in deviations of the data)", 1, 2),
    "outside": ("pixels outside [0, 1], %", 100, 1),
    "confidence_start": ("confidence at the start, %", 100, 1),
    "confidence": ("confidence after, %", 100, 1),
    "distance_start": ("distance at the start", 1, 3),
    "distance": ("distance after", 1, 3),
}
CURVES = {  # title: the value before the first iteration, and after the last
    "matching loss": (None, "loss_last"),
    "moved (RMS, in deviations of the data)": (None, "moved"),
    "pixels outside [0, 1], %": ("outside_start", "outside"),
    "confidence, %": ("confidence_start", "confidence"),
    "distance of two outliers": ("distance_start", "distance"),
}
LOGARITHMIC = ("matching loss", "moved (RMS, in deviations of the data)")


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="What distilling did to pseudo-outliers.")
    parser.add_argument("folders", nargs="+", help="folders that hold stage-1 folders; each becomes a row")
    parser.add_argument("--names", nargs="+", default=None, help="one name per folder; left out: paths")
    parser.add_argument("--networks", type=count(1), default=2, help="networks trained on each set")
    parser.add_argument("--epochs", type=count(1), default=300, help="their epochs")
    parser.add_argument("--out", default=None, help="markdown file to write")
    parser.add_argument("--picture", default=None, help="PNG file to write: outliers before and after")
    parser.add_argument("--curves", default=None, help="PNG file to write: measures over iterations")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the table, and write it and the pictures if asked."""
    names = args.names or args.folders
    if len(names) != len(args.folders):
        raise UserError(f"--names: {len(names)} names for {len(args.folders)} folders; give one each")
    if len(set(names)) < len(names):
        raise UserError(f"--names: {' '.join(names)} names two folders alike; give each a name of its own")
    rows, firsts, measured = [], [], {}
    for folder, name in zip(args.folders, names, strict=True):
        runs = [r for r in map(read_run, sorted(Path(folder).rglob("args.json"))) if r is not None]
        if not runs:
            raise UserError(f"{folder} holds no finished run of main_poe.py with --init real; give such folders")
        firsts.append((name, *runs[0][:2]))
        measured[name] = [(run[0], measure(*run, args.networks, args.epochs)) for run in runs]
        rows += rows_of(name, measured[name])
    text = markdown_table(("set", "runs", *(title for title, *_ in COLUMNS.values())), rows) + "\n"
    print(text, end="")
    if args.out:
        save_output(args.out, text)
    if args.picture:
        save_distilled(Path(args.picture), before_and_after(firsts))
    if args.curves:
        save_panels(Path(args.curves), curves_of(measured), points=list(CURVES), log=LOGARITHMIC, log_iterations=True)


def rows_of(name: str, runs: list[tuple[dict, dict[str, float]]]) -> list[list[str]]:
    """A row for each number of iterations among `runs`, the flags and the measures of each run."""
    groups: dict[int, list[dict[str, float]]] = {}
    for flags, values in runs:
        groups.setdefault(flags["Iteration"], []).append(values)
    rows = []
    for iterations, group in sorted(groups.items()):
        cells = [mean_std([v[key] for v in group], *unit) for key, (_, *unit) in COLUMNS.items()]
        title = name if len(groups) == 1 else f"{name}, {iterations} iteration{'s' * (iterations != 1)}"
        rows.append([title, str(len(group)), *cells])
    return rows


def curves_of(measured: dict[str, list[tuple[dict, dict[str, float]]]]) -> dict[str, dict]:
    """The panels of `save_panels`: for each folder the measures of its runs by seed and iteration.

    Iteration 0 is the start, seen by the networks of the run with the most iterations.
    """
    panels = {}
    for title, (first, last) in CURVES.items():
        factor = 100 if title.endswith("%") else 1
        panels[title] = {}
        for name, runs in measured.items():
            seeds: dict[int, dict[int, float]] = {}
            for flags, values in sorted(runs, key=lambda run: run[0]["Iteration"]):
                points = seeds.setdefault(flags["seed"], {})
                if first:
                    points[0] = factor * values[first]
                points[flags["Iteration"]] = factor * values[last]
            panels[title][name] = seeds
    return panels


def read_run(path: Path) -> tuple[dict, SyntheticSet, list[float]] | None:
    """Flags, set and losses by iteration of a finished stage-1 run with pseudo-outliers; None for others."""
    about = read_json(path, "arguments")
    sets = sorted(path.parent.glob("res_*.pt"))
    flags = about.get("flags", {})
    if about.get("script") != "main_poe.py" or flags.get("init") != "real" or len(sets) != 1:
        return None
    file = DistilledFile.open(sets[0])
    if file.iterations_left():
        return None
    for name, usual in (("init_oe", "random"), ("load_path", None), ("zca", False)):
        if flags.get(name, usual) != usual:
            raise UserError(
                f"{path.parent} was made with --{name}, whose outliers have another start or range; leave it out"
            )
    lines = [line for line in read_metrics(path.parent) if "loss" in line and line.get("experiment") == 0]
    losses = [line.get("loss_oe", line["loss"]) for line in lines]
    if not losses:
        raise UserError(f"{path.parent}/metrics.jsonl has no losses of the run; leave the run out")
    return flags, file.set().decoded(), losses


def measure(flags: dict, synthetic: SyntheticSet, losses: list[float], networks: int, epochs: int) -> dict[str, float]:
    """The values of `COLUMNS` and `CURVES` of one run."""
    real, start = start_of(flags)
    tenth = max(1, len(losses) // 10)
    values = {
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
        "moved": (synthetic.images_oe - start).square().mean().sqrt().item(),
        "outside_start": share_outside(start, real),
        "outside": share_outside(synthetic.images_oe, real),
    }
    seen = seen_by_networks(flags, real, synthetic, [start, synthetic.images_oe], networks, epochs)
    for name, (confidence, distance) in zip(("_start", ""), seen, strict=True):
        values |= {f"confidence{name}": confidence, f"distance{name}": distance}
    return values


def start_of(flags: dict) -> tuple[RealData, torch.Tensor]:
    """The data of a run, and the outliers that it started from, normalised and decoded `[M, C, H, W]`."""
    dark, factor = flags.get("pixel_max"), flags.get("factor", 1)
    real = load_dataset(flags["dataset"], flags["data_path"], flags["im_size"], False, flags["zca"], dark)
    source = PseudoOutliers(real, tuple(flags["corruptions"]), flags.get("mix_corruptions", False))
    per_slot = flags["ipc"] * factor**2
    slots = initial_outliers(source, per_slot, flags["seed"], 0).split(per_slot)
    return real, decode(torch.cat([encode(of_slot, factor) for of_slot in slots]), factor)


def before_and_after(firsts: list[tuple[str, dict, SyntheticSet]]) -> list[tuple[str, torch.Tensor]]:
    """Titles and images `[num_classes, ipc, C, H, W]` in [0, 1]: what some runs started from, and their ends.

    Runs of one seed start from the same outliers, which are shown once.

    Args:
        firsts: the name, the flags and the set of each run.
    """
    before, after = [], []
    for name, flags, synthetic in firsts:
        real, start = start_of(flags)
        parts = (flags.get("factor", 1) ** 2, real.num_classes, -1)  # part by part, as decoding leaves them
        first, last = (
            real.denormalize(images).unflatten(0, parts).transpose(0, 1).flatten(1, 2)
            for images in (start, synthetic.images_oe)
        )
        if not any(torch.equal(first, shown) for _, shown in before):
            before.append((f"{name}: before", first))
        after.append((f"{name}: after", last))
    if len(before) == 1:
        before = [("before", before[0][1])]
    return before + after


def share_outside(images: torch.Tensor, real: RealData) -> float:
    """The share of values of normalised images `[N, C, H, W]` that lie outside [0, 1] as pixels."""
    pixels = raw_pixels(images, real)
    return ((pixels < -1e-4) | (pixels > 1 + 1e-4)).float().mean().item()


def raw_pixels(images: torch.Tensor, real: RealData) -> torch.Tensor:
    """Normalised images `[N, C, H, W]` as pixels, not clamped to [0, 1]."""
    low, high = (real.normalize(torch.full((1, *images.shape[1:]), value)) for value in (0.0, 1.0))
    return (images - low) / (high - low)


def seen_by_networks(
    flags: dict, real: RealData, synthetic: SyntheticSet, outliers: list[torch.Tensor], networks: int, epochs: int
) -> list[tuple[float, float]]:
    """For each set of outliers `[N, C, H, W]` the mean confidence, and the mean distance of pairs in unit features.

    Means over `networks` that are trained on the images alone, at the learning rate of the set, if it has one.
    """
    net = real.network(flags["model"], generator(flags["seed"]))
    settings = TrainSettings(epochs, None, augmentation=augmentation_of(flags["method"], flags["dsa_strategy"]))
    images = synthetic.without_outliers()
    found = []
    trainer = Trainer(net, settings)
    for index in range(networks):
        trainer.train_fresh(images, flags["seed"], ("moves", index))
        with torch.no_grad():
            net.eval()
            found.append(
                [
                    (
                        net(x).softmax(1).amax(1).mean().item(),
                        F.pdist(F.normalize(net.embed(x).flatten(1))).mean().item(),
                    )
                    for x in outliers
                ]
            )
    return [tuple(pair) for pair in np.mean(found, axis=0)]


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "outlier_moves.py")
