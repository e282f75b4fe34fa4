"""What compiling costs each script: whole processes with next to no work, uncompiled, and compiled twice.

    python scripts/dev/cold_starts.py          # ConvNetW32, ipc 2; some minutes

The first compiled process begins with an empty cache of compiled code, the second finds what the first left there, as
a second run on one machine does. The data are a few random images in the shape of CIFAR-10.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import torch
from benchmark import machine
from benchmark_works import make_data

from utils.core.errors import UserError, one_line
from utils.core.files import save_output
from utils.core.run_script import run_script
from utils.report.tables import markdown_table
from utils.settings.parser import Parser

IMAGES = 1000
RUNS = {"uncompiled": "off", "first": "on", "second": "on"}  # of each script, and their --compile
DISTIL = "--init real --Iteration 1 --num_exp 1 --num_eval 1 --epoch_eval_train 1"
BATCHES = "--batch_real 64 --batch_oe 64"
AUGMENT = "--dsa_strategy color_crop_cutout_flip_scale_rotate"
SHORT = "--syn_steps 2 --max_start_epoch 1 --expert_epochs 1"
# by name, the flags beside those that all share; each writes into {out}, and reads what uncompiled ones wrote before
FLAGS = {
    "main_poe.py, DSA": f"--ipc 2 --method DSA {AUGMENT} {DISTIL} {BATCHES} --save_path {{out}}",
    "main_poe.py, DM": f"--ipc 2 --method DM {DISTIL} {BATCHES} --save_path {{out}}",
    "train_experts.py": f"--outliers poe --num_experts 1 --train_epochs 3 {AUGMENT} --buffer_path {{out}}",
    "main_poe.py, MTT": f"--ipc 2 --method MTT {SHORT} {AUGMENT} {DISTIL} --save_path {{out}} "
    "--buffer_path uncompiled/train_experts.py",
    "train_model_synthetic_oe.py": f"--ipc 2 --method DSA {AUGMENT} --num_eval 1 --epoch_eval_train 1 "
    "--save_path {out} --load_path uncompiled/main_poe.py,DSA",
    "test_ood_model_syn.py": "--ipc 2 --method DSA --num_exp 1 --is_load_best --ood_sets gaussian --save_path {out} "
    "--load_path uncompiled/train_model_synthetic_oe.py",
}


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(
        description="Measure whole processes uncompiled, compiled for the first time, and with compiled code at hand."
    )
    parser.add_argument("--model", default="ConvNetW32", help="the network")
    parser.add_argument("--out", default=None, help="markdown file to write")
    return parser


def seconds(name: str, run: str, model: str, folder: Path) -> float:
    """How long a script takes. It works in `folder`, and has a cache of compiled code of its own there.

    Raises:
        UserError: when it fails.
    """
    common = f"--dataset CIFAR10 --data_path . --download none --model {model} --device cpu --compile {RUNS[run]}"
    own = name.replace(" ", "")
    flags = f"{common} {FLAGS[name]}".format(out=f"{run}/{own}")
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache" / own)}
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / name.partition(",")[0]), *flags.split()],
        cwd=folder, env=env, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[-1]
        raise UserError(f"{name}: exit status {done.returncode}: {one_line(last)}")
    return time.perf_counter() - began


def main(args: argparse.Namespace) -> None:
    """Measure, print the table, and write it if asked."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), train=IMAGES, test=IMAGES)
        for name in FLAGS:
            times = [f"{seconds(name, run, args.model, Path(folder)):.1f}" for run in RUNS]
            print(f"{name}: {', '.join(times)} s", flush=True)
            rows.append([name, *times])
    text = markdown_table(("script", "uncompiled, s", "compiled, first run, s", "compiled, second run, s"), rows)
    print(text)
    print(json.dumps(machine(torch.device("cpu"))))
    if args.out:
        save_output(args.out, text + "\n")


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "cold_starts.py")
