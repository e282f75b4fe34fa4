"""Write a data set as outliers of another: its training images as a pool for OE, its test images as an OOD set.

    python scripts/dataset_outliers.py --dataset FashionMNIST --oe data/oe/FashionMNIST.npz
    python scripts/dataset_outliers.py --dataset Digits --ood data/ood/Digits.npz

Size and channels are adapted when the images are used.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import numpy as np
import torch

from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.pixels import unit_images
from utils.core.run_script import run_script
from utils.data.datasets import DATASET_NAMES, load_dataset
from utils.settings.parser import Parser, count, one_of


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Write a data set as outliers for OE and as an OOD set.")
    parser.add_argument(
        "--dataset", type=one_of("dataset", DATASET_NAMES), default="FashionMNIST", help="the data set to write"
    )
    parser.add_argument("--data_path", default="data", help="where it is, or is downloaded to")
    parser.add_argument(
        "--download", choices=("none", "data", "all"), default="data", help="none: the data set is not downloaded"
    )
    parser.add_argument("--im_size", type=count(1), default=None, help="side of the images with --dataset ImageFolder")
    parser.add_argument("--pixel_max", type=count(1), default=None, help="the value of white, as in stage 1")
    parser.add_argument("--oe", default=None, help=".npz file for the training images; left out: not written")
    parser.add_argument("--ood", default=None, help=".npz file for the test images; left out: not written")
    return parser


def main(args: argparse.Namespace) -> None:
    """Read the data set once and write what is asked for."""
    files = {"--oe": args.oe, "--ood": args.ood}
    if not any(files.values()):
        raise UserError("--oe, --ood: neither is given; name the file for the training or for the test images")
    for flag, path in files.items():
        if path and not path.endswith(".npz"):
            raise UserError(f"{flag}: {path} does not end in .npz; give the name of an .npz file")
    downloads = args.download != "none"
    real = load_dataset(args.dataset, args.data_path, args.im_size, downloads, pixel_max=args.pixel_max)
    for flag, images in (("--oe", real.images_train), ("--ood", real.images_test)):
        if not files[flag]:
            continue
        path = Path(files[flag])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag}: cannot make {path.parent}: {error}") from None
        pixels = (255 * unit_images(images)).round().to(torch.uint8)
        array = pixels.permute(0, 2, 3, 1).squeeze(-1).numpy()
        atomic_write(path, lambda file, array=array: np.savez_compressed(file, images=array))
        print(f"{path}: {len(array)} images of {'x'.join(map(str, real.im_size))}")


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "dataset_outliers.py")
