"""Files that were made to do harm, and damaged ones: one line, nothing executed, little memory."""

import argparse
import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import fuzz_readers
import numpy as np
import pytest
import torch
from conftest import ROOT, write_mnist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from networks import get_network
from utils.core.errors import UserError
from utils.core.files import read_npy, read_npz
from utils.core.images import ImageReader
from utils.core.pixels import conform
from utils.core.rng import generator
from utils.core.torch_files import read_pt
from utils.data.datasets import load_dataset
from utils.data.distilled_file import DistilledFile
from utils.data.download import NotThere
from utils.data.synthetic import SyntheticSet
from utils.ood.sets import OODSource
from utils.outliers.sources import distinct
from utils.settings.parser import count, number, one_of
from utils.training.network_training import load_trained

MEMORY = 1 << 30
settings.register_profile("busy", suppress_health_check=[HealthCheck.too_slow])  # the machine may have other work
settings.load_profile("busy")


@pytest.mark.parametrize("reader", fuzz_readers.READERS)
def test_mutated_files(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = fuzz_readers.fuzz(reader, 150, 0, tmp_path / "files")
    assert outcomes["failures"] == 0
    assert outcomes["refused"] > 30
    assert outcomes["loaded"] > 0


def test_the_fuzzer_notices(tmp_path, monkeypatch):
    """A reader that unpickles, one that lets errors through and one with two lines are all failures."""
    monkeypatch.chdir(tmp_path)

    def two_lines(path, real):
        raise UserError("one\ntwo")

    payload = pickle.dumps(fuzz_readers.Payload())
    for read in (lambda path, _: pickle.loads(path.read_bytes()), lambda path, _: 1 / 0, two_lines):
        monkeypatch.setitem(fuzz_readers.READERS, "pool .npy", ("a", lambda _: [payload], read))
        monkeypatch.setattr(fuzz_readers, "mutate", lambda data, *_: data)
        assert fuzz_readers.fuzz("pool .npy", 3, 0, tmp_path)["failures"] == 3


# --- claims of memory -------------------------------------------------------------------------------------------------


def npy_header(shape, dtype="|u1"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def npz_of_terabytes(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", npy_header((10**12, 32, 32, 3)) + bytes(100))


def npz_with_false_sizes(path):
    """The list of members claims 3 GB, and so does the header; there are 100 bytes."""
    header = npy_header(((3 << 30) // 1024 - 1, 32, 32))
    npz_of_terabytes(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header + bytes(100))
    data = bytearray(path.read_bytes())
    listed = data.index(b"PK\1\2")
    data[listed + 20 : listed + 28] = struct.pack("<II", *2 * [len(header) + ((3 << 30) - 1024)])
    path.write_bytes(data)


def npy_of_terabytes(path):
    path.write_bytes(npy_header((10**9, 32, 32, 3)) + bytes(1000))


def png_bomb(path):
    """10,000 × 4,500 pixels, all black, in a few kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pack = zlib.compressobj(9)
    rows = b"".join([*(pack.compress(bytes(30001)) for _ in range(4500)), pack.flush()])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10000, 4500, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def rewritten(path, change):
    """Replace the pickle of a `.pt` file."""
    with zipfile.ZipFile(path) as old:
        members = {m.filename: old.read(m) for m in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)


def pt_claiming(path, new=True):
    torch.save({"data": torch.arange(12.0)}, path, _use_new_zipfile_serialization=new)

    def claim(data):
        end = b"t" if new else b"N"  # what follows the number of elements
        assert data.count(b"K\x0c" + end) == 1
        return data.replace(b"K\x0c" + end, b"J" + struct.pack("<I", 2**30) + end)

    rewritten(path, claim) if new else path.write_bytes(claim(path.read_bytes()))


def pt_old_claiming(path):
    pt_claiming(path, new=False)


def read_distilled(path):
    DistilledFile.open(path).set()


def read_npz_pool(path):
    read_npz(path, ["images"])


HUGE = [
    (npz_of_terabytes, read_npz_pool),
    (npz_with_false_sizes, read_npz_pool),
    (npy_of_terabytes, lambda path: read_npy(path)),
    (png_bomb, lambda path: ImageReader("--ood_path").files([path], 3, (8, 8))),
    (pt_claiming, read_distilled),
    (pt_old_claiming, read_distilled),
]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure")
def test_claims_of_memory(tmp_path):
    """In one process of its own, so that its peak tells."""
    code = "import sys; sys.path[:0] = sys.argv[1:4]; import test_damaged_files as t; t.refuse_all(sys.argv[4])"
    command = [sys.executable, "-c", code, *map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "damaged", tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stderr, done.returncode) == ("", 0)
    assert 0 <= int(done.stdout) < MEMORY // 4


def refuse_all(folder):
    """Read every file of `HUGE`; print by how many bytes the peak of memory has grown."""
    before = peak_memory()
    for index, (write, read) in enumerate(HUGE):
        path = Path(folder) / f"{index}.file"
        write(path)
        assert path.stat().st_size < 8 << 20
        with pytest.raises(UserError, match=r"^[^\n]*cannot read[^\n]*$"):
            read(path)
    print(peak_memory() - before)


def peak_memory():
    """Bytes; getrusage would count what the process was before it was this program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def test_one_bit_of_an_array_is_noticed(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[200] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"Bad CRC-32"):
        read_npz(tmp_path / "a.npz", ["images"])


def test_an_array_whose_header_claims_less_than_is_there(tmp_path):
    """Its pixels would be read in wrong places, and its checksum not at all."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", npy_header((2, 2, 3)) + bytes(range(18)))
    with pytest.raises(UserError, match="it is damaged"):
        read_npz(tmp_path / "a.npz", ["images"])


def test_a_second_member_of_the_same_name_is_not_read_instead(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images", b"not an array")
        archive.writestr("images.npy", npy_header((2, 3, 3)) + bytes(range(18)))
    assert read_npz(tmp_path / "a.npz", ["images"])[0].flatten().tolist() == list(range(18))


# --- what .pt files hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False])
def test_both_formats_of_torch_are_read(new, tmp_path):
    value = {"a": torch.arange(12.0).view(3, 4).T, "b": [1, 2.5, None, "ü", torch.nn.Parameter(torch.ones(2))]}
    value["c"] = {str(k): torch.ones(2, dtype=k) for k in (torch.bool, torch.int8, torch.float16, torch.bfloat16)}
    torch.save(value, tmp_path / "a b'ö\".pt", _use_new_zipfile_serialization=new)
    found = read_pt(tmp_path / "a b'ö\".pt", "file")
    assert torch.equal(found["a"], value["a"])
    assert found["b"][:4] == value["b"][:4]
    assert all(torch.equal(found["c"][k], value["c"][k]) for k in value["c"])


def test_numpy_scalars_are_read(tmp_path):
    values = [np.float64(0.1), np.float32(0.1), np.float16(0.5), np.int64(-3), np.int32(2**31 - 1), np.bool_(True)]
    torch.save(values, tmp_path / "a.pt")
    assert read_pt(tmp_path / "a.pt", "file") == values


class Call:
    """Pickled as the call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


OTHER_VALUES = {
    "array": lambda: np.ones(3),
    "bytearray": lambda: Call(bytearray, (10,)),
    "call": lambda: Call(open, ("owned", "w")),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", OTHER_VALUES)
def test_only_tensors_and_plain_values(kind, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    value = OTHER_VALUES[kind]()
    torch.save({"data": [[value, value]]}, tmp_path / "a.pt")
    capfd.readouterr()
    with pytest.raises(UserError, match=r"not executed|is no distilled set"):
        DistilledFile.open(tmp_path / "a.pt").set()
    assert capfd.readouterr() == ("", "")
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "entry",
    [
        [torch.ones(3, 3, 8, 8, dtype=torch.complex64), torch.arange(3)],
        [torch.ones(3, 3, 8, 8, dtype=torch.int32), torch.arange(3)],
        [torch.ones(3, 3, 8, 8), torch.arange(3.0)],
        [torch.ones(3, 3, 8, 8), torch.ones(3, dtype=torch.bool)],
        [torch.ones(3, 0, 8, 8), torch.arange(3)],
        [torch.full((3, 3, 8, 8), 1e300, dtype=torch.float64), torch.arange(3)],
    ],
)
def test_distilled_sets_of_wrong_kinds(entry, tmp_path):
    torch.save({"data": [entry]}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"is no distilled set: images \[3|must be finite"):
        DistilledFile.open(tmp_path / "a.pt").set()


def test_distilled_set_fits_exactly(tmp_path, tiny_real):
    images, path = torch.randn(3, 3, 16, 16), tmp_path / "a.pt"
    for labels, message in (
        ([0, 2, 2], r"\(2 classes"),
        ([0, 1, 10**13], r"\(3 classes, 0\.\.10000000000000, images 3x16x16\), not from 3 classes of 3x16x16"),
        ([1, 2, 3], r"\(3 classes, 1\.\.3"),
    ):
        torch.save({"data": [[images, torch.tensor(labels)]]}, path)
        with pytest.raises(UserError, match=message):
            DistilledFile.open(path).set(0, tiny_real)
    DistilledFile.write(path, [SyntheticSet(images, torch.arange(3))], {}, tiny_real, {})
    assert torch.equal(DistilledFile.open(path).set(0, tiny_real).images, images)
    for other in (replace(tiny_real, mean=(0.4, 0.5, 0.61)), replace(tiny_real, std=(0.2, 0.3, 0.26))):
        with pytest.raises(UserError, match="distilled from other data: the mean and deviation stored in it differ"):
            DistilledFile.open(path).set(0, other)
    content = torch.load(path) | {"normalisation": [1]}
    torch.save(content, path)
    with pytest.raises(UserError, match="its normalisation must be mean and std, or zca"):
        DistilledFile.open(path).set(0, tiny_real)
    nested = []
    for _ in range(60):
        nested = [nested, nested]  # written out, it would have 2^60 parts
    torch.save(content | {"dataset": nested}, path)
    with pytest.raises(UserError, match=r"was distilled from \?"):
        DistilledFile.open(path).set(0, tiny_real)


def test_networks_of_wrong_kinds(tmp_path, tiny_real, capfd):
    state = get_network("ConvNetD1", 3, 3, (16, 16), generator(0)).state_dict()
    first = next(iter(state))
    for damaged in (
        {1: torch.ones(3)},
        dict(state) | {first: state[first].to(torch.complex64)},
        dict(state) | {first: 3},
    ):
        torch.save(damaged, tmp_path / fuzz_readers.NETWORK)
        capfd.readouterr()
        with pytest.raises(UserError, match="is no state dict"):
            load_trained(tmp_path, "ConvNetD1", tiny_real, 0, "best")
        assert capfd.readouterr() == ("", "")


def test_tinyimagenet_of_wrong_kinds(tmp_path):
    images = torch.zeros(200, 3, 64, 64, dtype=torch.uint8)
    good = {"images_train": images, "labels_train": torch.arange(200), "images_val": images[:2].clone()}
    good |= {"labels_val": torch.arange(2)}
    keys = "must hold the keys classes, images_train, labels_train, images_val, labels_val: "
    for change, found in (
        ({"labels_train": torch.arange(200)[:, None, None]}, r"train labels are int64 \[200, 1, 1\]"),
        ({"labels_val": torch.arange(2.0)}, r"test labels are float32 \[2\]"),
        ({"images_val": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "test images 3x32x32"),
        ({"images_val": torch.zeros(2, 3, 64, 64)}, f"images of another type; it {keys}"),
        ({"images_val": 3}, f"lacks tensors; it {keys}"),
    ):
        torch.save(good | change, tmp_path / "tinyimagenet.pt")
        with pytest.raises(UserError, match=f"--data_path: .*{found}"):
            load_dataset("TinyImageNet", tmp_path)


# --- npz data sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(0), "12 train images and 0 labels"),
        (
            np.array([*range(11), 10**13]),
            r"train labels are 0\.\.10000000000000, 12 different ones, .* must be 0\.\.11",
        ),
        (np.array([*range(11), 2 * 10**9]), r"train labels are 0\.\.2000000000, 12 different ones"),
        (np.array([*range(11), 2**64 - 1], np.uint64), r"labels are -1\.\.10"),
    ],
)
def test_labels_that_claim_too_much(labels, message, tmp_path):
    images = np.zeros((12, 8, 8), np.uint8)
    arrays = {"train_images": images, "test_images": images, "test_labels": np.arange(12), "train_labels": labels}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_dataset("npz", tmp_path / "a.npz")


# --- image folders ----------------------------------------------------------------------------------------------------


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (value, 0, 0)).save(path)
    return path


def test_links_in_folders(tmp_path):
    inside, outside = picture(tmp_path / "pool" / "a.png"), picture(tmp_path / "else" / "b.png")
    pool = inside.parent
    (pool / "link.png").symlink_to("a.png")
    assert [p.name for p in ImageReader("--ood_path").find(pool)] == ["a.png", "link.png"]
    (tmp_path / "named").symlink_to(pool)
    assert len(ImageReader("--ood_path").find(tmp_path / "named")) == 2  # the folder that the user names may be a link
    (pool / "more").symlink_to(outside.parent)
    assert [p.name for p in ImageReader("--ood_path").find(pool)] == ["a.png", "link.png", "b.png"]
    for target in ("gone.png", "c.png"):
        (pool / "c.png").symlink_to(target)
        with pytest.raises(UserError, match=r"--ood_path: broken links, to be mended or removed: .*c\.png"):
            ImageReader("--ood_path").folder_or_array(pool, 3, (8, 8))
        (pool / "c.png").unlink()


def test_links_in_image_folders(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            picture(tmp_path / "data" / part / name / "0.png", 200)
    picture(tmp_path / "c" / "0.png")
    assert len(load_dataset("ImageFolder", tmp_path / "data").images_train) == 2
    (tmp_path / "data" / "train" / "c").symlink_to(tmp_path / "c")
    assert load_dataset("ImageFolder", tmp_path / "data").class_names == ("a", "b", "c")


def test_names_of_all_kinds(tmp_path):
    """Spaces, quotes, other alphabets, and bytes that are no text."""
    names = ["a b", "it's", 'say "ü"', "图像", "-x", os.fsdecode(b"\xff\xfe")]
    for value, name in enumerate(names):
        picture(tmp_path / "pool" / f"{name}.png", 40 * value)
    images = ImageReader("--ood_path").folder_or_array(tmp_path / "pool", 3, (4, 4))
    assert sorted(images[:, 0, 0, 0].tolist()) == [0, 40, 80, 120, 160, 200]
    for name in names:
        np.save(tmp_path / f"{name}.npy", np.full((7, 8, 8), 255, np.uint8))
        assert len(ImageReader("").folder_or_array(tmp_path / f"{name}.npy", 3, (8, 8))) == 7
        torch.save([1], tmp_path / name) if name.isprintable() else None
        assert not name.isprintable() or read_pt(tmp_path / name, "file") == [1]


def test_other_formats_under_the_name_of_an_image(tmp_path):
    """PIL would start an outside program for PostScript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="no image that can be read"):
        ImageReader("--ood_path").files([tmp_path / "a.png"], 3, (8, 8))


# --- OOD sets ---------------------------------------------------------------------------------------------------------


def source(real, path, download=False, data_path=None):
    return OODSource(real, path, data_path or path, download, 20, 1)


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 300, "a/" + "x" * 300, "a\0b"])
def test_neither_a_name_nor_a_path(name, digits, tmp_path):
    with pytest.raises(UserError, match=r"is neither the name nor the path of a set|unknown OOD set|is missing\."):
        source(digits, tmp_path).find_all([name])


@pytest.mark.parametrize("name", ["a/b", "../nothing", "/nowhere", "a.npz", "a.txt"])
def test_paths_that_lead_nowhere(name, digits, tmp_path):
    found, missing = source(digits, tmp_path).find([name, "blob"])
    assert [s.name for s in found] == ["blob"]
    places = name if Path(name).is_absolute() else f"{name} and {tmp_path / name}"
    assert f"looked for {places}; give the path" in missing[name]


def test_damage_shows_when_sets_are_looked_for(digits, tmp_path):
    np.savez(tmp_path / "cut.npz", images=np.zeros((30, 8, 8), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-40])
    np.savez(tmp_path / "key.npz", pictures=np.zeros((30, 8, 8), np.uint8))
    np.save(tmp_path / "kind.npy", np.zeros((30, 8, 8), np.float32))
    (tmp_path / "link").symlink_to("gone")
    picture(tmp_path / "folder" / "a.png").write_bytes(b"\x89PNG")
    for name, message in (
        ("cut", "cannot read"),
        ("key", "has no key 'images'"),
        ("kind", "must be uint8"),
        ("folder", "cannot read the image"),
        ("link", "is not a file"),
    ):
        with pytest.raises(UserError, match=f"--ood_path: .*{message}"):
            source(digits, tmp_path).find([name])


def test_folders_are_decoded_for_the_chosen_images_only(digits, tmp_path, monkeypatch):
    for value in range(50):
        picture(tmp_path / "mine" / f"{value:02}.png", 5 * value)
    decoded = []
    read = ImageReader.files
    monkeypatch.setattr(ImageReader, "files", lambda self, p, *a: decoded.append(p) or read(self, p, *a))
    out = source(digits, tmp_path).find(["mine"])[0][0].load()
    chosen = torch.randperm(50, generator=generator(1, "ood", "mine"))[:20]
    assert [[int(p.stem) for p in paths] for paths in decoded] == [chosen.tolist()]
    everything = ImageReader("").folder_or_array(tmp_path / "mine", 1, (8, 8))
    assert torch.equal(out, digits.normalize(conform(everything[chosen], 1, (8, 8))))


def test_torchvision_sets_beside_own_data(digits, tmp_path):
    """`--data_path` is the user's file then, so they are looked for in `--ood_path`."""
    own = replace(digits, name="npz")
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "ood").mkdir()
    _, missing = source(own, tmp_path / "ood", data_path=tmp_path / "own.npz").find(["SVHN"])
    assert f"--ood_path {tmp_path / 'ood'}: SVHN is not there" in missing["SVHN"]
    np.savez(tmp_path / "ood" / "svhn.npz", test_images=images)
    (found,), missing = source(own, tmp_path / "ood", data_path=tmp_path / "own.npz").find(["SVHN"])
    assert not missing
    assert found.load().shape == (9, 1, 8, 8)
    assert not source(digits, tmp_path / "ood", data_path=tmp_path).find(["SVHN"])[1]  # there, too, it is looked for
    assert f"--data_path {tmp_path}: SVHN" in source(digits, tmp_path, data_path=tmp_path).find(["SVHN"])[1]["SVHN"]


def test_nothing_is_fetched_when_a_set_cannot_be_had(digits, tmp_path, monkeypatch):
    fetched = []

    def fetch(name, *_):
        fetched.append(name)
        raise NotThere(f"{name}: no network")

    monkeypatch.setattr("utils.ood.sets.fetch_pytorch_ood", fetch)
    names = ["Textures", "iSUN", "gaussian"]
    found, missing = source(digits, tmp_path, download=True).find(names, skip_missing=False)
    assert (fetched, [s.name for s in found], list(missing)) == ([], ["gaussian"], ["iSUN"])
    found, missing = source(digits, tmp_path, download=True).find(names, skip_missing=True)
    assert (fetched, [s.name for s in found], sorted(missing)) == (["Textures"], ["gaussian"], ["Textures", "iSUN"])
    assert "no network; or put images into" in missing["Textures"]


# --- downloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "SVHN"])
def test_failed_downloads_leave_nothing(name, tmp_path, monkeypatch):
    def half(url, root, *_, **__):
        Path(root).mkdir(parents=True, exist_ok=True)
        (Path(root) / "half.gz").write_bytes(b"half")
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", half)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", half)
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", half)
    for root in (tmp_path, tmp_path / "new" / "data"):
        with pytest.raises(UserError, match="its download failed"):
            load_dataset(name, root)
        assert list(tmp_path.iterdir()) == []


def test_downloads_are_moved_when_they_are_complete(tmp_path, monkeypatch):
    arrays = write_mnist(tmp_path / "server", "MNIST")

    def whole(url, download_root, **_):
        assert not (tmp_path / "data" / "MNIST").exists()
        file = tmp_path / "server" / "MNIST" / "raw" / Path(url).stem
        (Path(download_root) / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", whole)
    real = load_dataset("MNIST", tmp_path / "data")
    np.testing.assert_array_equal(real.images_train.numpy(), arrays["train"][0])
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["MNIST"]
    assert torch.equal(load_dataset("MNIST", tmp_path / "data", download=False).images_train, real.images_train)


def copy_of_setup(folder):
    """`scripts/setup.sh` in a project that requires nothing."""
    (folder / "scripts").mkdir()
    (folder / "requirements.txt").write_text("")
    return shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")


def test_setup_mends_an_environment_that_does_not_start(tmp_path):
    """Stand-ins for Python: the one in `.venv` does not start until `-m venv` has made it anew."""

    def stand_in(path, body):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{path.name} $*" >> calls\n{body}\n')
        path.chmod(0o755)

    stand_in(tmp_path / ".venv" / "bin" / "python", "exit 1")
    stand_in(
        tmp_path / "base", 'case "$2" in venv) printf "#!/bin/sh\\necho new \\$* >> calls" > .venv/bin/python;; esac'
    )
    setup = copy_of_setup(tmp_path)
    for _ in range(2):  # the second call has nothing to do
        environment = os.environ | {"BASE_PYTHON": str(tmp_path / "base")}
        subprocess.run(["bash", str(setup)], env=environment, check=True)
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if " -m " in line]
    install = "new -m pip install --quiet --disable-pip-version-check -r requirements.txt"
    assert calls == ["base -m venv --clear .venv", "new -m pip --version", install]


@pytest.mark.parametrize("ensurepip", [True, False])
def test_setup_keeps_an_environment_without_pip(tmp_path, ensurepip):
    """As uv makes them. pip is put into it, or the error says what to do; nothing of it is deleted."""
    folder = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (folder / "mine").write_text("kept")
    if not ensurepip:
        (folder / "bin" / "python").unlink()
        (folder / "bin" / "python").write_text('#!/bin/sh\nif [ "$1" = -m ]; then exit 1; fi\n')
        (folder / "bin" / "python").chmod(0o755)
    setup = copy_of_setup(tmp_path)
    done = subprocess.run(["bash", str(setup)], capture_output=True, text=True)
    assert (folder / "mine").read_text() == "kept"
    assert done.returncode == (0 if ensurepip else 2)
    assert ensurepip or ".venv has no pip" in done.stderr


# --- draws and flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "n"), [(5, 9), (5, 5), (1, 1), (10, 3), (1000, 256), (1000, 200), (50000, 256)])
def test_distinct_indices(total, n):
    drawn = distinct(total, n, generator(3))
    assert len(drawn) == len(set(drawn.tolist())) == min(n, total)
    assert 0 <= drawn.min() <= drawn.max() < total
    assert torch.equal(drawn, distinct(total, n, generator(3)))


def test_distinct_indices_are_uniform():
    """Every ordered pair below 9 (72 of them) as often, at the rejection path (4·2 < 9): chi-squared."""
    g = generator(5)
    pairs = torch.stack([distinct(9, 2, g) for _ in range(7200)])
    counts = (pairs[:, 0] * 9 + pairs[:, 1]).bincount(minlength=81).view(9, 9)
    assert counts.diagonal().sum() == 0
    off = counts[~torch.eye(9, dtype=torch.bool)].double()
    assert ((off - 100) ** 2 / 100).sum() < 71 + 5 * (2 * 71) ** 0.5


@given(st.one_of(st.text(), st.integers().map(str), st.just("9" * 30)), st.integers(-3, 3))
@settings(max_examples=200, deadline=None)
def test_counts(text, least):
    try:
        expected = int(text)
    except ValueError:
        expected = least - 1
    if expected >= 2**63:
        with pytest.raises(argparse.ArgumentTypeError, match="is too large"):
            count(least)(text)
    elif expected >= least:
        assert count(least)(text) == expected
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"{text!r} is not a whole number")):
            count(least)(text)


@given(st.one_of(st.text(), st.floats().map(str)), st.floats(-10, 10), st.booleans())
@settings(max_examples=200, deadline=None)
def test_numbers(text, least, exclusive):
    try:
        expected = float(text)
    except ValueError:
        expected = float("nan")
    accepted = abs(expected) < float("inf") and (expected > least or (expected == least and not exclusive))
    if accepted:
        assert number(least, exclusive)(text) == expected
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            number(least, exclusive)(text)


@given(st.text(), st.lists(st.text(min_size=1), min_size=1))
@settings(max_examples=100, deadline=None)
def test_names(text, accepted):
    if text in accepted:
        assert one_of("name", accepted)(text) == text
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="unknown name"):
            one_of("name", accepted)(text)


def test_pixels_of_16_bits(tmp_path):
    """PIL would make all above 255 white."""
    values = np.arange(0, 65536, 257 * 4 + 13, dtype=np.uint16)[:63].reshape(7, 9)
    for name in ("a.png", "b.tif"):
        Image.fromarray(values).save(tmp_path / name)
    images = ImageReader("--ood_path").folder_or_array(tmp_path, 3, (7, 9))
    expected = torch.from_numpy(np.rint(values / 257).astype(np.uint8))
    assert all(torch.equal(channel, expected) for image in images for channel in image)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "c.tif")
    with pytest.raises(UserError, match=r"c.tif: pixels of 32 bits \(mode F\) have no range"):
        ImageReader("--ood_path").folder_or_array(tmp_path, 3, (7, 9))
