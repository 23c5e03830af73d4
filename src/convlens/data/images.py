"""Open image files and convert them to gray or RGB pixels. Must not import torch, so that it starts fast."""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from convlens.errors import ConvlensError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 50_000_000  # Pillow takes 4 bytes for each
MAX_SIDE_PIXELS = 65_535  # the longest side of a JPEG
MAX_ASPECT_RATIO = 10_000
MAX_MULTISCAN_RATIO = 1.5  # times MAX_PIXELS: libjpeg holds a JPEG of several scans in memory, 2 bytes a color value
MAX_SLOW_PPM_PIXELS = 1_000_000  # about three seconds, because Pillow decodes some PPMs in Python
MAX_FILE_BYTES = 400_000_000  # MAX_PIXELS of four 16-bit values, uncompressed
MAX_SCANS = 100  # of a progressive JPEG; each updates all pixels, and encoders write about ten
BAND_PIXELS = 1 << 22  # pixels that are converted at a time; conversion takes up to 16 bytes each
EXIF_ORIENTATION = 0x0112
# Only formats that Pillow decodes itself: it would pass an EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


class SuppressWarnings:
    """Suppress warnings while any thread is inside. ``warnings.catch_warnings`` alone is not thread-safe."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._catch = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._catch = warnings.catch_warnings()
                self._catch.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._catch.__exit__(None, None, None)


no_warnings = SuppressWarnings()


class InvalidImageError(ConvlensError):
    """A file or object is not a readable image."""


@dataclass(frozen=True)
class InputStyle:
    """What the images of a data set show, and how new images are made to look like them.

    Photos fill the image. Ink (MNIST, Fashion-MNIST, digits) is light on black, scaled into a square and centered.

    Args:
        content_size: The side of the square that ink is scaled to, in pixels; 0 for photos.
        center_of_mass: Center ink by its center of mass, not by its bounding box.
    """

    content_size: int = 0
    center_of_mass: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain values for :meth:`from_json`."""
        return {"content_size": self.content_size, "center_of_mass": self.center_of_mass}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InputStyle:
        """Return the style that :meth:`to_json` described; KeyError, TypeError or ValueError if it is invalid."""
        return cls(int(values["content_size"]), bool(values["center_of_mass"]))


def read_file(path: str | Path, name: str = "") -> bytes:
    """Return the content of an image file.

    Args:
        path: The file.
        name: What messages call the file, by default ``path``.

    Raises:
        InvalidImageError: The file is missing, unreadable, not a regular file, or larger than 400 MB.
    """
    name = name or str(path)
    try:
        with open(path, "rb", opener=open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidImageError(f"{name} is a pipe or a device, not a file")
            if status.st_size > MAX_FILE_BYTES:
                raise InvalidImageError(
                    f"{name} has {status.st_size:,} bytes, too many for an image (over {MAX_FILE_BYTES:,})"
                )
            return file.read()
    except FileNotFoundError:
        raise InvalidImageError(f"{name}: there is no such file") from None
    except IsADirectoryError:
        raise InvalidImageError(f"{name} is a folder, not an image") from None
    except PermissionError:
        raise InvalidImageError(f"{name} cannot be read: permission denied") from None
    except OSError as error:
        raise InvalidImageError(f"{name} cannot be read: {error.strerror}") from None


def open_nonblocking(path: str, flags: int) -> int:
    """Open a file without waiting for a writer if it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_image(source: str | Path | bytes, name: str = "the image", max_pixels: int | None = None) -> Image.Image:
    """Decode an image file and apply its EXIF orientation.

    The format is detected from the content. The size is checked before decoding. A JPEG with more than ``max_pixels``
    and at most 178 million pixels is decoded at one eighth of its size.

    Args:
        source: A path, or the content of a file.
        name: What messages call a content.
        max_pixels: The largest number of pixels, by default 50 million.

    Raises:
        InvalidImageError: The file is missing, not an image or truncated; it has too many pixels, a side of more than
            65,535 pixels or an aspect ratio over 10,000; or it is a JPEG of more than 100 scans or a PPM that takes
            minutes to decode.
    """
    if not isinstance(source, bytes):
        return open_image(read_file(source), str(source), max_pixels)
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    if source.startswith(b"\xff\xd8") and (scans := source.count(b"\xff\xda")) > MAX_SCANS:
        raise InvalidImageError(f"{name} has {scans:,} scans, too many for a JPEG (over {MAX_SCANS})")
    try:
        # From memory, because Pillow reads files in many small pieces. Closed, because a TIFF would keep the content.
        with no_warnings, io.BytesIO(source) as file, Image.open(file, formats=FORMATS) as image:
            require_shape(image.width, image.height, name)
            if image.width * image.height > limit:
                if image.width * image.height > limit * MAX_MULTISCAN_RATIO and has_several_scans(image, source):
                    raise Image.DecompressionBombError
                image.draft(image.mode, (1, 1))
            if image.width * image.height > limit:
                raise Image.DecompressionBombError
            slow = image.format == "PPM" and image.tile[0][0] != "raw"
            if slow and image.width * image.height > MAX_SLOW_PPM_PIXELS:
                raise InvalidImageError(
                    f"{name} has too many pixels for a PPM in text form or without 256 levels "
                    f"(over {MAX_SLOW_PPM_PIXELS:,})"
                )
            image.load()
            return ImageOps.exif_transpose(image) if image.getexif().get(EXIF_ORIENTATION, 1) != 1 else image
    except UnidentifiedImageError:
        raise InvalidImageError(f"{name} is not an image (JPEG, PNG, GIF, WebP, BMP, TIFF or PPM)") from None
    except Image.DecompressionBombError:
        raise InvalidImageError(f"{name} has too many pixels (over {limit:,})") from None
    except (InvalidImageError, MemoryError):  # running out of memory says nothing about the image
        raise
    except Exception as error:  # decoders raise many kinds of error (OSError, SyntaxError, struct.error, ...)
        raise InvalidImageError(f"{name} cannot be decoded: {str(error) or type(error).__name__}") from None


def require_shape(width: int, height: int, name: str) -> None:
    """Raise InvalidImageError for an image that is too long or too narrow: a few bytes can encode one."""
    long, short = max(width, height), min(width, height)
    if long > MAX_SIDE_PIXELS:
        raise InvalidImageError(f"{name} is too long: {width:,} x {height:,} pixels (over {MAX_SIDE_PIXELS:,} a side)")
    if long > MAX_ASPECT_RATIO * short:
        limit = f"over {MAX_ASPECT_RATIO:,} times as long as wide"
        raise InvalidImageError(f"{name} is too narrow: {width:,} x {height:,} pixels ({limit})")


def has_several_scans(image: Image.Image, source: bytes) -> bool:
    """Return True if no scan of a JPEG has all its pixels and colors, so that libjpeg must hold it in memory."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.fp is None:
        return False
    # Pillow has read up to the end of the first scan's header. The length of a scan with all colors is known.
    start = image.fp.tell() - 8 - 2 * image.layers
    return "progressive" in image.info or source[start : start + 2] != b"\xff\xda"


def array_to_image(array: NDArray[Any]) -> Image.Image:
    """Return an array (H, W), (H, W, 1|3|4) or (1|3, H, W), uint8 or float in 0..1, as a PIL image."""
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise InvalidImageError(f"an array of shape {array.shape} is not an image; give (H, W), (H, W, C) or (C, H, W)")
    return Image.fromarray(to_bytes(array))


def to_bytes(array: NDArray[Any]) -> Pixels:
    """Return integers 0..255, booleans or floats 0..1 as uint8; InvalidImageError for other values."""
    if array.size == 0:
        raise InvalidImageError(f"an array of shape {array.shape} and type {array.dtype} has no pixels")
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise InvalidImageError(f"an array of shape {array.shape} and type {array.dtype} has no pixels")
    low, high = float(array.min()), float(array.max())
    top = 1.0 if np.issubdtype(array.dtype, np.floating) else 255.0
    if not (0 <= low and high <= top):  # NaN fails too
        raise InvalidImageError(
            f"pixel values run from {low:g} to {high:g}; give uint8 (or integers 0 to 255), or floats 0 to 1"
        )
    return np.round(array * (255.0 / top)).astype(np.uint8)


def is_gray(image: Image.Image) -> bool:
    """Return True if the mode of an image has no color."""
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image of any mode (16-bit, palette, CMYK, alpha, 1-bit) to gray (1 channel) or RGB (3).

    16-bit and 32-bit integers are read as 0..65535 and floats as 0..1. Transparent parts become white.
    """
    target = "L" if channels == 1 else "RGB"
    if image.mode == target and not image.has_transparency_data:
        return image
    top = 1.0 if image.mode == "F" else 65535.0
    if image.mode == "I" and image.getextrema()[1] <= 255:  # type: ignore[operator]
        top = 255.0  # 8-bit values in a 32-bit image
    rows = max(BAND_PIXELS // image.width, 1)
    if rows >= image.height:
        return convert(image, target, top)
    converted = Image.new(target, image.size)
    for y in range(0, image.height, rows):  # intermediate modes of a whole large image would not fit into memory
        band = image.crop((0, y, image.width, min(y + rows, image.height)))
        converted.paste(convert(band, target, top), (0, y))
    return converted


def convert(image: Image.Image, target: str, top: float) -> Image.Image:
    """Convert ``image`` to mode L or RGB. In modes of more than 8 bits, ``top`` becomes 255."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.array(image, dtype=np.float32)  # (H, W)
        values *= 255.0 / top
        np.nan_to_num(values, copy=False)
        image = Image.fromarray(np.round(values, out=values).clip(0, 255, out=values).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "LAB":
        image = image.convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == target else image.convert(target)


def fit_photo(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize ``image`` to cover height x width, and crop the excess equally on both sides."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR, centering=(0.5, 0.5))


def image_pixels(image: Image.Image) -> Pixels:
    """Return a gray or RGB image as uint8 (C, H, W)."""
    pixels = np.array(image)  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
