"""Folders of class folders as people have them: any image, any mess; only ever read, decoded once."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convlens.data import decoding, images
from convlens.data import image_folder as folder_module
from convlens.data.dataset import Dataset
from convlens.data.image_folder import load_folder, scan
from convlens.data.loading import load_dataset
from convlens.errors import ConvlensError, UsageError

RED, BLUE = (230, 20, 20), (20, 20, 230)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty folder for pictures."""
    path = tmp_path / "photos"
    path.mkdir()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own-cache"
    monkeypatch.setenv("CONVLENS_CACHE", str(path))
    return path


def paint(path: Path, colour: object = RED, mode: str = "RGB", size: tuple[int, int] = (8, 8), **how: object) -> Path:
    """Write one picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **how)  # type: ignore[arg-type]
    return path


def fill(root: Path, *classes: str, count: int = 5, start: int = 0) -> Path:
    """Write ``count`` different pictures of every class: class k at number i is grey level 40 k + i."""
    for k, label in enumerate(classes):
        for i in range(start, start + count):
            paint(root / label / f"{i:03}.png", 40 * k + i, "L")
    return root


def spoil(path: Path, content: bytes = b"not an image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def all_ids(dataset: Dataset) -> list[str]:
    return sorted(name for split in dataset.splits.values() for name in split.ids)


def look(dataset: Dataset, name: str) -> torch.Tensor:
    """The pixels of one picture, whatever split it is in."""
    for split in dataset.splits.values():
        if name in split.ids:
            return split.images[list(split.ids).index(name)]
    raise AssertionError(f"{name} is in no split")


# what a picture becomes


def write_gif(path: Path) -> None:
    frames = [Image.new("RGB", (12, 12), colour) for colour in (RED, BLUE)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def write_palette_with_transparency(path: Path) -> None:
    image = Image.new("P", (12, 12), 1)
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (0, 0, 12, 6))  # the upper half is see-through
    image.save(path, transparency=0)


def write_16_bit(path: Path) -> None:
    Image.fromarray(np.full((10, 10), 0x8080, np.uint16)).save(path)


def write_rotated(path: Path) -> None:
    image = Image.new("RGB", (20, 10), BLUE)
    image.paste(RED, (0, 0, 10, 10))  # red on the left; turned by a quarter, red is above
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)


def mixture(root: Path) -> Path:
    """Pictures of every kind that people have, in two classes."""
    one, two = root / "one", root / "two"
    paint(one / "rgb.jpg", RED, size=(30, 17), quality=95)
    paint(one / "grey.png", 100, "L", size=(9, 40))
    paint(one / "bits.png", 1, "1", size=(16, 16))
    paint(one / "la.png", (0, 0), "LA", size=(11, 11))
    paint(one / "rgba.png", (*RED, 255), "RGBA", size=(64, 64))
    paint(two / "glass.png", (*RED, 0), "RGBA", size=(13, 13))
    paint(two / "cmyk.jpg", (255, 255, 0, 0), "CMYK", size=(14, 14), quality=95)  # cyan and magenta: blue
    paint(two / "bitmap.bmp", BLUE, size=(5, 5))
    paint(two / "photo.webp", BLUE, size=(33, 20), lossless=True)
    paint(two / "scan.tiff", 60, "L", size=(25, 15))
    write_gif(one / "moving.gif")
    write_palette_with_transparency(two / "palette.png")
    write_16_bit(two / "deep.png")
    write_rotated(two / "turned.jpg")
    shutil.copy(one / "grey.png", one / "really-a-png.jpg")
    return root


def test_any_mix_of_sizes_and_modes_becomes_one_form(root: Path) -> None:
    dataset = load_folder(mixture(root), image_size=12)
    assert dataset.shape == (3, 12, 12)
    assert dataset.unreadable == ()
    assert len(all_ids(dataset)) == 15
    flat = {
        "one/rgb.jpg": RED,
        "one/grey.png": (100, 100, 100),
        "one/really-a-png.jpg": (100, 100, 100),
        "one/bits.png": (255, 255, 255),
        "one/la.png": (255, 255, 255),  # see-through: white
        "one/rgba.png": RED,
        "one/moving.gif": RED,  # the first frame
        "two/glass.png": (255, 255, 255),
        "two/cmyk.jpg": (0, 0, 255),
        "two/bitmap.bmp": BLUE,
        "two/photo.webp": BLUE,
        "two/scan.tiff": (60, 60, 60),
        "two/deep.png": (128, 128, 128),  # not white
    }
    for name, colour in flat.items():
        pixels = look(dataset, name).float()
        assert (pixels - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 4, name
    palette = look(dataset, "two/palette.png")
    assert palette[:, :6].unique().tolist() == [255]
    assert palette[:, 6:, 0].T.unique(dim=0).tolist() == [list(RED)]
    turned = look(dataset, "two/turned.jpg").float()
    assert (turned[:, :4].mean(dim=(1, 2)) - torch.tensor(RED)).abs().max() < 12  # red above, blue below
    assert (turned[:, 8:].mean(dim=(1, 2)) - torch.tensor(BLUE)).abs().max() < 12


def test_a_wide_picture_is_cut_at_both_sides_alike(root: Path) -> None:
    fill(root, "a", "b")
    image = Image.new("RGB", (24, 8), BLUE)
    image.paste(RED, (8, 0, 16, 8))
    image.save(root / "a" / "wide.png")
    assert look(load_folder(root), "a/wide.png").flatten(1).T.unique(dim=0).tolist() == [list(RED)]


@pytest.mark.parametrize(("size", "side"), [((8, 8), 8), ((30, 22), 22), ((64, 70), 64), ((200, 90), 64)])
def test_pictures_keep_their_size_up_to_64(size: tuple[int, int], side: int, root: Path) -> None:
    for label in "ab":
        for i in range(3):
            paint(root / label / f"{i}.png", (i, 2, 3), size=size)
    assert load_folder(root).shape == (3, side, side)
    assert load_folder(root, image_size=16).shape == (3, 16, 16)
    assert load_folder(root, channels=1).shape == (1, side, side)


def test_the_median_of_the_shorter_sides_is_the_size(root: Path) -> None:
    for i, side in enumerate([5, 9, 11, 12, 50]):
        paint(root / "ab"[i % 2] / f"{i}.png", size=(side, side + i))
    assert load_folder(root).shape == (3, 11, 11)


GREY: dict[str, Callable[[Path], object]] = {
    "L": lambda path: paint(path, 7, "L"),
    "1": lambda path: paint(path, 1, "1"),
    "I;16": write_16_bit,
    "LA": lambda path: paint(path, (7, 255), "LA"),
    "I;16B": lambda path: Image.fromarray(np.full((8, 8), 99, ">u2")).save(path.with_suffix(".tiff")),
    "F": lambda path: paint(path.with_suffix(".tiff"), 0.5, "F"),
}


@pytest.mark.parametrize("mode", GREY)
def test_a_folder_of_grey_pictures_has_one_channel(mode: str, root: Path) -> None:
    fill(root, "a", "b")
    GREY[mode](root / "a" / "other.png")
    assert load_folder(root).shape[0] == 1
    assert load_folder(root, channels=3).shape[0] == 3


def test_one_colour_picture_makes_three_channels(root: Path) -> None:
    paint(fill(root, "a", "b") / "a" / "red.png")
    assert load_folder(root).shape[0] == 3


def test_a_file_that_will_not_be_decoded_has_no_say_in_the_form(root: Path) -> None:
    fill(root, "a", "b", count=60)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n%%EOF\n"
    spoil(root / "a" / "logo.eps", eps)
    dataset = load_folder(root)
    assert dataset.shape == (1, 8, 8)  # an EPS counts as colour
    assert len(dataset.unreadable) == 1


# which folders and files count


def test_hidden_files_and_folders_are_ignored(root: Path) -> None:
    fill(root, "ants", "bees")
    paint(root / ".ipynb_checkpoints" / "0.png")
    paint(root / "__MACOSX" / "0.png")
    paint(root / "ants" / ".ipynb_checkpoints" / "0-checkpoint.png")
    spoil(root / "ants" / ".DS_Store")
    spoil(root / "ants" / "._000.png")
    spoil(root / "readme.txt")
    dataset = load_folder(root)
    assert dataset.classes == ("ants", "bees")
    assert all_ids(dataset) == sorted(f"{label}/{i:03}.png" for label in ("ants", "bees") for i in range(5))


def test_hidden_folders_in_splits_are_ignored(root: Path) -> None:
    fill(root / "train", "a", "b")
    fill(root / "test", "a", "b", start=10)
    paint(root / "train" / ".ipynb_checkpoints" / "0.png")
    paint(root / ".git" / "x" / "0.png")
    assert load_folder(root).classes == ("a", "b")


def test_folders_inside_a_class_belong_to_it(root: Path) -> None:
    fill(root, "a", "b")
    paint(root / "b" / "2024" / "may" / "x.png", 9, "L")
    dataset = load_folder(root)
    assert dataset.classes == ("a", "b")
    assert "b/2024/may/x.png" in all_ids(dataset)


def test_classes_are_sorted_and_labels_follow_them(root: Path) -> None:
    fill(root, "zebra", "ant", "Bee")
    dataset = load_folder(root)
    assert dataset.classes == ("Bee", "ant", "zebra")
    for split in dataset.splits.values():
        assert [dataset.classes[i] for i in split.labels.tolist()] == [name.split("/")[0] for name in split.ids]


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("validation", ["val", "valid", "validation", "VAL"])
@pytest.mark.parametrize("test", ["test", "Testing"])
def test_the_names_of_splits(train: str, validation: str, test: str, root: Path) -> None:
    fill(root / train, "a", "b", count=3)
    fill(root / validation, "a", "b", count=2, start=10)
    fill(root / test, "a", "b", count=1, start=20)
    dataset = load_folder(root)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 6, "validation": 4, "test": 2}
    assert dataset.validation is not None
    assert dataset.validation.ids[0] == f"{validation}/a/010.png"
    assert dataset.note == "the folder's own splits"
    assert dataset.validation.images[0].unique().tolist() == [10]
    assert dataset.with_validation(0.1, 1) is dataset


def test_without_a_test_folder_the_validation_folder_is_the_test_split(root: Path) -> None:
    fill(root / "train", "a", "b")
    fill(root / "val", "a", "b", count=2, start=10)
    dataset = load_folder(root)
    assert (len(dataset.train), dataset.validation, len(dataset.test)) == (10, None, 4)
    assert all(name.startswith("val/") for name in dataset.test.ids)
    assert dataset.note == "no test folder: the validation folder is the test split, and nothing is chosen by it"


def test_with_a_train_folder_alone_a_fifth_of_it_is_the_test_split(root: Path) -> None:
    fill(root / "train", "a", "b", count=10)
    dataset = load_folder(root)
    assert (len(dataset.train), dataset.validation, len(dataset.test)) == (16, None, 4)
    assert dataset.note == "no test folder: 20% of every class is the test split (seed 0)"


def test_with_train_and_test_there_is_no_validation_split_yet(root: Path) -> None:
    fill(root / "train", "a", "b", count=10)
    fill(root / "test", "a", "b", count=1, start=20)
    dataset = load_folder(root)
    assert (len(dataset.train), dataset.validation, len(dataset.test)) == (20, None, 2)
    carved = dataset.with_validation(0.2, 7)
    assert carved.validation is not None
    assert (len(carved.train), len(carved.validation), len(carved.test)) == (16, 4, 2)


def test_a_class_called_test_is_a_class_where_nothing_is_called_train(root: Path) -> None:
    assert load_folder(fill(root, "test", "val")).classes == ("test", "val")


def test_two_folders_for_one_split_are_refused(root: Path) -> None:
    for name in ("train", "val", "valid"):
        fill(root / name, "a", "b")
    with pytest.raises(UsageError) as caught:
        load_folder(root)
    assert str(caught.value) == f"{root} has two folders for one split: train, val, valid"


def test_an_unsplit_folder_is_divided_by_class_the_same_every_time(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, "a", count=10)
    fill(root, "b", count=30)
    first = load_folder(root)
    assert torch.bincount(first.test.labels).tolist() == [2, 6]
    assert torch.bincount(first.train.labels).tolist() == [8, 24]
    assert not set(first.train.ids) & set(first.test.ids)
    assert first.note == "the folder is not split: 20% of every class is the test split (seed 0)"
    monkeypatch.setenv("CONVLENS_CACHE", str(tmp_path / "another"))
    torch.manual_seed(12345)
    again = load_folder(root)
    assert (list(again.train.ids), list(again.test.ids)) == (list(first.train.ids), list(first.test.ids))
    assert again.fingerprint() == first.fingerprint()


def test_name_and_source(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, "a", "b")
    monkeypatch.chdir(root.parent)
    for source in (root, "photos", Path("photos"), "./photos/"):
        dataset = load_dataset(source)
        assert (dataset.name, dataset.source) == ("photos", str(root))
    assert dataset.style.content_size == 0


# unreadable files


BROKEN: dict[str, Callable[[Path], object]] = {
    "text": lambda path: spoil(path),
    "empty": lambda path: spoil(path, b""),
    "truncated": lambda path: spoil(path, paint(path.with_name("x.jpg"), size=(99, 99)).read_bytes()[:400]),
    "link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unreadable_file_is_named_and_counted(kind: str, root: Path) -> None:
    fill(root, "a", "b")
    BROKEN[kind](root / "a" / "bad.jpg")
    (root / "a" / "x.jpg").unlink(missing_ok=True)
    with pytest.raises(ConvlensError) as caught:
        load_folder(root)
    message = str(caught.value)
    assert message.startswith(f"1 of 11 files in {root} cannot be read, more than 1%: a/bad.jpg")
    assert message.endswith(". Remove them, or skip them with --allow-unreadable")
    dataset = load_folder(root, allow_unreadable=True)
    assert len(all_ids(dataset)) == 10
    assert len(dataset.unreadable) == 1
    assert dataset.unreadable[0].startswith("a/bad.jpg")


def test_only_the_first_three_unreadable_files_are_named(root: Path) -> None:
    fill(root, "a", "b")
    for i in range(5):
        spoil(root / "b" / f"bad{i}.png")
    with pytest.raises(ConvlensError, match=r"^5 of 15 files .*bad0\.png .*bad1\.png .*bad2\.png .*; and 2 more\. Rem"):
        load_folder(root)


@pytest.mark.parametrize(("good", "bad", "goes_on"), [(99, 1, True), (98, 1, False), (198, 2, True), (197, 3, False)])
def test_up_to_one_per_cent_goes_on(good: int, bad: int, goes_on: bool, root: Path) -> None:
    for i in range(good):
        paint(root / "ab"[i % 2] / f"{i}.png", i, "L", size=(2, 2))
    for i in range(bad):
        spoil(root / "a" / f"bad{i}.png")
    if goes_on:
        dataset = load_folder(root)
        assert len(all_ids(dataset)) == good
        assert len(dataset.unreadable) == bad
    else:
        with pytest.raises(ConvlensError, match=f"^{bad} of {good + bad} files in "):
            load_folder(root)


def test_the_pixels_stay_with_their_names_when_files_are_skipped(root: Path) -> None:
    fill(root, "a", "b")
    spoil(root / "a" / "002.png")
    dataset = load_folder(root, allow_unreadable=True)
    assert look(dataset, "a/003.png").unique().tolist() == [3]
    assert look(dataset, "b/004.png").unique().tolist() == [44]


def test_a_picture_of_too_many_pixels_is_unreadable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, "a", "b")
    paint(root / "a" / "bomb.png", size=(40, 40))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    dataset = load_folder(root, allow_unreadable=True)
    assert dataset.unreadable == ("a/bomb.png has too many pixels (over 1,000)",)


def test_a_class_whose_files_are_all_unreadable_is_named(root: Path) -> None:
    fill(root, "a", "b")
    spoil(root / "c" / "0.png")
    with pytest.raises(
        UsageError, match=f"^{root}: class 'c' has no readable image in the folder; it needs at least 2"
    ):
        load_folder(root, allow_unreadable=True)


def test_a_training_split_that_is_all_unreadable_never_makes_test_images_training_images(root: Path) -> None:
    for label in "ab":
        spoil(root / "train" / label / "0.png")
    fill(root / "test", "a", "b", count=10)
    with pytest.raises(UsageError, match="class 'a' has no readable image in the training split"):
        load_folder(root, allow_unreadable=True)


# what is no data set


def test_an_empty_folder(root: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_folder(root)
    message = f"{root} has no class folders with images: make one folder a class, images inside"
    assert str(caught.value) == message
    paint(root / "loose.png")
    (root / "empty").mkdir()
    with pytest.raises(UsageError) as caught:
        load_folder(root)
    assert str(caught.value) == message


@pytest.mark.parametrize("split", ["", "train"])
def test_an_empty_class_folder_is_named(split: str, root: Path) -> None:
    fill(root / split, "a", "b")
    (root / split / "c" / ".hidden").mkdir(parents=True)
    with pytest.raises(UsageError, match="the class folder '(train/)?c' is empty; put images into it, or remove it$"):
        load_folder(root)


def test_a_test_split_may_lack_a_class(root: Path) -> None:
    fill(root / "train", "a", "b")
    fill(root / "test", "a")
    (root / "test" / "b").mkdir()
    assert load_folder(root).classes == ("a", "b")


def test_one_class_only(root: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_folder(fill(root, "cats"))
    assert str(caught.value) == f"{root} has only one class, 'cats'; a classifier needs at least two"


def test_a_class_with_one_image(root: Path) -> None:
    fill(root, "a", "b")
    paint(root / "c" / "0.png")
    with pytest.raises(UsageError) as caught:
        load_folder(root)
    assert str(caught.value) == f"{root}: class 'c' has only one image in the folder; it needs at least 2"


def test_a_class_with_one_training_image(root: Path) -> None:
    fill(root / "train", "a", "b")
    fill(root / "test", "a", "b", "c")
    paint(root / "train" / "c" / "0.png")
    with pytest.raises(UsageError) as caught:
        load_folder(root)
    assert str(caught.value) == f"{root}: class 'c' has only one image in the training split; it needs at least 2"


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_class_that_is_not_in_train(split: str, root: Path) -> None:
    fill(root / "train", "a", "b")
    fill(root / split, "a", "z")
    with pytest.raises(UsageError) as caught:
        load_folder(root)
    assert str(caught.value) == f"{root}: class 'z' is in {split} but not in train"


def test_a_class_that_is_only_in_train_is_fine(root: Path) -> None:
    fill(root / "train", "a", "b", "c")
    fill(root / "test", "a", "c", start=10)
    dataset = load_folder(root)
    assert dataset.classes == ("a", "b", "c")
    assert sorted(set(dataset.test.labels.tolist())) == [0, 2]


def test_train_without_classes(root: Path) -> None:
    (root / "train").mkdir()
    fill(root / "test", "a", "b")
    with pytest.raises(UsageError, match=r" has no class; a classifier needs at least two$|not in train$"):
        load_folder(root)


# the user's folder and the cache


def snapshot(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Everything about a folder that loading must not change."""
    found = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_ctime_ns, content)
    return found


def test_the_users_folder_is_only_read(root: Path) -> None:
    mixture(root)
    spoil(root / "one" / "bad.jpg")
    before = snapshot(root)
    for _ in range(2):
        load_folder(root, image_size=8, allow_unreadable=True)
    assert snapshot(root) == before


def test_a_read_only_folder_loads(root: Path) -> None:
    fill(root, "a", "b")
    folders: Iterable[Path] = [root / "a", root / "b", root]
    for path in folders:
        path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert len(load_folder(root).train) == 8
    finally:
        for path in folders:
            path.chmod(stat.S_IRWXU)


def refuse(*_: object) -> None:
    raise AssertionError("decoded again")


def test_the_second_time_nothing_is_decoded(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture(root)
    spoil(root / "one" / "bad.jpg")
    first = load_folder(root, allow_unreadable=True)
    monkeypatch.setattr(folder_module, "decode_files", refuse)
    second = load_folder(root, allow_unreadable=True)
    assert second.fingerprint() == first.fingerprint()
    assert second.unreadable == first.unreadable
    assert list(second.train.ids) == list(first.train.ids)
    with pytest.raises(ConvlensError, match="^1 of 16 files in "):  # and the cache forgives nothing
        load_folder(root)


def test_another_form_is_decoded_anew(root: Path, cache: Path) -> None:
    fill(root, "a", "b")
    shapes = [load_folder(root, **how).shape for how in ({}, {"image_size": 4}, {"channels": 3}, {})]
    assert shapes == [(1, 8, 8), (1, 4, 4), (3, 8, 8), (1, 8, 8)]
    assert len(list(cache.rglob("images.npy"))) == 3


def test_an_edit_of_equal_size_and_time_is_seen(root: Path, cache: Path) -> None:
    for label in "ab":
        for i in range(3):
            paint(root / label / f"{i}.bmp", i, "L")
    first = load_folder(root)
    path = root / "a" / "1.bmp"
    status = path.stat()
    paint(path, 200, "L")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    second = load_folder(root)
    assert look(first, "a/1.bmp").unique().tolist() == [1]
    assert look(second, "a/1.bmp").unique().tolist() == [200]
    assert second.fingerprint() != first.fingerprint()


@pytest.mark.parametrize("change", ["rename", "remove", "add", "move"])
def test_a_change_of_the_folder_is_seen(change: str, root: Path, cache: Path) -> None:
    fill(root, "a", "b")
    load_folder(root)
    old = root / "a" / "001.png"
    if change == "rename":
        old.rename(old.with_name("new.png"))
    elif change == "remove":
        old.unlink()
    elif change == "add":
        paint(root / "a" / "new.png", 1, "L")
    else:
        old.rename(root / "b" / "new.png")
    dataset = load_folder(root)
    assert all_ids(dataset) == sorted(entry.path for entry in scan(root))
    if change == "move":
        assert look(dataset, "b/new.png").unique().tolist() == [1]


def test_a_copy_of_the_folder_names_its_own_files(root: Path, cache: Path) -> None:
    fill(root, "a", "b")
    spoil(root / "a" / "bad.png")
    load_folder(root, allow_unreadable=True)
    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    dataset = load_folder(copy, allow_unreadable=True)
    assert dataset.unreadable[0].startswith("a/bad.png is not an image")


@pytest.mark.parametrize("how", ["a file is in the way", "no room"])
def test_a_cache_that_cannot_be_written_is_done_without(
    how: str, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture(root)
    expected = load_folder(root, image_size=10).fingerprint()
    shutil.rmtree(cache)
    if how == "no room":

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np.lib.format, "write_array_header_1_0", fail)
    else:
        cache.write_text("")
    for _ in range(2):
        assert load_folder(root, image_size=10).fingerprint() == expected
    if how == "no room":
        left = [p.name for p in cache.rglob("*") if p.is_file() or p.name.startswith(".")]
        assert left == []


def test_large_splits_stay_on_disk(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture(root)
    expected = load_folder(root, image_size=10, allow_unreadable=True).with_validation(0.4, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("convlens.data.cache.memory_size", lambda: 4 * 299)  # less than one image is a quarter of it
    monkeypatch.setattr("convlens.data.cache.GATHER_BYTES", 700)  # two images at a time
    dataset = load_folder(root, image_size=10, allow_unreadable=True).with_validation(0.4, 0)
    assert dataset.fingerprint() == expected.fingerprint()
    assert "GB of images stay on disk" in capsys.readouterr().err
    before = dataset.train.images.clone()
    assert [path.name for path in cache.iterdir()] == ["folders"]  # what they are in has no name any more
    dataset.train.images.fill_(9)  # nor is it anybody else's
    again = load_folder(root, image_size=10, allow_unreadable=True).with_validation(0.4, 0)
    assert torch.equal(again.train.images, before)


@pytest.mark.parametrize("where", ["the cache", "a split"])
def test_large_splits_that_the_disk_has_no_room_for(
    where: str, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture(root)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convlens.data.cache.memory_size", lambda: 400)
    if where == "the cache":
        monkeypatch.setattr(np.lib.format, "write_array_header_1_0", fail)
    else:
        monkeypatch.setattr("convlens.data.cache.tempfile.NamedTemporaryFile", fail)
    with pytest.raises(ConvlensError, match="has no room for .* GB of images .No space left on device., more than a"):
        load_folder(root, image_size=10, allow_unreadable=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:-5]),
        lambda folder: (folder / "images.npy").write_bytes(b""),
        lambda folder: (folder / "images.npy").unlink(),
        lambda folder: (folder / "unreadable.json").write_text("{"),
        lambda folder: (folder / "unreadable.json").write_text("[]"),
        lambda folder: (folder / "unreadable.json").unlink(),
    ],
    ids=["cut", "empty", "no-images", "bad-json", "other-json", "no-json"],
)
def test_a_damaged_cache_is_decoded_again(damage: Callable[[Path], object], root: Path, cache: Path) -> None:
    fill(root, "a", "b")
    expected = load_folder(root).fingerprint()
    (folder,) = (path.parent for path in cache.rglob("images.npy"))
    damage(folder)
    assert load_folder(root).fingerprint() == expected


def test_writing_to_the_images_never_changes_the_cache(root: Path, cache: Path) -> None:
    fill(root / "train", "a", "b")
    fill(root / "test", "a", "b", start=10)
    first = load_folder(root)
    expected = first.fingerprint()
    first.train.images.fill_(9)
    (path,) = cache.rglob("images.npy")
    images = torch.from_numpy(np.load(path, mmap_mode="c"))
    images.fill_(7)
    assert load_folder(root).fingerprint() == expected


def test_the_cache_holds_whole_folders_only(root: Path, cache: Path) -> None:
    load_folder(fill(root, "a", "b"))
    names = sorted(p.name for p in cache.rglob("*") if p.is_file())
    assert names == ["images.npy", "unreadable.json"]
    assert json.loads(next(cache.rglob("unreadable.json")).read_text()) == {}
    assert not list(cache.rglob(".new-*"))


def test_caches_that_nobody_uses_are_removed(root: Path, cache: Path) -> None:
    def age(folder: Path, days: float) -> None:
        os.utime(folder, (time.time() - days * 86400,) * 2)

    load_folder(fill(root, "a", "b"))
    (old,) = (path.parent for path in cache.rglob("images.npy"))
    (old.parent / ".new-begun").mkdir()
    (old.parent / ".new-left").mkdir()
    age(old.parent / ".new-left", 1.1)
    age(old, 31)
    load_folder(root)  # which uses it
    load_folder(root, image_size=5)
    assert sorted(path.name for path in old.parent.iterdir()) == [".new-begun", "5-1", "8-1"]
    age(old, 31)
    load_folder(root, image_size=6)
    assert sorted(path.name for path in old.parent.iterdir()) == [".new-begun", "5-1", "6-1"]


def test_many_files_are_read_by_processes_and_come_out_the_same(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, "a", "b", "c", count=60)
    for name in ("a/007.png", "b/050.png", "c/059.png"):
        spoil(root / name)
    paint(root / "a" / "photo.jpg", size=(31, 17))
    alone = load_folder(root, allow_unreadable=True)
    shutil.rmtree(cache)
    monkeypatch.setattr(decoding, "MIN_FILES_FOR_WORKERS", 1)
    monkeypatch.setattr(decoding, "CHUNK", 7)  # so that the order of chunks counts
    together = load_folder(root, allow_unreadable=True)
    assert together.fingerprint() == alone.fingerprint()
    assert together.unreadable == alone.unreadable == tuple(
        f"{name} is not an image (JPEG, PNG, GIF, WebP, BMP, TIFF or PPM)"
        for name in ("a/007.png", "b/050.png", "c/059.png")
    )  # fmt: skip


def test_a_helper_that_is_killed_is_told_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, "a", "b")
    monkeypatch.setattr(decoding, "MIN_FILES_FOR_WORKERS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(decoding.DecodeWorker, "ask", lambda self, *question: (self.kill(), ask(self, *question))[1])
        with pytest.raises(ConvlensError, match="^a process that reads images was killed, perhaps for want of memory"):
            load_folder(root)
    assert len(load_folder(root).train) == 8


ask = decoding.DecodeWorker.ask


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it looks for processes where Linux lists them")
def test_helpers_end_with_the_one_who_asks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a picture, and also when that one is killed."""
    path = paint(root / "large.png", size=(6000, 6000))
    names = ["large.png"] * 2000
    monkeypatch.setattr(decoding, "CHUNK", 1)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    parts = decoding.decode_files(root, names, [digest] * 2000, 1, 8)
    assert next(parts)[0].shape == (1, 1, 8, 8)
    helpers = children(os.getpid())
    assert helpers
    parts.close()
    assert not alive(helpers)

    code = f"from convlens.data import decode; from pathlib import Path; decode.CHUNK = 1; root = Path({str(root)!r})"
    code += f"; parts = decode.decode_files(root, ['large.png'] * 2000, ['{digest}'] * 2000, 1, 8); next(parts)"
    asking = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('begun', flush=True); list(parts)"], stdout=subprocess.PIPE
    )
    assert asking.stdout and asking.stdout.readline() == b"begun\n"
    helpers = children(asking.pid)
    assert helpers
    asking.kill()
    asking.communicate()
    deadline = time.monotonic() + 10
    while alive(helpers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(helpers)


def children(parent: int) -> list[Path]:
    """Return the places in /proc of the processes that ``parent`` has started."""
    return [path.parent for path in Path("/proc").glob("[0-9]*/stat") if stat_of(path).split()[1:2] == [str(parent)]]


def stat_of(path: Path) -> str:
    """Return what the system says of a process, behind its name: its state, its parent, ..."""
    with contextlib.suppress(OSError):
        return path.read_text().rpartition(")")[2]
    return ""


def alive(processes: list[Path]) -> list[Path]:
    return [path for path in processes if stat_of(path / "stat").split()[:1] not in ([], ["Z"], ["X"])]


def test_reading_files_needs_no_pytorch() -> None:
    code = "import sys, convlens.data.decoding; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_file_that_changes_meanwhile_is_never_cached(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, "a", "b")
    survey = folder_module.survey_files

    def then_changed(*arguments: object) -> Iterable[object]:
        found = list(survey(*arguments))  # type: ignore[arg-type]
        paint(root / "a" / "002.png", 200, "L")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "survey_files", then_changed)
        with pytest.raises(ConvlensError, match=r"^a/002.png changed while .* was read; try again"):
            load_folder(root)
    assert not list(cache.rglob("images.npy")) and not list(cache.rglob(".new-*"))
    assert look(load_folder(root), "a/002.png").unique().tolist() == [200]


def test_want_of_memory_says_nothing_of_an_image(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, "a", "b")

    def fail(image: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(images.ImageOps, "exif_transpose", fail)
        patch.setattr(Image.Image, "load", fail)
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(MemoryError):
            load_folder(root, allow_unreadable=True)
    assert load_folder(root).unreadable == ()


def test_a_link_to_a_folder_is_named(root: Path, tmp_path: Path) -> None:
    fill(root, "a", "b")
    fill(tmp_path / "elsewhere", "more")
    (root / "a" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    assert load_folder(root, allow_unreadable=True).unreadable == ("a/more is a folder, not an image",)


def test_names_are_shown_without_what_a_terminal_obeys(root: Path) -> None:
    fill(root, "a", "b")
    spoil(root / "a" / "x\n\x1b[31m.png")
    (said,) = load_folder(root, allow_unreadable=True).unreadable
    assert said == "a/x\\n\\x1b[31m.png is not an image (JPEG, PNG, GIF, WebP, BMP, TIFF or PPM)"


@pytest.mark.parametrize(
    "foreign",
    [
        np.zeros((10, 1, 8, 8), np.float32),
        np.zeros((10, 3, 5, 5), np.uint8),
        np.zeros((7, 1, 8, 8), np.uint8),
        np.zeros(4, np.uint8),
    ],
    ids=["floats", "another size", "too few", "no images"],
)
def test_a_foreign_cache_is_not_believed(foreign: np.ndarray, root: Path, cache: Path) -> None:
    expected = load_folder(fill(root, "a", "b")).fingerprint()
    (path,) = cache.rglob("images.npy")
    np.save(path, foreign)
    assert load_folder(root).fingerprint() == expected
    (path.parent / "unreadable.json").write_text("null")
    assert load_folder(root).fingerprint() == expected


def test_a_cache_of_another_user_is_used(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_folder(fill(root, "a", "b")).fingerprint()

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", fail)
    monkeypatch.setattr(folder_module, "decode_files", refuse)
    assert load_folder(root).fingerprint() == expected
