"""Load a data set by name, path or object: the one entry for every source."""

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

    ``source`` is a name (``convlens data list``), the path of a folder of class folders or of a .npz file, a folder of
    shards (``convlens data pack``) or their http(s) address, arrays
    ``(x, y)`` or ``(x_train, y_train, x_test, y_test)``, any sized map-style dataset of (PIL image or array, int)
    pairs, a tuple of two such (train, test), or a Dataset. ``image_size`` (pixels) and ``channels`` (1 or 3) say what
    the images of a folder are brought to; with 0 that is a square of the median of their shorter sides, at most 64,
    and grey if all of them are. Unreadable files are left out, and named in ``Dataset.unreadable``; more than 1% of
    them are an error, unless ``allow_unreadable``. Raises UsageError for what is none of these (UnknownNameError for a
    name), ConvlensError for files that are missing, damaged or not the published ones.

    >>> digits = load_dataset("digits")
    >>> digits.train.images.shape, digits.train.images.dtype
    (torch.Size([1438, 1, 8, 8]), torch.uint8)
    >>> digits.test.labels.shape, digits.classes[:3]
    (torch.Size([359]), ('0', '1', '2'))
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, (str, Path)):
        if str(source) in DATASETS:
            return DATASETS[str(source)]()
        if not str(source):
            raise UsageError("the data have an empty name; for the current folder say .")
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
    if isinstance(source, tuple) and len(source) == 2 and all(map(is_map_style, source)):
        return from_map_style(*source, image_size=image_size, channels=channels)
    if isinstance(source, tuple):
        if len(source) not in (2, 4):
            raise UsageError(f"a tuple of {len(source)}: give (x, y) or (x_train, y_train, x_test, y_test)")
        return from_arrays(*source)
    if is_map_style(source):
        return from_map_style(source, image_size=image_size, channels=channels)
    raise UsageError(f"cannot read data from a {type(source).__name__}; see convlens.load_dataset")


def load_recorded(
    recorded: Mapping[str, Any],
    data: Any = None,
    *,
    without: Sequence[str] = (),
    image_size: int = 0,
    channels: int = 0,
    allow_unreadable: bool = False,
) -> Dataset:
    """Return the data set that a run recorded: its source (or ``data``) less the images left out, its fold."""
    source = recorded["source"] if data is None else data
    dataset = load_dataset(source, image_size=image_size, channels=channels, allow_unreadable=allow_unreadable)
    return as_recorded(dataset, recorded, without)


def as_recorded(dataset: Dataset, recorded: Mapping[str, Any], without: Sequence[str] = ()) -> Dataset:
    """Return ``dataset`` less the images that a run left out, its fold; UsageError where that cannot be."""
    if not dataset.left_out:
        dataset = dataset.without(without)
    return take_fold(dataset, *recorded["fold"]) if recorded.get("fold") and dataset.fold is None else dataset


def data_name(data: Any) -> str:
    """Return the name by which a default recipe is looked up; shards have that of what they were made of."""
    if isinstance(data, Dataset):
        return data.name
    return str(sharded_from(data) if isinstance(data, (str, Path)) and is_sharded(data) else data)


def require_size(image_size: int, dataset: Dataset) -> None:
    """Raise UsageError if images of ``image_size`` pixels (0: any) were asked for, and could not be had."""
    if image_size not in (0, dataset.shape[1]):
        raise UsageError(f"`image_size` is for folders; {dataset.name} has images of {dataset.shape[1]} pixels")


def refuse_inside_data(out: str | Path | None, data: Any, field: str = "out") -> None:
    """Raise UsageError if ``out`` (None: ``runs``) would lie in the folder of the data: it is only ever read."""
    data = data.source if isinstance(data, Dataset) else data
    if not isinstance(data, (str, Path)) or not str(data) or str(data) in DATASETS or not Path(data).is_dir():
        return  # of an empty name load_dataset speaks
    target = Path(out) if out is not None else Path("runs")
    if target.resolve().is_relative_to(Path(data).resolve()):
        raise UsageError(f"{target} would be written into the data in {data}; choose a place outside with `{field}`")
