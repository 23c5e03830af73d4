"""The work behind a request, off the event loop: pictures are decoded on threads, and nets run on what is there."""

from __future__ import annotations

import asyncio
import contextlib
import io
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Histogram
from python_multipart import parse_form
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File

from convlens.data.pictures import BadImage, Pixels, open_image
from convlens.errors import UsageError
from convlens.machine import available_cores
from convlens.shipping.onnx_predictor import BATCH, OnnxPredictor
from convlens.shipping.prediction import Prediction

MOST_IMAGES = 1000  # in a request
Answer = tuple[NDArray[np.float32], NDArray[np.bool_] | None]

DECODERS = ThreadPoolExecutor(available_cores(), "decode")


@dataclass(frozen=True)
class Job:
    """Pixels, uint8 (N, C, H, W), and who waits for what the net says of them."""

    pixels: Pixels
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Answer]

    def give(self, answer: Answer | Exception) -> None:
        """Hand over the answer, or what went wrong, from another thread; nobody may wait for it any more."""

        def give() -> None:
            if self.answer.done():
                return
            if isinstance(answer, Exception):
                self.answer.set_exception(answer)
            else:
                self.answer.set_result(answer)

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(give)


class Worker:
    """A net and its thread: whatever has come while it was busy goes through it together."""

    def __init__(self, predictor: OnnxPredictor, images: Counter, together: Histogram):
        self.predictor = predictor
        self._images, self._together = images, together
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    async def predict(
        self, body: bytes, content_type: str, *, top: int, raw: bool, coverage: float | None
    ) -> list[Prediction]:
        """Classify the pictures of a request; UsageError or BadImage if there are none that can be read."""
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(DECODERS, self.read, body, content_type, raw)
        job = Job(pixels, loop, loop.create_future())
        self._jobs.put(job)
        return self.predictor.interpret(*await job.answer, top, coverage)

    def read(self, body: bytes, content_type: str, raw: bool) -> Pixels:
        """Return the pictures of a request as the net's pixels, uint8 (N, C, H, W)."""
        contents = list_files(body, content_type) if content_type.startswith("multipart/form-data") else [body]
        adapted = []
        for number, content in enumerate(contents, start=1):
            name = "the image" if len(contents) == 1 else f"image {number} of {len(contents)}"
            adapted.append(self.predictor.preprocess.adapt(open_image(content, name), raw=raw))
        return np.stack(adapted)

    def _work(self) -> None:
        while True:
            jobs = [self._jobs.get()]
            while sum(len(job.pixels) for job in jobs) < BATCH:
                try:
                    jobs.append(self._jobs.get_nowait())
                except queue.Empty:
                    break
            try:
                self._run(jobs)
            except Exception as error:  # each request answers for itself
                for job in jobs:
                    job.give(error)

    def _run(self, jobs: list[Job]) -> None:
        pixels = np.concatenate([job.pixels for job in jobs])
        self._images.inc(len(pixels))
        self._together.observe(len(pixels))
        probabilities, known = self.predictor.run(pixels)
        start = 0
        for job in jobs:
            end = start + len(job.pixels)
            answer = probabilities[start:end], None if known is None else known[start:end]
            job.give(answer)
            start = end


def list_files(body: bytes, content_type: str) -> list[bytes]:
    """Return the files of a multipart form; UsageError if it is none, or holds none."""
    files: list[bytes] = []

    def add(file: File) -> None:
        if len(files) == MOST_IMAGES:
            raise UsageError(f"a request may have {MOST_IMAGES:,} images")
        file.file_object.seek(0)
        files.append(file.file_object.read())
        file.close()

    try:
        parse_form({"Content-Type": content_type.encode("latin-1")}, io.BytesIO(body), None, add)
    except FormParserError:
        raise UsageError("the body is no multipart form") from None
    if not files:
        raise BadImage("the form holds no file")
    return files
