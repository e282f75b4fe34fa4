"""The picture of the three stages: images before and after distilling, networks, and what is measured."""

import numpy as np
import torch
from matplotlib.figure import Figure

from scripts.tables.drawing import BLACK, RESULTS, values
from utils.core.errors import require
from utils.core.files import atomic_write, read_npz
from utils.core.rng import generator
from utils.data.datasets import load_dataset
from utils.data.distilled_file import DistilledFile
from utils.outliers.sources import PseudoOutliers
from utils.report.results import load_study_csv

PICTURES = RESULTS.parent / "pipeline.npz"
PICTURE_NAMES = ("real", "corrupted", "distilled", "outliers")


def keep_pictures(distilled: str, data_path: str) -> None:
    """Write the pictures of the pipeline, uint8 `[10, 32, 32, 3]` each: one of each class, or of each class slot."""
    real = load_dataset("CIFAR10", data_path, download=False)
    source, synthetic = PseudoOutliers(real), DistilledFile.open(distilled, "--pictures").set(0, real)
    require(synthetic.images_oe is not None, f"--pictures: {distilled} holds no outliers; give a set of main_poe.py")
    slots = range(real.num_classes)
    rows = {
        "real": real.train_batch(torch.cat([indices[:1] for indices in real.class_indices])),
        "corrupted": torch.cat([source.draw(slot, 1, generator(1, "pipeline", slot)) for slot in slots]),
        "distilled": synthetic.images[:: len(synthetic.images) // real.num_classes],
        "outliers": synthetic.images_oe[:: len(synthetic.images_oe) // real.num_classes],
    }
    pixels = {
        name: (255 * real.denormalize(images)).round().byte().permute(0, 2, 3, 1) for name, images in rows.items()
    }
    atomic_write(PICTURES, lambda file: np.savez_compressed(file, **{name: p.numpy() for name, p in pixels.items()}))


def pipeline() -> Figure:
    """What the three stages do: real and corrupted images, distilled ones, a network, and what is measured."""
    pictures = dict(zip(PICTURE_NAMES, read_npz(PICTURES, PICTURE_NAMES), strict=True))
    figure = Figure(figsize=(8.6, 2.7))
    places = {
        "real": (0.005, 0.5, "50,000 real images"),
        "corrupted": (0.005, 0.0, "corrupted on purpose (POE)"),
        "distilled": (0.325, 0.5, "10 images per class, of four parts"),
        "outliers": (0.325, 0.0, "as many outliers"),
    }
    for name, (left, bottom, title) in places.items():
        axis = figure.add_axes((left, bottom, 0.245, 0.4))
        framed = np.pad(pictures[name], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        axis.imshow(np.vstack([np.hstack([*half]) for half in (framed[:5], framed[5:])]))
        axis.set_title(title, fontsize=9, pad=3)
        axis.axis("off")
    study = load_study_csv(RESULTS / "cifar10-tgdd-ipc10.csv")
    measures = {"accuracy": ("accuracy",), "ECE": ("ece",), "AUROC": ("auroc", "msp")}
    found = [
        f"{name} {values(study, 'convnet-1000-epochs/poe', *what).mean():.0f} %" for name, what in measures.items()
    ]
    networks = ("networks,", "sure of classes,", "unsure of outliers")
    for at, lines in ((0.715, networks), (0.935, found)):
        figure.text(
            at, 0.45, "\n".join(lines), ha="center", va="center", fontsize=9, linespacing=1.6,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": BLACK},
        )  # fmt: skip
    for at, text in ((0.287, "1 distil"), (0.606, "2 train"), (0.832, "3 test")):
        figure.text(at, 0.56, text, ha="center", fontsize=9, fontweight="bold")
        figure.text(at, 0.41, "→", ha="center", fontsize=18)
    return figure
