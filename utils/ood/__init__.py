"""Out-of-distribution detection: the OOD sets, the scores and detectors, the measures, calibration.

`evaluate_ood` tests a network from anywhere.
"""

from utils.ood.evaluate import evaluate_ood

__all__ = ["evaluate_ood"]
