"""A folder with one subfolder per class, decoded once into a memory-mapped cache. The folder is only read."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convlens.data.cache import keep_in_memory, no_room, read_cache, stays_on_disk, write_cache
from convlens.data.dataset import HELD_OUT, SPLIT_SEED, TEST_FRACTION, Dataset, Split, check_classes
from convlens.data.decoding import Decoded, Header, decode_files, survey_files
from convlens.errors import ConvlensError, UsageError
from convlens.system.files import cache_dir
from convlens.system.text import first_few

logger = logging.getLogger("convlens")

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
MAX_AUTO_SIZE = 64  # pixels; larger images are scaled down to it unless `image_size` is set
MAX_UNREADABLE_FRACTION = 0.01
CACHE_VERSION = 2  # increment when decoding changes, so that old caches are ignored


@dataclass(frozen=True)
class Entry:
    """One file of the folder."""

    split: str  # "train", "validation", "test", or "all" if the folder is not split
    label: str
    path: str  # relative to the folder, with forward slashes


def visible(folder: Path) -> list[Path]:
    """Return the entries of ``folder``, sorted by name, without hidden ones."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX")))


def scan(root: Path) -> list[Entry]:
    """List the files of a folder of class folders, with or without split folders above the classes.

    Raises:
        UsageError: The folder has no class, an empty class, or two folders for one split.
    """
    folders = [p for p in visible(root) if p.is_dir()]
    splits = {p: SPLIT_NAMES[p.name.lower()] for p in folders if p.name.lower() in SPLIT_NAMES}
    if "train" not in splits.values():
        splits = {root: "all"}
    elif len(set(splits.values())) < len(splits):
        raise UsageError(f"{root} has two folders for one split: {', '.join(sorted(p.name for p in splits))}")
    entries: list[Entry] = []
    empty: list[str] = []
    for base, split in splits.items():
        for label in (p for p in visible(base) if p.is_dir()):
            found = [Entry(split, label.name, path) for path in walk_files(label, root)]
            entries += found
            if split in ("train", "all") and not found:
                empty.append(label.relative_to(root).as_posix())
    if entries and empty:
        raise UsageError(f"{root}: the class folder {empty[0]!r} is empty; put images into it, or remove it")
    if not entries:
        raise UsageError(f"{root} has no class folders with images: make one folder per class, with its images inside")
    return entries


def walk_files(folder: Path, root: Path) -> list[str]:
    """Return the visible files below ``folder`` as paths relative to ``root``, with forward slashes.

    Unreadable folders and links to folders are listed like files, so that they are counted and named as unreadable.
    Links are not followed, because they may form a cycle.
    """
    paths: list[str] = []
    closed: list[Path] = []
    for parent, subfolders, files in os.walk(folder, onerror=lambda error: closed.append(Path(error.filename))):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        names = sorted(f for f in files if not f.startswith("."))
        names += [s for s in subfolders if (Path(parent) / s).is_symlink()]
        inside = Path(parent).relative_to(root).as_posix()
        paths += [f"{inside}/{name}" for name in names]
    return paths + [path.relative_to(root).as_posix() for path in closed]


def image_sizes(root: str | Path) -> list[tuple[int, int]]:
    """Return (width, height) in pixels of every image file of a folder, from the headers, smallest area first."""
    names = [entry.path for entry in scan(Path(root))]
    sizes = [(header.width, header.height) for _, header in survey_files(Path(root), names) if header]
    return sorted(sizes, key=lambda size: size[0] * size[1])


def load_folder(root: str | Path, *, image_size: int = 0, channels: int = 0, allow_unreadable: bool = False) -> Dataset:
    """Return the data set in a folder of class folders.

    With ``train/`` and others inside, those are the splits, and a ``val/`` without a ``test/`` becomes the test split.
    Otherwise a fifth of every class becomes the test split, with a fixed seed.

    Args:
        root: The folder.
        image_size: The side, in pixels, of the square that images are fitted into. 0: their own size, at most 64.
        channels: 1 (gray) or 3 (RGB). 0: gray if all images are.
        allow_unreadable: Skip unreadable files even if they are more than 1%.

    Raises:
        UsageError: The folder has no classes or images, or is a run.
        ConvlensError: More than 1% of the files are unreadable, or the images do not fit on the disk.
    """
    root = Path(root).resolve()
    if (root / "config.json").is_file() and (root / "checkpoint").is_dir():
        raise UsageError(f"{root} is a run, not a data set; give the data that it was trained on, or resume the run")
    entries = scan(root)
    names = [entry.path for entry in entries]
    digests, headers = zip(*survey_files(root, names), strict=True)
    side, channels = choose_form(headers, image_size, channels)
    key = hashlib.sha256(repr((CACHE_VERSION, entries, digests)).encode()).hexdigest()
    folder = cache_dir() / "folders" / key[:32] / f"{side}-{channels}"
    pixels, unreadable = decode_cached(folder, root, names, digests, (len(names), channels, side, side))
    check_unreadable(root, unreadable, len(entries), allow_unreadable)
    if stays_on_disk(pixels.nbytes):
        logger.warning(
            f"{pixels.nbytes / 1e9:.1f} GB of images stay on disk, because they are more than a quarter of the memory; "
            "if reading them is slow, convert them to shards with convlens data pack"
        )
    kept = [entry for i, entry in enumerate(entries) if i not in unreadable]
    classes = tuple(sorted({entry.label for entry in entries if entry.split in ("train", "all")}))
    for entry in kept:
        if entry.label not in classes:
            raise UsageError(f"{root}: class {entry.label!r} is in {entry.split} but not in train")
    return make_dataset(root, kept, torch.from_numpy(pixels), classes, tuple(unreadable.values()))


def decode_cached(
    folder: Path, root: Path, names: Sequence[str], digests: Sequence[str], shape: tuple[int, int, int, int]
) -> Decoded:
    """Return the decoded files from the cache entry ``folder``, which is written first if necessary.

    Args:
        folder: The cache entry.
        root: The folder of the files.
        names: Their paths below ``root``.
        digests: Their SHA-256.
        shape: (N, C, H, W), with N the number of files.

    Raises:
        ConvlensError: The images do not fit on the disk, and not into a quarter of the memory.
    """

    def decode() -> Iterator[Decoded]:
        return decode_files(root, names, digests, shape[1], shape[2])

    cached = read_cache(folder, shape)
    if cached is None:
        try:
            write_cache(folder, decode(), shape)
        except OSError as error:
            if stays_on_disk(math.prod(shape)):
                raise no_room(math.prod(shape), error) from None
        cached = read_cache(folder, shape)
    return cached or keep_in_memory(decode(), shape)


def choose_form(headers: Sequence[Header | None], image_size: int, channels: int) -> tuple[int, int]:
    """Return (side, channels) for all images: the requested ones, or a choice from the headers of the files."""
    known = [header for header in headers if header is not None]
    if not known:
        return image_size or MAX_AUTO_SIZE, channels or 3
    median = sorted(min(header.width, header.height) for header in known)[len(known) // 2]
    gray = all(header.gray for header in known)
    return image_size or min(median, MAX_AUTO_SIZE), channels or (1 if gray else 3)


def check_unreadable(root: Path, unreadable: dict[int, str], total: int, allowed: bool) -> None:
    """Raise ConvlensError if more than 1% of the files are unreadable, unless that is allowed."""
    if len(unreadable) > MAX_UNREADABLE_FRACTION * total and not allowed:
        some = first_few(list(unreadable.values()), 3, "; ")
        raise ConvlensError(
            f"{len(unreadable)} of {total} files in {root} cannot be read, more than 1%: {some}. "
            "Remove them, or skip them with `allow_unreadable`"
        )


def make_dataset(
    root: Path,
    entries: Sequence[Entry],
    images: Tensor,
    classes: tuple[str, ...],
    unreadable: tuple[str, ...],
) -> Dataset:
    """Sort decoded images, uint8 (N, C, H, W), into splits."""
    index = {label: i for i, label in enumerate(classes)}
    labels = torch.tensor([index[entry.label] for entry in entries], dtype=torch.int64)
    merged = Split(images=images, labels=labels, ids=[entry.path for entry in entries])

    def part(name: str) -> Split | None:
        rows = torch.tensor([i for i, e in enumerate(entries) if e.split == name], dtype=torch.int64)
        return merged.select(rows) if len(rows) else None

    name = str(root)
    train, validation, test = part("train"), part("validation"), part("test")
    if any(entry.split == "all" for entry in entries):
        check_classes(name, classes, merged, where="the folder")
        train, test = merged.stratified_split(TEST_FRACTION, SPLIT_SEED)
        description = f"the folder is not split: {HELD_OUT}"
    else:
        train = train or merged.select(torch.empty(0, dtype=torch.int64))  # every file was unreadable
        check_classes(name, classes, train)
        description = "the folder's own splits"
        if test is None and validation is not None:
            test, validation = validation, None
            description = "no test folder: the validation folder is the test split, and selects no model"
        elif test is None:
            train, test = train.stratified_split(TEST_FRACTION, SPLIT_SEED)
            description = f"no test folder: {HELD_OUT}"
    return Dataset(
        name=root.name,
        source=str(root),
        classes=classes,
        train=train,
        test=test,
        validation=validation,
        split_description=description,
        unreadable=unreadable,
    )
