"""Every source of data by name or by form: published sets, folders, arrays, map-style datasets."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convlens.data.dataset import HELD_OUT, SPLIT_SEED, TEST_FRACTION, Dataset, Split, check_classes
from convlens.data.fetch import (
    cache_folder,
    check_sha256,
    download,
    find_file,
    find_or_download,
    missing,
    read_verified,
    unpack_members,
)
from convlens.data.folder import choose_form, load_folder
from convlens.data.parsers import CIFAR_RECORD, parse_cifar10, parse_idx
from convlens.data.preprocess import (
    BadImage,
    PictureStyle,
    array_to_image,
    fit_photo,
    image_to_tensor,
    is_grey,
    to_bytes,
    to_mode,
)
from convlens.errors import ConvlensError, UnknownName, UsageError
from convlens.progress import track
from convlens.registry import Registry
from convlens.runfolder import replacing

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
        return Split(images.unsqueeze(1), labels.long(), numbered(len(labels)))


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


def numbered(count: int) -> list[str]:
    """Return "0", "1", ...: the ids of images that have no names."""
    return [str(i) for i in range(count)]


@DATASETS.register("digits")
def load_digits() -> Dataset:
    """1,797 handwritten digits, 8x8 grey; embedded in scikit-learn, nothing to download."""
    from sklearn.datasets import load_digits as load_embedded

    digits = load_embedded()
    # counts 0..16 of set pixels in a 4x4 block -> 0..255
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    everything = Split(images, torch.from_numpy(digits.target).long(), numbered(len(images)))
    train, test = everything.divide(TEST_FRACTION, SPLIT_SEED)
    note = HELD_OUT
    return Dataset("digits", "digits", DIGITS, train, test, None, PictureStyle(ink_box=8), note)


@DATASETS.register("mnist")
def load_mnist() -> Dataset:
    """70,000 handwritten digits, 28x28 grey (LeCun, Cortes, Burges)."""
    style = PictureStyle(ink_box=20, centre_by_mass=True)
    train, test = MNIST.load("train"), MNIST.load("test")
    return Dataset("mnist", "mnist", DIGITS, train, test, None, style, PUBLISHED_SPLITS)


@DATASETS.register("fashion-mnist")
def load_fashion_mnist() -> Dataset:
    """70,000 pictures of clothes, 28x28 grey (Zalando)."""
    train, test = FASHION_MNIST.load("train"), FASHION_MNIST.load("test")
    style = PictureStyle(ink_box=28)
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
        return Split(images, torch.cat([labels for _, labels in parts]), numbered(len(images)))

    train, test = join(parsed[:5]), join(parsed[5:])
    return Dataset("cifar10", "cifar10", CIFAR10_CLASSES, train, test, None, PictureStyle(), PUBLISHED_SPLITS)


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
            with replacing(cache_folder() / "cifar10" / CIFAR10_ARCHIVE) as temporary:
                download(mirror + CIFAR10_ARCHIVE, temporary)
                return read(temporary)
        except ConvlensError as error:
            failures.append(f"{mirror}: {error}")
    raise ConvlensError(missing(CIFAR10_ARCHIVE, "cifar10", failures))


def load_dataset(source: Any, *, image_size: int = 0, channels: int = 0, allow_unreadable: bool = False) -> Dataset:
    """Return ``source`` as a Dataset.

    ``source`` is a name (``convlens data list``), the path of a folder of class folders or of a .npz file, arrays
    ``(x, y)`` or ``(x_train, y_train, x_test, y_test)``, any sized map-style dataset of (PIL image or array, int)
    pairs, a tuple of two such (train, test), or a Dataset. ``image_size`` and ``channels`` say what a folder's images
    are brought to (0: as they are, large photos 64x64). Raises UsageError for what is none of these, ConvlensError
    for files that are missing, damaged or not the published ones.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, (str, Path)):
        if str(source) in DATASETS:
            return DATASETS[str(source)]()
        path = Path(source)
        if path.is_dir():
            return load_folder(path, image_size=image_size, channels=channels, allow_unreadable=allow_unreadable)
        if path.suffix == ".npz":
            return load_npz(path)
        if path.exists():
            raise UsageError(f"{path} is a file; give a folder of class folders, a .npz file or a name")
        if len(path.parts) > 1:
            raise UsageError(f"there is no folder {path}")
        raise UnknownName("data set or folder", str(source), DATASETS.names())
    if isinstance(source, tuple) and len(source) == 2 and all(map(is_map_style, source)):
        return from_map_style(*source, image_size=image_size, channels=channels)
    if isinstance(source, tuple):
        if len(source) not in (2, 4):
            raise UsageError(f"a tuple of {len(source)}: give (x, y) or (x_train, y_train, x_test, y_test)")
        return from_arrays(*source)
    if is_map_style(source):
        return from_map_style(source, image_size=image_size, channels=channels)
    raise UsageError(f"cannot read data from a {type(source).__name__}; see convlens.load_dataset")


def is_map_style(source: Any) -> bool:
    """Say whether ``source`` looks like a sized map-style dataset, and not like an array."""
    sized = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    return sized and not isinstance(source, (Mapping, tuple, np.ndarray, Tensor)) and not is_flat_list(source)


def is_flat_list(source: Any) -> bool:
    """Say whether ``source`` is a plain list of numbers or of rows: an array in waiting."""
    return isinstance(source, list) and not all(isinstance(item, tuple) and len(item) == 2 for item in source)


def from_arrays(
    x: Any,
    y: Any,
    x_test: Any = None,
    y_test: Any = None,
    *,
    classes: Sequence[str] = (),
    name: str = "arrays",
) -> Dataset:
    """Return images and labels held in arrays as a Dataset; without test arrays a fifth of every class is test.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels: uint8, whole numbers 0..255 or
    floats 0..1. Labels are (N,) whole numbers from 0.
    """
    train = make_split(x, y, name)
    labels = classes or numbered(int(train.labels.max()) + 1)
    too_large = f"{name}: a label is larger than the number of classes, {len(labels)}"
    if int(train.labels.max()) >= len(labels):
        raise UsageError(too_large)
    note = "the arrays' own splits"
    if x_test is None:
        check_classes(name, labels, train, what="the arrays")
        train, test = train.divide(TEST_FRACTION, SPLIT_SEED)
        note = HELD_OUT
    else:
        check_classes(name, labels, train)
        test = make_split(x_test, y_test, f"{name} (test)")
        if test.images.shape[1:] != train.images.shape[1:]:
            sizes = f"{tuple(test.images.shape[1:])}, train's {tuple(train.images.shape[1:])}"
            raise UsageError(f"{name}: test images are {sizes}")
    if int(test.labels.max()) >= len(labels):
        raise UsageError(too_large)
    return Dataset(name, None, tuple(labels), train, test, None, PictureStyle(), note)


def make_split(x: Any, y: Any, name: str) -> Split:
    """Return arrays as a split; UsageError says what is wrong with them."""
    try:
        x, y = np.asarray(x), np.asarray(y)
    except ValueError as error:  # rows of different lengths
        raise UsageError(f"{name}: {error}") from None
    if x.ndim == 3:
        x = x[:, None]  # (N, H, W) -> (N, 1, H, W)
    elif x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UsageError(f"{name}: images of shape {x.shape}; give (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3")
    if y.shape != x.shape[:1]:
        raise UsageError(f"{name}: {len(x)} images but labels of shape {y.shape}")
    if len(y) == 0:
        raise UsageError(f"{name}: there is no image")
    if not np.issubdtype(y.dtype, np.integer):
        raise UsageError(f"{name}: labels must be whole numbers from 0, not {y.dtype}")
    if y.min() < 0:
        raise UsageError(f"{name}: labels must be whole numbers from 0, not {y.dtype} from {y.min()}")
    try:
        pixels = to_bytes(x)
    except BadImage as error:
        raise UsageError(f"{name}: {error}") from None
    images = torch.from_numpy(np.array(pixels, order="C"))
    return Split(images, torch.from_numpy(y.astype(np.int64)), numbered(len(y)))


def load_npz(path: Path) -> Dataset:
    """Return the data set in a .npz file with x, y, or with x_train, y_train, x_test, y_test."""
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    # TypeError: one array (.npy), not several; the last two: a damaged zip
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ConvlensError(f"{path} cannot be read as .npz: {error}") from None
    for keys in (("x_train", "y_train", "x_test", "y_test"), ("x", "y")):
        if set(keys) <= set(arrays):
            dataset = from_arrays(*(arrays[key] for key in keys), name=path.stem)
            return replace(dataset, source=str(path.resolve()))
    raise ConvlensError(f"{path} holds {', '.join(arrays) or 'nothing'}; it needs x and y, or x_train, y_train, ...")


def from_map_style(dataset: Any, test: Any = None, *, image_size: int = 0, channels: int = 0) -> Dataset:
    """Return a sized map-style dataset of (PIL image or array, int) pairs, and perhaps its test part, as a Dataset.

    Each item is read once. Images of several sizes are fitted to one, as those of a folder are.
    """
    name = type(dataset).__name__.lower()
    images, labels = read_pairs(dataset, name)
    test_images, test_labels = read_pairs(test, f"{name} (test)") if test is not None else ([], [])
    everything = images + test_images
    side, planes = choose_form([(min(image.size), is_grey(image)) for image in everything], image_size, channels)
    same = len({image.size for image in everything}) == 1 and not image_size
    width, height = images[0].size if same else (side, side)

    def pixels(pictures: list[Image.Image]) -> Any:
        return torch.stack([image_to_tensor(fit_photo(to_mode(p, planes), height, width)) for p in pictures]).numpy()

    classes = [str(c) for c in getattr(dataset, "classes", ())]
    arrays = [pixels(images), np.array(labels)]
    if test is not None:
        arrays += [pixels(test_images), np.array(test_labels)]
    return from_arrays(*arrays, classes=classes, name=name)


def read_pairs(dataset: Any, name: str) -> tuple[list[Image.Image], list[int]]:
    """Return the images and labels of a map-style dataset; UsageError says what is wrong with it."""
    images, labels = [], []
    for i in track(range(len(dataset)), "reading the dataset", len(dataset)):
        item = dataset[i]
        try:
            image, label = item
            labels.append(int(label))
        except (TypeError, ValueError):
            raise UsageError(f"{name}: item {i} is not a pair of an image and a whole number") from None
        images.append(image if isinstance(image, Image.Image) else array_to_image(image))
    if not images:
        raise UsageError(f"{name}: there is no image")
    return images, labels


def whereabouts(name: str) -> str:
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
