"""What validation images say of a net: how to read its probabilities, and which pictures it does not know.

A picture is strange by two signs: its features lie far from those of training images (Lee et al. 2018), and its logits
are small (energy, Liu et al. 2020). Neither is good for every net (docs/results/accuracy.md), their sum is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from convlens.data.dataset import Split
from convlens.data.normalize import Normalize
from convlens.evaluation.calibration import calibration_report, fit_temperature
from convlens.evaluation.conformal import COVERAGE_LEVELS, prediction_sets
from convlens.evaluation.inference import compute_outputs
from convlens.evaluation.metrics import row_chunks
from convlens.evaluation.ood import MahalanobisModel, energy, fit_threshold


def nonconformity(logits: Tensor) -> Tensor:
    """Return -log p of every class, float64 (N, K), of logits (N, K): how surprising each would be as the answer."""
    return -logits.double().log_softmax(dim=1)


def conformal_thresholds(logits: Tensor, labels: Tensor) -> list[float]:
    """Return, for each of ``LEVELS``, how surprising a class may be and still belong to the prediction set.

    Split conformal prediction (Vovk et al. 2005): of images like those of the logits (N, K) and labels (N,), which
    the net was not trained on, the set holds the true class with about that probability; at least, were nothing else
    fitted on them (the temperature is, and where the recipe asks for it the epoch was chosen by them). ``inf``, every
    class, where there are too few images to say.
    """
    chunks = row_chunks(logits.shape[1], logits, labels)
    scores = torch.cat([nonconformity(z).gather(1, y[:, None])[:, 0] for z, y in chunks]).sort().values  # (N,)
    ranks = [math.ceil((len(scores) + 1) * level) for level in COVERAGE_LEVELS]
    return [scores[rank - 1].item() if rank <= len(scores) else math.inf for rank in ranks]


MAX_FEATURE_IMAGES = 10_000  # training images, evenly from all of them, say where the classes lie

TEST_COVERAGE = 0.95  # that a test tells of


@dataclass(frozen=True, eq=False)
class UncertaintyModel:
    """A temperature, bounds for prediction sets, and how strange a picture may be that is still known."""

    temperature: float
    bounds: tuple[float, ...]  # one for each of coverage.LEVELS; inf: every class
    distance: tuple[float, float]  # mean and standard deviation on validation images
    energy: tuple[float, float]
    threshold: float  # of strangeness
    n: int  # validation images that it was fitted on
    space: MahalanobisModel

    @classmethod
    def fit(
        cls, net: nn.Module, train: Split, validation: Split, classes: int, normalise: Normalize
    ) -> UncertaintyModel:
        """Fit on what ``net`` says of validation images; of training images only the features are looked at."""
        rows = train.spread(MAX_FEATURE_IMAGES)
        _, known = compute_outputs(net, train.images[rows], normalise)
        space = MahalanobisModel.fit(known.cpu(), train.labels[rows], classes)
        logits, features = (x.cpu() for x in compute_outputs(net, validation.images, normalise))
        temperature = fit_temperature(logits, validation.labels)
        bounds = conformal_thresholds(logits / temperature, validation.labels)
        distance, usual = mean_and_spread(space.distances(features)), mean_and_spread(energy(logits))
        fitted = cls(temperature, tuple(bounds), distance, usual, 0.0, len(validation), space)
        return replace(fitted, threshold=fit_threshold(fitted.strangeness(logits, features)))

    def strangeness(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return how strange images are, float32 (N,), from logits (N, K) and features (N, D).

        The sum of two scores, each in standard deviations from its mean on validation images.
        """
        scores = ((self.space.distances(features), self.distance), (energy(logits), self.energy))
        return sum(((score - mean) / spread for score, (mean, spread) in scores), torch.zeros(len(logits)))

    def knows(self, logits: Tensor, features: Tensor) -> Tensor:
        """Say which images look like what the net was trained on, bool (N,), from logits (N, K), features (N, D)."""
        return self.strangeness(logits, features) <= self.threshold

    def sets(self, logits: Tensor, coverage: float) -> Tensor:
        """Return the classes of each prediction set, bool (N, K), from logits (N, K) before the temperature."""
        return torch.from_numpy(
            prediction_sets(nonconformity(logits / self.temperature).numpy(), self.bounds, coverage)
        )

    def judge(self, logits: Tensor, features: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return what a test says of all this, from logits (N, K), features (N, D) and labels (N,)."""
        covered, sizes = [], []
        for z, y in row_chunks(logits.shape[1], logits, labels):
            sets = self.sets(z, TEST_COVERAGE)
            covered.append(sets.gather(1, y[:, None])[:, 0])
            sizes.append(sets.sum(dim=1))
        return {
            "calibration": calibration_report(logits, labels, self.temperature),
            "coverage": {
                "asked": TEST_COVERAGE,
                "measured": float(torch.cat(covered).double().mean()),
                "classes_in_a_set": float(torch.cat(sizes).double().mean()),
            },
            "known": float(self.knows(logits, features).double().mean()),
        }

    def to_json(self) -> dict[str, Any]:
        """Return all but the feature space as plain values."""
        bounds = [bound if math.isfinite(bound) else None for bound in self.bounds]
        values = {"temperature": self.temperature, "bounds": bounds, "threshold": self.threshold, "n": self.n}
        return {**values, "distance": list(self.distance), "energy": list(self.energy)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the feature space."""
        return {"means": self.space.means, "whitener": self.space.whitener}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> UncertaintyModel:
        """Rebuild what :meth:`to_json` and :meth:`tensors` gave; ValueError, KeyError or TypeError if it cannot be."""
        bounds = tuple(math.inf if bound is None else float(bound) for bound in values["bounds"])
        temperature, threshold = float(values["temperature"]), float(values["threshold"])
        distance, energy = ((float(mean), float(spread)) for mean, spread in (values["distance"], values["energy"]))
        finite = all(map(math.isfinite, (threshold, *distance, *energy)))
        if len(bounds) != len(COVERAGE_LEVELS) or not finite or not (0 < temperature < math.inf):
            raise ValueError("its calibration makes no sense")
        space = MahalanobisModel(tensors["means"], tensors["whitener"])
        return cls(temperature, bounds, distance, energy, threshold, int(values["n"]), space)


def mean_and_spread(scores: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of scores (N,), never 0."""
    return float(scores.mean()), max(float(scores.std(correction=0)), 1e-6)
