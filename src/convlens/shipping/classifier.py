"""Classifier: any picture in, label and probability out, with the preprocessing that the net was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from convlens.data.dataset import Split
from convlens.data.pictures import BadImage, array_to_image, open_image
from convlens.errors import UsageError
from convlens.evaluation.calibration import LEVELS
from convlens.evaluation.metrics import Views, compute_logits, compute_outputs, judge
from convlens.runtime import choose_device
from convlens.shipping.bundle import Bundle, find_bundle, load_bundle

Picture = str | Path | bytes | Image.Image | NDArray[Any]


@dataclass(frozen=True)
class Prediction:
    """What a net says of one picture."""

    label: str
    probability: float  # 0..1
    top: tuple[tuple[str, float], ...]  # the most probable classes, best first
    known: bool | None = None  # does it look like what the net was trained on? None: the bundle cannot say
    labels: tuple[str, ...] | None = None  # the prediction set, where a coverage was asked for

    def __str__(self) -> str:
        told = f"{self.label} ({self.probability:.1%})"
        return f"unknown; most like {told}" if self.known is False else told


class Classifier:
    """A trained net, ready to use.

    >>> Classifier.load("mnist").classes[:3]
    ('0', '1', '2')
    """

    def __init__(self, bundle: Bundle, device: str = "cpu"):
        self.bundle = bundle
        self.classes = bundle.classes
        self.preprocess = bundle.preprocess
        self.trust = bundle.trust
        self.net = bundle.net.to(choose_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu") -> Classifier:
        """Load a run folder, a bundle's folder, or a model that comes with convlens, by name.

        Raises UsageError if there is no such thing and ConvlensError if it cannot be read.
        """
        return cls(load_bundle(find_bundle(source)), device)

    @overload
    def predict(
        self, pictures: Picture, *, top: int = ..., raw: bool = ..., coverage: float | None = ...
    ) -> Prediction: ...
    @overload
    def predict(
        self, pictures: list[Picture], *, top: int = ..., raw: bool = ..., coverage: float | None = ...
    ) -> list[Prediction]: ...

    def predict(
        self, pictures: Picture | list[Picture], *, top: int = 1, raw: bool = False, coverage: float | None = None
    ) -> Prediction | list[Prediction]:
        """Classify one picture (a Prediction) or a list of them (a list of Predictions).

        A picture is a path, a file's content, a PIL image, or an array: (H, W), (H, W, C) or (C, H, W), uint8 or
        float 0..1. It is adapted to what the net was trained on; ``raw`` only resizes. ``top`` is the number of
        classes in ``Prediction.top``. With ``coverage`` (0.5 to 0.995) ``Prediction.labels`` is a set of classes that
        holds the right one for that share of pictures like the training images. Raises BadImage for what cannot be
        read, UsageError for a coverage that the bundle cannot give.
        """
        several = pictures if isinstance(pictures, list) else [pictures]
        predictions = self.describe([self.adapt(p, raw=raw) for p in several], top, coverage)
        return predictions if isinstance(pictures, list) else predictions[0]

    def adapt(self, picture: Picture, *, raw: bool = False) -> Tensor:
        """Return a picture as the pixels that the net sees, uint8 (C, H, W)."""
        if isinstance(picture, (str, Path, bytes)):
            image = open_image(picture)
        elif isinstance(picture, Image.Image):
            image = picture
        elif isinstance(picture, np.ndarray):
            image = array_to_image(picture)
        else:
            raise BadImage(f"a {type(picture).__name__} is not a picture: give a path, a PIL image or an array")
        return self.preprocess.adapt(image, raw=raw)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities, float32 (N, K), of logits (N, K): calibrated, if the bundle can."""
        return (logits / (self.trust.temperature if self.trust else 1.0)).softmax(dim=1)

    def logits(self, images: Tensor, views: Views | None = None) -> Tensor:
        """Return the logits, float32 (N, K), of uint8 images (N, C, H, W); with ``views``, the mean over them."""
        return compute_logits(self.net, images, self.preprocess.normaliser(), views=views)

    def test(self, split: Split, views: Views | None = None) -> tuple[dict[str, Any], Tensor]:
        """Return every figure on ``split``, as ``test.json`` has them, and the logits, float32 (N, K).

        With ``views`` the accuracy of test-time augmentation stands beside that of the plain images, by its name.
        """
        logits, features = (x.cpu() for x in compute_outputs(self.net, split.images, self.preprocess.normaliser()))
        test = judge(logits, split.labels, self.classes)
        if self.trust is not None:
            test |= self.trust.judge(logits, features, split.labels)
        if views is not None:
            averaged = judge(self.logits(split.images, views), split.labels, self.classes)
            kept = ("accuracy", "accuracy_interval", "interval_method", "loss")
            test["test_time_augmentation"] = {key: averaged[key] for key in kept}
        return test, logits

    def describe(self, pixels: Sequence[Tensor], top: int = 1, coverage: float | None = None) -> list[Prediction]:
        """Return a Prediction for each of uint8 images (C, H, W) as :meth:`adapt` gives them; see :meth:`predict`."""
        if coverage is not None:
            self.require_coverage(coverage)
        if not pixels:
            return []
        outputs = compute_outputs(self.net, torch.stack(list(pixels)), self.preprocess.normaliser())
        logits, features = (x.cpu() for x in outputs)
        values, numbers = self.probabilities(logits).topk(min(max(top, 1), len(self.classes)), dim=1)
        known = self.trust.knows(logits, features).tolist() if self.trust else [None] * len(logits)
        sets = self.trust.sets(logits, coverage) if self.trust and coverage is not None else None
        predictions = []
        for number, (row, indices) in enumerate(zip(values.tolist(), numbers.tolist(), strict=True)):
            best = tuple((self.classes[i], value) for i, value in zip(indices, row, strict=True))
            labels = None
            if sets is not None:
                order = logits[number].argsort(descending=True).tolist()
                labels = tuple(self.classes[i] for i in order if sets[number, i])
            predictions.append(Prediction(*best[0], best, known[number], labels))
        return predictions

    def require_coverage(self, coverage: float) -> None:
        """Raise UsageError unless the bundle can give prediction sets of this coverage."""
        if self.trust is None:
            raise UsageError("this model has no prediction sets: it was trained without validation images")
        if not LEVELS[0] <= coverage <= LEVELS[-1]:
            raise UsageError(f"--coverage is {coverage:g}; it must be from {LEVELS[0]:g} to {LEVELS[-1]:g}")
