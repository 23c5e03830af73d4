"""How fast folders of images are decoded into the cache, beside plain Pillow.

``many`` runs this file once more for each load, with the folder.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import Record, answer, print_cost, table, timed
from convlens.data.loading import load_dataset

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
    print_cost(timed(lambda: load_dataset(root)))


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
            records.append({"who": who, **answer(__name__, root)})
        del os.environ["CONVLENS_CACHE"]
    rows = [
        [r["who"], f"{r['seconds']:.1f}", f"{MANY / r['seconds']:,.0f}", f"{r['mib']:,.0f}" if "mib" in r else ""]
        for r in records
    ]
    return records, table([f"{MANY:,} PNG files of 32 x 32", "s", "images/s", "peak memory, MiB"], rows)


if __name__ == "__main__":
    loaded(sys.argv[1])
