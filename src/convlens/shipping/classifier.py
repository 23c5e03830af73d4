"""Classifier: any picture in, label and probability out, with the preprocessing that the net was trained with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from convlens.data.dataset import Split
from convlens.data.preprocess import BadImage, array_to_image, open_image
from convlens.evaluation.metrics import Views, compute_logits, judge
from convlens.runtime import choose_device
from convlens.shipping.bundle import Bundle, find_bundle, load_bundle

Picture = str | Path | bytes | Image.Image | NDArray[Any]


@dataclass(frozen=True)
class Prediction:
    """What a net says of one picture."""

    label: str
    probability: float  # 0..1
    top: tuple[tuple[str, float], ...]  # the most probable classes, best first

    def __str__(self) -> str:
        return f"{self.label} ({self.probability:.1%})"


class Classifier:
    """A trained net, ready to use.

    >>> Classifier.load("mnist").classes[:3]
    ('0', '1', '2')
    """

    def __init__(self, bundle: Bundle, device: str = "cpu"):
        self.bundle = bundle
        self.classes = bundle.classes
        self.preprocess = bundle.preprocess
        self.net = bundle.net.to(choose_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu") -> Classifier:
        """Load a run folder, a bundle's folder, or a model that comes with convlens, by name.

        Raises UsageError if there is no such thing and ConvlensError if it cannot be read.
        """
        return cls(load_bundle(find_bundle(source)), device)

    @overload
    def predict(self, pictures: Picture, *, top: int = ..., raw: bool = ...) -> Prediction: ...
    @overload
    def predict(self, pictures: list[Picture], *, top: int = ..., raw: bool = ...) -> list[Prediction]: ...

    def predict(
        self, pictures: Picture | list[Picture], *, top: int = 1, raw: bool = False
    ) -> Prediction | list[Prediction]:
        """Classify one picture (a Prediction) or a list of them (a list of Predictions).

        A picture is a path, a file's content, a PIL image, or an array: (H, W), (H, W, C) or (C, H, W), uint8 or
        float 0..1. It is adapted to what the net was trained on; ``raw`` only resizes. ``top`` is the number of
        classes in ``Prediction.top``. Raises BadImage for what cannot be read.
        """
        if isinstance(pictures, list):
            return self.describe(self.probabilities([self.adapt(p, raw=raw) for p in pictures]), top)
        return self.describe(self.probabilities([self.adapt(pictures, raw=raw)]), top)[0]

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

    def probabilities(self, pixels: Iterable[Tensor]) -> Tensor:
        """Return the probabilities, float32 (N, K), of uint8 images (C, H, W) as :meth:`adapt` gives them."""
        images = list(pixels)
        if not images:
            return torch.empty(0, len(self.classes))
        return self.logits(torch.stack(images)).softmax(dim=1).cpu()

    def logits(self, images: Tensor, views: Views | None = None) -> Tensor:
        """Return the logits, float32 (N, K), of uint8 images (N, C, H, W); with ``views``, the mean over them."""
        return compute_logits(self.net, images, self.preprocess.normaliser(), views=views)

    def test(self, split: Split, views: Views | None = None) -> tuple[dict[str, Any], Tensor]:
        """Return every figure on ``split``, as ``test.json`` has them, and the logits, float32 (N, K).

        With ``views`` the accuracy of test-time augmentation stands beside that of the plain images, by its name.
        """
        logits = self.logits(split.images)
        test = judge(logits, split.labels, self.classes)
        if views is not None:
            averaged = judge(self.logits(split.images, views), split.labels, self.classes)
            kept = ("accuracy", "accuracy_interval", "interval_method", "loss")
            test["test_time_augmentation"] = {key: averaged[key] for key in kept}
        return test, logits

    def describe(self, probabilities: Tensor, top: int = 1) -> list[Prediction]:
        """Return probabilities (N, K) as Predictions with the ``top`` best classes each."""
        values, numbers = probabilities.topk(min(max(top, 1), len(self.classes)), dim=1)
        predictions = []
        for row, indices in zip(values.tolist(), numbers.tolist(), strict=True):
            best = tuple((self.classes[i], value) for i, value in zip(indices, row, strict=True))
            predictions.append(Prediction(best[0][0], best[0][1], best))
        return predictions
