"""Exceptions of convlens: a message of one line for people, and an exit code for the command.

Messages name parameters and recipe fields in backticks, as ```` `patience` ```` or ```` `epochs=3` ````. The command
line shows them as flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from convlens.system.text import MAX_MESSAGE_CHARS


class ConvlensError(Exception):
    """An expected failure: its cause, the file or parameter, and the remedy. Exit code 1.

    Every exception that convlens raises on purpose derives from this class. Control characters in the message are
    escaped and long messages are shortened, because messages quote file names and other libraries.
    """

    exit_code = 1

    def __init__(self, message: str):
        line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], message)
        half = MAX_MESSAGE_CHARS // 2
        super().__init__(line if len(line) <= MAX_MESSAGE_CHARS else f"{line[:half]} ... {line[-half:]}")


class UsageError(ConvlensError):
    """The command or call was wrong: an unknown name, parameter or value. Exit code 2.

    Args:
        message: One line for people.
        field: Name of the parameter or recipe field at fault, if there is one.
    """

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None):
        super().__init__(message)
        self.field = field


class UnknownNameError(UsageError):
    """A name that is not registered; the message suggests the nearest one. Exit code 2.

    >>> str(UnknownNameError("model", "smal", ["small", "tiny"]))
    "unknown model 'smal'; did you mean 'small'?"
    """

    def __init__(self, kind: str, name: str, choices: Iterable[str], *, field: str | None = None):
        choices = sorted(choices)
        near = get_close_matches(name, choices, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(choices)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}", field=field)


class UnfinishedRunError(UsageError):
    """A run that is not finished where a finished one is needed. Exit code 2.

    Args:
        path: Folder of the run.
    """

    def __init__(self, path: object):
        super().__init__(f"{path} is not finished; resume it first")
        self.path = path


class DivergenceError(ConvlensError):
    """A loss, a gradient or a BatchNorm statistic became NaN or infinite. Exit code 3."""

    exit_code = 3


class TrainingInterruptedError(ConvlensError):
    """The training was saved and stopped on request, as by Ctrl-C. Exit code 130, as shells expect."""

    exit_code = 130


class WorkerLostError(ConvlensError):
    """Another process of the same training died, which reported the cause. Exit code 75: try again (sysexits.h)."""

    exit_code = 75
