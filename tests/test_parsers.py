"""The published file formats: round trips, and arbitrary bytes end in one line for a person."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from convlens.data.formats import CIFAR_RECORD_BYTES, parse_cifar10, parse_idx
from convlens.errors import ConvlensError

quick = settings(max_examples=100, deadline=None, database=None, derandomize=True)


def idx(shape: tuple[int, ...], body: bytes, kind: int = 8) -> bytes:
    """An IDX file's content."""
    return bytes([0, 0, kind, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + body


def cifar(labels: list[int]) -> bytes:
    """A file of CIFAR-10's binary version whose images can be told apart."""
    records = [bytes([label]) + bytes((i + j) % 251 for j in range(3072)) for i, label in enumerate(labels)]
    return b"".join(records)


@quick
@given(stn.arrays(np.uint8, stn.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
def test_idx_round_trip(array: np.ndarray) -> None:
    parsed = parse_idx(idx(array.shape, array.tobytes()), "f")
    assert parsed.dtype == torch.uint8
    assert tuple(parsed.shape) == array.shape
    assert np.array_equal(parsed.numpy(), array)


def test_an_idx_tensor_owns_its_memory() -> None:
    content = idx((2,), b"\x01\x02")
    parsed = parse_idx(content, "f")
    parsed += 1  # no warning of read-only memory
    assert content[-2:] == b"\x01\x02"


@quick
@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_an_idx_file_or_an_error_for_people(content: bytes) -> None:
    try:
        parsed = parse_idx(content, "the/file")
    except ConvlensError as error:
        assert str(error).startswith("the/file is ")
    else:
        assert parsed.numel() == len(content) - 4 - 4 * content[3]


@quick
@given(st.lists(st.sampled_from([0, 1, 2, 3, 255, 2**31, 2**32 - 1]), min_size=1, max_size=4), st.binary(max_size=30))
def test_any_header_is_an_idx_file_or_an_error_for_people(shape: list[int], body: bytes) -> None:
    try:
        parsed = parse_idx(idx(tuple(shape), body), "f")
    except ConvlensError as error:
        assert str(error).startswith("f is ")
    else:
        assert list(parsed.shape) == shape
        assert math.prod(shape) == len(body)


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (b"", "nothing"),
        (b"\0\0\x08", "00 00 08"),
        (b"\x1f\x8b\x08\0rest", "1f 8b 08 00"),
        (idx((1,), b"x", kind=0x0D), "00 00 0d 01"),
        (b"\0\0\x08\0", "00 00 08 00"),
        (b"\0\0\x08\x05" + bytes(40), "00 00 08 05"),
        (b"<html>404", "3c 68 74 6d"),
    ],
)
def test_wrong_magic(content: bytes, start: str) -> None:
    with pytest.raises(ConvlensError) as caught:
        parse_idx(content, "train-images")
    assert str(caught.value) == f"train-images is not an IDX file of bytes: it starts with {start}"


def test_a_truncated_idx_header() -> None:
    with pytest.raises(ConvlensError, match=r"^f is truncated: its header ends after 9 bytes$"):
        parse_idx(idx((2, 2), b"")[:9], "f")


@pytest.mark.parametrize(
    ("size", "what"), [(0, "truncated"), (5, "truncated"), (1999, "truncated"), (2001, "too long"), (9000, "too long")]
)
def test_an_idx_body_of_the_wrong_length(size: int, what: str) -> None:
    message = f"f is {what}: it has {16 + size:,} bytes, its header promises 2,016"
    with pytest.raises(ConvlensError, match=f"^{re.escape(message)}$"):
        parse_idx(idx((5, 20, 20), bytes(size)), "f")


def test_a_huge_idx_header_takes_no_memory() -> None:
    with pytest.raises(ConvlensError, match="is truncated: it has 23 bytes, its header promises"):
        parse_idx(idx((2**32 - 1,) * 4, b"abc"), "f")


@quick
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_cifar_round_trip(labels: list[int]) -> None:
    content = cifar(labels)
    images, parsed = parse_cifar10(content, "f")
    assert (images.dtype, parsed.dtype) == (torch.uint8, torch.int64)
    assert images.shape == (len(labels), 3, 32, 32)
    assert images.is_contiguous()
    assert parsed.tolist() == labels
    for i in range(len(labels)):
        assert images[i].numpy().tobytes() == content[i * CIFAR_RECORD_BYTES + 1 : (i + 1) * CIFAR_RECORD_BYTES]


def test_cifar_planes_are_red_green_blue() -> None:
    content = b"\x03" + b"r" * 1024 + b"g" * 1024 + b"b" * 1024
    images, _ = parse_cifar10(content, "f")
    assert [bytes(plane.unique().tolist()) for plane in images[0]] == [b"r", b"g", b"b"]


@quick
@given(st.one_of(st.binary(max_size=80), st.integers(0, 255).map(lambda n: bytes([n]) * CIFAR_RECORD_BYTES)))
def test_arbitrary_bytes_are_a_cifar_file_or_an_error_for_people(content: bytes) -> None:
    if len(content) == CIFAR_RECORD_BYTES and content[0] < 10:
        assert parse_cifar10(content, "f")[1].tolist() == [content[0]]
    else:
        with pytest.raises(ConvlensError, match="^f is (truncated or )?not CIFAR-10's binary version"):
            parse_cifar10(content, "f")


@pytest.mark.parametrize("change", [-3073, -1, 1])
def test_a_cifar_file_of_the_wrong_length(change: int) -> None:
    content = (cifar([4]) + b"\0")[: CIFAR_RECORD_BYTES + change]
    with pytest.raises(ConvlensError) as caught:
        parse_cifar10(content, "test_batch.bin")
    assert str(caught.value) == f"test_batch.bin is truncated or not CIFAR-10's binary version: {len(content):,} bytes"


def test_a_cifar_label_beyond_the_classes() -> None:
    with pytest.raises(ConvlensError, match=r"^f is not CIFAR-10's binary version: it has a label 10$"):
        parse_cifar10(cifar([1, 10, 2]), "f")
