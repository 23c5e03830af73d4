"""Dynamic batching: threads decode images, and each model runs on whatever has arrived while it was busy."""

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

MAX_IMAGES = 1000  # of a request
MAX_IMAGE_PIXELS = 25_000_000  # of one image: 24 megapixel cameras; each decoding thread may hold one
MAX_PIXELS = 100_000_000  # of all images of a request, as sent
MAX_INPUT_BYTES = 8 << 20  # of all images of a request as the model's input; the same limit for their probabilities
MAX_NAMED = 100_000  # classes named in a response: a few megabytes
MAX_INLINE_NAMED = 100  # in a response that is built on the event loop
MAX_JOBS = 32  # that are decoded and wait for the model
OPTIONS = ("model", "top", "adapt", "coverage", "label")  # query parameters

Output = tuple[NDArray[np.float32], NDArray[np.bool_] | None]  # probabilities (N, K), in distribution (N,)


class DeadlineExceeded(Exception):
    """The request's deadline has passed; the client has already received a 503."""


@dataclass(frozen=True, eq=False)
class Job:
    """Pixels, uint8 (N, C, H, W), that wait for the model, with their deadline (monotonic clock) and their future."""

    pixels: Pixels
    deadline: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Output]

    def set_result(self, output: Output | Exception) -> None:
        """Resolve the future from another thread."""

        def resolve() -> None:
            if isinstance(output, Exception):
                self.future.set_exception(output)
            else:
                self.future.set_result(output)

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(resolve)


class BatchWorker:
    """A model, the threads that decode its images, and the thread that runs it.

    There is no timer: an idle model starts at once, and a busy one takes everything that arrived as its next batch.
    """

    def __init__(self, predictor: OnnxPredictor, images: Counter, batch_size: Histogram):
        self.predictor = predictor
        self._images, self._batch_size = images, batch_size
        self._decoders = ThreadPoolExecutor(available_cores(), "decode")
        self.jobs: queue.Queue[Job] = queue.Queue(MAX_JOBS)
        threading.Thread(target=self._run_batches, daemon=True).start()

    async def predict(
        self,
        files: Callable[[], list[bytes]],
        deadline: float,
        write: Callable[[list[Prediction]], bytes],
        *,
        top: int,
        adapt: bool,
        coverage: float | None,
    ) -> bytes:
        """Classify the images that ``files`` returns on a decoding thread; return the body that ``write`` makes of it.

        Raises UsageError if there are too many images or named classes, InvalidImageError if there is none or one
        cannot be read, DeadlineExceeded if the monotonic clock is past ``deadline``.
        """
        classes = len(self.predictor.classes)
        named = classes if coverage is not None else min(top, classes)  # a prediction set may contain every class
        probabilities, known = await self._infer(lambda: self.decode(files, deadline, adapt, named), deadline)

        def respond() -> bytes:
            require_time(deadline)
            return write(self.predictor.interpret(probabilities, known, top, coverage))

        if len(probabilities) * named <= MAX_INLINE_NAMED:  # a larger response would block the event loop
            return respond()
        return await asyncio.get_running_loop().run_in_executor(self._decoders, respond)

    async def explain(
        self, image: bytes, deadline: float, *, adapt: bool, label: str | None
    ) -> tuple[Prediction, Heatmap]:
        """Classify one image; return the prediction and the occlusion map of ``label`` (by default, the predicted)."""
        occlusions: list[Occlusion] = []

        def occlude() -> Pixels:
            occlusion = Occlusion.of(self.decode(lambda: [image], deadline, adapt)[0])
            if occlusion.nbytes > MAX_INPUT_BYTES:
                raise UsageError("this model takes images that are too large to be explained here")
            occlusions.append(occlusion)
            return occlusion.occlude()

        probabilities, known = await self._infer(occlude, deadline)
        last = slice(len(probabilities) - 1, None)  # the image itself
        (prediction,) = self.predictor.interpret(probabilities[last], None if known is None else known[last])
        return prediction, occlusions[0].heatmap(probabilities, self.predictor.classes.index(label or prediction.label))

    async def _infer(self, make: Callable[[], Pixels], deadline: float) -> Output:
        """Return the model's output for the pixels that ``make`` returns on a decoding thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Output] = loop.create_future()

        def decode() -> None:
            job = Job(make(), deadline, loop, future)
            try:
                self.jobs.put(job, timeout=max(deadline - time.monotonic(), 0))
            except queue.Full:
                raise DeadlineExceeded from None

        await loop.run_in_executor(self._decoders, decode)
        return await future

    def decode(self, files: Callable[[], list[bytes]], deadline: float, adapt: bool, named: int = 1) -> Pixels:
        """Return the images of a request, which names ``named`` classes for each, as uint8 (N, C, H, W)."""
        require_time(deadline)
        adapted: list[Pixels] = []
        seen, contents = 0, files()
        if len(contents) > (most := max(MAX_NAMED // named, 1)):
            raise UsageError(
                f"a request may have at most {most:,} images if each can be answered with {named:,} classes"
            )
        for number, content in enumerate(contents, start=1):
            require_time(deadline)
            name = "the image" if len(contents) == 1 else f"image {number} of {len(contents)}"
            image = open_image(content, name, MAX_IMAGE_PIXELS)
            seen += image.width * image.height
            if seen > MAX_PIXELS:
                raise UsageError(f"the images of a request may have at most {MAX_PIXELS:,} pixels together")
            adapted.append(self.predictor.preprocess.transform(image, adapt=adapt))
            if len(contents) * (larger := max(adapted[0].nbytes, 4 * len(self.predictor.classes))) > MAX_INPUT_BYTES:
                most = MAX_INPUT_BYTES // larger
                raise UsageError(f"a request may have at most {most:,} images for this model")
        return np.stack(adapted)

    def _run_batches(self) -> None:
        while True:
            jobs = [self.jobs.get()]
            while sum(len(job.pixels) for job in jobs) < BATCH_SIZE:
                try:
                    jobs.append(self.jobs.get_nowait())
                except queue.Empty:
                    break
            in_time = [job for job in jobs if time.monotonic() <= job.deadline]
            for job in jobs:
                if job not in in_time:
                    job.set_result(DeadlineExceeded())
            try:
                self._run(in_time)
            except Exception as error:
                for job in in_time:
                    job.set_result(error)

    def _run(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        pixels = np.concatenate([job.pixels for job in jobs])
        self._images.inc(len(pixels))
        self._batch_size.observe(len(pixels))
        probabilities, known = self.predictor.run(pixels)
        start = 0
        for job in jobs:
            end = start + len(job.pixels)
            job.set_result((probabilities[start:end], None if known is None else known[start:end]))
            start = end


def require_time(deadline: float) -> None:
    """Raise DeadlineExceeded if the deadline has passed."""
    if time.monotonic() > deadline:
        raise DeadlineExceeded


def list_files(body: bytes, content_type: str) -> list[bytes]:
    """Return the files of a multipart form; UsageError if it is none, incomplete, or contains anything but files."""
    files: list[bytes] = []

    def add(file: File) -> None:
        if len(files) == MAX_IMAGES:
            raise UsageError(f"a request may have at most {MAX_IMAGES:,} images")
        file.file_object.seek(0)
        files.append(file.file_object.read())
        file.close()

    def refuse(field: Field) -> None:
        name = (field.field_name or b"").decode("utf-8", "replace")
        if name in OPTIONS:
            raise UsageError(f"`{name}` is a query parameter, as in /predict?{name}=...")
        raise UsageError(f"the form has a field {name!r} that is not a file")

    try:
        parser = create_form_parser(
            {"Content-Type": content_type.encode("latin-1")}, refuse, add,
            config={"MAX_MEMORY_FILE_SIZE": len(body)},  # no file of a form is written to disk
        )  # fmt: skip
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise UsageError("the body is not a multipart form") from None
    if not isinstance(parser.parser, MultipartParser) or parser.parser.state != MultipartState.END:
        raise UsageError("the form is incomplete")
    if not files:
        raise InvalidImageError("the form has no file")
    return files
