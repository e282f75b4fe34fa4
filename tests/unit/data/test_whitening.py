"""ZCA whitening against kornia, and through the stages."""

import pytest
import torch
from kornia.enhance import ZCAWhitening

from utils.core.errors import UserError
from utils.data.datasets import load_dataset
from utils.data.distilled_file import DistilledFile
from utils.data.synthetic import SyntheticSet
from utils.data.whitening import fit_zca


def test_equals_kornia():
    images = torch.rand(300, 3, 6, 5, generator=torch.Generator().manual_seed(0)).cumsum(3) / 5
    theirs = ZCAWhitening(eps=0.1, compute_inv=True).fit(images)
    ours = fit_zca(images.split(70))
    white = ours.whiten(images)
    torch.testing.assert_close(white, theirs(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.undo(white), images, atol=1e-4, rtol=1e-4)


def test_whitened_data_are_uncorrelated():
    real = load_dataset("Digits", "nowhere", zca=True)
    white = real.train_batch(torch.arange(len(real.images_train))).flatten(1).double()
    values = torch.linalg.eigvalsh(torch.cov(white.T))
    raw = torch.linalg.eigvalsh(torch.cov(real.images_train.flatten(1).double().T))
    torch.testing.assert_close(values.sort().values, (raw / (raw + 0.1)).sort().values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(real.denormalize(real.test_images), real.images_test, atol=1e-5, rtol=1e-5)


def test_a_set_knows_its_whitening(tmp_path):
    plain, white = (load_dataset("Digits", "nowhere", zca=z) for z in (False, True))
    labels = torch.arange(10)
    images = white.train_batch(torch.tensor([int(i[0]) for i in white.class_indices]))
    DistilledFile.write(tmp_path / "a.pt", [SyntheticSet(images, labels)], {}, white, {})
    assert torch.equal(DistilledFile.open(tmp_path / "a.pt").set(0, white).images, images)
    with pytest.raises(UserError, match=r"--zca: .* was made with it; give --zca"):
        DistilledFile.open(tmp_path / "a.pt").set(0, plain)
    DistilledFile.write(tmp_path / "b.pt", [SyntheticSet(images, labels)], {}, plain, {})
    with pytest.raises(UserError, match=r"--zca: .* was made without it; leave out --zca"):
        DistilledFile.open(tmp_path / "b.pt").set(0, white)


def test_through_all_stages(in_process, tmp_path):
    common = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 1, "--method", "DM", "--zca"]
    in_process("main_poe.py", *common, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 3, "--Iteration", 2)
    in_process("train_model_synthetic_oe.py", *common, "--num_eval", 1, "--epoch_eval_train", 30)
    out = in_process("test_ood_model_syn.py", *common, "--num_exp", 1, "--is_load_best", "--ood_sets", "patches")
    assert "distilled.png" in out
    stored = torch.load(next(tmp_path.rglob("res_*.pt")), weights_only=True)["normalisation"]["zca"]
    assert stored["matrix"].shape == (64, 64)


def test_networks_are_tested_as_they_were_trained(in_process, refused):
    common = ["--dataset", "Digits", "--model", "ConvNetD1", "--ipc", 1, "--method", "DM"]
    in_process("main.py", *common, "--num_exp", 1, "--num_eval", 1, "--epoch_eval_train", 2, "--Iteration", 1, "--zca")
    in_process("train_model_synthetic_no_oe.py", *common, "--num_eval", 1, "--epoch_eval_train", 5, "--zca")
    error = refused("test_ood_model_syn.py", *common, "--num_exp", 1, "--is_load_best", "--ood_sets", "blob")
    assert "were trained with it; give --zca" in error


def test_a_published_file_was_not_whitened(tmp_path):
    white = load_dataset("Digits", "nowhere", zca=True)
    torch.save({"data": [[torch.zeros(10, 1, 8, 8), torch.arange(10)]]}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="was made without it; leave out --zca"):
        DistilledFile.open(tmp_path / "a.pt").set(0, white)
