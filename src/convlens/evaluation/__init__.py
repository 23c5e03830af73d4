"""Evaluation: metrics, calibration, conformal prediction, out-of-distribution detection and significance tests."""
