"""The ``convlens`` command and its options; each verb stands in a file beside this one."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from convlens import __version__

STARTED = time.perf_counter()  # what --budget counts from

app = typer.Typer(
    help="Train, see through and ship small convolutional image classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)

app.add_typer(data_app, name="data")

# what typer raises for a wrong command line; the class itself lies in click, or in typer's own copy of it
ParseError: Any = typer.BadParameter.__mro__[1]


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Inside the block nobody looks for garbage: PyTorch's half a million objects stay, and looking takes 0.2 s."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def show_version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        print(f"convlens {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Options of every verb."""
