"""What stage 3 computes for each network: its measures on the test images, and every score on every OOD set."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.compute import distributed
from utils.core.errors import UserError
from utils.data.datasets import RealData
from utils.ood.calibration import calibration, confidence_and_correct, scaled_calibration
from utils.ood.detectors import Scorer
from utils.ood.measures import MEASURES, error_detection, ood_measures
from utils.ood.sets import OODSet
from utils.runs.run_folder import RunFolder


@dataclass
class NetworkScores:
    """One network on the test images and on the OOD sets.

    `errors`: error detection and calibration, by measure, and with temperature scaling the calibration after it;
    `confidence`, `correct`: of each test image, `[N]`; `in_scores[score]` `[N]`; `out_scores[set][score]` `[M]`;
    `measures[set][score]`: those of `MEASURES`.
    """

    errors: dict[str, float]
    confidence: np.ndarray
    correct: np.ndarray
    in_scores: dict[str, np.ndarray]
    out_scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    measures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


def score_networks(
    scorers: Mapping[int, Scorer], real: RealData, sets: Sequence[OODSet], batch: int, run: RunFolder
) -> list[NetworkScores]:
    """Score the networks of this process; returns those of all processes, in order.

    Args:
        scorers: by network index.
        batch: images per forward pass.
    Raises:
        UserError: when the outputs of a network are not finite.
    """
    labels = real.labels_test.cpu().numpy()
    own = {index: _on_test_images(index, scorer, real, labels, batch) for index, scorer in scorers.items()}
    with run.progress(len(sets), "OOD sets") as progress:
        for ood in sets:
            images = ood.load()
            for index, scorer in scorers.items():
                values = scorer(images, batch)[1]
                network = own[index]
                network.out_scores[ood.name] = values
                network.measures[ood.name] = {
                    name: _measures(network.in_scores[name], values[name], f"{name}, {ood.name}, {index}", run.log_own)
                    for name in values
                }
            progress.step()
    return list(distributed.gather(own).values())


def _on_test_images(index: int, scorer: Scorer, real: RealData, labels: np.ndarray, batch: int) -> NetworkScores:
    logits, scores = scorer(real.test_images, batch)
    if not np.isfinite(logits).all():
        raise UserError(f"--folder: network {index} has outputs that are not finite; train it again")
    errors = error_detection(logits, labels) | calibration(logits, labels)
    if scorer.fitted_temperature is not None:
        errors |= scaled_calibration(logits, labels, scorer.fitted_temperature)
    return NetworkScores(errors, *confidence_and_correct(logits, labels), scores)


def _measures(in_scores: np.ndarray, out_scores: np.ndarray, what: str, log: Callable[[str], None]) -> dict[str, float]:
    """The measures, or NaN if a score is not finite: that must not end a long run."""
    if np.isfinite(in_scores).all() and np.isfinite(out_scores).all():
        return ood_measures(in_scores, out_scores)
    log(f"scores not finite, no measures (score, set, network): {what}")
    return dict.fromkeys(MEASURES, math.nan)
