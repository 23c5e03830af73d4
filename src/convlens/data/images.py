"""Pictures of any kind as pixels: opened, brought to grey or RGB, resized. Without PyTorch, to start at once."""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from convlens.errors import ConvlensError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 50_000_000  # pixels; Pillow takes 4 bytes for each

MAX_SIDE_PIXELS = 65_535  # the longest that a JPEG can have

MAX_ASPECT_RATIO = 10_000  # of the longer side to the shorter

MAX_WHOLE_JPEG = 1.5  # times LARGEST: a JPEG of several scans is held whole, with 2 bytes for each colour of a pixel

MAX_SLOW_PIXELS = 1_000_000  # of a PPM that Pillow decodes in Python, at about three seconds for so many

BAND_PIXELS = 1 << 22  # whose colours are changed at a time: on the way they take up to 16 bytes each

MAX_INK_PIXELS = 4096 * 4096  # searched for ink, in floats; a page of A4 at 400 dpi has 15.5 million

MAX_BORDER_SAMPLES = 65_536  # of which the paper is estimated, less than a megabyte: all the border of most images

MAX_FILE_BYTES = 400_000_000  # bytes: so many pixels of four 16-bit numbers, not compressed

MAX_SCANS = 100  # of a progressive JPEG, each of which goes over all its pixels; encoders write about ten

ORIENTATION = 0x0112  # EXIF's tag

# Pillow would hand an EPS to Ghostscript: only formats that it decodes itself
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


class Quiet:
    """Silences warnings while any thread is inside; warnings.catch_warnings alone is not safe between threads."""

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


QUIET = Quiet()


class InvalidImageError(ConvlensError):
    """A file or object that is not an image that can be read."""


@dataclass(frozen=True)
class InputStyle:
    """What the pictures of a data set look like, beyond their size.

    A photo fills its frame. Ink (MNIST, Fashion-MNIST, digits) is light on black, scaled to fit into a square of
    ``content_size`` pixels and centred in the image, by mass or by its bounding box.
    """

    content_size: int = 0  # 0: a photo
    center_of_mass: bool = False


def read_file(path: str | Path, name: str = "") -> bytes:
    """Return what is in an image file; InvalidImageError if it is missing, closed to us, no file, or of over 400 MB.

    ``name`` is what messages call it, if not by its path.
    """
    name = name or str(path)
    try:
        with open(path, "rb", opener=without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise InvalidImageError(f"{name} is a pipe or a device, not a file")
            if about.st_size > MAX_FILE_BYTES:
                raise InvalidImageError(
                    f"{name} has {about.st_size:,} bytes, too many for an image (over {MAX_FILE_BYTES:,})"
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


def without_waiting(path: str, flags: int) -> int:
    """Open a file, but do not wait for somebody to write into a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_image(source: str | Path | bytes, name: str = "the image", max_pixels: int | None = None) -> Image.Image:
    """Open a file's path or content as a PIL image, fully decoded and turned as its EXIF tag says.

    The format is decided by content. An image is refused by its size before it is decoded. A JPEG of more than
    ``max_pixels`` is decoded at an eighth of its size, if it has at most 178 million.

    Args:
        source: A path, or the content of a file.
        name: What messages call a content.
        max_pixels: How many pixels the image may have, by default 50 million.

    Raises:
        InvalidImageError: The file is missing, not an image or truncated; it has too many pixels, a side of
            more than 65,535, or is more than 10,000 times as long as wide; or it is a JPEG of more than 100 scans,
            or a PPM that takes minutes.
    """
    if not isinstance(source, bytes):
        return open_image(read_file(source), str(source), max_pixels)
    most = MAX_PIXELS if max_pixels is None else max_pixels
    if source.startswith(b"\xff\xd8") and (scans := source.count(b"\xff\xda")) > MAX_SCANS:
        raise InvalidImageError(f"{name} has {scans:,} scans, too many for a JPEG (over {MAX_SCANS})")
    try:
        # from memory, for Pillow reads a file in many small pieces; closed, or a TIFF would keep the whole file
        with QUIET, io.BytesIO(source) as file, Image.open(file, formats=FORMATS) as image:
            require_shape(image.width, image.height, name)
            if image.width * image.height > most:
                if image.width * image.height > most * MAX_WHOLE_JPEG and has_several_scans(image, source):
                    raise Image.DecompressionBombError
                image.draft(image.mode, (1, 1))
            if image.width * image.height > most:
                raise Image.DecompressionBombError
            if image.format == "PPM" and image.width * image.height > MAX_SLOW_PIXELS and image.tile[0][0] != "raw":
                limit = f"over {MAX_SLOW_PIXELS:,}"
                raise InvalidImageError(
                    f"{name} has too many pixels for a PPM of text or of other than 256 levels ({limit})"
                )
            image.load()
            return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    except UnidentifiedImageError:
        raise InvalidImageError(f"{name} is not an image (JPEG, PNG, GIF, WebP, BMP, TIFF or PPM)") from None
    except Image.DecompressionBombError:
        raise InvalidImageError(f"{name} has too many pixels (over {most:,})") from None
    except (InvalidImageError, MemoryError):  # the latter says nothing of the image
        raise
    except Exception as error:  # decoders raise many kinds of error (OSError, SyntaxError, struct.error, ...)
        raise InvalidImageError(f"{name} cannot be decoded: {str(error) or type(error).__name__}") from None


def require_shape(width: int, height: int, name: str) -> None:
    """Raise InvalidImageError for an image that is too long or too narrow: few bytes can hold it."""
    long, short = max(width, height), min(width, height)
    if long > MAX_SIDE_PIXELS:
        raise InvalidImageError(f"{name} is too long: {width:,} x {height:,} pixels (over {MAX_SIDE_PIXELS:,} a side)")
    if long > MAX_ASPECT_RATIO * short:
        limit = f"over {MAX_ASPECT_RATIO:,} times as long as wide"
        raise InvalidImageError(f"{name} is too narrow: {width:,} x {height:,} pixels ({limit})")


def has_several_scans(image: Image.Image, source: bytes) -> bool:
    """Return True if a JPEG has no scan of all its pixels and colours, so that libjpeg must hold it whole."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.fp is None:
        return False
    # Pillow has read up to the end of the header of the first scan, whose length tells how many colours it has
    start = image.fp.tell() - 8 - 2 * image.layers
    return "progressive" in image.info or source[start : start + 2] != b"\xff\xda"


def array_to_image(array: NDArray[Any]) -> Image.Image:
    """Return a uint8, or a float in 0..1, array (H, W), (H, W, 1|3|4) or (1|3, H, W) as a PIL image."""
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise InvalidImageError(f"an array of shape {array.shape} is not an image; give (H, W), (H, W, C) or (C, H, W)")
    return Image.fromarray(to_bytes(array))


def to_bytes(array: NDArray[Any]) -> Pixels:
    """Return whole numbers 0..255, booleans or floats 0..1 as uint8; InvalidImageError for any other values."""
    if array.size == 0:
        raise InvalidImageError(f"an array of shape {array.shape} and type {array.dtype} holds no pixels")
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise InvalidImageError(f"an array of shape {array.shape} and type {array.dtype} holds no pixels")
    low, high = float(array.min()), float(array.max())
    top = 1.0 if np.issubdtype(array.dtype, np.floating) else 255.0
    if not (0 <= low and high <= top):  # a NaN fails too
        raise InvalidImageError(
            f"pixel values run from {low:g} to {high:g}; give uint8 (or whole numbers 0 to 255), or floats 0 to 1"
        )
    return np.round(array * (255.0 / top)).astype(np.uint8)


def is_grey(image: Image.Image) -> bool:
    """Say whether a picture's mode has no colour."""
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Return ``image`` in grey (1 channel) or RGB (3), whatever its mode: 16-bit, palette, CMYK, alpha, 1-bit.

    16-bit and 32-bit whole numbers are read as 0..65535, floats as 0..1; transparent parts become white.
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
    made = Image.new(target, image.size)
    for y in range(0, image.height, rows):  # the steps between the two modes are never held for all pixels
        band = image.crop((0, y, image.width, min(y + rows, image.height)))
        made.paste(convert(band, target, top), (0, y))
    return made


def convert(image: Image.Image, target: str, top: float) -> Image.Image:
    """Return ``image`` in mode ``target``, L or RGB; of more than 8 bits, ``top`` becomes 255."""
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
    """Resize ``image`` to cover height x width and cut what stands over, equally on both sides."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR, centering=(0.5, 0.5))


def image_pixels(image: Image.Image) -> Pixels:
    """Return a grey or RGB image as uint8 (C, H, W)."""
    pixels = np.array(image)  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
