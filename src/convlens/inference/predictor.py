"""What a trained net says of any picture, whatever computes it. Without PyTorch."""

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
    """What a net says of one picture.

    >>> print(Prediction("7", 0.98, (("7", 0.98),), known=True))
    7 (98.0%)
    >>> print(Prediction("7", 0.5, (("7", 0.5),), known=False))
    unknown; most like 7 (50.0%)
    """

    label: str  # the most probable class
    probability: float  # of that class, 0..1; calibrated, if the bundle can
    top: tuple[tuple[str, float], ...]  # the most probable classes and their probabilities, best first
    known: bool | None = None  # does it look like what the net was trained on? None: the bundle cannot say
    labels: tuple[str, ...] | None = None  # the prediction set, where a coverage was asked for; it may be empty

    def __str__(self) -> str:
        told = f"{self.label} ({self.probability:.1%})"
        return f"unknown; most like {told}" if self.known is False else told


class Predictor(ABC):
    """Any picture in, label and probability out, with the preprocessing that the net was trained with."""

    classes: tuple[str, ...]
    preprocess: Preprocess
    bounds: tuple[float, ...] | None  # of prediction sets, one for each of coverage.LEVELS

    @abstractmethod
    def run(self, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Return probabilities (N, K), calibrated if the model can, and which images are known (N,), of (N, C, H, W).

        The pixels are uint8 as :meth:`adapt` gives them.
        """

    @overload
    def predict(
        self, pictures: ImageLike, *, top: int = ..., adapt: bool = ..., coverage: float | None = ...
    ) -> Prediction: ...
    @overload
    def predict(
        self, pictures: list[ImageLike], *, top: int = ..., adapt: bool = ..., coverage: float | None = ...
    ) -> list[Prediction]: ...

    def predict(
        self, pictures: ImageLike | list[ImageLike], *, top: int = 1, adapt: bool = True, coverage: float | None = None
    ) -> Prediction | list[Prediction]:
        """Classify one picture (a Prediction) or a list of them (a list of Predictions).

        A picture is a path, a file's content, a PIL image, or an array: (H, W), (H, W, C) or (C, H, W), uint8 (or whole
        numbers 0 to 255) or float 0..1, of any size. It is adapted to what the net was trained on; ``adapt=False`` only
        resizes. ``top`` is the number of classes in ``Prediction.top``. With ``coverage`` (0.5 to 0.995)
        ``Prediction.labels`` is a set of classes that holds the right one for that share of pictures like the training
        images (split conformal prediction; Vovk, Gammerman, Shafer 2005). Raises InvalidImageError for what cannot
        be read, UsageError for a coverage that the bundle cannot give.
        """
        several = pictures if isinstance(pictures, list) else [pictures]
        predictions = self.describe([self.adapt(p, adapt=adapt) for p in several], top, coverage)
        return predictions if isinstance(pictures, list) else predictions[0]

    def adapt(self, picture: ImageLike, *, adapt: bool = True) -> Pixels:
        """Return an image as the pixels that the model sees, uint8 (C, H, W); InvalidImageError if unreadable."""
        if isinstance(picture, (str, Path, bytes)):
            image = open_image(picture)
        elif isinstance(picture, Image.Image):
            image = picture
        elif isinstance(picture, np.ndarray):
            image = array_to_image(picture)
        else:
            raise InvalidImageError(
                f"a {type(picture).__name__} is not a picture: give a path, a PIL image or an array"
            )
        return self.preprocess.adapt(image, adapt=adapt)

    def describe(self, pixels: Sequence[Pixels], top: int = 1, coverage: float | None = None) -> list[Prediction]:
        """Return a Prediction for each of uint8 images (C, H, W) as :meth:`adapt` gives them; see :meth:`predict`."""
        if coverage is not None:
            require_coverage(coverage, self.bounds)
        return self.interpret(*self.run(np.stack(pixels)), top, coverage) if pixels else []

    def interpret(
        self,
        probabilities: NDArray[np.float32],
        known: NDArray[np.bool_] | None,
        top: int = 1,
        coverage: float | None = None,
    ) -> list[Prediction]:
        """Return a Prediction for each row of what :meth:`run` gave; see :meth:`predict`."""
        sets = None
        if coverage is not None and self.bounds is not None:
            with np.errstate(divide="ignore"):
                sets = prediction_sets(-np.log(probabilities.astype(np.float64)), self.bounds, coverage)
        predictions = []
        for number, row in enumerate(probabilities):
            order = np.argsort(-row, kind="stable")
            chosen = order[: max(top, 1)]
            best = tuple((self.classes[i], p) for i, p in zip(chosen.tolist(), row[chosen].tolist(), strict=True))
            labels = None
            if sets is not None:
                labels = tuple(self.classes[i] for i in order[sets[number, order]].tolist())
            predictions.append(Prediction(*best[0], best, None if known is None else bool(known[number]), labels))
        return predictions
