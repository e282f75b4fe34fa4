"""Compare the speed of the engine and of a textbook loop: same process and inputs, alternating.

The textbook is `textbook_loop.py`: what people run. That of methods and experts is in `tests/oracle/plain_methods.py`;
it augments batches, too. Start-up is that of whole processes; the other works start when the data are read.

    python scripts/dev/benchmark.py                                  # ConvNetW32, ipc 2; start-up takes most of it
    python scripts/dev/benchmark.py --model ConvNet --ipc 10 --repeats 1 --works iteration  # 20 minutes on two cores

The data are random pixels in the shape of CIFAR-10: times do not depend on the content. The textbook loop runs with the
C library's default allocator, the engine with its own setting (`set_keep_freed_memory`). The engine's first call takes
longer than the others, mostly for compiling.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import torch
from benchmark_methods import METHOD_WORKS
from benchmark_works import WORKS, Bench

from utils.core.errors import UserError
from utils.core.files import read_json, save_output
from utils.core.run_script import run_script
from utils.report.tables import markdown_table
from utils.settings.common import Speed
from utils.settings.fields import add_group, flags_of
from utils.settings.parser import Parser, count, one_of

ALL_WORKS = (*WORKS, *METHOD_WORKS)


def get_args_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(description="Compare the speed of the engine and the textbook loop.")
    parser.add_argument("--model", default="ConvNetW32", help="the network")
    parser.add_argument("--ipc", type=count(1), default=2, help="synthetic images per class")
    parser.add_argument("--batch_real", type=count(1), default=256, help="real images per slot")
    parser.add_argument("--outer_loop", type=count(1), default=None, help="steps per iteration; left out: by ipc")
    parser.add_argument("--inner_loop", type=count(0), default=None, help="epochs between steps; left out: by ipc")
    parser.add_argument("--repeats", type=count(1), default=3, help="measurements of each; the median is shown")
    parser.add_argument(
        "--works", nargs="+", type=one_of("work", ALL_WORKS), default=list(WORKS), help="what to measure"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", default=None, help="JSON file to write")
    parser.add_argument("--show", default=None, metavar="JSON", help="print the tables of a JSON file; measure nothing")
    add_group(parser.add_argument_group("speed"), flags_of(Speed))
    parser.set_defaults(compile="on")
    return parser


def cpu_name() -> str:
    """The processor's name, or its architecture if the system does not tell the name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict:
    """The hardware and software that the times were measured on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def table(results: dict[str, dict]) -> str:
    """The results as a Markdown table."""
    rows = [
        [work, f"{r['plain_s']:.4f}", f"{r['engine_s']:.4f}", f"{r['ratio']:.2f}",
         f"{r['ratio_min']:.2f}-{r['ratio_max']:.2f}", f"{r['engine_first_call_s']:.1f}"]
        for work, r in results.items()
    ]  # fmt: skip
    return markdown_table(("work", "textbook, s", "this code, s", "ratio", "spread", "first call, s"), rows)


def show(path: Path) -> None:
    """Print the table of a JSON file, or those of a file of several, by name; and what they were measured on."""
    content = read_json(path, "--show")
    runs = {str(path): content} if "results" in content else content
    try:
        for name, run in runs.items():
            print(f"{name}: {run['flags']['model']}, ipc {run['flags']['ipc']}")
            print(table(run["results"]))
            print(json.dumps(run["about"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"--show: {path} is not a file that benchmark.py wrote ({error} is missing)") from None


def main(args: argparse.Namespace) -> None:
    """Measure, print the table, and write the JSON file if asked."""
    if args.show:
        return show(Path(args.show))
    bench = Bench(args)
    results = {}
    for work in ALL_WORKS:
        if work in args.works and work != "memory":
            results[work] = METHOD_WORKS[work](bench) if work in METHOD_WORKS else getattr(bench, work)()
            print(f"{work}: {results[work]['ratio']:.2f}", flush=True)
    about = machine(bench.device) | {"compute": str(bench.compute), "command": shlex.join(sys.argv)}
    about["peak_gb"] = bench.memory() if "memory" in args.works else None
    print(table(results))
    print(json.dumps(about))
    if args.out:
        content = {"about": about, "flags": vars(args), "results": results}
        save_output(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "benchmark.py")
