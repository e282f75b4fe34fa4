"""Measures of OOD detection, error detection and calibration, as docs/measures.md defines them.

OUT measures take OOD as positive, with the score; IN measures take in-distribution, with minus the score.
"""

import math

import numpy as np

MEASURES = ("fpr_in", "fpr_out", "auroc", "aupr_in", "aupr_out")
ERROR_MEASURES = ("error", "auroc", "aupr", "fpr", "aurc")
CALIBRATION_MEASURES = ("ece", "nll", "brier")
SCALED_MEASURES = ("temperature", *(f"scaled_{measure}" for measure in CALIBRATION_MEASURES))


def fpr95(positive: np.ndarray, scores: np.ndarray) -> float:
    """The false-positive rate in [0, 1] at the achieved recall that is nearest to 95 %; both values must be present.

    Of thresholds with the same recall the largest rate counts, but at recall 1 the smallest, as in Outlier Exposure.
    """
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(positive, scores, drop_intermediate=False)
    fpr, tpr = fpr[1:], tpr[1:]  # the first point is above every score
    first_full = np.argmax(tpr == 1)
    fpr, tpr = fpr[first_full::-1], tpr[first_full::-1]
    return float(fpr[np.argmin(np.abs(tpr - 0.95))])


def ood_measures(in_scores: np.ndarray, out_scores: np.ndarray) -> dict[str, float]:
    """`MEASURES` of scores `[N]` and `[M]`, higher = more OOD: fractions in [0, 1].

    A `ValueError` tells of empty or non-finite scores.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    in_scores, out_scores = (np.asarray(s, dtype=np.float64).ravel() for s in (in_scores, out_scores))
    scores = np.concatenate([in_scores, out_scores])
    if not len(in_scores) or not len(out_scores) or not np.isfinite(scores).all():
        raise ValueError("scores must be finite, and neither set may be empty")
    out = np.arange(len(scores)) >= len(in_scores)
    return {
        "auroc": float(roc_auc_score(out, scores)),
        "aupr_in": float(average_precision_score(~out, -scores)),
        "aupr_out": float(average_precision_score(out, scores)),
        "fpr_in": fpr95(~out, -scores),
        "fpr_out": fpr95(out, scores),
    }


def confidence_and_correct(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest probability of each prediction, float64 `[N]`, and whether it is right, bool `[N]`."""
    from scipy.special import log_softmax

    logits = np.asarray(logits, dtype=np.float64)
    return np.exp(log_softmax(logits, 1).max(1)), logits.argmax(1) == labels


def error_detection(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`ERROR_MEASURES` of logits `[N, K]`: does low confidence point at wrong predictions (Hendrycks & Gimpel 2017)?

    `auroc`, `aupr` and `fpr` are NaN where all predictions are right or all wrong.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    confidence, correct = confidence_and_correct(logits, labels)
    wrong, scores = ~correct, -confidence
    measures = {"error": float(wrong.mean()), "aurc": aurc(wrong, scores)}
    curves = {"auroc": roc_auc_score, "aupr": average_precision_score, "fpr": fpr95}
    defined = wrong.any() and not wrong.all()
    return measures | {name: float(of(wrong, scores)) if defined else math.nan for name, of in curves.items()}


def aurc(wrong: np.ndarray, scores: np.ndarray) -> float:
    """Area under the risk-coverage curve (Geifman & El-Yaniv, NeurIPS 2017), in [0, 1]; `scores`: higher = less sure.

    Ties count as if in random order (the expected area).
    """
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    errors = np.bincount(group, wrong, len(size))
    expected = np.cumsum(np.repeat(errors / size, size))  # within a group of ties it grows evenly
    return float((expected / np.arange(1, len(expected) + 1)).mean())


def reliability(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort predictions into 15 bins of equal width in confidence (Guo et al., ICML 2017, section 2).

    Returns the number of predictions in each bin, their mean confidence and their accuracy (NaN in empty bins). A
    confidence on an edge belongs to the lower bin, as in Guo et al.; torchmetrics takes the upper one.
    """
    index = np.clip(np.searchsorted(np.linspace(0, 1, 16), confidence, side="left") - 1, 0, 14)
    count = np.bincount(index, minlength=15)
    with np.errstate(invalid="ignore"):
        return count, np.bincount(index, confidence, 15) / count, np.bincount(index, correct, 15) / count


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`CALIBRATION_MEASURES` of the softmax of logits `[N, K]`: `ece` in [0, 1], `nll` in nats, `brier` in [0, 2]."""
    from scipy.special import log_softmax

    log_probabilities = log_softmax(np.asarray(logits, dtype=np.float64), 1)
    one_hot = np.eye(log_probabilities.shape[1])[labels]
    count, confidence, accuracy = reliability(*confidence_and_correct(logits, labels))
    gaps, filled = np.abs(accuracy - confidence), count > 0
    return {
        "ece": float((gaps[filled] * count[filled]).sum() / count.sum()),
        "nll": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "brier": float(((np.exp(log_probabilities) - one_hot) ** 2).sum(1).mean()),
    }


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T in [0.001, 1000] that minimises the negative log-likelihood of softmax(logits / T).

    As in Guo et al. (ICML 2017). A `ValueError` tells that every prediction is right: the smaller T, the better then.
    """
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logits, dtype=np.float64)
    if (logits.argmax(1) == labels).all():
        raise ValueError("the network is right on all of them, so that no temperature is the best one")

    def nll(log_t: float) -> float:
        return calibration(logits / np.exp(log_t), labels)["nll"]

    return float(np.exp(minimize_scalar(nll, bounds=tuple(np.log((1e-3, 1e3))), method="bounded").x))
