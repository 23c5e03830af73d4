"""`convlens serve` beside the endpoint that one writes with FastAPI and PyTorch: images a second, and latency."""

from __future__ import annotations

import asyncio
import contextlib
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, UploadFile
from PIL import Image

from benchmarks.harness import Record, table
from convlens.data.loading import load_dataset
from convlens.inference.classifier import Classifier

TOGETHER, CONNECTIONS, SECONDS = 100, 4, 8.0  # images in a form, forms under way, for so long
RATE, REQUESTS = 100, 1500  # single images a second, and how many
ROUNDS = 3


def plain_app() -> Any:
    """Return the endpoint as one writes it: decode, stack, run the net, where the request is handled."""
    net = Classifier.load("mnist").model.eval()  # the same net, that both run the same
    app = FastAPI()

    @app.post("/predict")
    async def predict(images: list[UploadFile]) -> list[dict[str, Any]]:
        arrays = [np.array(Image.open(file.file).convert("L")) for file in images]
        x = torch.from_numpy(np.stack(arrays)).unsqueeze(1).float() / 255
        with torch.no_grad():
            probabilities = net((x - 0.1307) / 0.3081).softmax(dim=1)
        best = probabilities.max(dim=1)
        return [
            {"label": int(label), "probability": float(share)}
            for label, share in zip(best.indices, best.values, strict=True)
        ]

    return app


@contextlib.contextmanager
def server(who: str) -> Iterator[int]:
    """Run a server; yield its port when it answers."""
    port = 8731 if who == "plain" else 8732
    ours = [sys.executable, "-m", "convlens", "serve", "mnist", "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", __name__, str(port)] if who == "plain" else ours)
    try:
        form = make_form([encode(np.zeros((28, 28), np.uint8))])
        while True:
            try:
                asyncio.run(ask(port, [form]))
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def encode(pixels: np.ndarray[Any, Any]) -> bytes:
    """Return an image, uint8 (H, W), as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_form(files: list[bytes]) -> bytes:
    """Return a whole request: files as a multipart form."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
        + file + b"\r\n" for file in files
    ]  # fmt: skip
    body = b"".join(parts) + b"--x--\r\n"
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(port: int, requests: list[bytes]) -> list[float]:
    """Send requests on one connection, one after another; return the seconds that each took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds = []
    for request in requests:
        begun = time.perf_counter()
        writer.write(request)
        await read_answer(reader)
        seconds.append(time.perf_counter() - begun)
    writer.close()
    return seconds


async def read_answer(reader: asyncio.StreamReader) -> None:
    """Read an answer, which must be 200."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    assert head.startswith("http/1.1 200"), head
    await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))


async def in_batches(port: int, forms: list[bytes]) -> float:
    """Return images a second, sent as forms of many, some at a time."""
    end, done = time.perf_counter() + SECONDS, 0

    async def client(number: int) -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            writer.write(forms[number % len(forms)])
            await read_answer(reader)
            done += TOGETHER
            number += CONNECTIONS
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(CONNECTIONS)))
    return done / (time.perf_counter() - begun)


async def one_by_one(port: int, requests: list[bytes]) -> list[float]:
    """Send single images at a fixed rate, come what may; return the seconds from when each was due to its answer."""
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    begun = time.perf_counter() + 0.1

    async def client(number: int) -> float:
        due = begun + number / RATE
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        reader, writer = free.pop(0) if free else await asyncio.open_connection("127.0.0.1", port)
        writer.write(requests[number % len(requests)])
        await read_answer(reader)
        free.append((reader, writer))
        return time.perf_counter() - due

    seconds = await asyncio.gather(*(client(number) for number in range(REQUESTS)))
    for _, writer in free:
        writer.close()
    return list(seconds)


def serve() -> tuple[list[Record], str]:
    """`convlens serve` beside a plain endpoint of FastAPI and PyTorch, with the same net, in turn."""
    files = [encode(image[0]) for image in load_dataset("mnist").test.images[:2000].numpy()]
    forms = [make_form(files[start : start + TOGETHER]) for start in range(0, len(files), TOGETHER)]
    singles = [make_form([file]) for file in files]
    records: list[Record] = []
    for _ in range(ROUNDS):
        for who in ("convlens serve", "plain"):
            with server(who) as port:
                asyncio.run(ask(port, [*forms[:3], *singles[:100]]))
                pace = asyncio.run(in_batches(port, forms))
                seconds = asyncio.run(one_by_one(port, singles))
            records.append(
                {
                    "who": who,
                    "images_a_second": pace,
                    "p50": float(np.quantile(seconds, 0.5)),
                    "p99": float(np.quantile(seconds, 0.99)),
                }
            )
            print(records[-1], flush=True)
    head = [
        "server",
        f"images/s, {TOGETHER} per request",
        f"ms per image at {RATE} requests/s: median",
        "99th percentile",
    ]
    return records, table(head, rows_of(records))


def rows_of(records: list[Record]) -> list[list[str]]:
    """Return the cells of the table: the median of the rounds, and the lowest and highest."""
    rows = []
    for who in ("convlens serve", "plain"):
        own = [record for record in records if record["who"] == who]
        cells = ["`convlens serve mnist`" if who != "plain" else "plain FastAPI and PyTorch"]
        for key, factor, digits in (("images_a_second", 1, 0), ("p50", 1000, 1), ("p99", 1000, 1)):
            values = [factor * record[key] for record in own]
            low, high = min(values), max(values)
            cells.append(f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})")
        rows.append(cells)
    return rows


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(plain_app(), port=int(sys.argv[1]), log_level="warning")
