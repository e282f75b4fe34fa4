"""Scores by scipy, measures by scikit-learn and by a loop over thresholds; ties included."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from utils.ood.measures import error_detection, fpr95, ood_measures
from utils.ood.scores import SCORES


def brute_fpr(positive, scores, recall=0.95):
    """Try every threshold: nearest recall; of equals the larger rate, at recall 1 the smallest."""
    points = {}
    for threshold in sorted(set(scores), reverse=True):
        taken = scores >= threshold
        achieved = (taken & positive).sum() / positive.sum()
        rate = (taken & ~positive).sum() / (~positive).sum()
        points.setdefault(achieved, []).append(rate)
    nearest = min(points, key=lambda achieved: (abs(achieved - recall), -achieved))
    return min(points[nearest]) if nearest == 1 else max(points[nearest])


CASES = [
    ("continuous", lambda g: (g.normal(size=211), g.normal(0.7, size=87))),
    ("ties", lambda g: (g.integers(0, 6, 150) / 2, g.integers(2, 9, 160) / 2)),
    ("heavy ties", lambda g: (g.integers(0, 2, 40) * 1.0, g.integers(0, 2, 30) * 1.0)),
    ("constant", lambda g: (np.zeros(12), np.zeros(7))),
    ("separated", lambda g: (g.normal(size=40), 100 + g.normal(size=40))),
    ("reversed", lambda g: (100 + g.normal(size=40), g.normal(size=40))),
    ("one each", lambda g: (g.normal(size=1), g.normal(size=1))),
    ("tiny", lambda g: (g.normal(size=3), g.normal(size=2))),
    ("twenty", lambda g: (g.normal(size=20), g.normal(size=20))),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "make"), CASES)
def test_measures(name, make, seed):
    in_scores, out_scores = make(np.random.default_rng(seed))
    found = ood_measures(in_scores, out_scores)
    scores = np.r_[in_scores, out_scores]
    out = np.r_[np.zeros(len(in_scores), bool), np.ones(len(out_scores), bool)]
    pairs = out_scores[:, None] - in_scores[None]
    assert found["auroc"] == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean(), abs=1e-12)
    assert found["auroc"] == pytest.approx(roc_auc_score(~out, -scores), abs=1e-12)
    assert found["aupr_out"] == pytest.approx(average_precision_score(out, scores), abs=1e-12)
    assert found["aupr_in"] == pytest.approx(average_precision_score(~out, -scores), abs=1e-12)
    assert found["fpr_out"] == pytest.approx(brute_fpr(out, scores), abs=1e-12)
    assert found["fpr_in"] == pytest.approx(brute_fpr(~out, -scores), abs=1e-12)


def test_average_precision_is_the_step_sum():
    g = np.random.default_rng(0)
    in_scores, out_scores = g.normal(size=50), g.normal(1, size=50)
    precision, recall, _ = precision_recall_curve(np.r_[np.zeros(50), np.ones(50)], np.r_[in_scores, out_scores])
    step = -np.sum(np.diff(recall) * precision[:-1])
    assert ood_measures(in_scores, out_scores)["aupr_out"] == pytest.approx(step, abs=1e-12)
    assert auc(recall, precision) != pytest.approx(step, abs=1e-6)  # the trapezoidal area is another measure


@pytest.mark.parametrize("bad", [([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([1.0], [np.inf])])
def test_bad_scores(bad):
    with pytest.raises(ValueError, match="finite"):
        ood_measures(*map(np.array, bad))


def test_fpr_at_recall_one():
    """With three positives recalls are 1/3, 2/3 and 1: 1 is nearest to 0.95, and its smallest rate counts."""
    positive = np.array([True, True, True, False, False])
    assert fpr95(positive, np.array([5.0, 4, 2, 3, 1])) == 0.5


def test_error_detection_by_sklearn():
    g = np.random.default_rng(1)
    logits, labels = g.normal(size=(300, 5)), g.integers(0, 5, 300)
    found = error_detection(logits, labels)
    wrong = logits.argmax(1) != labels
    confidence = softmax(logits, axis=1).max(1)
    assert found["error"] == pytest.approx(wrong.mean())
    assert found["auroc"] == pytest.approx(roc_auc_score(wrong, -confidence))
    assert found["aupr"] == pytest.approx(average_precision_score(wrong, -confidence))
    assert found["fpr"] == pytest.approx(brute_fpr(wrong, -confidence))


@pytest.mark.parametrize("right", [True, False])
def test_error_detection_without_both_kinds(right):
    logits = np.eye(3)
    found = error_detection(logits, np.arange(3) if right else (np.arange(3) + 1) % 3)
    assert found["error"] == (0 if right else 1)
    assert np.isnan([found["auroc"], found["aupr"], found["fpr"]]).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_scores_by_scipy(temperature):
    z = np.random.default_rng(0).normal(scale=4, size=(40, 7))
    expected = {
        "msp": -softmax(z, axis=1).max(1),
        "mls": -z.max(1),
        "energy": -temperature * logsumexp(z / temperature, axis=1),
        "xent": z.mean(1) - logsumexp(z, axis=1),
    }
    assert set(expected) <= set(SCORES)
    for name, values in expected.items():
        np.testing.assert_allclose(SCORES[name](torch.from_numpy(z), temperature).numpy(), values, rtol=1e-12)


def test_every_score_is_higher_for_uniform_logits():
    for score in SCORES.values():
        confident, flat = score(torch.tensor([[9.0, 0, 0], [1.0, 1, 1]]).double(), 1.0)
        assert flat > confident
