"""Distilled sets of other repositories: each format written in its layout on the disk, then read."""

import io
import math
import os
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from utils.core.errors import UserError
from utils.data.datasets import SPECS, RealData
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet, decode
from utils.exchange import formats
from utils.exchange.assumptions import Assumptions
from utils.exchange.convert import check_guess, read_distilled, training_labels

K, IPC = 3, 2
N = K * IPC


@pytest.fixture
def real(tiny_real) -> RealData:
    return tiny_real


@pytest.fixture
def pixels(real) -> torch.Tensor:
    """Images in [0, 1], sorted by class, 8 bits deep."""
    order = torch.cat([indices[:IPC] for indices in real.class_indices])
    return real.unit_train(order)


LABELS = torch.arange(K).repeat_interleave(IPC)


def save_all(folder, **tensors) -> None:
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pt")


def read(real, *paths, exp_idx=0, **assumed) -> SyntheticSet:
    return read_distilled([str(p) for p in paths], real, Assumptions(**assumed), exp_idx).synthetic


def refusal(real, *paths, **assumed) -> str:
    with pytest.raises(UserError) as error:
        read(real, *paths, **assumed)
    assert str(error.value).startswith("--")
    assert "\n" not in str(error.value)
    return str(error.value)


# --- every format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stated", "assumed", "told"),
    [
        ("CIFAR10", {}, {}, True),
        ("CIFAR10", {"normalisation": {"mean": [0.5] * 3, "std": [0.2] * 3}}, {}, False),
        ("CIFAR10", {}, {"distilled_mean": (0.5,), "distilled_std": (0.2,)}, False),
        ("tiny", {}, {}, False),
    ],
)
def test_a_published_set_of_cifar10_may_have_other_statistics(real, pixels, tmp_path, name, stated, assumed, told):
    """The code of DC, DSA and DM divided by other deviations than TrustDD's, and their files do not say it."""
    content = {"data": [[real.normalize(pixels), LABELS]], "accs_all_exps": {}} | stated
    torch.save(content, tmp_path / "res.pt")
    found = read_distilled([str(tmp_path / "res.pt")], replace(real, name=name), Assumptions(**assumed))
    assert any("code has mean 0.4914 0.4822 0.4465 and" in line for line in found.lines) == told


@pytest.mark.parametrize(("name", "told"), [("ImageFolder", True), ("CIFAR10", False)])
def test_the_order_of_unnamed_classes_is_told(real, pixels, tmp_path, name, told):
    """MTT numbers the classes of its subsets of ImageNet in an order of its own."""
    save_all(tmp_path, images_best=real.normalize(pixels), labels_best=LABELS)
    torch.save(0.05, tmp_path / "lr_best.pt")  # as DATM writes it
    files = [str(tmp_path / f"{part}_best.pt") for part in ("images", "labels", "lr")]
    own = replace(real, name=name, class_names=("b", "a", "c"))
    assumed = Assumptions(distilled_space="normalised", distilled_mean=(0.5,), distilled_std=(0.5,))
    found = read_distilled(files, own, assumed)
    assert found.synthetic.lr_net == 0.05
    assert any("its labels are taken in the order of b, a, c" in line for line in found.lines) == told


def test_published_code(real, pixels, tmp_path):
    images = [real.normalize(pixels), real.normalize(pixels.flip(3))]
    content = {"data": [[x, LABELS] for x in images], "data_oe": [[-x, LABELS * 0] for x in images]}
    torch.save(content | {"accs_all_exps": {}}, tmp_path / "res_DSA_tiny_ConvNet_2ipc.pt")
    for where in (tmp_path, tmp_path / "res_DSA_tiny_ConvNet_2ipc.pt"):
        found = read(real, where, exp_idx=1)
        assert torch.equal(found.images, images[1])  # the same bits
        assert torch.equal(found.images_oe, -images[1])
        assert torch.equal(found.labels, LABELS)


def test_set_made_here(real, pixels, tmp_path):
    made = SyntheticSet(real.normalize(pixels), LABELS, real.normalize(1 - pixels), lr_net=0.02)
    DistilledFile.write(tmp_path / "res_x.pt", [made], {}, real, {})
    found = read(real, tmp_path)
    assert torch.equal(found.images, made.images)
    assert torch.equal(found.images_oe, made.images_oe)
    assert found.lr_net == 0.02


def test_set_made_with_other_statistics_is_normalised_anew(real, pixels, tmp_path):
    from dataclasses import replace

    other = replace(real, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    DistilledFile.write(tmp_path / "res_x.pt", [SyntheticSet(other.normalize(pixels), LABELS)], {}, other, {})
    assert torch.allclose(read(real, tmp_path).images, real.normalize(pixels), atol=1e-6)


@pytest.mark.parametrize("suffix", ["best", "5000"])
def test_mtt(real, pixels, tmp_path, suffix):
    save_all(tmp_path, **{f"images_{suffix}": real.normalize(pixels), f"labels_{suffix}": LABELS})
    paths = [(tmp_path,), (tmp_path / f"images_{suffix}.pt",)]
    paths.append((tmp_path / f"labels_{suffix}.pt", tmp_path / f"images_{suffix}.pt"))
    for where in paths:
        found = read(real, *where)
        assert torch.equal(found.images, real.normalize(pixels))
        assert torch.equal(found.labels, LABELS)
        assert found.lr_net is None


def test_the_last_iteration_is_read(real, pixels, tmp_path):
    for iteration, factor in ((100, 0.9), (5000, 1.0), (700, 0.8)):
        save_all(tmp_path, **{f"images_{iteration}": factor * real.normalize(pixels), f"labels_{iteration}": LABELS})
    assert torch.equal(read(real, tmp_path).images, real.normalize(pixels))


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_mtt_has_statistics_of_its_own(tmp_path, name):
    """Those of CIFAR-10, for CIFAR-100, too; they are not ours, and the user is told."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=g)
    spec = SPECS[name]
    labels = torch.arange(100) % spec.num_classes
    real = RealData(name, spec.num_classes, spec.mean, spec.std, images, labels, images, labels)
    statistics = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in statistics)
    save_all(tmp_path, images_best=(images / 255 - mean) / std, labels_best=labels)
    torch.save((images / 255 - mean) / std, tmp_path / "oe.pt")
    found = read_distilled([str(tmp_path)], real, Assumptions(), outliers=[str(tmp_path / "oe.pt")])
    for tensor in (found.synthetic.images, found.synthetic.images_oe):
        assert torch.allclose(tensor, real.normalize(images / 255), atol=1e-5)
    told = "\n".join(found.lines)
    assumed = "normalised with mean 0.4914 0.4822 0.4465 and deviation 0.2023 0.1994 0.201"
    more = " (those of MTT's code; of others, give --distilled_mean and --distilled_std)"
    assert told.count(assumed + more) == 2  # of images and of outliers
    given = Assumptions(distilled_mean=spec.mean, distilled_std=spec.std)
    found = read_distilled([str(tmp_path)], real, given)
    assert torch.equal(found.synthetic.images, (images / 255 - mean) / std)
    assert "MTT's code" not in "".join(found.lines)


def test_mtt_with_zca(real, pixels, tmp_path):
    white = real.whitened()
    files = {"images_best": white.normalize(pixels), "images_zca_best": pixels, "labels_best": LABELS}
    save_all(tmp_path, **files)
    assert torch.equal(read(white, tmp_path).images, white.normalize(pixels))
    assert "--zca" in refusal(real, tmp_path)
    unwhitened = tmp_path / "images_zca_best.pt"
    assert torch.allclose(read(real, unwhitened).images, real.normalize(pixels), atol=1e-6)
    assert torch.allclose(read(white, unwhitened).images, white.normalize(pixels), atol=1e-5)


def test_datm(real, pixels, tmp_path):
    white = real.whitened()
    logits = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 3
    save_all(tmp_path, images_best=white.normalize(pixels), labels_best=logits, lr_best=torch.tensor(0.05))
    found = read(white, tmp_path)
    by_hand = torch.tensor([[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits.tolist()])
    assert torch.allclose(found.labels, by_hand.float(), atol=1e-6)
    assert found.lr_net == pytest.approx(0.05)
    softer = read(white, tmp_path, label_temperature=2.0).labels
    assert torch.allclose(softer, F.softmax(logits / 2, 1), atol=1e-6)


def test_a_learning_rate_beside_hard_labels(real, pixels, tmp_path):
    """Not only DATM stores one; the labels stay what they are."""
    for labels in (LABELS, torch.eye(K)[LABELS]):
        save_all(tmp_path, images_best=real.normalize(pixels), labels_best=labels, lr_best=torch.tensor(0.05))
        found = read(real, tmp_path, distilled_space="normalised")
        assert torch.equal(found.labels, LABELS)
        assert found.lr_net == pytest.approx(0.05)


def test_tesla_labels_are_probabilities(real, pixels, tmp_path):
    soft = torch.rand(N, K, generator=torch.Generator().manual_seed(0))
    soft /= soft.sum(1, keepdim=True)
    save_all(tmp_path, images_best=real.normalize(pixels), labels_best=soft)
    found = read_distilled([str(tmp_path)], real, Assumptions())
    assert torch.equal(found.synthetic.labels, soft)
    assert "probabilities" in found.lines[0]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_idc_decoding_by_a_slow_loop(factor):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    side = -(-16 // factor)
    padded = torch.full((2, 3, side * factor, side * factor), 0.5)
    padded[:, :, :16, :16] = images
    expected = []
    for row in range(factor):
        for column in range(factor):
            part = padded[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            expected += [_enlarged(image, 16) for image in part]
    assert torch.allclose(decode(images, factor, 0.5), torch.stack(expected), atol=1e-6)


def _enlarged(image: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear interpolation between pixel centres, number by number."""
    side = image.shape[-1]
    out = torch.empty(image.shape[0], size, size)

    def neighbours(i: int) -> tuple[int, int, float]:
        at = max((i + 0.5) * side / size - 0.5, 0.0)
        low = int(at)
        return low, min(low + 1, side - 1), at - low

    for y in range(size):
        for x in range(size):
            (top, bottom, v), (left, right, h) = neighbours(y), neighbours(x)
            upper = (1 - h) * image[:, top, left] + h * image[:, top, right]
            lower = (1 - h) * image[:, bottom, left] + h * image[:, bottom, right]
            out[:, y, x] = (1 - v) * upper + v * lower
    return out


@pytest.mark.parametrize("name", ["data.pt", "data_2000.pt"])
def test_idc(real, pixels, tmp_path, name):
    torch.save([pixels, LABELS], tmp_path / name)
    found = read(real, tmp_path)
    assert torch.allclose(found.images, real.normalize(decode(pixels, 2)), atol=1e-6)
    assert torch.equal(found.labels, LABELS.repeat(4))
    plain = read(real, tmp_path / name, distilled_factor=1)
    assert torch.allclose(plain.images, real.normalize(pixels), atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_folders_by_pil(real, pixels, tmp_path, suffix):
    for c in range(K):
        folder = tmp_path / f"new{c:03d}"
        folder.mkdir()
        for i in range(IPC):
            array = (pixels[c * IPC + i] * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(array).save(folder / f"class{c:03d}_id{i:03d}.{suffix}")
    found = read(real, tmp_path)
    files = sorted(tmp_path.glob(f"*/*.{suffix}"))
    decoded = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) / 255 for f in files])
    assert torch.allclose(found.images, real.normalize(decoded), atol=1e-6)
    assert torch.equal(found.labels, LABELS)
    if suffix == "png":
        assert torch.allclose(found.images, real.normalize(pixels), atol=1e-6)


def test_kip(real, pixels, tmp_path):
    images = real.normalize(pixels).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "kip.npz", images=images, labels=np.eye(K, dtype=np.float32)[LABELS])
    found = read(real, tmp_path / "kip.npz")
    assert torch.equal(found.images, real.normalize(pixels))
    assert torch.equal(found.labels, LABELS)
    other = (images - 0.5) * 2
    np.savez(tmp_path / "kip.npz", images=other, labels=np.eye(K, dtype=np.float32)[LABELS])
    given = read(real, tmp_path / "kip.npz", distilled_mean=(0.5,), distilled_std=(0.5,)).images
    by_hand = real.normalize(torch.from_numpy(other).permute(0, 3, 1, 2) * 0.5 + 0.5)
    assert torch.allclose(given, by_hand, atol=1e-6)


def test_outliers_in_files_of_their_own(real, pixels, tmp_path):
    torch.save(real.normalize(1 - pixels), tmp_path / "oe.pt")
    made = SyntheticSet(real.normalize(pixels), LABELS, real.normalize(1 - pixels))
    DistilledFile.write(tmp_path / "res_x.pt", [made], {}, real, {})
    save_all(tmp_path, images_best=real.normalize(pixels), labels_best=LABELS)
    images = [str(tmp_path / "images_best.pt")]
    for place in ("oe.pt", "res_x.pt"):
        found = read_distilled(images, real, Assumptions(), outliers=[str(tmp_path / place)])
        assert torch.equal(found.synthetic.images_oe, made.images_oe)
        assert place in found.lines[1]
    of_images = Assumptions(distilled_mean=(0.1,), distilled_std=(2.0,), distilled_factor=2)
    found = read_distilled(images, real, of_images, outliers=[str(tmp_path / "res_x.pt")])
    assert torch.equal(found.synthetic.images_oe, made.images_oe)


def test_outliers_of_their_own_are_in_parts_like_the_images(real, pixels, tmp_path):
    torch.save(real.normalize(1 - pixels), tmp_path / "oe.pt")
    save_all(tmp_path, images_best=real.normalize(pixels), labels_best=LABELS)
    assumed = Assumptions(distilled_factor=2)
    found = read_distilled([str(tmp_path / "images_best.pt")], real, assumed, outliers=[str(tmp_path / "oe.pt")])
    assert torch.equal(found.synthetic.images_oe, decode(real.normalize(1 - pixels), 2, 0.0))
    assert len(found.synthetic.images_oe) == len(found.synthetic.images) == 4 * N
    assert found.lines[1].endswith("decoding factor 2")


def test_whitened_images_have_no_parts(real, pixels, tmp_path):
    white = real.whitened()
    save_all(tmp_path, images_best=white.normalize(pixels), labels_best=LABELS)
    with pytest.raises(UserError, match=r"is whitened .*; --distilled_factor 1 is accepted"):
        read(white, tmp_path / "images_best.pt", distilled_space="zca", distilled_factor=2)


def test_soft_labels_survive_a_file(real, pixels, tmp_path):
    soft = F.softmax(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), 1)
    DistilledFile.write(tmp_path / "res_x.pt", [SyntheticSet(real.normalize(pixels), soft)], {}, real, {})
    assert torch.equal(DistilledFile.open(tmp_path / "res_x.pt").set().labels, soft)
    assert torch.equal(read(real, tmp_path).labels, soft)


# --- what is assumed, and what contradicts it ------------------------------------------------------------------------


def test_the_line_says_what_was_assumed(real, pixels, tmp_path):
    torch.save([pixels, LABELS], tmp_path / "data.pt")
    line = read_distilled([str(tmp_path)], real, Assumptions()).lines[0]
    for part in ("format idc", "24 images", "3 classes", "labels hard", "0 to 1", "factor 2", "not stored"):
        assert part in line


def test_numbers_that_contradict_the_space(real, pixels, tmp_path):
    save_all(tmp_path, images_best=pixels, labels_best=LABELS)
    message = refusal(real, tmp_path)
    assert "pixels from 0 to 1" in message
    assert "--distilled_space" in message
    assert torch.allclose(read(real, tmp_path, distilled_space="unit").images, real.normalize(pixels), atol=1e-6)
    save_all(tmp_path, images_best=pixels * 255, labels_best=LABELS)
    assert "0 to 255" in refusal(real, tmp_path)
    torch.save([real.normalize(pixels), LABELS], tmp_path / "data.pt")
    (tmp_path / "images_best.pt").unlink()
    assert "normalised" in refusal(real, tmp_path)


def test_natural_images_are_told_apart(cifar_like):
    """Whitened, normalised and pixel images contradict each other's spaces, on images with natural correlations."""
    white = cifar_like.whitened()
    pixels = cifar_like.unit_train(torch.arange(60))
    spaces = {"unit": pixels, "normalised": cifar_like.normalize(pixels), "zca": white.normalize(pixels)}
    for taken in spaces:
        for true, images in spaces.items():
            if taken == true:
                check_guess(images, taken, white, "x")
            else:
                with pytest.raises(UserError):
                    check_guess(images, taken, white, "x")


@pytest.fixture
def cifar_like() -> RealData:
    """Smooth images, whose pixels vary as those of photographs do: strongly together."""
    g = torch.Generator().manual_seed(0)
    rough = torch.rand(400, 3, 3, 3, generator=g)
    images = F.interpolate(rough, (16, 16), mode="bicubic").clamp(0, 1)
    labels = torch.arange(400) % 4
    mean, std = (tuple(f(dim=(0, 2, 3)).tolist()) for f in (images.mean, images.std))
    return RealData("smooth", 4, mean, std, images, labels, images[:20], labels[:20])


@pytest.mark.parametrize(
    ("labels", "kind", "told"),
    [
        (torch.tensor([0.0, 0, 1, 1, 2, 2]), None, "integers"),
        (torch.tensor([0, 0, 1, 1, 1, 1]), None, "2 classes"),
        (torch.tensor([0, 0, 1, 1, 3, 3]), None, "0..2"),
        (torch.rand(N, K + 1), None, "3 classes"),
        (torch.rand(N, K) * 0.1, None, "--soft_labels"),
        (torch.rand(N, K) * 2 + 1, "probabilities", "no probabilities"),
        (torch.full((N, K), torch.nan), None, "NaN"),
        (LABELS, "logits", "no soft labels"),
        (torch.eye(K)[LABELS] - 1 / K, None, "--soft_labels"),  # as KIP has them
    ],
)
def test_labels_that_are_refused(labels, kind, told):
    with pytest.raises(UserError) as error:
        training_labels(labels, Assumptions(soft_labels=kind), None, K, "--distilled: x")
    assert told in str(error.value)


# --- hostile and wrong files -----------------------------------------------------------------------------------------


class _Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("name", ["images_best.pt", "labels_best.pt", "data.pt", "res_x.pt", "lr_best.pt"])
def test_pickles_are_not_executed(real, pixels, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name.startswith(("labels", "lr", "images")):
        files = {"images_best": real.normalize(pixels), "labels_best": LABELS, "lr_best": torch.tensor(0.1)}
        save_all(tmp_path, **files)
    torch.save(_Payload(), tmp_path / name)
    message = refusal(real.whitened(), tmp_path, distilled_space="zca")
    assert name in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("name", ["images_best.pt", "data.pt", "kip.npz", "distilled.safetensors"])
def test_truncated(real, pixels, tmp_path, name, keep):
    from safetensors.torch import save_file

    path = tmp_path / name
    if name == "kip.npz":
        np.savez(path, images=real.normalize(pixels).permute(0, 2, 3, 1).numpy(), labels=LABELS.numpy())
    elif name == "distilled.safetensors":
        save_file({"images": real.normalize(pixels), "labels": LABELS}, path)
    else:
        torch.save([pixels, LABELS] if name == "data.pt" else real.normalize(pixels), path)
        save_all(tmp_path, **({"labels_best": LABELS} if name == "images_best.pt" else {}))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert name in refusal(real, tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x[:, :1], "1x16x16"),
        (lambda x: x[..., :8], "3x16x8"),
        (lambda x: x[:-1], "must be as many"),
        (lambda x: x * torch.nan, "NaN"),
        (lambda x: x.flatten(1), "no known format"),
        (lambda x: x.to(torch.complex64), "torch.complex64"),
    ],
)
def test_wrong_images(real, pixels, tmp_path, change, told):
    torch.save(real.normalize(pixels), tmp_path / "images_best.pt")
    torch.save(LABELS, tmp_path / "labels_best.pt")
    torch.save(change(real.normalize(pixels)), tmp_path / "images_best.pt")
    assert told in refusal(real, tmp_path / "images_best.pt")


def test_unknown_and_ambiguous_files(real, pixels, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(real, tmp_path / "empty")
    for name in formats.FORMATS:
        assert f"{name}: " in message
    torch.save({"something": 1}, tmp_path / "x.pt")
    assert "no known format" in refusal(real, tmp_path / "x.pt")
    assert "is not there" in refusal(real, tmp_path / "none.pt")
    save_all(tmp_path, images_best=real.normalize(pixels), labels_best=LABELS, data=[pixels, LABELS])
    message = refusal(real, tmp_path)
    assert "images_best.pt (mtt)" in message
    assert "data.pt (idc)" in message
    assert "--distilled_format" in message
    assert torch.equal(read(real, tmp_path, distilled_format="mtt").images, real.normalize(pixels))


def test_names_without_an_iteration(real, pixels, tmp_path):
    save_all(tmp_path, images=real.normalize(pixels), labels=LABELS)
    assert torch.equal(read(real, tmp_path).images, real.normalize(pixels))
    assert torch.equal(read(real, tmp_path / "images.pt").labels, LABELS)


def test_a_temperature_belongs_to_logits(real, pixels, tmp_path):
    """It is not taken for that of outliers in a file of their own, nor accepted where labels are one-hot."""
    one_hot = torch.nn.functional.one_hot(LABELS, K).float()
    save_all(tmp_path, images_a=real.normalize(pixels), labels_a=one_hot)
    save_all(tmp_path, images_b=real.normalize(pixels), labels_b=3 * one_hot - 1)
    assert "--label_temperature" in refusal(real, tmp_path / "images_a.pt", label_temperature=2.0)
    outliers = [str(tmp_path / "images_a.pt")]
    found = read_distilled([str(tmp_path / "images_b.pt")], real, Assumptions(label_temperature=2.0), 0, outliers)
    assert torch.allclose(found.synthetic.labels, ((3 * one_hot - 1) / 2).softmax(1))
    assert len(found.synthetic.images_oe) == len(pixels)


def test_images_without_labels(real, pixels, tmp_path):
    save_all(tmp_path, images_best=real.normalize(pixels), other=real.normalize(pixels))
    assert "labels_best.pt" in refusal(real, tmp_path / "images_best.pt")
    assert "labels" in refusal(real, tmp_path / "other.pt")
    assert "labels" in refusal(real, tmp_path / "images_best.pt", tmp_path / "other.pt")


def test_folders_that_are_refused(real, tmp_path):
    for c in range(K - 1):
        (tmp_path / str(c)).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / str(c) / "a.png")
    assert "2 folders" in refusal(real, tmp_path)
    (tmp_path / "2").mkdir()
    assert "holds no images" in refusal(real, tmp_path)
    Image.new("RGB", (16, 8)).save(tmp_path / "2" / "a.png")
    assert "3x8x16" in refusal(real, tmp_path)
    Image.new("L", (16, 16)).save(tmp_path / "2" / "a.png")
    assert "1x16x16" in refusal(real, tmp_path)


def test_an_npz_that_claims_more_than_it_has(real, tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 16, 16, 3)})
    with zipfile.ZipFile(tmp_path / "kip.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    assert "cannot read" in refusal(real, tmp_path)


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_learning_rates_that_are_refused(real, pixels, tmp_path, lr):
    save_all(tmp_path, images_best=real.normalize(pixels), labels_best=LABELS, lr_best=torch.tensor(lr))
    assert "lr_best.pt" in refusal(real, tmp_path, distilled_space="normalised")


# --- what a review found ---------------------------------------------------------------------------------------------


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path):
    """Of 0 … 11 the names would sort as 0, 1, 10, 11, 2, …."""
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 4, 4).contiguous() * 20
    labels = torch.arange(12)
    real = RealData("twelve", 12, (0.5,) * 3, (0.5,) * 3, images, labels, images, labels)
    for c in range(12):
        (tmp_path / str(c)).mkdir()
        Image.fromarray(images[c].permute(1, 2, 0).numpy()).save(tmp_path / str(c) / "a.png")
    found = read_distilled([str(tmp_path)], real, Assumptions())
    assert torch.allclose(found.synthetic.images, real.normalize(images / 255), atol=1e-6)
    assert "0, 1, 2 and 9 more" in found.lines[1]
    # a data set whose classes have these names numbers them as ImageFolder does, by name
    names = sorted(map(str, range(12)))
    order = torch.tensor([int(name) for name in names])
    found = read_distilled([str(tmp_path)], replace(real, class_names=tuple(names)), Assumptions())
    assert torch.allclose(found.synthetic.images, real.normalize(images[order] / 255), atol=1e-6)
    assert "0, 1, 10 and 9 more; those of --data_path: 0, 1, 10 and 9 more" in found.lines[1]


def test_folders_beside_other_files(real, tmp_path):
    for name in (".a", ".b", "LICENSE"):
        (tmp_path / name).write_text("x")
    for c in range(K):
        (tmp_path / f"n{c}").mkdir()
        Image.new("RGB", (16, 16), "white").save(tmp_path / f"n{c}" / "a.png")
    assert len(read(real, tmp_path).images) == K


def test_sets_of_other_data_are_refused(real, pixels, tmp_path):
    from dataclasses import replace

    made = SyntheticSet(real.normalize(pixels), LABELS)
    DistilledFile.write(tmp_path / "res_x.pt", [made], {}, replace(real, name="other"), {})
    assert "distilled from other" in refusal(real, tmp_path)


def test_other_whitening_is_undone(real, pixels, tmp_path):
    """A set that was whitened by another map is brought to the whitening of the data."""
    from dataclasses import replace

    from utils.data.whitening import ZCA

    white = real.whitened()
    matrix = white.zca.matrix * 2
    other = replace(white, zca=ZCA(white.zca.mean + 0.1, matrix, torch.linalg.inv(matrix)))
    DistilledFile.write(tmp_path / "res_x.pt", [SyntheticSet(other.normalize(pixels), LABELS)], {}, other, {})
    assert torch.allclose(read(white, tmp_path).images, white.normalize(pixels), atol=1e-4)


def test_whitening_is_seen_at_another_iteration(real, pixels, tmp_path):
    """MTT writes the un-whitened images only for some iterations."""
    white = real.whitened()
    save_all(tmp_path, images_best=white.normalize(pixels), labels_best=LABELS, images_zca_5000=pixels)
    assert "--zca" in refusal(real, tmp_path / "images_best.pt")
    torch.save(pixels * 1.6 - 0.3, tmp_path / "images_zca_best.pt")  # distilled pixels leave their range
    assert torch.allclose(
        read(real, tmp_path / "images_zca_best.pt").images, real.normalize(pixels * 1.6 - 0.3), atol=1e-5
    )


def test_soft_labels_whose_argmax_lacks_a_class(real, pixels, tmp_path):
    soft = torch.tensor([[0.6, 0.3, 0.1]] * N)
    DistilledFile.write(tmp_path / "res_x.pt", [SyntheticSet(real.normalize(pixels), soft)], {}, real, {})
    assert torch.equal(DistilledFile.open(tmp_path / "res_x.pt").set(0, real).labels, soft)


def test_experiments_are_of_res_files_alone(real, pixels, tmp_path):
    save_all(tmp_path, images_best=real.normalize(pixels), labels_best=LABELS)
    with pytest.raises(UserError, match="--exp_idx 7"):
        read(real, tmp_path, exp_idx=7)


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        ({"outliers": torch.zeros(2, 3, 8, 8)}, {}),
        ({"outliers": torch.zeros(0, 3, 16, 16)}, {}),
        ({"outliers": torch.full((2, 3, 16, 16), torch.nan)}, {}),
        ({"labels": torch.zeros(0, dtype=torch.int64)}, {}),
        ({}, {"normalisation": [1, 2]}),
        ({}, {"normalisation": {"mean": ["a"], "std": [1.0]}}),
        ({}, {"normalisation": {"mean": [0.5], "std": [0.0]}}),
        ({}, {"dataset": "SVHN"}),
        ({"zca_matrix": torch.zeros(1)}, {}),
        ({"lr_net": torch.tensor(float("nan"))}, {}),
        ({"soft_labels": torch.ones(N, K)}, {}),
    ],
)
def test_published_files_that_are_refused(real, pixels, tmp_path, tensors, about):
    import json

    from safetensors.torch import save_file

    good = {"normalisation": {"mean": list(real.mean), "std": list(real.std)}, "dataset": "tiny"}
    content = {"images": real.normalize(pixels), "labels": LABELS} | tensors
    save_file(content, tmp_path / "distilled.safetensors", {"trustdd": json.dumps(good | about)})
    refusal(real, tmp_path)


def test_odd_kinds_of_numbers(real, tmp_path):
    for array in (np.zeros((N, 16, 16, 3), ">f4"), np.zeros((N, 16, 16, 3), np.longdouble)):
        np.savez(tmp_path / "kip.npz", images=array, labels=np.eye(K)[LABELS])
        assert "ordinary numbers" in refusal(real, tmp_path)


def test_a_factor_that_images_cannot_hold(real, pixels, tmp_path):
    torch.save([pixels, LABELS], tmp_path / "data.pt")
    assert "--distilled_factor 9" in refusal(real, tmp_path, distilled_factor=9)
