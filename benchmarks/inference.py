"""What models answer, and how fast: in PyTorch, ONNX Runtime, 8 bits and a browser; and how fast they are explained."""

from __future__ import annotations

import base64
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Record, load_named, percent, spread, table, timed
from convlens.data.loading import load_dataset
from convlens.explain.cam import class_activation_map
from convlens.export.html import render_playground
from convlens.export.load import load_onnx
from convlens.export.quantize import build_int8
from convlens.inference.classifier import Classifier
from convlens.inference.onnx_runtime import OnnxPredictor, embed_digest
from convlens.inference.store import resolve_bundle
from convlens.web.render import read_static

SHIPPED = ("digits", "mnist", "fashion-mnist", "cifar10")


def shipped_tests() -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the name of each model that comes with convlens, and its test images, uint8 (N, C, H, W)."""
    for name in SHIPPED:
        yield name, load_named(name).test.images.numpy()


def predict() -> tuple[list[Record], str]:
    """Latency of one image and throughput of many, with the models that come with convlens, in PyTorch and in ONNX."""
    records, rows = [], []
    for name, images in shipped_tests():
        engines = {"PyTorch": Classifier.load(name), "ONNX Runtime": load_onnx(name)}
        many = np.resize(images, (2000, *images.shape[1:]))
        answers: dict[str, np.ndarray[Any, Any]] = {}
        for engine, predictor in engines.items():
            answers[engine], _ = predictor.run(images)
            latency = [timed(lambda p=predictor, x=images[:1]: p.run(x)) * 1000 for _ in range(50)]
            pace = [2000 / timed(lambda p=predictor, x=many: p.run(x)) for _ in range(5)]
            record: Record = {"model": name, "engine": engine, "latency_ms": latency, "images_per_second": pace}
            rows.append([f"`{name}`", engine, *spread(latency), f"{statistics.median(pace):,.0f}", "", ""])
            records.append(record)
        one, other = answers.values()
        record["n"], record["drift"] = len(images), float(np.abs(one - other).max())
        record["same_label"] = float((one.argmax(axis=1) == other.argmax(axis=1)).mean())
        rows[-1][-2:] = [f"{record['drift']:.1e}", f"{record['same_label']:.2%} of {len(images):,}"]
    head = ["model", "engine", "one image: median, ms", "least, most", "images/s in batches of 500"]
    return records, table([*head, "largest probability difference", "same label"], rows)


IN_BROWSER = """<pre id="out"></pre><script>%(engine)s
const net = new Model(%(model)s, "%(weights)s");
const pixels = Uint8Array.from(atob("%(images)s"), (letter) => letter.charCodeAt(0));
const size = pixels.length / %(n)d, out = new Float32Array(%(n)d * (net.description.classes.length + 1));
const started = performance.now();
for (let i = 0; i < %(n)d; i++) {
  const { probabilities, inDistribution } = net.run(pixels.subarray(i * size, (i + 1) * size));
  out.set([...probabilities, inDistribution], i * (probabilities.length + 1));
}
const ms = (performance.now() - started) / %(n)d, bytes = new Uint8Array(out.buffer);
let text = "";
for (let i = 0; i < bytes.length; i += 1000) text += String.fromCharCode(...bytes.subarray(i, i + 1000));
document.getElementById("out").textContent = ms + " " + btoa(text);
</script>"""


def twin() -> tuple[list[Record], str]:
    """The html twins of the models that come with convlens, on all their test images, in a headless Chromium."""
    records, rows = [], []
    browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("bench.py twin needs Chromium")
    for name, images in shipped_tests():
        predictor = load_onnx(name)
        expected, known = predictor.run(images)
        page = render_playground(predictor)
        model, weights = (page.split(f'id="{part}">')[1].split("</script>")[0] for part in ("model", "weights"))
        parts = {"engine": read_static("inference.js"), "model": model, "weights": weights, "n": len(images)}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "playground.html"
            file.write_text(IN_BROWSER % {**parts, "images": base64.b64encode(images.tobytes()).decode()})
            command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
            dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ms, encoded = dom.split('<pre id="out">')[1].split("</pre>")[0].split()
        answers = np.frombuffer(base64.b64decode(encoded), np.float32).reshape(len(images), -1)
        drift = np.abs(answers[:, :-1] - expected).max()
        same = (answers[:, :-1].argmax(axis=1) == expected.argmax(axis=1)).mean()
        alike = (answers[:, -1].astype(bool) == known).mean()
        about = {"model": name, "n": len(images), "bytes": len(page.encode()), "ms": float(ms)}
        records.append({**about, "drift": float(drift), "same_label": float(same), "same_known": float(alike)})
        figures = [f"{about['bytes']:,}", f"{float(ms):.1f}", f"{drift:.1e}", f"{same:.2%}", f"{alike:.2%}"]
        rows.append([f"`{name}`", *figures])
    head = ["model", "bytes of the page", "ms per image", "largest probability difference"]
    return records, table([*head, "same label", "same OOD decision"], rows)


def int8() -> tuple[list[Record], str]:
    """The models that come with convlens in 8 bits: size, pace and accuracy beside 32 bits."""
    records, rows = [], []
    for name in SHIPPED:
        dataset = load_named(name)
        model, exact, cost = build_int8(resolve_bundle(name), dataset)
        contents = [embed_digest(m.SerializeToString()) for m in (exact, model)]
        engines = [OnnxPredictor(content, name) for content in contents]
        images = np.resize(dataset.test.images.numpy(), (2000, *dataset.shape))
        seconds: list[list[float]] = [[], []]
        for _ in range(6):
            for own, engine in zip(seconds, engines, strict=True):
                own.append(timed(partial(engine.run, images)))
        paces = [len(images) / statistics.median(own[1:]) for own in seconds]
        sizes = [len(content) for content in contents]
        records.append({"model": name, "bytes": sizes, "seconds": seconds, **vars(cost)})
        rows.append(
            [f"`{name}`", *(f"{size:,}" for size in sizes), *(f"{pace:,.0f}" for pace in paces), percent(cost.before),
             percent(cost.after), percent(cost.agreement)]
        )  # fmt: skip
    head = ["model", "bytes, 32 bits", "8 bits", "images/s, 32 bits", "8 bits", "test accuracy, 32 bits", "8 bits"]
    return records, table([*head, "same label"], rows)


def see() -> tuple[list[Record], str]:
    """Seconds of a whole `convlens explain` of one MNIST image, and of one class activation map once all is loaded."""
    image = load_dataset("mnist").test.images[0, 0].numpy()
    classifier = Classifier.load("mnist")
    x = classifier.preprocess.normalizer()(torch.from_numpy(image)[None, None])
    maps = [1000 * timed(partial(class_activation_map, classifier.model, x, 7)) for _ in range(60)][10:]
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(image).save(Path(folder) / "seven.png")
        command = [sys.executable, "-m", "convlens", "explain", "mnist", f"{folder}/seven.png", "--out"]
        run = partial(subprocess.run, check=True, capture_output=True)
        whole = [timed(partial(run, [*command, f"{folder}/{number}"])) for number in range(6)][1:]
    records = [{"what": "explain", "seconds": whole}, {"what": "class activation map", "milliseconds": maps}]
    rows = [["`convlens explain mnist seven.png`, cold, s", *spread(whole)],
            ["one class activation map, warm, ms", *spread(maps)]]  # fmt: skip
    return records, table(["", "median", "fastest, slowest"], rows)
