"""Mutated files against every reader: each is loaded, or refused in one line, and nothing in it is executed.

    python tests/damaged/fuzz_readers.py --count 10000 --seed 0

Prints, for each reader, how many files were loaded, refused, and failed in any other way; a failure is kept in the
folder `--keep`, and the exit status is 1. The tests run it with a small count.
"""

import argparse
import io
import json
import os
import pickle
import resource
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import numpy as np
import torch
from conftest import made
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main_poe
from networks import get_network
from utils.compute.device import Compute
from utils.core.errors import UserError
from utils.core.images import ImageReader
from utils.core.rng import generator
from utils.data.datasets import RealData, load_dataset
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet
from utils.methods.gradient_matching import GradientMatching
from utils.outliers.sources import PseudoOutliers
from utils.runs.run_folder import RunFolder
from utils.settings.arguments import Stage1Settings
from utils.settings.fields import as_dict
from utils.stages.evaluation import EvalSettings, Evaluator
from utils.stages.loop import Distillation
from utils.training.experts import ExpertBuffer
from utils.training.network_training import load_trained
from utils.training.trainer import TrainSettings

SHAPE = (3, 16, 16)
CANARY = "canary"
NETWORK = "syn_trained_tiny_ConvNetD1_exp0_best.pt"


class Payload:
    """Unpickled, it makes the file `CANARY` in the current folder."""

    def __reduce__(self):
        return open, (CANARY, "w")


def tiny() -> RealData:
    """Three classes of 3×16×16 images."""
    images = torch.randint(0, 256, (24, *SHAPE), dtype=torch.uint8, generator=generator(0))
    labels = torch.arange(24) % 3
    return RealData("tiny", 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), images[:18], labels[:18], images[18:], labels[18:])


# --- valid files, one or a few for each reader: (suffix of the path below the folder, bytes) --------------------------


def _bytes(write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "valid"
        write(path)
        return path.read_bytes()


def _saved(value: object, new: bool = True) -> bytes:
    return _bytes(lambda path: torch.save(value, path, _use_new_zipfile_serialization=new))


def _distilled(real: RealData) -> list[bytes]:
    images = torch.randn(2, 6, *SHAPE, generator=generator(1))
    one = SyntheticSet(images[0], torch.arange(3).repeat_interleave(2), images[1])
    valid = _bytes(lambda path: DistilledFile.write(path, [one], {"ConvNet": [0.5]}, real, {"ipc": 2}))
    pair = {"data": [[one.images, one.labels]]}
    published = _saved(pair | {"accs_all_exps": {"ConvNet": [np.float64(0.5)]}})
    return [valid, published, _saved(pair, new=False), _saved(pair | {"evil": Payload()}), pickle.dumps(Payload())]


def _networks(real: RealData) -> list[bytes]:
    state = get_network("ConvNetD1", 3, 3, SHAPE[1:], generator(0)).state_dict()
    return [_saved(state), _saved(state, new=False), _saved(dict(state) | {"evil": Payload()})]


def _tinyimagenet(real: RealData) -> list[bytes]:
    images = torch.full((200, 3, 64, 64), 255, dtype=torch.uint8)
    content = {"classes": [f"n{i}" for i in range(200)], "images_train": images, "labels_train": torch.arange(200)}
    content |= {"images_val": images[:4].clone(), "labels_val": torch.arange(4)}
    return [_saved(content), _saved(content | {"evil": Payload()})]


def _arrays(save: Callable, **arrays: np.ndarray) -> bytes:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            save(file, **arrays)

    return _bytes(write)


def _data_sets(real: RealData) -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (18, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(18) % 3
    arrays = {"train_images": pixels, "train_labels": labels, "test_images": pixels, "test_labels": labels[:, None]}
    evil = arrays | {"train_labels": np.array([Payload()], dtype=object)}
    return [_arrays(np.savez, **arrays), _arrays(np.savez_compressed, **arrays), _arrays(np.savez, **evil)]


def _npz_pools(real: RealData) -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    evil = np.array([Payload()], dtype=object)
    return [_arrays(f, images=a) for f, a in ((np.savez, pixels), (np.savez_compressed, pixels), (np.savez, evil))]


def _npy_pools(real: RealData) -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    return [_arrays(np.save, arr=a) for a in (pixels, pixels[..., 0], np.array([Payload()], dtype=object))]


def _images(real: RealData) -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    kinds = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF", "TIFF")
    return [_bytes(lambda path, kind=kind: Image.fromarray(noise).save(path, kind)) for kind in kinds]


def _read_folder(path: Path, real: RealData) -> None:
    images = ImageReader("--ood_path").folder_or_array(path.parent, 3, SHAPE[1:])
    assert images.shape == (1, *SHAPE)


def _read_pool(path: Path, real: RealData) -> None:
    images = ImageReader("--oe_data_path").folder_or_array(path, 3, SHAPE[1:])
    assert images.dtype == torch.uint8
    int(images[:, :, :1, :1].sum())  # touches every page of a memory-mapped array


def _small_run(folder: Path, real: RealData) -> Distillation:
    """A distillation of one update that could be resumed in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    run.is_main = False
    settings = Stage1Settings(model="MLP", ipc=1, batch_real=2, batch_oe=2, outliers="poe", num_exp=2, Iteration=1)
    method = made(GradientMatching, real, PseudoOutliers(real), settings)
    evaluator = Evaluator(real, EvalSettings(1, {"MLP": TrainSettings(1)}, 1), run, Compute())
    return Distillation(method, evaluator, settings, run)


@cache
def _one_small_run() -> Distillation:
    return _small_run(Path(tempfile.mkdtemp()), tiny())


def _checkpoints(real: RealData) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        run = _small_run(Path(folder), real)
        run.state.measures = {"MLP": {0: {"accuracy": 0.5}}}
        run.method.start(0)
        run.method.iterate(0)
        run.state.method = run.method.state_dict()
        run.save()
        valid = run.checkpointer.path.read_bytes()
    content = torch.load(io.BytesIO(valid), weights_only=True)
    return [valid, _saved(content | {"exp": 1, "finished": [[torch.zeros(3, *SHAPE)] * 2]}), _saved([Payload()])]


def _read_checkpoint(path: Path, real: RealData) -> None:
    run = _one_small_run()
    run.checkpointer.path, run.checkpointer.previous = path, path.with_name("none.pt")
    if run.restore():
        run.method.iterate(0)


def _arguments(real: RealData) -> list[bytes]:
    flags = {k: v for k, v in as_dict(main_poe.get_args_parser().parse_args([])).items() if k != "resume"}
    return [json.dumps({"script": "main_poe.py", "flags": flags}, indent=60).encode()]


def _read_arguments(path: Path, real: RealData) -> None:
    parser = main_poe.get_args_parser()
    parser.prog = "main_poe.py"
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            parser.parse_args(["--resume", str(path.parent)])
    except SystemExit:
        raise UserError(printed.getvalue().strip()) from None


BUFFER = [(2, 3), (2,)]  # shapes of the parameters


def _buffers(real: RealData) -> list[bytes]:
    content = [[[torch.full(shape, float(epoch)) for shape in BUFFER] for epoch in range(4)] for _ in range(2)]
    return [_saved(content), _saved([*content, Payload()]), pickle.dumps(Payload())]


def _read_buffer(path: Path, real: RealData) -> None:
    experts = ExpertBuffer(path.parent, BUFFER, None, "")
    for seed in range(8):  # of mapped memory only what is read shows the damage
        experts.segment(generator(seed), 1, experts.epochs, torch.device("cpu"))


READERS = {  # name of the file, valid files, how it is read
    "distilled set .pt": ("res.pt", _distilled, lambda path, real: DistilledFile.open(path).set(0, real)),
    "network .pt": (NETWORK, _networks, lambda path, real: load_trained(path.parent, "ConvNetD1", real, 0, "best")),
    "tinyimagenet.pt": ("tinyimagenet.pt", _tinyimagenet, lambda path, _: load_dataset("TinyImageNet", path.parent)),
    "data set .npz": ("data.npz", _data_sets, lambda path, _: load_dataset("npz", path)),
    "pool .npy": ("pool.npy", _npy_pools, _read_pool),
    "pool .npz": ("pool.npz", _npz_pools, _read_pool),
    "checkpoint.pt": ("checkpoint.pt", _checkpoints, _read_checkpoint),
    "args.json": ("args.json", _arguments, _read_arguments),
    "expert buffer": ("buffers/replay_buffer_0.pt", _buffers, _read_buffer),
    "image of a folder": ("folder/image.png", _images, _read_folder),
}


# --- mutations --------------------------------------------------------------------------------------------------------


def _hot(data: bytes, rng: np.random.Generator) -> int:
    """A position, half of the time near the start or the end, where headers and lists of members are."""
    place = int(rng.integers(0, len(data)))
    near = min(int(rng.exponential(200)), len(data) - 1)
    return (place, place, near, len(data) - 1 - near)[int(rng.integers(0, 4))]


def mutate(data: bytes, rng: np.random.Generator, number: int) -> bytes:
    """Mutation `number` of a file: truncated (the first ones at every kilobyte), or a few random changes."""
    if number * 1024 < min(len(data), 65536):
        return data[: number * 1024]
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        kind, at, length = int(rng.integers(0, 7)), _hot(out, rng), int(rng.integers(1, 300))
        if kind == 0:
            del out[max(at, 1) :]
        elif kind in (1, 2):
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 3:
            out[at : at + length] = bytes(len(out[at : at + length]))
        elif kind == 4:  # two chunks swap places
            other = _hot(out, rng)
            first, second = out[at : at + length], out[other : other + length]
            out[at : at + len(second)], out[other : other + len(first)] = second, first
        elif kind == 5:
            out[at:at] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        else:  # a number becomes extreme
            extreme = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"99999999")
            out[at : at + 4] = extreme[int(rng.integers(0, 4))]
    return bytes(out)


def mutate_inside(data: bytes, rng: np.random.Generator) -> bytes:
    """Mutate one member of an archive and pack it again, so that sizes and checksums agree with the damage."""
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as packed:
        file.write(data)
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w") as new:
            members = old.infolist()
            small = [i for i, m in enumerate(members) if m.filename.endswith(".pkl")] or range(len(members))
            chosen = int(rng.choice(small)) if rng.random() < 0.7 else int(rng.integers(0, len(members)))
            for index, member in enumerate(members):
                content = old.read(member)
                changed = index == chosen and content
                new.writestr(member, mutate(content, rng, 1 << 40) if changed else content)
        packed.seek(0)
        return packed.read()


def fuzz(reader: str, count: int, seed: int, folder: Path, keep: Path | None = None) -> Counter:
    """Read `count` mutated files in `folder`; return how many were loaded, refused, and failed in another way."""
    name, make, read = READERS[reader]
    real, rng = tiny(), np.random.default_rng([seed, list(READERS).index(reader)])
    valid, path = make(real), folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    outcomes: Counter = Counter()
    for number in range(count):
        data = valid[number % len(valid)]
        inside = data[:2] == b"PK" and rng.random() < 0.5
        path.write_bytes(mutate_inside(data, rng) if inside else mutate(data, rng, number // len(valid)))
        outcome = attempt(read, path, real)
        if Path(CANARY).exists():
            outcome = "it was executed"
            Path(CANARY).unlink()
        outcomes[outcome if outcome in ("loaded", "refused") else "failures"] += 1
        if outcome not in ("loaded", "refused"):
            print(f"{reader}, file {number}: {outcome}", flush=True)
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{number}-{path.name}").write_bytes(path.read_bytes())
    return outcomes


def attempt(read: Callable, path: Path, real: RealData) -> str:
    """`loaded`, `refused`, or what else happened."""
    try:
        read(path, real)
    except UserError as error:
        message = str(error)
        return "refused" if message.strip() and len(message.splitlines()) == 1 else f"not one line: {message!r:.300}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error!s:.300}"
    return "loaded"


def main() -> int:
    """Fuzz all readers, or those that are named; the exit status says whether there were failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="mutated files per reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS))
    parser.add_argument("--keep", type=Path, default=None, help="folder for files that failed")
    args = parser.parse_args()
    keep = args.keep.resolve() if args.keep else None
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where the canary would appear
        for reader in args.readers:
            began = time.monotonic()
            outcomes = fuzz(reader, args.count, args.seed, Path(folder) / "files", keep)
            failures += outcomes["failures"]
            counts = "  ".join(f"{what} {outcomes[what]}" for what in ("loaded", "refused", "failures"))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{reader:18} {counts}  ({time.monotonic() - began:.0f} s, peak {peak} MB)", flush=True)
        os.chdir("/")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
