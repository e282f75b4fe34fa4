"""OOD sets by name and by path: torchvision's test parts in their own formats, arrays, folders and OpenOOD's lists."""

import bz2
import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_idx, write_mnist
from PIL import Image
from torchvision import datasets as tv

from utils.core.errors import UserError
from utils.core.pixels import conform
from utils.core.rng import generator
from utils.data.download import NotThere
from utils.ood.files import shown_names
from utils.ood.sets import OODSource, validation_sets

G = np.random.default_rng(0)


def source(real, ood_path, data_path=None, download=False, limit=200):
    return OODSource(real, Path(ood_path), Path(data_path or ood_path), download, limit, 1)


def pixels(*shape):
    return G.integers(0, 256, shape, dtype=np.uint8)


def check(found, arrays, real):
    """The images of a set are all of `arrays`, `[H, W]` or `[H, W, 3]`, in the data set's shape, in any order."""
    images = [torch.from_numpy(np.ascontiguousarray(a.reshape(*a.shape[:2], -1).transpose(2, 0, 1))) for a in arrays]
    expected = [real.normalize(conform(x[None], real.channel, real.im_size)) for x in images]
    out = found.load()
    distances = torch.cdist(out.flatten(1), torch.cat(expected).flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert sorted(distances.argmin(1).tolist()) == list(range(len(arrays)))
    assert distances.amin(1).max() < 1e-5


# --- of torchvision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
@pytest.mark.parametrize("place", ["data", "ood"])
def test_grey_sets(name, place, digits, tmp_path):
    """The test part, in `--data_path` or in `--ood_path`, whose folder of that name is no folder of images then."""
    arrays = write_mnist(tmp_path / place, name)
    (found,), missing = source(digits, tmp_path / "ood", tmp_path / "data").find([name])
    assert (found.name, missing) == (name, {})
    check(found, arrays["test"][0][:, 0], digits)


def test_letters_stand_upright(digits, tmp_path):
    """EMNIST's files have rows as columns."""
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    images = pixels(6, 28, 28)
    write_idx(raw / "emnist-letters-test-images-idx3-ubyte", images.transpose(0, 2, 1))
    write_idx(raw / "emnist-letters-test-labels-idx1-ubyte", np.arange(6, dtype=np.uint8))
    (found,) = source(digits, tmp_path).find_all(["EMNIST"])
    check(found, images, digits)


def test_usps(digits, tmp_path):
    values = pixels(5, 16, 16)
    lines = [
        f"{i + 1} " + " ".join(f"{k + 1}:{v / 127.5 - 1:.7f}" for k, v in enumerate(image.flat))
        for i, image in enumerate(values)
    ]
    (tmp_path / "usps.t.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    (found,) = source(digits, tmp_path).find_all(["USPS"])
    grey = tv.USPS(tmp_path, train=False).data
    assert np.abs(grey.astype(int) - values).max() <= 1  # torchvision cuts the fraction off
    check(found, grey, digits)


def test_stl10(digits, tmp_path, monkeypatch):
    """Its files hold columns; torchvision compares the sums of all of them."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = pixels(4, 96, 96, 3)
    for name in ("train_X.bin", "train_y.bin", "unlabeled_X.bin"):
        (folder / name).write_bytes(b"\1")
    (folder / "test_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    (folder / "test_y.bin").write_bytes(bytes(range(1, 5)))
    for attribute in ("train_list", "test_list"):
        sums = [[n, hashlib.md5((folder / n).read_bytes()).hexdigest()] for n, _ in getattr(tv.STL10, attribute)]
        monkeypatch.setattr(tv.STL10, attribute, sums)
    colour = replace(digits, images_train=torch.zeros(2, 3, 16, 16, dtype=torch.uint8), mean=(0.5,) * 3, std=(0.5,) * 3)
    (found,) = source(colour, tmp_path).find_all(["STL10"])
    check(found, images, colour)


def test_omniglot(digits, tmp_path, monkeypatch):
    root = tmp_path / "omniglot-py"
    arrays = [(pixels(105, 105) > 127) * np.uint8(255) for _ in range(4)]
    for i, array in enumerate(arrays):
        folder = root / "images_evaluation" / "Angelic" / f"character{i % 2:02}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).convert("1").save(folder / f"{i}.png")
    with zipfile.ZipFile(root / "images_evaluation.zip", "w"):
        pass
    md5 = hashlib.md5((root / "images_evaluation.zip").read_bytes()).hexdigest()
    monkeypatch.setattr(tv.Omniglot, "zips_md5", {"images_evaluation": md5})
    (found,) = source(digits, tmp_path).find_all(["Omniglot"])
    check(found, arrays, digits)


class Signs:
    """A data set of files in its root, as GTSRB is."""

    def __init__(self, root, split, download):
        assert split == "test"
        self.folder = Path(root) / "gtsrb"
        if download:
            self.folder.mkdir()
            for i in range(3):
                Image.new("RGB", (20 + i, 15), (0, 90 * i, 7)).save(self.folder / f"{i}.png")
        if not self.folder.is_dir():
            raise RuntimeError("not found")

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Image.open(self.folder / f"{index}.png"), 0


def test_sets_of_files_are_read_where_they_were_moved(digits, tmp_path, monkeypatch):
    """They are downloaded into a temporary folder, with `--download all` only."""
    monkeypatch.setattr(tv, "GTSRB", Signs)
    _, missing = source(digits, tmp_path / "ood", tmp_path).find(["GTSRB"])
    assert "GTSRB is not there (not found). Put gtsrb/ (" in missing["GTSRB"]
    assert "or gtsrb.npz with the key test_images; or put images into" in missing["GTSRB"]
    (found,) = source(digits, tmp_path / "ood", tmp_path, download=True).find_all(["GTSRB"])
    assert [p.name for p in tmp_path.iterdir()] == ["gtsrb"]
    check(found, [np.full((15, 20 + i, 3), (0, 90 * i, 7), np.uint8) for i in range(3)], digits)


def test_the_data_set_itself_is_no_ood_set(digits, tmp_path):
    np.savez(tmp_path / "FashionMNIST.npz", images=pixels(30, 28, 28))
    own = replace(digits, name="FashionMNIST")
    with pytest.raises(UserError, match="--ood_sets FashionMNIST: its images are of --dataset FashionMNIST"):
        source(own, tmp_path).find(["blob", "FashionMNIST"])
    assert source(digits, tmp_path).find_all(["FashionMNIST"])
    tiny = replace(digits, name="TinyImageNet")
    assert "TinyImageNet_resize" not in source(tiny, tmp_path).default_names()
    with pytest.raises(UserError, match="--ood_sets TinyImageNet_crop: its images are of --dataset TinyImageNet"):
        source(tiny, tmp_path).find(["TinyImageNet_crop"])


def test_an_unknown_name_is_told_how_to_become_known(digits, tmp_path):
    with pytest.raises(UserError, match=r"unknown OOD set 'Letters'.*Omniglot.*scripts/dataset_outliers\.py"):
        source(digits, tmp_path).find(["Letters"])


# --- paths ------------------------------------------------------------------------------------------------------------


def write_kinds(root):
    """One set as an array in two files, as a folder and as a list."""
    images = pixels(40, 8, 8)
    root.mkdir(parents=True)
    np.savez(root / "zipped.npz", images=images)
    np.save(root / "plain.npy", images)
    (root / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(root / "folder" / f"{i:02}.png")
    (root / "list.txt").write_text("".join(f"folder/{i:02}.png -1\n" for i in range(40)))
    return images


@pytest.mark.parametrize("file", ["zipped.npz", "plain.npy", "folder", "list.txt"])
def test_paths(file, digits, tmp_path, monkeypatch):
    """Given from here, below `--ood_path`, or as a name: the same images, those of the seed and the stem."""
    images = write_kinds(tmp_path / "ood" / "mine")
    monkeypatch.chdir(tmp_path)
    stem = Path(file).stem
    chosen = torch.randperm(40, generator=generator(1, "ood", stem))[:20]
    expected = digits.normalize(torch.from_numpy(images[chosen])[:, None] / 255)
    for given, ood_path in ((f"ood/mine/{file}", "other"), (f"mine/{file}", "ood"), (stem, "ood/mine")):
        if given == "list":
            continue  # a list is given with its suffix
        (found,) = source(digits, ood_path, limit=20).find_all([given])
        assert found.name == stem
        assert torch.allclose(found.load(), expected, atol=1e-6)
    monkeypatch.chdir(tmp_path / "ood" / "mine")
    if file in ("zipped.npz", "folder"):
        assert torch.allclose(source(digits, "other", limit=20).find_all([file])[0].load(), expected, atol=1e-6)


def test_two_sets_of_one_stem(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = {}
    for path in ("a/my.npz", "b/my.npz", "c/patches.npy", "c/d.npz", "c/d.npy"):
        arrays[path] = pixels(1, 8, 8)
        (tmp_path / path).parent.mkdir(exist_ok=True)
        if path.endswith("z"):
            np.savez(path, images=arrays[path])
        else:
            np.save(path, arrays[path])
    sets = source(digits, "ood").find_all(["patches", *arrays])
    assert [s.name for s in sets] == ["patches", *arrays]
    for found, array in zip(sets[1:], arrays.values(), strict=True):
        check(found, array, digits)
    assert shown_names(["/x/a/my.npz", "my"]) == {"/x/a/my.npz": "/x/a/my.npz", "my": "my"}
    assert shown_names(["/x/a/my.npz", "other"]) == {"/x/a/my.npz": "my", "other": "other"}


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [".", "images_classic", "images_largescale", "benchmark_imglist/cifar10"])
def test_lists_as_openood_lays_them_out(base, digits, tmp_path):
    lists = tmp_path / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    (tmp_path / base / "texture" / "banded").mkdir(parents=True)
    arrays = {name: pixels(8, 8) for name in ("texture/banded/a.png", "texture/banded/two words.png")}
    for name, array in arrays.items():
        Image.fromarray(array).save(tmp_path / base / name)
    Image.fromarray(pixels(8, 8)).save(tmp_path / base / "texture" / "banded" / "not listed.png")
    (lists / "test_texture.txt").write_text("".join(f"{name} -1\n" for name in arrays) + "\n")
    for given in ("benchmark_imglist/cifar10/test_texture.txt", str(lists / "test_texture.txt")):
        (found,) = source(digits, tmp_path).find_all([given])
        assert found.name == "test_texture"
        check(found, list(arrays.values()), digits)


def test_lists_that_do_not_fit(digits, tmp_path):
    root = tmp_path / "root"
    (root / "images_classic").mkdir(parents=True)
    for place in (tmp_path / "out.png", root / "images_classic" / "in.png"):
        Image.fromarray(pixels(8, 8)).save(place)
    missing = "".join(f"{i:02}.png 0\n" for i in range(25))
    for text, message in (
        ("in.png 0\nin.png\n", r"line 2 of .*test.txt is 'in.png'; it must be `path label`"),
        ("in.png 0\nin.png dog\n", "line 2 of .*; it must be `path label`, the label a whole number"),
        ("../../out.png 0\n", r"line 1 of .* leads out of its folder: \.\./\.\./out.png"),
        (f"{tmp_path}/out.png 0\n", "line 1 of .* leads out of its folder"),
        ("in.png 0\n" + missing, r"names 25 images that are not there: .*/00.png, .*/19.png and 5 more$"),
        (missing, r"none of the 25 images of .*test.txt, as 00.png, is in one of .*root, .*/images_classic, "),
        ("\n", "names no images"),
    ):
        (root / "test.txt").write_text(text)
        with pytest.raises(UserError, match=f"^--ood_sets: .*{message}") as error:
            source(digits, root).find(["test.txt"])
        assert not isinstance(error.value, NotThere)  # --skip_missing does not pass over them


# --- the data set itself, counts, what is missing ---------------------------------------------------------------------


def test_the_data_set_by_its_path_is_no_ood_set(digits, tmp_path, monkeypatch):
    """Its file; its folder, those inside, one above; lists of its images; also through links and other spellings."""
    root = tmp_path / "all" / "own"
    for place in ("train/cat", "test/cat", "ood"):
        (root / place).mkdir(parents=True)
        Image.fromarray(pixels(8, 8)).save(root / place / "a.png")
    np.savez(tmp_path / "own.npz", images=pixels(6, 8, 8))
    np.savez(tmp_path / "other.npz", images=pixels(6, 8, 8))
    (tmp_path / "link.npz").symlink_to("own.npz")
    (tmp_path / "list.txt").write_text("all/own/test/cat/a.png 0\n")
    (tmp_path / "good.txt").write_text("all/own/ood/a.png 0\n")
    monkeypatch.chdir(tmp_path)
    folders = ("all", "all/own", "all/own/test", "all/own/train/cat", "all/../all/own/test/cat", "list.txt")
    for name, data_path, refused, accepted in (
        ("npz", "own.npz", ("own.npz", str(tmp_path / "own.npz"), "./own.npz", "link.npz", "own"), ("other.npz",)),
        ("ImageFolder", "all/own", (*folders, str(root)), ("all/own/ood/", "good.txt", "own.npz")),
    ):
        sets = source(replace(digits, name=name), ".", data_path)
        for given in refused:
            with pytest.raises(UserError, match=f"^--ood_sets {given}: its images are of --dataset {name}, so they"):
                sets.find([given])
        assert len(sets.find_all(accepted)) == len(accepted)
    assert source(digits, ".", tmp_path).find_all(["all/own/"])  # `--data_path` holds other sets than Digits, too


def test_a_set_says_how_many_images_are_scored(digits, tmp_path, monkeypatch):
    write_kinds(tmp_path / "ood")
    monkeypatch.setattr(tv, "GTSRB", Signs)
    data = source(digits, tmp_path / "ood", tmp_path, download=True, limit=20)
    sets = data.find_all(["zipped.npz", "plain", "folder/", "list.txt", "blob", "patches", "GTSRB"])
    sets += validation_sets(replace(data, limit=400))
    assert [found.count for found in sets] == [20] * 6 + [3] + [360] * 7
    assert [len(found.load()) for found in sets] == [found.count for found in sets]
    assert sets[0].lines() == (f"OOD set zipped: 20 images, {tmp_path / 'ood' / 'zipped.npz'}",)


def test_an_absolute_path_that_leads_nowhere(digits, tmp_path):
    there = source(digits, tmp_path)
    for names, message in (
        ([f"{tmp_path}/x"], rf"^--ood_sets: {tmp_path}/x is missing\. Choose sets that need no files: "),
        ([f"{tmp_path}/x", "/y"], rf"^--ood_sets: {tmp_path}/x, /y are missing\. Choose"),
        ([f"{tmp_path}/x", "a/b"], rf"{tmp_path}/x, a/b are missing\. Give a/b as seen from here or from"),
    ):
        with pytest.raises(UserError, match=message):
            there.find_all(names)
    assert there.find([f"{tmp_path}/x"])[1] == {f"{tmp_path}/x": f"looked for {tmp_path}/x; give the path of the set"}


@pytest.mark.parametrize("name", ["digits", "tiny_real"])
def test_blobs_by_hand(name, request):
    """scikit-image's `gaussian` is a sum over a window of four sigma; colours are a third axis of it, as published."""
    real = request.getfixturevalue(name)
    found = source(real, ".", limit=2).find_all(["blob"])[0].load()
    bernoulli = torch.rand(2, real.channel, *real.im_size, generator=generator(1, "ood", "blob")) < 0.7
    weights = np.exp(-(np.arange(-6, 7) ** 2) / (2 * 1.5**2))
    blurred = bernoulli.double().numpy()
    for axis in (1, 2, 3) if real.channel > 1 else (2, 3):
        window = [(6, 6) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(blurred, window, mode="edge" if axis == 1 else "symmetric")
        length = blurred.shape[axis]
        shifted = [padded.take(range(k, k + length), axis) for k in range(13)]
        blurred = np.average(shifted, axis=0, weights=weights)
    expected = np.where(blurred < 0.75, 0, blurred) * 2 - 1
    sure = abs(blurred - 0.75) > 1e-5
    np.testing.assert_allclose(found.cpu().numpy()[sure], expected[sure], atol=1e-5)
    assert 0.2 < (expected == -1).mean() < 0.99
