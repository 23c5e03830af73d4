"""Calibration: temperature scaling, expected calibration error and Brier score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convlens.evaluation.metrics import row_chunks

NUM_BINS = 15

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0  # a fit that ends at either bound is degenerate

CHI2_1PERCENT = 6.63  # 1% critical value of the chi-squared distribution with one degree of freedom


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram."""

    count: int  # images in the bin
    confidence: float  # mean confidence, 0..1; 0 for an empty bin
    accuracy: float  # fraction classified correctly, 0..1; 0 for an empty bin


@dataclass(frozen=True)
class CalibrationScores:
    """How well the probabilities of a model match its accuracy."""

    ece: float  # expected calibration error, 0..1
    brier_score: float  # 0 (best) to 2
    bins: tuple[ReliabilityBin, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CalibrationScores:
        """Rebuild the scores from their JSON values."""
        return cls(values["ece"], values["brier_score"], tuple(ReliabilityBin(**bin) for bin in values["bins"]))


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration before and after temperature scaling."""

    temperature: float
    before: CalibrationScores
    after: CalibrationScores

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CalibrationReport:
        """Rebuild the report from its JSON values."""
        before, after = (CalibrationScores.from_json(values[when]) for when in ("before", "after"))
        return cls(values["temperature"], before, after)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit the temperature of temperature scaling (Guo et al. 2017).

    The loss is convex in the inverse temperature, so Newton's method finds its only minimum. The targets are smoothed
    as if one more image belonged a little to every class (Platt 1999); otherwise a few images, all classified
    correctly, would drive the temperature to 0.

    Args:
        logits: Validation logits, (N, K).
        labels: True classes, int64 (N,).

    Returns:
        The temperature that logits are divided by. It is 1 unless a likelihood ratio test at the 1% level shows that
        another temperature fits better: with few images, an insignificant temperature would do more harm than good.
    """
    labels, classes = labels.to(logits.device), logits.shape[1]
    smoothing = 1 / (len(logits) + 2)

    def target_logits(z: Tensor, labels: Tensor) -> Tensor:
        z = z.double()
        return (1 - smoothing) * z.gather(1, labels[:, None])[:, 0] + smoothing * z.mean(dim=1)  # (N,)

    def moments(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.double()
        p = (inverse * z).softmax(dim=1)  # (N, K)
        mean = (p * z).sum(dim=1)
        return mean, (p * z * z).sum(dim=1) - mean**2  # (N,) each

    def loss(z: Tensor, labels: Tensor, inverse: float) -> Tensor:
        return F.cross_entropy(inverse * z.double(), labels, reduction="sum")

    target = torch.cat([target_logits(*chunk) for chunk in row_chunks(classes, logits, labels)])
    inverse = 1.0
    for _ in range(50):
        means, variances = zip(*(moments(z) for (z,) in row_chunks(classes, logits)), strict=True)
        slope = (torch.cat(means) - target).mean().item()
        curvature = torch.cat(variances).mean().item()
        step = slope / max(curvature, 1e-12)
        # limit each step to a factor of 2: far from the minimum the curvature is a poor guide
        previous = inverse
        inverse = min(max(inverse - step, inverse / 2, 1 / MAX_TEMPERATURE), inverse * 2, 1 / MIN_TEMPERATURE)
        if abs(step) < 1e-9 * inverse or inverse == previous:  # converged, or at a bound
            break
    gain = sum(float(loss(z, y, 1.0) - loss(z, y, inverse)) for z, y in row_chunks(classes, logits, labels))
    return 1 / inverse if 2 * gain > CHI2_1PERCENT else 1.0


def reliability(probabilities: Tensor, labels: Tensor) -> tuple[ReliabilityBin, ...]:
    """Return the reliability diagram: 15 bins of equal width over the confidence.

    Args:
        probabilities: (N, K).
        labels: True classes, int64 (N,).
    """
    confidence, predicted = probabilities.max(dim=1)
    return fill_bins(confidence.double(), predicted == labels)


def fill_bins(confidence: Tensor, correct: Tensor) -> tuple[ReliabilityBin, ...]:
    """Return the bins of :func:`reliability` from confidences, float64 (N,), and correctness, bool (N,)."""
    bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    counts = torch.bincount(bins, minlength=NUM_BINS)
    divisor = counts.clamp(min=1)
    confidences, accuracies = (
        torch.bincount(bins, weights=values, minlength=NUM_BINS) / divisor for values in (confidence, correct.double())
    )
    columns = zip(counts.tolist(), confidences.tolist(), accuracies.tolist(), strict=True)
    return tuple(ReliabilityBin(*values) for values in columns)


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the expected calibration error, 0..1: the mean gap of confidence and accuracy (Naeini et al. 2015)."""
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / max(sum(b.count for b in bins), 1)


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Return the multi-class Brier score, 0 (best) to 2, of probabilities (N, K) and labels (N,)."""
    return float(squared_errors(probabilities, labels).mean())


def squared_errors(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the squared error summed over the classes, float64 (N,), of probabilities (N, K) and labels (N,)."""
    truth = F.one_hot(labels, probabilities.shape[1])
    return ((probabilities.double() - truth) ** 2).sum(dim=1)


def calibration_report(logits: Tensor, labels: Tensor, temperature: float) -> CalibrationReport:
    """Return calibration scores before and after temperature scaling, from logits (N, K) and labels (N,)."""
    before, after = (score_calibration(logits, labels, divisor) for divisor in (1.0, temperature))
    return CalibrationReport(temperature, before, after)


def score_calibration(logits: Tensor, labels: Tensor, temperature: float) -> CalibrationScores:
    """Return the calibration scores of logits (N, K), divided by the temperature."""
    chunks = []
    for z, y in row_chunks(logits.shape[1], logits, labels):
        p = (z.double() / temperature).softmax(dim=1)
        chunks.append((*p.max(dim=1), squared_errors(p, y)))
    confidence, predicted, errors = (torch.cat(values) for values in zip(*chunks, strict=True))
    bins = fill_bins(confidence, predicted == labels)
    return CalibrationScores(expected_calibration_error(bins), float(errors.mean()), bins)
