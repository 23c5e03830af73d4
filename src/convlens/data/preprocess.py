"""What stands between a picture and a net, and travels with the model: adapting to its size, mean and spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from convlens.data.images import InputStyle, Pixels, fit_photo, image_pixels, to_mode
from convlens.data.mnist_style import fit_ink
from convlens.errors import UsageError

if TYPE_CHECKING:  # who only predicts does without PyTorch
    from torch import Tensor

    from convlens.data.normalize import Normalize

PART_BYTES, MOST_PARTS = 4 << 20, 128  # of pixels at a time, and how often, for their mean and spread
MAX_INPUT_SIDE = 4096  # pixels, of the images that a net takes


@dataclass(frozen=True)
class Preprocess:
    """What stands between a picture and a net: size, colour mode, style and normalisation. Saved in the bundle."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    style: InputStyle

    @classmethod
    def measure(cls, images: Tensor, style: InputStyle) -> Preprocess:
        """Take size and per-channel mean and standard deviation from training images, uint8 (N, C, H, W).

        Raises UsageError for images of more than 4096 pixels a side, which no bundle may ask for.
        """
        channels, height, width = images.shape[1:]
        if max(height, width) > MAX_INPUT_SIDE:
            raise UsageError(f"images of {width} x {height} pixels; nets take at most {MAX_INPUT_SIDE} a side")
        # counting the 256 values is exact, and needs no float copy of the data; of very many images some are enough
        counts = np.zeros((channels, 256))
        part = max(PART_BYTES // (channels * height * width), 1)  # those in shards are read part by part
        starts = range(0, len(images), part)
        for start in starts[:: max(len(starts) // MOST_PARTS, 1)]:
            pixels = images[start : start + part]
            counts += [pixels[:, c].flatten().bincount(minlength=256).numpy() for c in range(channels)]
        levels = np.arange(256) / 255
        share = counts / counts.sum(axis=1, keepdims=True)  # (C, 256)
        mean = share @ levels
        std = np.sqrt((share @ levels**2 - mean**2).clip(0)).clip(1e-3)
        return cls(channels, height, width, tuple(mean.tolist()), tuple(std.tolist()), style)

    def adapt(self, image: Image.Image, *, adapt: bool = True) -> Pixels:
        """Return any PIL image as the pixels this net was trained on, uint8 (C, H, W).

        Without ``adapt`` it is only converted and resized, without looking for ink.
        """
        image = to_mode(image, self.channels)
        if not adapt or not self.style.ink_box:
            image = fit_photo(image, self.height, self.width)
        else:
            image = fit_ink(image, self.height, self.width, self.style)
        return image_pixels(image)

    def normaliser(self) -> Normalize:
        """Return the module that turns uint8 pixels into the net's input."""
        from convlens.data.normalize import Normalize

        return Normalize(self.mean, self.std)

    def to_json(self) -> dict[str, Any]:
        """Return the plain values that :meth:`from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocess:
        """Rebuild what :meth:`to_json` gave; KeyError, TypeError or ValueError if it is something else."""
        made = cls(
            channels=int(values["channels"]),
            height=int(values["height"]),
            width=int(values["width"]),
            mean=tuple(float(v) for v in values["mean"]),
            std=tuple(float(v) for v in values["std"]),
            style=InputStyle(int(values["style"]["ink_box"]), bool(values["style"]["centre_by_mass"])),
        )
        sides = made.channels in (1, 3) and 1 <= made.height <= MAX_INPUT_SIDE and 1 <= made.width <= MAX_INPUT_SIDE
        # an ink box that is larger than the image cannot be placed in it
        fits = 0 <= made.style.ink_box <= min(made.height, made.width)
        finite = all(map(math.isfinite, (*made.mean, *made.std))) and all(std > 0 for std in made.std)
        if not (sides and fits and finite and len(made.mean) == len(made.std) == made.channels):
            raise ValueError("its preprocessing makes no sense")
        return made
