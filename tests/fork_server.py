"""Imports the program once, then forks a process for each request: real processes that start in milliseconds.

A request comes over a socket: the file descriptors 0 to 2 of the process, and JSON: `words`, a script and its flags (or
`-m` and torchrun's module), the folder to run in (`cwd`), the `environment`, the `umask`, `unbuffered` as by `python
-u`, and `kill_at`, [a function of os, n]: the process kills itself when it calls that for the n-th time. The answers
are a line with the number of the process, and one with its exit code when it has ended (negative: the signal). A
process whose client goes away is killed, and all are when this one's stdin is closed. Before it forks, the server
imports the modules in `needs`, for those to come, too.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from utils.compute.version import git_commit  # noqa: E402
from utils.data.datasets import load_dataset  # noqa: E402

SCRIPTS = ("main", "main_oe", "main_poe", "train_model_synthetic_no_oe", "train_model_synthetic_oe", "train_experts")
SCRIPTS += ("test_ood_model_syn", "scripts.trust_report", "scripts.compare", "scripts.study", "scripts.tables.table")
LATE = ("torchvision.utils", "sklearn.metrics", "matplotlib.figure", "torch.distributed.run")


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


def run(request: dict, streams: list[int]) -> None:
    """The request's script, in this process, as Python would run it."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in enumerate("rww"))  # noqa: SIM115
    sys.stdout.reconfigure(write_through=request.get("unbuffered", False))
    sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")
    os.chdir(request["cwd"])
    os.umask(request.get("umask", os.umask(0)))
    os.environ.clear()
    os.environ.update(request["environment"])
    words = request["words"]
    sys.executable = os.path.join(os.path.dirname(sys.argv[1]), "python")
    sys.orig_argv = [sys.executable, *words]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if request.get("kill_at"):
        kill_at(*request["kill_at"])
    if words[0] == "-m":
        module = importlib.import_module(words[1])
        sys.argv = [module.__file__, *words[2:]]
        module.main()
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")


def run_and_leave(request: dict, streams: list[int]) -> None:
    """As Python ends a script, but without freeing all that was imported, which takes as long as a short script."""
    status: object = 1
    try:
        run(request, streams)
        status = 0
    except SystemExit as stopped:
        status = stopped.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


class Server:
    """Forks processes, and tells their clients how they end."""

    def __init__(self, place: str):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(place)
        self.listener.listen(64)
        self.ended, self.wake = socket.socketpair()
        self.wake.setblocking(False)
        self.clients: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        for what in (self.listener, self.ended, 0):
            self.selector.register(what, selectors.EVENT_READ)

    def serve(self) -> tuple[dict, list[int]] | None:
        """Returns in each forked process with its request, and here, with None, when stdin is closed."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        print("ready", flush=True)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    for pid in self.clients:
                        os.kill(pid, signal.SIGKILL)
                    return None
                if key.fileobj is self.ended:
                    self.ended.recv(4096)
                    self.collect()
                elif key.fileobj is self.listener:
                    asked = self.fork()
                    if asked:
                        return asked
                elif key.data in self.clients:  # its client has gone
                    self.selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def fork(self) -> tuple[dict, list[int]] | None:
        """Take a request and fork; returns it in the new process alone."""
        client, _ = self.listener.accept()
        size, streams, *_ = socket.recv_fds(client, 8, 3)
        with client.makefile("rb") as file:
            request = json.loads(file.read(int.from_bytes(size, "big")))
        for name in request.get("needs", ()):
            importlib.import_module(name)
        pid = os.fork()
        if pid:
            for stream in streams:
                os.close(stream)
            client.sendall(f"{pid}\n".encode())
            self.clients[pid] = client
            self.selector.register(client, selectors.EVENT_READ, pid)
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for other in (client, self.listener, self.ended, self.wake, *self.clients.values()):
            other.close()
        return request, streams

    def collect(self) -> None:
        """Tell the clients of all processes that have ended."""
        while self.clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            client = self.clients.pop(pid)
            with suppress(KeyError):
                self.selector.unregister(client)
            with suppress(OSError):
                client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            client.close()


def main() -> None:
    """Answer requests until there are no more. Nothing that is imported before may start threads."""
    for name in (*SCRIPTS, *LATE):
        importlib.import_module(name)
    load_dataset("Digits", "nowhere")
    git_commit()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    gc.freeze()  # what all share stays shared
    asked = Server(sys.argv[1]).serve()
    if asked:
        run_and_leave(*asked)


if __name__ == "__main__":
    main()
