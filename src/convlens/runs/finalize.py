"""What stands at the end of a training: one test, the bundle, the figures, the pictures, the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlens.data.augment import BatchRandom, hflip
from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.evaluation.inference import make_tta
from convlens.evaluation.metrics import Cell
from convlens.evaluation.report import TestReport
from convlens.evaluation.uncertainty import UncertaintyModel
from convlens.explain.activations import first_convolution
from convlens.inference.bundle import Bundle
from convlens.inference.classifier import Classifier
from convlens.inference.metadata import Architecture
from convlens.reports import image_grid, plots
from convlens.reports.run import write_report
from convlens.run_dir import RunDir
from convlens.runs.artifacts import model_card_metrics, redact_paths, redact_source, write_predictions
from convlens.system.files import write_csv, write_json
from convlens.training.build import make_augment
from convlens.training.recipe import Recipe


def finalize(
    folder: RunDir, config: dict[str, Any], recipe: Recipe, dataset: Dataset, preprocess: Preprocess, net: nn.Module
) -> None:
    """Test the trained ``net``, once; write bundle, metrics, predictions, plots and report."""
    records = folder.read_metrics()
    architecture = Architecture(config["model"]["name"], config["model"]["arguments"])
    trust = None
    if dataset.validation is not None:
        trust = UncertaintyModel.fit(
            net, dataset.train, dataset.validation, len(dataset.classes), preprocess.normalizer()
        )
    bundle = Bundle(net, architecture, dataset.classes, preprocess, {}, trust)
    classifier = Classifier(bundle, recipe.device)
    report, logits = classifier.test(dataset.test, make_tta(recipe.hflip) if recipe.tta else None)
    test = report.to_json()
    trained = {
        "version": version("convlens"),
        "command": redact_paths(config["command"], config["data"]),
        "recipe": {**config["recipe"], "pretrained": Path(recipe.pretrained).name},
        "data": redact_source(config["data"]),
        "machine": config["machine"],
        "parameters": config["model"]["parameters"],
        "seconds": records[-1]["seconds"] if records else 0.0,
        "test": model_card_metrics(test),
    }
    dataclasses.replace(bundle, training=trained).save(folder.model)
    probabilities = classifier.probabilities(logits)
    write_predictions(folder, dataset, probabilities)
    # a file of its own: test.json, which is read as a whole, grows with the classes only
    cells = test.pop("confusion_matrix")
    write_csv(folder.confusion, ["true_label", "predicted_label", "count"], cells)
    write_json(folder.test, test)
    drawn = draw_plots(folder, recipe, dataset, preprocess, net, report, cells, probabilities)
    write_report(folder, drawn)  # last: its presence says that the training is finished


def draw_plots(
    folder: RunDir,
    recipe: Recipe,
    dataset: Dataset,
    preprocess: Preprocess,
    net: nn.Module,
    report: TestReport,
    cells: Sequence[Cell],
    probabilities: Tensor,
) -> dict[str, str]:
    """Draw every plot of a run, from its test, the confusion matrix and the probabilities (N, K) of the test images.

    Returns each as HTML, by the name of its file.
    """
    train, classes, place = dataset.train, dataset.classes, folder.plots
    rows = image_grid.pick_samples(train.labels, len(classes))
    images, labels = train.images[rows], train.labels[rows]
    names = [classes[label] for label in labels.tolist()]
    augment, normalise = make_augment(recipe, len(classes)), preprocess.normalizer()
    with torch.no_grad():
        turned = torch.arange(len(rows)) % 2 == 1  # every second one, as in each epoch
        seen = hflip(normalise(images), turned) if recipe.hflip else normalise(images)
        changed, _ = augment(seen, labels, BatchRandom.seeded(recipe.seed, len(rows)))
    drawn = {
        "samples.png": image_grid.image_grid(images, names, "What it learns from: training images"),
        "augmented.png": image_grid.image_grid(normalise.invert(changed), names, "The same images as the net saw them"),
        "mistakes.png": image_grid.misclassified_grid(dataset.test.images, dataset.test.labels, probabilities, classes),
    }
    if conv := first_convolution(net):
        drawn["filters.png"] = image_grid.kernel_grid(conv.weight.detach().cpu().numpy())
    for file, sheet in drawn.items():
        sheet.save(place / file)
    shown = {file: sheet.to_html() for file, sheet in drawn.items()}
    shown["curves.png"] = plots.draw_curves(place / "curves.png", folder.read_metrics())
    shown["confusion.png"] = plots.draw_confusion(place / "confusion.png", cells, classes)
    if report.calibration is not None:
        shown["calibration.png"] = plots.draw_reliability(place / "calibration.png", report.calibration)
    return shown
