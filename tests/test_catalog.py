"""Every source of data by name or by form: digits, arrays, .npz, map-style datasets; division and fingerprints."""

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convlens.data.arrays import from_arrays
from convlens.data.builtin import DATASETS
from convlens.data.dataset import Dataset, Split, check_classes
from convlens.data.loading import load_dataset
from convlens.errors import ConvlensError, UnknownNameError, UsageError

quick = settings(max_examples=50, deadline=None, database=None, derandomize=True)


def arrays(n: int = 20, shape: tuple[int, ...] = (4, 5), classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Images that can be told apart, and labels 0, 1, 0, 1, ..."""
    size = int(np.prod(shape))
    x = ((np.arange(n)[:, None] * 7 + np.arange(size)) % 256).astype(np.uint8).reshape(n, *shape)
    return x, np.arange(n) % classes


def pixels_by_id(dataset: Dataset) -> dict[str, torch.Tensor]:
    """Every image by its id, where one array was divided into splits."""
    return {name: split.images[i] for split in dataset.splits.values() for i, name in enumerate(split.ids)}


# digits and names


def test_digits() -> None:
    dataset = load_dataset("digits")
    assert (len(dataset.train), len(dataset.test), dataset.validation) == (1438, 359, None)
    assert dataset.shape == (1, 8, 8)
    assert dataset.classes == tuple("0123456789")
    assert (dataset.name, dataset.source) == ("digits", "digits")
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.train.labels.dtype == torch.int64
    assert (int(dataset.train.images.min()), int(dataset.train.images.max())) == (0, 255)
    assert dataset.note == "20% of every class is the test split (seed 0)"
    assert sorted(map(int, [*dataset.train.ids, *dataset.test.ids])) == list(range(1797))
    assert (dataset.style.content_size, dataset.style.center_of_mass) == (8, False)


def test_digits_are_the_embedded_ones_scaled() -> None:
    from sklearn.datasets import load_digits

    embedded, dataset = load_digits(), load_dataset("digits")
    for split in dataset.splits.values():
        rows = [int(name) for name in split.ids]
        assert np.array_equal(split.labels.numpy(), embedded.target[rows])
        assert np.array_equal(split.images[:, 0].numpy(), np.round(embedded.images[rows] * 255 / 16))


def test_digits_are_the_same_every_time() -> None:
    first = load_dataset("digits")
    torch.manual_seed(99)
    assert load_dataset("digits").fingerprint() == first.fingerprint()


def test_the_names_in_their_order() -> None:
    assert DATASETS.names() == ["digits", "mnist", "fashion-mnist", "cifar10"]
    assert all(DATASETS[name].__doc__ for name in DATASETS.names())


@pytest.mark.parametrize(
    ("name", "near"), [("mnits", "mnist"), ("fashion_mnist", "fashion-mnist"), ("CIFAR10", ""), ("cifar-10", "cifar10")]
)
def test_an_unknown_name_offers_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_dataset(name)
    hint = f"did you mean {near!r}?" if near else "choose from: cifar10, digits, fashion-mnist, mnist"
    assert str(caught.value) == f"unknown data set or folder {name!r}; {hint}"
    assert caught.value.exit_code == 2


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"^there is no folder some/photos$"):
        load_dataset("some/photos")


def test_a_file_that_is_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"x")
    with pytest.raises(UsageError) as caught:
        load_dataset(path)
    assert str(caught.value) == f"{path} is a file; give a folder of class folders, a .npz file or a name"


def test_a_dataset_stays_what_it_is() -> None:
    dataset = from_arrays(*arrays())
    assert load_dataset(dataset) is dataset


@pytest.mark.parametrize("source", [None, 3, 2.5, object()])
def test_what_is_no_data_is_refused(source: object) -> None:
    with pytest.raises(
        UsageError, match=f"^cannot read data from a {type(source).__name__}; see convlens.load_dataset$"
    ):
        load_dataset(source)


# arrays


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((4, 5), (1, 4, 5)),
        ((4, 5, 1), (1, 4, 5)),
        ((4, 5, 3), (3, 4, 5)),
        ((1, 4, 5), (1, 4, 5)),
        ((3, 4, 5), (3, 4, 5)),
        ((3, 3, 3), (3, 3, 3)),
    ],
)
def test_the_forms_of_arrays(shape: tuple[int, ...], form: tuple[int, int, int]) -> None:
    x, y = arrays(shape=shape)
    dataset = load_dataset((x, y))
    assert dataset.shape == form
    assert (dataset.name, dataset.source, dataset.classes) == ("arrays", None, ("0", "1"))
    for name, image in pixels_by_id(dataset).items():
        given_ = x[int(name)]
        expected = given_.transpose(2, 0, 1) if shape[-1] in (1, 3) and shape[0] not in (1, 3) else given_
        assert np.array_equal(image.numpy(), expected.reshape(form))
    assert dataset.train.images.is_contiguous()


def test_a_fifth_of_every_class_is_the_test_split() -> None:
    x, _ = arrays(n=40)
    y = np.repeat([0, 1], [10, 30])
    dataset = load_dataset((x, y))
    assert torch.bincount(dataset.test.labels).tolist() == [2, 6]
    assert dataset.note == "20% of every class is the test split (seed 0)"


def test_own_test_arrays_are_kept() -> None:
    x, y = arrays()
    dataset = load_dataset((x, y, x[:5], y[:5]))
    assert (len(dataset.train), len(dataset.test)) == (20, 5)
    assert np.array_equal(dataset.test.images[:, 0].numpy(), x[:5])
    assert list(dataset.test.ids) == ["0", "1", "2", "3", "4"]
    assert dataset.note == "the arrays' own splits"


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_from_0_to_1(kind: type) -> None:
    x, y = arrays()
    dataset = load_dataset(((x / 255).astype(kind), y))
    for name, image in pixels_by_id(dataset).items():
        assert np.array_equal(image[0].numpy(), x[int(name)])


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.uint16, np.int64, np.uint64])
def test_whole_numbers_from_0_to_255(kind: type) -> None:
    x, y = arrays()
    x = x % 128
    for name, image in pixels_by_id(load_dataset((x.astype(kind), y))).items():
        assert np.array_equal(image[0].numpy(), x[int(name)])


def test_booleans_are_black_and_white() -> None:
    x, y = arrays()
    dataset = load_dataset((x > 60, y))
    assert sorted(dataset.train.images.unique().tolist()) == [0, 255]


def test_tensors_and_lists_are_taken_too() -> None:
    x, y = arrays()
    expected = load_dataset((x, y)).fingerprint()
    assert load_dataset((torch.from_numpy(x), torch.from_numpy(y))).fingerprint() == expected
    assert load_dataset(((x / 255).tolist(), y.tolist())).fingerprint() == expected


def test_the_arrays_are_not_touched_and_not_shared() -> None:
    x, y = arrays()
    before = x.copy(), y.copy()
    dataset = load_dataset((x, y, x, y))
    dataset.train.images.fill_(3)
    dataset.train.labels.fill_(0)
    assert np.array_equal(x, before[0])
    assert np.array_equal(y, before[1])


X, Y = arrays()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[0], Y, r"arrays: images of shape \(4, 5\); give \(N, H, W\), \(N, H, W, C\) or \(N, C, H, W\), C 1 or 3"),
        (np.zeros((20, 4, 5, 2), np.uint8), Y, r"arrays: images of shape \(20, 4, 5, 2\)"),
        (np.zeros((20, 4, 4, 5, 3), np.uint8), Y, r"arrays: images of shape \(20, 4, 4, 5, 3\)"),
        (X, Y[:-1], r"arrays: 20 images but labels of shape \(19,\)"),
        (X, np.eye(2)[Y], r"arrays: 20 images but labels of shape \(20, 2\)"),
        (X[:0], Y[:0], "arrays: there is no image"),
        (X, Y - 1, "arrays: labels must be whole numbers from 0, not int64 from -1"),
        (X, Y.astype(float), "arrays: labels must be whole numbers from 0, not float64"),
        (X, np.array(["cat", "dog"] * 10), "arrays: labels must be whole numbers from 0, not <U3"),
        (X.astype(float), Y, "arrays: pixel values run from 0 to 152; give uint8 .* or floats 0 to 1"),
        (X.astype(int) + 200, Y, "arrays: pixel values run from 200 to 352"),
        (X / 255 - 0.5, Y, "arrays: pixel values run from -0.5 to"),
        (np.full(X.shape, np.nan), Y, "arrays: pixel values run from nan to nan"),
        (np.full(X.shape, np.inf), Y, "arrays: pixel values run from inf to inf"),
        (X.astype(complex), Y, r"arrays: an array of shape \(20, 1, 4, 5\) and type complex128 holds no pixels"),
        (X.astype(object), Y, r"arrays: an array of shape .* and type object holds no pixels"),
        (np.zeros((20, 0, 5)), Y, r"arrays: an array of shape \(20, 1, 0, 5\) and type float64 holds no pixels"),
        ([[[1, 2]], [[3]]] * 10, Y, "arrays: "),
        (X, Y * 0, "arrays has only one class, '0'; a classifier needs at least two"),
        (X, Y * 2, "arrays: class '1' has no readable image in the arrays; it needs at least 2"),
        (X[:3], Y[:3], "arrays: class '1' has only one image in the arrays; it needs at least 2"),
    ],
)
def test_bad_arrays_are_refused_for_people(x: Any, y: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        load_dataset((x, y))


def test_images_of_no_pixels_are_refused() -> None:
    with pytest.raises(UsageError, match="^arrays: "):
        load_dataset((np.zeros((20, 0, 5), np.uint8), Y))


def test_bad_test_arrays_are_refused_for_people() -> None:
    with pytest.raises(UsageError, match=r"^arrays: test images are \(1, 3, 5\), train's \(1, 4, 5\)$"):
        load_dataset((X, Y, X[:, :3], Y))
    with pytest.raises(UsageError, match=r"^arrays: a label is larger than the number of classes, 2$"):
        load_dataset((X, Y, X, Y + 1))
    with pytest.raises(UsageError, match=r"^arrays \(test\): 20 images but labels of shape \(3,\)$"):
        load_dataset((X, Y, X, Y[:3]))


@pytest.mark.parametrize("test", [False, True])
def test_more_labels_than_names_of_classes(test: bool) -> None:
    with pytest.raises(UsageError, match="^mine: a label is larger than the number of classes, 2$"):
        from_arrays(X, np.arange(20) % 3, *((X, Y) if test else ()), classes=("a", "b"), name="mine")


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_tuple_of_the_wrong_length_is_refused(count: int) -> None:
    with pytest.raises(UsageError):
        load_dataset((X, Y, X, Y, X)[:count])


# .npz files


def test_npz_with_one_set(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, x=X, y=Y)
    dataset = load_dataset(path)
    assert (dataset.name, dataset.source) == ("mine", str(path))
    assert dataset.fingerprint() == load_dataset((X, Y)).fingerprint()
    assert load_dataset(str(path)).fingerprint() == dataset.fingerprint()


def test_npz_with_two_sets(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, x_train=X, y_train=Y, x_test=X[:6], y_test=Y[:6], x=X[:2], y=Y[:2], other=np.ones(3))
    dataset = load_dataset(path)
    assert (len(dataset.train), len(dataset.test)) == (20, 6)


def test_npz_without_the_arrays(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, x=X, labels=Y)
    with pytest.raises(ConvlensError) as caught:
        load_dataset(path)
    assert str(caught.value) == f"{path} holds x, labels; it needs x and y, or x_train, y_train, ..."
    np.savez(path)
    with pytest.raises(ConvlensError, match=" holds nothing; it needs x and y"):
        load_dataset(path)


def test_npz_names_the_file_in_what_is_wrong_with_its_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=X, y=Y[:3])
    with pytest.raises(UsageError, match=r"mine.npz: 20 images but labels of shape \(3,\)$"):
        load_dataset(tmp_path / "mine.npz")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm.txt"),)


def test_npz_with_pickled_objects_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, x=np.array([Harmful()] * 2, dtype=object), y=Y, allow_pickle=True)
    with pytest.raises(ConvlensError, match=r"mine\.npz cannot be read as \.npz: Object arrays cannot be loaded"):
        load_dataset(path)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ConvlensError, match=r"mine\.npz cannot be read as \.npz: "):
        load_dataset(path)
    assert not Path("harm.txt").exists()


def npz_bytes(path: Path) -> bytes:
    rng = np.random.default_rng(0)
    np.savez_compressed(path, x=rng.integers(0, 9, (40, 6, 6), dtype=np.uint8), y=np.arange(40) % 2)
    return path.read_bytes()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", b"\x93NUMPY"])
def test_npz_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    with pytest.raises(ConvlensError, match=r"mine\.npz cannot be read as \.npz: "):
        load_dataset(path)


def test_npz_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConvlensError, match=r"mine\.npz cannot be read as \.npz: .*No such file"):
        load_dataset(tmp_path / "mine.npz")


def test_npz_that_is_one_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    with open(path, "wb") as file:
        np.save(file, X)
    with pytest.raises(ConvlensError, match=r"mine\.npz "):
        load_dataset(path)


def test_a_damaged_npz_is_read_or_refused_for_people(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    content, escaped = npz_bytes(path), []
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            load_dataset(path)
        except ConvlensError as error:
            assert "mine" in str(error)
        except Exception as error:
            escaped.append(f"byte {at}: {type(error).__name__}: {error}")
    assert escaped == []


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_truncated_npz_is_refused_for_people(share: float, tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    content = npz_bytes(path)
    path.write_bytes(content[: round(share * len(content))])
    with pytest.raises(ConvlensError, match=r"mine\.npz cannot be read as \.npz: "):
        load_dataset(path)


# map-style datasets


class Pairs:
    """As torchvision's datasets are: sized, items are (image, label)."""

    def __init__(self, images: list[Any], classes: list[str] | None = None):
        self.images = images
        self.read: list[int] = []
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        self.read.append(i)
        return self.images[i], i % 2


def grey(i: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("L", size, 10 * i)


def test_a_map_style_dataset_of_pictures() -> None:
    pairs = Pairs([grey(i) for i in range(10)], ["cat", "dog"])
    dataset = load_dataset(pairs)
    assert pairs.read == list(range(10))  # each item once
    assert (dataset.name, dataset.source, dataset.classes) == ("pairs", None, ("cat", "dog"))
    assert dataset.shape == (1, 4, 6)  # of one size: kept, square or not
    for name, image in pixels_by_id(dataset).items():
        assert image.unique().tolist() == [10 * int(name)]


def test_a_map_style_dataset_without_names_counts_its_classes() -> None:
    assert load_dataset(Pairs([grey(i) for i in range(10)])).classes == ("0", "1")


@pytest.mark.parametrize(
    "item",
    [
        np.full((5, 5), 70, np.uint8),
        np.full((5, 5, 1), 70, np.uint8),
        np.full((1, 5, 5), 70, np.uint8),
        torch.full((1, 5, 5), 70 / 255),
        torch.full((5, 5), 70, dtype=torch.uint8),
    ],
)
def test_items_may_be_arrays_and_tensors(item: Any) -> None:
    dataset = load_dataset([(item, i % 2) for i in range(10)])
    assert dataset.name == "list"
    assert dataset.shape == (1, 5, 5)
    assert dataset.train.images.unique().tolist() == [70]


def test_colour_items() -> None:
    image = np.zeros((5, 6, 3), np.uint8)
    image[..., 0] = 200
    for item in (image, image.transpose(2, 0, 1), Image.fromarray(image)):
        dataset = load_dataset(Pairs([item] * 10))
        assert dataset.shape == (3, 5, 6)
        assert dataset.train.images[0].flatten(1).T.unique(dim=0).tolist() == [[200, 0, 0]]


def test_items_of_many_sizes_and_modes_become_one_form() -> None:
    images = [grey(i, (5 + i, 9)) for i in range(9)] + [Image.new("RGBA", (7, 9), (1, 2, 3, 0))]
    dataset = load_dataset(Pairs(images))
    assert dataset.shape == (3, 9, 9)
    assert pixels_by_id(dataset)["9"].unique().tolist() == [255]
    assert load_dataset(Pairs(images), image_size=4, channels=1).shape == (1, 4, 4)


def test_large_items_are_brought_to_64() -> None:
    images = [grey(i, (90 + i, 100)) for i in range(8)]
    assert load_dataset(Pairs(images)).shape == (1, 64, 64)


def test_an_empty_map_style_dataset() -> None:
    with pytest.raises(UsageError, match=r"^pairs: there is no image$"):
        load_dataset(Pairs([]))


def test_more_labels_than_classes_in_a_map_style_dataset() -> None:
    items = [(np.zeros((4, 4), np.uint8), i % 3) for i in range(12)]

    class Named(list[Any]):
        classes = ("a", "b")

    with pytest.raises(UsageError, match="^named: a label is larger than the number of classes, 2$"):
        load_dataset(Named(items))


@pytest.mark.parametrize("source", [[X, Y], {"x": X, "y": Y}, X, [(np.zeros((4, 4), np.uint8), "cat")] * 4])
def test_items_that_are_no_pairs_are_refused_for_people(source: Any) -> None:
    with pytest.raises(UsageError):
        load_dataset(source)


def test_an_item_that_is_no_image_is_refused_for_people() -> None:
    with pytest.raises(ConvlensError, match=r"^an array of shape \(7,\) is not an image"):
        load_dataset(Pairs([np.zeros(7, np.uint8)] * 4))


# division and fingerprints


def numbered_split(labels: list[int]) -> Split:
    n = len(labels)
    images = torch.arange(n).view(n, 1, 1, 1).to(torch.uint8)
    return Split(images, torch.tensor(labels), [f"id{i}" for i in range(n)])


@quick
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
)
def test_divide_is_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    split = numbered_split(labels)
    rest, part = split.divide(fraction, seed)
    rows = [int(name[2:]) for name in rest.ids], [int(name[2:]) for name in part.ids]
    assert sorted(rows[0] + rows[1]) == list(range(len(labels)))  # every image once
    assert rows[0] == sorted(rows[0])  # in their order
    assert rows[1] == sorted(rows[1])
    for half, numbers in zip((rest, part), rows, strict=True):
        assert half.labels.tolist() == [labels[i] for i in numbers]
        assert half.images.flatten().tolist() == [i % 256 for i in numbers]
    for label in set(labels):
        count, taken = labels.count(label), part.labels.tolist().count(label)
        if count == 1:
            assert taken == 0
        else:
            assert 1 <= taken <= count - 1
            assert abs(taken - count * fraction) <= 1
    again = split.divide(fraction, seed)
    assert (again[0].ids, again[1].ids) == (rest.ids, part.ids)


def test_divide_depends_on_its_seed_alone() -> None:
    split = numbered_split([0, 1] * 50)
    torch.manual_seed(1)
    first = split.divide(0.2, 5)[1].ids
    torch.manual_seed(2)
    assert split.divide(0.2, 5)[1].ids == first
    assert split.divide(0.2, 6)[1].ids != first


def test_a_class_is_divided_the_same_whatever_the_others_are() -> None:
    one = numbered_split([0] * 20 + [1] * 20).divide(0.3, 1)[1]
    two = numbered_split([0] * 20 + [2] * 20).divide(0.3, 1)[1]
    assert one.ids[:6] == two.ids[:6]


def test_take_copies() -> None:
    split = numbered_split([0, 1, 0])
    taken = split.take(torch.tensor([2, 0]))
    assert list(taken.ids) == ["id2", "id0"]
    taken.images.fill_(9)
    assert split.images.flatten().tolist() == [0, 1, 2]


def test_with_validation_carves_from_train_and_leaves_test() -> None:
    dataset = load_dataset((X, Y))
    carved = dataset.with_validation(0.25, 3)
    assert carved.validation is not None
    assert sorted([*carved.train.ids, *carved.validation.ids], key=int) == dataset.train.ids
    assert carved.test is dataset.test
    assert list(carved.splits) == ["train", "validation", "test"]
    assert carved.with_validation(0.25, 9) is carved
    assert dataset.with_validation(0, 3) is dataset
    assert list(dataset.splits) == ["train", "test"]


def base() -> Dataset:
    return load_dataset((X, Y, X[:4] + 1, Y[:4]))


def swapped(split: Split, images: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> Split:
    return replace(
        split, images=split.images if images is None else images, labels=split.labels if labels is None else labels
    )


def test_the_fingerprint_is_of_the_data_and_of_nothing_else() -> None:
    first, second = base(), base()
    assert re.fullmatch("[0-9a-f]{64}", first.fingerprint())
    assert second.fingerprint() == first.fingerprint()
    renamed = replace(second, name="other", source="/there", note="", unreadable=("x",))
    renamed = replace(renamed, train=replace(renamed.train, ids=[f"file{i}" for i in range(20)]))
    assert renamed.fingerprint() == first.fingerprint()
    strided = second.train.images.to(memory_format=torch.channels_last).transpose(2, 3).contiguous().transpose(2, 3)
    assert replace(second, train=swapped(second.train, strided)).fingerprint() == first.fingerprint()


def test_the_fingerprint_changes_with_the_data() -> None:
    dataset = base()
    train, test = dataset.train, dataset.test
    pixel, label = train.images.clone(), train.labels.clone()
    pixel[7, 0, 1, 2] ^= 1
    label[7] ^= 1
    test_pixel = test.images.clone()
    test_pixel[0, 0, 0, 0] ^= 1
    order = torch.tensor([1, 0, *range(2, 20)])
    changed = [
        replace(dataset, train=swapped(train, pixel)),
        replace(dataset, train=swapped(train, labels=label)),
        replace(dataset, test=swapped(test, test_pixel)),
        replace(dataset, train=train.take(order)),
        replace(dataset, train=train.take(torch.arange(19))),
        replace(dataset, classes=("0", "one")),
        replace(dataset, validation=test),
        replace(dataset, test=train, train=test),
        replace(
            dataset,
            train=swapped(train, train.images.transpose(2, 3)),
            test=swapped(test, test.images.transpose(2, 3)),
        ),
        replace(
            dataset,
            train=swapped(train, train.images.reshape(20, 1, 5, 4)),
            test=swapped(test, test.images.reshape(4, 1, 5, 4)),
        ),
    ]
    assert len({d.fingerprint() for d in [dataset, *changed]}) == 1 + len(changed)


@quick
@given(st.integers(0, 19), st.integers(0, 3), st.integers(0, 4), st.integers(1, 255))
def test_any_changed_pixel_changes_the_fingerprint(n: int, row: int, column: int, change: int) -> None:
    dataset = base()
    before = dataset.fingerprint()
    dataset.train.images[n, 0, row, column] ^= change
    assert dataset.fingerprint() != before
    dataset.train.images[n, 0, row, column] ^= change
    assert dataset.fingerprint() == before


def test_check_classes_says_no_class() -> None:
    with pytest.raises(UsageError, match=r"^mine has no class; a classifier needs at least two$"):
        check_classes("mine", (), numbered_split([0, 0]))


# the published data, where CONVLENS_DATA has it


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "test", "ninth"),
    [
        ("mnist", [5, 0, 4, 1, 9, 2, 1, 3], [7, 2, 1, 0, 4, 1, 4, 9], "9"),
        ("fashion-mnist", [9, 0, 0, 3, 0, 2, 7, 2], [9, 2, 1, 1, 6, 1, 4, 6], "Ankle boot"),
    ],
)
def test_the_published_sets(name: str, train: list[int], test: list[int], ninth: str) -> None:
    dataset = load_dataset(name)
    assert (len(dataset.train), len(dataset.test), dataset.shape) == (60_000, 10_000, (1, 28, 28))
    assert dataset.train.labels[:8].tolist() == train
    assert dataset.test.labels[:8].tolist() == test
    assert dataset.classes[9] == ninth
    assert dataset.validation is None
    if name == "fashion-mnist":
        assert torch.bincount(dataset.train.labels).tolist() == [6000] * 10
    else:
        assert torch.bincount(dataset.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_a_pair_of_map_style_datasets_is_train_and_test() -> None:
    train = [(Image.new("L", (6, 6), 40 * (i % 2)), i % 2) for i in range(8)]
    test = [(Image.new("L", (6, 6), 200), 1) for _ in range(3)]
    dataset = load_dataset((train, test))
    assert (len(dataset.train), len(dataset.test), dataset.shape) == (8, 3, (1, 6, 6))
    assert dataset.test.images.min() == 200
