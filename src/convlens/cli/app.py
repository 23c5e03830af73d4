"""The ``convlens`` command and its options; each verb stands in a file beside this one."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from convlens import __version__
from convlens.errors import UsageError

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

# arguments of several verbs
DATA_HELP = "digits, mnist, fashion-mnist, cifar10, a folder of class folders, or a .npz file."
Data = Annotated[str, typer.Argument(help=DATA_HELP)]
AllowUnreadable = Annotated[bool, typer.Option("--allow-unreadable", help="Skip unreadable files, however many.")]
Exclude = Annotated[Path | None, typer.Option(help="Leave out the images that this file names.")]


def check_new_file(path: Path | None, flag: str, suffix: str) -> None:
    """Raise UsageError if ``path``, given with ``flag``, is no name for a new file of this kind, such as "png"."""
    if path is None:
        return
    if path.exists():
        raise UsageError(f"{flag} {path}: that file exists; choose another name")
    if path.suffix.lower() != f".{suffix}":
        raise UsageError(f"{flag} {path}: the name must end in .{suffix}")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.parent}; make it, or choose another place")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside the block nobody looks for garbage: PyTorch's half a million objects stay, and looking takes 0.2 s."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave_with(message: str) -> Callable[..., NoReturn]:
    """Return what to do at Ctrl-C while nothing is at stake, such as an import that must not be cut in two: leave."""

    def leave(*_: object) -> NoReturn:
        print(f"convlens: {message}", file=sys.stderr, flush=True)
        os._exit(130)

    return leave


def leave_on_interrupt() -> None:
    """Let Ctrl-C end all at once, as long as nothing is at stake."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, leave_with("interrupted"))


def heed_interrupts() -> None:
    """Let Ctrl-C end in KeyboardInterrupt from here on: PyTorch is imported, and what is half done is cleared away."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def asked_to_stop(*, alone: bool = True, told: bool = True) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed, or a polite kill came; a second time stops at once.

    Not so with ``alone=False``: torchrun asks each of its processes again. ``told`` says that it was heard.
    """
    asked = False

    def stop(*_: Any) -> None:
        nonlocal asked
        if asked and alone:
            raise KeyboardInterrupt
        if not asked and told:
            print("stopping after this step ...", file=sys.stderr)
        asked = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
