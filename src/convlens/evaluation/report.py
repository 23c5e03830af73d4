"""The metrics of a test, as ``test.json`` stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlens.evaluation.calibration import CalibrationReport
from convlens.evaluation.metrics import Cell, Scores, wilson_interval


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class. Precision and recall are 0 for a class that was never predicted or never tested."""

    precision: float
    recall: float
    f1: float
    support: int  # test images of the class


@dataclass(frozen=True)
class ConformalMetrics:
    """How prediction sets did on the test split."""

    target_coverage: float
    empirical_coverage: float  # fraction of images whose set contains the true class, 0..1
    mean_set_size: float  # classes in a set


@dataclass(frozen=True)
class TTAMetrics:
    """Metrics with test-time augmentation."""

    accuracy: float
    accuracy_ci95: tuple[float, float]
    loss: float


@dataclass(frozen=True, kw_only=True)
class TestReport:
    """All metrics of a test. Accuracies are 0..1, the loss is the mean cross-entropy in nats."""

    __test__ = False  # pytest would collect a class of this name

    num_images: int
    correct: int
    accuracy: float
    accuracy_ci95: tuple[float, float]  # Wilson interval
    balanced_accuracy: float  # mean recall of the classes with test images
    macro_f1: float  # mean F1 of the classes with test images
    loss: float
    classes: dict[str, ClassMetrics]
    confusion_matrix: tuple[Cell, ...] | None = None  # the non-zero cells; a run stores them in a file of their own
    calibration: CalibrationReport | None = None
    conformal: ConformalMetrics | None = None
    in_distribution_rate: float | None = None  # fraction of images accepted by the out-of-distribution detector
    test_time_augmentation: TTAMetrics | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as plain values, without those that were not measured."""
        return {key: value for key, value in to_plain(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TestReport:
        """Rebuild the report from the values of :meth:`to_json`.

        Raises:
            KeyError: If a metric is missing.
            TypeError: If a metric is unknown.
        """
        parts: dict[str, Any] = {
            "accuracy_ci95": tuple(values["accuracy_ci95"]),
            "classes": {name: ClassMetrics(**metrics) for name, metrics in values["classes"].items()},
        }
        if "confusion_matrix" in values:
            parts["confusion_matrix"] = tuple((true, guess, count) for true, guess, count in values["confusion_matrix"])
        if "calibration" in values:
            parts["calibration"] = CalibrationReport.from_json(values["calibration"])
        if "conformal" in values:
            parts["conformal"] = ConformalMetrics(**values["conformal"])
        if tta := values.get("test_time_augmentation"):
            parts["test_time_augmentation"] = TTAMetrics(tta["accuracy"], tuple(tta["accuracy_ci95"]), tta["loss"])
        return cls(**{**values, **parts})

    def worst_classes(self, count: int) -> dict[str, ClassMetrics]:
        """Return the classes with the lowest F1, the worst first; classes without test images are left out."""
        tested = [(name, metrics) for name, metrics in self.classes.items() if metrics.support]
        return dict(sorted(tested, key=lambda item: item[1].f1)[:count])


def to_plain(value: Any) -> Any:
    """Return dataclasses as dicts and tuples as lists, recursively."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def classification_report(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> TestReport:
    """Compute the classification metrics of logits (N, K) and labels (N,).

    Args:
        logits: (N, K).
        labels: True classes, int64 (N,).
        classes: The K class names.

    Returns:
        The report, without calibration, prediction sets and test-time augmentation.
    """
    logits, labels = logits.cpu(), labels.cpu()
    n, k = len(labels), len(classes)
    predictions = logits.argmax(dim=1)
    hits, support, predicted = (
        torch.bincount(rows, minlength=k).numpy() for rows in (labels[labels == predictions], labels, predictions)
    )
    cells, counts = torch.unique(labels * k + predictions, return_counts=True)  # a dense matrix has K x K cells
    correct = int(hits.sum())
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    return TestReport(
        num_images=n,
        correct=correct,
        accuracy=correct / n,
        accuracy_ci95=wilson_interval(correct, n),
        balanced_accuracy=float(recall[support > 0].mean()),
        macro_f1=float(f1[support > 0].mean()),
        loss=Scores.of(logits, labels).loss,
        classes={
            name: ClassMetrics(float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
            for i, name in enumerate(classes)
        },
        confusion_matrix=tuple(
            (classes[cell // k], classes[cell % k], count)
            for cell, count in zip(cells.tolist(), counts.tolist(), strict=True)
        ),
    )
