"""Measure speed, one section after another, and write JSON records and the tables of docs/benchmarks.md.

    python benchmarks/bench.py                    # all sections but gpu
    python benchmarks/bench.py commands overhead  # some

Nothing else should run meanwhile. What is compared runs in turn within one section, so that a slow minute of the
machine slows both; figures are medians with the fastest and the slowest, or ratios of pairs. CONVLENS_DATA names
real data.
"""

from __future__ import annotations

import convlens  # first: it says how OpenMP's threads wait, which PyTorch reads when it is loaded

# isort: split
import base64
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contenders
import numpy as np
import scale
import serving
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from results import put

from convlens.data.augment import mirror
from convlens.data.catalog import load_dataset
from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.explain.attribution import class_activation_map
from convlens.models import create_model, summarise
from convlens.run import Run
from convlens.runtime import choose_device, describe_machine, keep_memory, use_threads
from convlens.shipping.classifier import Classifier
from convlens.shipping.int8 import build_int8
from convlens.shipping.onnx_predictor import OnnxPredictor, load_onnx, seal
from convlens.shipping.places import find_bundle
from convlens.shipping.twin import make_page, read_part
from convlens.training.budget import parse_budget
from convlens.training.engine import fit
from convlens.training.optim import learning_rate, make_loss, make_optimizer
from convlens.training.precision import autocast
from convlens.training.recipe import Recipe
from convlens.training.recipes import get_recipe

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
RECORDS = Path(__file__).parent / "records"
CPU = torch.device("cpu")
VERSIONS = ("convlens", "numpy", "onnxruntime", "pillow", "scikit-learn")  # PyTorch's is the machine's
Record = dict[str, Any]
Section = Callable[[], tuple[list[Record], str]]  # gives its records, and their table


def timed(work: Callable[[], object]) -> float:
    """Return the wall seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(seconds: list[float], digits: int = 2) -> str:
    """Return median, fastest and slowest as cells of a table."""
    return f"{statistics.median(seconds):.{digits}f} | {min(seconds):.{digits}f}, {max(seconds):.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


# a net's pace


def peak(precision: str, size: int = 2048, repeats: int = 12) -> float:
    """Return the GFLOP/s of a square matrix product, the fastest of some: what this machine can do at most."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(repeats)) / 1e9


NETS = [  # net, options, image (C, H, W), batch
    ("tiny", {}, (1, 28, 28), 512),
    ("small", {}, (1, 28, 28), 256),
    ("mnist-4conv", {}, (1, 28, 28), 512),
    ("whitened", {"filters": 32}, (3, 32, 32), 250),
    ("whitened", {"filters": 64}, (3, 32, 32), 250),
    ("residual", {"filters": 48}, (1, 28, 28), 250),
    ("fashion-2conv", {}, (1, 28, 28), 100),
    ("folder-cnn", {}, (3, 64, 64), 32),
    ("cifar-lenet", {}, (3, 32, 32), 32),
]


def arithmetic() -> tuple[list[Record], str]:
    """Images/s and GFLOP/s of training, per net, beside the peak of a matrix product measured in the same run."""
    keep_memory()  # as fit() does
    records, rows = [], []
    for name, options, shape, batch in NETS:
        for precision in ("bf16", "fp32"):
            top = peak(precision)
            channels, height, width = shape
            net = create_model(name, channels=channels, height=height, width=width, classes=10, **options)
            flops = 3 * sum(layer.flops for layer in summarise(net, *shape))
            step = make_step(net, Recipe(epochs=1, precision=precision), shape, batch)
            seconds = [timed(step) for _ in range(12)][2:]  # warmed up
            pace = batch / statistics.median(seconds)
            share = flops * pace / 1e9 / top
            label = " ".join([name, *(f"--{key} {value}" for key, value in options.items())])
            records.append(
                {"net": label, "precision": precision, "batch": batch, "seconds": seconds, "flops": flops, "peak": top}
            )
            rows.append(
                [f"`{label}`", precision, f"{flops / 1e6:,.0f}", f"{pace:,.0f}", f"{flops * pace / 1e9:,.0f}",
                 f"{top:,.0f}", f"{share:.0%}"]
            )  # fmt: skip
    head = ["net", "arithmetic", "MFLOPs an image (forward and backward)", "images/s", "GFLOP/s",
            "GFLOP/s of a matrix product", "share"]  # fmt: skip
    return records, table(head, rows)


def make_step(net: torch.nn.Module, recipe: Recipe, shape: tuple[int, int, int], batch: int) -> Callable[[], object]:
    """Return one training step on random images."""
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    optimizer, compute_loss = make_optimizer(net, recipe), make_loss(recipe, net)

    def step() -> None:
        with autocast(recipe.precision, CPU):
            logits = net(images)
        optimizer.zero_grad()
        compute_loss(logits.float(), labels).backward()
        optimizer.step(0.01)

    return step


# fit() beside a bare loop


def bare_loop(net: torch.nn.Module, dataset: Dataset, recipe: Recipe) -> None:
    """Train as fit() does, written out by hand, with nothing that is not arithmetic."""
    preprocess = Preprocess.measure(dataset.train.images, dataset.style)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) * 255 for v in (preprocess.mean, preprocess.std))
    images, labels = dataset.train.images, dataset.train.labels
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(net, recipe)
    steps = len(labels) // recipe.batch_size
    total = recipe.total_steps(steps)
    first = torch.rand(len(labels)) < 0.5
    for step in range(total):
        epoch, index = divmod(step, steps)
        if index == 0:
            order = torch.randperm(len(labels))
        rows = order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
        x = (images[rows].float() - mean) / std
        if recipe.flip:
            x = mirror(x, first[rows] ^ bool(epoch % 2))
        with autocast(recipe.precision, CPU):
            logits = net(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(learning_rate(recipe, step, total, steps))


def overhead() -> tuple[list[Record], str]:
    """What fit() costs over a bare loop with the same net, images and steps: paired runs, in turn."""
    mnist = load_dataset("mnist")
    recipe = get_recipe("mnist-99").override(precision="bf16")
    records: list[Record] = []

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        return create_model(recipe.model, channels=1, height=28, width=28, classes=10)

    loops = {
        "bare": lambda net: bare_loop(net, mnist, recipe),
        "fit": lambda net: list(fit(net, mnist, recipe)),
    }
    for turn in range(62):
        pair = {}
        for name in sorted(loops, reverse=turn % 2 == 1):  # each is the first in every second pair
            pair[name] = timed(partial(loops[name], fresh()))
        records.append(pair)
    records = records[2:]  # warmed up
    ratios = [pair["fit"] / pair["bare"] for pair in records]
    rows = [
        ["bare loop", spread([pair["bare"] for pair in records])],
        ["`fit()`", spread([pair["fit"] for pair in records])],
        ["ratio, pair by pair", spread(ratios, 3)],
    ]
    return records, table(["`mnist-99`, 112 steps", "median, s", "least, most"], rows)


# whole commands


BUDGETS = [
    "digits --budget 10s",
    "mnist --budget 20s",
    "fashion-mnist --budget 60s",
    "{cifar} --recipe cifar10-90 --budget 2m",
]


def budget() -> tuple[list[Record], str]:
    """Whole commands with a budget: the seconds asked and taken, the recipe picked, and the test accuracy."""
    records, rows = [], []
    for arguments in (text.format(cifar=cifar_name()) for text in BUDGETS):
        asked = parse_budget(arguments.split()[-1])
        with tempfile.TemporaryDirectory() as folder:
            command = ["convlens", "train", *arguments.split(), "--out", f"{folder}/run"]
            taken = timed(partial(subprocess.run, command, check=True, capture_output=True))
            run = Run(f"{folder}/run")
            recipe, accuracy = run.config["recipe"]["name"], run.accuracy
        told = {"arguments": arguments, "asked": asked, "taken": taken, "recipe": recipe, "accuracy": accuracy}
        records.append(told)
        rows.append([f"`train {arguments}`", f"`{recipe}`", f"{taken:.1f}", f"{taken / asked:.2f}", f"{accuracy:.2%}"])
    return records, table(["command", "recipe", "taken, s", "share of what was asked", "test accuracy"], rows)


COMMANDS = [
    "convlens --help",
    "convlens predict mnist scan.png",
    "convlens train digits --epochs 1",
    "convlens train digits",
    "convlens train mnist --recipe mnist-99",
]


def commands() -> tuple[list[Record], str]:
    """Whole commands from shell to prompt, in an empty folder, after one that warms the disk's cache."""
    records, rows = [], []
    # as a user's shell has it: Python keeps its compiled files
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        page = Image.new("L", (300, 400), 255)
        ImageDraw.Draw(page).line([(150, 80), (150, 320)], fill=0, width=30)
        page.save(Path(folder) / "scan.png")
        for command in COMMANDS:

            def run(command: str = command) -> None:
                subprocess.run(command.split(), cwd=folder, check=True, capture_output=True, env=environment)

            run()
            seconds = [timed(run) for _ in range(5)]
            records.append({"command": command, "seconds": seconds})
            rows.append([f"`{command}`", spread(seconds)])
    return records, table(["command", "median, s", "fastest, slowest"], rows)


STAGES = """
import time
start = time.perf_counter()
marks = []
def mark(name):
    global start
    now = time.perf_counter()
    marks.append((name, now - start))
    start = now
import convlens.experiment, convlens.cli
mark("import PyTorch, NumPy, matplotlib and convlens")
from convlens.experiment import Experiment
experiment = Experiment.create("mnist", "mnist-99", out="run")
mark("find, check and read MNIST; build the net; look up what bf16 is worth")
for record in experiment.epochs(): pass
mark(f"train, with checkpoints")
marks[-1] = (f"train", record.seconds), ("checkpoints and the rest of the loop", marks[-1][1] - record.seconds)
marks[-1:] = marks[-1]
experiment.finish()
mark("test 10,000 images in fp32; plots; report")
import json
print(json.dumps(marks))
"""


def stages() -> tuple[list[Record], str]:
    """Where the seconds of one cold command go."""
    records = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", STAGES], cwd=folder, capture_output=True, text=True, check=True
            )
            whole = time.perf_counter() - start
            marks: dict[str, float] = dict(json.loads(done.stdout.splitlines()[-1]))
            records.append({**marks, "start Python, and leave it": whole - sum(marks.values()), "all of it": whole})
    rows = [[name, spread([record[name] for record in records])] for name in records[0]]
    return records, table(["stage", "median, s", "fastest, slowest"], rows)


# predicting


def shipped_tests() -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the name of each model that comes with convlens, and its test images, uint8 (N, C, H, W)."""
    for name in ("digits", "mnist", "fashion-mnist", "cifar10"):
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
            rows.append([f"`{name}`", engine, spread(latency), f"{statistics.median(pace):,.0f}", "", ""])
            records.append(record)
        one, other = answers.values()
        record["n"], record["drift"] = len(images), float(np.abs(one - other).max())
        record["same_label"] = float((one.argmax(axis=1) == other.argmax(axis=1)).mean())
        rows[-1][-2:] = [f"{record['drift']:.1e}", f"{record['same_label']:.2%} of {len(images):,}"]
    head = ["model", "engine", "one image: median, ms", "least, most", "images/s in batches of 500"]
    return records, table([*head, "largest difference of a probability", "same label"], rows)


# in the browser

IN_BROWSER = """<pre id="out"></pre><script>%(engine)s
const net = new Net(%(model)s, "%(weights)s");
const pixels = Uint8Array.from(atob("%(images)s"), (letter) => letter.charCodeAt(0));
const size = pixels.length / %(n)d, out = new Float32Array(%(n)d * (net.model.classes.length + 1));
const started = performance.now();
for (let i = 0; i < %(n)d; i++) {
  const { probabilities, known } = net.run(pixels.subarray(i * size, (i + 1) * size));
  out.set([...probabilities, known], i * (probabilities.length + 1));
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
        page = make_page(predictor)
        model, weights = (page.split(f'id="{part}">')[1].split("</script>")[0] for part in ("model", "weights"))
        parts = {"engine": read_part("engine.js"), "model": model, "weights": weights, "n": len(images)}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "page.html"
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
    head = ["model", "bytes of the page", "ms an image", "largest difference of a probability"]
    return records, table([*head, "same label", "same known or unknown"], rows)


def int8() -> tuple[list[Record], str]:
    """The models that come with convlens in 8 bits: size, pace and accuracy beside 32 bits."""
    records, rows = [], []
    for name in ("digits", "mnist", "fashion-mnist", "cifar10"):
        dataset = load_named(name)
        model, exact, cost = build_int8(find_bundle(name), dataset)
        contents = [seal(m.SerializeToString()) for m in (exact, model)]
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
             percent(cost.after), percent(cost.same)]
        )  # fmt: skip
    head = ["model", "bytes, 32 bits", "8 bits", "images/s, 32 bits", "8 bits", "test accuracy, 32 bits", "8 bits"]
    return records, table([*head, "same label"], rows)


# serving


def serve() -> tuple[list[Record], str]:
    """`convlens serve` beside a plain endpoint of FastAPI and PyTorch, with the same net."""
    records = serving.measure()
    head = ["server", f"images/s, {serving.TOGETHER} a request", f"ms an image at {serving.RATE} requests/s: median"]
    return records, table([*head, "99th percentile"], serving.rows_of(records))


# seeing


def see() -> tuple[list[Record], str]:
    """Seconds of a whole `convlens explain` of one MNIST image, and of one class activation map once all is loaded."""
    image = load_dataset("mnist").test.images[0, 0].numpy()
    classifier = Classifier.load("mnist")
    x = classifier.preprocess.normaliser()(torch.from_numpy(image)[None, None])
    maps = [1000 * timed(partial(class_activation_map, classifier.net, x, 7)) for _ in range(60)][10:]
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(image).save(Path(folder) / "seven.png")
        command = [sys.executable, "-m", "convlens", "explain", "mnist", f"{folder}/seven.png", "--out"]
        run = partial(subprocess.run, check=True, capture_output=True)
        whole = [timed(partial(run, [*command, f"{folder}/{number}"])) for number in range(6)][1:]
    records = [{"what": "explain", "seconds": whole}, {"what": "class activation map", "milliseconds": maps}]
    rows = [["`convlens explain mnist seven.png`, cold, s", *spread(whole).split(" | ")],
            ["one class activation map, warm, ms", *spread(maps).split(" | ")]]  # fmt: skip
    return records, table(["", "median", "fastest, slowest"], rows)


def live() -> tuple[list[Record], str]:
    """Training seconds of `mnist-995` (3 epochs) with the live page open beside those without it, pair by pair."""
    seconds: dict[str, list[float]] = {"plain": [], "live": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(5):
            for kind in ("plain", "live") if number % 2 else ("live", "plain"):
                out = Path(folder) / f"{kind}-{number}"
                command = [sys.executable, "-m", "convlens", "train", "mnist", "--epochs", "3", "--out", str(out)]
                command += ["--live"] * (kind == "live")
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                    assert process.stdout
                    for line in process.stdout:
                        if line.startswith("live "):
                            page = subprocess.Popen([sys.executable, "-c", LOOKING, line.split()[1]])
                if kind == "live":
                    page.wait()
                seconds[kind].append(float(Run(out).metrics[-1]["seconds"] or 0))
    ratios = [a / b for a, b in zip(seconds["live"], seconds["plain"], strict=True)]
    rows = [["without the page, s", *spread(seconds["plain"]).split(" | ")],
            ["with `--live`, and a page that looks once a second, s", *spread(seconds["live"]).split(" | ")],
            ["ratio, pair by pair", *spread(ratios, 3).split(" | ")]]  # fmt: skip
    return [seconds], table(["training of `mnist-995`, 3 epochs", "median", "fastest, slowest"], rows)


# asks for what the live page asks for, once a second, until nobody answers
LOOKING = """
import sys, time, urllib.request
try:
    while True:
        urllib.request.urlopen(sys.argv[1] + "runs.json").read()
        time.sleep(1)
except OSError:
    pass
"""


# how cost grows


GROWTH = [  # images, side, classes
    (2_000, 28, 10), (8_000, 28, 10), (32_000, 28, 10),
    (2_000, 64, 10), (2_000, 128, 10),
    (8_000, 28, 100), (8_000, 28, 1000),
]  # fmt: skip


def grown(images: int, side: int, classes: int) -> None:
    """Train one epoch of the folder recipe on random images, and print its seconds and this process's peak memory."""
    use_threads()
    g = np.random.default_rng(0)
    x = g.integers(0, 256, (images, side, side), dtype=np.uint8)
    y = np.arange(images) % classes
    with tempfile.TemporaryDirectory() as folder:
        run = convlens.train((x, y), "folder", epochs=1, batch_size=256, out=Path(folder) / "run", precision="bf16")
        seconds = run.metrics[-1]["seconds"]
    print(json.dumps({"seconds": seconds, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def growth() -> tuple[list[Record], str]:
    """Training seconds and peak memory against the number of images, their size and the number of classes."""
    records, rows = [], []
    for images, side, classes in GROWTH:
        command = [sys.executable, __file__, "--grown", str(images), str(side), str(classes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        record = {"images": images, "side": side, "classes": classes, **json.loads(done.stdout.splitlines()[-1])}
        records.append(record)
        rows.append([f"{images:,}", str(side), f"{classes:,}", f"{record['seconds']:.1f}", f"{record['mib']:,.0f}"])
    return records, table(["images", "side", "classes", "seconds an epoch", "peak memory, MiB"], rows)


# decoding folders

PHOTOS, MANY = 2_000, 100_000


def folders() -> tuple[list[Record], str]:
    """How fast a folder of photos is decoded into the cache, beside plain Pillow in one process."""
    g = np.random.default_rng(0)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "photos"
        for label in ("a", "b"):
            (root / label).mkdir(parents=True)
            for number in range(PHOTOS // 2):
                smooth = Image.fromarray(g.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
                smooth.save(root / label / f"{number}.jpg", quality=90)
        files = sorted(root.rglob("*.jpg"))

        def plain() -> None:
            for file in files:
                with Image.open(file) as image:
                    np.asarray(image.convert("RGB").resize((64, 64)))

        for turn in range(4):
            os.environ["CONVLENS_CACHE"] = str(Path(folder) / f"cache-{turn}")
            pair = {"pillow": timed(plain)}
            pair["convlens"] = timed(lambda: load_dataset(root, image_size=64))
            pair["again"] = timed(lambda: load_dataset(root, image_size=64))
            records.append(pair)
        del os.environ["CONVLENS_CACHE"]
    labels = {"pillow": "plain Pillow, one process", "convlens": "convlens, first time", "again": "convlens, cached"}
    rows = []
    for key, label in labels.items():
        pace = [len(files) / pair[key] for pair in records]
        rows.append([label, f"{statistics.median(pace):,.0f}", f"{min(pace):,.0f}, {max(pace):,.0f}"])
    return records, table([f"{PHOTOS:,} photos of 500 x 375 to 64 x 64", "images/s, median", "least, most"], rows)


def decode_plainly(file: str) -> int:
    """Decode one file with nothing but Pillow, in a worker process."""
    with Image.open(file) as image:
        return int(np.asarray(image.convert("RGB")).shape[0])


def loaded(root: str) -> None:
    """Load a folder, and print the seconds that it took and this process's peak memory."""
    seconds = timed(lambda: load_dataset(root))
    print(json.dumps({"seconds": seconds, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def many() -> tuple[list[Record], str]:
    """A folder of 100,000 small files, scanned, decoded and cached, beside plain Pillow in two processes."""
    g = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "photos"
        for label in ("a", "b"):
            (root / label).mkdir(parents=True)
        for number in range(MANY):
            smooth = Image.fromarray(g.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((32, 32))
            smooth.save(root / "ab"[number % 2] / f"{number}.png", compress_level=1)
        files = [str(path) for path in sorted(root.rglob("*.png"))]
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            pool.map(decode_plainly, files[:200])  # with its start behind it
            records: list[Record] = [
                {"who": "plain Pillow, two processes", "seconds": timed(lambda: pool.map(decode_plainly, files, 500))}
            ]
        os.environ["CONVLENS_CACHE"] = str(Path(folder) / "cache")
        for who in ("convlens, first time", "convlens, cached"):
            command = [sys.executable, __file__, "--loaded", str(root)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            records.append({"who": who, **json.loads(done.stdout.splitlines()[-1])})
        del os.environ["CONVLENS_CACHE"]
    rows = [
        [r["who"], f"{r['seconds']:.1f}", f"{MANY / r['seconds']:,.0f}", f"{r['mib']:,.0f}" if "mib" in r else ""]
        for r in records
    ]
    return records, table([f"{MANY:,} PNG files of 32 x 32", "s", "images/s", "peak memory, MiB"], rows)


# time to accuracy

# targets, recipes for them, our net in a plain loop, the classic program, and the seconds that this one, and the
# others, may train: longer than convlens needs
RACES = {
    "mnist": ((0.99, 0.995), ("mnist-99", "mnist-995"), ("tiny", 32), "mnist-4conv", (1500.0, 60.0)),
    "fashion-mnist": ((0.85, 0.92), ("fashion-85", "fashion-92"), ("whitened", 16), "fashion-2conv", (300.0, 200.0)),
    "cifar10": (
        (0.80, 0.87, 0.906),
        ("cifar10-small", "cifar10-90", "cifar10-94"),
        ("whitened", 64),
        "cifar-lenet",
        (480.0, 480.0),
    ),
}


def race(name: str) -> tuple[list[Record], str]:
    """Seconds of training to an accuracy on the test split: convlens beside what one would write or take instead."""
    targets, recipes, (model, filters), classic, patience = RACES[name]
    data = load_named(name)
    rivals: dict[str, contenders.Course] = {}
    plain = contenders.plain_loop(data, model, filters)
    rivals[f"plain loop with our net `{model} --filters {filters}`, Adam, fp32"] = plain
    rivals["scikit-learn's MLPClassifier"] = contenders.scikit_learn(data)
    rivals[f"the tutorial program, as `{classic}`"] = contenders.tutorial(data, classic)
    records: list[Record] = []
    for label, course in rivals.items():
        limit = patience["tutorial" not in label]
        seen: list[tuple[float, float]] = []
        for seconds, accuracy in course:
            seen.append((seconds, accuracy))
            if seconds > limit or accuracy >= max(targets):
                break
        records.append({"data": data.name, "who": label, "targets": targets, "course": seen})
    for recipe in recipes:  # last, for fit() lets the process keep its memory, which the others do not ask for
        settled = get_recipe(recipe).override(validation=0.0)
        seen = list(contenders.convlens(data, settled))
        averaged = {"averaged": seen.pop()[1]} if settled.test_views else {}
        label = f"convlens, recipe `{recipe}`"
        records.append({"data": data.name, "who": label, "targets": targets, "course": seen, **averaged})
    return records, race_table(records)


def race_table(records: list[Record]) -> str:
    """Return the table of a race, convlens at its head: when each contender reached each target first.

    What is reached, or best, only with test-time augmentation says so; it is looked at once, at the end.
    """
    rows = []
    for record in sorted(records, key=lambda record: "convlens" not in record["who"]):
        course, averaged = record["course"], record.get("averaged", 0.0)
        last = course[-1][0]
        reached = []
        for target in record["targets"]:
            late = f"{last:.1f} with augmentation" if averaged >= target else f"not in {last:,.0f} s"
            reached.append(next((f"{s:.1f}" for s, a in course if a >= target), late))
        best = f"{max(accuracy for _, accuracy in course):.2%}"
        rows.append([record["who"], *reached, f"{best}, {averaged:.2%} with augmentation" if averaged else best])
    return table([records[0]["data"], *(f"{100 * target:g}%, s" for target in records[0]["targets"]), "best"], rows)


# beside the published speedrun


def cifar_name() -> str:
    """Return what CIFAR-10 is called here: the JPEG copy in class folders where there is one, else the original."""
    return "cifar10-jpeg" if Path("cifar10-jpeg").is_dir() else "cifar10"


def load_named(name: str) -> Dataset:
    """Return the data set of this name; CIFAR-10 is what :func:`cifar_name` says."""
    return load_dataset(cifar_name() if name == "cifar10" else name)


SPEEDRUN = "the published speedrun recipe"


def test_of(recipe: str, data: Dataset, seed: int = 0) -> Record:
    """Train a recipe in this process as ``convlens train`` does, and return its seconds and accuracies."""
    with tempfile.TemporaryDirectory() as folder:
        run = convlens.train(data, recipe, seed=seed, out=Path(folder) / "run")
        views = run.test.get("test_time_augmentation", {})
        seconds = run.metrics[-1]["seconds"]
        return {"seconds": seconds, "plain": run.accuracy, "averaged": views.get("accuracy")}


def speedrun_of(data: Dataset, device: torch.device, seed: int = 0) -> Record:
    """Train the published recipe, and return its seconds and accuracies."""
    return dict(zip(("seconds", "plain", "averaged"), contenders.speedrun(data, device, seed), strict=True))


def percent(share: float | None) -> str:
    """Return an accuracy as a cell of a table."""
    return "" if share is None else f"{share:.2%}"


def speedrun() -> tuple[list[Record], str]:
    """The recipe `cifar10-94` beside the published speedrun recipe on CIFAR-10, one after the other."""
    data = load_named("cifar10")
    # first, for fit() lets the process keep its memory, which this does not ask for
    published = {"who": SPEEDRUN, **speedrun_of(data, CPU)}
    records = [{"who": "convlens, recipe `cifar10-94`", **test_of("cifar10-94", data)}, published]
    rows = [[r["who"], f"{r['seconds']:,.0f}", percent(r["plain"]), percent(r["averaged"])] for r in records]
    ratio = records[0]["seconds"] / records[1]["seconds"]
    rows.append(["ratio of the seconds", f"{ratio:.2f}", "", ""])
    head = [data.name, "training, s", "test accuracy", "with test-time augmentation"]
    return records, table(head, rows)


ON_GPU = {  # who, on which data
    "mnist-99": "mnist", "mnist-995": "mnist", "fashion-92": "fashion-mnist", "fashion-94": "fashion-mnist",
    "cifar10-90": "cifar10", "cifar10-94": "cifar10", SPEEDRUN: "cifar10",
}  # fmt: skip


def gpu() -> tuple[list[Record], str]:
    """The same recipes on a CUDA device, beside the published speedrun: each in a fresh process, cold and then warm."""
    if not torch.cuda.is_available():
        sys.exit("bench-gpu needs a CUDA device, and PyTorch sees none here")
    records, rows = [], []
    for who in ON_GPU:
        command = [sys.executable, __file__, "--cold-and-warm", who]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        cold, *warm = json.loads(done.stdout.splitlines()[-1])
        records.append({"who": who, "cold": cold, "warm": warm})
        plain, averaged = (
            percent(None if None in shares else statistics.mean(shares))
            for shares in ([run[key] for run in (cold, *warm)] for key in ("plain", "averaged"))
        )
        rows.append([who, f"{cold['seconds']:.2f}", spread([run["seconds"] for run in warm]), plain, averaged])
    head = ["who", "training, cold, s", "warm: median, s", "fastest, slowest", "mean test accuracy",
            "with test-time augmentation"]  # fmt: skip
    return records, table(head, rows)


def cold_and_warm(who: str, times: int = 6) -> None:
    """Train a contender several times in this process, with a seed each, and print what came of it."""
    data = load_named(ON_GPU[who])
    train = partial(speedrun_of, data, choose_device()) if who == SPEEDRUN else partial(test_of, who, data)
    print(json.dumps([train(seed) for seed in range(times)]))


def tabled(measure: Callable[[], tuple[list[Record], list[list[str]]]]) -> Section:
    """Return a section from what gives its records, and its rows with their head."""

    def section() -> tuple[list[Record], str]:
        records, (head, *rows) = measure()
        return records, table(head, rows)

    return section


SECTIONS: dict[str, Section] = {
    **{f"race-{name}": partial(race, name) for name in RACES},
    "speedrun": speedrun,
    "commands": commands,
    "budget": budget,
    "stages": stages,
    "arithmetic": arithmetic,
    "overhead": overhead,
    "predict": predict,
    "int8": int8,
    "twin": twin,
    "serve": serve,
    "see": see,
    "live": live,
    "growth": growth,
    "folders": folders,
    "many": many,
    "processes": tabled(scale.measure_processes),
    "shards": tabled(scale.measure_shards),
    "streams": tabled(scale.measure_streams),
    "sweep": tabled(scale.measure_sweep),
    "gpu": gpu,
}


def run_sections(sections: dict[str, Section], names: list[str], page: Path) -> None:
    """Run the sections of these names; keep their records, and put their tables on ``page``.

    Each has a process of its own, for what fit() asks of the memory would quicken the others' contenders too.
    """
    if len(names) > 1:
        failed = [name for name in names if subprocess.run([sys.executable, sys.argv[0], name]).returncode]
        if failed:
            sys.exit(f"these sections failed, and their tables are what they were: {', '.join(failed)}")
        return
    (name,) = names
    if name != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all else is of the processor
    use_threads()
    print(f"{name} ...", flush=True)
    try:
        records, rows = sections[name]()
    except subprocess.CalledProcessError as error:
        if error.stderr:  # what a command said that was not to be seen
            error.add_note(error.stderr if isinstance(error.stderr, str) else error.stderr.decode())
        raise
    about = {
        "machine": describe_machine(choose_device()),
        "versions": {package: version(package) for package in VERSIONS},
        "date": time.strftime("%Y-%m-%d"),
        "records": records,
        "table": rows.splitlines(),
    }
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    put(page, name, lambda _: rows)
    print(rows, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--grown"]:
        grown(*map(int, sys.argv[2:]))
    elif sys.argv[1:2] == ["--loaded"]:
        loaded(sys.argv[2])
    elif sys.argv[1:2] == ["--cold-and-warm"]:
        cold_and_warm(sys.argv[2])
    else:
        run_sections(SECTIONS, sys.argv[1:] or [name for name in SECTIONS if name != "gpu"], PAGE)
