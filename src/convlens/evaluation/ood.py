"""Out-of-distribution scores, and metrics of such scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convlens.evaluation.metrics import row_chunks

IN_DISTRIBUTION_FRACTION = 0.95  # of in-distribution images that the threshold accepts

SHRINKAGE = 0.01  # of the covariance towards a multiple of the identity, because some features hardly vary


@dataclass(frozen=True, eq=False)
class MahalanobisModel:
    """Class means in feature space, with one covariance for all classes (Lee et al. 2018).

    The covariance is inverted once, when the model is fitted.
    """

    means: Tensor  # (K, D) float32, of the classes with training images
    whitener: Tensor  # (D, D) float32: whitened differences have covariance 1

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, classes: int) -> MahalanobisModel:
        """Fit the model to features (N, D) of training images and their labels (N,)."""
        x = features.double()
        counts = torch.bincount(labels, minlength=classes)
        means = torch.zeros(classes, x.shape[1], dtype=x.dtype).index_add_(0, labels, x) / counts.clamp(min=1)[:, None]
        centered = x - means[labels]
        covariance = centered.T @ centered / len(x)
        mean_variance = covariance.diagonal().mean()
        values, vectors = torch.linalg.eigh(covariance)
        values = (1 - SHRINKAGE) * values.clamp(min=0) + SHRINKAGE * mean_variance + 1e-12
        return cls(means[counts > 0].float(), (vectors / values.sqrt()).float())

    def distances(self, features: Tensor) -> Tensor:
        """Return the distance of features (N, D) to the nearest class mean, float32 (N,), in standard deviations."""
        white, centers = features @ self.whitener, self.means @ self.whitener
        return torch.cat([torch.cdist(x, centers).min(dim=1).values for (x,) in row_chunks(len(centers), white)])


def energy(logits: Tensor) -> Tensor:
    """Return the energy score (N,) of logits (N, K): high if no logit is large (Liu et al. 2020)."""
    return -logits.logsumexp(dim=1)


def fit_threshold(scores: Tensor) -> float:
    """Return the threshold that accepts 95% of held-out in-distribution scores (N,)."""
    return float(scores.double().quantile(IN_DISTRIBUTION_FRACTION, interpolation="higher"))


def auroc(in_scores: Tensor, ood_scores: Tensor) -> float:
    """Return the AUROC, 0..1, of in-distribution scores (N,) against out-of-distribution scores (M,)."""
    from sklearn.metrics import roc_auc_score

    truth = torch.cat([torch.zeros(len(in_scores)), torch.ones(len(ood_scores))])
    return float(roc_auc_score(truth.numpy(), torch.cat([in_scores, ood_scores]).numpy()))


def false_positive_rate(in_scores: Tensor, ood_scores: Tensor) -> float:
    """Return the FPR95: the fraction of out-of-distribution images accepted when 95% of the others are."""
    return float((ood_scores <= fit_threshold(in_scores)).double().mean())
