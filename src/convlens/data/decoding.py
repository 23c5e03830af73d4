"""Read and decode image files: few in this process, many in worker processes that start fast, without PyTorch."""

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
    InvalidImageError,
    Pixels,
    fit_photo,
    image_pixels,
    is_gray,
    no_warnings,
    open_image,
    read_file,
    to_mode,
)
from convlens.errors import ConvlensError
from convlens.system.hardware import available_cores
from convlens.system.progress import ProgressBar

MIN_FILES_FOR_WORKERS = 1000  # fewer files take less time than starting the workers
CHUNK_FILES = 250  # the files that a worker gets at a time, at most,
CHUNK_BYTES = 8 << 20  # and the bytes of their pixels

Decoded = tuple[Pixels, dict[int, str]]  # images (N, C, H, W), and the index and error of each unreadable file
ChunkResult = tuple[Pixels, list[Any]]  # pixels, and JSON values


class Header(NamedTuple):
    """Size and color of an image, from the header of its file."""

    width: int
    height: int
    gray: bool


def survey_files(root: Path, names: Sequence[str]) -> Iterator[tuple[str, Header | None]]:
    """Yield the SHA-256 of each file, or why it cannot be read, and its header, or None if it is not an image."""
    for _, found in map_chunks("reading files", survey_chunk, root, names):
        yield from ((digest, header and Header(*header)) for digest, header in found)


def decode_files(
    root: Path, names: Sequence[str], digests: Sequence[str], channels: int, side: int
) -> Iterator[Decoded]:
    """Decode files in chunks.

    Args:
        root: The folder of the files.
        names: Their paths below ``root``.
        digests: Their SHA-256, from :func:`survey_files`.
        channels: 1 (gray) or 3 (RGB).
        side: The side, in pixels, of the square that the images are fitted into.

    Yields:
        The readable images of a chunk, uint8 (n, channels, side, side), and why others cannot be read, by their index
        in ``names``.

    Raises:
        ConvlensError: A file has changed since its digest was taken.
    """
    start = 0
    for images, found in map_chunks("decoding images", decode_chunk, root, names, channels, side):
        for i, (digest, _) in enumerate(found, start):
            if digest != digests[i]:
                raise ConvlensError(f"{names[i]} changed while {root} was read; try again when no program writes there")
        yield images, {i: reason for i, (_, reason) in enumerate(found, start) if reason}
        start += len(found)


def survey_chunk(root: Path, names: Sequence[str]) -> ChunkResult:
    """Return no pixels, and for each file what :func:`survey_files` yields."""
    found: list[tuple[str, Header | None]] = []
    for name in names:
        try:
            content = read_file(f"{root}/{name}", name)
        except InvalidImageError as error:
            found.append((str(error), None))
            continue
        header = None
        # Errors are reported when the file is decoded.
        with contextlib.suppress(Exception), no_warnings, Image.open(io.BytesIO(content), formats=FORMATS) as image:
            header = Header(*image.size, is_gray(image))
        found.append((hashlib.sha256(content).hexdigest(), header))
    return np.empty(0, np.uint8), found


def decode_chunk(root: Path, names: Sequence[str], channels: int, side: int) -> ChunkResult:
    """Return the readable images, and for each file its SHA-256 and, if it cannot be read, the reason."""
    images = np.empty((len(names), channels, side, side), np.uint8)
    count, found = 0, []
    for name in names:
        digest, reason = "", ""
        try:
            content = read_file(f"{root}/{name}", name)
            digest = hashlib.sha256(content).hexdigest()
            images[count] = image_pixels(fit_photo(to_mode(open_image(content, name), channels), side, side))
            count += 1
        except InvalidImageError as error:
            reason = str(error)
        found.append((digest or reason, reason))
    return images[:count], found


TASKS: dict[str, Callable[..., ChunkResult]] = {task.__name__: task for task in (survey_chunk, decode_chunk)}


def map_chunks(
    title: str, task: Callable[..., ChunkResult], root: Path, names: Sequence[str], *form: int
) -> Iterator[ChunkResult]:
    """Yield ``task(root, chunk, *form)`` for chunks of ``names``, in order, with a progress bar.

    ``form`` is (channels, side) of the decoded images; it bounds the memory of the results.
    """
    parallel = len(names) >= MIN_FILES_FOR_WORKERS
    size = max(min(CHUNK_FILES, CHUNK_BYTES // math.prod((*form, *form[1:]))), 1) if parallel else 1
    chunks = [names[start : start + size] for start in range(0, len(names), size)]
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ProgressBar(title, len(names)))
        results: Iterator[ChunkResult] = (task(root, chunk, *form) for chunk in chunks)
        if parallel:
            results = stack.enter_context(contextlib.closing(map_in_workers(task.__name__, root, chunks, *form)))
        for chunk, result in zip(chunks, results, strict=True):
            yield result
            progress.update(len(chunk))


def map_in_workers(
    task: str, root: Path, chunks: Sequence[Sequence[str]], *form: int
) -> Generator[ChunkResult, None, None]:
    """Yield the results of ``task`` for each chunk, in order, with one worker process per core."""
    count = min(available_cores(), len(chunks))
    idle: SimpleQueue[DecodeWorker] = SimpleQueue()
    pending: deque[Future[ChunkResult]] = deque()

    def run(chunk: Sequence[str]) -> ChunkResult:
        worker = idle.get()
        try:
            return worker.run(task, str(root), chunk, *form)
        finally:
            idle.put(worker)

    workers: list[DecodeWorker] = []
    pool = ThreadPoolExecutor(count)
    try:
        for _ in range(count):
            workers.append(DecodeWorker())
            idle.put(workers[-1])
        for chunk in chunks:
            pending.append(pool.submit(run, chunk))
            if len(pending) > 2 * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for worker in workers:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class DecodeWorker:
    """A process that runs tasks on chunks of files. It ends with this process, however that ends."""

    def __init__(self) -> None:
        ignore_sigint = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # the parent handles Ctrl-C
        path = [entry for entry in sys.path if isinstance(entry, str)]
        code = f"{ignore_sigint}; sys.path = {path}; from convlens.data.decoding import worker_main; worker_main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a worker needs no threads in NumPy
        )

    def run(self, *request: Any) -> ChunkResult:
        """Return the result of (name of the task, root, names, ...); ConvlensError if the worker died."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            shape, values = json.loads(self._process.stdout.readline())
            pixels = np.frombuffer(self._process.stdout.read(math.prod(shape)), np.uint8).reshape(shape)
        except (OSError, ValueError):
            code = self._process.wait()
            ended = "was killed" if code < 0 else f"ended with exit code {code}"
            raise ConvlensError(
                f"a process that reads images {ended}, perhaps because memory ran out; close other programs and retry"
            ) from None
        return pixels, values

    def kill(self) -> None:
        """Kill the process; a thread that waits for its result gets an error."""
        self._process.kill()

    def close(self) -> None:
        """Release the process after no thread waits for it."""
        with contextlib.suppress(OSError):
            self._process.communicate()


def worker_main() -> None:
    """Run the tasks that arrive on standard input, one JSON line each, until it closes."""
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            task, root, names, *form = json.loads(line)
            pixels, values = TASKS[task](Path(root), names, *form)
            sys.stdout.buffer.write(json.dumps([pixels.shape, values]).encode() + b"\n")
            sys.stdout.buffer.write(pixels.data)
            sys.stdout.buffer.flush()
