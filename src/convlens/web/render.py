"""Render the page templates in ``static/``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources


def render(name: str, parts: Mapping[str, str]) -> str:
    """Return a template with its [PLACEHOLDERS] replaced, in one pass, so that parts may contain such text."""
    return re.sub(r"\[([A-Z]{3,})\]", lambda found: parts[found[1]], read_static(name))


def read_static(name: str) -> str:
    """Return the content of a file in ``static/``."""
    return resources.files("convlens.web").joinpath("static", name).read_text(encoding="utf-8")
