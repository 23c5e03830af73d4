"""Read and fill the page templates in ``static/``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources


def render(name: str, parts: Mapping[str, str]) -> str:
    """Return a page with its [PARTS] filled in, in one pass: no part's content is taken for a place to fill."""
    return re.sub(r"\[([A-Z]{3,})\]", lambda found: parts[found[1]], read_static(name))


def read_static(name: str) -> str:
    """Return a file of the page."""
    return resources.files("convlens.web").joinpath("static", name).read_text(encoding="utf-8")
