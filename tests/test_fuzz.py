"""Every parser fed with mutated files: a result or one line for a person; no crash, no hang, no memory to speak of.

A few examples each by default. For so many minutes in all, with fresh ones:

    FUZZ_MINUTES=30 python -m pytest -m slow tests/test_fuzz.py -s

Inputs grow out of the seeds below by flips, cuts, insertions, numbers at their limits and words of the formats. What
fails is shrunk and printed by hypothesis, and kept in ``.hypothesis`` to be tried first the next time.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from convlens.data.arrays import load_npz
from convlens.data.download import read_verified, unpack_members
from convlens.data.formats import CIFAR_RECORD_BYTES, parse_cifar10, parse_idx
from convlens.data.images import InputStyle
from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError
from convlens.inference.bundle import Bundle, load_bundle
from convlens.inference.metadata import Architecture
from convlens.models import create_model
from convlens.system.files import read_json, read_name_list
from convlens.system.memory import release_memory
from convlens.training.checkpoint import CheckpointStore, digest, read_checkpoint
from convlens.training.recipe import Recipe
from convlens.training.state import TrainState

MOST_SECONDS, MOST_MIB = 1.0, 200
WORDS = [
    b"null", b"NaN", b"-1", b"0", b"1e999", b"999999999999", b"[]", b"{}", b'""', b"true", b'"channels"', b'"shape"',
    b'"data_offsets"', b'"filters"', b'"bounds"', b"\x00\x00\x08\x03", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"../",
]  # fmt: skip
Target = Callable[[bytes], object]
# where (a share of the length, or a place near the start), how, and with what
edits = st.lists(
    st.tuples(
        st.floats(0, 1) | st.integers(2, 96),
        st.sampled_from(["flip", "put", "insert", "delete", "repeat", "cut"]),
        st.binary(min_size=1, max_size=8) | st.sampled_from(WORDS),
    ),
    min_size=1,
    max_size=8,
)


def mutate(content: bytes, changes: list[tuple[float | int, str, bytes]]) -> bytes:
    """Return ``content`` changed at a few places."""
    data = bytearray(content)
    for where, how, what in changes:
        place = min(where, len(data)) if isinstance(where, int) else round(where * len(data))
        if how == "flip" and place < len(data):
            data[place] ^= 1 << what[0] % 8
        elif how == "put":
            data[place : place + len(what)] = what
        elif how == "insert":
            data[place:place] = what
        elif how == "delete":
            del data[place : place + 4 ** (what[0] % 7)]
        elif how == "repeat":
            data[place:place] = data[: 8 * what[0]]
        elif how == "cut":
            del data[place:]
    return bytes(data)


def file_targets(folder: Path) -> dict[str, tuple[list[bytes], Target]]:
    """Return the parsers by name: seeds, and what is done with an input. Files lie in ``folder``."""
    torch.manual_seed(0)
    arguments = {"channels": 1, "image_height": 8, "image_width": 8, "classes": 2, "width": 2}
    preprocess = Preprocess(1, 8, 8, (0.4,), (0.2,), InputStyle())
    net = create_model("small", **arguments)
    counts = {"train": 8, "test": 2}
    trained = {
        "version": "0", "command": "c", "recipe": {"name": "r", "seed": 0}, "seconds": 1.0, "parameters": 1,
        "data": {"name": "d", "source": None, "counts": counts, "split_description": ""},
        "machine": {"device_name": "m", "threads": 1},
        "test": {"num_images": 2, "accuracy": 0.5, "accuracy_ci95": [0.1, 0.9], "loss": 1.0},
    }  # fmt: skip
    home = folder / "bundle"
    Bundle(net, Architecture("small", arguments), ("a", "b"), preprocess, trained).save(home)
    weights, config = ((home / name).read_bytes() for name in ("model.safetensors", "config.json"))

    def with_weights(content: bytes) -> object:
        values = json.loads(config)
        values["sha256"] = hashlib.sha256(content).hexdigest()  # else nothing but the sum would be tried
        (home / "model.safetensors").write_bytes(content)
        (home / "config.json").write_text(json.dumps(values))
        return load_bundle(home)

    def with_config(content: bytes) -> object:
        (home / "model.safetensors").write_bytes(weights)
        (home / "config.json").write_bytes(content)
        bundle = load_bundle(home)
        image = torch.zeros(bundle.preprocess.channels, bundle.preprocess.height, bundle.preprocess.width)
        return bundle.model(image[None])

    CheckpointStore(folder / "store").save(TrainState(step=1), {"x": torch.zeros(3)})
    manifest = folder / "store" / "step-00000001.json"
    written, stored = manifest.read_bytes(), manifest.with_suffix(".safetensors").read_bytes()

    def with_checkpoint(content: bytes) -> object:
        values = json.loads(written)
        values["sha256"] = digest(hashlib.sha256(content).hexdigest(), values["state"])
        manifest.with_name("step-00000002.safetensors").write_bytes(content)
        manifest.with_name("step-00000002.json").write_text(json.dumps(values))
        return read_checkpoint(manifest.with_name("step-00000002.json"))

    def as_file(name: str, read: Callable[[Path], object]) -> Target:
        path = folder / name

        def target(content: bytes) -> object:
            path.write_bytes(content)
            return read(path)

        return target

    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((4, 5, 5), np.uint8), y=np.array([0, 1, 0, 1]))
    idx = b"\x00\x00\x08\x03" + struct.pack(">III", 2, 3, 3) + bytes(18)
    recipe = json.dumps({"epochs": 3, "lr": 0.1, "model": "small", "hflip": True, "max_steps": None}).encode()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        entry = tarfile.TarInfo("d/a.bin")
        entry.size = 600
        file.addfile(entry, io.BytesIO(bytes(600)))
    return {
        "idx": ([idx, b"\x00\x00\x08\x01" + struct.pack(">I", 5) + bytes(5)], lambda c: parse_idx(c, "f")),
        "cifar": (
            [bytes(CIFAR_RECORD_BYTES), bytes([9]) + bytes(CIFAR_RECORD_BYTES - 1)],
            lambda c: parse_cifar10(c, "f"),
        ),
        "gzip": ([gzip.compress(idx), idx], as_file("f.gz", lambda path: read_verified(path, "0" * 64))),
        "tar": ([tar.getvalue()], as_file("f.tar.gz", lambda path: unpack_members(zipped(path), ["a.bin"], 1000))),
        "npz": ([buffer.getvalue()], as_file("f.npz", load_npz)),
        "weights": ([weights], with_weights),
        "bundle": ([config], with_config),
        "manifest": ([manifest.read_bytes()], as_file("store/step-00000001.json", read_checkpoint)),
        "checkpoint": ([stored], with_checkpoint),
        "json": ([config, recipe, b"[1, 2]"], as_file("f.json", read_json)),
        "recipe": ([recipe], as_file("r.json", lambda path: Recipe.from_json(read_json(path)))),
        "names": ([b"train/a.png\twhy\nb\\\\n.png\n"], as_file("f.txt", read_name_list)),
    }


def zipped(path: Path) -> Path:
    """Pack a file with gzip, in place: mutations of what is packed reach the reader of tar."""
    path.write_bytes(gzip.compress(path.read_bytes(), 1))
    return path


NAMES = ["idx", "cifar", "gzip", "tar", "npz", "weights", "bundle", "manifest", "checkpoint", "json", "recipe", "names"]


@pytest.fixture(scope="module", autouse=True)
def nothing_is_kept() -> None:
    """Give back the memory that a training in this process has kept: what comes out of it would not be seen."""
    release_memory()


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[bytes], Target]]:
    made = file_targets(tmp_path_factory.mktemp("fuzz"))
    assert list(made) == NAMES
    for seeds, read in made.values():  # the seeds are good, but for the one that has no right sum
        for content in seeds:
            try:
                read(content)
            except ConvlensError as error:
                assert "is not the published file" in str(error) or "is not a JSON object" in str(error)
    return made


def feed_one(read: Target, content: bytes) -> None:
    """Feed one input: what comes of it is a result, or a line for a person, soon and without much memory."""
    before, started = memory("VmRSS", forget_peak=True), time.process_time()
    try:
        read(content)
    except ConvlensError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    assert time.process_time() - started < MOST_SECONDS
    assert memory("VmHWM") - before < MOST_MIB + len(content) / 2**20


def feed(target: tuple[list[bytes], Target], examples: int, start: int | None = None) -> None:
    """Feed so many mutated inputs; with a ``start`` others than usual."""
    seeds, read = target

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=start is None)
    @given(st.sampled_from(seeds), edits)
    def check(content: bytes, changes: list[tuple[float | int, str, bytes]]) -> None:
        feed_one(read, mutate(content, changes))
        counted[0] += 1

    (check if start is None else seed(start)(check))()


counted = [0]


def memory(kind: str, forget_peak: bool = False) -> float:
    """Return how much memory this process has (VmRSS), or has had at most since that was forgotten (VmHWM), in MiB.

    0 on systems that do not say.
    """
    with contextlib.suppress(OSError):
        if forget_peak:
            Path("/proc/self/clear_refs").write_text("5")
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
        return int(line.split()[1]) / 1024
    return 0.0


def dawdle(content: bytes) -> None:
    begun = time.process_time()
    while time.process_time() - begun < 1.1 * MOST_SECONDS:
        pass


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell of memory")
def test_greed_and_slowness_are_seen() -> None:
    with pytest.raises(AssertionError, match="VmHWM"):
        feed_one(lambda content: np.ones(220 << 20, np.uint8).sum(), b"x")
    with pytest.raises(AssertionError, match="process_time"):
        feed_one(dawdle, b"x")


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_are_read_or_refused_in_a_line(name: str, targets: dict[str, tuple[list[bytes], Target]]) -> None:
    feed(targets[name], 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_for_so_many_minutes(name: str, targets: dict[str, tuple[list[bytes], Target]]) -> None:
    minutes = float(os.environ.get("FUZZ_MINUTES", "1")) / len(NAMES)
    counted[0], begun, rounds = 0, time.monotonic(), 0
    while time.monotonic() - begun < 60 * minutes:
        rounds += 1
        feed(targets[name], 2000, start=rounds)
    print(f"{name}: {counted[0]:,} inputs in {time.monotonic() - begun:.0f} s")
