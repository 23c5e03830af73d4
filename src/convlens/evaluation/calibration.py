"""Probabilities that mean what they say: a temperature, calibration error, and bounds for prediction sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convlens.evaluation.coverage import LEVELS

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
    z, labels = logits.double(), labels.to(logits.device)
    spread = 1 / (len(z) + 2)
    true = (1 - spread) * z.gather(1, labels[:, None])[:, 0] + spread * z.mean(dim=1)  # (N,)
    inverse = 1.0
    for _ in range(50):
        p = (inverse * z).softmax(dim=1)  # (N, K)
        mean = (p * z).sum(dim=1)  # (N,)
        slope = (mean - true).mean().item()
        curvature = ((p * z * z).sum(dim=1) - mean**2).mean().item()
        step = slope / max(curvature, 1e-12)
        # no more than a factor of 2 at a time, for far from the minimum the curvature says little
        inverse = min(max(inverse - step, inverse / 2, 1 / HOTTEST), inverse * 2, 1 / COLDEST)
        if abs(step) < 1e-9 * inverse:
            break
    gain = F.cross_entropy(z, labels, reduction="sum") - F.cross_entropy(inverse * z, labels, reduction="sum")
    return 1 / inverse if 2 * gain.item() > PROVEN else 1.0


def reliability(probabilities: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Return, for 15 equal bins of the highest probability, how many images fall in, what it says, what is true.

    ``probabilities`` (N, K), ``labels`` (N,). Each bin has ``n``, ``confidence`` (mean highest probability) and
    ``accuracy``, both 0..1 and 0 where the bin is empty.
    """
    confidence, predicted = probabilities.double().max(dim=1)
    hits = (predicted == labels).double()
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    n = torch.bincount(number, minlength=BINS)
    whole = n.clamp(min=1)
    sums = [torch.bincount(number, weights=values, minlength=BINS) / whole for values in (confidence, hits)]
    return [
        {"n": int(count), "confidence": float(c), "accuracy": float(a)}
        for count, c, a in zip(n, sums[0], sums[1], strict=True)
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Return the expected calibration error, 0..1: the mean gap of confidence and accuracy (Naeini et al. 2015)."""
    return sum(bin["n"] * abs(bin["confidence"] - bin["accuracy"]) for bin in bins) / max(sum(b["n"] for b in bins), 1)


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Return the Brier score, 0 (best) to 2: the mean squared error of all probabilities (N, K) of labels (N,)."""
    truth = F.one_hot(labels, probabilities.shape[1])
    return float(((probabilities.double() - truth) ** 2).sum(dim=1).mean())


def judge_calibration(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
    """Return calibration error, Brier score and reliability of logits (N, K), before and after the temperature."""
    figures: dict[str, Any] = {"temperature": temperature}
    for name, divisor in (("before", 1.0), ("after", temperature)):
        p = (logits.double() / divisor).softmax(dim=1)
        bins = reliability(p, labels)
        figures[name] = {
            "calibration_error": calibration_error(bins), "brier_score": brier_score(p, labels), "bins": bins
        }  # fmt: skip
    return figures


def surprise(logits: Tensor) -> Tensor:
    """Return -log p of every class, float64 (N, K), of logits (N, K): how surprising each would be as the answer."""
    return -logits.double().log_softmax(dim=1)


def fit_coverage(logits: Tensor, labels: Tensor) -> list[float]:
    """Return, for each of ``LEVELS``, how surprising a class may be and still belong to the prediction set.

    Split conformal prediction (Vovk et al. 2005): of images like those of the logits (N, K) and labels (N,), which
    the net was not trained on, the set holds the true class with about that probability; at least, were nothing else
    fitted on them (the temperature is, and where the recipe asks for it the epoch was chosen by them). ``inf``, every
    class, where there are too few images to say.
    """
    scores = surprise(logits).gather(1, labels[:, None])[:, 0].sort().values  # (N,)
    ranks = [math.ceil((len(scores) + 1) * level) for level in LEVELS]
    return [scores[rank - 1].item() if rank <= len(scores) else math.inf for rank in ranks]
