"""Calibration by torchmetrics, scikit-learn and a slow loop; AURC by pytorch-ood and by all orders of the ties."""

from itertools import permutations

import numpy as np
import pytest
import torch
from pytorch_ood.metrics import aurra
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from utils.ood.measures import aurc, calibration, confidence_and_correct, error_detection, reliability

CASES = [
    ("random", lambda g: g.normal(scale=2, size=(300, 7))),
    ("ties", lambda g: g.integers(0, 3, (120, 4)) * 1.0),
    ("tiny", lambda g: g.normal(size=(2, 3))),
    ("one", lambda g: g.normal(size=(1, 3))),
    ("constant", lambda g: np.full((30, 4), 2.5)),
    ("overconfident", lambda g: g.normal(scale=400, size=(60, 5))),
]


def ece_by_a_loop(confidence, correct, bins=15):
    """Guo et al.'s bins, (lower, upper], one by one."""
    total = 0.0
    for i in range(bins):
        inside = (confidence > np.linspace(0, 1, bins + 1)[i]) & (confidence <= np.linspace(0, 1, bins + 1)[i + 1])
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "make"), CASES)
def test_calibration(name, make, seed):
    g = np.random.default_rng(seed)
    logits = make(g)
    labels = g.integers(0, logits.shape[1], len(logits))
    found = calibration(logits, labels)
    p = softmax(logits, axis=1)
    assert found["ece"] == pytest.approx(ece_by_a_loop(p.max(1), logits.argmax(1) == labels), abs=1e-12)
    columns = range(logits.shape[1])
    each = [brier_score_loss(labels == c, p[:, c], pos_label=True) for c in columns]
    assert found["brier"] == pytest.approx(sum(each), abs=1e-12)
    if name != "overconfident":  # scikit-learn clips probabilities
        assert found["nll"] == pytest.approx(log_loss(labels, p, labels=list(columns)), abs=1e-10)
        theirs = MulticlassCalibrationError(logits.shape[1], n_bins=15, norm="l1")(*map(torch.tensor, (p, labels)))
        assert found["ece"] == pytest.approx(theirs.item(), abs=1e-6)
    else:
        assert np.isfinite(found["nll"])
        cross_entropy = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
        assert found["nll"] == pytest.approx(cross_entropy.item())


def test_bins_take_their_upper_edge():
    count, confidence, accuracy = reliability(np.array([1 / 15, 0.5, 1.0]), np.array([True, False, True]))
    assert np.flatnonzero(count).tolist() == [0, 7, 14]
    assert confidence[[0, 7, 14]].tolist() == [1 / 15, 0.5, 1.0]
    assert accuracy[[0, 7, 14]].tolist() == [1, 0, 1]


@pytest.mark.parametrize("n", [1, 2, 40, 333])
def test_aurc_by_pytorch_ood(n):
    """Without ties, one minus the area under the accuracy-response curve."""
    g = np.random.default_rng(n)
    scores, wrong = g.permutation(n) * 1.0, g.random(n) < 0.4
    theirs = 1 - aurra(-torch.tensor(scores), torch.tensor(~wrong))
    assert aurc(wrong, scores) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_aurc_of_ties_is_the_mean_over_their_orders(seed):
    g = np.random.default_rng(seed)
    scores, wrong = g.integers(0, 3, 7) * (1.0 if seed else 0.0), g.random(7) < 0.5
    areas = []
    for order in permutations(range(7)):
        if all(np.diff(scores[list(order)]) >= 0):
            areas.append((np.cumsum(wrong[list(order)]) / np.arange(1, 8)).mean())
    assert aurc(wrong, scores) == pytest.approx(np.mean(areas), abs=1e-12)


def test_aurc_of_constant_scores_is_the_error_rate():
    logits, labels = np.zeros((20, 4)), np.arange(20) % 4
    found = error_detection(logits, labels)
    assert found["aurc"] == pytest.approx(found["error"])
    assert found["error"] == 0.75
    assert error_detection(np.eye(3), np.arange(3))["aurc"] == 0


def test_confidence_and_correct():
    logits = np.random.default_rng(0).normal(size=(9, 3))
    confidence, correct = confidence_and_correct(logits, np.zeros(9, int))
    np.testing.assert_allclose(confidence, softmax(logits, axis=1).max(1))
    assert (correct == (logits.argmax(1) == 0)).all()
