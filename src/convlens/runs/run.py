"""A finished run: its figures, its net, its test once more, and two runs beside each other."""

from __future__ import annotations

import contextlib
import csv
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convlens.data.download import offline
from convlens.errors import ConvlensError, UnknownNameError
from convlens.evaluation.metrics import dense_confusion
from convlens.explain.explanation import Explanation, TrainingImages, explain
from convlens.inference.classifier import Classifier
from convlens.inference.predictor import ImageLike, Prediction
from convlens.run_dir import RunDir
from convlens.runs.evaluate import load_evaluation_data
from convlens.system.files import read_json


class Run:
    """A finished training: its folder, its figures and its net. What is read is read when it is first asked for.

    ``path`` is the folder, also as the attribute ``path``. Raises UsageError if it is no run's folder; what a run that
    is not finished has not got yet raises ConvlensError, with the name of the file.
    """

    def __init__(self, path: str | Path):
        self.folder = RunDir.open(path)
        self.path = self.folder.path

    @cached_property
    def config(self) -> dict[str, Any]:
        """What was trained, and on what: ``config.json``.

        ``recipe``, ``model``, ``data``, ``preprocess``, ``machine``, ``command`` and ``convlens`` (its version).
        """
        return self.folder.read_config()

    @cached_property
    def test(self) -> dict[str, Any]:
        """Every figure of the final test: ``test.json``.

        Shares such as ``accuracy`` and ``balanced_accuracy`` are 0..1, ``accuracy_ci95`` is Wilson's, 95%, ``loss``
        the mean cross-entropy in nats; ``classes`` has precision, recall, F1 and count of each. With validation images
        there are ``calibration``, ``coverage`` and ``known`` as well.
        """
        return read_json(self.folder.test)

    @property
    def confusion_matrix(self) -> NDArray[np.int64]:
        """Counts of test images, int64 (K, K): rows are true classes, columns predictions.

        ``confusion_matrix.csv`` has only the cells that are not 0: ``true_label``, ``predicted_label`` and ``count``.
        The whole takes 8 bytes x classes x classes.
        """
        with open(self.folder.confusion, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return dense_confusion(list(csv.reader(file))[1:], self.config["data"]["classes"])

    @cached_property
    def metrics(self) -> list[dict[str, float | None]]:
        """One dict an epoch, with the fields of an :class:`EpochRecord`: ``metrics.csv``."""
        return self.folder.read_metrics()

    @cached_property
    def predictions(self) -> list[dict[str, str]]:
        """One dict a test image: ``predictions.csv``, with id, label, prediction and probability, all as text."""
        with open(self.folder.predictions, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return list(csv.DictReader(file))

    @cached_property
    def classifier(self) -> Classifier:
        """The trained net, ready to use, on the CPU."""
        return Classifier.load(self.path)

    @property
    def accuracy(self) -> float:
        """Accuracy on the test split, 0..1."""
        return float(self.test["accuracy"])

    @property
    def report(self) -> Path:
        """Where the HTML report is."""
        return self.folder.report

    def picture(self, name: str) -> Image.Image:
        """Return one of the run's plots by its file's name ("curves", "confusion", ...), for a notebook to show.

        Raises UnknownNameError for one that this run has not.
        """
        plots = {file.stem: file for file in self.folder.plots.glob("*.png")}
        if name not in plots:
            raise UnknownNameError("plot", name, plots)
        with Image.open(plots[name]) as image:
            return image.copy()

    def predict(self, picture: ImageLike, **options: Any) -> Prediction:
        """Classify one picture; takes and raises what :meth:`convlens.Classifier.predict` does."""
        return self.classifier.predict(picture, **options)

    @cached_property
    def training_images(self) -> TrainingImages | None:
        """The images that it was trained on, as the net sees them; None if they have changed or are not there."""
        with contextlib.suppress(ConvlensError):
            return load_training_images(self.path, self.classifier)
        return None

    def explain(
        self,
        picture: ImageLike,
        *,
        raw: bool = False,
        label: str | None = None,
        unit: tuple[str, int, int, int] | None = None,
    ) -> Explanation:
        """Return all that can be seen of what the net says of a picture, as arrays.

        ``label`` is the class (its name) that the heat maps are about, by default the predicted one; ``unit`` (stage,
        channel, row, column) a unit whose receptive field is shown, instead of the stage's loudest. Training images
        that look like the picture are among it if they are still there. ``raw`` only resizes the picture. Raises
        InvalidImageError for unreadable images, UnknownNameError for an unknown class or stage, UsageError for a unit
        the stage has not, and ConvlensError for a net without a convolution.
        """
        pixels = self.classifier.adapt(picture, raw=raw)
        return explain(self.classifier, pixels, label=label, unit=unit, training=self.training_images)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def load_training_images(source: str | Path, classifier: Classifier, data: Any = None) -> TrainingImages:
    """Return the images that a run's or model's net was trained on, without those held out; nothing is downloaded.

    Raises ConvlensError if they are not on this machine, UsageError if they have changed.
    """
    with contextlib.nullcontext() if data is not None else offline():
        bundle, dataset = load_evaluation_data(source, data)
    recipe = bundle.training["recipe"]
    return TrainingImages(classifier, dataset.with_validation(recipe["val_fraction"], recipe["seed"]))
