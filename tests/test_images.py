"""A golden set of images of every kind: exact pixels, the same in training, test and prediction."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convlens.data.image_folder import load_folder
from convlens.data.images import InputStyle, fit_photo, image_pixels, open_image, to_mode
from convlens.data.preprocess import Preprocess

GOLDEN = Path(__file__).parent / "golden" / "images"
PIXELS = Path(__file__).parent / "golden" / "images.json"  # SHA-256 of size and pixels, as RGB and as grey
SIDE = 16

Array = np.ndarray[Any, Any]


def scene(height: int = 20, width: int = 24) -> Array:
    """Return an image (H, W, 3) without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([10 * y, 9 * x, 3 * (x + y)], axis=2).astype(np.uint8)


def encode(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def turned(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return encode(Image.fromarray(scene()), "JPEG", quality=95, exif=exif)


def decoded(content: bytes, mode: str = "RGB") -> Array:
    """Return the pixels that Pillow decodes."""
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert(mode))


def on_white(colours: Array, alpha: Array) -> Array:
    """Return colors (H, W, 3) blended onto white, by alpha (H, W) 0..255."""
    share = alpha[:, :, None] / 255
    return np.round(colours * share + 255 * (1 - share))


RGB = scene()
GREY = RGB[:, :, 0]
ALPHA = np.where(np.arange(24)[None, :] < 12, 255, 60) * np.ones((20, 1), dtype=int)
DEEP = (np.arange(480).reshape(20, 24) * 136).astype(np.uint16)
# name -> (content, what it must look like as RGB (H, W, 3)); None: what Pillow makes of it
CASES: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Array]]] = {
    "exif-1.jpg": (lambda: turned(1), lambda c: decoded(c)),
    "exif-2.jpg": (lambda: turned(2), lambda c: decoded(c)[:, ::-1]),
    "exif-3.jpg": (lambda: turned(3), lambda c: decoded(c)[::-1, ::-1]),
    "exif-4.jpg": (lambda: turned(4), lambda c: decoded(c)[::-1]),
    "exif-5.jpg": (lambda: turned(5), lambda c: decoded(c).transpose(1, 0, 2)),
    "exif-6.jpg": (lambda: turned(6), lambda c: decoded(c)[::-1].transpose(1, 0, 2)),
    "exif-7.jpg": (lambda: turned(7), lambda c: decoded(c)[::-1, ::-1].transpose(1, 0, 2)),
    "exif-8.jpg": (lambda: turned(8), lambda c: decoded(c)[:, ::-1].transpose(1, 0, 2)),
    "progressive.jpg": (
        lambda: encode(Image.fromarray(RGB), "JPEG", progressive=True, quality=95), lambda c: decoded(c)
    ),
    "cmyk.jpg": (lambda: encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95), lambda c: decoded(c)),
    "16-bit.png": (
        lambda: encode(Image.fromarray(DEEP), "PNG"),
        lambda _: np.repeat(np.round(DEEP / 65535 * 255)[:, :, None], 3, axis=2),
    ),
    "palette.png": (lambda: encode(Image.fromarray(RGB).quantize(16), "PNG"), lambda c: decoded(c)),
    "alpha.png": (
        lambda: encode(Image.fromarray(np.dstack([RGB, ALPHA]).astype(np.uint8)), "PNG"),
        lambda _: on_white(RGB, ALPHA),
    ),
    "la.png": (
        lambda: encode(Image.fromarray(np.dstack([GREY, ALPHA]).astype(np.uint8), "LA"), "PNG"),
        lambda _: on_white(np.repeat(GREY[:, :, None], 3, axis=2), ALPHA),
    ),
    "1-bit.png": (
        lambda: encode(Image.fromarray(GREY > 90), "PNG"),
        lambda _: np.repeat(((GREY > 90) * 255)[:, :, None], 3, axis=2),
    ),
    "animated.gif": (
        lambda: encode(
            Image.fromarray(RGB).quantize(16), "GIF", save_all=True,
            append_images=[Image.new("RGB", (24, 20), "red")],
        ),
        lambda c: decoded(c),
    ),
    "animated.webp": (
        lambda: encode(
            Image.fromarray(RGB), "WEBP", lossless=True, save_all=True,
            append_images=[Image.new("RGB", (24, 20), "red")],
        ),
        lambda _: RGB,
    ),
    "tiny.png": (lambda: encode(Image.fromarray(RGB[7:8, 5:6]), "PNG"), lambda _: RGB[7:8, 5:6]),
    "long.png": (
        lambda: encode(Image.fromarray(np.tile(RGB, (1, 209, 1))[3:4, :5000]), "PNG"),
        lambda _: np.tile(RGB, (1, 209, 1))[3:4, :5000],
    ),
    "grey.bmp": (lambda: encode(Image.fromarray(GREY), "BMP"), lambda _: np.repeat(GREY[:, :, None], 3, axis=2)),
    "colour.tiff": (lambda: encode(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"), lambda _: RGB),
}  # fmt: skip


def digest(pixels: Array) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def golden() -> dict[str, list[str]]:
    """Return the expected digests; rewritten, with the files, if CONVLENS_ACCEPT_GOLDEN is set."""
    if os.environ.get("CONVLENS_ACCEPT_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        found = {}
        for name, (make, _) in CASES.items():
            (GOLDEN / name).write_bytes(make())
            image = open_image(GOLDEN / name)
            found[name] = [digest(np.asarray(to_mode(image, channels))) for channels in (3, 1)]
        PIXELS.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(PIXELS.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_decoded_pixels_match_the_golden_digests(name: str, golden: dict[str, list[str]]) -> None:
    content = (GOLDEN / name).read_bytes()
    for source in (GOLDEN / name, content):
        image = open_image(source)
        pixels = np.asarray(to_mode(image, 3))
        assert np.array_equal(pixels, CASES[name][1](content))
        assert [digest(pixels), digest(np.asarray(to_mode(image, 1)))] == golden[name]


@pytest.mark.parametrize("channels", [1, 3])
def test_training_test_and_prediction_decode_alike(channels: int, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for split in ("train", "test"):
        for label in "ab":
            shutil.copytree(GOLDEN, root / split / label)
    dataset = load_folder(root, image_size=SIDE, channels=channels)
    cached = load_folder(root, image_size=SIDE, channels=channels)
    preprocess = Preprocess.fit(dataset.train.images, dataset.input_style)
    assert preprocess.input_style == InputStyle()
    assert len(dataset.train) == len(dataset.test) == 2 * len(CASES)
    for loaded in (dataset, cached):
        for split in (loaded.train, loaded.test):
            for image, path in zip(split.images, split.ids, strict=True):
                predicted = preprocess.transform(open_image(root / path))
                assert np.array_equal(image, predicted), path
                decoded_once = to_mode(open_image((root / path).read_bytes()), channels)
                assert np.array_equal(image, image_pixels(fit_photo(decoded_once, SIDE, SIDE))), path


def test_golden_set_is_complete() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(CASES)
