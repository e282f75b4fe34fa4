"""How well a classifier is calibrated: calibration error, likelihood and Brier score."""

from dataclasses import dataclass

import numpy as np

BINS = 15
CALIBRATION_MEASURES = ("ece", "nll", "brier")
SCALED_MEASURES = ("temperature", *(f"scaled_{measure}" for measure in CALIBRATION_MEASURES))
TEMPERATURES = (1e-3, 1e3)  # the range in which a temperature is looked for


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows: bins of confidence, (edges[i], edges[i + 1]], and what lies in each."""

    edges: np.ndarray  # `[bins + 1]`
    count: np.ndarray  # of predictions, `[bins]`
    confidence: np.ndarray  # their mean, `[bins]`; NaN in empty bins
    accuracy: np.ndarray  # their mean, `[bins]`; NaN in empty bins

    @property
    def error(self) -> float:
        """Expected calibration error: the mean of |accuracy - confidence| over bins, weighted by their counts."""
        gaps, filled = np.abs(self.accuracy - self.confidence), self.count > 0
        return float((gaps[filled] * self.count[filled]).sum() / self.count.sum())


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """Sort predictions into `bins` bins of equal width in confidence (Guo et al., ICML 2017, section 2).

    Args:
        confidence: `[N]` in (0, 1], the largest probability; correct: bool `[N]`. N is at least 1.
    Returns:
        The bins. A confidence on an edge belongs to the lower bin, as in Guo et al.; torchmetrics takes the upper one.
    """
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, confidence, bins) / count
        accuracy = np.bincount(index, correct, bins) / count
    return Reliability(edges, count, mean_confidence, accuracy)


def confidence_and_correct(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest probability of each prediction, float64 `[N]`, and whether it is right, bool `[N]`."""
    from scipy.special import log_softmax

    logits = np.asarray(logits, dtype=np.float64)
    return np.exp(log_softmax(logits, 1).max(1)), logits.argmax(1) == labels


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Calibration of the softmax probabilities on labelled in-distribution images; lower is better in all three.

    Args:
        logits: `[N, K]`; labels: int `[N]`; N is at least 1.
    Returns:
        `ece`: expected calibration error of the predicted class, 15 bins of equal width, in [0, 1] (Guo et al., ICML
        2017); `nll`: mean negative log-likelihood of the label in nats; `brier`: squared distance of the probabilities
        from the one-hot label, summed over classes and averaged over images, in [0, 2] (Brier 1950; not halved).
    """
    from scipy.special import log_softmax

    log_probabilities = log_softmax(np.asarray(logits, dtype=np.float64), 1)
    rows = np.arange(len(labels))
    wanted = np.zeros_like(log_probabilities)
    wanted[rows, labels] = 1
    return {
        "ece": reliability(*confidence_and_correct(logits, labels)).error,
        "nll": float(-log_probabilities[rows, labels].mean()),
        "brier": float(((np.exp(log_probabilities) - wanted) ** 2).sum(1).mean()),
    }


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimises the negative log-likelihood of softmax(logits / T) (Guo et al., ICML 2017).

    Args:
        logits: `[N, K]`, of images that the network was not trained on; labels: int `[N]`; N is at least 1.
    Returns:
        T in [0.001, 1000].
    Raises:
        ValueError: when every prediction is right, since the smaller T, the better then.
    """
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logits, dtype=np.float64)
    if (logits.argmax(1) == labels).all():
        raise ValueError("the network is right on all of them, so that no temperature is the best one")

    def likelihood(log_t: float) -> float:
        return calibration(logits / np.exp(log_t), labels)["nll"]

    return float(np.exp(minimize_scalar(likelihood, bounds=tuple(np.log(TEMPERATURES)), method="bounded").x))


def scaled_calibration(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, float]:
    """`SCALED_MEASURES`: the temperature, and the calibration of softmax(logits / temperature)."""
    scaled = calibration(np.asarray(logits, dtype=np.float64) / temperature, labels)
    return {"temperature": temperature} | {f"scaled_{name}": value for name, value in scaled.items()}
