"""For the lessons in ``docs/lessons``: answers are checked, lesson 5's pictures drawn, and a terminal is there."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Any

from convlens.errors import UnknownNameError
from convlens.lessons.exercises import EXERCISES, Exercise


def find(number: str) -> Exercise:
    """Return an exercise by its number; UnknownNameError if there is none."""
    if number not in EXERCISES:
        raise UnknownNameError("exercise", number, EXERCISES)
    return EXERCISES[number]


def check(number: str, answer: Any) -> bool:
    """Say whether ``answer`` solves exercise ``number`` ("1.2": lesson 1, exercise 2), and why, or what to look at.

    ``...``, the placeholder of the lessons, is not an answer. Raises UnknownNameError for an exercise
    that there is not.
    """
    exercise = find(number)
    if answer is ...:
        print(f"{number}: no answer yet. {exercise.hint}")
        return False
    try:
        verdict = exercise.is_right(answer)
    except Exception:  # an answer of a kind that nobody thought of is a wrong one
        verdict = False
    hint = verdict if isinstance(verdict, str) else exercise.hint
    print(f"{number}: right. {exercise.right}" if verdict is True else f"{number}: not yet. {hint}")
    return verdict is True


def show_solution(number: str) -> Any:
    """Return an answer that solves exercise ``number``."""
    return find(number).solution


def terminal(command: str) -> None:
    """Do what a terminal would do with a command of convlens, and print what it says.

    Raises subprocess.CalledProcessError if it fails.
    """
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    done.check_returncode()
