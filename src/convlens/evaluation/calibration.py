"""Probabilities that mean what they say: a temperature, calibration error, and bounds for prediction sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convlens.evaluation.metrics import row_chunks

BINS = 15

COLDEST, HOTTEST = 0.05, 20.0  # temperatures beyond these say that there is nothing to fit

PROVEN = 6.63  # 1% point of chi-squared with one degree of freedom


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that logits (N, K) are divided by for the least cross-entropy with labels (N,).

    Guo et al. 2017. The loss is convex in the inverse of the temperature: Newton's steps find its one minimum. As
    if one image more had every class a little (Platt 1999), or a few images that are all right would make it certain.
    It is 1 unless the images prove that another fits better (likelihood ratio, at 1%): few images would do more harm
    than good.
    """
    labels, classes = labels.to(logits.device), logits.shape[1]
    spread = 1 / (len(logits) + 2)

    def wanted(z: Tensor, labels: Tensor) -> Tensor:
        z = z.double()
        return (1 - spread) * z.gather(1, labels[:, None])[:, 0] + spread * z.mean(dim=1)  # (N,)

    def moments(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.double()
        p = (inverse * z).softmax(dim=1)  # (N, K)
        mean = (p * z).sum(dim=1)
        return mean, (p * z * z).sum(dim=1) - mean**2  # (N,) each

    def loss(z: Tensor, labels: Tensor, inverse: float) -> Tensor:
        return F.cross_entropy(inverse * z.double(), labels, reduction="sum")

    true = torch.cat([wanted(*chunk) for chunk in row_chunks(classes, logits, labels)])
    inverse = 1.0
    for _ in range(50):
        means, variances = zip(*(moments(z) for (z,) in row_chunks(classes, logits)), strict=True)
        slope = (torch.cat(means) - true).mean().item()
        curvature = torch.cat(variances).mean().item()
        step = slope / max(curvature, 1e-12)
        # no more than a factor of 2 at a time, for far from the minimum the curvature says little
        before, inverse = inverse, min(max(inverse - step, inverse / 2, 1 / HOTTEST), inverse * 2, 1 / COLDEST)
        if abs(step) < 1e-9 * inverse or inverse == before:  # found, or at the end of what is allowed
            break
    gain = sum(float(loss(z, y, 1.0) - loss(z, y, inverse)) for z, y in row_chunks(classes, logits, labels))
    return 1 / inverse if 2 * gain > PROVEN else 1.0


def reliability(probabilities: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Return, for 15 equal bins of the highest probability, how many images fall in, what it says, what is true.

    ``probabilities`` (N, K), ``labels`` (N,). Each bin has ``n``, ``confidence`` (mean highest probability) and
    ``accuracy``, both 0..1 and 0 where the bin is empty.
    """
    confidence, predicted = probabilities.max(dim=1)
    return fill_bins(confidence.double(), predicted == labels)


def fill_bins(confidence: Tensor, correct: Tensor) -> list[dict[str, float]]:
    """Return the bins of :func:`reliability`, of the highest probability, float64 (N,), and whether it is right."""
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    n = torch.bincount(number, minlength=BINS)
    whole = n.clamp(min=1)
    sums = [torch.bincount(number, weights=values, minlength=BINS) / whole for values in (confidence, correct.double())]
    return [
        {"n": int(count), "confidence": float(c), "accuracy": float(a)}
        for count, c, a in zip(n, sums[0], sums[1], strict=True)
    ]


def expected_calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Return the expected calibration error, 0..1: the mean gap of confidence and accuracy (Naeini et al. 2015)."""
    return sum(bin["n"] * abs(bin["confidence"] - bin["accuracy"]) for bin in bins) / max(sum(b["n"] for b in bins), 1)


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Return the Brier score, 0 (best) to 2: the mean squared error of all probabilities (N, K) of labels (N,)."""
    return float(squared_errors(probabilities, labels).mean())


def squared_errors(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the squared error of all probabilities of each image, float64 (N,), of (N, K) and labels (N,)."""
    truth = F.one_hot(labels, probabilities.shape[1])
    return ((probabilities.double() - truth) ** 2).sum(dim=1)


def calibration_report(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
    """Return calibration error, Brier score and reliability of logits (N, K), before and after the temperature."""
    figures: dict[str, Any] = {"temperature": temperature}
    for name, divisor in (("before", 1.0), ("after", temperature)):
        chunks = []
        for z, y in row_chunks(logits.shape[1], logits, labels):
            p = (z.double() / divisor).softmax(dim=1)
            chunks.append((*p.max(dim=1), squared_errors(p, y)))
        confidence, predicted, errors = (torch.cat(values) for values in zip(*chunks, strict=True))
        bins = fill_bins(confidence, predicted == labels)
        figures[name] = {
            "calibration_error": expected_calibration_error(bins), "brier_score": float(errors.mean()), "bins": bins
        }  # fmt: skip
    return figures
