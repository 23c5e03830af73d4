"""The exercises of the lessons in ``docs/lessons``: what is asked, and whether an answer is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from convlens.errors import UnknownName


@dataclass(frozen=True)
class Exercise:
    """One exercise: the test of an answer, what is said to a right one and to another, and an answer that is right."""

    is_right: Callable[[Any], bool]
    right: str  # why it is so
    hint: str  # what to look at, without giving the answer away
    solution: Any


def near(*expected: float, within: float = 1e-6) -> Callable[[Any], bool]:
    """Return the test whether an answer is this number, or these in this order."""

    def is_right(answer: Any) -> bool:
        given = [float(value) for value in answer] if len(expected) > 1 else [float(answer)]
        return len(given) == len(expected) and all(
            abs(a - b) <= within for a, b in zip(given, expected, strict=True)
        )  # fmt: skip

    return is_right


def chosen(letters: str) -> Callable[[Any], bool]:
    """Return the test whether an answer names these letters and no others, as a set, a list or a word."""
    return lambda answer: set(answer) == set(letters)


def asks_for(query: dict[str, list[str]]) -> Callable[[Any], bool]:
    """Return the test whether an answer is an address of /predict with this query, in any order."""

    def is_right(answer: Any) -> bool:
        address = urlsplit(answer)
        return address.path == "/predict" and parse_qs(address.query) == query

    return is_right


def turns_paper_to_ink(answer: Any) -> bool:
    """Say whether a function of uint8 images makes white black and black white, and anything between likewise."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    return bool((np.asarray(answer(levels)).astype(int) == 255 - levels.astype(int)).all())


EXERCISES: dict[str, Exercise] = {  # "lesson.number" -> the exercise
    # 5: your own folder
    "5.1": Exercise(
        near(36 / 84, within=0.005),
        '36 of the 84 test pictures are boats: always saying "boat" is right 43% of the time, and a net that is '
        "right less often than that is worth nothing.",
        "Which class has the most test pictures, and what share of all of them is that? Say 0.5, not 50.",
        36 / 84,
    ),
    "5.2": Exercise(
        near(0.25, within=0.005),
        "480 x 480 of 640 x 480 pixels are left, three quarters. What matters should be in the middle.",
        "A square that is as high as the photo: how many of the 640 columns does it have?",
        0.25,
    ),
    "5.3": Exercise(
        near(48 / 54, within=0.005),
        "48 of 54, so 89% and not 90%. With more leaks it would be far more; most of the time nobody counts them.",
        "Leave the six out of both numbers: how many new pictures are there, and how many of them has it right?",
        48 / 54,
    ),
    "5.4": Exercise(
        lambda answer: tuple(answer) == (3, "train"),
        "The test picture stays, since what is tested must not depend on what is trained, and none of its copies may "
        "be trained on.",
        "One of the four stays. Which must it be, so that nothing is trained on that is tested, and no test picture is "
        "listed?",
        (3, "train"),
    ),
    "5.5": Exercise(
        chosen("BD"),
        '"Turn left" in a mirror says "turn right", and b in a mirror is d: the net would be taught what is wrong.',
        "Hold each thing before a mirror: does its name change?",
        {"B", "D"},
    ),
    # 6: trust
    "6.1": Exercise(
        near(4500, within=350),
        "Between 4,100 and 4,850, depending on the rounding: to halve the width takes four times the pictures.",
        "The interval of 359 pictures reaches almost 2 points to either side. It shrinks with the root of the number "
        "of pictures; or try numbers in wilson_interval(round(0.97 * n), n).",
        4472,
    ),
    "6.2": Exercise(
        near(6),
        "Six coins in a row that all show the same side: 2 * (1/2)**6 = 3.1%. Five are not enough: 6.3%.",
        "If both nets were equally good, each such picture were a coin. How probable are n heads in a row, or n tails? "
        "Paired(359, 0, n).p_value knows it too.",
        6,
    ),
    "6.3": Exercise(
        near(0.982, within=0.002),
        "The logits become 4 and 0, and 1 / (1 + exp(-4)) = 98.2%: a temperature below 1 makes a net surer. The order "
        "of the classes stays, and so does the accuracy.",
        "Divide both logits by 0.5 first. Then exp of the first, by the sum of exp of both.",
        0.982,
    ),
    "6.4": Exercise(
        near(0.61, within=0.001),
        "8 of the 9 are at least 0.61: of the 10 places that a new picture could take among them, 8 lie above the "
        "bound, which is 80%.",
        "Sort them, the largest first. (9 + 1) * 0.8 = 8: which is the eighth?",
        0.61,
    ),
    "6.5": Exercise(
        near(490 / 670, within=0.005),
        "490 of the 670 warnings are about real digits. What is rare is seldom what a warning is about, however good "
        "the test: doctors know this too.",
        "Count the warnings of both kinds: 5% of 9,800 digits, and 90% of 200 others. What share of their sum is the "
        "first?",
        490 / 670,
    ),
    # 7: shipping
    "7.1": Exercise(
        near(94_698 * 4),
        "378,792 bytes. What the file has beyond that is the graph itself, the bounds of the unknown, and the names.",
        "32 bits are how many bytes? And how many numbers are there?",
        94_698 * 4,
    ),
    "7.2": Exercise(
        turns_paper_to_ink,
        "White becomes black and black white, and the file reads a 7. It may still call it unknown, for the paper is "
        "not quite white, and the digit does not lie as MNIST's do: `convlens predict` sees to both.",
        "A function of an array of 0..255 in which 255 becomes 0, 0 becomes 255, and 100 becomes 155: "
        "answer = lambda image: ...",
        lambda image: 255 - image,
    ),
    "7.3": Exercise(
        near(3),
        '7 lost and 3 gained make 10 that differ and 4 fewer that are right. "99.9% alike" and "0.04 points worse" '
        "are both true.",
        "Of the 10 that differ, some were lost and some gained; lost less gained is 4. What is the most that can have "
        "been gained?",
        3,
    ),
    "7.4": Exercise(
        asks_for({"top": ["3"], "coverage": ["0.99"]}),
        "What stands behind the question mark are pairs of name and value, with & between them.",
        'It begins as the one above: address + "/predict?top=...". Two pairs, with & between them.',
        "http://127.0.0.1:8000/predict?top=3&coverage=0.99",
    ),
    "7.5": Exercise(
        chosen("ACE"),
        "A and C say what was measured, on what, and what would vary; E says where nobody looked. B promises it for "
        "every picture in the world, and D takes a help for a proof.",
        "For each sentence: is it what was measured, or what one would like to be true?",
        {"A", "C", "E"},
    ),
}


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
