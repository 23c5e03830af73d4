"""Run the ``convlens`` command: streams, signals, errors and exit codes."""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import sys
import time
from typing import NoReturn, TextIO

import typer

from convlens.cli.app import ParseError, app, render_flags
from convlens.cli.signals import exit_on_sigint
from convlens.errors import (
    ConvlensError,
    DivergenceError,
    TrainingInterruptedError,
    UnfinishedRunError,
    WorkerLostError,
)
from convlens.system.hardware import OWN_LAUNCHER
from convlens.system.text import quoted

PEER_GRACE_SECONDS = 2.0  # lets the process that failed exit first, with its own exit code

SHARED_ERRORS = (DivergenceError, TrainingInterruptedError, WorkerLostError)  # these end all processes of a training


def run() -> None:
    """Run main() and exit without tearing PyTorch down, which would take 0.3 s.

    Distributed workers exit normally, so that ``torch.distributed`` can notify their peers.
    """
    try:
        main()
    except SystemExit as ended:
        if "RANK" in os.environ:
            raise
        atexit._run_exitfuncs()
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # main() has reported it, if anybody can read that
                code = code or 1
        os._exit(code)


def main() -> None:
    """Run the command; every error becomes one line and an exit code. ``--debug`` is allowed anywhere."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    prepare_streams()
    exit_on_sigint()
    try:
        code = app(arguments, standalone_mode=False)
        if code == 130:  # typer's translation of KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()
        raise SystemExit(code if isinstance(code, int) else 0)
    except ConvlensError as error:
        if isinstance(error, WorkerLostError):
            time.sleep(PEER_GRACE_SECONDS)
        if isinstance(error, SHARED_ERRORS) and another_reports(error):
            raise SystemExit(error.exit_code) from None
        message = render_flags(str(error), arguments)
        if isinstance(error, UnfinishedRunError):
            message += f": convlens train --resume {quoted(error.path)}"
        exit_with_error(error, message, error.exit_code, debug=debug)
    except ParseError as error:
        if not error.format_message():  # no command at all: the help was shown
            raise SystemExit(2) from None
        exit_with_error(error, error.format_message(), 2, debug=debug)
    except (KeyboardInterrupt, typer.Abort) as error:
        exit_with_error(error, "interrupted", 130, debug=debug)
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None  # as click does
    except (OSError, MemoryError) as error:
        exit_with_error(error, str(error) or "out of memory", 1, debug=debug)
    except Exception as error:
        what = str(error).split("\n", 1)[0]
        exit_with_error(error, f"unexpected {type(error).__name__}: {what} (--debug shows where)", 1, debug=debug)


def prepare_streams() -> None:
    """Make the standard streams safe for any text, and print the library's warnings on standard error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: discard the output instead of mixing the two streams
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    # file names may hold characters that the terminal cannot show, or bytes that are not text
    for stream, errors in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    handler = WarningHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("convlens: %(message)s"))
    logging.getLogger("convlens").handlers = [handler]


class WarningHandler(logging.StreamHandler[TextIO]):
    """Prints log records with flags instead of parameter names."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for a record."""
        return render_flags(super().format(record), sys.argv[1:])


def another_reports(error: ConvlensError) -> bool:
    """Return True if another process of the same training reports the error: rank 0, or our own launcher."""
    is_main = os.environ.get("RANK", "0") == "0"
    return not is_main or (OWN_LAUNCHER in os.environ and isinstance(error, WorkerLostError))


def exit_with_error(error: BaseException, message: str, code: int, *, debug: bool) -> NoReturn:
    """Print one line on standard error and exit with ``code``; with ``debug`` print the traceback too."""
    if debug:
        import traceback

        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # standard error may be closed
        print(f"convlens: {message}", file=sys.stderr)
    raise SystemExit(code)
