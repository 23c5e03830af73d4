"""Data sets from any source, as uint8 images (N, C, H, W) and int64 labels.

Names are imported on first use, because ``convlens.data.images`` and prediction with ONNX Runtime must not import
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convlens.data.arrays import from_arrays as from_arrays
    from convlens.data.builtin import DATASETS as DATASETS
    from convlens.data.dataset import Dataset as Dataset
    from convlens.data.dataset import Split as Split
    from convlens.data.images import InputStyle as InputStyle
    from convlens.data.images import InvalidImageError as InvalidImageError
    from convlens.data.images import open_image as open_image
    from convlens.data.loader import BatchLoader as BatchLoader
    from convlens.data.loading import load_dataset as load_dataset
    from convlens.data.preprocess import Preprocess as Preprocess
    from convlens.data.shards import load_shards as load_shards
    from convlens.data.shards import write_shards as write_shards

_MODULES = {
    "DATASETS": "builtin",
    "BatchLoader": "loader",
    "Dataset": "dataset",
    "InputStyle": "images",
    "InvalidImageError": "images",
    "Preprocess": "preprocess",
    "Split": "dataset",
    "from_arrays": "arrays",
    "load_dataset": "loading",
    "load_shards": "shards",
    "open_image": "images",
    "write_shards": "shards",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"convlens.data.{_MODULES[name]}"), name)
