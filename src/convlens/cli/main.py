"""The ``convlens`` command: thin verbs that parse, call one function and print.

Nothing heavy is imported here: each verb imports what it needs, so that ``convlens --help`` answers at once.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import time
from typing import NoReturn

import typer

from convlens.cli import train, sweep, lr_find, evaluate, mistakes, compare, predict  # noqa: F401  # isort: skip - in the order of --help
from convlens.cli import explain, timelapse, watch, export, verify, serve, models, recipes, data  # noqa: F401  # isort: skip

from convlens.cli.app import ParseError, app
from convlens.cli.signals import exit_on_sigint
from convlens.errors import ConvlensError, DivergenceError, TrainingInterruptedError, WorkerLostError
from convlens.system.hardware import OWN_LAUNCHER

PEER_GRACE_SECONDS = 2.0  # seconds that the process which has failed has to leave first, with its own exit code

SHARED = (DivergenceError, TrainingInterruptedError, WorkerLostError)  # what ends all processes of a training alike


def exit_with_error(error: BaseException, message: str, code: int, *, debug: bool) -> NoReturn:
    """Print one line on standard error and leave with ``code``; with ``debug`` the traceback too."""
    if debug:
        import traceback

        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        print(f"convlens: {message}", file=sys.stderr)
    raise SystemExit(code)


def run() -> None:
    """Be the program ``convlens``: do what main() does, and leave without taking PyTorch apart, which takes 0.3 s."""
    try:
        main()
    except SystemExit as ended:
        if "RANK" in os.environ:  # torch.distributed says goodbye to the others
            raise
        atexit._run_exitfuncs()
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # main() has said so, if somebody can hear it
                code = code or 1
        os._exit(code)


def main() -> None:
    """Run the command; every error becomes one line and its exit code. ``--debug`` may stand anywhere."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed: what is said goes nowhere, and not to the other one
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
    # file names may hold what a terminal cannot show, or what is no text
    for stream, errors in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    exit_on_sigint()
    try:
        code = app(arguments, standalone_mode=False)
        if code == 130:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()
        raise SystemExit(code if isinstance(code, int) else 0)
    except ConvlensError as error:
        if isinstance(error, WorkerLostError):
            time.sleep(PEER_GRACE_SECONDS)
        first, told = os.environ.get("RANK", "0") == "0", OWN_LAUNCHER in os.environ
        if isinstance(error, SHARED) and (
            not first or (told and isinstance(error, WorkerLostError))
        ):  # another says it
            raise SystemExit(error.exit_code) from None
        exit_with_error(error, str(error), error.exit_code, debug=debug)
    except ParseError as error:
        if not error.format_message():  # no verb at all: the help has been shown
            raise SystemExit(2) from None
        exit_with_error(error, error.format_message(), 2, debug=debug)
    except (KeyboardInterrupt, typer.Abort) as error:
        exit_with_error(error, "interrupted", 130, debug=debug)
    except BrokenPipeError:  # whoever reads the output, such as `head`, has enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None  # as click does
    except (OSError, MemoryError) as error:
        exit_with_error(error, str(error) or "out of memory", 1, debug=debug)
    except Exception as error:
        what = str(error).split("\n", 1)[0]
        exit_with_error(error, f"unexpected {type(error).__name__}: {what} (--debug shows where)", 1, debug=debug)
