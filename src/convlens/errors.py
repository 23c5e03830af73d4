"""What can go wrong, said in one line for a person, with the exit code that goes with it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from convlens.system.text import LONGEST


class ConvlensError(Exception):
    """A failure that a person can act on: what happened, to which file or flag, what to do. Exit code 1.

    It is one line of what can be shown, whatever a library's own message or a file's name brings along. All that
    convlens raises on purpose is one of these.
    """

    exit_code = 1

    def __init__(self, message: str):
        line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], message)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")


class UsageError(ConvlensError):
    """The command or call itself was wrong: an unknown name, flag or value. Exit code 2."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that is not registered; the message offers the nearest one. Exit code 2.

    >>> str(UnknownNameError("model", "smal", ["small", "tiny"]))
    "unknown model 'smal'; did you mean 'small'?"
    """

    def __init__(self, kind: str, name: str, choices: Iterable[str]):
        choices = sorted(choices)
        near = get_close_matches(name, choices, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(choices)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class DivergenceError(ConvlensError):
    """Training came to a loss, a gradient or a statistic that is not a number. Exit code 3."""

    exit_code = 3


class TrainingInterruptedError(ConvlensError):
    """Ctrl-C: the training was saved and stopped. Exit code 130, as shells expect."""

    exit_code = 130


class WorkerLostError(ConvlensError):
    """Another process of the same training has died, and has said why. Exit code 75: try again (sysexits)."""

    exit_code = 75
