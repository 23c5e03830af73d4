"""An on-disk cache of decoded images: memory-mapped, written atomically, safe for concurrent processes.

Splits of up to a quarter of the memory are read into it; larger ones stay memory-mapped.
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

GATHER_BYTES = 64 << 20  # copied from disk to disk at a time
MAX_AGE_DAYS, MAX_INCOMPLETE_AGE_DAYS = 30, 1


def read_cache(folder: Path, shape: tuple[int, int, int, int]) -> Decoded | None:
    """Return the memory-mapped images and the unreadable files of a cached folder, or None.

    Args:
        folder: The cache entry.
        shape: (N, C, H, W) if all files were readable.
    """
    try:
        unreadable = json.loads((folder / "unreadable.json").read_text(encoding="utf-8"))
        with contextlib.suppress(OSError):  # another user may own it
            os.utime(folder)  # marks the entry as used, see remove_stale
        # Copy-on-write, because PyTorch needs writable memory and the cache must not change.
        images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
        if images.dtype != np.uint8 or images.shape != shape or len(unreadable) > len(images):
            return None
        return images[: len(images) - len(unreadable)], {int(i): str(reason) for i, reason in unreadable.items()}
    except (OSError, ValueError, EOFError, AttributeError, TypeError):
        return None


def write_cache(folder: Path, decoded: Iterable[Decoded], shape: tuple[int, int, int, int]) -> None:
    """Write decoded images to the cache entry ``folder``, atomically.

    Args:
        folder: The cache entry.
        decoded: The images, in chunks.
        shape: (N, C, H, W) if all files are readable.

    Raises:
        OSError: The disk is full or read-only.
    """
    remove_stale(folder.parent.parent)
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
        if read_cache(folder, shape) is None:  # no other process was faster
            shutil.rmtree(folder, ignore_errors=True)  # in case it is damaged
            with contextlib.suppress(OSError):
                temporary.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(caches: Path) -> None:
    """Remove entries that were not used for a month, and day-old incomplete ones of interrupted processes."""
    for folder in caches.glob("*/*"):
        days = MAX_INCOMPLETE_AGE_DAYS if folder.name.startswith(".new-") else MAX_AGE_DAYS
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > days * 24 * 3600:
                shutil.rmtree(folder)
                folder.parent.rmdir()  # fails unless it is empty


def keep_in_memory(decoded: Iterable[Decoded], shape: tuple[int, int, int, int]) -> Decoded:
    """Collect decoded images in memory, for when the cache cannot be written (full, read-only)."""
    collected, count, unreadable = np.empty(shape, np.uint8), 0, dict[int, str]()
    for images, reasons in decoded:
        unreadable |= reasons
        collected[count : count + len(images)] = images
        count += len(images)
    return collected[:count], unreadable


def stays_on_disk(size: int) -> bool:
    """Return True if ``size`` bytes of images are more than a quarter of the memory."""
    return 0 < memory_size() // 4 < size


def no_room(size: int, error: OSError) -> ConvlensError:
    """Return the error for ``size`` bytes of images that do not fit on the disk."""
    return ConvlensError(
        f"{cache_dir()} has no room for {size / 1e9:.1f} GB of images ({error.strerror or error}), more than a "
        "quarter of the memory; set CONVLENS_CACHE to a larger disk, or use a smaller `image_size`"
    )


def gather(images: Tensor, rows: Tensor) -> Tensor:
    """Return the images (N, C, H, W) at ``rows``, int64 (M,).

    More than a quarter of the memory is memory-mapped from an unlinked file in the user's cache, which disappears
    with its last user.

    Raises:
        ConvlensError: The disk is full.
    """
    shape = (len(rows), *images.shape[1:])
    if not stays_on_disk(math.prod(shape)):
        return images[rows]
    chunk = max(GATHER_BYTES // math.prod(shape[1:]), 1)
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".rows-", delete=False) as file:
            try:
                for some in torch.split(rows, chunk):
                    file.write(images[some].contiguous().numpy().data)
                file.flush()
                mapped = np.memmap(file.name, np.uint8, "c", shape=shape)
            finally:
                with contextlib.suppress(OSError):  # Windows keeps files that are in use
                    os.unlink(file.name)
    except OSError as error:
        raise no_room(math.prod(shape), error) from None
    return torch.from_numpy(mapped)
