"""Write Fashion-MNIST as outliers: its training images as a pool for OE, its test images as an OOD set.

python scripts/fashion_outliers.py --data_path data --oe data/oe/FashionMNIST.npz --ood data/ood/FashionMNIST.npz
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.core.errors import UserError
from utils.core.parser import Parser
from utils.data.datasets import load_dataset
from utils.files.atomic import atomic_write
from utils.stages.entry import run_script


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Write Fashion-MNIST as outliers for OE and as an OOD set.")
    parser.add_argument("--data_path", default="data", help="where Fashion-MNIST is, or is downloaded to")
    parser.add_argument("--oe", default="data/oe/FashionMNIST.npz", help="file for the training images")
    parser.add_argument("--ood", default="data/ood/FashionMNIST.npz", help="file for the test images")
    return parser


def main(args: argparse.Namespace) -> None:
    """Read the data set once and write both files; size and channels are adapted when the images are used."""
    real = load_dataset("FashionMNIST", args.data_path)
    for flag, name, images in (("--oe", args.oe, real.images_train), ("--ood", args.ood, real.images_test)):
        path = Path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag}: cannot make {path.parent}: {error}") from None
        array = images[:, 0].numpy()
        atomic_write(path, lambda file, array=array: np.savez_compressed(file, images=array))
        print(f"{path}: {len(array)} images")


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "fashion_outliers.py")
