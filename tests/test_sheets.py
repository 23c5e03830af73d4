"""Image grids: every image at its position, as PNG and as HTML."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convlens.reports.image_grid import WIDTH, ImageGrid, kernel_grid, prediction_grid
from convlens.reports.plots import draw_confusion

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (4, 4), np.uint8), RNG.integers(0, 256, (4, 4, 3), np.uint8)] * 3


def find_pictures(sheet: Image.Image, columns: int, top: int) -> list[Image.Image]:
    """Return the images of the first row of a grid, ``top`` pixels below its edge."""
    cell = WIDTH // columns
    return [sheet.crop((n * cell + 6, top, n * cell + cell - 6, top + cell - 12)) for n in range(columns)]


@pytest.mark.parametrize("columns", [3, 4])
def test_images_are_at_their_positions(tmp_path: Path, columns: int) -> None:
    ImageGrid("Six", PICTURES, [str(n) for n in range(6)], columns).save(tmp_path / "sheet.png")
    ImageGrid("Six", PICTURES, (), columns).save(tmp_path / "bare.png")
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(tmp_path / "bare.png") as bare:
        assert sheet.width == bare.width == WIDTH and sheet.mode == "RGB"
        rows = -(-6 // columns)
        assert sheet.height - bare.height == rows * 22  # a line of captions for each row
        for number, found in enumerate(find_pictures(bare, columns, 75)):
            # large squares of one colour: their middles are the pixels of the picture
            size = (4, 4)
            middle = np.asarray(found.resize(size, Image.Resampling.NEAREST))
            expected = np.asarray(Image.fromarray(PICTURES[number]).convert("RGB"))
            assert np.array_equal(middle, expected)
        above = np.asarray(sheet)[60:82], np.asarray(bare)[60:69]  # between the heading and the pictures
        assert (above[0] < 128).any() and (above[1] == 255).all()


def test_images_keep_their_aspect_ratio(tmp_path: Path) -> None:
    ImageGrid("", [np.full((4, 8), 90, np.uint8), np.full((8, 4), 90, np.uint8)], (), columns=2).save(
        tmp_path / "sheet.png"
    )
    with Image.open(tmp_path / "sheet.png") as sheet:
        grey = np.asarray(sheet.convert("L")) == 90
    for half, (height, width) in zip(np.split(grey, 2, axis=1), [(1, 2), (2, 1)], strict=True):
        rows, columns = half.any(axis=1).sum(), half.any(axis=0).sum()
        assert rows * width == pytest.approx(columns * height, abs=2)


def test_html_has_the_same_pixels_and_escaped_captions() -> None:
    page = ImageGrid("<b>", PICTURES[:2], ["a & b\n<script>", "c"], columns=3).to_html()
    assert "<h3>&lt;b&gt;</h3>" in page and "<script>" not in page
    assert "<figcaption>a &amp; b<br>&lt;script&gt;</figcaption>" in page
    shown = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'base64,([^"]+)"', page)]
    assert all(np.array_equal(np.asarray(one), other) for one, other in zip(shown, PICTURES[:2], strict=True))
    assert page.count("class=pixelated") == 2
    large = ImageGrid("", [np.zeros((200, 400), np.uint8)], (), columns=10).to_html()
    assert "coarse" not in large
    (data,) = re.findall(r'base64,([^"]+)"', large)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (121, 61)  # as large as on the sheet


@pytest.mark.parametrize("name", ["a\rb", "a\x1cb", "\u2029", "\udc80", "\0", "$x$", "<script>", "שלום"])
def test_any_class_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    ImageGrid(name, PICTURES[:1], [name], columns=3).save(tmp_path / "sheet.png")
    assert "figcaption" in ImageGrid(name, PICTURES[:1], [name], columns=3).to_html()
    svg = draw_confusion(tmp_path / "confusion.png", [(name, name, 1), ("other", "other", 1)], [name, "other"])
    assert svg.startswith("<svg") and svg.encode() and "<script" not in svg


def test_empty_grid_has_a_heading(tmp_path: Path) -> None:
    ImageGrid("No mistake on the test split", [], [], columns=6).save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (np.asarray(sheet)[:60] < 128).any()


def test_captions_of_predictions() -> None:
    import torch

    sheet = prediction_grid(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), [("a long name of a class", 0.987, "cat")], "")
    assert sheet.captions == ["a long name o…\n99%\ntrue: cat"]


def test_number_of_kernels_is_limited() -> None:
    kernels = RNG.normal(size=(70, 3, 3, 3)).astype(np.float32)
    sheet = kernel_grid(kernels)
    assert (sheet.heading, len(sheet.images)) == ("The 70 filters of the first convolution (64 shown)", 64)
    grey = kernel_grid(np.array([[[[1.0, -1.0], [0.0, 0.5]]]], dtype=np.float32)).images[0]
    (red, blue), (white, _) = grey.astype(int)
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50 and white.min() > 240
