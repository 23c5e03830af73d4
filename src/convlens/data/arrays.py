"""Any source of data as a Dataset: a published set by name, a folder, arrays, a map-style dataset."""

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
    InputStyle,
    InvalidImageError,
    array_to_image,
    fit_photo,
    image_pixels,
    is_grey,
    to_bytes,
    to_mode,
)
from convlens.errors import ConvlensError, UsageError
from convlens.system.progress import track

MAX_NPZ_BYTES = 100  # times that a .npz file may grow when it is unpacked

MAX_CLASSES = 100_000


def is_map_style(source: Any) -> bool:
    """Say whether ``source`` looks like a sized map-style dataset, and not like an array."""
    sized = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    return sized and not isinstance(source, (Mapping, tuple, np.ndarray, Tensor)) and not is_flat_list(source)


def is_flat_list(source: Any) -> bool:
    """Say whether ``source`` is a plain list of numbers or of rows: an array in waiting."""
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
    """Return images and labels held in arrays as a Dataset; without test arrays a fifth of every class is test.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels: uint8, whole numbers 0..255, booleans or
    floats 0..1. Labels are (N,) whole numbers from 0, below the number of ``classes`` (by default "0", "1", ... up to
    the largest label). Raises UsageError that says what is wrong with them, also where a class has less than two
    training images, or test images have another size.

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
    note = "the arrays' own splits"
    if x_test is None:
        check_classes(name, labels, train, what="the arrays")
        train, test = train.divide(TEST_FRACTION, SPLIT_SEED)
        note = HELD_OUT
    else:
        check_classes(name, labels, train)
        test = make_split(x_test, y_test, f"{name} (test)")
        if test.images.shape[1:] != train.images.shape[1:]:
            sizes = f"{tuple(test.images.shape[1:])}, train's {tuple(train.images.shape[1:])}"
            raise UsageError(f"{name}: test images are {sizes}")
    if int(test.labels.max()) >= len(labels):
        raise UsageError(too_large)
    return Dataset(name, None, tuple(labels), train, test, None, InputStyle(), note)


def make_split(x: Any, y: Any, name: str) -> Split:
    """Return arrays as a split; UsageError says what is wrong with them."""
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
        raise UsageError(f"{name}: labels must be whole numbers from 0, not {y.dtype}")
    if y.min() < 0:
        raise UsageError(f"{name}: labels must be whole numbers from 0, not {y.dtype} from {y.min()}")
    if y.max() >= MAX_CLASSES:
        raise UsageError(f"{name}: labels must be the numbers of classes, from 0; {y.max()} is too large for one")
    try:
        pixels = to_bytes(x)
    except InvalidImageError as error:
        raise UsageError(f"{name}: {error}") from None
    images = torch.from_numpy(np.array(pixels, order="C"))
    return Split(images, torch.from_numpy(y.astype(np.int64)), IndexIds(len(y)))


def load_npz(path: Path) -> Dataset:
    """Return the data set in a .npz file with x, y, or with x_train, y_train, x_test, y_test."""
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            check_sizes(file, path.stat().st_size)
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # what zip files and their headers can hold raises errors of ten kinds
        raise ConvlensError(f"{path} cannot be read as .npz: {error}") from None
    for keys in (("x_train", "y_train", "x_test", "y_test"), ("x", "y")):
        if set(keys) <= set(arrays):
            dataset = from_arrays(*(arrays[key] for key in keys), name=str(path))
            return replace(dataset, name=path.stem, source=str(path.resolve()))
    raise ConvlensError(f"{path} holds {', '.join(arrays) or 'nothing'}; it needs x and y, or x_train, y_train, ...")


def check_sizes(file: Any, size: int) -> None:
    """Raise ValueError if an open .npz file of ``size`` bytes promises far more than it can honestly hold.

    Images that are packed well take a tenth; a bomb takes a thousandth, or its headers promise what is not there.
    """
    promised = 0
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    for entry in file.zip.infolist():
        promised += entry.file_size
        if not entry.filename.endswith(".npy"):
            continue
        with file.zip.open(entry) as member:
            version = np.lib.format.read_magic(member)
            if version not in readers:
                raise ValueError(f"its array {entry.filename} is of version {version}")
            shape, _, dtype = readers[version](member)
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"its array {entry.filename} says that it is larger than it is")
    if promised > MAX_NPZ_BYTES * size + (64 << 20):
        raise ValueError(f"unpacked it would be {promised:,} bytes, over {MAX_NPZ_BYTES} times its size")


def from_map_style(dataset: Any, test: Any = None, *, image_size: int = 0, channels: int = 0) -> Dataset:
    """Return a sized map-style dataset of (PIL image or array, int) pairs, and perhaps its test part, as a Dataset.

    Each item is read once. Images of several sizes are fitted to one, as those of a folder are.
    """
    name = type(dataset).__name__.lower()
    images, labels = read_pairs(dataset, name)
    test_images, test_labels = read_pairs(test, f"{name} (test)") if test is not None else ([], [])
    everything = images + test_images
    side, planes = choose_form([Header(*image.size, is_grey(image)) for image in everything], image_size, channels)
    same = len({image.size for image in everything}) == 1 and not image_size
    width, height = images[0].size if same else (side, side)

    def pixels(pictures: list[Image.Image]) -> Any:
        return np.stack([image_pixels(fit_photo(to_mode(p, planes), height, width)) for p in pictures])

    classes = [str(c) for c in getattr(dataset, "classes", ())]
    arrays = [pixels(images), np.array(labels)]
    if test is not None:
        arrays += [pixels(test_images), np.array(test_labels)]
    return from_arrays(*arrays, classes=classes, name=name)


def read_pairs(dataset: Any, name: str) -> tuple[list[Image.Image], list[int]]:
    """Return the images and labels of a map-style dataset; UsageError says what is wrong with it."""
    images, labels = [], []
    for i in track(range(len(dataset)), "reading the dataset", len(dataset)):
        item = dataset[i]
        try:
            image, label = item
            labels.append(int(label))
        except (TypeError, ValueError):
            raise UsageError(f"{name}: item {i} is not a pair of an image and a whole number") from None
        images.append(image if isinstance(image, Image.Image) else array_to_image(image))
    if not images:
        raise UsageError(f"{name}: there is no image")
    return images, labels
