"""The exercises of the lessons in ``docs/lessons``: what is asked, and whether an answer is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convlens.errors import UnknownName


@dataclass(frozen=True)
class Exercise:
    """One exercise: the test of an answer, what is said to a right one and to another, and an answer that is right."""

    is_right: Callable[[Any], bool]
    right: str  # why it is so
    hint: str  # what to look at, without giving the answer away
    solution: Any


EXERCISES: dict[str, Exercise] = {}  # "lesson.number" -> the exercise


def check(number: str, answer: Any) -> bool:
    """Say whether ``answer`` solves exercise ``number`` ("1.2": lesson 1, exercise 2), and why, or what to look at.

    ``...``, which stands in the lessons where an answer belongs, is no answer yet. Raises UnknownName for an exercise
    that there is not.
    """
    if number not in EXERCISES:
        raise UnknownName("exercise", number, EXERCISES)
    exercise = EXERCISES[number]
    if answer is ...:
        print(f"{number}: no answer yet. {exercise.hint}")
        return False
    try:
        right = bool(exercise.is_right(answer))
    except Exception:  # an answer of a kind that nobody thought of is a wrong one
        right = False
    print(f"{number}: right. {exercise.right}" if right else f"{number}: not yet. {exercise.hint}")
    return right


def show_solution(number: str) -> Any:
    """Return an answer that solves exercise ``number``."""
    if number not in EXERCISES:
        raise UnknownName("exercise", number, EXERCISES)
    return EXERCISES[number].solution
