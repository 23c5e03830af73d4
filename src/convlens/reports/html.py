"""The HTML frame, cards and figures that all reports share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path

from convlens.system.files import write_text


def write_page(file: Path, title: str, body: str, *, narrow: bool = False) -> None:
    """Write a self-contained HTML page.

    Args:
        file: The file to write.
        title: The title, as text.
        body: The content below the title, as HTML.
        narrow: Whether to limit the width of the page.
    """
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


def make_cards(metrics: Iterable[tuple[str, str, str]]) -> str:
    """Return cards as HTML, each with a name, a value and a note."""
    return "".join(
        f"<div>{label}<b>{value}</b><span class=quiet>{escape(note)}</span></div>" for label, value, note in metrics
    )


def make_figures(drawn: Mapping[str, str], captions: Mapping[str, str]) -> str:
    """Return figures with captions as HTML.

    Args:
        drawn: File name -> figure as HTML.
        captions: File name -> caption, in the order of the page; files that were not drawn are left out.
    """
    return "".join(
        f"<section>{drawn[file]}<p class=quiet>{escape(caption)}</p></section>"
        for file, caption in captions.items()
        if file in drawn
    )
