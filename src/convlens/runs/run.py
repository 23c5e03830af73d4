"""A finished run: its metrics, its model, its explanations."""

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
    """A finished training. Files are read when they are first needed.

    Args:
        path: The run folder, also available as the attribute ``path``.

    Raises:
        UsageError: ``path`` is not a run folder. The attributes of a run that is not finished raise ConvlensError,
            which names the missing file.
    """

    def __init__(self, path: str | Path):
        self.run_dir = RunDir.open(path)
        self.path = self.run_dir.path

    @cached_property
    def config(self) -> dict[str, Any]:
        """What was trained on which data: the content of ``config.json``.

        Keys: ``recipe``, ``model``, ``data``, ``preprocess``, ``machine``, ``command`` and ``version`` (of convlens).
        """
        return self.run_dir.read_config()

    @cached_property
    def test(self) -> dict[str, Any]:
        """Every metric of the final test: the content of ``test.json``.

        Fractions such as ``accuracy`` and ``balanced_accuracy`` are 0..1, ``loss`` is the mean cross-entropy in nats,
        ``classes`` has precision, recall and F1 of each class. Runs with a validation split also have calibration,
        conformal and out-of-distribution metrics.
        """
        return read_json(self.run_dir.test)

    @property
    def confusion_matrix(self) -> NDArray[np.int64]:
        """Counts of test images, int64 (K, K): rows are true classes, columns predicted classes.

        ``confusion_matrix.csv`` has only the cells that are not 0: ``true_label``, ``predicted_label`` and ``count``.
        """
        with open(self.run_dir.confusion, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return dense_confusion(list(csv.reader(file))[1:], self.config["data"]["classes"])

    @cached_property
    def metrics(self) -> list[dict[str, float | None]]:
        """One dict per epoch, with the fields of an :class:`EpochRecord`: ``metrics.csv``."""
        return self.run_dir.read_metrics()

    @cached_property
    def predictions(self) -> list[dict[str, str]]:
        """One dict per test image, all values as text: ``predictions.csv``.

        Keys: ``image_id``, ``true_label``, ``predicted_label``, ``confidence`` and ``p_<class>`` for every class; with
        more than 100 classes ``top1_label``, ``top1_probability``, ... of the five most probable ones instead.
        """
        with open(self.run_dir.predictions, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return list(csv.DictReader(file))

    @cached_property
    def classifier(self) -> Classifier:
        """The trained model, ready to use, on the CPU."""
        return Classifier.load(self.path)

    @property
    def accuracy(self) -> float:
        """Accuracy on the test split, 0..1."""
        return float(self.test["accuracy"])

    @property
    def report(self) -> Path:
        """Path of the HTML report."""
        return self.run_dir.report

    def plot(self, name: str) -> Image.Image:
        """Return one of the run's plots, such as "curves" or "confusion", to show in a notebook.

        Raises:
            UnknownNameError: The run has no such plot.
        """
        plots = {file.stem: file for file in self.run_dir.plots.glob("*.png")}
        if name not in plots:
            raise UnknownNameError("plot", name, plots)
        with Image.open(plots[name]) as image:
            return image.copy()

    def predict(self, image: ImageLike, **options: Any) -> Prediction:
        """Classify one image; arguments and errors are those of :meth:`convlens.Classifier.predict`."""
        return self.classifier.predict(image, **options)

    @cached_property
    def training_images(self) -> TrainingImages | None:
        """The images that the model was trained on; None if they have changed or are not on this machine."""
        with contextlib.suppress(ConvlensError):
            return load_training_images(self.path, self.classifier)
        return None

    def explain(
        self,
        image: ImageLike,
        *,
        adapt: bool = True,
        label: str | None = None,
        unit: tuple[str, int, int, int] | None = None,
    ) -> Explanation:
        """Explain the prediction for one image, with similar training images if they are still available.

        Args:
            image: Whatever :meth:`predict` takes.
            adapt: Bring the image into the form of the training images; False only resizes it.
            label: Class to explain, by default the predicted one.
            unit: Unit (stage, channel, row, column) whose receptive field is shown, by default the most active one of
                each stage.

        Raises:
            InvalidImageError: The image cannot be read.
            UnknownNameError: There is no such class or stage.
            UsageError: The stage has no such unit.
            ConvlensError: The model has no convolution.
        """
        pixels = self.classifier.adapt(image, adapt=adapt)
        return explain(self.classifier, pixels, label=label, unit=unit, training=self.training_images)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def load_training_images(source: str | Path, classifier: Classifier, data: Any = None) -> TrainingImages:
    """Return the training images of a run or model, without the validation split; nothing is downloaded.

    Raises:
        ConvlensError: They are not on this machine.
        UsageError: They have changed.
    """
    with contextlib.nullcontext() if data is not None else offline():
        bundle, dataset = load_evaluation_data(source, data)
    recipe = bundle.training["recipe"]
    return TrainingImages(classifier, dataset.with_validation(recipe["val_fraction"], recipe["seed"]))
