"""The published data sets: where their files lie, where they come from, and what proves that they are the ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convlens.data.dataset import HELD_OUT, SPLIT_SEED, TEST_FRACTION, Dataset, IndexIds, Split
from convlens.data.download import (
    check_sha256,
    download,
    find_file,
    find_or_download,
    missing,
    read_verified,
    unpack_members,
)
from convlens.data.formats import CIFAR_RECORD, parse_cifar10, parse_idx
from convlens.data.images import InputStyle
from convlens.errors import ConvlensError
from convlens.system.files import atomic_write, cache_dir
from convlens.system.registry import Registry

# name -> loader; a loader's docstring is what `convlens data list` shows
DATASETS: Registry[Callable[[], Dataset]] = Registry("data set")


@dataclass(frozen=True)
class IdxSource:
    """A data set published as four IDX files: where they lie, where they come from, and their SHA-256."""

    folders: tuple[str, ...]  # below a place of the search path; the last is torchvision's layout
    mirrors: tuple[str, ...]
    train_images: str
    train_labels: str
    test_images: str
    test_labels: str

    def load(self, part: str) -> Split:
        """Return the split ``part`` ("train" or "test"), found or downloaded, verified."""
        prefix = {"train": "train", "test": "t10k"}[part]
        arrays = []
        for kind, sha256 in (
            ("images-idx3", getattr(self, f"{part}_images")),
            ("labels-idx1", getattr(self, f"{part}_labels")),
        ):
            name = f"{prefix}-{kind}-ubyte"
            arrays.append(parse_idx(find_or_download(name, sha256, self.folders, self.mirrors), name))
        images, labels = arrays  # (N, 28, 28), (N,)
        return Split(images.unsqueeze(1), labels.long(), IndexIds(len(labels)))


MNIST = IdxSource(
    folders=("mnist", "mnist/raw", "MNIST/raw"),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    train_images="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    train_labels="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    test_images="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    test_labels="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)

FASHION_MNIST = IdxSource(
    folders=("fashion-mnist", "fashion-mnist/raw", "FashionMNIST/raw"),
    mirrors=("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",),
    train_images="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    train_labels="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    test_images="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    test_labels="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)

CIFAR10_FOLDERS = ("cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin")

CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"

CIFAR10_MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)

CIFAR10_FILES = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

DIGITS = tuple("0123456789")

PUBLISHED_SPLITS = "the published train and test splits"


@DATASETS.register("digits")
def load_digits() -> Dataset:
    """1,797 handwritten digits, 8x8 grey; embedded in scikit-learn, nothing to download."""
    # its file: to import sklearn.datasets takes a second. Rows: 64 counts 0..16 of set pixels in 4x4 blocks, label
    (package,) = find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr, misc]
    file = Path(package, "datasets", "data", "digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64))  # (1797, 65)
    images = (rows[:, :-1] * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
    everything = Split(images, rows[:, -1].clone(), IndexIds(len(images)))
    train, test = everything.divide(TEST_FRACTION, SPLIT_SEED)
    note = HELD_OUT
    return Dataset("digits", "digits", DIGITS, train, test, None, InputStyle(content_size=8), note)


@DATASETS.register("mnist")
def load_mnist() -> Dataset:
    """70,000 handwritten digits, 28x28 grey (LeCun, Cortes, Burges)."""
    style = InputStyle(content_size=20, center_of_mass=True)
    train, test = MNIST.load("train"), MNIST.load("test")
    return Dataset("mnist", "mnist", DIGITS, train, test, None, style, PUBLISHED_SPLITS)


@DATASETS.register("fashion-mnist")
def load_fashion_mnist() -> Dataset:
    """70,000 pictures of clothes, 28x28 grey (Zalando)."""
    train, test = FASHION_MNIST.load("train"), FASHION_MNIST.load("test")
    style = InputStyle(content_size=28)
    return Dataset("fashion-mnist", "fashion-mnist", FASHION_CLASSES, train, test, None, style, PUBLISHED_SPLITS)


@DATASETS.register("cifar10")
def load_cifar10() -> Dataset:
    """60,000 photos of ten kinds of things, 32x32 colour (Krizhevsky); the binary version."""
    contents = {}
    for name, sha256 in CIFAR10_FILES.items():
        if path := find_file(name, CIFAR10_FOLDERS):
            contents[name] = read_verified(path, sha256)
    if len(contents) < len(CIFAR10_FILES):
        contents = read_cifar10_archive()
    parsed = [parse_cifar10(contents[name], name) for name in CIFAR10_FILES]

    def join(parts: list[tuple[Tensor, Tensor]]) -> Split:
        images = torch.cat([images for images, _ in parts])
        return Split(images, torch.cat([labels for _, labels in parts]), IndexIds(len(images)))

    train, test = join(parsed[:5]), join(parsed[5:])
    return Dataset("cifar10", "cifar10", CIFAR10_CLASSES, train, test, None, InputStyle(), PUBLISHED_SPLITS)


def read_cifar10_archive() -> dict[str, bytes]:
    """Return CIFAR-10's six files, verified, from the archive: found on the search path or downloaded."""

    def read(archive: Path) -> dict[str, bytes]:
        contents = unpack_members(archive, list(CIFAR10_FILES), 10_000 * CIFAR_RECORD)
        for name, content in contents.items():
            check_sha256(f"{name} in {archive}", content, CIFAR10_FILES[name])
        return contents

    if path := find_file(CIFAR10_ARCHIVE, ("cifar10", "")):
        return read(path)
    failures = []
    for mirror in CIFAR10_MIRRORS:
        try:
            with atomic_write(cache_dir() / "cifar10" / CIFAR10_ARCHIVE) as temporary:
                download(mirror + CIFAR10_ARCHIVE, temporary)
                return read(temporary)
        except ConvlensError as error:
            failures.append(f"{mirror}: {error}")
    raise ConvlensError(missing(CIFAR10_ARCHIVE, "cifar10", failures))


def locate(name: str) -> str:
    """Say where the files of a published data set are, for ``convlens data list``."""
    if name == "digits":
        return "embedded"
    files = {
        "mnist": ("train-images-idx3-ubyte", MNIST.folders),
        "fashion-mnist": ("train-images-idx3-ubyte", FASHION_MNIST.folders),
        "cifar10": ("data_batch_1.bin", CIFAR10_FOLDERS),
    }
    found = find_file(*files[name]) if name in files else None
    if found is None and name == "cifar10":
        found = find_file(CIFAR10_ARCHIVE, ("cifar10", ""))
    return str(found.parent) if found else "to be downloaded"
