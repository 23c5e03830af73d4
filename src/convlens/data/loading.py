"""Load a data set from any source: a name, a path or objects in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convlens.data.arrays import from_arrays, from_map_style, is_map_style, load_npz
from convlens.data.builtin import DATASETS
from convlens.data.cross_validation import take_fold
from convlens.data.dataset import Dataset
from convlens.data.image_folder import load_folder
from convlens.data.shards import is_sharded, load_shards, sharded_from
from convlens.errors import UnknownNameError, UsageError


def load_dataset(source: Any, *, image_size: int = 0, channels: int = 0, allow_unreadable: bool = False) -> Dataset:
    """Return ``source`` as a Dataset.

    Args:
        source: One of

            - the name of a built-in data set (``convlens data list``),
            - the path of a folder with one subfolder per class, or of an ``.npz`` file,
            - a folder of shards (``convlens data pack``) or its http(s) address,
            - arrays ``(x, y)`` or ``(x_train, y_train, x_test, y_test)``,
            - a sized map-style dataset of (PIL image or array, int) pairs, or a tuple (train, test) of two,
            - a Dataset.
        image_size: The side, in pixels, of the square that the images of a folder are fitted into. 0: the median of
            their shorter sides, at most 64.
        channels: 1 (gray) or 3 (RGB), for a folder. 0: gray if all images are.
        allow_unreadable: Skip unreadable files, however many. Otherwise more than 1% of them are an error. Skipped
            files are listed in ``Dataset.unreadable``.

    Raises:
        UnknownNameError: ``source`` is an unknown name.
        UsageError: ``source`` is none of the above.
        ConvlensError: Files are missing, damaged, or not the published ones.

    >>> digits = load_dataset("digits")
    >>> digits.train.images.shape, digits.train.images.dtype
    (torch.Size([1438, 1, 8, 8]), torch.uint8)
    >>> digits.test.labels.shape, digits.classes[:3]
    (torch.Size([359]), ('0', '1', '2'))
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, (str, Path)):
        return load_path(source, image_size=image_size, channels=channels, allow_unreadable=allow_unreadable)
    if isinstance(source, tuple) and len(source) == 2 and all(map(is_map_style, source)):
        return from_map_style(*source, image_size=image_size, channels=channels)
    if isinstance(source, tuple):
        if len(source) not in (2, 4):
            raise UsageError(f"a tuple of {len(source)}: give (x, y) or (x_train, y_train, x_test, y_test)")
        return from_arrays(*source)
    if is_map_style(source):
        return from_map_style(source, image_size=image_size, channels=channels)
    raise UsageError(f"cannot read data from a {type(source).__name__}; see convlens.load_dataset")


def load_path(source: str | Path, *, image_size: int, channels: int, allow_unreadable: bool) -> Dataset:
    """Return the data set with this name, path or address; see :func:`load_dataset`."""
    if str(source) in DATASETS:
        return DATASETS[str(source)]()
    if not str(source):
        raise UsageError("the name of the data is empty; use . for the current folder")
    if is_sharded(source):
        return load_shards(source)
    path = Path(source)
    if path.is_dir():
        return load_folder(path, image_size=image_size, channels=channels, allow_unreadable=allow_unreadable)
    if path.suffix == ".npz":
        return load_npz(path)
    if path.exists() and is_sharded(path.parent):
        raise UsageError(f"{path} is one of several shards; give their folder, {path.parent}")
    if path.exists():
        raise UsageError(f"{path} is a file; give a folder of class folders, a .npz file or a name")
    if len(path.parts) > 1:
        raise UsageError(f"there is no folder {path}")
    raise UnknownNameError("data set or folder", str(source), DATASETS.names())


def load_recorded(
    recorded: Mapping[str, Any],
    data: Any = None,
    *,
    exclude: Sequence[str] = (),
    image_size: int = 0,
    channels: int = 0,
    allow_unreadable: bool = False,
) -> Dataset:
    """Return the data set that a run recorded, from its source or ``data``; see :func:`as_recorded`."""
    source = recorded["source"] if data is None else data
    dataset = load_dataset(source, image_size=image_size, channels=channels, allow_unreadable=allow_unreadable)
    return as_recorded(dataset, recorded, exclude)


def as_recorded(dataset: Dataset, recorded: Mapping[str, Any], exclude: Sequence[str] = ()) -> Dataset:
    """Return ``dataset`` without the images that a run excluded, and split into the fold that it recorded.

    Raises:
        UsageError: The data set has no such image, or cannot be split into folds.
    """
    if not dataset.excluded:
        dataset = dataset.drop(exclude)
    return take_fold(dataset, *recorded["fold"]) if recorded.get("fold") and dataset.fold is None else dataset


def data_name(data: Any) -> str:
    """Return the name that the default recipe is looked up by. Shards have the name of their original data set."""
    if isinstance(data, Dataset):
        return data.name
    return str(sharded_from(data) if isinstance(data, (str, Path)) and is_sharded(data) else data)


def require_size(image_size: int, dataset: Dataset) -> None:
    """Raise UsageError if ``dataset`` has no images of ``image_size`` pixels (0: any)."""
    if image_size not in (0, dataset.shape[1]):
        raise UsageError(f"`image_size` is for folders; {dataset.name} has images of {dataset.shape[1]} pixels")


def refuse_inside_data(out: str | Path | None, data: Any, field: str = "out") -> None:
    """Raise UsageError if ``out`` (None: ``runs``), given as ``field``, is inside the folder of the data."""
    data = data.source if isinstance(data, Dataset) else data
    if not isinstance(data, (str, Path)) or not str(data) or str(data) in DATASETS or not Path(data).is_dir():
        return  # load_dataset reports an empty name
    target = Path(out) if out is not None else Path("runs")
    if target.resolve().is_relative_to(Path(data).resolve()):
        raise UsageError(f"{target} would be written into the data in {data}; choose a place outside with `{field}`")
