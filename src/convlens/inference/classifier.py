"""Classifier: a trained model in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlens.data.dataset import Split
from convlens.data.images import Pixels
from convlens.evaluation.inference import TTA, compute_logits, compute_outputs
from convlens.evaluation.report import TestReport, TTAMetrics, classification_report
from convlens.inference.bundle import Bundle, load_bundle
from convlens.inference.predictor import Predictor
from convlens.inference.store import resolve_bundle
from convlens.system.device import select_device


class Classifier(Predictor):
    """A trained model in PyTorch; create it with :meth:`load`.

    Attributes:
        classes: The K class names.
        model: The ``nn.Module``.
        preprocess: Turns an image into the model's input pixels.
        uncertainty: Calibration, prediction sets and out-of-distribution detection; None if the model was trained
            without validation images.

    >>> classifier = Classifier.load("digits")
    >>> classifier.classes[:3]
    ('0', '1', '2')
    >>> ring = np.zeros((8, 8), np.uint8)
    >>> ring[1:7, 2:6] = 255
    >>> ring[2:6, 3:5] = 0
    >>> classifier.predict(ring).label
    '0'
    """

    def __init__(self, bundle: Bundle, device: str = "cpu"):
        self.bundle = bundle
        self.classes = bundle.classes
        self.preprocess = bundle.preprocess
        self.uncertainty = bundle.uncertainty
        self.conformal_thresholds = self.uncertainty.conformal_thresholds if self.uncertainty else None
        self.model = bundle.model.to(select_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu") -> Classifier:
        """Load a trained model.

        Args:
            source: A run folder, a bundle's folder, or the name of a bundled model.
            device: "cpu", "cuda", "mps" or "auto".

        Raises:
            UsageError: If there is no such model or device.
            ConvlensError: If the model cannot be read.
        """
        return cls(load_bundle(resolve_bundle(source)), device)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return calibrated probabilities, float32 (N, K), of logits (N, K)."""
        return (logits / (self.uncertainty.temperature if self.uncertainty else 1.0)).softmax(dim=1)

    def logits(self, images: Tensor, tta: TTA | None = None) -> Tensor:
        """Compute logits, float32 (N, K).

        Args:
            images: uint8 (N, C, H, W), of the model's input size.
            tta: Test-time augmentation.
        """
        return compute_logits(self.model, images, self.preprocess.normalizer(), tta=tta)

    def test(self, split: Split, tta: TTA | None = None) -> tuple[TestReport, Tensor]:
        """Evaluate the model on a split.

        Args:
            split: Images and labels.
            tta: Test-time augmentation; its metrics are added to those of the plain images.

        Returns:
            All metrics, and the logits of the plain images, float32 (N, K).
        """
        logits, features = (x.cpu() for x in compute_outputs(self.model, split.images, self.preprocess.normalizer()))
        report = classification_report(logits, split.labels, self.classes)
        if self.uncertainty is not None:
            report = self.uncertainty.evaluate(report, logits, features, split.labels)
        if tta is not None:
            with_tta = classification_report(self.logits(split.images, tta), split.labels, self.classes)
            metrics = TTAMetrics(with_tta.accuracy, with_tta.accuracy_ci95, with_tta.loss)
            report = replace(report, test_time_augmentation=metrics)
        return report, logits

    def run(self, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Return probabilities (N, K) and whether images are in-distribution (N,); see :meth:`Predictor.run`."""
        outputs = compute_outputs(self.model, torch.from_numpy(pixels), self.preprocess.normalizer())
        logits, features = (x.cpu() for x in outputs)
        known = self.uncertainty.is_in_distribution(logits, features).numpy() if self.uncertainty else None
        return self.probabilities(logits).numpy(), known
