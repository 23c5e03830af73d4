"""convlens: train, see through and ship small convolutional image classifiers.

Everything below is imported when it is first used, so that ``import convlens`` costs nothing.
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
    from convlens.runs.group import train_series
    from convlens.runs.run import Run
    from convlens.training.loop import fit
    from convlens.training.recipe import Recipe
    from convlens.training.recipes import get_recipe

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for each other. Long spinning makes a training ten times slower beside another
# program, none at all a third slower on an idle machine; this is about 0.3 ms. Read when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# These libraries report to their makers unless told not to, and children inherit what is said here. ONNX Runtime reads
# its variable when it is imported; no call can take back the device ID and the event that it writes then.
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
    "fit": "convlens.training.loop",
    "from_arrays": "convlens.data.arrays",
    "get_recipe": "convlens.training.recipes",
    "load_dataset": "convlens.data.loading",
    "train": "convlens.runs.experiment",
    "train_series": "convlens.runs.group",
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
    "fit",
    "from_arrays",
    "get_recipe",
    "load_dataset",
    "train",
    "train_series",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convlens' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
