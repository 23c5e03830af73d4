"""Arrays, .npz files and map-style datasets as a Dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convlens.data.dataset import HELD_OUT, SPLIT_SEED, TEST_FRACTION, Dataset, IndexIds, Split, check_classes
from convlens.data.decoding import Header
from convlens.data.image_folder import choose_form
from convlens.data.images import (
    InvalidImageError,
    array_to_image,
    fit_photo,
    image_pixels,
    is_gray,
    to_bytes,
    to_mode,
)
from convlens.errors import ConvlensError, UsageError
from convlens.system.progress import track

MAX_NPZ_EXPANSION = 100  # ratio of unpacked to packed bytes; images compress to about a tenth
MAX_NPZ_SLACK_BYTES = 64 << 20  # allowed beyond that, for small files
MAX_CLASSES = 100_000


def is_map_style(source: Any) -> bool:
    """Return True if ``source`` looks like a sized map-style dataset, and not like an array."""
    sized = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    return sized and not isinstance(source, (Mapping, tuple, np.ndarray, Tensor)) and not is_flat_list(source)


def is_flat_list(source: Any) -> bool:
    """Return True if ``source`` is a list of numbers or rows, which NumPy converts to an array."""
    return isinstance(source, list) and not all(isinstance(item, tuple) and len(item) == 2 for item in source)


def from_arrays(
    x: Any,
    y: Any,
    x_test: Any = None,
    y_test: Any = None,
    *,
    classes: Sequence[str] = (),
    name: str = "arrays",
) -> Dataset:
    """Return images and labels in arrays as a Dataset.

    Args:
        x: Images, (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels: uint8, integers 0..255, booleans or
            floats 0..1.
        y: Integer labels, (N,), from 0.
        x_test: Test images. Without them, a fifth of every class becomes the test split.
        y_test: Their labels.
        classes: The class names, by default "0", "1", ... up to the largest label.
        name: The name of the data set.

    Raises:
        UsageError: The arrays have wrong shapes, types or values, a class has fewer than two training images, or the
            test images have another size.

    >>> x, y = np.zeros((10, 6, 6)), np.arange(10) % 2
    >>> dataset = from_arrays(x, y, classes=["even", "odd"])
    >>> len(dataset.train), len(dataset.test), dataset.shape
    (8, 2, (1, 6, 6))
    """
    train = make_split(x, y, name)
    labels = classes or IndexIds(int(train.labels.max()) + 1)
    too_large = f"{name}: a label is larger than the number of classes, {len(labels)}"
    if int(train.labels.max()) >= len(labels):
        raise UsageError(too_large)
    if x_test is None:
        check_classes(name, labels, train, where="the arrays")
        train, test = train.stratified_split(TEST_FRACTION, SPLIT_SEED)
        description = HELD_OUT
    else:
        check_classes(name, labels, train)
        test = make_split(x_test, y_test, f"{name} (test)")
        description = "the arrays' own splits"
        if test.images.shape[1:] != train.images.shape[1:]:
            sizes = f"{tuple(test.images.shape[1:])}, train's {tuple(train.images.shape[1:])}"
            raise UsageError(f"{name}: test images are {sizes}")
    if int(test.labels.max()) >= len(labels):
        raise UsageError(too_large)
    return Dataset(
        name=name,
        classes=tuple(labels),
        train=train,
        test=test,
        split_description=description,
    )


def make_split(x: Any, y: Any, name: str) -> Split:
    """Return arrays as a split; UsageError if their shapes, types or values are wrong."""
    try:
        x, y = np.asarray(x), np.asarray(y)
    except ValueError as error:  # rows of different lengths
        raise UsageError(f"{name}: {error}") from None
    if x.ndim == 3:
        x = x[:, None]  # (N, H, W) -> (N, 1, H, W)
    elif x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UsageError(f"{name}: images of shape {x.shape}; give (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3")
    if y.shape != x.shape[:1]:
        raise UsageError(f"{name}: {len(x)} images but labels of shape {y.shape}")
    if len(y) == 0:
        raise UsageError(f"{name}: there is no image")
    if not np.issubdtype(y.dtype, np.integer):
        raise UsageError(f"{name}: labels must be integers from 0, not {y.dtype}")
    if y.min() < 0:
        raise UsageError(f"{name}: labels must be integers from 0, not {y.dtype} from {y.min()}")
    if y.max() >= MAX_CLASSES:
        raise UsageError(f"{name}: labels must be class indices below {MAX_CLASSES:,}, not {y.max()}")
    try:
        pixels = to_bytes(x)
    except InvalidImageError as error:
        raise UsageError(f"{name}: {error}") from None
    images = torch.from_numpy(np.array(pixels, order="C"))
    return Split(images=images, labels=torch.from_numpy(y.astype(np.int64)), ids=IndexIds(len(y)))


def load_npz(path: Path) -> Dataset:
    """Return the data set in an .npz file.

    Args:
        path: A file with ``x`` and ``y``, or ``x_train``, ``y_train``, ``x_test`` and ``y_test``; see
            :func:`from_arrays`.

    Raises:
        ConvlensError: The file is damaged or has other arrays.
        UsageError: The arrays are invalid.
    """
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            check_sizes(file, path.stat().st_size)
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # zipfile and NumPy raise many kinds of error
        raise ConvlensError(f"{path} cannot be read as .npz: {error}") from None
    for keys in (("x_train", "y_train", "x_test", "y_test"), ("x", "y")):
        if set(keys) <= set(arrays):
            dataset = from_arrays(*(arrays[key] for key in keys), name=str(path))
            return replace(dataset, name=path.stem, source=str(path.resolve()))
    raise ConvlensError(f"{path} holds {', '.join(arrays) or 'nothing'}; it needs x and y, or x_train, y_train, ...")


def check_sizes(file: Any, size: int) -> None:
    """Raise ValueError if an open .npz file of ``size`` bytes is a decompression bomb or has false array headers."""
    unpacked = 0
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    for entry in file.zip.infolist():
        unpacked += entry.file_size
        if not entry.filename.endswith(".npy"):
            continue
        with file.zip.open(entry) as member:
            version = np.lib.format.read_magic(member)
            if version not in readers:
                raise ValueError(f"its array {entry.filename} has version {version}")
            shape, _, dtype = readers[version](member)
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"its array {entry.filename} is shorter than its header says")
    if unpacked > MAX_NPZ_EXPANSION * size + MAX_NPZ_SLACK_BYTES:
        raise ValueError(f"unpacked it would have {unpacked:,} bytes, over {MAX_NPZ_EXPANSION} times its size")


def from_map_style(dataset: Any, test: Any = None, *, image_size: int = 0, channels: int = 0) -> Dataset:
    """Return a map-style dataset, with its test part if there is one, as a Dataset.

    Each item is read once. Images of several sizes are fitted into one, like those of a folder.

    Args:
        dataset: Sized and indexable; its items are pairs of a PIL image or array and an int.
        test: The same, for the test split.
        image_size: See :func:`convlens.load_dataset`.
        channels: See :func:`convlens.load_dataset`.

    Raises:
        UsageError: An item is not a pair of an image and an integer.
    """
    name = type(dataset).__name__.lower()
    images, labels = read_pairs(dataset, name)
    test_images, test_labels = read_pairs(test, f"{name} (test)") if test is not None else ([], [])
    all_images = images + test_images
    headers = [Header(*image.size, is_gray(image)) for image in all_images]
    side, channels = choose_form(headers, image_size, channels)
    same_size = len({image.size for image in all_images}) == 1 and not image_size
    width, height = images[0].size if same_size else (side, side)

    def stack(images: list[Image.Image]) -> Any:
        return np.stack([image_pixels(fit_photo(to_mode(image, channels), height, width)) for image in images])

    classes = [str(c) for c in getattr(dataset, "classes", ())]
    arrays = [stack(images), np.array(labels)]
    if test is not None:
        arrays += [stack(test_images), np.array(test_labels)]
    return from_arrays(*arrays, classes=classes, name=name)


def read_pairs(dataset: Any, name: str) -> tuple[list[Image.Image], list[int]]:
    """Return the images and labels of a map-style dataset; UsageError if an item is invalid."""
    images, labels = [], []
    for i in track(range(len(dataset)), "reading the dataset", len(dataset)):
        item = dataset[i]
        try:
            image, label = item
            labels.append(int(label))
        except (TypeError, ValueError):
            raise UsageError(f"{name}: item {i} is not a pair of an image and an integer") from None
        images.append(image if isinstance(image, Image.Image) else array_to_image(image))
    if not images:
        raise UsageError(f"{name}: there is no image")
    return images, labels
