"""Measures of OOD detection and of error detection.

There are two conventions for the "positive" class, so both are computed: OUT measures take OOD as positive, with the
score; IN measures take in-distribution as positive, with minus the score. AUROC is the same for both.
"""

import math

import numpy as np

from utils.ood.calibration import confidence_and_correct

RECALL = 0.95
MEASURES = ("fpr_in", "fpr_out", "auroc", "aupr_in", "aupr_out")
ERROR_MEASURES = ("error", "auroc", "aupr", "fpr", "aurc")


def fpr_at_recall(positive: np.ndarray, scores: np.ndarray, recall: float = RECALL) -> float:
    """FPR95, if `recall` is 0.95: the false-positive rate at the achieved recall that is nearest to it.

    Args:
        positive: bool `[N]`, with both values present.
        scores: `[N]`, higher = more positive. Thresholds are the scores; those at or above one are called positive.
    Returns:
        The rate in [0, 1]. Several thresholds may have the same recall. Then the largest rate counts, but at recall 1
        the smallest (the convention of the Outlier Exposure code).
    """
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(positive, scores, drop_intermediate=False)
    fpr, tpr = fpr[1:], tpr[1:]  # the first point is above every score
    first_full = np.argmax(tpr == 1)
    fpr, tpr = fpr[first_full::-1], tpr[first_full::-1]
    return float(fpr[np.argmin(np.abs(tpr - recall))])


def ood_measures(in_scores: np.ndarray, out_scores: np.ndarray) -> dict[str, float]:
    """OOD detection of one in-distribution and one OOD set.

    Args:
        in_scores, out_scores: `[N]` and `[M]`, higher = more OOD; finite, neither empty.
    Returns:
        Fractions in [0, 1]. `auroc`: the chance that an OOD image scores above an in-distribution one, ties counting
        half. `aupr_in`, `aupr_out`: average precision, the step-wise sum (not the trapezoidal area) with
        in-distribution or OOD as positive. `fpr_in`, `fpr_out`: the rate of false positives at 95 % recall of the
        positives; `fpr_in` is the usual "FPR95", the share of OOD images taken for in-distribution (`fpr_at_recall`).
    Raises:
        ValueError: for empty or non-finite scores.
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
        "fpr_in": fpr_at_recall(~out, -scores),
        "fpr_out": fpr_at_recall(out, scores),
    }


def aurc(wrong: np.ndarray, scores: np.ndarray) -> float:
    """Area under the risk-coverage curve (Geifman & El-Yaniv, NeurIPS 2017); lower is better.

    Args:
        wrong: bool `[N]`; scores: `[N]`, higher = less confident. N is at least 1.
    Returns:
        The mean over k = 1 … N of the error rate among the k most confident predictions, in [0, 1]. Ties count as if
        in random order (the expected area), so the order of the data does not matter.
    """
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    errors = np.bincount(group, wrong, len(size))
    # within a group of ties the expected number of errors grows evenly
    expected = np.cumsum(np.repeat(errors / size, size))
    return float((expected / np.arange(1, len(expected) + 1)).mean())


def error_detection(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well confidence tells wrong predictions from right ones (Hendrycks & Gimpel, ICLR 2017).

    Args:
        logits: `[N, K]`; labels: int `[N]`.
    Returns:
        `error` (the error rate); `auroc`, `aupr`, `fpr` (at 95 % recall) with wrong predictions as positives and minus
        the maximum softmax as score, NaN where all predictions are right or all wrong; `aurc`, always defined.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    confidence, correct = confidence_and_correct(logits, labels)
    wrong, scores = ~correct, -confidence
    measures = {"error": float(wrong.mean()), "aurc": aurc(wrong, scores)}
    curves = {"auroc": roc_auc_score, "aupr": average_precision_score, "fpr": fpr_at_recall}
    defined = wrong.any() and not wrong.all()
    return measures | {name: float(of(wrong, scores)) if defined else math.nan for name, of in curves.items()}
