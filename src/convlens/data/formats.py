"""Parsers of IDX (MNIST) and the binary version of CIFAR-10. Nothing is unpickled."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from convlens.errors import ConvlensError

IDX_UINT8 = 0x08
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes
CIFAR_CLASSES = 10


def parse_idx(content: bytes, name: str) -> Tensor:
    """Return the array of an IDX file as a uint8 tensor.

    The header is two zero bytes, the type, the number of dimensions, then each dimension as a big-endian 32-bit
    integer (http://yann.lecun.com/exdb/mnist).

    Args:
        content: The content of the file.
        name: What messages call the file.

    Raises:
        ConvlensError: The type or the length is wrong.
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != IDX_UINT8 or not 1 <= content[3] <= 4:
        raise ConvlensError(f"{name} is not an IDX file of bytes: it starts with {content[:4].hex(' ') or 'nothing'}")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ConvlensError(f"{name} is truncated: its header ends after {len(content)} bytes")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "too long"
        raise ConvlensError(f"{name} is {what}: it has {len(content):,} bytes, its header promises {expected:,}")
    try:
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
    except ValueError:  # no bytes, but dimensions that overflow, such as 0 x 2^32 x 2^32
        raise ConvlensError(f"{name} is not an IDX file of bytes: its shape is {shape}") from None


def parse_cifar10(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 (N, 3, 32, 32), and labels, int64 (N,), of a file of CIFAR-10's binary version.

    Args:
        content: The content of the file.
        name: What messages call the file.

    Raises:
        ConvlensError: The length or a label is wrong.
    """
    if not content or len(content) % CIFAR_RECORD_BYTES:
        raise ConvlensError(f"{name} is truncated or not CIFAR-10's binary version: {len(content):,} bytes")
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD_BYTES).copy())
    labels = records[:, 0].long()
    if int(labels.max()) >= CIFAR_CLASSES:
        raise ConvlensError(f"{name} is not CIFAR-10's binary version: it has a label {int(labels.max())}")
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), labels
