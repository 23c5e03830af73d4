"""Classifier: a trained net in PyTorch, ready to use and to be tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlens.data.dataset import Split
from convlens.data.images import Pixels
from convlens.evaluation.inference import TTA, compute_logits, compute_outputs
from convlens.evaluation.metrics import classification_report
from convlens.inference.bundle import Bundle, load_bundle
from convlens.inference.predictor import Predictor
from convlens.inference.store import resolve_bundle
from convlens.system.device import select_device


class Classifier(Predictor):
    """A trained net in PyTorch, ready to use; :meth:`load` makes one.

    ``classes`` are the names, ``net`` is the module, ``preprocess`` what adapts pictures to it, ``trust`` what its
    answers are worth (None: it was trained without validation images).

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
        self.trust = bundle.trust
        self.bounds = self.trust.bounds if self.trust else None
        self.net = bundle.net.to(select_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu") -> Classifier:
        """Load a run folder, a bundle's folder, or a model that comes with convlens, by name.

        ``device`` is "cpu", "cuda", "mps", or "auto". Raises UsageError if there is no such thing or device, and
        ConvlensError if it cannot be read.
        """
        return cls(load_bundle(resolve_bundle(source)), device)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities, float32 (N, K), of logits (N, K): calibrated, if the bundle can."""
        return (logits / (self.trust.temperature if self.trust else 1.0)).softmax(dim=1)

    def logits(self, images: Tensor, views: TTA | None = None) -> Tensor:
        """Return the logits, float32 (N, K), of uint8 images (N, C, H, W); with ``views``, the mean over them.

        The images are of the size that the net takes, and are normalised here.
        """
        return compute_logits(self.net, images, self.preprocess.normalizer(), views=views)

    def test(self, split: Split, views: TTA | None = None) -> tuple[dict[str, Any], Tensor]:
        """Return every figure on ``split``, as ``test.json`` has them, and the logits, float32 (N, K).

        With ``views`` the accuracy of test-time augmentation stands beside that of the plain images, by its name.
        """
        logits, features = (x.cpu() for x in compute_outputs(self.net, split.images, self.preprocess.normalizer()))
        test = classification_report(logits, split.labels, self.classes)
        if self.trust is not None:
            test |= self.trust.judge(logits, features, split.labels)
        if views is not None:
            averaged = classification_report(self.logits(split.images, views), split.labels, self.classes)
            kept = ("accuracy", "accuracy_interval", "interval_method", "loss")
            test["test_time_augmentation"] = {key: averaged[key] for key in kept}
        return test, logits

    def run(self, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Return probabilities (N, K) and which images are known (N,); see :meth:`Predictor.run`."""
        outputs = compute_outputs(self.net, torch.from_numpy(pixels), self.preprocess.normalizer())
        logits, features = (x.cpu() for x in outputs)
        known = self.trust.knows(logits, features).numpy() if self.trust else None
        return self.probabilities(logits).numpy(), known
