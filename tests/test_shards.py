"""Shards: other readers take them, training from them is training from memory, and damage is named."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convlens
from convlens.data.cross_validation import merge
from convlens.data.dataset import Dataset
from convlens.data.loader import BatchLoader
from convlens.data.loading import data_name
from convlens.data.preprocess import Preprocess
from convlens.data.shard_storage import ShardStorage
from convlens.data.shards import Shard, ShardImages, ShardOrder, load_shards, write_shards
from convlens.errors import ConvlensError, UsageError
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return convlens.load_dataset("digits").with_validation(0.1, 0)


@pytest.fixture(scope="module")
def shards(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "shards"
    write_shards(digits, folder, 40)
    return folder


@pytest.fixture
def address(shards: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def pixels_by_label(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, bytes]]:
    return sorted(zip(labels.tolist(), (image.contiguous().numpy().tobytes() for image in images), strict=True))


def test_what_was_packed_is_what_is_loaded(digits: Dataset, shards: Path) -> None:
    loaded = load_shards(shards)
    assert (loaded.name, loaded.classes, loaded.shape, loaded.input_style) == (
        digits.name, digits.classes, digits.shape, digits.input_style,
    )  # fmt: skip
    assert torch.equal(loaded.test.images, digits.test.images)
    assert torch.equal(loaded.test.labels, digits.test.labels)
    train = loaded.train
    assert len(train) == len(digits.train) == 1295
    assert pixels_by_label(train.images[:], train.labels) == pixels_by_label(digits.train.images, digits.train.labels)
    assert not torch.equal(train.labels, digits.train.labels)  # shuffled


def test_rows_are_asked_for_as_of_a_tensor(shards: Path) -> None:
    images = load_shards(shards).train.images
    whole = images[:]
    rows = torch.tensor([1294, 0, 3, 3, 700])
    assert torch.equal(images[rows], whole[rows])
    assert torch.equal(images[[5, 900]], whole[[5, 900]])
    assert torch.equal(images[17], whole[17])
    assert torch.equal(images[95:205], whole[95:205])
    assert images.shape == tuple(whole.shape)


def test_images_for_another_device_leave_these_where_they_are(shards: Path) -> None:
    images = load_shards(shards).train.images
    there = images.to(torch.device("meta"))
    assert (images[:2].device.type, there[:2].device.type) == ("cpu", "meta")


def test_the_shards_are_the_same_bytes_again(digits: Dataset, shards: Path, tmp_path: Path) -> None:
    write_shards(digits, tmp_path / "again", 40)
    first, again = (sorted(folder.iterdir()) for folder in (shards, tmp_path / "again"))
    assert [(file.name, file.read_bytes()) for file in first] == [(file.name, file.read_bytes()) for file in again]


def test_webdataset_reads_them(digits: Dataset, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    code = """
import sys, numpy, webdataset
samples = list(webdataset.WebDataset(sys.argv[2:], shardshuffle=False).decode().to_tuple("npy", "cls"))
numpy.savez(sys.argv[1], images=numpy.stack([image for image, _ in samples]), labels=[label for _, label in samples])
"""
    files = sorted(map(str, shards.glob("test-*.tar")))  # in a process of its own: it leaves files open
    subprocess.run([sys.executable, "-c", code, tmp_path / "read.npz", *files], check=True, timeout=60)
    read = np.load(tmp_path / "read.npz")
    assert read["labels"].tolist() == digits.test.labels.tolist()
    assert torch.equal(torch.from_numpy(read["images"]).permute(0, 3, 1, 2), digits.test.images)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 2**40), st.integers(1, 17))
def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(sizes: list[int], seed: int, batch: int) -> None:
    images = ShardImages(ShardStorage("nowhere"), [Shard(str(i), n, "") for i, n in enumerate(sizes)], (1, 2, 2))
    images.load = lambda numbers: []  # type: ignore[method-assign]  # nothing is read
    whole = ShardOrder(images, seed)[0 : len(images)]
    assert sorted(whole.tolist()) == list(range(len(images)))
    parts = ShardOrder(images, seed)
    starts = list(range(0, len(images), batch))
    for start in starts[::-1]:  # a part is a function of the seed, whatever was asked before
        assert torch.equal(parts[start : start + batch], whole[start : start + batch])
    if len(images) > 20:
        assert not torch.equal(ShardOrder(images, seed + 1)[0 : len(images)], whole)


def test_few_shards_are_in_memory_and_each_is_read_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_shards(shards)
    normalise = Preprocess.fit(dataset.train.images, dataset.input_style).normalizer()  # type: ignore[arg-type]
    read: list[int] = []
    images = dataset.train.images
    images._loaded.clear()  # type: ignore[attr-defined]
    get = images._read  # type: ignore[attr-defined]
    monkeypatch.setattr(images, "_read", lambda number: read.append(number) or get(number))
    batches = BatchLoader(dataset.train, 64, normalise, seed=0, augment=lambda x, y, draws: (x, y))
    seen = []
    for index in range(len(batches)):
        seen.append(batches(0, index)[1])
        assert len(images._loaded) <= 12  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(seen).bincount(), dataset.train.labels.bincount())
    assert sorted(read) == list(range(len(images.shards)))  # type: ignore[attr-defined]  # each once


def test_training_from_shards_stops_anywhere_and_goes_on_in_the_same_bits(shards: Path, tmp_path: Path) -> None:
    options = {"recipe": "digits", "epochs": 2, "threads": 1}
    whole = convlens.train(str(shards), out=tmp_path / "whole", **options)
    stopped = Experiment.start(TrainRequest.create(str(shards), out=tmp_path / "stopped", **options))
    asked = iter(range(1000))
    with pytest.raises(convlens.errors.TrainingInterruptedError):
        list(stopped.epochs(should_stop=lambda: next(asked) >= 29))
    again = Experiment.resume(tmp_path / "stopped")
    list(again.epochs())
    run = again.finish()
    assert (run.path / "model/model.safetensors").read_bytes() == (whole.path / "model/model.safetensors").read_bytes()
    assert run.accuracy > 0.95


def test_over_the_network_they_are_the_same(shards: Path, address: str) -> None:
    here, there = load_shards(shards), convlens.load_dataset(address)
    assert there.source == address
    assert there.fingerprint() == here.fingerprint()
    assert torch.equal(there.train.images[:], here.train.images[:])


def damaged(shards: Path, tmp_path: Path, file: str) -> Path:
    """Return a copy of the shards with one bit of ``file`` turned."""
    for old in shards.iterdir():
        content = bytearray(old.read_bytes())
        if old.name == file:
            content[len(content) // 2] ^= 1
        (tmp_path / old.name).write_bytes(content)
    return tmp_path


def test_a_damaged_shard_is_named(shards: Path, tmp_path: Path) -> None:
    images = load_shards(damaged(shards, tmp_path, "train-000003.tar")).train.images
    assert len(images[:120]) == 120
    with pytest.raises(ConvlensError, match=r"train-000003.tar is damaged: its SHA-256 is not that in index.json"):
        images[120]


@pytest.mark.parametrize("file", ["test-000001.tar", "validation-labels.npy"])
def test_damage_is_seen_at_once_where_it_can_be(shards: Path, tmp_path: Path, file: str) -> None:
    with pytest.raises(ConvlensError, match=f"{file} is damaged"):
        load_shards(damaged(shards, tmp_path, file))


def test_a_missing_shard_is_named(shards: Path, tmp_path: Path, address: str) -> None:
    images = load_shards(damaged(shards, tmp_path, "")).train.images
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(ConvlensError, match=r"train-000000.tar cannot be read: No such file"):
        images[0]
    with pytest.raises(ConvlensError, match=r"http://127.0.0.1:\d+/nothing.tar cannot be downloaded: 404"):
        ShardStorage(address).read("nothing.tar", "", 100)
    with pytest.raises(ConvlensError, match=r"http://127.0.0.1:1/index.json cannot be downloaded"):
        convlens.load_dataset("http://127.0.0.1:1")


def test_a_shard_that_is_put_back_is_read(shards: Path, tmp_path: Path) -> None:
    images = load_shards(damaged(shards, tmp_path, "")).train.images
    (tmp_path / "train-000000.tar").rename(tmp_path / "away")
    with pytest.raises(ConvlensError, match="cannot be read"):
        images[0]
    (tmp_path / "away").rename(tmp_path / "train-000000.tar")
    assert images[0].shape == (1, 8, 8)


def test_a_download_that_breaks_off_is_tried_again() -> None:
    asked, digest = [], hashlib.sha256(b"0123456789").hexdigest()

    class Breaking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"0123456789" if len(asked) == 3 else b"0123")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        storage = ShardStorage(f"http://127.0.0.1:{server.server_address[1]}")
        assert storage.read("x.tar", digest, 100) == b"0123456789"
        assert len(asked) == 3
        with pytest.raises(ConvlensError, match=r"x.tar cannot be downloaded: the connection closed|IncompleteRead"):
            storage.read("x.tar", digest, 100)
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("splits", "test", "shards", 0, "file"), "../secret.tar"),
        (("splits", "test", "shards", 0, "sha256"), ""),
        (("splits", "train", "shards", 0, "images"), 10**12),
        (("splits", "train", "shards", 0, "images"), -1),
        (("splits", "train", "labels"), ""),
        (("name",), "../../elsewhere"),
        (("name",), ".."),
        (("classes",), ["0", "1"]),
    ],
)
def test_an_index_is_not_believed(shards: Path, tmp_path: Path, path: tuple[str | int, ...], value: object) -> None:
    index = json.loads((damaged(shards, tmp_path, "") / "index.json").read_text())
    inner = index
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConvlensError, match=r"index.json is damaged|labels.npy is damaged"):
        load_shards(tmp_path)


@pytest.mark.parametrize("index", ["{}", "[]", '{"format": 99}', '{"format": 1, "splits": {"train": 3}}', "no JSON"])
def test_an_index_that_is_none_is_one_line(tmp_path: Path, index: str) -> None:
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ConvlensError, match=r"index.json|format 99"):
        load_shards(tmp_path)


def test_what_shards_cannot_do_is_said(shards: Path) -> None:
    dataset = load_shards(shards)
    with pytest.raises(UsageError, match="cannot be excluded from shards"):
        dataset.drop(["3"])
    assert dataset.with_validation(0.5, 7) is dataset
    with pytest.raises(UsageError, match="cannot be merged; give the original data"):
        merge(dataset)
    with pytest.raises(UsageError, match="`balanced_sampling`"):
        convlens.train(dataset, epochs=1, balanced_sampling=True)


def test_shards_of_a_known_data_set_take_its_recipe(shards: Path, tmp_path: Path) -> None:
    assert data_name(str(shards)) == "digits"
    arrays = convlens.from_arrays(*(t.numpy() for t in (torch.zeros(9, 8, 8, dtype=torch.uint8), torch.arange(9) % 3)))
    write_shards(arrays.with_validation(0.3, 0), tmp_path / "arrays")
    assert data_name(tmp_path / "arrays") == "None"
    with pytest.raises(UsageError, match="is one of several shards; give their folder"):
        convlens.load_dataset(shards / "index.json")


def test_the_command(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "convlens", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    packed = call("data", "pack", "digits", "--out", "shards", "--shard-images", "500")
    assert packed.returncode == 0, packed.stderr
    assert packed.stdout.splitlines()[-1] == "train with: convlens train shards"
    assert [
        shard["images"]
        for shard in json.loads((tmp_path / "shards/index.json").read_text())["splits"]["train"]["shards"]
    ] == [500, 500, 295]
    again = call("data", "pack", "digits", "--out", "shards")
    assert (again.returncode, again.stderr) == (2, "convlens: shards exists already; choose another --out\n")
