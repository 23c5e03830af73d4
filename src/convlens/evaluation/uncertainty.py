"""The uncertainty model of a classifier: calibration, prediction sets and out-of-distribution detection.

The out-of-distribution score is the sum of the Mahalanobis distance in feature space (Lee et al. 2018) and the energy
of the logits (Liu et al. 2020). Neither is good for every model (docs/results.md); their sum is.
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
from convlens.evaluation.report import ConformalMetrics, TestReport

MAX_FEATURE_IMAGES = 10_000  # training images that the class means are fitted on, evenly spaced

TEST_COVERAGE = 0.95  # target coverage of the prediction sets in a test report


def nonconformity(logits: Tensor) -> Tensor:
    """Return the nonconformity score of every class, -log p, float64 (N, K), from logits (N, K)."""
    return -logits.double().log_softmax(dim=1)


def conformal_thresholds(logits: Tensor, labels: Tensor) -> list[float]:
    """Compute the thresholds of split conformal prediction (Vovk, Gammerman & Shafer 2005).

    The coverage guarantee assumes that nothing else was fitted on these images. Here the temperature was, and with
    `restore_best` also the epoch, so coverage is only approximately guaranteed.

    Args:
        logits: Logits of validation images, (N, K).
        labels: True classes, int64 (N,).

    Returns:
        The threshold of the nonconformity score for each of ``COVERAGE_LEVELS``. With too few images it is ``inf``: the
        set then contains every class.
    """
    chunks = row_chunks(logits.shape[1], logits, labels)
    scores = torch.cat([nonconformity(z).gather(1, y[:, None])[:, 0] for z, y in chunks]).sort().values  # (N,)
    ranks = [math.ceil((len(scores) + 1) * level) for level in COVERAGE_LEVELS]
    return [scores[rank - 1].item() if rank <= len(scores) else math.inf for rank in ranks]


@dataclass(frozen=True, eq=False)
class UncertaintyModel:
    """A calibration temperature, conformal thresholds and an out-of-distribution detector.

    The class means of the detector are fitted on training images, everything else on validation images.
    """

    temperature: float
    conformal_thresholds: tuple[float, ...]  # one for each of COVERAGE_LEVELS; inf: the set contains every class
    distance: tuple[float, float]  # mean and standard deviation of the Mahalanobis distance
    energy: tuple[float, float]  # mean and standard deviation of the energy
    ood_threshold: float  # images with a larger score are out-of-distribution
    num_images: int  # validation images that it was fitted on
    mahalanobis: MahalanobisModel

    @classmethod
    def fit(
        cls, model: nn.Module, train: Split, validation: Split, classes: int, normalize: Normalize
    ) -> UncertaintyModel:
        """Fit the uncertainty model of a trained classifier.

        Args:
            model: The classifier.
            train: Training images; only their features and labels are used.
            validation: Images that the classifier was not trained on.
            classes: Number of classes.
            normalize: Turns images into the classifier's input.
        """
        rows = train.evenly_spaced(MAX_FEATURE_IMAGES)
        _, train_features = compute_outputs(model, train.images[rows], normalize)
        mahalanobis = MahalanobisModel.fit(train_features.cpu(), train.labels[rows], classes)
        logits, features = (x.cpu() for x in compute_outputs(model, validation.images, normalize))
        temperature = fit_temperature(logits, validation.labels)
        fitted = cls(
            temperature=temperature,
            conformal_thresholds=tuple(conformal_thresholds(logits / temperature, validation.labels)),
            distance=mean_and_std(mahalanobis.distances(features)),
            energy=mean_and_std(energy(logits)),
            ood_threshold=0.0,
            num_images=len(validation),
            mahalanobis=mahalanobis,
        )
        return replace(fitted, ood_threshold=fit_threshold(fitted.ood_score(logits, features)))

    def ood_score(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return the out-of-distribution score of images; a higher score is less like the training data.

        The score is the sum of distance and energy, each standardized on validation images.

        Args:
            logits: (N, K).
            features: (N, D).

        Returns:
            Scores, float32 (N,).
        """
        scores = ((self.mahalanobis.distances(features), self.distance), (energy(logits), self.energy))
        return sum(((score - mean) / std for score, (mean, std) in scores), torch.zeros(len(logits)))

    def is_in_distribution(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return whether images resemble the training data, bool (N,), from logits (N, K) and features (N, D)."""
        return self.ood_score(logits, features) <= self.ood_threshold

    def prediction_sets(self, logits: Tensor, coverage: float) -> Tensor:
        """Return the prediction sets, bool (N, K), of uncalibrated logits (N, K)."""
        scores = nonconformity(logits / self.temperature).numpy()
        return torch.from_numpy(prediction_sets(scores, self.conformal_thresholds, coverage))

    def evaluate(self, report: TestReport, logits: Tensor, features: Tensor, labels: Tensor) -> TestReport:
        """Add calibration, prediction sets and out-of-distribution detection to a test report.

        Args:
            report: The report of the same images.
            logits: (N, K).
            features: (N, D).
            labels: True classes, int64 (N,).
        """
        covered, sizes = [], []
        for z, y in row_chunks(logits.shape[1], logits, labels):
            sets = self.prediction_sets(z, TEST_COVERAGE)
            covered.append(sets.gather(1, y[:, None])[:, 0])
            sizes.append(sets.sum(dim=1))
        return replace(
            report,
            calibration=calibration_report(logits, labels, self.temperature),
            conformal=ConformalMetrics(
                target_coverage=TEST_COVERAGE,
                empirical_coverage=float(torch.cat(covered).double().mean()),
                mean_set_size=float(torch.cat(sizes).double().mean()),
            ),
            in_distribution_rate=float(self.is_in_distribution(logits, features).double().mean()),
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values."""
        thresholds = [value if math.isfinite(value) else None for value in self.conformal_thresholds]
        return {
            "temperature": self.temperature,
            "conformal_thresholds": thresholds,
            "ood_threshold": self.ood_threshold,
            "num_images": self.num_images,
            "distance": list(self.distance),
            "energy": list(self.energy),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name: class means and whitening matrix."""
        return {"means": self.mahalanobis.means, "whitener": self.mahalanobis.whitener}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> UncertaintyModel:
        """Rebuild the model from the values of :meth:`to_json` and :meth:`tensors`.

        Raises:
            KeyError: If a value is missing.
            TypeError: If a value has the wrong type.
            ValueError: If a value is out of range.
        """
        thresholds = tuple(math.inf if value is None else float(value) for value in values["conformal_thresholds"])
        temperature, ood_threshold = float(values["temperature"]), float(values["ood_threshold"])
        distance, energy = ((float(mean), float(std)) for mean, std in (values["distance"], values["energy"]))
        finite = all(map(math.isfinite, (ood_threshold, *distance, *energy)))
        if len(thresholds) != len(COVERAGE_LEVELS) or not finite or not (0 < temperature < math.inf):
            raise ValueError("its uncertainty model is invalid")
        mahalanobis = MahalanobisModel(tensors["means"], tensors["whitener"])
        return cls(temperature, thresholds, distance, energy, ood_threshold, int(values["num_images"]), mahalanobis)


def mean_and_std(scores: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of scores (N,); the latter is at least 1e-6."""
    return float(scores.mean()), max(float(scores.std(correction=0)), 1e-6)
