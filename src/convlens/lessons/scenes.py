"""Draw the images of lesson 5."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "sky": (140, 180, 225),
    "grass": (110, 150, 80),
    "water": (60, 110, 150),
    "wall": (215, 195, 165),
    "roof": (165, 80, 60),
    "leaf": (70, 120, 60),
    "wood": (110, 80, 55),
    "sail": (225, 220, 205),
}


def draw_scene(kind: str, rng: np.random.Generator, ground: str = "") -> Image.Image:
    """Draw a slightly rotated, noisy landscape with one object, 90 to 199 pixels a side.

    Args:
        kind: "boat", "house" or "tree".
        rng: Source of randomness.
        ground: "water" or "grass". By default boats are on water, and so are 30% of the houses and trees.
    """

    def tint(name: str) -> tuple[int, ...]:  # random brightness and tint, as in photos
        off = np.array(COLORS[name]) + rng.normal(0, 45) + rng.normal(0, 30, 3)
        return tuple(off.clip(0, 255).astype(int).tolist())

    image = Image.new("RGB", (200, 200), tint("sky"))
    pen = ImageDraw.Draw(image)
    usual = "water" if kind == "boat" or rng.random() < 0.3 else "grass"
    pen.rectangle((0, int(rng.integers(105, 150)), 200, 200), fill=tint(ground or usual))
    for bush in zip(rng.integers(0, 200, 5), rng.integers(90, 190, 5), rng.integers(5, 28, 5), strict=True):
        x, y, r = map(int, bush)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=tint(rng.choice(["leaf", "wall"])))
    x, y, s = int(rng.integers(60, 140)), int(rng.integers(65, 130)), int(rng.integers(28, 58))
    if kind == "boat":
        hull = [(x - 1.2 * s, y + s / 2), (x + 1.2 * s, y + s / 2), (x + 0.7 * s, y + s), (x - 0.7 * s, y + s)]
        pen.polygon(hull, fill=tint("wood"))
        pen.polygon([(x, y - s), (x, y + 0.4 * s), (x + s, y + 0.4 * s)], fill=tint("sail"))
    elif kind == "house":
        pen.rectangle((x - s, y, x + s, y + s), fill=tint("wall"))
        pen.polygon([(x - 1.2 * s, y), (x, y - s), (x + 1.2 * s, y)], fill=tint("roof"))
    else:
        pen.rectangle((x - s / 5, y, x + s / 5, y + s), fill=tint("wood"))
        pen.ellipse((x - 0.8 * s, y - s, x + 0.8 * s, y + s / 3), fill=tint("leaf"))
    image = image.rotate(int(rng.integers(-12, 13)), Image.Resampling.BICUBIC).crop((20, 20, 180, 180))
    width, height = rng.integers(90, 200, 2).tolist()
    grainy = np.asarray(image.resize((width, height))) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(grainy.clip(0, 255).astype(np.uint8))
