"""Imports the program once, then forks a process for each request: real processes that start in milliseconds.

A request is a line of JSON: `script` and its `flags`, the folder to run in (`cwd`), the file for what it prints
(`log`), and `kill_at`, [a function of os, n]: the process kills itself when it calls that for the n-th time. The
answers are a line with the number of the process, and one with its exit code when it has ended (negative: the signal).
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from utils.core.run_script import run_script
from utils.data.datasets import load_dataset

SCRIPTS = {
    name: importlib.import_module(name) for name in ("main", "main_poe", "train_model_synthetic_oe", "train_experts")
}


def kill_at(name: str, n: int) -> None:
    """Let the n-th call of `os.<name>` be the end of this process."""
    original = getattr(os, name)
    calls = 0

    def counted(*args):
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, name, counted)


def run(request: dict) -> None:
    """The request's script, in this process."""
    os.chdir(request["cwd"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if request["kill_at"]:
        kill_at(*request["kill_at"])
    torch.set_num_threads(1)
    name = request["script"]
    sys.argv = [name, *request["flags"]]
    module = SCRIPTS[name.removesuffix(".py")]
    run_script(lambda: module.main(module.get_args_parser().parse_args()), name)


def serve() -> None:
    """Answer requests until there are no more. What is imported late is imported before; nothing may start threads."""
    load_dataset("Digits", "nowhere")
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    importlib.import_module("torchvision.utils")
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                run(json.loads(line))
                status = 0
            except SystemExit as stopped:
                status = stopped.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
