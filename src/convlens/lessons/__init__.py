"""Helpers of the notebooks in ``docs/lessons``: check answers, draw the images of lesson 5, run commands."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Any

from convlens.errors import UnknownNameError
from convlens.lessons.exercises import EXERCISES, Exercise
from convlens.lessons.scenes import draw_scene

__all__ = ["check", "draw_scene", "show_solution", "terminal"]


def find(number: str) -> Exercise:
    """Return an exercise by its number; UnknownNameError if there is none."""
    if number not in EXERCISES:
        raise UnknownNameError("exercise", number, EXERCISES)
    return EXERCISES[number]


def check(number: str, answer: Any) -> bool:
    """Print whether an answer is right, with an explanation or a hint.

    Args:
        number: Lesson and exercise, such as "1.2".
        answer: The answer; ``...`` is the placeholder for no answer yet.

    Returns:
        True if the answer is right.

    Raises:
        UnknownNameError: There is no such exercise.
    """
    exercise = find(number)
    if answer is ...:
        print(f"{number}: no answer yet. {exercise.hint}")
        return False
    try:
        result = exercise.is_right(answer)
    except Exception:  # an answer of an unexpected type is wrong
        result = False
    hint = result if isinstance(result, str) else exercise.hint
    print(f"{number}: right. {exercise.right}" if result is True else f"{number}: not yet. {hint}")
    return result is True


def show_solution(number: str) -> Any:
    """Return a right answer to exercise ``number``."""
    return find(number).solution


def terminal(command: str) -> None:
    """Run a convlens command in a subprocess, and print its output.

    Raises:
        subprocess.CalledProcessError: The command fails.
    """
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    done.check_returncode()
