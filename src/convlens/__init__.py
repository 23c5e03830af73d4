"""convlens: train, see through and ship small convolutional image classifiers.

Public names are imported on first use, so that ``import convlens`` is fast.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convlens.data.arrays import from_arrays
    from convlens.data.dataset import Dataset, Split
    from convlens.data.loading import load_dataset
    from convlens.errors import ConvlensError
    from convlens.estimator import ConvClassifier
    from convlens.inference.classifier import Classifier
    from convlens.inference.predictor import Prediction
    from convlens.models import create_model
    from convlens.runs.experiment import train
    from convlens.runs.group import cross_validate, train_seeds
    from convlens.runs.run import Run
    from convlens.training.loop import fit
    from convlens.training.recipe import Recipe
    from convlens.training.recipes import get_recipe

__version__ = "0.1.0"

# OpenMP threads spin while they wait for each other. Long spinning makes training ten times slower next to another busy
# program; no spinning makes it a third slower on an idle machine. This is about 0.3 ms. Read when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# Disable the telemetry of these libraries, also in child processes. ONNX Runtime reads its variable on import; no later
# call can undo the device ID and the event that it writes then.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Classifier": "convlens.inference.classifier",
    "ConvClassifier": "convlens.estimator",
    "ConvlensError": "convlens.errors",
    "Dataset": "convlens.data.dataset",
    "Prediction": "convlens.inference.predictor",
    "Recipe": "convlens.training.recipe",
    "Run": "convlens.runs.run",
    "Split": "convlens.data.dataset",
    "create_model": "convlens.models",
    "cross_validate": "convlens.runs.group",
    "fit": "convlens.training.loop",
    "from_arrays": "convlens.data.arrays",
    "get_recipe": "convlens.training.recipes",
    "load_dataset": "convlens.data.loading",
    "train": "convlens.runs.experiment",
    "train_seeds": "convlens.runs.group",
}

__all__ = [
    "Classifier",
    "ConvClassifier",
    "ConvlensError",
    "Dataset",
    "Prediction",
    "Recipe",
    "Run",
    "Split",
    "__version__",
    "create_model",
    "cross_validate",
    "fit",
    "from_arrays",
    "get_recipe",
    "load_dataset",
    "train",
    "train_seeds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convlens' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
