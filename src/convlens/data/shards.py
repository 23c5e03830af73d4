"""Data larger than memory: packed into tar files that WebDataset reads too, and read a few of them at a time."""

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
from dataclasses import asdict, dataclass
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
BLOCK = 512  # bytes; a tar file is made of such
SHARD_BYTES = 4 << 20  # of pixels, in a shard
WINDOW = 4  # shards that are shuffled together

Images = NDArray[np.uint8]


def write_shards(dataset: Dataset, folder: Path, per_shard: int = 0) -> dict[str, Any]:
    """Write a data set as shards into the new folder ``folder``, and return its index.

    A shard is a tar file of samples ``NNNNNNNNN.npy`` (uint8 H x W x C) and ``NNNNNNNNN.cls`` (the class's number),
    which any reader of WebDataset takes; ``index.json`` has the classes, and each shard's SHA-256. Training images are
    shuffled once for all. ``per_shard`` is the number of images in a shard (0: about 4 MiB of pixels).
    """
    channels, height, width = dataset.shape
    per_shard = per_shard or min(max(SHARD_BYTES // (channels * height * width), 16), 1000)
    index: dict[str, Any] = {
        "format": FORMAT,
        "name": dataset.name,
        "source": dataset.source if dataset.source in DATASETS else None,  # a data set that has a recipe of its own
        "classes": list(dataset.classes),
        "shape": list(dataset.shape),
        "style": asdict(dataset.style),
        "note": dataset.note,
        "fingerprint": dataset.fingerprint(),
        "splits": {},
    }
    total = sum(len(split) for split in dataset.splits.values())
    with atomic_dir(folder) as new, ProgressBar("packing", total) as meter:
        for name, split in dataset.splits.items():
            order = torch.arange(len(split))
            if name == "train":
                order = torch.randperm(len(split), generator=torch.Generator().manual_seed(derive_seed(FORMAT)))
            shards = []
            for number, rows in enumerate(torch.split(order, per_shard)):
                file = f"{name}-{number:06d}.tar"
                images = split.images[rows].permute(0, 2, 3, 1).contiguous().numpy()
                content = make_tar(images, split.labels[rows].tolist(), number * per_shard)
                (new / file).write_bytes(content)
                shards.append({"file": file, "images": len(rows), "sha256": hashlib.sha256(content).hexdigest()})
                meter.update(len(rows))
            labels = io.BytesIO()
            np.save(labels, split.labels[order].numpy().astype(np.uint32))
            (new / f"{name}-labels.npy").write_bytes(labels.getvalue())
            index["splits"][name] = {"labels": hashlib.sha256(labels.getvalue()).hexdigest(), "shards": shards}
        write_json(new / INDEX, index)
    return index


def make_tar(images: Images, labels: Sequence[int], first: int) -> bytes:
    """Return a tar file of images (N, H, W, C) and labels, numbered from ``first``: the same bytes at any time."""
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


def find_index(place: ShardStorage) -> dict[str, Any]:
    """Return the index of the shards in a place; ConvlensError if it is none of this version's."""
    index = place.read_index()
    if "format" not in index:
        raise ConvlensError(f"{place.path}/{INDEX} is no index of shards: it names no format")
    if index["format"] != FORMAT:
        raise ConvlensError(f"the shards in {place.path} are of another version of convlens: format {index['format']}")
    return index


def is_sharded(source: str | Path) -> bool:
    """Say whether ``source`` is where :func:`pack` has written, or may be so: an address."""
    return is_address(str(source)) or (Path(source) / INDEX).is_file()


def sharded_from(source: str | Path) -> str | None:
    """Return the name of the published data set that shards were made of, None for other data."""
    return find_index(ShardStorage(str(source))).get("source")


def load_shards(source: str | Path) -> Dataset:
    """Return the data set that :func:`pack` has written; its training images stay where they are.

    ``source`` is a folder, or its http(s) address. Validation and test images are read at once. Raises ConvlensError
    for what is missing or damaged.
    """
    place = ShardStorage(str(source) if is_address(str(source)) else str(Path(source).resolve()))
    index = find_index(place)
    try:
        if not {"train", "test"} <= set(index["splits"]) <= {"train", "validation", "test"}:
            raise ValueError(f"its splits are {', '.join(index['splits'])}")
        splits: dict[str, Split] = {}
        for name, about in index["splits"].items():
            count = sum(int(shard["images"]) for shard in about["shards"])
            content = place.read(f"{name}-labels.npy", str(about["labels"]), 4 * count + BLOCK)
            labels = np.load(io.BytesIO(content), allow_pickle=False)
            shards = [Shard(s["file"], int(s["images"]), str(s["sha256"])) for s in about["shards"]]
            for shard in shards:
                whole = re.fullmatch(rf"{name}-\d+\.tar", shard.file) and re.fullmatch("[0-9a-f]{64}", shard.sha256)
                if not whole or shard.images < 1:
                    raise ValueError(f"{shard.file!r} is no shard of {name}")
            shape = tuple(int(side) for side in index["shape"])
            images = ShardImages(place, shards, shape)  # type: ignore[arg-type]
            if labels.shape != (count,) or labels.dtype != np.uint32 or labels.max() >= len(index["classes"]):
                raise ValueError(f"the labels of {name} do not fit")
            kind = ShardedSplit if name == "train" else Split
            seen = images if name == "train" else images[:]
            splits[name] = kind(seen, torch.from_numpy(labels.astype(np.int64)), IndexIds(len(labels)))  # type: ignore[arg-type]
        if not re.fullmatch(r"[^/\\\x00-\x1f]*[^/\\\x00-\x1f.][^/\\\x00-\x1f]*", index["name"]):
            raise ValueError(f"{index['name']!r} is no name")
        style = InputStyle(**index["style"])
        return ShardedDataset(
            str(index["name"]), place.path, tuple(index["classes"]), splits["train"], splits["test"],
            splits.get("validation"), style, f"shards; {index['note']}", packed=digest_index(index),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConvlensError(f"{place.path}/{INDEX} is damaged, or no index of shards: {error}") from None


def digest_index(index: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of an index, however it is written."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, how many images it holds, its SHA-256."""

    file: str
    images: int
    sha256: str


@dataclass(frozen=True, eq=False)
class ShardedDataset(Dataset):
    """A data set in shards."""

    packed: str = ""  # the SHA-256 of the index

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the index, which holds those of all shards; each is proved when it is read."""
        return self.packed

    def without(self, names: Any) -> Dataset:
        """Raise UsageError if there are ``names``: what is packed stays together."""
        if names:
            raise UsageError("shards leave no image out: name it when they are packed, with data pack --exclude")
        return self

    def with_validation(self, fraction: float, seed: int) -> Dataset:
        """Return the data set itself: its validation images were chosen when it was packed."""
        return self


class ShardedSplit(Split):
    """Training images that are not in memory."""

    def spread(self, most: int) -> Tensor:
        """Return the first rows: they were shuffled when they were packed."""
        return torch.arange(min(most, len(self)))

    def order(self, seed: int, epoch: int) -> ShardOrder:  # type: ignore[override]  # it is sliced, like a tensor
        """Return the order of an epoch: shards shuffled, and images shuffled among a few shards."""
        assert isinstance(self.images, ShardImages)
        return ShardOrder(self.images, derive_seed(seed, epoch))


class ShardImages:
    """The images of many shards as one uint8 (N, C, H, W), of which a few shards are in memory at a time."""

    def __init__(self, place: ShardStorage, shards: Sequence[Shard], shape: tuple[int, int, int]):
        self.place, self.shards = place, list(shards)
        self.first = np.cumsum([0, *(shard.images for shard in shards)])  # number of each shard's first image
        self.shape = (int(self.first[-1]), *shape)
        self._loaded: OrderedDict[int, Future[Images]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "shards")
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, device: torch.device) -> ShardImages:
        """Return the same images, which come to ``device`` when they are asked for."""
        there = copy.copy(self)  # with the same shards in memory
        there._device = device
        return there

    def load(self, numbers: Sequence[int]) -> list[Future[Images]]:
        """Begin to read shards that are not in memory yet; those that were not asked for longest are forgotten."""
        with self._lock:
            for number in numbers:
                known = self._loaded.get(number)
                if known is None or (known.done() and known.exception()):  # it may be there by now
                    self._loaded[number] = self._pool.submit(self._read, number)
                self._loaded.move_to_end(number)
            asked = [self._loaded[number] for number in numbers]
            while len(self._loaded) > 3 * WINDOW:  # a batch may lie in two windows, and the next one is on its way
                self._loaded.popitem(last=False)
        return asked

    def __getitem__(self, rows: slice | int | Tensor | Sequence[int]) -> Tensor:
        """Return images, uint8 (n, C, H, W), or one (C, H, W), as indexing a tensor does."""
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)))
        wanted: NDArray[np.int64] = np.atleast_1d(torch.as_tensor(rows).cpu().numpy())
        holders = np.searchsorted(self.first, wanted, side="right") - 1
        channels, height, width = self.shape[1:]
        out = np.empty((len(wanted), height, width, channels), np.uint8)
        numbers = np.unique(holders).tolist()
        for start in range(0, len(numbers), WINDOW):
            some = numbers[start : start + WINDOW]
            for number, loading in zip(some, self.load(some), strict=True):
                here = holders == number
                out[here] = loading.result()[wanted[here] - self.first[number]]
        images = torch.from_numpy(out).permute(0, 3, 1, 2).to(self._device)  # (n, C, H, W), channels last
        return images[0] if isinstance(rows, int) else images

    def _read(self, number: int) -> Images:
        """Return the images of a shard, uint8 (n, H, W, C); ConvlensError names it if it is missing or damaged."""
        shard, (channels, height, width) = self.shards[number], self.shape[1:]
        # every sample takes the same room: a header and the .npy file, a header and the class's number
        header = len(npy_header((height, width, channels)))
        pixels = height * width * channels
        size = BLOCK + -(-(header + pixels) // BLOCK) * BLOCK + 2 * BLOCK
        most = shard.images * size + tarfile.RECORDSIZE + 2 * BLOCK  # with what a tar file ends in
        content = np.frombuffer(self.place.read(shard.file, shard.sha256, most), np.uint8)
        if len(content) < shard.images * size:
            raise ConvlensError(f"the shard {self.place.path}/{shard.file} holds fewer images than {INDEX} says")
        samples = content[: shard.images * size].reshape(shard.images, size)
        return np.ascontiguousarray(samples[:, BLOCK + header :][:, :pixels]).reshape(-1, height, width, channels)


def npy_header(shape: tuple[int, int, int]) -> bytes:
    """Return what stands before the pixels in a .npy file."""
    file = io.BytesIO()
    np.save(file, np.empty(shape, np.uint8))
    return file.getvalue()[: file.tell() - int(np.prod(shape))]


class ShardOrder:
    """The order of the images in one epoch, a function of its seed: ``order[start:end]`` are their row numbers.

    Shards are shuffled; each few that follow one another are shuffled together. While those are in use, the next ones
    are read.
    """

    def __init__(self, images: ShardImages, seed: int):
        self._images, self._seed = images, seed
        count = len(images.shards)
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        self._windows = [shuffled[start : start + WINDOW] for start in range(0, count, WINDOW)]
        sizes = [sum(images.shards[number].images for number in window) for window in self._windows]
        self._first = np.cumsum([0, *sizes])
        self._last: tuple[int, Tensor] | None = None  # a window, and its rows

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
        if window < len(self._windows):  # the next one, behind what is needed now
            self._images.load(self._windows[window])
        return torch.cat(rows)

    def _rows(self, window: int) -> Tensor:
        """Return the rows of a window, shuffled."""
        if self._last is None or self._last[0] != window:
            first = self._images.first
            rows = torch.cat([torch.arange(first[number], first[number + 1]) for number in self._windows[window]])
            generator = torch.Generator().manual_seed(derive_seed(self._seed, window))
            self._last = (window, rows[torch.randperm(len(rows), generator=generator)])
        return self._last[1]
