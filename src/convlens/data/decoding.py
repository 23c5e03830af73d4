"""Image files read and decoded: a few right here, many by helpers, processes that start at once without PyTorch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from convlens.data.images import (
    FORMATS,
    QUIET,
    InvalidImageError,
    Pixels,
    fit_photo,
    image_pixels,
    is_grey,
    open_image,
    read_file,
    to_mode,
)
from convlens.errors import ConvlensError
from convlens.system.hardware import available_cores
from convlens.system.progress import ProgressBar

MIN_FILES_FOR_WORKERS = 1000  # files from which on it pays to start helpers

CHUNK = 250  # files that a helper is given at a time,

CHUNK_BYTES = 8 << 20  # if their pixels are no more than that

Decoded = tuple[Pixels, dict[int, str]]  # images (N, C, H, W), and why others cannot be read, by their place

Part = tuple[Pixels, list[Any]]  # what is made of a chunk of files: pixels, and plain values for JSON


class Header(NamedTuple):
    """What an image file says of itself."""

    width: int
    height: int
    grey: bool


def survey_files(root: Path, names: Sequence[str]) -> Iterator[tuple[str, Header | None]]:
    """Yield each file's SHA-256, or why it cannot be read, and its header, or None if it is no image."""
    for _, found in map_chunks("reading files", survey_chunk, root, names):
        yield from ((digest, header and Header(*header)) for digest, header in found)


def decode_files(
    root: Path, names: Sequence[str], digests: Sequence[str], channels: int, side: int
) -> Iterator[Decoded]:
    """Yield the images of these files, uint8 (n, C, side, side), in chunks.

    Of each chunk the images that can be read, and why the others cannot, by their place among all ``names``. Raises
    ConvlensError if a file is not the one with its SHA-256 among ``digests``, as :func:`survey_files` gave it.
    """
    start = 0
    for images, found in map_chunks("decoding images", decode_chunk, root, names, channels, side):
        for place, (digest, _) in enumerate(found, start):
            if digest != digests[place]:
                raise ConvlensError(f"{names[place]} changed while {root} was read; try again when nobody writes there")
        yield images, {place: why for place, (_, why) in enumerate(found, start) if why}
        start += len(found)


def survey_chunk(root: Path, names: Sequence[str]) -> Part:
    """Return no pixels, and of each file what :func:`survey_files` yields."""
    found: list[tuple[str, Header | None]] = []
    for name in names:
        try:
            content = read_file(f"{root}/{name}", name)
        except InvalidImageError as error:
            found.append((str(error), None))
            continue
        header = None
        # whatever is wrong with it, decoding it will say so
        with contextlib.suppress(Exception), QUIET, Image.open(io.BytesIO(content), formats=FORMATS) as image:
            header = Header(*image.size, is_grey(image))
        found.append((hashlib.sha256(content).hexdigest(), header))
    return np.empty(0, np.uint8), found


def decode_chunk(root: Path, names: Sequence[str], channels: int, side: int) -> Part:
    """Return the images of these files, and of each file its SHA-256 and, if it cannot be read, why."""
    images = np.empty((len(names), channels, side, side), np.uint8)
    number, found = 0, []
    for name in names:
        digest, why = "", ""
        try:
            content = read_file(f"{root}/{name}", name)
            digest = hashlib.sha256(content).hexdigest()
            images[number] = image_pixels(fit_photo(to_mode(open_image(content, name), channels), side, side))
            number += 1
        except InvalidImageError as error:
            why = str(error)
        found.append((digest or why, why))
    return images[:number], found


WORK: dict[str, Callable[..., Part]] = {work.__name__: work for work in (survey_chunk, decode_chunk)}


def map_chunks(title: str, work: Callable[..., Part], root: Path, names: Sequence[str], *form: int) -> Iterator[Part]:
    """Yield ``work`` of all the files, some at a time, in order; few results wait, for (channels, side) of ``form``."""
    many = len(names) >= MIN_FILES_FOR_WORKERS
    size = 1
    if many:
        size = max(min(CHUNK, CHUNK_BYTES // math.prod((*form, *form[1:]))), 1)
    chunks = [names[start : start + size] for start in range(0, len(names), size)]
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(ProgressBar(title, len(names)))
        results: Iterator[Part] = (work(root, chunk, *form) for chunk in chunks)
        if many:
            results = stack.enter_context(contextlib.closing(map_in_workers(work.__name__, root, chunks, *form)))
        for chunk, result in zip(chunks, results, strict=True):
            yield result
            meter.update(len(chunk))


def map_in_workers(work: str, root: Path, chunks: Sequence[Sequence[str]], *form: int) -> Generator[Part, None, None]:
    """Yield the work of the chunks, in order, done by as many helpers as there are cores."""
    count = min(available_cores(), len(chunks))
    idle: SimpleQueue[DecodeWorker] = SimpleQueue()
    waiting: deque[Future[Part]] = deque()

    def ask(chunk: Sequence[str]) -> Part:
        helper = idle.get()
        try:
            return helper.ask(work, str(root), chunk, *form)
        finally:
            idle.put(helper)

    helpers: list[DecodeWorker] = []
    pool = ThreadPoolExecutor(count)
    try:
        for _ in range(count):
            helpers.append(DecodeWorker())
            idle.put(helpers[-1])
        for chunk in chunks:
            waiting.append(pool.submit(ask, chunk))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for helper in helpers:
            helper.kill()
        pool.shutdown(cancel_futures=True)
        for helper in helpers:
            helper.close()


class DecodeWorker:
    """A process that works on chunks of files. It ends when this one does, however that ends."""

    def __init__(self) -> None:
        # Ctrl-C is for the process that asks
        first = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)"
        path = [entry for entry in sys.path if isinstance(entry, str)]
        code = f"{first}; sys.path = {path}; from convlens.data.decoding import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # NumPy computes nothing there
        )

    def ask(self, *question: Any) -> Part:
        """Return what the helper makes of (name of the work, root, names, ...)."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            shape, values = json.loads(self._process.stdout.readline())
            pixels = np.frombuffer(self._process.stdout.read(math.prod(shape)), np.uint8).reshape(shape)
        except (OSError, ValueError):
            code = self._process.wait()
            ended = "was killed" if code < 0 else f"ended with exit code {code}"
            raise ConvlensError(
                f"a process that reads images {ended}, perhaps for want of memory; try again with less else running"
            ) from None
        return pixels, values

    def kill(self) -> None:
        """End it, whatever it is doing; who waits for its answer gets an error."""
        self._process.kill()

    def close(self) -> None:
        """Clear up after it, when nobody waits for it any more."""
        with contextlib.suppress(OSError):
            self._process.communicate()


def worker_main() -> None:
    """Answer questions on standard input, a line each, until there are no more: what a helper does."""
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            work, root, names, *form = json.loads(line)
            pixels, values = WORK[work](Path(root), names, *form)
            sys.stdout.buffer.write(json.dumps([pixels.shape, values]).encode() + b"\n")
            sys.stdout.buffer.write(pixels.data)
            sys.stdout.buffer.flush()
