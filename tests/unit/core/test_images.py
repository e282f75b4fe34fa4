"""What is read is what the user sees: image files and arrays, beside Pillow and numpy."""

import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from utils.core.errors import UserError
from utils.core.images import ImageReader
from utils.core.pixels import centre_box, conform
from utils.data.datasets import load_dataset
from utils.exchange.assumptions import Assumptions
from utils.exchange.convert import read_distilled
from utils.ood.sets import OODSource
from utils.outliers.sources import load_outlier_pool

G = np.random.default_rng(0)


def photo(height: int = 12, width: int = 12) -> np.ndarray:
    return G.integers(0, 256, (height, width, 3), dtype=np.uint8)


def folder_of(path, images, suffix: str = ".png"):
    path.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number}{suffix}")
    return path


def read(path, channel: int = 3, size: tuple[int, int] = (8, 8), pixel_max: int | None = None):
    """The images of a folder or an array, uint8 `[N, C, H, W]`, and the notes."""
    reader = ImageReader("--ood_path", pixel_max)
    images = reader.folder_or_array(path, channel, size)
    return images, " ".join(reader.notes())


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composition by its formula."""
    a = alpha[..., None] / 255
    return rgb * a + 255 * (1 - a)


def test_transparency_lies_on_white(tmp_path):
    """The picture is in the alpha channel alone, as in many icons."""
    alpha = G.integers(0, 256, (8, 8), dtype=np.uint8)
    black = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(np.dstack([black, alpha])).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([black[..., 0], alpha]), "LA").save(tmp_path / "b.png")
    images, notes = read(tmp_path)
    expected = on_white(black, alpha)
    for image in images:
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1)
    assert "2 of the images have transparent parts, which lie on white" in notes

    palette = Image.fromarray((alpha > 100).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 10, 200, 30])
    (tmp_path / "p").mkdir()
    palette.save(tmp_path / "p" / "c.png", transparency=0)
    shown = np.where((alpha > 100)[..., None], [10, 200, 30], 255)
    np.testing.assert_array_equal(read(tmp_path / "p")[0][0].permute(1, 2, 0).numpy(), shown)
    np.testing.assert_array_equal(read(tmp_path / "p", 1)[0][0, 0].numpy()[alpha <= 100], 255)


def test_opaque_alpha_changes_nothing(tmp_path):
    pixels = photo(8, 8)
    Image.fromarray(np.dstack([pixels, np.full((8, 8), 255, np.uint8)])).save(tmp_path / "a.png")
    images, notes = read(tmp_path)
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), pixels)
    assert notes == ""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    pixels = photo(12, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels, 1),
    }[orientation]  # fmt: skip
    images, notes = read(tmp_path, size=upright.shape[:2])
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), upright)
    assert ("turned" in notes) == (orientation != 1)


@pytest.mark.parametrize("shape", [(64, 96), (97, 64), (50, 50), (20, 61)])
def test_files_and_arrays_by_one_rule(tmp_path, shape):
    """The same pictures as PNG files and as an array: the shorter side is scaled, the centre is cut out."""
    pictures = np.stack([photo(*shape) for _ in range(5)])
    folder_of(tmp_path / "files", pictures)
    np.save(tmp_path / "array.npy", pictures)
    of_files = read(tmp_path / "files", 3, (32, 32))[0] / 255
    of_array = conform(read(tmp_path / "array.npy")[0], 3, (32, 32))
    assert (of_files - of_array).abs().max() < 1.5 / 255  # Pillow rounds to bytes, twice
    side, (height, width) = min(shape), shape
    top, left = (height - side) // 2, (width - side) // 2
    for image, picture in zip(of_files, pictures, strict=True):
        cut = Image.fromarray(picture[top : top + side, left : left + side])
        scaled = np.asarray(cut.resize((32, 32), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy() * 255, scaled, atol=1e-3)


def test_cut_without_resampling_is_the_same(tmp_path):
    pictures = np.stack([photo(8, 12) for _ in range(5)])
    folder_of(tmp_path / "files", pictures)
    np.save(tmp_path / "array.npy", pictures)
    of_files, of_array = read(tmp_path / "files")[0] / 255, conform(read(tmp_path / "array.npy")[0], 3, (8, 8))
    torch.testing.assert_close(of_files, of_array, atol=1e-6, rtol=0)
    np.testing.assert_allclose(of_array.permute(0, 2, 3, 1).numpy() * 255, pictures[:, :, 2:10], atol=1e-4)
    assert "5 of the images are cut to their centre, as they are not 8:8 in shape" in read(tmp_path / "files")[1]


def test_centre_box():
    assert centre_box((64, 96), (64, 64)) == (0, 16, 64, 64)
    assert centre_box((100, 50), (32, 32)) == (25, 0, 50, 50)
    assert centre_box((30, 60), (10, 20)) == (0, 0, 30, 60)
    assert centre_box((1, 50), (32, 32)) == (0, 24, 1, 1)


# --- values that use a small part of their range ----------------------------------------------------------------------


def test_twelve_bits_in_files_of_sixteen(tmp_path):
    values = (np.arange(64).reshape(8, 8) * 65).astype(np.uint16)  # 64 levels up to 4095
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(
        UserError, match=r"brightest pixel is 4095, and white is 65535 .*--pixel_max 4095; --pixel_max 65535"
    ):
        read(tmp_path, 1)
    images = read(tmp_path, 1, pixel_max=4095)[0]
    np.testing.assert_array_equal(images[0, 0].numpy(), (values.astype(float) * 255 / 4095).round())
    assert len(images.unique()) == 64
    assert int(read(tmp_path, 1, pixel_max=65535)[0].max()) == 16  # as they are
    with pytest.raises(UserError, match="--pixel_max 1000 does not fit"):
        read(tmp_path, 1, pixel_max=1000)


def test_white_that_the_user_says_counts_for_images_that_are_not_dark(tmp_path):
    """14 bits in files of 16, beside files of 8 bits; and arrays of 6 bits in 8."""
    values = (np.arange(64).reshape(8, 8) * 260).astype(np.uint16)  # up to 16380
    Image.fromarray(values).save(tmp_path / "a.png")
    found = read(tmp_path, 1, pixel_max=16383)[0]
    np.testing.assert_array_equal(found[0, 0].numpy(), (values.astype(float) * 255 / 16383).round())
    eight = G.integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(eight).save(tmp_path / "b.png")
    both = read(tmp_path, 1, pixel_max=16383)[0]
    assert torch.equal(both[0], found[0])
    np.testing.assert_array_equal(both[1, 0].numpy(), eight)
    hot = values.copy()
    hot[0, 0] = 65535
    Image.fromarray(hot).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"--data_path: .*brightest pixel is 65535.*--pixel_max 16383 does not fit"):
        ImageReader("--data_path", 16383).folder_or_array(tmp_path, 1, (8, 8))
    six = (eight // 4).reshape(1, 8, 8)
    np.savez(tmp_path / "c.npz", images=six)
    scaled = read(tmp_path / "c.npz", 1, pixel_max=63)[0]
    np.testing.assert_array_equal(scaled[:, 0].numpy(), np.round(six * (255 / 63)))


def test_dark_files_beside_bright_ones_of_another_type(tmp_path):
    Image.fromarray((np.arange(64).reshape(8, 8) * 65).astype(np.uint16)).save(tmp_path / "a.png")  # 12 bits
    Image.fromarray(photo(8, 8)[..., 0]).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="brightest pixel is 4095, and white is 65535"):
        read(tmp_path, 1)
    assert int(read(tmp_path, 1, pixel_max=4095)[0][0].max()) == 255


def test_links_in_a_folder(tmp_path):
    """They are followed, but not around in a circle."""
    (tmp_path / "away").mkdir()
    Image.fromarray(photo(8, 8)).save(tmp_path / "away" / "a.png")
    folder = folder_of(tmp_path / "here", [photo(8, 8)])
    (folder / "picture").symlink_to(tmp_path / "away" / "a.png")
    assert len(read(folder)[0]) == 2
    (folder / "more").symlink_to(tmp_path / "away")
    assert len(read(folder)[0]) == 3
    (tmp_path / "away" / "around").symlink_to(tmp_path / "away")
    (folder / "here").symlink_to(folder)
    (tmp_path / "away" / "back").symlink_to(folder)
    assert len(read(folder)[0]) == 3


@pytest.mark.parametrize(("brightest", "refused"), [(1, True), (16, True), (31, True), (32, False), (255, False)])
def test_dark_arrays(tmp_path, brightest, refused):
    images = G.integers(0, brightest + 1, (7, 8, 8), dtype=np.uint8)
    images[0, 0, 0] = brightest
    np.savez(tmp_path / "a.npz", images=images)
    if not refused:
        np.testing.assert_array_equal(read(tmp_path / "a.npz")[0][:, 0].numpy(), images)
        return
    with pytest.raises(UserError, match=f"--ood_path: .*a.npz: the brightest pixel is {brightest}, and white is 255"):
        read(tmp_path / "a.npz")
    scaled = read(tmp_path / "a.npz", pixel_max=brightest)[0]
    np.testing.assert_array_equal(scaled[:, 0].numpy(), np.round(images * (255 / brightest)))


def test_dark_files_of_eight_bits(tmp_path):
    images = G.integers(0, 17, (4, 8, 8, 3), dtype=np.uint8)
    images[0, 0, 0] = 16
    folder_of(tmp_path, images)
    with pytest.raises(UserError, match="brightest pixel is 16, and white is 255"):
        read(tmp_path)
    expected = np.round(images * (255 / 16)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(read(tmp_path, pixel_max=16)[0].numpy(), expected)


def test_one_bright_pixel_is_enough_in_a_large_array(tmp_path):
    """It is in none of the images that are looked at first."""
    images = np.zeros((5001, 5, 5), np.uint8)
    images[1, 2, 2] = 255
    np.save(tmp_path / "a.npy", images)
    assert int(read(tmp_path / "a.npy")[0].max()) == 255


def test_dark_data_are_refused_everywhere(tmp_path, digits):
    """As training data, pool, OOD set and distilled set; and scaled they equal those that were stored scaled."""
    values = (digits.images_train[:, 0] * 16).round().to(torch.uint8).numpy()
    labels = digits.labels_train.numpy()
    parts = {"train_labels": labels, "test_labels": labels}
    np.savez(tmp_path / "dark.npz", train_images=values, test_images=values, **parts)
    bright = np.round(values * (255 / 16)).astype(np.uint8)
    np.savez(tmp_path / "bright.npz", train_images=bright, test_images=bright, **parts)
    with pytest.raises(UserError, match=r"--data_path: .*dark.npz: the brightest pixel is 16"):
        load_dataset("npz", tmp_path / "dark.npz")
    real, same = load_dataset("npz", tmp_path / "dark.npz", pixel_max=16), load_dataset("npz", tmp_path / "bright.npz")
    assert torch.equal(real.images_train, same.images_train)
    assert (real.mean, real.std) == (same.mean, same.std)
    folder = folder_of(tmp_path / "own" / "train" / "a", values[:9])
    folder_of(folder.parent / "b", values[9:19])
    shutil.copytree(folder.parent, tmp_path / "own" / "test")
    found = load_dataset("ImageFolder", tmp_path / "own", 8, pixel_max=100)  # scaled once
    expected = np.round(values[:19] * (255 / 100))
    np.testing.assert_array_equal(found.images_train[:, 0].numpy(), expected)
    np.savez(tmp_path / "mine.npz", images=values)
    source = OODSource(same, tmp_path, tmp_path, False, 50, 1)
    with pytest.raises(UserError, match=r"--ood_path: .*mine.npz: the brightest pixel is 16"):
        source.find(["mine"])
    with pytest.raises(UserError, match=r"--oe_data_path: .*mine.npz: the brightest pixel is 16"):
        load_outlier_pool(tmp_path / "mine.npz", same, 1, 1)
    np.savez(tmp_path / "set.npz", images=values[:10, ..., None], labels=np.arange(10))
    with pytest.raises(UserError, match=r"--distilled: .*set.npz: the brightest pixel is 16"):
        read_distilled([str(tmp_path / "set.npz")], same, Assumptions(distilled_space="unit"))


def test_the_pictures_in_the_documentation(tmp_path, monkeypatch):
    """Are read as the data set that the command beside them names."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your-data.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("200", "4").replace("100", "3"), {})
    found = load_dataset("ImageFolder", "shapes", 64)
    assert found.class_names == ("circles", "squares", "triangles")
    assert (tuple(found.images_train.shape), len(found.images_test)) == ((12, 3, 64, 64), 9)
    assert all(len(image.flatten(1).unique(dim=1).T) == 2 for image in found.images_train)  # paper and ink


# --- which files are read ---------------------------------------------------------------------------------------------


def test_what_pillow_opens_is_read(tmp_path):
    picture = Image.fromarray(photo(8, 8))
    for name, form in (("a.jfif", "JPEG"), ("b.JPG", "JPEG"), ("c", "PNG"), ("d.data", "BMP"), ("e.webp", "WEBP")):
        picture.save(tmp_path / name, format=form)
    (tmp_path / "labels.csv").write_text("a,1\n")
    (tmp_path / "README").write_text("words")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    reader = ImageReader("--ood_path")
    assert [p.name for p in reader.find(tmp_path)] == ["a.jfif", "b.JPG", "c", "d.data", "e.webp"]
    (line,) = reader.notes()
    assert line == "--ood_path: not read, as they are no images: 1 without suffix, 1 .csv, 1 .heic"


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            folder = folder_of(tmp_path / part / name, [photo(), photo()])
            folder_of(folder / ".ipynb_checkpoints", [photo()])
            folder_of(folder / "__MACOSX", [photo()])
            (folder / "._0.png").write_bytes(b"no image")
            (folder / "Thumbs.db").write_bytes(b"\0")
            (folder / ".DS_Store").write_bytes(b"\0")
        folder_of(tmp_path / part / ".ipynb_checkpoints", [photo()])
        folder_of(tmp_path / part / "__MACOSX" / "a", [photo()])
    real = load_dataset("ImageFolder", tmp_path, 8)
    assert real.class_names == ("a", "b")
    assert real.labels_train.tolist() == [0, 0, 1, 1]
    assert real.lines() == ("4 training images of 2 classes (smallest 2, largest 2), 4 test images",)
    shutil.rmtree(tmp_path / "test" / "b")
    assert load_dataset("ImageFolder", tmp_path, 8).lines()[0].endswith("2 test images, none of b")


def test_colours_of_16_bits_take_no_white(tmp_path):
    """Pillow reads their high bytes, so values of 12 bits would have 16 levels."""
    values = np.arange(8 * 8 * 3).reshape(8, 8, 3) * 21
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(x)) + n + x + struct.pack(">I", zlib.crc32(n + x)) for n, x in parts]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    for white in (None, 15, 4095):
        with pytest.raises(UserError, match="dark colours of 16 bits, of which 8 are read; store 8"):
            ImageReader("--data_path", white).folder_or_array(tmp_path, 3, (8, 8))


def test_all_damaged_files_are_named(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            folder_of(tmp_path / part / name, [photo()])
    bad = [tmp_path / "train" / "a" / "x.png", tmp_path / "train" / "b" / "y.jpg", tmp_path / "test" / "b" / "z.png"]
    for path in bad:
        path.write_bytes(b"\x89PNG no image")
    with pytest.raises(UserError, match="cannot read 3 images: ") as error:
        load_dataset("ImageFolder", tmp_path, 8)
    assert all(str(path) in str(error.value) for path in bad)
    for number in range(25):
        (tmp_path / "train" / "a" / f"more{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read 28 images: .* and 8 more. Mend or remove them"):
        load_dataset("ImageFolder", tmp_path, 8)


def test_frames(tmp_path):
    first, second = (Image.fromarray(photo(8, 8)) for _ in range(2))
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    images, notes = read(tmp_path)
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), np.asarray(first))
    assert "1 of the images have several frames, of which the first is read" in notes


@pytest.mark.parametrize("shape", [(32, 32, 3), (3, 32, 32), (4, 9, 9), (32, 32, 1), (7, 32, 3, 3), (9, 3, 32, 1)])
def test_shapes_with_several_readings(tmp_path, shape):
    np.save(tmp_path / "a.npy", G.integers(0, 256, shape, dtype=np.uint8))
    with pytest.raises(
        UserError, match=r"--ood_path: .*a.npy holds uint8 \[.*\], which may be .* it must be uint8 \[N, H, W\]"
    ):
        read(tmp_path / "a.npy")


def test_log_of_the_stages(in_process, tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            folder_of(tmp_path / "data" / part / name, [photo() for _ in range(count)])
    folder_of(tmp_path / "data" / "train" / "a" / "more", [photo()])
    Image.fromarray(np.dstack([photo(), photo()[..., 0]])).save(tmp_path / "data" / "train" / "b" / "icon.png")
    (tmp_path / "data" / "train" / "a" / "notes.txt").write_text("x")
    flags = ["--dataset", "ImageFolder", "--data_path", "data", "--im_size", "8", "--model", "MLP", "--method", "DM"]
    wanted = ["8 training images of 2 classes (smallest 4, largest 4), 4 test images", "1 .txt", "lie on white"]
    runs = [
        ("main.py", "--num_exp 1 --num_eval 1 --epoch_eval_train 1 --Iteration 1"),
        ("train_model_synthetic_no_oe.py", "--num_eval 1 --epoch_eval_train 2"),
        ("test_ood_model_syn.py", "--num_exp 1 --is_load_best --ood_sets blob"),
    ]
    for script, more in runs:
        out = in_process(script, *flags, *more.split())
        assert all(text in out for text in wanted), out
