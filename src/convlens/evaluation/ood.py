"""Scores of how strange an image is to a net, and how good such a score is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convlens.evaluation.metrics import row_chunks

IN_DISTRIBUTION_FRACTION = 0.95  # of known images that pass

SHRINKAGE = 0.01  # of the covariance towards a sphere, for features that hardly vary


@dataclass(frozen=True, eq=False)
class MahalanobisModel:
    """Where the training images of each class lie in feature space: class means, and one covariance for all.

    The distance of Lee et al. 2018 (Mahalanobis), with the covariance inverted once.
    """

    means: Tensor  # (K, D) float32, of the classes that were seen
    whitener: Tensor  # (D, D) float32: differences times this have covariance 1

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, classes: int) -> MahalanobisModel:
        """Measure features (N, D) with labels (N,)."""
        x = features.double()
        n = torch.bincount(labels, minlength=classes)
        means = torch.zeros(classes, x.shape[1], dtype=x.dtype).index_add_(0, labels, x) / n.clamp(min=1)[:, None]
        centred = x - means[labels]
        covariance = centred.T @ centred / len(x)
        spread = covariance.diagonal().mean()
        values, vectors = torch.linalg.eigh(covariance)
        values = (1 - SHRINKAGE) * values.clamp(min=0) + SHRINKAGE * spread + 1e-12
        return cls(means[n > 0].float(), (vectors / values.sqrt()).float())

    def distances(self, features: Tensor) -> Tensor:
        """Return how far features (N, D) are from the nearest class, float32 (N,), in standard deviations."""
        white, centres = features @ self.whitener, self.means @ self.whitener
        return torch.cat([torch.cdist(x, centres).min(dim=1).values for (x,) in row_chunks(len(centres), white)])


def energy(logits: Tensor) -> Tensor:
    """Return the energy (N,) of logits (N, K): high where no class has a large one (Liu et al. 2020)."""
    return -logits.logsumexp(dim=1)


def fit_threshold(scores: Tensor) -> float:
    """Return the score that 95% of known images (N,), not trained on, do not exceed."""
    return float(scores.double().quantile(IN_DISTRIBUTION_FRACTION, interpolation="higher"))


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Return the probability that an unknown image scores above a known one, 0..1, from scores (N,) and (M,)."""
    from sklearn.metrics import roc_auc_score

    truth = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))])
    return float(roc_auc_score(truth.numpy(), torch.cat([known, unknown]).numpy()))


def false_positive_rate(known: Tensor, unknown: Tensor) -> float:
    """Return the share of unknown images that pass where 95% of known ones do (FPR95), from scores (N,) and (M,)."""
    return float((unknown <= fit_threshold(known)).double().mean())
