"""Preprocessing between an image file and a model. It is stored with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from convlens.data.images import InputStyle, Pixels, fit_photo, image_pixels, to_mode
from convlens.data.mnist_style import fit_ink
from convlens.errors import UsageError

if TYPE_CHECKING:  # prediction with ONNX Runtime does not import torch
    from torch import Tensor

    from convlens.data.normalize import Normalize

CHUNK_BYTES, MAX_CHUNKS = 4 << 20, 128  # of pixels that mean and standard deviation are computed on
MAX_INPUT_SIDE = 4096  # pixels


@dataclass(frozen=True)
class Preprocess:
    """Size, color mode, style and normalization of the images that a model takes.

    Args:
        channels: 1 (grayscale) or 3 (RGB).
        height: In pixels.
        width: In pixels.
        mean: Per-channel mean of the training pixels in 0..1.
        std: Per-channel standard deviation of the training pixels.
        input_style: Whether the images are photos or ink, and how ink is placed.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_style: InputStyle

    @classmethod
    def fit(cls, images: Tensor, input_style: InputStyle) -> Preprocess:
        """Take the size, mean and standard deviation from training images, uint8 (N, C, H, W).

        Raises:
            UsageError: The images have more than 4096 pixels on a side.
        """
        channels, height, width = images.shape[1:]
        if max(height, width) > MAX_INPUT_SIDE:
            raise UsageError(f"images of {width} x {height} pixels; models take at most {MAX_INPUT_SIDE} a side")
        # Histograms of the 256 values are exact and need no float copy of the data. A subset of a very large data
        # set is enough. Indexing in chunks reads shards one after another.
        counts = np.zeros((channels, 256))
        chunk = max(CHUNK_BYTES // (channels * height * width), 1)
        starts = range(0, len(images), chunk)
        for start in starts[:: max(len(starts) // MAX_CHUNKS, 1)]:
            pixels = images[start : start + chunk]
            counts += [pixels[:, c].flatten().bincount(minlength=256).numpy() for c in range(channels)]
        levels = np.arange(256) / 255
        fractions = counts / counts.sum(axis=1, keepdims=True)  # (C, 256)
        mean = fractions @ levels
        std = np.sqrt((fractions @ levels**2 - mean**2).clip(0)).clip(1e-3)
        return cls(channels, height, width, tuple(mean.tolist()), tuple(std.tolist()), input_style)

    def transform(self, image: Image.Image, *, adapt: bool = True) -> Pixels:
        """Return a PIL image as uint8 pixels (C, H, W) in the style of the training images.

        Without ``adapt``, only convert the color mode and resize, without extracting ink.
        """
        image = to_mode(image, self.channels)
        if not adapt or not self.input_style.content_size:
            image = fit_photo(image, self.height, self.width)
        else:
            image = fit_ink(image, self.height, self.width, self.input_style)
        return image_pixels(image)

    def normalizer(self) -> Normalize:
        """Return the module that turns uint8 pixels into the input of the model."""
        from convlens.data.normalize import Normalize

        return Normalize(self.mean, self.std)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for :meth:`from_json`."""
        return {
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "mean": self.mean,
            "std": self.std,
            "style": self.input_style.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocess:
        """Return the preprocessing that :meth:`to_json` described.

        Raises:
            KeyError, TypeError, ValueError: ``values`` describe no valid preprocessing.
        """
        loaded = cls(
            channels=int(values["channels"]),
            height=int(values["height"]),
            width=int(values["width"]),
            mean=tuple(float(v) for v in values["mean"]),
            std=tuple(float(v) for v in values["std"]),
            input_style=InputStyle.from_json(values["style"]),
        )
        sides = loaded.channels in (1, 3) and all(1 <= s <= MAX_INPUT_SIDE for s in (loaded.height, loaded.width))
        content_fits = 0 <= loaded.input_style.content_size <= min(loaded.height, loaded.width)
        finite = all(map(math.isfinite, (*loaded.mean, *loaded.std))) and all(std > 0 for std in loaded.std)
        if not (sides and content_fits and finite and len(loaded.mean) == len(loaded.std) == loaded.channels):
            raise ValueError("its preprocessing makes no sense")
        return loaded
