"""How long each OOD score takes: fitting a network's detector, and scoring the test images.

    python scripts/dev/score_times.py result-model-synthetic-oe/DM/CIFAR10/ConvNet/10/20230206-232257

FOLDER is a run folder of stage 2; its network 0 (the best checkpoint) is scored. Each score is computed alone, so each
time includes a forward pass of its own, which several scores of one run of stage 3 would share.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.compute.device import choose_device
from utils.core.errors import UserError
from utils.core.files import save_output
from utils.core.run_script import run_script
from utils.data.datasets import RealData, load_dataset
from utils.ood.scorer import FitSet, Scorer
from utils.ood.scores import ALL_SCORES, need_fitting, require_library
from utils.report.tables import markdown_table
from utils.runs.lineage import args_or_nothing, set_of_networks
from utils.settings.parser import Parser, count, one_of
from utils.training.network_training import load_trained


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Time each OOD score of a network.")
    parser.add_argument("folder", help="a run folder of stage 2")
    parser.add_argument("--data_path", default="data", help="folder of the real data")
    parser.add_argument("--scores", nargs="+", type=one_of("score", ALL_SCORES), default=list(ALL_SCORES), help="which")
    parser.add_argument("--images", type=count(2), default=1000, help="test images to score; times are for 10,000")
    parser.add_argument("--repeats", type=count(1), default=3, help="the median of so many times counts")
    parser.add_argument("--batch_test", type=count(1), default=256, help="images per forward pass")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", default=None, help="markdown file to write")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the table, and write it if asked."""
    require_library(args.scores)
    folder = Path(args.folder)
    flags = args_or_nothing(folder).get("flags")
    if not isinstance(flags, dict) or not {"dataset", "model"} <= flags.keys():
        raise UserError(f"{folder} is no run folder of stage 2; give one, e.g. result-model-synthetic-oe/…/<time>")
    real = load_dataset(flags["dataset"], args.data_path, flags.get("im_size"), False, flags.get("zca", False))
    real = real.to(choose_device(args.device))
    synthetic = set_of_networks(folder).set(0, real).decoded().to(real.device)
    sets = {
        "distilled": FitSet("distilled set", synthetic.hard_labels, lambda index: synthetic.images[index]),
        "real": FitSet("real training set", real.labels_train, real.train_batch),
    }
    rows = []
    for score in args.scores:
        rows.append(times_of(score, folder, flags["model"], real, sets, args))
        print(f"{len(rows)}/{len(args.scores)} {score}: {rows[-1][-1]} s", file=sys.stderr, flush=True)
    header = ("score", "fit on the distilled set, s", "fit on the real set, s", "10,000 images, s")
    text = markdown_table(header, rows) + "\n"
    print(text, end="")
    if args.out:
        save_output(args.out, text)


def times_of(
    score: str, folder: Path, model: str, real: RealData, sets: dict[str, FitSet], args: argparse.Namespace
) -> list[str]:
    """The row of a score: seconds of fitting on either set, and of scoring; a dash where that is not possible."""
    net = load_trained(folder, model, real, 0, "best")
    images = real.test_images[: args.images]
    cells, scorer = [], None
    for fit in sets.values() if need_fitting([score]) else (None,):
        candidate = Scorer(net, (score,), 1.0, real.std)
        try:
            seconds = timed(real, lambda: candidate.prepare(images[:2], fit, args.batch_test))  # noqa: B023
        except UserError as error:
            print(error, file=sys.stderr)
            cells.append("-")
        else:
            cells.append(f"{seconds:.2f}")
            scorer = candidate
    cells = cells if need_fitting([score]) else ["", ""]
    if scorer is None:
        return [score, *cells, "-"]
    scorer(images[: args.batch_test], args.batch_test)  # also decides into how many parts a batch is split
    seconds = [timed(real, lambda: scorer(images, args.batch_test)) for _ in range(args.repeats)]
    return [score, *cells, f"{statistics.median(seconds) * 10_000 / len(images):.2f}"]


def timed(real: RealData, function: Callable[[], object]) -> float:
    """Seconds that a call takes on the device of the data."""
    start = time.perf_counter()
    function()
    if real.device.type == "cuda":
        import torch

        torch.cuda.synchronize(real.device)
    return time.perf_counter() - start


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "score_times.py")
