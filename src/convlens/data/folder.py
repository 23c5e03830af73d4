"""A folder of class folders, decoded once into a memory-mapped cache. The user's folder is only read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convlens.data.dataset import HELD_OUT, SPLIT_SEED, TEST_FRACTION, Dataset, Split, check_classes
from convlens.data.fetch import cache_folder
from convlens.data.preprocess import (
    FORMATS,
    BadImage,
    PictureStyle,
    fit_photo,
    image_to_tensor,
    is_grey,
    open_image,
    to_mode,
)
from convlens.errors import ConvlensError, UsageError
from convlens.progress import track
from convlens.runfolder import sync, write_text
from convlens.runtime import available_cores

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
LARGEST_OWN_SIZE = 64  # images up to this size keep it; larger photos are reduced to it unless --image-size asks
MOST_UNREADABLE = 0.01
SMALL_FILE = 10_000  # bytes
CACHE_VERSION = 2  # raise when decoding changes, so that old caches are not used

A = TypeVar("A")
B = TypeVar("B")
Decoded = tuple[Tensor, dict[int, str]]  # images, uint8 (N, C, H, W), and why others cannot be read, by their place


@dataclass(frozen=True)
class Entry:
    """One file of the folder."""

    split: str  # "train", "validation", "test", or "all" where the folder is not split
    label: str
    path: str  # relative to the folder, with forward slashes


def visible(folder: Path) -> list[Path]:
    """Return what is in ``folder``, sorted by name, without hidden files and folders."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX")))


def scan(root: Path) -> list[Entry]:
    """List the files of a folder of class folders, with or without split folders above the classes."""
    folders = [p for p in visible(root) if p.is_dir()]
    splits = {p: SPLIT_NAMES[p.name.lower()] for p in folders if p.name.lower() in SPLIT_NAMES}
    if "train" not in splits.values():
        splits = {root: "all"}
    elif len(set(splits.values())) < len(splits):
        raise UsageError(f"{root} has two folders for one split: {', '.join(sorted(p.name for p in splits))}")
    entries: list[Entry] = []
    empty: list[str] = []
    closed: list[Path] = []
    for base, split in splits.items():
        for label in (p for p in visible(base) if p.is_dir()):
            before = len(entries)
            # a folder that cannot be looked into is an entry itself, so that it is counted and named
            for parent, subfolders, files in os.walk(label, onerror=lambda error: closed.append(Path(error.filename))):
                subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
                for file in sorted(f for f in files if not f.startswith(".")):
                    relative = (Path(parent) / file).relative_to(root).as_posix()
                    entries.append(Entry(split, label.name, relative))
            entries += [Entry(split, label.name, folder.relative_to(root).as_posix()) for folder in closed]
            closed.clear()
            if split in ("train", "all") and len(entries) == before:
                empty.append(label.relative_to(root).as_posix())
    if entries and empty:
        raise UsageError(f"{root}: the class folder {empty[0]!r} is empty; put images into it, or remove it")
    if not entries:
        raise UsageError(f"{root} has no class folders with images: make one folder a class, images inside")
    return entries


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, or a mark for one that cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait forever
            return "unreadable: no file"
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def inspect(path: Path) -> tuple[int, bool] | None:
    """Return (shorter side in pixels, grey?) from a file's header alone; None if it is no image."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        with Image.open(path, formats=FORMATS) as image:
            return min(image.size), is_grey(image)
    except Exception:  # whatever it is, decoding it will say so
        return None


def image_sizes(root: str | Path) -> list[tuple[int, int]]:
    """Return (width, height) of every image file of a folder, from the headers, smallest area first."""
    sizes = []
    for path in (Path(root) / entry.path for entry in scan(Path(root))):
        with contextlib.suppress(Exception):
            if path.is_file():
                with Image.open(path, formats=FORMATS) as image:
                    sizes.append(image.size)
    return sorted(sizes, key=lambda size: size[0] * size[1])


def decode(root: Path, name: str, channels: int, side: int) -> Tensor | str:
    """Return an image file as uint8 (C, side, side), or why it cannot be read, naming it as in the folder."""
    path = root / name
    try:
        return image_to_tensor(fit_photo(to_mode(open_image(path), channels), side, side))
    except BadImage as error:
        return str(error).replace(str(path), name)


def load_folder(root: str | Path, *, image_size: int = 0, channels: int = 0, allow_unreadable: bool = False) -> Dataset:
    """Return the data set in a folder of class folders.

    ``image_size`` is the side of the square that every image is fitted into (0: the images' own size up to 64,
    else 64); ``channels`` 1 or 3 (0: 3 unless every image is grey). With ``train/`` and others inside, those are
    the splits, and a ``val/`` without a ``test/`` is kept as the test split; else a fifth of every class becomes
    the test split, by a fixed seed. Raises UsageError for a folder without classes or images, ConvlensError
    if more than 1% of the files are unreadable, unless ``allow_unreadable``.
    """
    root = Path(root).resolve()
    entries = scan(root)
    paths = [root / entry.path for entry in entries]
    threads = pick_threads(paths)
    hashes = list(track(by_threads(threads, hash_file, paths), "reading files", len(paths)))
    key = hashlib.sha256(repr((CACHE_VERSION, entries, hashes)).encode()).hexdigest()
    cache = cache_folder() / "folders" / key[:32]
    side, planes = settle_form(cache, image_size, channels, lambda: by_threads(threads, inspect, paths))
    folder, shape = cache / f"{side}-{planes}", (len(entries), planes, side, side)

    def decode_all() -> Iterator[Tensor | str]:
        work = by_threads(threads, lambda entry: decode(root, entry.path, planes, side), entries)
        return track(work, "decoding images", len(entries))

    found = read_cache(folder)
    if found is None:
        with contextlib.suppress(OSError):
            write_cache(folder, decode_all(), shape)
        found = read_cache(folder) or keep_in_memory(decode_all(), shape)
    images, unreadable = found
    check_unreadable(root, unreadable, len(entries), allow_unreadable)
    kept = [entry for i, entry in enumerate(entries) if i not in unreadable]
    classes = tuple(sorted({entry.label for entry in entries if entry.split in ("train", "all")}))
    for entry in kept:
        if entry.label not in classes:
            raise UsageError(f"{root}: class {entry.label!r} is in {entry.split} but not in train")
    return make_dataset(root, kept, images, classes, tuple(unreadable.values()))


def settle_form(
    cache: Path, image_size: int, channels: int, inspect_all: Callable[[], Iterable[tuple[int, bool] | None]]
) -> tuple[int, int]:
    """Return the (side, channels) that are asked for, or else fit the files, remembered from the first time."""
    if image_size and channels:
        return image_size, channels
    remembered = cache / f"form-{image_size}-{channels}.json"
    try:
        side, planes = json.loads(remembered.read_text(encoding="utf-8"))
        return int(side), int(planes)
    except (OSError, ValueError, TypeError):
        form = choose_form(list(inspect_all()), image_size, channels)
        with contextlib.suppress(ConvlensError):  # a cache that cannot be written is done without
            write_text(remembered, json.dumps(form))
        return form


def choose_form(headers: Sequence[tuple[int, bool] | None], image_size: int, channels: int) -> tuple[int, int]:
    """Choose (side, channels) that all images are brought to, from their headers' (shorter side, grey?)."""
    known = [header for header in headers if header is not None]
    if not known:
        return image_size or LARGEST_OWN_SIZE, channels or 3
    median = sorted(side for side, _ in known)[len(known) // 2]
    grey = all(grey for _, grey in known)
    return image_size or min(median, LARGEST_OWN_SIZE), channels or (1 if grey else 3)


def check_unreadable(root: Path, unreadable: dict[int, str], total: int, allowed: bool) -> None:
    """Raise ConvlensError that names the unreadable files if they are more than 1% and not allowed."""
    if len(unreadable) > MOST_UNREADABLE * total and not allowed:
        some = list(unreadable.values())
        more = f"; and {len(some) - 3} more" if len(some) > 3 else ""
        raise ConvlensError(
            f"{len(some)} of {total} files in {root} cannot be read, more than 1%: {'; '.join(some[:3])}{more}. "
            "Remove them, or skip them with --allow-unreadable"
        )


def make_dataset(
    root: Path,
    entries: Sequence[Entry],
    images: Tensor,
    classes: tuple[str, ...],
    unreadable: tuple[str, ...],
) -> Dataset:
    """Sort decoded images into splits."""
    number = {label: i for i, label in enumerate(classes)}
    labels = torch.tensor([number[entry.label] for entry in entries], dtype=torch.int64)
    everything = Split(images, labels, [entry.path for entry in entries])

    def part(name: str) -> Split | None:
        rows = torch.tensor([i for i, e in enumerate(entries) if e.split == name], dtype=torch.int64)
        return everything.take(rows) if len(rows) else None

    name = str(root)
    train, validation, test = part("train"), part("validation"), part("test")
    if any(entry.split == "all" for entry in entries):
        check_classes(name, classes, everything, what="the folder")
        train, test = everything.divide(TEST_FRACTION, SPLIT_SEED)
        note = f"the folder is not split: {HELD_OUT}"
    else:
        train = train or everything.take(torch.empty(0, dtype=torch.int64))  # every file was unreadable
        check_classes(name, classes, train)
        note = "the folder's own splits"
        if test is None and validation is not None:
            test, validation = validation, None
            note = "no test folder: the validation folder is the test split, and nothing is chosen by it"
        elif test is None:
            train, test = train.divide(TEST_FRACTION, SPLIT_SEED)
            note = f"no test folder: {HELD_OUT}"
    return Dataset(root.name, str(root), classes, train, test, validation, PictureStyle(), note, unreadable)


def read_cache(folder: Path) -> Decoded | None:
    """Return the memory-mapped images and the unreadable files of an earlier decoding, if there was one."""
    try:
        unreadable = json.loads((folder / "unreadable.json").read_text(encoding="utf-8"))
        # copy-on-write: PyTorch wants writable memory, and nothing may ever write to the cache
        images = torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False))
        return images[: len(images) - len(unreadable)], {int(i): why for i, why in unreadable.items()}
    except (OSError, ValueError, EOFError, AttributeError):
        return None


def write_cache(folder: Path, decoded: Iterable[Tensor | str], shape: tuple[int, int, int, int]) -> None:
    """Store decoded images as they come, so that ``folder`` appears whole or not at all; OSError if there is no room.

    ``shape`` is that of all of them, (N, C, H, W); the last rows stay empty where some cannot be read.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        unreadable: dict[int, str] = {}
        with open(temporary / "images.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for number, image in enumerate(decoded):
                if isinstance(image, str):
                    unreadable[number] = image
                else:
                    file.write(image.contiguous().numpy().data)
            file.truncate(file.tell() + len(unreadable) * math.prod(shape[1:]))
        (temporary / "unreadable.json").write_text(json.dumps(unreadable), encoding="utf-8")
        for path in (temporary / "images.npy", temporary / "unreadable.json", temporary):
            sync(path)
        if read_cache(folder) is None:  # else another process was first
            shutil.rmtree(folder, ignore_errors=True)  # it is damaged, if it is there at all
            with contextlib.suppress(OSError):
                temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def keep_in_memory(decoded: Iterable[Tensor | str], shape: tuple[int, int, int, int]) -> Decoded:
    """Return decoded images, and why others are not, where the cache cannot be written (full, read-only)."""
    images, unreadable = torch.empty(shape, dtype=torch.uint8), {}
    for number, image in enumerate(decoded):
        if isinstance(image, str):
            unreadable[number] = image
        else:
            images[number - len(unreadable)] = image
    return images[: len(images) - len(unreadable)], unreadable


def pick_threads(paths: Sequence[Path]) -> int:
    """Return how many threads read these files best: as many as there are cores, but for small files one.

    Python runs one thread at a time: where decoding itself takes next to nothing, threads only wait for each other.
    """
    sizes = []
    for path in paths[:: len(paths) // 100 + 1]:
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return available_cores() if sum(sizes) > SMALL_FILE * len(sizes) else 1


def by_threads(threads: int, work: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """Yield ``work`` of every item, in order, done by so many threads; few results wait."""
    if threads == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 16 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
