"""Decoded images on disk: memory-mapped, there whole or not at all, safe beside other processes.

What is less than a quarter of the memory is read into it when a split is made; the rest stays on disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convlens.data.decoding import Decoded
from convlens.errors import ConvlensError
from convlens.system.files import cache_dir, fsync
from convlens.system.hardware import memory_size

GATHER_BYTES = 64 << 20  # bytes that are copied from disk to disk at a time


def read_cache(folder: Path, shape: tuple[int, int, int, int]) -> Decoded | None:
    """Return the memory-mapped images and the unreadable files of an earlier decoding, if there was one.

    ``shape`` is that of all of them, (N, C, H, W); the last rows are empty where some cannot be read.
    """
    try:
        unreadable = json.loads((folder / "unreadable.json").read_text(encoding="utf-8"))
        # copy-on-write: PyTorch wants writable memory, and nothing may ever write to the cache
        with contextlib.suppress(OSError):  # it may be another user's
            os.utime(folder)  # it is in use
        images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
        if images.dtype != np.uint8 or images.shape != shape or len(unreadable) > len(images):
            return None
        return images[: len(images) - len(unreadable)], {int(i): str(why) for i, why in unreadable.items()}
    except (OSError, ValueError, EOFError, AttributeError, TypeError):
        return None


def write_cache(folder: Path, decoded: Iterable[Decoded], shape: tuple[int, int, int, int]) -> None:
    """Store decoded images as they come, so that ``folder`` appears whole or not at all; OSError if there is no room.

    ``shape`` is that of all of them, (N, C, H, W).
    """
    remove_old(folder.parent.parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        unreadable: dict[int, str] = {}
        with open(temporary / "images.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for images, reasons in decoded:
                unreadable |= reasons
                file.write(images.data)
            file.truncate(file.tell() + len(unreadable) * math.prod(shape[1:]))
        (temporary / "unreadable.json").write_text(json.dumps(unreadable), encoding="utf-8")
        for path in (temporary / "images.npy", temporary / "unreadable.json", temporary):
            fsync(path)
        if read_cache(folder, shape) is None:  # else another process was first
            shutil.rmtree(folder, ignore_errors=True)  # it is damaged, if it is there at all
            with contextlib.suppress(OSError):
                temporary.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_old(caches: Path) -> None:
    """Remove what has not been used for a month, and what was left half written, by Ctrl-C, a day ago or before."""
    for folder in caches.glob("*/*"):
        days = 1 if folder.name.startswith(".new-") else 30
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > days * 24 * 3600:
                shutil.rmtree(folder)
                folder.parent.rmdir()  # if nothing else is in it


def keep_in_memory(decoded: Iterable[Decoded], shape: tuple[int, int, int, int]) -> Decoded:
    """Return decoded images, and why others are not, where the cache cannot be written (full, read-only)."""
    everything, number, unreadable = np.empty(shape, np.uint8), 0, dict[int, str]()
    for images, reasons in decoded:
        unreadable |= reasons
        everything[number : number + len(images)] = images
        number += len(images)
    return everything[:number], unreadable


def stays_on_disk(size: int) -> bool:
    """Say whether so many bytes of images are too many to hold in memory: more than a quarter of it."""
    return 0 < memory_size() // 4 < size


def no_room(size: int, error: OSError) -> ConvlensError:
    """Return the error that says that so many bytes of images found no room."""
    return ConvlensError(
        f"{cache_dir()} has no room for {size / 1e9:.1f} GB of images ({error.strerror or error}), more than a "
        "quarter of the memory; set CONVLENS_CACHE to a larger disk, or take a smaller --image-size"
    )


def gather(images: Tensor, rows: Tensor) -> Tensor:
    """Return the images (N, C, H, W) at ``rows``, int64 (M,): in memory, or, if they are many, in a file of their own.

    That file, in the user's cache, has no name any more when this returns, and is gone with its last user. Raises
    ConvlensError if the disk has no room for it.
    """
    shape = (len(rows), *images.shape[1:])
    if not stays_on_disk(math.prod(shape)):
        return images[rows]
    some = max(GATHER_BYTES // math.prod(shape[1:]), 1)
    place = cache_dir()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place, prefix=".rows-", delete=False) as file:
            try:
                for part in torch.split(rows, some):
                    file.write(images[part].contiguous().numpy().data)
                file.flush()
                mapped = np.memmap(file.name, np.uint8, "c", shape=shape)
            finally:
                with contextlib.suppress(OSError):  # Windows keeps it while it is in use
                    os.unlink(file.name)
    except OSError as error:
        raise no_room(math.prod(shape), error) from None
    return torch.from_numpy(mapped)
