"""Out-of-distribution detection: the OOD sets, the scores and detectors, the measures, calibration."""
