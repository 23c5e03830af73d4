"""Finalize a training: evaluate once, save the bundle, draw the plots, write the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from convlens.data.augment import BatchRandom, hflip
from convlens.data.dataset import Dataset
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
from convlens.runs.artifacts import (
    current_version,
    model_card_metrics,
    redact_paths,
    redact_source,
    write_predictions,
)
from convlens.runs.config import RunConfig
from convlens.system.files import write_csv, write_json
from convlens.training.build import make_augment


def finalize(run_dir: RunDir, config: RunConfig, dataset: Dataset, model: nn.Module) -> None:
    """Evaluate the trained model once on the test split; write bundle, metrics, predictions, plots and report."""
    recipe, preprocess = config.recipe, config.preprocess
    records = run_dir.read_metrics()
    trust = None
    if dataset.validation is not None:
        trust = UncertaintyModel.fit(
            model, dataset.train, dataset.validation, len(dataset.classes), preprocess.normalizer()
        )
    architecture = Architecture(config.model["name"], config.model["arguments"])
    bundle = Bundle(model, architecture, dataset.classes, preprocess, {}, trust)
    classifier = Classifier(bundle, recipe.device)
    report, logits = classifier.test(dataset.test, make_tta(recipe.hflip) if recipe.tta else None)
    test = report.to_json()
    training = {
        "version": current_version(),
        "command": redact_paths(config.command, config.data),
        "recipe": {**dataclasses.asdict(recipe), "pretrained": Path(recipe.pretrained).name},
        "data": redact_source(config.data),
        "machine": config.machine,
        "parameters": config.model["parameters"],
        "seconds": records[-1]["seconds"] if records else 0.0,
        "test": model_card_metrics(test),
    }
    dataclasses.replace(bundle, training=training).save(run_dir.model)
    probabilities = classifier.probabilities(logits)
    write_predictions(run_dir, dataset, probabilities)
    # in a file of its own, because test.json is read as a whole and should not grow with the square of the classes
    cells = test.pop("confusion_matrix")
    write_csv(run_dir.confusion, ["true_label", "predicted_label", "count"], cells)
    write_json(run_dir.test, test)
    drawn = draw_plots(run_dir, config, dataset, model)
    drawn |= draw_test_plots(run_dir, dataset, report, cells, probabilities)
    write_report(run_dir, drawn)  # last: its presence marks the training as finished


def draw_plots(run_dir: RunDir, config: RunConfig, dataset: Dataset, model: nn.Module) -> dict[str, str]:
    """Draw training images, augmented images, learning curves and filters; return HTML by file name."""
    recipe, train, classes = config.recipe, dataset.train, dataset.classes
    rows = image_grid.pick_samples(train.labels, len(classes))
    images, labels = train.images[rows], train.labels[rows]
    names = [classes[label] for label in labels.tolist()]
    augment, normalise = make_augment(recipe, len(classes)), config.preprocess.normalizer()
    with torch.no_grad():
        flipped = torch.arange(len(rows)) % 2 == 1  # every second image, as in each epoch
        seen = hflip(normalise(images), flipped) if recipe.hflip else normalise(images)
        augmented, _ = augment(seen, labels, BatchRandom.seeded(recipe.seed, len(rows)))
    grids = {
        "samples.png": image_grid.image_grid(images, names, "Training images"),
        "augmented.png": image_grid.image_grid(normalise.invert(augmented), names, "The same images, augmented"),
    }
    if conv := first_convolution(model):
        grids["filters.png"] = image_grid.kernel_grid(conv.weight.detach().cpu().numpy())
    drawn = save_grids(run_dir, grids)
    drawn["curves.png"] = plots.draw_curves(run_dir.plots / "curves.png", run_dir.read_metrics())
    return drawn


def draw_test_plots(
    run_dir: RunDir, dataset: Dataset, report: TestReport, cells: Sequence[Cell], probabilities: Tensor
) -> dict[str, str]:
    """Draw misclassified images, confusion matrix and calibration; return HTML by file name.

    Args:
        run_dir: The run.
        dataset: Its data.
        report: Evaluation on its test split.
        cells: Cells of the confusion matrix that are not 0.
        probabilities: Of the test images, (N, K).
    """
    classes, place = dataset.classes, run_dir.plots
    wrong = image_grid.misclassified_grid(dataset.test.images, dataset.test.labels, probabilities, classes)
    drawn = save_grids(run_dir, {"mistakes.png": wrong})
    drawn["confusion.png"] = plots.draw_confusion(place / "confusion.png", cells, classes)
    if report.calibration:
        drawn["calibration.png"] = plots.draw_reliability(place / "calibration.png", report.calibration)
    return drawn


def save_grids(run_dir: RunDir, grids: dict[str, image_grid.ImageGrid]) -> dict[str, str]:
    """Save image grids by file name; return each as HTML."""
    for file, grid in grids.items():
        grid.save(run_dir.plots / file)
    return {file: grid.to_html() for file, grid in grids.items()}
