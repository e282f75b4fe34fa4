"""Every data set through tiny files in its real on-disk format."""

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_mnist
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision import datasets as tv

from utils.core.errors import UserError
from utils.data.datasets import SPECS, load_dataset
from utils.data.download import fetch_pytorch_ood, load_test_images
from utils.settings import common

G = np.random.default_rng(0)


def write_svhn(root, _):
    arrays = {}
    for part in ("train", "test"):
        images, labels = G.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8), np.arange(20) % 10
        savemat(
            root / f"{part}_32x32.mat",
            {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None]},
        )
        arrays[part] = (images, labels)
    return arrays


def write_cifar(root, name):
    """The python version of CIFAR: pickled batches, written here with the keys of the original."""
    folder = root / ("cifar-10-batches-py" if name == "CIFAR10" else "cifar-100-python")
    folder.mkdir()
    classes = 10 if name == "CIFAR10" else 100
    key = "labels" if name == "CIFAR10" else "fine_labels"
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if name == "CIFAR10" else ["train", "test"]
    per_file = {}
    for file in files:
        images, labels = G.integers(0, 256, (classes, 3, 32, 32), dtype=np.uint8), np.arange(classes)
        (folder / file).write_bytes(pickle.dumps({"data": images.reshape(classes, -1), key: labels.tolist()}))
        per_file[file] = (images, labels)
    meta, names = ("batches.meta", "label_names") if name == "CIFAR10" else ("meta", "fine_label_names")
    (folder / meta).write_bytes(pickle.dumps({names: [str(i) for i in range(classes)]}))
    train = [per_file[f] for f in files[:-1]]
    return {"train": tuple(np.concatenate(a) for a in zip(*train, strict=True)), "test": per_file[files[-1]]}


def accept_checksums(monkeypatch, cls, folder):
    """Let torchvision expect the checksums of the tiny files."""

    def sums(entries):
        return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in entries]

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(cls, attribute, sums(getattr(cls, attribute)))
    meta = {**cls.meta, "md5": hashlib.md5((folder / cls.meta["filename"]).read_bytes()).hexdigest()}
    monkeypatch.setattr(cls, "meta", meta)


WRITERS = {
    "MNIST": write_mnist,
    "FashionMNIST": write_mnist,
    "SVHN": write_svhn,
    "CIFAR10": write_cifar,
    "CIFAR100": write_cifar,
}


@pytest.mark.parametrize("name", WRITERS)
def test_torchvision_sets(name, tmp_path, monkeypatch):
    arrays = WRITERS[name](tmp_path, name)
    if name == "CIFAR10":
        accept_checksums(monkeypatch, tv.CIFAR10, tmp_path / "cifar-10-batches-py")
    if name == "CIFAR100":
        accept_checksums(monkeypatch, tv.CIFAR100, tmp_path / "cifar-100-python")
    if name == "SVHN":
        md5 = {p: hashlib.md5((tmp_path / f"{p}_32x32.mat").read_bytes()).hexdigest() for p in ("train", "test")}
        split = {p: [tv.SVHN.split_list[p][0], f"{p}_32x32.mat", md5[p]] for p in ("train", "test")}
        monkeypatch.setattr(tv.SVHN, "split_list", split)
    real = load_dataset(name, tmp_path, download=False)
    for part, images, labels in (
        ("train", real.images_train, real.labels_train),
        ("test", real.images_test, real.labels_test),
    ):
        np.testing.assert_array_equal(images.numpy(), arrays[part][0])
        np.testing.assert_array_equal(labels.numpy(), arrays[part][1])
    spec = SPECS[name]
    mean, std = (np.array(v).reshape(1, -1, 1, 1) for v in (spec.mean, spec.std))
    np.testing.assert_allclose(real.test_images.numpy(), (arrays["test"][0] / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(
        real.train_batch(torch.tensor([3, 1])).numpy(), (arrays["train"][0][[3, 1]] / 255 - mean) / std, atol=1e-5
    )
    np.testing.assert_array_equal(load_test_images(name, tmp_path, False).numpy(), arrays["test"][0])
    for c, indices in enumerate(real.class_indices):
        assert (real.labels_train[indices] == c).all()


def test_digits(digits):
    """All images once, a fifth for testing, every class in both; values 0 to 16 become [0, 1]."""
    bunch = load_digits()
    everything = torch.cat([digits.images_train, digits.images_test])
    assert len(digits.images_test) == 360
    rows = {tuple((r * 16).round().int().tolist()) for r in everything.flatten(1)}
    assert rows == {tuple(r.astype(int)) for r in bunch.data}
    counts = digits.labels_test.bincount()
    assert counts.min() >= 34
    assert counts.max() <= 37
    normalised = digits.train_batch(torch.arange(len(digits.images_train)))
    assert normalised.mean().abs() < 1e-4
    assert abs(normalised.std() - 1) < 1e-3
    assert torch.equal(load_dataset("Digits", "nowhere").labels_test, digits.labels_test)


def npz(path, **changes):
    arrays = {
        "train_images": G.integers(0, 256, (12, 9, 9, 3), dtype=np.uint8),
        "train_labels": np.arange(12, dtype=np.uint8)[:, None] % 4,
        "test_images": G.integers(0, 256, (8, 9, 9, 3), dtype=np.uint8),
        "test_labels": np.arange(8)[:, None] % 4,
    } | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def test_npz_file(tmp_path):
    arrays = npz(tmp_path / "any.npz")
    real = load_dataset("npz", tmp_path / "any.npz")
    assert (real.num_classes, real.channel, real.im_size) == (4, 3, (9, 9))
    np.testing.assert_array_equal(real.images_train.permute(0, 2, 3, 1).numpy(), arrays["train_images"])
    np.testing.assert_allclose(real.mean, (arrays["train_images"] / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(real.std, (arrays["train_images"] / 255).std((0, 1, 2)), rtol=1e-6)


def test_grey_npz_has_one_channel(tmp_path):
    npz(
        tmp_path / "grey.npz", train_images=np.full((12, 9, 9), 255, np.uint8), test_images=np.ones((8, 9, 9), np.uint8)
    )
    assert load_dataset("npz", tmp_path / "grey.npz").images_train.shape == (12, 1, 9, 9)


def test_an_empty_channel_is_not_blown_up(tmp_path):
    """POE inverts it, and OOD images have something in it."""
    images = np.zeros((12, 9, 9, 3), np.uint8)
    images[..., 0] = np.arange(12)[:, None, None]
    npz(tmp_path / "two.npz", train_images=images)
    real = load_dataset("npz", tmp_path / "two.npz")
    assert real.std == pytest.approx(((images[..., 0] / 255).std(), 1 / 255, 1 / 255))
    assert real.normalize(torch.ones(1, 3, 1, 1)).max() == pytest.approx(255, rel=0.3)


def test_named_npz_replaces_the_download(tmp_path):
    images = G.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(20) % 10
    npz(tmp_path / "cifar10.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    real = load_dataset("CIFAR10", tmp_path, download=False)
    assert real.mean == SPECS["CIFAR10"].mean
    np.testing.assert_array_equal(real.images_test.permute(0, 2, 3, 1).numpy(), images)
    npz(tmp_path / "mnist.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    with pytest.raises(UserError, match="images are 3x32x32; MNIST has 1x28x28"):
        load_dataset("MNIST", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "has no key 'test_labels'"),
        ({"train_images": np.zeros((12, 9, 9, 3), np.float32)}, "must be uint8"),
        ({"train_images": np.zeros((12, 3, 9, 9), np.uint8)}, "must be uint8"),
        ({"train_labels": np.arange(12) - 1}, r"labels are -1..10, 12 different ones, .*; they must be 0..11"),
        (
            {"train_labels": np.arange(12) % 6 + 1},
            r"train labels are 1..6, 6 different ones, and test .*; they must be 0..5, and",
        ),
        (
            {"train_labels": np.arange(12) % 3 * 2},
            r"train labels are 0..4, 3 different ones, and test .*; they must be 0..2, and",
        ),
        (
            {"train_labels": np.arange(12) + 1},
            r"train labels are 1..12, 12 different ones, and test .*; they must be 0..11",
        ),
        ({"test_labels": np.full(8, 9)}, r"test labels 9..9; they must be 0..3"),
        ({"train_labels": np.zeros(12)}, "must be integers"),
        ({"train_labels": np.zeros(11, int)}, "12 train images and 11 labels"),
        ({"train_labels": np.zeros(12, int), "test_labels": np.zeros(8, int)}, "0..0, 1 different .* must be 0..1"),
        ({"test_images": np.zeros((8, 7, 7, 3), np.uint8)}, "they must agree"),
        ({"train_images": np.array([None] * 12, dtype=object)}, "cannot read"),
    ],
)
def test_bad_npz(changes, message, tmp_path):
    npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(UserError, match=message):
        load_dataset("npz", tmp_path / "bad.npz")


def test_tinyimagenet(tmp_path):
    content = {
        "classes": [f"n{i}" for i in range(200)],
        "images_train": torch.randint(0, 256, (200, 3, 64, 64), dtype=torch.uint8),
        "labels_train": torch.arange(200),
        "images_val": torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8),
        "labels_val": torch.arange(5),
    }
    torch.save(content, tmp_path / "tinyimagenet.pt")
    real = load_dataset("TinyImageNet", tmp_path)
    assert torch.equal(real.images_train, content["images_train"])
    assert torch.equal(real.images_test, content["images_val"])
    assert (real.num_classes, real.im_size) == (200, (64, 64))


def write_folders(root, test="test"):
    for part, n in (("train", 4), (test, 2)):
        for label, name in enumerate(("cat", "a dog's Öre")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 30), (100 * label, 10 * i, 7)).save(root / part / name / f"{i}.png")


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder(test, tmp_path):
    write_folders(tmp_path, test)
    real = load_dataset("ImageFolder", tmp_path, im_size=16)
    assert real.images_train.shape == (8, 3, 16, 16)
    assert real.labels_train.tolist() == [0] * 4 + [1] * 4  # "a dog's Öre" sorts before "cat"
    assert real.class_names == ("a dog's Öre", "cat")
    assert real.images_train[1, :, 3, 3].tolist() == [100, 10, 7]
    assert real.images_test.shape == (4, 3, 16, 16)


def test_val_is_the_test_set_where_test_has_no_classes(tmp_path):
    """As ImageNet and TinyImageNet are unpacked: `test/` holds images without classes."""
    write_folders(tmp_path, "val")
    (tmp_path / "test" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "images" / "test_0.JPEG")
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG")
    real = load_dataset("ImageFolder", tmp_path, im_size=16)
    assert real.labels_test.tolist() == [0, 0, 1, 1]
    assert real.images_test[:, 0].amax((1, 2)).tolist() == [100, 100, 0, 0]
    line = real.notes[0]
    assert f"the test set is {tmp_path / 'val'}; {tmp_path / 'test'} has no folder of a class of train/" in line
    (tmp_path / "test" / "cat").mkdir()
    Image.new("RGB", (8, 8), "white").save(tmp_path / "test" / "cat" / "0.JPEG")
    (tmp_path / "test" / "images").rename(tmp_path / "elsewhere")
    real = load_dataset("ImageFolder", tmp_path, im_size=16)
    assert real.labels_test.tolist() == [1]
    assert not any("the test set is" in line for line in real.notes)
    (tmp_path / "test").rename(tmp_path / "kept")
    line = load_dataset("ImageFolder", tmp_path, im_size=16).notes[0]
    assert "/test is not there" in line


def write_tinyimagenet(root, classes):
    """As the archive unpacks, with two training images of a class and one of `val/`; returns each image by its path."""
    pictures, lines = {}, []
    for i, wnid in enumerate(classes):
        for part in (f"train/{wnid}/images/{wnid}_0.JPEG", f"train/{wnid}/images/{wnid}_1.JPEG"):
            pictures[part] = i
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        name = f"val_{(7 * i) % len(classes)}.JPEG"
        pictures[f"val/images/{name}"] = i
        lines.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    for path in (*pictures, "test/images/test_0.JPEG"):
        Image.fromarray(np.full((64, 64, 3), G.integers(256), np.uint8)).save(root / path)
    return pictures


def check_tinyimagenet(real, root, pictures, classes):
    """Each part against PIL, whatever its order."""
    assert real.class_names == tuple(sorted(classes))
    for part, images, labels in (
        ("train/", real.images_train, real.labels_train),
        ("val/", real.images_test, real.labels_test),
    ):
        expected = sorted(
            (sorted(classes).index(classes[i]), np.asarray(Image.open(root / path)).tobytes())
            for path, i in pictures.items()
            if path.startswith(part)
        )
        arrays = images.permute(0, 2, 3, 1).numpy()
        assert sorted((int(c), a.tobytes()) for c, a in zip(labels, arrays, strict=True)) == expected


@pytest.mark.parametrize("inner", ["tiny-imagenet-200", "."])
def test_tinyimagenet_as_unpacked(inner, tmp_path):
    root = tmp_path / inner
    classes = [f"n{(37 * i) % 200:08}" for i in range(200)]
    pictures = write_tinyimagenet(root, classes)
    real = load_dataset("TinyImageNet", tmp_path)
    check_tinyimagenet(real, root, pictures, classes)
    assert (real.mean, real.num_classes) == (SPECS["TinyImageNet"].mean, 200)
    assert "/val, with the classes of val_annotations.txt; " in real.notes[0]


def test_unpacked_annotations_that_do_not_fit(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    classes = [f"n{i:08}" for i in range(30)]
    pictures = write_tinyimagenet(root, classes)
    with pytest.raises(UserError, match=r"train has 30 classes; TinyImageNet has 200\. Use --dataset ImageFolder"):
        load_dataset("TinyImageNet", tmp_path)
    check_tinyimagenet(load_dataset("ImageFolder", root), root, pictures, classes)
    file = root / "val" / "val_annotations.txt"
    text = file.read_text()
    for line in ("../val_1.JPEG\tn00000001\t0\n", "val_1.JPEG n00000001\n", "val_1.JPEG\tn00000031\n"):
        file.write_text(text + line)
        with pytest.raises(UserError, match=r"--data_path: line 31 of .*val_annotations.txt is '.*'; it must be"):
            load_dataset("ImageFolder", root)
    file.write_text(text)
    for i in range(25):
        (root / "val" / "images" / f"val_{i}.JPEG").unlink()
    with pytest.raises(UserError, match=r"images that are not there: .*/val_\d+.JPEG and 5 more"):
        load_dataset("ImageFolder", root)


def test_image_folder_without_a_test_set(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "test").rename(tmp_path / "other")
    for part in ("test", "val"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / part / "0.JPEG")
    with pytest.raises(UserError, match=r"/test and .*/val hold no folder of a class of train/ \(a dog's Öre, cat\)"):
        load_dataset("ImageFolder", tmp_path)


def test_image_folder_faults(tmp_path):
    with pytest.raises(UserError, match="train is not there"):
        load_dataset("ImageFolder", tmp_path)
    write_folders(tmp_path)
    (tmp_path / "train" / "zebra").mkdir()
    with pytest.raises(UserError, match=r"train/zebra holds no images; put some there, or remove it"):
        load_dataset("ImageFolder", tmp_path)
    (tmp_path / "train" / "zebra").rmdir()
    (tmp_path / "train" / "cat" / "9.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the image .*9.png"):
        load_dataset("ImageFolder", tmp_path)


def test_missing_data_say_what_to_put_where(tmp_path):
    with pytest.raises(UserError, match=r"Put cifar-10-batches-py.*or cifar10.npz with the keys"):
        load_dataset("CIFAR10", tmp_path, download=False)
    with pytest.raises(UserError, match=r"tinyimagenet.pt is not there"):
        load_dataset("TinyImageNet", tmp_path)
    with pytest.raises(UserError, match="did you mean CIFAR100"):
        load_dataset("CIFAR-100", tmp_path)


def test_failed_download_is_one_clear_error(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(UserError, match=r"its download failed \(no network\)"):
        load_dataset("CIFAR10", tmp_path)


@pytest.mark.parametrize("error", [OSError("no network"), KeyboardInterrupt()])
def test_an_interrupted_fetch_leaves_nothing(tmp_path, monkeypatch, error):
    """Half a file is in the temporary folder only, and that is gone."""
    root = tmp_path / "data"

    def half(url, root, **kwargs):
        (Path(root) / "cifar-10-python.tar.gz").write_bytes(b"half")
        raise error

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", half)
    with pytest.raises((UserError, KeyboardInterrupt)):
        load_dataset("CIFAR10", root)
    assert not root.exists()


def test_a_failed_fetch_leaves_an_archive_of_the_users_as_it_was(tmp_path, monkeypatch):
    """torchvision writes over an archive whose checksum is wrong, e.g. one that is still being copied there."""

    def broken_off(url, root, **kwargs):
        (Path(root) / "cifar-10-python.tar.gz").write_bytes(b"500 bytes")
        raise OSError("no network")

    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"part of an archive")
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", broken_off)
    with pytest.raises(UserError, match="no network"):
        load_dataset("CIFAR10", tmp_path)
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == b"part of an archive"


@pytest.mark.parametrize("fails", [True, False])
def test_sets_of_pytorch_ood_are_fetched_whole(tmp_path, monkeypatch, fails):
    from pytorch_ood.dataset import img

    class Stand:
        """A data set that keeps a file in its root."""

        def __init__(self, root, download):
            self.path = Path(root) / "textures" / "all.bin"
            if download:
                self.path.parent.mkdir(parents=True)
                self.path.write_bytes(b"half" if fails else b"whole")
                if fails:
                    raise OSError("no network")
            if not self.path.exists():
                raise RuntimeError("not there")

    monkeypatch.setattr(img, "Textures", Stand)
    if fails:
        with pytest.raises(UserError, match="Textures could not be fetched by pytorch-ood: no network"):
            fetch_pytorch_ood("Textures", tmp_path / "ood")
        assert not (tmp_path / "ood").exists()
    else:
        assert fetch_pytorch_ood("Textures", tmp_path / "ood").path == tmp_path / "ood/textures/all.bin"
        monkeypatch.setattr("utils.data.download._fetch_into", None)  # it is not fetched again
        assert fetch_pytorch_ood("Textures", tmp_path / "ood").path.read_bytes() == b"whole"


@pytest.mark.parametrize("others", [None, "0" * 64])
def test_all_processes_must_have_read_the_same(monkeypatch, others):
    """Only rank 0 writes what a run has read, and gradients of two data sets would be summed."""
    both = {"world_size": lambda: 2, "rank": lambda: 0, "gather": lambda own: {**own, 1: others or own[0]}}
    monkeypatch.setattr(common, "distributed", SimpleNamespace(**both))
    if others is None:
        assert common.read_data(common.Data(dataset="Digits")).name == "Digits"
        return
    with pytest.raises(UserError, match="--data_path data: processes have read different data; give all the same"):
        common.read_data(common.Data(dataset="Digits"))
