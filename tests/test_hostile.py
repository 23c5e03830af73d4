"""Hostile files and folders: refused in a line, nothing run, nothing written outside, nothing of the user's changed."""

import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as dump_tensors
from test_bundle import make_bundle
from test_cli import Shell, make_folder, shell  # noqa: F401  # a fixture
from test_engine import make_dataset, make_net, make_recipe, train
from torch import nn

from convlens.data.download import read_verified, unpack_members
from convlens.data.image_folder import load_folder
from convlens.data.loading import load_dataset
from convlens.errors import ConvlensError
from convlens.inference.bundle import load_bundle
from convlens.models import ConvNet, register
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest
from convlens.system.files import read_json
from convlens.training.checkpoint import CheckpointStore, digest
from convlens.training.state import TrainState

CANARY = "canary"


class Harmful:
    """Unpickled, it leaves a file where the test looks."""

    def __init__(self, how: str):
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        calls: dict[str, tuple[Any, ...]] = {
            "open": (open, (CANARY, "w")),
            "system": (os.system, (f"touch {CANARY}",)),
            "eval": (eval, (f"open({CANARY!r}, 'w')",)),
        }
        return calls[self.how]


# archives


def npz(**entries: bytes) -> bytes:
    """Return a .npz file of members with any content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(shape: str, descr: str = "'|u1'", body: bytes = b"") -> bytes:
    """Return a .npy file whose header says anything."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def array(values: Any) -> bytes:
    """Return an honest .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Harmful("open")] * 2, dtype=object), allow_pickle=True)
    return buffer.getvalue()


Y = array([0, 1] * 4)
NPZ = {
    "a pickle": pickle.dumps(Harmful("open")),
    "a pickle, old": pickle.dumps(Harmful("eval"), protocol=0),
    "a pickle that runs a shell": pickle.dumps(Harmful("system")),
    "objects inside": npz(x=object_array(), y=Y),
    "objects as labels": npz(x=array(np.zeros((8, 4, 4), np.uint8)), y=object_array()),
    "an array larger than memory": npz(x=npy("(1000000000000, 28, 28)"), y=Y),
    "a label of thirty million": npz(x=array(np.zeros((4, 5, 5), np.uint8)), y=array([0, 1, 0, 30_000_000])),
    "a label of a trillion": npz(x=array(np.zeros((4, 5, 5), np.uint8)), y=array([0, 1, 0, 2**40])),
    "a label that is negative in another type": npz(
        x=array(np.zeros((4, 5, 5), np.uint8)), y=array(np.array([0, 1, 0, 2**63], np.uint64))
    ),
    "an array larger than its bytes": npz(x=npy("(8, 28, 28)", body=b"\0" * 10), y=Y),
    "sides that overflow": npz(x=npy("(4294967296, 4294967296, 4294967296)"), y=Y),
    "a negative side": npz(x=npy("(-1, 28, 28)", body=b"\0" * 784), y=Y),
    "a header that is code": npz(x=npy("().__class__.__base__.__subclasses__()"), y=Y),
    "a type that is none": npz(x=npy("(8, 4, 4)", descr="'O'"), y=Y),
    "a header that does not end": npz(x=npy("(8, 4, 4)", descr="("), y=Y),
    "a header that is far too long": npz(x=npy("(8, 4, 4)" + " " * 20_000), y=Y),
    "a bomb": npz(x=npy("(150000, 28, 28)", body=bytes(150_000 * 784)), y=Y),
    "no arrays": npz(),
    "a zip that is none": b"PK\x03\x04" + b"\xff" * 200,
    "names with dots": npz(**{"../../x": array([1]), "/etc/y": array([1])}),
}


@pytest.mark.parametrize("name", NPZ)
def test_a_hostile_npz_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(NPZ[name])
    before = tree(tmp_path)
    started = time.monotonic()
    with pytest.raises(ConvlensError) as caught:
        load_dataset(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert time.monotonic() - started < 10
    assert tree(tmp_path) == before


def tar(*entries: tuple[str, bytes, bytes, str], size: int | None = None) -> bytes:
    """Return a .tar.gz of (name, type, content, link)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, kind, content, link in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, link, len(content)
            file.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


class Zeros:
    """A stream of zero bytes, for an archive that is small and unpacks to very much."""

    def read(self, size: int) -> bytes:
        return bytes(size)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE])
def test_an_archive_that_is_a_bomb_is_refused(kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, mode="w:gz", compresslevel=1) as file:
        bomb, good = tarfile.TarInfo("bomb"), tarfile.TarInfo("a.bin")
        bomb.type, bomb.size, good.size = kind, 210_000_000, 1
        file.addfile(bomb, Zeros())  # type: ignore[arg-type]
        file.addfile(good, io.BytesIO(b"x"))
    with pytest.raises(ConvlensError, match="cannot be unpacked: it has over 200,000,000 bytes$"):
        unpack_members(path, ["a.bin"], 1000)


TARS = {
    "upwards": tar(("../../evil.bin", tarfile.REGTYPE, b"x", "")),
    "absolute": tar(("/tmp/evil.bin", tarfile.REGTYPE, b"x", "")),
    "a link to a file": tar(("a.bin", tarfile.SYMTYPE, b"", "/etc/passwd")),
    "a hard link": tar(("a.bin", tarfile.LNKTYPE, b"", "/etc/passwd")),
    "a link to a folder, then through it": tar(
        ("d", tarfile.SYMTYPE, b"", "/tmp"), ("d/evil.bin", tarfile.REGTYPE, b"x", "")
    ),
    "a device": tar(("a.bin", tarfile.CHRTYPE, b"", "")),
    "a pipe": tar(("a.bin", tarfile.FIFOTYPE, b"", "")),
    "too large": tar(("a.bin", tarfile.REGTYPE, b"x" * 2000, "")),
    "a pickle": pickle.dumps(Harmful("open")),
}


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_archive_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(TARS[name])
    before = tree(tmp_path)
    with pytest.raises(ConvlensError, match=str(path)):
        unpack_members(path, ["a.bin"], 1000)
    assert tree(tmp_path) == before
    assert not Path("/tmp/evil.bin").exists()


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(bytes(1 << 20))
    with pytest.raises(ConvlensError, match="it has over 200,000,000 bytes"):
        read_verified(path, "0" * 64)


# bundles


def header_of(values: Any, body: bytes = b"") -> bytes:
    """Return a safetensors file with any header."""
    header = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(header)) + header + body


FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WEIGHTS: dict[str, bytes] = {
    "a pickle": pickle.dumps(Harmful("open")),
    "what torch.save writes": b"PK\x03\x04" + pickle.dumps(Harmful("open")),
    "a header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "a header of no length": struct.pack("<Q", 0),
    "a header that is no JSON": header_of(b"{" * 100),
    "a header that is nested deeply": header_of(b"[" * 100_000 + b"]" * 100_000),
    "a header of another kind": header_of([1, 2, 3]),
    "offsets behind the end": header_of({"x": {**FLOAT, "data_offsets": [0, 1 << 40]}}, bytes(8)),
    "offsets that run backwards": header_of({"x": {**FLOAT, "data_offsets": [8, 0]}}, bytes(8)),
    "offsets that overlap": header_of({"x": FLOAT, "y": FLOAT}, bytes(8)),
    "a hole": header_of({"x": {**FLOAT, "data_offsets": [8, 16]}}, bytes(16)),
    "a shape that overflows": header_of({"x": {**FLOAT, "shape": [1 << 62, 1 << 62]}}, bytes(8)),
    "a type that is none": header_of({"x": {**FLOAT, "dtype": "OBJECT"}}, bytes(8)),
    "nothing": b"",
    "other weights": dump_tensors({"x": torch.zeros(2)}),
    "other shapes": dump_tensors({key: torch.zeros(1) for key in make_bundle(width=4).model.state_dict()}),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_bundle(width=4).save(tmp_path / "pets")
    return tmp_path / "pets"


def refuse_bundle(folder: Path) -> None:
    before = tree(folder.parent)
    started = time.monotonic()
    with pytest.raises(ConvlensError) as caught:
        load_bundle(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) and len(str(caught.value)) < 1000
    assert time.monotonic() - started < 1
    assert tree(folder.parent) == before


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights_are_refused(name: str, bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["sha256"] = hashlib.sha256(WEIGHTS[name]).hexdigest()  # whoever writes weights can write that too
    (bundle / "model.safetensors").write_bytes(WEIGHTS[name])
    (bundle / "config.json").write_text(json.dumps(config))
    refuse_bundle(bundle)


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what puts ``value`` at a dotted path of a config."""

    def change(config: dict[str, Any]) -> None:
        *above, last = path.split(".")
        inner: Any = functools.reduce(lambda inner, key: inner[key], above, config)
        inner[last] = value

    return change


CONFIGS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a net larger than memory": changed("model.arguments.width", 1_000_000),
    "a net of absurd width": changed("model.arguments.width", 10**30),
    "a net whose layers are larger than numbers": changed("model.arguments.width", 500_000_000),
    "a net of negative width": changed("model.arguments.width", -4),
    "text for a number": changed("model.arguments.width", "4; import os"),
    "a list for a number": changed("model.arguments.width", [4] * 1000),
    "an option that is none": changed("model.arguments.__class__", 4),
    "a model that is none": changed("model.name", "os.system"),
    "a model that is a path": changed("model.name", "../../../etc/passwd"),
    "a model that is a list": changed("model.name", ["small"]),
    "an image larger than memory": changed("preprocess.height", 10**9),
    "an image of no size": changed("preprocess.width", 0),
    "an ink box larger than the image": changed("preprocess.style.content_size", 10**6),
    "seven channels": changed("preprocess.channels", 7),
    "a mean too many": changed("preprocess.mean", [0.1] * 9),
    "no deviation": changed("preprocess.std", [0.0, 0.0, 0.0]),
    "a million classes": changed("classes", ["x"] * 1_000_000),
    "classes that are none": changed("classes", {"a": 1}),
    "an uncertainty model that is none": changed("uncertainty", {"sha256": "0", "conformal_thresholds": [1e309]}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_refused(name: str, bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    CONFIGS[name](config)
    (bundle / "config.json").write_text(json.dumps(config))
    refuse_bundle(bundle)


JSONS = {
    "nested deeply": b'{"a":' * 200_000,
    "a number of many digits": b'{"a": ' + b"9" * 100_000 + b"}",
    "not a number": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "bytes that are no text": b'{"a": "\xff\xfe"}',
    "a pickle": pickle.dumps(Harmful("open")),
    "nothing": b"",
    "a list": b"[]",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", JSONS)
def test_hostile_json_is_refused(name: str, bundle: Path) -> None:
    (bundle / "config.json").write_bytes(JSONS[name])
    refuse_bundle(bundle)
    with pytest.raises(ConvlensError):
        read_json(bundle / "config.json")


def test_a_json_file_that_is_huge_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(10 << 30)  # takes no room on disk
    with pytest.raises(ConvlensError, match="it is not a file of at most 64 MiB$"):
        read_json(path)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_hostile_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    CheckpointStore(folder).save(TrainState(step=1), {"x": torch.zeros(3)})
    (folder / "step-00000001.safetensors").write_bytes(WEIGHTS[name])
    manifest = folder / "step-00000001.json"
    values = json.loads(manifest.read_text())
    values["sha256"] = digest(hashlib.sha256(WEIGHTS[name]).hexdigest(), values["state"])
    manifest.write_text(json.dumps(values))
    if name.startswith("other "):  # whole, and of another net: the training says so
        with pytest.raises(ConvlensError, match="does not fit this version of convlens"):
            train(make_net(), make_dataset(), make_recipe(), checkpoints=CheckpointStore(folder))
        return
    with pytest.raises(ConvlensError, match="no whole checkpoint is left: train anew$"):
        CheckpointStore(folder).load()


@pytest.fixture(autouse=True)
def nothing_ran() -> Iterator[None]:
    """See that no pickle was run by the test."""
    yield
    assert not Path(CANARY).exists()


def test_the_canary_would_sing() -> None:
    pickle.loads(pickle.dumps(Harmful("open"))).close()
    assert Path(CANARY).exists()
    Path(CANARY).unlink()


def test_nothing_here_can_unpickle() -> None:
    sources = Path(sys.modules["convlens"].__file__ or "").parent.rglob("*.py")
    for path in sources:
        text = path.read_text(encoding="utf-8")
        for word in ("import pickle", "torch.load(", "allow_pickle=True", "joblib", "marshal", "shelve", "extractall"):
            assert word not in text, (path, word)


# folders


def tree(root: Path) -> dict[str, tuple[Any, ...]]:
    """Return what lies below ``root``: kinds, permissions, times, contents; links are not followed."""
    found: dict[str, tuple[Any, ...]] = {}
    for parent, folders, files in os.walk(os.fsencode(root)):
        for name in [*folders, *files]:
            path = os.path.join(parent, name)
            about = os.lstat(path)
            content = None
            if os.path.isfile(path) and not os.path.islink(path) and about.st_size < 1 << 20:
                content = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
            found[os.fsdecode(path)] = (about.st_mode, about.st_size, about.st_mtime_ns, content)
    return found


@pytest.fixture
def hostile_tree(tmp_path: Path) -> Path:
    """Return a folder of photos of two classes, with everything among them that a disk can hold."""
    root = make_folder(tmp_path / "photos", {"cat": 40, "dog": 40})
    cat = root / "cat"
    (cat / "loop").symlink_to(cat)
    (cat / "up").symlink_to(root.parent)
    (cat / "gone.png").symlink_to(root / "nowhere.png")
    (root / "circle").symlink_to(root / "circle")
    good = (cat / "0.png").read_bytes()
    names = [b"caf\xe9.png", b"two\nlines.png", b"tab\there.png", "\u732b.png".encode(), b"-rf.png", b"a;b&c$(d).png"]
    for name in names:
        with open(os.path.join(os.fsencode(cat), name), "wb") as file:
            file.write(good)
    (cat / "empty.png").touch()
    (cat / "text.png").write_text("no image at all")
    (cat / "half.png").write_bytes(good[: len(good) // 2])
    (cat / "wrong.jpg").write_bytes(good)  # a PNG by content: it is read
    (cat / "script.png").write_text("#!/bin/sh\ntouch canary\n")
    (cat / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (cat / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n(canary) (w) file\n")
    os.mkfifo(cat / "pipe.png")
    (root / ".git").mkdir()
    (root / ".git" / "0.png").write_bytes(good)
    (root / "dog" / ".ipynb_checkpoints").mkdir()
    (root / "dog" / ".ipynb_checkpoints" / "0.png").write_bytes(good)
    (root / "__MACOSX").mkdir()
    (root / "notes.txt").write_text("mine")
    return root


def test_a_hostile_folder_is_counted_and_left_alone(
    hostile_tree: Path,
    shell: Shell,  # noqa: F811
) -> None:
    before = tree(hostile_tree)
    line = shell.fails("train", hostile_tree, "--epochs", "1", code=1, says="cannot be read, more than 1%")
    assert "10 of 97 files" in line  # two of them links to folders
    code, out, _ = shell("data", "info", hostile_tree, "--allow-unreadable")
    assert code == 0
    assert out.count("unreadable: cat/") == 10
    quick = ["--device", "cpu", "--threads", "1", "--precision", "fp32", "--epochs", "1", "--allow-unreadable"]
    code, out, err = shell("train", hostile_tree, *quick, "--out", "run")
    assert code == 0, err
    code, out, err = shell("predict", "run", hostile_tree, "--format", "csv")
    assert code == 1 and out.count("\n") >= 89
    for words in (["evaluate", "run"], ["mistakes", "run"], ["data", "doctor", hostile_tree, "--no-labels"]):
        code, _, err = shell(*words)
        assert code == 0, err
    assert tree(hostile_tree) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_is_closed_is_counted(tmp_path: Path) -> None:
    from test_durable import fork, wait

    room = tempfile.TemporaryDirectory()  # pytest's own folders are closed to others
    Path(room.name).chmod(0o755)
    root = make_folder(Path(room.name) / "photos", {"a": 5, "b": 5})
    (root / "a" / "listed").mkdir()
    (root / "a" / "listed" / "0.png").write_bytes((root / "a" / "0.png").read_bytes())
    (root / "a" / "listed").chmod(0o444)  # its files have names, and no more
    (root / "a" / "closed").mkdir()
    (root / "a" / "closed" / "0.png").write_bytes((root / "a" / "0.png").read_bytes())
    (root / "a" / "closed").chmod(0)
    (root / "a" / "1.png").chmod(0)
    before = tree(root)
    said = Path(room.name) / "said"
    said.touch()
    said.chmod(0o666)

    def run() -> None:
        os.setegid(65534)
        os.seteuid(65534)
        os.environ["CONVLENS_CACHE"] = "/nowhere"
        dataset = load_folder(root, allow_unreadable=True)
        said.write_text("\n".join(dataset.unreadable))

    assert wait(fork(run)) == 0
    assert said.read_text().splitlines() == [
        "a/1.png cannot be read: permission denied",
        "a/listed/0.png cannot be read: permission denied",
        "a/closed cannot be read: permission denied",
    ]
    assert tree(root) == before
    (root / "a" / "closed").chmod(0o755)
    room.cleanup()


def test_a_run_whose_data_has_a_name_that_is_no_text_goes_on(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 10, "b": 10})
    with open(os.path.join(os.fsencode(root), b"a", b"bad\xe9.png"), "wb") as file:
        file.write(b"no image")
    run = Experiment.start(
        TrainRequest.create(
            root, out=tmp_path / "run", epochs=1, allow_unreadable=True, device="cpu", threads=1, precision="fp32"
        )
    )
    assert run.config.data["unreadable"][0].startswith("a/bad\udce9.png is not an image")
    resumed = Experiment.resume(tmp_path / "run")
    assert resumed.config.data == json.loads(json.dumps(run.config.data))


@register("reads-its-weights")
class ReadsItsWeights(ConvNet):
    """A net whose constructor reads values, which a net without memory cannot."""

    def __init__(self, channels: int, image_height: int, image_width: int, classes: int):
        super().__init__()
        rates = [x.item() for x in torch.linspace(0, 0.1, 2)]
        self.body = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Dropout(rates[1]))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def test_a_net_of_ones_own_that_reads_values_loads(tmp_path: Path) -> None:
    make_bundle(model="reads-its-weights").save(tmp_path / "own")
    assert isinstance(load_bundle(tmp_path / "own").model, ReadsItsWeights)


# images


def bad_files(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield mutated image files of every format: flipped, cut, with bytes put in, and with sizes that are lies."""
    random = np.random.default_rng(seed)
    picture = Image.fromarray(random.integers(0, 256, (24, 31, 3), dtype=np.uint8))
    seeds: list[tuple[str, bytes]] = []
    for kind, modes in (
        ("JPEG", ("RGB", "L", "CMYK")), ("PNG", ("RGB", "RGBA", "P", "1", "I;16", "LA")), ("GIF", ("P",)),
        ("WEBP", ("RGB", "RGBA")), ("BMP", ("RGB", "P", "1")), ("TIFF", ("RGB", "CMYK", "F", "1")), ("PPM", ("RGB",)),
    ):  # fmt: skip
        for mode in modes:
            image = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
            for options in ({}, {"progressive": True}) if kind == "JPEG" else ({},):
                buffer = io.BytesIO()
                image.save(buffer, kind, **options)
                seeds.append((kind, buffer.getvalue()))
    for number in range(count):
        kind, content = seeds[number % len(seeds)]
        damaged = bytearray(content)
        for _ in range(int(random.integers(1, 6))):
            place = int(random.integers(0, min(len(damaged), 64 if random.random() < 0.5 else 1 << 20)))
            how = random.integers(0, 5)
            if how == 0:
                damaged[place] ^= 1 << int(random.integers(0, 8))
            elif how == 1:
                damaged[place : place + 4] = random.bytes(4)
            elif how == 2:
                damaged[place : place + 4] = b"\xff\xff\xff\x7f"
            elif how == 3:
                damaged[place:place] = random.bytes(int(random.integers(1, 40)))
            elif len(damaged) > 60:
                del damaged[int(random.integers(40, len(damaged))) :]
        if kind == "PNG" and random.random() < 0.7:  # with right checksums, or nothing behind them is ever reached
            damaged = bytearray(repair_png(bytes(damaged)))
        yield kind, bytes(damaged)


def repair_png(content: bytes) -> bytes:
    """Return a PNG with the checksums of all its chunks made right, as far as it has chunks."""
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        body = content[place + 4 : place + 8 + size]
        parts += [content[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
        place += 12 + size
    return b"".join(parts) + content[place:]


def check_bad_files(folder: Path, count: int) -> dict[str, int]:
    """Open mutated images, each within 2 s and 300 MB, in a process of its own; return how many could be read."""
    import resource

    from test_durable import fork, wait

    from convlens.data.images import InvalidImageError, open_image, to_mode

    tally = folder / "tally.json"

    def work() -> None:
        warnings.simplefilter("default")  # as in the command
        sys.stderr = open(folder / "errors", "w", buffering=1)
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read = refused = 0
        slowest = 0.0
        for number, (kind, content) in enumerate(bad_files(count, seed=1)):
            path = folder / f"{number}.{kind.lower()}"
            path.write_bytes(content)
            started = time.perf_counter()
            try:
                to_mode(open_image(path), 3)
                read += 1
            except InvalidImageError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error), str(error)
                refused += 1
            slowest = max(slowest, time.perf_counter() - started)
            path.unlink()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun
        tally.write_text(json.dumps({"read": read, "refused": refused, "ms": slowest * 1000, "MiB": grown // 1024}))

    assert wait(fork(work), 600) == 0, (folder / "errors").read_text()
    return json.loads(tally.read_text())  # type: ignore[no-any-return]


def check_tally(tally: dict[str, int], count: int) -> None:
    print(tally)
    assert tally["read"] + tally["refused"] == count
    assert tally["read"] > 0.05 * count and tally["refused"] > 0.3 * count
    assert tally["ms"] <= 2000 and tally["MiB"] <= 300


def test_mutated_images_are_read_or_named(tmp_path: Path) -> None:
    check_tally(check_bad_files(tmp_path, 1000), 1000)


@pytest.mark.slow
def test_10000_mutated_images_are_read_or_named(tmp_path: Path) -> None:
    check_tally(check_bad_files(tmp_path, 10_000), 10_000)
