"""Shared fixtures: small data, and scripts run as users run them."""

import importlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.compute.device import Compute  # noqa: E402
from utils.core.run_script import run_script  # noqa: E402
from utils.data.datasets import RealData, load_dataset  # noqa: E402
from utils.methods import MethodInputs  # noqa: E402

DEVICE = torch.device(os.environ.get("TRUSTDD_TEST_DEVICE", "cpu"))  # scripts/dev/gpu_check.sh sets cuda
COMPILED = Compute(compiled=True, on_cuda=DEVICE.type == "cuda")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
# a PNG of one white pixel
PIXEL = b64decode(b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler on a CPU"
)


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def digits() -> RealData:
    return load_dataset("Digits", "nowhere")


@pytest.fixture
def tiny_real() -> RealData:
    """Three classes of 3×16×16 uint8 images, 40 for training and 6 for testing."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (46, 3, 16, 16), dtype=torch.uint8, generator=g)
    labels = torch.arange(46) % 3
    return RealData("tiny", 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), images[:40], labels[:40], images[40:], labels[40:])


def made(kind, real, outliers, settings, *more, compute=None, initial=()):
    """A method with the augmentation of its settings; `more`: what its class takes besides the inputs."""
    augmentation = settings.augmentation
    return kind(MethodInputs(real, outliers, settings, augmentation, compute or Compute(), initial), *more)


def named(dsa):
    """The value of `--dsa_strategy` for an augmentation."""
    return "_".join(dsa.strategy)


def write_idx(path, array):
    """An array of bytes in the format of MNIST's files."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root, name):
    """The files of MNIST, or of a set like it, with few images; returns images and labels of each part."""
    g = np.random.default_rng(0)
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for part, prefix, n in (("train", "train", 30), ("test", "t10k", 10)):
        images, labels = g.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
        arrays[part] = (images[:, None], labels)
    return arrays


def whole_and_resumed(make, stop: int, end: int) -> tuple:
    """Two methods after `end` iterations: one without a break, one from the state of a third after `stop`.

    The third goes on for an iteration before its state is read, which must not change it.
    """
    whole, first, second = make(), make(), make()
    whole.start(0)
    for it in range(end):
        whole.iterate(it)
    first.start(0)
    for it in range(stop):
        first.iterate(it)
    state = first.state_dict()
    first.iterate(stop)
    second.load_state_dict(0, state)
    for it in range(stop, end):
        second.iterate(it)
    return whole, second


class Fork:
    """A process that `fork_server.py` has forked."""

    def __init__(self, place: Path, streams: list[int], **request: object):
        data = json.dumps(request).encode()
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(place))
        socket.send_fds(server, [len(data).to_bytes(8, "big")], streams)
        server.sendall(data)
        server.settimeout(300)
        self.answers = server.makefile()
        server.close()  # the file keeps the connection
        self.pid = int(self.answers.readline())

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        with self.answers:
            return int(self.answers.readline())


class ForkServer:
    """Starts scripts as processes that need not import anything.

    `python` is an executable that does so; it stands in for Python wherever a command names that.
    """

    def __init__(self, folder: Path):
        self.place, self.python = folder / "socket", str(folder / "python")
        source = (ROOT / "tests" / "fork_client.py").read_text()
        Path(self.python).write_text(f"#!{sys.executable} -IS\n{source}")
        Path(self.python).chmod(0o755)
        command = [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(self.place)]
        pipe, env = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        assert self.server.stdout.readline() == "ready\n"

    def start(self, words, cwd: Path, log: Path, environment=None, **more: object) -> Fork:
        """Start a script with its flags, which prints to `log`; the process is the one that the server forks."""
        environment = {**os.environ, **(environment or {})}
        with open(log, "ab") as out, open(os.devnull) as nothing:
            streams = [nothing.fileno(), out.fileno(), out.fileno()]
            words = list(map(str, words))
            return Fork(self.place, streams, words=words, cwd=str(cwd), environment=environment, **more)

    def warm(self, *modules: str) -> None:
        """Let the server import modules, so that the processes to come need not."""
        assert self.start([os.devnull], ROOT, Path(os.devnull), needs=modules).wait() == 0

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=60)


@pytest.fixture(scope="session")
def forks():
    with tempfile.TemporaryDirectory() as folder:  # a socket's name is short
        server = ForkServer(Path(folder))
        yield server
        server.close()


@pytest.fixture(scope="session")
def torchrun(forks):
    """Start a script in a folder with several processes."""

    def start(folder: Path, processes: int, script: object, *flags: object) -> subprocess.Popen:
        command = [forks.python, *map(str, [*LAUNCHER, processes, ROOT / script, *flags])]
        env, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
        return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=env)

    return start


@pytest.fixture
def script(tmp_path, forks):
    """Run a script of the project in `tmp_path`, as from a shell; returns the completed process."""

    def run(name: str, *flags: object, **kwargs) -> subprocess.CompletedProcess:
        command = [forks.python, str(ROOT / name), *map(str, flags)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, **kwargs)

    return run


@pytest.fixture
def program(tmp_path, forks):
    """The command that runs lines of Python, which may import the project, in a process that has imported torch."""

    def command(code: str, *words: object) -> list[str]:
        folder = tmp_path.with_name(f"{tmp_path.name}-program")
        folder.mkdir(exist_ok=True)
        path = folder / f"{len([*folder.iterdir()])}.py"
        path.write_text(code)
        return [forks.python, str(path), *map(str, words)]

    return command


@pytest.fixture
def pictures():
    """A test that looks at the plots of `in_process` asks for this; those of others are drawn, but not as pixels."""


@pytest.fixture
def in_process(request, tmp_path, monkeypatch, capsys):
    """Run a script's `main` in `tmp_path` within this process, which has imported torch; returns its output."""

    def run(name: str, *flags: object) -> str:
        if "pictures" not in request.fixturenames:
            monkeypatch.setattr("utils.report.plots._save", lambda path, figure, **_: Path(path).write_bytes(PIXEL))
        module = importlib.import_module(name.removesuffix(".py"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        module.main(module.get_args_parser().parse_args())
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a script in `tmp_path` within this process; it must exit with status 2 and one line, which is returned."""

    def run(name: str, *flags: object) -> str:
        module = importlib.import_module(name.removesuffix(".py"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: module.main(module.get_args_parser().parse_args()), name)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert len(error.strip().splitlines()) == 1, error
        assert error.startswith(f"{name}: error: ")
        return error

    return run
