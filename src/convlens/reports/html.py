"""What the pages of a run, a sweep and an explanation share: frame, style, cards of figures, pictures with a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path

from convlens.system.files import write_text


def write_page(file: Path, title: str, body: str, *, narrow: bool = False) -> None:
    """Write a page that needs no network: its title, as text, above ``body``, as HTML."""
    css = resources.files("convlens.reports").joinpath("style.css").read_text(encoding="utf-8")
    name = escape(title)
    write_text(
        file,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} - convlens</title><style>{css}</style></head>
<body><main{" class=narrow" if narrow else ""}>
<h1>{name}</h1>
{body}</main></body></html>
""",
    )


def make_cards(figures: Iterable[tuple[str, str, str]]) -> str:
    """Return cards, each with what it is of, a figure, and a note."""
    return "".join(
        f"<div>{label}<b>{value}</b><span class=quiet>{escape(note)}</span></div>" for label, value, note in figures
    )


def make_pictures(drawn: Mapping[str, str], texts: Mapping[str, str]) -> str:
    """Return the pictures that were drawn, HTML by the names of their files, each above its text and in their order."""
    return "".join(
        f"<section>{drawn[file]}<p class=quiet>{escape(text)}</p></section>"
        for file, text in texts.items()
        if file in drawn
    )
