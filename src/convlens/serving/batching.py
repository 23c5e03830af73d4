"""The work behind a request, off the event loop: pictures are decoded on threads, and nets run on what is there."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Histogram
from python_multipart import MultipartParser, create_form_parser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, MultipartState

from convlens.data.images import InvalidImageError, Pixels, open_image
from convlens.errors import UsageError
from convlens.explain.occlusion import Heatmap, Occlusion
from convlens.inference.onnx_runtime import BATCH_SIZE, OnnxPredictor
from convlens.inference.predictor import Prediction
from convlens.system.hardware import available_cores

MAX_IMAGES = 1000  # in a request

MAX_IMAGE_PIXELS = 25_000_000  # of one picture: a camera's 24 megapixels; every decoder may have one at a time

MAX_PIXELS = 100_000_000  # of all pictures in a request, as they come

MAX_INPUT_BYTES = 8 << 20  # of all pictures in a request, as the net sees them; of their probabilities as many

MAX_NAMED = 100_000  # classes named in the answer to a request: a few megabytes

FEW_NAMED = 100  # made sooner than handed to a thread

MAX_JOBS = 32  # decoded, that wait for the net

OPTIONS = ("model", "top", "adapt", "coverage", "label")  # they belong into the address

Output = tuple[NDArray[np.float32], NDArray[np.bool_] | None]  # probabilities (N, K), and which are known (N,)


class DeadlineExceeded(Exception):
    """There is no time left for a request: whoever asked has been told so."""


@dataclass(frozen=True)
class Job:
    """Pixels, uint8 (N, C, H, W), and who waits, until when, for what the net says of them."""

    pixels: Pixels
    until: float
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Output]

    def give(self, output: Output | Exception) -> None:
        """Hand over the net's output, or what went wrong, from another thread."""

        def give() -> None:
            if isinstance(output, Exception):
                self.answer.set_exception(output)
            else:
                self.answer.set_result(output)

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(give)


class BatchWorker:
    """A net and its threads: whatever has come while it was busy goes through it together."""

    def __init__(self, predictor: OnnxPredictor, images: Counter, together: Histogram):
        self.predictor = predictor
        self._images, self._together = images, together
        self._decoders = ThreadPoolExecutor(available_cores(), "decode")
        self.jobs: queue.Queue[Job] = queue.Queue(MAX_JOBS)
        threading.Thread(target=self._work, daemon=True).start()

    async def predict(
        self,
        files: Callable[[], list[bytes]],
        until: float,
        write: Callable[[list[Prediction]], bytes],
        *,
        top: int,
        adapt: bool,
        coverage: float | None,
    ) -> bytes:
        """Classify the pictures that ``files`` gives, before the clock is at ``until``; return what ``write`` makes.

        A large answer is built on a thread: it would block the event loop. Raises UsageError or InvalidImageError
        if there are no pictures that can be read, or the answer would be too large, and Late.
        """
        classes = len(self.predictor.classes)
        named = classes if coverage is not None else min(top, classes)  # a prediction set may hold every class
        probabilities, known = await self._ask(lambda: self.read(files, until, adapt, named), until)

        def answer() -> bytes:
            require_time(until)
            return write(self.predictor.interpret(probabilities, known, top, coverage))

        if len(probabilities) * named <= FEW_NAMED:
            return answer()
        return await asyncio.get_running_loop().run_in_executor(self._decoders, answer)

    async def explain(
        self, picture: bytes, until: float, *, raw: bool, label: str | None
    ) -> tuple[Prediction, Heatmap]:
        """Classify one picture, and return with it what the probability of ``label`` (by default its own) hangs on.

        Raises InvalidImageError if it cannot be read, UsageError if the input is too large, DeadlineExceeded.
        """
        covered: list[Occlusion] = []

        def cover() -> Pixels:
            occlusion = Occlusion.of(self.read(lambda: [picture], until, adapt)[0])
            if occlusion.nbytes > MAX_INPUT_BYTES:
                raise UsageError("this model takes images that are too large to be explained here")
            covered.append(occlusion)
            return occlusion.occlude()

        probabilities, known = await self._ask(cover, until)
        own = slice(len(probabilities) - 1, None)
        (prediction,) = self.predictor.interpret(probabilities[own], None if known is None else known[own])
        return prediction, covered[0].heatmap(probabilities, self.predictor.classes.index(label or prediction.label))

    async def _ask(self, make: Callable[[], Pixels], until: float) -> Output:
        """Return what the net says of the pixels that ``make`` gives on another thread."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Output] = loop.create_future()

        def decode() -> None:
            job = Job(make(), until, loop, answer)
            try:
                self.jobs.put(job, timeout=max(until - time.monotonic(), 0))
            except queue.Full:
                raise DeadlineExceeded from None

        await loop.run_in_executor(self._decoders, decode)
        return await answer

    def read(self, files: Callable[[], list[bytes]], until: float, adapt: bool, named: int = 1) -> Pixels:
        """Return the pictures of a request as the net's pixels, uint8 (N, C, H, W).

        Raises UsageError if they are too many, or the answer would be too large with ``named`` classes for each.
        """
        require_time(until)
        adapted: list[Pixels] = []
        seen, contents = 0, files()
        if len(contents) > (most := max(MAX_NAMED // named, 1)):
            raise UsageError(
                f"a request may have at most {most:,} images if each can be answered with {named:,} classes"
            )
        floats = 4 * len(self.predictor.classes)
        for number, content in enumerate(contents, start=1):
            require_time(until)
            name = "the image" if len(contents) == 1 else f"image {number} of {len(contents)}"
            image = open_image(content, name, MAX_IMAGE_PIXELS)
            seen += image.width * image.height
            if seen > MAX_PIXELS:
                raise UsageError(f"the images of a request may have at most {MAX_PIXELS:,} pixels together")
            adapted.append(self.predictor.preprocess.transform(image, adapt=not raw))
            if len(contents) * (larger := max(adapted[0].nbytes, floats)) > MAX_INPUT_BYTES:
                most = MAX_INPUT_BYTES // larger
                raise UsageError(f"a request may have at most {most:,} images for this model")
        return np.stack(adapted)

    def _work(self) -> None:
        while True:
            jobs = [self.jobs.get()]
            while sum(len(job.pixels) for job in jobs) < BATCH_SIZE:
                try:
                    jobs.append(self.jobs.get_nowait())
                except queue.Empty:
                    break
            in_time = []
            for job in jobs:
                if time.monotonic() > job.until:
                    job.give(DeadlineExceeded())
                else:
                    in_time.append(job)
            try:
                self._run(in_time)
            except Exception as error:
                for job in in_time:
                    job.give(error)

    def _run(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        pixels = np.concatenate([job.pixels for job in jobs])
        self._images.inc(len(pixels))
        self._together.observe(len(pixels))
        probabilities, known = self.predictor.run(pixels)
        start = 0
        for job in jobs:
            end = start + len(job.pixels)
            job.give((probabilities[start:end], None if known is None else known[start:end]))
            start = end


def require_time(until: float) -> None:
    """Raise Late if the clock is past ``until``."""
    if time.monotonic() > until:
        raise DeadlineExceeded


def list_files(body: bytes, content_type: str) -> list[bytes]:
    """Return the files of a multipart form; ``content_type`` names the boundary between them.

    Raises UsageError if it is none, not the whole of one, or holds anything else.
    """
    files: list[bytes] = []

    def add(file: File) -> None:
        if len(files) == MAX_IMAGES:
            raise UsageError(f"a request may have at most {MAX_IMAGES:,} images")
        file.file_object.seek(0)
        files.append(file.file_object.read())
        file.close()

    def refuse(field: Field) -> None:
        name = (field.field_name or b"").decode("utf-8", "replace")
        raise UsageError(
            f"{name} belongs into the address, as in /predict?{name}=..." if name in OPTIONS
            else f"the form has a field {name!r} that is no file"
        )  # fmt: skip

    try:
        parser = create_form_parser(
            {"Content-Type": content_type.encode("latin-1")}, refuse, add,
            config={"MAX_MEMORY_FILE_SIZE": len(body)},  # no file of a form is written to disk
        )  # fmt: skip
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise UsageError("the body is no multipart form") from None
    if not isinstance(parser.parser, MultipartParser) or parser.parser.state != MultipartState.END:
        raise UsageError("the form was cut short")
    if not files:
        raise InvalidImageError("the form holds no file")
    return files
