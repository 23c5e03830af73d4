"""Parsers of the published file formats: IDX (MNIST's) and CIFAR-10's binary version. Nothing is unpickled."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from convlens.errors import ConvlensError

IDX_UINT8 = 0x08

CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes

CIFAR_CLASSES = 10


def parse_idx(content: bytes, name: str) -> Tensor:
    """Return the array of an IDX file as a uint8 tensor; ``name`` is the file's, for messages.

    The header is two zero bytes, the type, the number of dimensions, then each dimension as a big-endian 32-bit
    number (http://yann.lecun.com/exdb/mnist). Raises ConvlensError unless type and length are right.
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
    except ValueError:  # no byte, yet sides that overflow: 0 x 2^32 x 2^32
        raise ConvlensError(f"{name} is not an IDX file of bytes: its shape is {shape}") from None


def parse_cifar10(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Return images, uint8 (N, 3, 32, 32), and labels, int64 (N,), of one file of the binary version."""
    if not content or len(content) % CIFAR_RECORD:
        raise ConvlensError(f"{name} is truncated or not CIFAR-10's binary version: {len(content):,} bytes")
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD).copy())
    labels = records[:, 0].long()
    if int(labels.max()) >= CIFAR_CLASSES:
        raise ConvlensError(f"{name} is not CIFAR-10's binary version: it has a label {int(labels.max())}")
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), labels
