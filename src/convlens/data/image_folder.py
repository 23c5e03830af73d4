"""A folder of class folders, decoded once into a memory-mapped cache. The user's folder is only read."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convlens.data.cache import keep_in_memory, no_room, read_cache, stays_on_disk, write_cache
from convlens.data.dataset import HELD_OUT, SPLIT_SEED, TEST_FRACTION, Dataset, Split, check_classes
from convlens.data.decoding import Header, decode_files, survey_files
from convlens.data.images import InputStyle
from convlens.errors import ConvlensError, UsageError
from convlens.system.files import cache_dir
from convlens.system.text import first_few

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}

MAX_AUTO_SIZE = 64  # images up to this size keep it; larger photos are reduced to it unless --image-size asks

MAX_UNREADABLE_FRACTION = 0.01

CACHE_VERSION = 2  # raise when decoding changes, so that old caches are not used


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
                inside = Path(parent).relative_to(root).as_posix()
                shown = sorted(f for f in files if not f.startswith("."))
                # nor is a link to a folder followed, which may lead round in circles
                shown += [s for s in subfolders if (Path(parent) / s).is_symlink()]
                entries += [Entry(split, label.name, f"{inside}/{file}") for file in shown]
            entries += [Entry(split, label.name, folder.relative_to(root).as_posix()) for folder in closed]
            closed.clear()
            if split in ("train", "all") and len(entries) == before:
                empty.append(label.relative_to(root).as_posix())
    if entries and empty:
        raise UsageError(f"{root}: the class folder {empty[0]!r} is empty; put images into it, or remove it")
    if not entries:
        raise UsageError(f"{root} has no class folders with images: make one folder a class, images inside")
    return entries


def image_sizes(root: str | Path) -> list[tuple[int, int]]:
    """Return (width, height) of every image file of a folder, from the headers, smallest area first."""
    names = [entry.path for entry in scan(Path(root))]
    sizes = [(header.width, header.height) for _, header in survey_files(Path(root), names) if header]
    return sorted(sizes, key=lambda size: size[0] * size[1])


def load_folder(root: str | Path, *, image_size: int = 0, channels: int = 0, allow_unreadable: bool = False) -> Dataset:
    """Return the data set in a folder of class folders.

    ``image_size`` is the side of the square that every image is fitted into (0: the images' own size up to 64,
    else 64); ``channels`` 1 or 3 (0: 3 unless every image is grey). With ``train/`` and others inside, those are
    the splits, and a ``val/`` without a ``test/`` is kept as the test split; else a fifth of every class becomes
    the test split, by a fixed seed. Raises UsageError for a folder without classes or images, ConvlensError
    if more than 1% of the files are unreadable, unless ``allow_unreadable``.
    """
    root = Path(root).resolve()
    if (root / "config.json").is_file() and (root / "checkpoint").is_dir():
        raise UsageError(
            f"{root} is a run, not data: name what it was trained on (convlens train --resume goes on with it)"
        )
    entries = scan(root)
    names = [entry.path for entry in entries]
    digests, headers = zip(*survey_files(root, names), strict=True)
    key = hashlib.sha256(repr((CACHE_VERSION, entries, digests)).encode()).hexdigest()
    side, planes = choose_form(headers, image_size, channels)
    folder = cache_dir() / "folders" / key[:32] / f"{side}-{planes}"
    shape = (len(entries), planes, side, side)
    found = read_cache(folder, shape)
    if found is None:
        try:
            write_cache(folder, decode_files(root, names, digests, planes, side), shape)
        except OSError as error:
            if stays_on_disk(math.prod(shape)):
                raise no_room(math.prod(shape), error) from None
        found = read_cache(folder, shape)
    pixels, unreadable = found or keep_in_memory(decode_files(root, names, digests, planes, side), shape)
    check_unreadable(root, unreadable, len(entries), allow_unreadable)
    if stays_on_disk(pixels.nbytes):
        print(
            f"convlens: {pixels.nbytes / 1e9:.1f} GB of images stay on disk, for they are more than a quarter of the "
            "memory; if that is slow, pack them: convlens data pack",
            file=sys.stderr,
        )
    kept = [entry for i, entry in enumerate(entries) if i not in unreadable]
    classes = tuple(sorted({entry.label for entry in entries if entry.split in ("train", "all")}))
    for entry in kept:
        if entry.label not in classes:
            raise UsageError(f"{root}: class {entry.label!r} is in {entry.split} but not in train")
    return make_dataset(root, kept, torch.from_numpy(pixels), classes, tuple(unreadable.values()))


def choose_form(headers: Sequence[Header | None], image_size: int, channels: int) -> tuple[int, int]:
    """Choose (side, channels) that all images are brought to, unless they are asked for, from the files' headers."""
    known = [header for header in headers if header is not None]
    if not known:
        return image_size or MAX_AUTO_SIZE, channels or 3
    median = sorted(min(header.width, header.height) for header in known)[len(known) // 2]
    grey = all(header.grey for header in known)
    return image_size or min(median, MAX_AUTO_SIZE), channels or (1 if grey else 3)


def check_unreadable(root: Path, unreadable: dict[int, str], total: int, allowed: bool) -> None:
    """Raise ConvlensError that names the unreadable files if they are more than 1% and not allowed."""
    if len(unreadable) > MAX_UNREADABLE_FRACTION * total and not allowed:
        some = first_few(list(unreadable.values()), 3, "; ")
        raise ConvlensError(
            f"{len(unreadable)} of {total} files in {root} cannot be read, more than 1%: {some}. "
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
    return Dataset(root.name, str(root), classes, train, test, validation, InputStyle(), note, unreadable)
