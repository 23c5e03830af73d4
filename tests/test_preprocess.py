"""From any picture to what a net was trained on: decoding, modes, ink, measuring, normalising."""

import io
import json
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from PIL import Image, ImageDraw, ImageOps
from test_fuzz import memory

from convlens.data import images
from convlens.data.images import (
    InputStyle,
    InvalidImageError,
    array_to_image,
    fit_photo,
    image_pixels,
    open_image,
    to_bytes,
    to_mode,
)
from convlens.data.mnist_style import fit_ink
from convlens.data.normalize import Normalize
from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError

quick = settings(max_examples=50, deadline=None, database=None, derandomize=True)
MNIST_STYLE = InputStyle(ink_box=20, centre_by_mass=True)


def encode(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# opening


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "JPEG", "WEBP"])
def test_the_format_is_decided_by_content(kind: str, tmp_path: Path) -> None:
    content = encode(Image.new("RGB", (9, 7), (200, 10, 10)), kind)
    path = tmp_path / "picture.eps"
    path.write_bytes(content)
    for source in (content, path, str(path)):
        image = open_image(source)
        assert image.size == (9, 7)
        red = np.asarray(image.convert("RGB"), dtype=float).mean(axis=(0, 1))
        assert np.abs(red - (200, 10, 10)).max() < 4


ORIENTATIONS: dict[int, Callable[[Image.Image], Image.Image]] = {
    1: lambda i: i,
    2: ImageOps.mirror,
    3: lambda i: i.rotate(180),
    4: ImageOps.flip,
    5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
    6: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
    8: lambda i: i.transpose(Image.Transpose.ROTATE_90),
}


@pytest.mark.parametrize("tag", ORIENTATIONS)
def test_the_exif_turn_is_done(tag: int) -> None:
    image, exif = noise(), Image.Exif()
    exif[0x0112] = tag
    opened = open_image(encode(image, "PNG", exif=exif))
    assert np.array_equal(np.asarray(opened), np.asarray(ORIENTATIONS[tag](image)))
    assert opened.getexif().get(0x0112, 1) == 1  # not turned a second time


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        opened = open_image(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
        pixel = opened.convert("RGB").getpixel((2, 2))
        assert isinstance(pixel, tuple)
        assert np.abs(np.subtract(pixel, (255, 0, 0))).max() < 10, kind


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidImageError) as caught:
        open_image(tmp_path / "no.png")
    assert str(caught.value) == f"{tmp_path / 'no.png'}: there is no such file"
    assert caught.value.exit_code == 1


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidImageError) as caught:
        open_image(str(tmp_path))
    assert str(caught.value) == f"{tmp_path} is a folder, not an image"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"Dear all,\n", EPS, b"%PDF-1.4\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\xd8", bytes(100)],
    ids=["empty", "text", "eps", "pdf", "svg", "jpeg-magic", "zeros"],
)
def test_what_is_no_image(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(InvalidImageError) as caught:
        open_image(path)
    assert str(caught.value) == f"{path} is not an image (JPEG, PNG, GIF, WebP, BMP, TIFF or PPM)"
    with pytest.raises(InvalidImageError, match="^the image is not an image"):
        open_image(content)


def test_an_eps_never_reaches_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    path = tmp_path / "x.jpg"
    path.write_bytes(EPS)
    with pytest.raises(InvalidImageError, match=r"x\.jpg is not an image"):
        open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_truncated_image(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    content = encode(noise(), kind)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidImageError) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path} ")
    if kind == "JPEG":
        assert "cut cannot be decoded: image file is truncated" in str(caught.value)


WHOLE = {kind: encode(noise(8, 6), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")}


@quick
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1), st.binary(max_size=6))
def test_damaged_bytes_are_an_image_or_an_error_for_people(kind: str, where: float, damage: bytes) -> None:
    content = WHOLE[kind]
    at = round(where * len(content))
    try:
        image = open_image(content[:at] + damage + content[at + len(damage) :])
        assert to_mode(image, 3).mode == "RGB"
    except InvalidImageError as error:
        assert str(error).startswith("the image ")


@quick
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_for_people(content: bytes) -> None:
    try:
        open_image(content)
    except InvalidImageError as error:
        assert str(error).startswith("the image ")


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG of any size, in some 60 bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [7100, 15_000, 60_000], ids=["large", "larger", "far-too-large"])
def test_a_decompression_bomb(side: int) -> None:
    with pytest.raises(InvalidImageError) as caught:
        open_image(png_header(side, side))
    assert str(caught.value) == "the image has too many pixels (over 50,000,000)"


def test_an_image_just_below_the_limit_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert open_image(encode(Image.new("L", (10, 10)), "PNG")).size == (10, 10)
    with pytest.raises(InvalidImageError, match=r"too many pixels \(over 100\)"):
        open_image(encode(Image.new("L", (11, 10)), "PNG"))


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    content = encode(noise(64, 64), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    repeated = content[:-2] + content[last:-2] * 200 + content[-2:]
    with pytest.raises(InvalidImageError, match=r"^the image has 2\d\d scans, too many for a JPEG \(over 100\)$"):
        open_image(repeated)
    assert open_image(content).size == (64, 64)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell of memory")
@pytest.mark.parametrize("kind", ["I;16", "RGBA"])
def test_the_largest_pictures_need_bounded_memory(kind: str) -> None:
    """A hundred kilobytes may be 49 million pixels."""
    image = Image.new(kind, (7000, 7000)) if kind == "RGBA" else Image.fromarray(np.zeros((7000, 7000), np.uint16))
    content = encode(image, "PNG", compress_level=1)
    del image

    before = memory("VmRSS", forget_peak=True)
    assert to_mode(open_image(content), 1).size == (7000, 7000)
    assert memory("VmHWM") - before < 650  # MiB


def test_a_jpeg_over_the_limit_is_decoded_at_an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert open_image(encode(Image.new("RGB", (80, 64), (9, 200, 9)), "JPEG")).size == (10, 8)
    with pytest.raises(InvalidImageError, match="too many pixels"):
        open_image(encode(Image.new("RGB", (800, 640)), "JPEG"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InvalidImageError, match="pipe.png is a pipe or a device, not a file$"):
        open_image(tmp_path / "pipe.png")


def test_a_warning_of_pillow_is_no_error_and_not_shown(recwarn: pytest.WarningsRecorder) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([0, 0, 0, 255, 0, 0])
    opened = open_image(encode(image, "PNG", transparency=b"\x00\x80"))
    assert to_mode(opened, 3).getpixel((0, 0)) == (255, 255, 255)
    assert len(recwarn) == 0


def test_two_threads_leave_the_warning_filters_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures may be opened by several threads: one must not undo, or keep, what the other has set."""
    content = encode(Image.new("L", (4, 4)), "PNG")
    inside = {name: threading.Event() for name in "ab"}
    leave = {name: threading.Event() for name in "ab"}
    transpose = ImageOps.exif_transpose

    def slow(image: Image.Image) -> Image.Image:
        name = threading.current_thread().name
        inside[name].set()
        leave[name].wait(5)
        return transpose(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", slow)
    before = list(warnings.filters)
    threads = {name: threading.Thread(target=open_image, args=(content,), name=name) for name in "ab"}
    try:
        for name in "ab":
            threads[name].start()
            inside[name].wait(5)
        for name in "ab":  # the first to come is the first to go
            leave[name].set()
            threads[name].join(5)
        after = list(warnings.filters)
    finally:
        warnings.filters[:] = before  # type: ignore[index]
    assert after == before


# arrays


@pytest.mark.parametrize(
    ("shape", "mode", "size"),
    [
        ((4, 5), "L", (5, 4)),
        ((4, 5, 1), "L", (5, 4)),
        ((1, 4, 5), "L", (5, 4)),
        ((4, 5, 3), "RGB", (5, 4)),
        ((3, 4, 5), "RGB", (5, 4)),
        ((4, 5, 4), "RGBA", (5, 4)),
        ((3, 4, 3), "RGB", (4, 3)),  # channels last
    ],
)
def test_arrays_become_pictures(shape: tuple[int, ...], mode: str, size: tuple[int, int]) -> None:
    image = array_to_image(np.zeros(shape, np.uint8))
    assert (image.mode, image.size) == (mode, size)


@pytest.mark.parametrize("shape", [(), (5,), (4, 5, 2), (2, 4, 5), (1, 3, 4, 5), (0, 5), (5, 0, 3)])
def test_arrays_that_are_no_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidImageError, match="^an array of shape "):
        array_to_image(np.zeros(shape, np.uint8))


@quick
@given(stn.arrays(np.uint8, (3, 4)), st.sampled_from([np.float32, np.float64, np.int16, np.int64, np.uint16]))
def test_to_bytes_gives_the_same_pixels_for_every_type(array: np.ndarray, kind: type) -> None:
    scaled = array / 255 if np.issubdtype(kind, np.floating) else array
    assert np.array_equal(to_bytes(scaled.astype(kind)), array)
    assert to_bytes(array) is array


@quick
@given(stn.arrays(st.sampled_from([np.dtype(k) for k in ("f4", "f8", "i4", "?", "u1")]), (2, 2)))
def test_to_bytes_of_any_values_is_pixels_or_an_error_for_people(array: np.ndarray) -> None:
    try:
        pixels = to_bytes(array)
    except InvalidImageError as error:
        assert "pixel values run from " in str(error)
        top = 1 if array.dtype.kind == "f" else 255
        assert not ((array >= 0) & (array <= top)).all()
    else:
        assert (pixels.dtype, pixels.shape) == (np.uint8, (2, 2))


# modes

MODES: dict[str, tuple[Any, int, tuple[int, int, int]]] = {
    # mode: a pixel, what it is in grey, what it is in colour
    "1": (1, 255, (255, 255, 255)),
    "L": (77, 77, (77, 77, 77)),
    "P": (0, 76, (255, 0, 0)),
    "RGB": ((255, 0, 0), 76, (255, 0, 0)),
    "RGBA": ((255, 0, 0, 255), 76, (255, 0, 0)),
    "RGBX": ((255, 0, 0, 0), 76, (255, 0, 0)),
    "RGBa": ((255, 0, 0, 255), 76, (255, 0, 0)),
    "LA": ((77, 255), 77, (77, 77, 77)),
    "La": ((77, 255), 77, (77, 77, 77)),
    "PA": ((0, 255), 76, (255, 0, 0)),
    "CMYK": ((0, 255, 255, 0), 76, (255, 0, 0)),
    "YCbCr": ((76, 85, 255), 76, (254, 0, 0)),
    "HSV": ((0, 255, 255), 76, (255, 0, 0)),
    "LAB": ((136, 208, 195), 78, (250, 3, 11)),
    "I": (0x8080, 128, (128, 128, 128)),
    "I;16": (0x8080, 128, (128, 128, 128)),
    "I;16L": (0x8080, 128, (128, 128, 128)),
    "I;16B": (0x8080, 128, (128, 128, 128)),
    "F": (0.5, 128, (128, 128, 128)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_one_defined_result(mode: str) -> None:
    pixel, grey, colour = MODES[mode]
    image = Image.new(mode, (3, 2))
    if mode in ("P", "PA"):
        image.putpalette([255, 0, 0])
    image.paste(pixel, (0, 0, 3, 2))
    if mode.startswith("I;16"):  # paste knows no byte order; an array does
        image = Image.frombytes(mode, (3, 2), np.full((2, 3), pixel, ">u2" if mode == "I;16B" else "<u2").tobytes())
    before = image.tobytes()
    for channels, target in ((1, "L"), (3, "RGB")):
        result = to_mode(image, channels)
        assert (result.mode, result.size) == (target, (3, 2))
        found = np.asarray(result, dtype=float).reshape(6, -1)
        assert np.abs(found - (grey if channels == 1 else colour)).max() <= 4
    assert image.tobytes() == before


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "PA"])
def test_transparent_is_white_and_half_transparent_is_half_white(mode: str) -> None:
    if mode in ("RGBA", "LA"):
        pixel: Any = (0, 0, 0, 128) if mode == "RGBA" else (0, 128)
        assert to_mode(Image.new(mode, (2, 2), pixel), 1).getpixel((0, 0)) == 127
    see_through = Image.new(mode, (2, 2), {"RGBA": (0, 0, 0, 0), "LA": (0, 0), "PA": (0, 0)}.get(mode, 0))
    if mode in ("P", "L"):
        see_through.info["transparency"] = 0
    if mode == "RGB":
        see_through.info["transparency"] = (0, 0, 0)
    assert to_mode(see_through, 1).getpixel((0, 0)) == 255
    assert to_mode(see_through, 3).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", [0, 128, 255], [0, 128, 255]),  # 8-bit values in a 32-bit image
        ("I", [0, 256, 65535], [0, 1, 255]),
        ("I", [-5, 65535, 10**6], [0, 255, 255]),
        ("I;16", [0, 255, 65535], [0, 1, 255]),
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", [-1.0, 2.0, float("nan")], [0, 255, 0]),
        ("F", [float("inf"), float("-inf"), 1.0], [255, 0, 255]),
    ],
)
def test_deep_pixels(mode: str, values: list[float], expected: list[int]) -> None:
    kind = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
    image = Image.fromarray(np.array([values], dtype=kind))
    assert image.mode == mode
    assert list(to_mode(image, 1).tobytes()) == expected


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_float_picture_of_one_value(value: float) -> None:
    assert to_mode(Image.fromarray(np.full((2, 2), value, np.float32)), 1).tobytes() == bytes(4)


def test_a_16_bit_png_keeps_its_shades() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    opened = open_image(encode(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(np.asarray(to_mode(opened, 1)).ravel(), np.arange(256))


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]))
def test_fit_photo_covers_any_size(width: int, height: int, to_h: int, to_w: int, channels: int) -> None:
    image = Image.new("L" if channels == 1 else "RGB", (width, height), "white")
    pixels = image_pixels(fit_photo(image, to_h, to_w))
    assert pixels.shape == (channels, to_h, to_w)
    assert np.unique(pixels).tolist() == [255]  # covered: no border is left


def test_fit_photo_of_the_right_size_is_the_image_itself() -> None:
    image = noise(12, 9)
    assert fit_photo(image, 9, 12) is image


def test_fit_photo_keeps_proportions_and_cuts_both_sides_alike() -> None:
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 255
    assert np.asarray(fit_photo(Image.fromarray(pixels), 10, 10)).min() == 255


# ink


def page(size: tuple[int, int] = (200, 150), paper: int = 255, ink: int = 0) -> np.ndarray:
    """A digit like a 7, left of and above the middle of a page (H, W)."""
    width, height = size
    pixels = np.full((height, width), paper, np.uint8)
    pixels[20:30, 30:70] = ink
    pixels[20:100, 60:70] = ink
    return pixels


def ink_of(pixels: np.ndarray, style: InputStyle = MNIST_STYLE, side: int = 28) -> np.ndarray:
    return np.asarray(fit_ink(Image.fromarray(pixels), side, side, style))


def box_of(pixels: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def mass_of(pixels: np.ndarray) -> tuple[float, float]:
    values = pixels.astype(float)
    y = (values.sum(axis=1) * np.arange(values.shape[0])).sum() / values.sum()
    x = (values.sum(axis=0) * np.arange(values.shape[1])).sum() / values.sum()
    return y, x


@pytest.mark.parametrize(("paper", "ink"), [(255, 0), (200, 40), (0, 255), (30, 220)])
def test_ink_becomes_white_on_black_in_a_box_of_20_centred_by_mass(paper: int, ink: int) -> None:
    result = ink_of(page(paper=paper, ink=ink))
    assert (result.shape, result.dtype) == ((28, 28), np.uint8)
    assert result.max() == 255
    assert np.concatenate([result[0], result[-1], result[:, 0], result[:, -1]]).max() == 0
    top, bottom, left, right = box_of(result)
    assert bottom - top == 20
    assert right - left == 10
    y, x = mass_of(result)
    assert abs(y - 13.5) <= 1
    assert abs(x - 13.5) <= 1


def test_black_on_white_and_white_on_black_are_the_same_digit() -> None:
    assert np.array_equal(ink_of(page()), ink_of(255 - page()))


@quick
@given(
    st.integers(2, 60),
    st.integers(2, 60),
    st.integers(5, 120),
    st.integers(5, 120),
    st.booleans(),
    st.booleans(),
)
def test_any_block_of_ink_fits_its_box(h: int, w: int, top: int, left: int, dark: bool, by_mass: bool) -> None:
    assume(h * w >= 100)  # what covers less than 0.2% of the page is dust
    pixels = np.zeros((200, 190), np.uint8)
    pixels[top : top + h, left : left + w] = 255
    pixels[top, left] = 128  # not quite a rectangle
    result = ink_of(pixels if dark else 255 - pixels, InputStyle(20, by_mass))
    above, below, before, after = box_of(result)
    assert max(below - above, after - before) == 20
    assert result.max() == 255
    y, x = mass_of(result) if by_mass else ((above + below - 1) / 2, (before + after - 1) / 2)
    assert abs(y - 13.5) <= 1
    assert abs(x - 13.5) <= 1


def test_where_the_digit_stands_does_not_matter() -> None:
    first = ink_of(page())
    moved = np.roll(page(), (30, 80), axis=(0, 1))
    assert np.array_equal(ink_of(moved), first)


def test_centred_by_the_bounding_box() -> None:
    top, bottom, left, right = box_of(ink_of(page(), InputStyle(ink_box=20)))
    assert (top, bottom) == (4, 24)
    assert abs((left + right) / 2 - 14) <= 0.5


def test_a_box_of_the_whole_image() -> None:
    assert box_of(ink_of(page(), InputStyle(ink_box=28)))[:2] == (0, 28)
    assert box_of(ink_of(page(), InputStyle(ink_box=8), side=8))[:2] == (0, 8)


@pytest.mark.parametrize("value", [0, 5, 127, 128, 200, 255])
@pytest.mark.parametrize("size", [(28, 28), (150, 200), (1, 1), (3, 90)])
def test_an_empty_page_is_all_zeros(value: int, size: tuple[int, int]) -> None:
    result = ink_of(np.full(size, value, np.uint8))
    if size == (28, 28) and value < 64:
        assert result.min() == result.max() == value  # black border already: left as it is
    else:
        assert (result.shape, result.max()) == ((28, 28), 0)


def test_the_grain_of_paper_is_an_empty_page_and_no_part_of_a_digit() -> None:
    grain = np.random.default_rng(0).integers(-6, 7, (150, 200))
    assert ink_of((235 + grain).astype(np.uint8)).max() == 0
    clean = ink_of(np.where(page() == 0, 20, 235).astype(np.uint8))
    grainy = ink_of((np.where(page() == 0, 20, 235) + grain).astype(np.uint8))
    assert box_of(grainy) == box_of(clean)
    assert np.abs(grainy.astype(int) - clean).mean() < 4


def test_a_picture_with_size_and_black_border_is_left_as_it_is() -> None:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[3:20, 2:9] = np.random.default_rng(0).integers(0, 256, (17, 7))
    image = Image.fromarray(pixels)
    assert fit_ink(image, 28, 28, MNIST_STYLE) is image


def test_a_28x28_picture_of_ink_on_paper_is_turned() -> None:
    pixels = np.full((28, 28), 255, np.uint8)
    pixels[4:24, 12:15] = 0
    result = ink_of(pixels)
    assert result[0].max() == 0
    assert box_of(result)[1] - box_of(result)[0] == 20


# the preprocess that travels with a model


@quick
@given(
    stn.arrays(np.uint8, st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 5)))
)
def test_measure_is_mean_and_std_of_the_pixels(array: np.ndarray) -> None:
    measured = Preprocess.measure(torch.from_numpy(array), MNIST_STYLE)
    pixels = torch.from_numpy(array).double() / 255
    assert (measured.channels, measured.height, measured.width) == array.shape[1:]
    assert measured.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-9)
    std = pixels.std(dim=(0, 2, 3), unbiased=False).clamp(min=1e-3)
    assert measured.std == pytest.approx(std.tolist(), abs=1e-6)
    assert measured.style == MNIST_STYLE


def test_normalise_makes_mean_0_and_std_1() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 6, 7), dtype=np.uint8))
    preprocess = Preprocess.measure(images, InputStyle())
    x = preprocess.normaliser()(images)
    assert (x.dtype, x.shape) == (torch.float32, images.shape)
    assert torch.allclose(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std(dim=(0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5)


def test_normalise_is_the_formula_and_has_no_state() -> None:
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 1.0)
    normalise = Normalize(mean, std)
    pixels = torch.arange(24, dtype=torch.uint8).mul(10).view(1, 3, 2, 4)
    expected = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(normalise(pixels).double(), expected, atol=1e-6)
    assert normalise.state_dict() == {}
    assert list(normalise.parameters()) == []
    assert normalise.double()(pixels).dtype == torch.float64


def test_a_constant_channel_is_normalised_without_infinity() -> None:
    images = torch.full((2, 1, 3, 3), 255, dtype=torch.uint8)
    preprocess = Preprocess.measure(images, InputStyle())
    assert preprocess.std == (1e-3,)
    assert preprocess.normaliser()(images).abs().max() < 1e-3


@quick
@given(
    st.sampled_from([1, 3]),
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(0, 1),
    st.floats(1e-3, 1),
    st.integers(0, 64),
    st.booleans(),
)
def test_json_round_trip(c: int, h: int, w: int, mean: float, std: float, box: int, by_mass: bool) -> None:
    preprocess = Preprocess(c, h, w, (mean,) * c, (std,) * c, InputStyle(min(box, h, w), by_mass))
    assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


@pytest.mark.parametrize(
    "change",
    [
        {"mean": 3},
        {"mean": [0.1] * 2},
        {"width": 0},
        {"style": None},
        {"channels": "x"},
        {"std": ["a"]},
        {"height": None},
    ],
)
def test_json_of_something_else(change: dict[str, Any]) -> None:
    values = Preprocess(1, 2, 3, (0.5,), (0.5,), MNIST_STYLE).to_json()
    with pytest.raises((KeyError, TypeError, ValueError)):
        Preprocess.from_json({**values, **change})
    for key in values:
        with pytest.raises(KeyError, match=key):
            Preprocess.from_json({k: v for k, v in values.items() if k != key})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", [InputStyle(), MNIST_STYLE])
def test_adapt_takes_any_mode_and_size(mode: str, style: InputStyle) -> None:
    channels = 1 if style.ink_box else 3
    preprocess = Preprocess(channels, 28, 28, (0.5,) * channels, (0.5,) * channels, style)
    for size in ((28, 28), (7, 50)):
        image = Image.new(mode, size)
        if mode in ("P", "PA"):
            image.putpalette([255, 0, 0])
        pixels = preprocess.adapt(image)
        assert (pixels.dtype, pixels.shape) == (np.uint8, (channels, 28, 28))


def test_adapt_looks_for_ink_unless_raw() -> None:
    preprocess = Preprocess(1, 28, 28, (0.5,), (0.5,), MNIST_STYLE)
    image = Image.fromarray(page(size=(150, 150))).convert("RGB")
    adapted, raw = preprocess.adapt(image), preprocess.adapt(image, adapt=False)
    assert adapted[0, 0, 0] == 0
    assert raw[0, 0, 0] == 255  # the paper stays white
    assert np.array_equal(adapted[0], ink_of(page(size=(150, 150))))


def test_a_training_image_is_adapted_to_itself() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 9, 9), dtype=np.uint8)
    preprocess = Preprocess(3, 9, 9, (0.5,) * 3, (0.5,) * 3, InputStyle())
    assert np.array_equal(preprocess.adapt(array_to_image(array)), array)


def test_a_bad_image_is_a_convlens_error() -> None:
    assert issubclass(InvalidImageError, ConvlensError)


@pytest.mark.parametrize("digit", [1, 4, 8])
def test_uneven_light_and_a_small_digit_on_a_whole_sheet_are_seen(digit: int) -> None:
    """A lamp from the side halves the brightness; the ink covers a thousandth of the page."""
    page = Image.new("L", (1200, 1600), 235)
    ImageDraw.Draw(page).text((300, 400), str(digit), fill=40, font_size=90, stroke_width=3, stroke_fill=40)
    light = np.linspace(1.0, 0.5, 1200, dtype=np.float32)[None, :]
    noise = np.random.default_rng(0).normal(0, 4, (1600, 1200))
    photo = Image.fromarray((np.asarray(page) * light + noise).clip(0, 255).astype(np.uint8))
    seen = np.asarray(fit_ink(photo, 28, 28, InputStyle(ink_box=20, centre_by_mass=True)))
    rows, columns = np.flatnonzero(seen.max(axis=1) > 60), np.flatnonzero(seen.max(axis=0) > 60)
    assert rows[-1] - rows[0] + 1 in (19, 20)
    assert columns[-1] - columns[0] + 1 <= 20
    assert seen[:3].max() == 0
