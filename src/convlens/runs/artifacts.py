"""What a run folder says of its training: the command, the data, a row an epoch, a row an image."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from convlens.data.builtin import DATASETS
from convlens.data.dataset import Dataset
from convlens.run_dir import RunDir
from convlens.system.files import write_csv
from convlens.training.state import METRIC_COLUMNS, TEST_COLUMNS, EpochRecord


def current_command() -> str:
    """Return the command that runs, as a person would type it; ``python`` for calls from Python."""
    program = Path(sys.argv[0])
    if program.stem != "convlens" and program.parts[-2:] != ("convlens", "__main__.py"):
        return "convlens.train(...) in Python"
    return shlex.join(["convlens", *sys.argv[1:]])


def describe_data(dataset: Dataset, fingerprint: str) -> dict[str, Any]:
    """Return what a run records of its data."""
    return {
        "name": dataset.name,
        "source": dataset.source,
        "classes": list(dataset.classes),
        "shape": list(dataset.shape),
        "counts": {name: len(split) for name, split in dataset.splits.items()},
        "note": dataset.split_description,
        "unreadable": list(dataset.unreadable),
        "fold": list(dataset.fold) if dataset.fold else None,
        "left_out": len(dataset.excluded),
        "fingerprint": fingerprint,
        "test_fingerprint": dataset.test.fingerprint(),
    }


def redact_source(data: dict[str, Any]) -> dict[str, Any]:
    """Return what a bundle, which travels, says of its data: not where they lie on this machine."""
    return {**data, "source": data["source"] if data["source"] in DATASETS else None, "unreadable": []}


def redact_paths(command: str, data: dict[str, Any]) -> str:
    """Return the command for a bundle, which travels: the data by name, absolute paths by their last part."""
    words = []
    for word in shlex.split(command):
        path = Path(word)
        if data["source"] not in (None, data["name"]) and not word.startswith("-") and path.exists():
            word = data["name"] if path.resolve() == Path(data["source"]) else word
        words.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(words)


def model_card_metrics(test: dict[str, Any]) -> dict[str, Any]:
    """Return what a bundle carries of ``test.json``: what its model card tells."""
    carried: dict[str, Any] = {
        key: test[key]
        for key in ("num_images", "accuracy", "accuracy_ci95", "loss", "in_distribution_rate")
        if key in test
    }
    if calibration := test.get("calibration"):
        carried["ece"] = [calibration[when]["ece"] for when in ("before", "after")]
    return carried


def write_metrics(folder: RunDir, records: list[EpochRecord], *, watched: bool) -> None:
    """Write ``metrics.csv``; the test columns only if the recipe watches the test split."""
    columns = [name for name in METRIC_COLUMNS if watched or name not in TEST_COLUMNS]
    rows = [[getattr(record, name) for name in columns] for record in records]
    write_csv(folder.metrics, columns, rows)


def write_predictions(folder: RunDir, dataset: Dataset, probabilities: Tensor) -> None:
    """Write ``predictions.csv``: id, label, prediction and probability of every test image."""
    values, numbers = probabilities.max(dim=1)
    classes, test = dataset.classes, dataset.test
    columns = zip(test.ids, test.labels.tolist(), numbers.tolist(), values.tolist(), strict=True)
    rows = [[name, classes[label], classes[guess], f"{value:.6f}"] for name, label, guess, value in columns]
    write_csv(folder.predictions, ["id", "label", "prediction", "probability"], rows)


def write_split(folder: RunDir, dataset: Dataset) -> None:
    """Record which image is in which split: ``split.csv``."""
    rows = ((name, image) for name, split in dataset.splits.items() for image in split.ids)
    write_csv(folder.split, ["split", "id"], rows)
