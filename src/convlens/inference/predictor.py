"""The common interface of classifiers, whatever runs them. Must not import torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convlens.data.images import InvalidImageError, Pixels, array_to_image, open_image
from convlens.data.preprocess import Preprocess
from convlens.evaluation.conformal import prediction_sets, require_coverage

ImageLike = str | Path | bytes | Image.Image | NDArray[Any]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    >>> print(Prediction("7", 0.98, (("7", 0.98),), in_distribution=True))
    7 (98.0%)
    >>> print(Prediction("7", 0.5, (("7", 0.5),), in_distribution=False))
    unknown; most like 7 (50.0%)
    """

    label: str  # the most probable class
    confidence: float  # probability of that class, 0..1; calibrated if the model has a temperature
    top: tuple[tuple[str, float], ...]  # the most probable classes with their probabilities, best first
    in_distribution: bool | None = None  # does the image resemble the training data? None: the model has no detector
    prediction_set: tuple[str, ...] | None = None  # only if a coverage was requested; may be empty

    def __str__(self) -> str:
        text = f"{self.label} ({self.confidence:.1%})"
        return f"unknown; most like {text}" if self.in_distribution is False else text


class Predictor(ABC):
    """Classifies images of any size, with the preprocessing of the training.

    Attributes:
        classes: The K class names.
        preprocess: Turns an image into the model's input pixels.
        conformal_thresholds: One threshold for each of ``COVERAGE_LEVELS``; None if the model has no prediction sets.
    """

    classes: tuple[str, ...]
    preprocess: Preprocess
    conformal_thresholds: tuple[float, ...] | None

    @abstractmethod
    def run(self, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Run the model.

        Args:
            pixels: uint8 (N, C, H, W), as :meth:`adapt` returns them.

        Returns:
            Probabilities, float32 (N, K), and whether each image is in-distribution, bool (N,); None if the model has
            no detector.
        """

    @overload
    def predict(
        self, images: ImageLike, *, top: int = ..., adapt: bool = ..., coverage: float | None = ...
    ) -> Prediction: ...
    @overload
    def predict(
        self, images: list[ImageLike], *, top: int = ..., adapt: bool = ..., coverage: float | None = ...
    ) -> list[Prediction]: ...

    def predict(
        self, images: ImageLike | list[ImageLike], *, top: int = 1, adapt: bool = True, coverage: float | None = None
    ) -> Prediction | list[Prediction]:
        """Classify one image or a list of images.

        Args:
            images: An image or a list of images of any size: a path, the content of a file, a PIL image, or an array
                (H, W), (H, W, C) or (C, H, W), of integers 0..255 or floats 0..1.
            top: Number of classes in ``Prediction.top``.
            adapt: Extract strokes from scans and photos of handwriting, for models of such images; else only resize.
            coverage: Target coverage, 0.5 to 0.995: also return a prediction set that contains the true class with this
                probability, for images like the training images (split conformal prediction; Vovk et al. 2005).

        Returns:
            A prediction, or a list of predictions.

        Raises:
            InvalidImageError: If an image cannot be read.
            UsageError: If ``coverage`` is out of range or the model has no prediction sets.
        """
        several = images if isinstance(images, list) else [images]
        predictions = self.describe([self.adapt(image, adapt=adapt) for image in several], top, coverage)
        return predictions if isinstance(images, list) else predictions[0]

    def adapt(self, image: ImageLike, *, adapt: bool = True) -> Pixels:
        """Return an image as the model's input pixels, uint8 (C, H, W).

        Raises:
            InvalidImageError: If the image cannot be read.
        """
        if isinstance(image, (str, Path, bytes)):
            opened = open_image(image)
        elif isinstance(image, Image.Image):
            opened = image
        elif isinstance(image, np.ndarray):
            opened = array_to_image(image)
        else:
            raise InvalidImageError(f"a {type(image).__name__} is not an image: pass a path, a PIL image or an array")
        return self.preprocess.transform(opened, adapt=adapt)

    def describe(self, pixels: Sequence[Pixels], top: int = 1, coverage: float | None = None) -> list[Prediction]:
        """Return predictions for input pixels, uint8 (C, H, W) each; see :meth:`predict`."""
        if coverage is not None:
            require_coverage(coverage, self.conformal_thresholds)
        return self.interpret(*self.run(np.stack(pixels)), top, coverage) if pixels else []

    def interpret(
        self,
        probabilities: NDArray[np.float32],
        in_distribution: NDArray[np.bool_] | None,
        top: int = 1,
        coverage: float | None = None,
    ) -> list[Prediction]:
        """Turn the outputs of :meth:`run` into predictions; see :meth:`predict`."""
        members = None
        if coverage is not None and self.conformal_thresholds is not None:
            with np.errstate(divide="ignore"):
                nonconformity = -np.log(probabilities.astype(np.float64))
            members = prediction_sets(nonconformity, self.conformal_thresholds, coverage)
        predictions = []
        for number, row in enumerate(probabilities):
            order = np.argsort(-row, kind="stable")
            chosen = order[: max(top, 1)]
            best = tuple((self.classes[i], p) for i, p in zip(chosen.tolist(), row[chosen].tolist(), strict=True))
            known = None if in_distribution is None else bool(in_distribution[number])
            labels = None
            if members is not None:
                labels = tuple(self.classes[i] for i in order[members[number, order]].tolist())
            predictions.append(Prediction(*best[0], best, known, labels))
        return predictions
