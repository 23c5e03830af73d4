"""Files of a run: provenance, ``metrics.csv``, ``predictions.csv``, ``split.csv``."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from convlens.data.builtin import DATASETS
from convlens.data.dataset import Dataset
from convlens.inference.table import num_probabilities, probability_cells, probability_columns
from convlens.run_dir import RunDir
from convlens.system.files import write_csv
from convlens.training.state import METRIC_COLUMNS, TEST_COLUMNS, EpochRecord


def current_version() -> str:
    """Return the version of convlens."""
    return version("convlens")


def current_command() -> str:
    """Return the running command as typed into a shell, or a placeholder for calls from Python."""
    program = Path(sys.argv[0])
    if program.stem != "convlens" and program.parts[-2:] != ("convlens", "__main__.py"):
        return "convlens.train(...) in Python"
    return shlex.join(["convlens", *sys.argv[1:]])


def describe_data(dataset: Dataset, fingerprint: str) -> dict[str, Any]:
    """Return the record of a data set in ``config.json``."""
    return {
        "name": dataset.name,
        "source": dataset.source,
        "classes": list(dataset.classes),
        "shape": list(dataset.shape),
        "counts": {name: len(split) for name, split in dataset.splits.items()},
        "split_description": dataset.split_description,
        "unreadable": list(dataset.unreadable),
        "fold": list(dataset.fold) if dataset.fold else None,
        "num_excluded": len(dataset.excluded),
        "fingerprint": fingerprint,
        "test_fingerprint": dataset.test.fingerprint(),
    }


def redact_source(data: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a data set without paths of this machine, for a bundle, which is shared."""
    return {**data, "source": data["source"] if data["source"] in DATASETS else None, "unreadable": []}


def redact_paths(command: str, data: dict[str, Any]) -> str:
    """Return the command without paths of this machine: the data by name, absolute paths by their last part."""
    words = []
    for word in shlex.split(command):
        path = Path(word)
        if data["source"] not in (None, data["name"]) and not word.startswith("-") and path.exists():
            word = data["name"] if path.resolve() == Path(data["source"]) else word
        words.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(words)


def model_card_metrics(test: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of ``test.json`` that a bundle and its model card contain."""
    carried: dict[str, Any] = {
        key: test[key]
        for key in ("num_images", "accuracy", "accuracy_ci95", "loss", "in_distribution_rate")
        if key in test
    }
    if calibration := test.get("calibration"):
        carried["ece"] = [calibration[when]["ece"] for when in ("before", "after")]
    return carried


def write_metrics(run_dir: RunDir, records: list[EpochRecord], *, log_test: bool) -> None:
    """Write ``metrics.csv``; with the columns of the test split only if ``log_test``."""
    columns = [name for name in METRIC_COLUMNS if log_test or name not in TEST_COLUMNS]
    rows = [[getattr(record, name) for name in columns] for record in records]
    write_csv(run_dir.metrics, columns, rows)


def write_predictions(run_dir: RunDir, dataset: Dataset, probabilities: Tensor) -> None:
    """Write ``predictions.csv``, one row per test image, from probabilities (N, K)."""
    classes, test = dataset.classes, dataset.test
    confidences, predicted = probabilities.max(dim=1)
    values, indices = probabilities.topk(num_probabilities(classes), dim=1)
    rows = []
    for row, image in enumerate(test.ids):
        top = [(classes[i], value) for i, value in zip(indices[row].tolist(), values[row].tolist(), strict=True)]
        labels = classes[int(test.labels[row])], classes[int(predicted[row])]
        rows.append([image, *labels, f"{float(confidences[row]):.6f}", *probability_cells(classes, top)])
    columns = ["image_id", "true_label", "predicted_label", "confidence", *probability_columns(classes)]
    write_csv(run_dir.predictions, columns, rows)


def write_split(run_dir: RunDir, dataset: Dataset) -> None:
    """Write ``split.csv``: the split of every image."""
    rows = ((name, image) for name, split in dataset.splits.items() for image in split.ids)
    write_csv(run_dir.split, ["split", "image_id"], rows)
