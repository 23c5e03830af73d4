"""Data sets larger than memory: tar files that WebDataset reads too, of which a few are in memory at a time."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlens.data.builtin import DATASETS
from convlens.data.dataset import Dataset, IndexIds, Split
from convlens.data.images import InputStyle
from convlens.data.shard_storage import INDEX, ShardStorage, is_address
from convlens.errors import ConvlensError, UsageError
from convlens.run_dir import atomic_dir
from convlens.system.files import write_json
from convlens.system.progress import ProgressBar
from convlens.system.random import derive_seed

FORMAT = 1
TAR_BLOCK_BYTES = 512
SHARD_BYTES = 4 << 20  # of pixels, by default
WINDOW_SHARDS = 4  # that are shuffled together

Images = NDArray[np.uint8]


def write_shards(dataset: Dataset, folder: Path, images_per_shard: int = 0) -> dict[str, Any]:
    """Write a data set as shards into the new folder ``folder``.

    A shard is a tar file of samples ``NNNNNNNNN.npy`` (uint8 H x W x C) and ``NNNNNNNNN.cls`` (the label), which every
    reader of WebDataset understands. ``index.json`` has the classes and the SHA-256 of each shard. The training images
    are shuffled once.

    Args:
        dataset: The data set.
        folder: Must not exist.
        images_per_shard: 0: about 4 MiB of pixels.

    Returns:
        The content of ``index.json``.
    """
    channels, height, width = dataset.shape
    images_per_shard = images_per_shard or min(max(SHARD_BYTES // (channels * height * width), 16), 1000)
    index: dict[str, Any] = {
        "format": FORMAT,
        "name": dataset.name,
        "source": dataset.source if dataset.source in DATASETS else None,  # so that its default recipe is found
        "classes": list(dataset.classes),
        "shape": list(dataset.shape),
        "input_style": dataset.input_style.to_json(),
        "split_description": dataset.split_description,
        "fingerprint": dataset.fingerprint(),
        "splits": {},
    }
    total = sum(len(split) for split in dataset.splits.values())
    with atomic_dir(folder) as new, ProgressBar("writing shards", total) as progress:
        for name, split in dataset.splits.items():
            order = torch.arange(len(split))
            if name == "train":
                order = torch.randperm(len(split), generator=torch.Generator().manual_seed(derive_seed(FORMAT)))
            shards = []
            for number, rows in enumerate(torch.split(order, images_per_shard)):
                file = f"{name}-{number:06d}.tar"
                images = split.images[rows].permute(0, 2, 3, 1).contiguous().numpy()  # (n, H, W, C)
                content = make_tar(images, split.labels[rows].tolist(), number * images_per_shard)
                (new / file).write_bytes(content)
                shards.append({"file": file, "images": len(rows), "sha256": hashlib.sha256(content).hexdigest()})
                progress.update(len(rows))
            labels = io.BytesIO()
            np.save(labels, split.labels[order].numpy().astype(np.uint32))
            (new / f"{name}-labels.npy").write_bytes(labels.getvalue())
            index["splits"][name] = {"labels": hashlib.sha256(labels.getvalue()).hexdigest(), "shards": shards}
        write_json(new / INDEX, index)
    return index


def make_tar(images: Images, labels: Sequence[int], first: int) -> bytes:
    """Return a tar file of images (N, H, W, C) and labels, numbered from ``first``. The bytes are reproducible."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True), start=first):
            pixels = io.BytesIO()
            np.save(pixels, image)
            for suffix, content in (("npy", pixels.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def read_index(storage: ShardStorage) -> dict[str, Any]:
    """Return the index of the shards; ConvlensError if it is missing or has another format."""
    index = storage.read_index()
    if "format" not in index:
        raise ConvlensError(f"{storage.path}/{INDEX} is not an index of shards: it has no format")
    if index["format"] != FORMAT:
        raise ConvlensError(f"another version of convlens wrote the shards in {storage.path}: format {index['format']}")
    return index


def is_sharded(source: str | Path) -> bool:
    """Return True if ``source`` is a folder that :func:`write_shards` wrote, or an address."""
    return is_address(str(source)) or (Path(source) / INDEX).is_file()


def sharded_from(source: str | Path) -> str | None:
    """Return the name of the built-in data set that the shards were made from, or None."""
    return read_index(ShardStorage(str(source))).get("source")


def load_shards(source: str | Path) -> Dataset:
    """Return the data set in shards. Validation and test images are read at once, training images when needed.

    Args:
        source: A folder that :func:`write_shards` wrote, or its http(s) address.

    Raises:
        ConvlensError: A file is missing or damaged.
    """
    storage = ShardStorage(str(source) if is_address(str(source)) else str(Path(source).resolve()))
    index = read_index(storage)
    try:
        if not {"train", "test"} <= set(index["splits"]) <= {"train", "validation", "test"}:
            raise ValueError(f"its splits are {', '.join(index['splits'])}")
        splits = {name: read_split(storage, index, name) for name in index["splits"]}
        if not re.fullmatch(r"[^/\\\x00-\x1f]*[^/\\\x00-\x1f.][^/\\\x00-\x1f]*", index["name"]):
            raise ValueError(f"{index['name']!r} is not a name")
        return ShardedDataset(
            name=str(index["name"]),
            source=storage.path,
            classes=tuple(index["classes"]),
            train=splits["train"],
            test=splits["test"],
            validation=splits.get("validation"),
            input_style=InputStyle.from_json(index["input_style"]),
            split_description=f"shards; {index['split_description']}",
            index_sha256=hash_index(index),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConvlensError(f"{storage.path}/{INDEX} is damaged, or not an index of shards: {error}") from None


def read_split(storage: ShardStorage, index: Mapping[str, Any], name: str) -> Split:
    """Return a split of the index; KeyError, TypeError, ValueError or AttributeError if the index is invalid."""
    entry = index["splits"][name]
    count = sum(int(shard["images"]) for shard in entry["shards"])
    content = storage.read(f"{name}-labels.npy", str(entry["labels"]), 4 * count + TAR_BLOCK_BYTES)
    labels = np.load(io.BytesIO(content), allow_pickle=False)
    shards = [Shard(s["file"], int(s["images"]), str(s["sha256"])) for s in entry["shards"]]
    for shard in shards:
        valid = re.fullmatch(rf"{name}-\d+\.tar", shard.file) and re.fullmatch("[0-9a-f]{64}", shard.sha256)
        if not valid or shard.images < 1:
            raise ValueError(f"{shard.file!r} is not a shard of {name}")
    if labels.shape != (count,) or labels.dtype != np.uint32 or labels.max() >= len(index["classes"]):
        raise ValueError(f"the labels of {name} do not fit")
    channels, height, width = (int(side) for side in index["shape"])
    images = ShardImages(storage, shards, (channels, height, width))
    ids, targets = IndexIds(count), torch.from_numpy(labels.astype(np.int64))
    if name == "train":
        return ShardedSplit(images=images, labels=targets, ids=ids)  # type: ignore[arg-type]  # indexed like a tensor
    return Split(images=images[:], labels=targets, ids=ids)


def hash_index(index: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of an index, whatever its formatting."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    file: str
    images: int  # their number
    sha256: str


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardedDataset(Dataset):
    """A data set in shards.

    Args:
        index_sha256: The SHA-256 (hex) of the index.
    """

    index_sha256: str = ""

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the index. It covers the digests of all shards, which are verified when read."""
        return self.index_sha256

    def drop(self, names: Any) -> Dataset:
        """Raise UsageError if there are ``names``: images cannot be dropped from shards."""
        if names:
            raise UsageError("images cannot be excluded from shards; exclude them when the shards are made")
        return self

    def with_validation(self, fraction: float, seed: int) -> Dataset:
        """Return the data set unchanged: its validation split was made with the shards."""
        return self


class ShardedSplit(Split):
    """Training images in shards."""

    def evenly_spaced(self, count: int) -> Tensor:
        """Return the first rows, int64: the images were shuffled when the shards were made."""
        return torch.arange(min(count, len(self)))

    def order(self, seed: int, epoch: int) -> ShardOrder:  # type: ignore[override]  # sliced like a tensor
        """Return the order of an epoch: shuffled shards, and shuffled images within each window of shards."""
        assert isinstance(self.images, ShardImages)
        return ShardOrder(self.images, derive_seed(seed, epoch))


class ShardImages:
    """The images of many shards, indexed like a uint8 tensor (N, C, H, W). A few shards are in memory at a time."""

    def __init__(self, storage: ShardStorage, shards: Sequence[Shard], shape: tuple[int, int, int]):
        self.storage, self.shards = storage, list(shards)
        self.first = np.cumsum([0, *(shard.images for shard in shards)])  # row of the first image of each shard
        self.shape = (int(self.first[-1]), *shape)
        self._loaded: OrderedDict[int, Future[Images]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "shards")
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, device: torch.device) -> ShardImages:
        """Return the same images, which are moved to ``device`` when they are indexed."""
        moved = copy.copy(self)  # shares the loaded shards
        moved._device = device
        return moved

    def load(self, numbers: Sequence[int]) -> list[Future[Images]]:
        """Start reading the shards that are not in memory, and evict the least recently used ones."""
        with self._lock:
            for number in numbers:
                known = self._loaded.get(number)
                if known is None or (known.done() and known.exception()):  # retry after an error
                    self._loaded[number] = self._pool.submit(self._read, number)
                self._loaded.move_to_end(number)
            requested = [self._loaded[number] for number in numbers]
            while len(self._loaded) > 3 * WINDOW_SHARDS:  # a batch may span two windows, and one is read ahead
                self._loaded.popitem(last=False)
        return requested

    def __getitem__(self, rows: slice | int | Tensor | Sequence[int]) -> Tensor:
        """Return images, uint8 (n, C, H, W), or one (C, H, W) for an int."""
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)))
        wanted: NDArray[np.int64] = np.atleast_1d(torch.as_tensor(rows).cpu().numpy())
        shard_of = np.searchsorted(self.first, wanted, side="right") - 1  # (n,)
        channels, height, width = self.shape[1:]
        out = np.empty((len(wanted), height, width, channels), np.uint8)
        numbers = np.unique(shard_of).tolist()
        for start in range(0, len(numbers), WINDOW_SHARDS):
            window = numbers[start : start + WINDOW_SHARDS]
            for number, loading in zip(window, self.load(window), strict=True):
                here = shard_of == number
                out[here] = loading.result()[wanted[here] - self.first[number]]
        images = torch.from_numpy(out).permute(0, 3, 1, 2).to(self._device)  # (n, C, H, W), channels last
        return images[0] if isinstance(rows, int) else images

    def _read(self, number: int) -> Images:
        """Return the images of a shard, uint8 (n, H, W, C); ConvlensError if it is missing or damaged."""
        shard, (channels, height, width) = self.shards[number], self.shape[1:]
        # Every sample has the same size: a tar header and the .npy file, a tar header and the label.
        header = len(npy_header((height, width, channels)))
        pixels = height * width * channels
        npy_blocks = -(-(header + pixels) // TAR_BLOCK_BYTES)
        sample = (npy_blocks + 3) * TAR_BLOCK_BYTES
        max_bytes = shard.images * sample + tarfile.RECORDSIZE + 2 * TAR_BLOCK_BYTES  # with the end of the archive
        content = np.frombuffer(self.storage.read(shard.file, shard.sha256, max_bytes), np.uint8)
        if len(content) < shard.images * sample:
            raise ConvlensError(f"the shard {self.storage.path}/{shard.file} holds fewer images than {INDEX} says")
        samples = content[: shard.images * sample].reshape(shard.images, sample)
        arrays = samples[:, TAR_BLOCK_BYTES + header :][:, :pixels]
        return np.ascontiguousarray(arrays).reshape(-1, height, width, channels)


def npy_header(shape: tuple[int, int, int]) -> bytes:
    """Return the header of a .npy file of uint8 pixels."""
    file = io.BytesIO()
    np.save(file, np.empty(shape, np.uint8))
    return file.getvalue()[: file.tell() - int(np.prod(shape))]


class ShardOrder:
    """The order of the images in an epoch: ``order[start:end]`` are row indices, int64.

    Shards are shuffled, and so are the images within each window of consecutive shards. While a window is used, the
    next one is read.
    """

    def __init__(self, images: ShardImages, seed: int):
        self._images, self._seed = images, seed
        count = len(images.shards)
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        self._windows = [shuffled[start : start + WINDOW_SHARDS] for start in range(0, count, WINDOW_SHARDS)]
        sizes = [sum(images.shards[number].images for number in window) for window in self._windows]
        self._first = np.cumsum([0, *sizes])
        self._cached: tuple[int, Tensor] | None = None  # a window and its rows

    def __getitem__(self, part: slice) -> Tensor:
        """Return the rows (int64) from ``part.start`` up to ``part.stop``."""
        start, stop, _ = part.indices(int(self._first[-1]))
        rows = []
        window = int(np.searchsorted(self._first, start, side="right")) - 1
        while start < stop:
            self._images.load(self._windows[window])
            begin, end = int(self._first[window]), int(self._first[window + 1])
            rows.append(self._rows(window)[start - begin : stop - begin])
            start, window = end, window + 1
        if window < len(self._windows):
            self._images.load(self._windows[window])  # read ahead
        return torch.cat(rows)

    def _rows(self, window: int) -> Tensor:
        """Return the shuffled rows of a window."""
        if self._cached is None or self._cached[0] != window:
            first = self._images.first
            rows = torch.cat([torch.arange(first[number], first[number + 1]) for number in self._windows[window]])
            generator = torch.Generator().manual_seed(derive_seed(self._seed, window))
            self._cached = (window, rows[torch.randperm(len(rows), generator=generator)])
        return self._cached[1]
