"""The exercises of the notebooks in ``docs/lessons``, with checks, explanations and hints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson."""

    is_right: Callable[[Any], bool | str]  # a string explains what is wrong with this answer
    right: str  # explanation of the right answer
    hint: str  # does not give the answer away
    solution: Any  # a right answer


def near(*expected: float, within: float = 1e-6) -> Callable[[Any], bool]:
    """Return a check that an answer is this number, or these numbers in this order.

    A single number may be repeated, as in the shape of a square: (13, 13) counts as 13.
    """

    def is_right(answer: Any) -> bool:
        several = np.iterable(answer) and not isinstance(answer, str)
        given = [float(value) for value in answer] if several else [float(answer)]
        wanted = expected * len(given) if len(expected) == 1 else expected
        return 0 < len(given) == len(wanted) and all(abs(a - b) <= within for a, b in zip(given, wanted, strict=True))

    return is_right


def fraction(expected: float, within: float) -> Callable[[Any], bool]:
    """Return a check that an answer is this fraction, given as 0..1 or in percent (73, "73%")."""

    def is_right(answer: Any) -> bool:
        per_cent = isinstance(answer, str) and answer.strip().endswith("%")
        given = float(answer.strip(" %")) if isinstance(answer, str) else float(answer)
        return near(expected, within=within)(given / 100 if per_cent or given > 1 else given)

    return is_right


def finds_horizontal_edges(kernel: Any) -> bool | str:
    """Return True if a 3 x 3 kernel detects horizontal edges, and neither vertical edges nor uniform images.

    Otherwise return what is wrong with it.
    """
    rows = [[float(value) for value in row] for row in kernel]
    if [len(row) for row in rows] != [3, 3, 3]:
        return "It must be three rows of three numbers: [[..., ..., ...], [..., ..., ...], [..., ..., ...]]."

    def response(image: list[list[int]]) -> float:
        return abs(sum(a * b for row, line in zip(rows, image, strict=True) for a, b in zip(row, line, strict=True)))

    lying = max(response([[int(row >= edge)] * 3 for row in range(3)]) for edge in (1, 2))
    standing = max(response([[int(column >= edge) for column in range(3)]] * 3) for edge in (1, 2))
    even = response([[1] * 3] * 3)
    if lying == 0:
        return "It says nothing where bright lies above dark. Which rows should count against each other?"
    if even > 0.1 * lying:
        return f"Where all is even it should say nothing, but where every pixel is 1 it says {even:g}, for or against."
    if standing > 0.1 * lying:
        return f"A lying edge makes it say {lying:g}, but a standing one {standing:g}: that should be about 0."
    return True


def softmax_is(*probabilities: float) -> Callable[[Any], bool]:
    """Return a check that the softmax of an answer is ``probabilities``, within 0.01."""

    def is_right(answer: Any) -> bool:
        powers = [math.exp(float(logit)) for logit in answer]
        return near(*probabilities, within=0.01)([power / sum(powers) for power in powers])

    return is_right


def chosen(letters: str) -> Callable[[Any], bool]:
    """Return a check that an answer has these letters and no others, as a set, a list or a word."""
    return lambda answer: set(answer) == set(letters)


def asks_for(query: dict[str, list[str]]) -> Callable[[Any], bool]:
    """Return a check that an answer is a URL of /predict with this query, in any order."""

    def is_right(answer: Any) -> bool:
        address = urlsplit(answer)
        return address.path == "/predict" and parse_qs(address.query) == query

    return is_right


def turns_paper_to_ink(answer: Any) -> bool:
    """Return True if a function inverts uint8 images."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    return bool((np.asarray(answer(levels)).astype(int) == 255 - levels.astype(int)).all())


EXERCISES: dict[str, Exercise] = {  # "lesson.number" -> the exercise
    # 1: what a convolution is
    "1.1": Exercise(
        near(-18),
        "The lowest row of the patch adds up to 9 + 0 + 0, its uppermost to 9 + 9 + 9: it gets darker downwards.",
        "Take the last three columns of those three rows, add up the lowest row, and subtract the uppermost.",
        -18,
    ),
    "1.2": Exercise(
        finds_horizontal_edges,
        "It compares the pixels above with those below, and adds up to 0, so that it is 0 on a uniform area.",
        "Give three rows of three numbers, like the kernels above. What should it compare with what?",
        [[-1, -2, -1], [0, 0, 0], [1, 2, 1]],
    ),
    "1.3": Exercise(
        near(13),
        "(28 + 2 - 5) / 2 is 12.5; rounded down and one more is 13.",
        "Padding is added on both sides, and the quotient by the stride is rounded down before the 1 is added.",
        13,
    ),
    "1.4": Exercise(
        near(8, 2),
        "The maximum keeps the 8; the mean is 8 / 4 = 2.",
        "Give two numbers in round brackets: the largest of the four, then their sum divided by four.",
        (8, 2),
    ),
    "1.5": Exercise(
        near(8),
        "1 pixel; 2 more for the first kernel: 3; the pool's window adds 1: 4; the second kernel adds 2 steps of 2 "
        "pixels: 8.",
        "Begin with 1 pixel and go through the layers. After the pooling a step is two pixels wide.",
        8,
    ),
    # 2: a first model, on clothes
    "2.1": Exercise(
        near(25),
        "An epoch has 60,000 / 250 = 240 batches, and 6,000 / 240 = 25.",
        "How many batches are there until every one of the 60,000 images was shown once?",
        25,
    ),
    "2.2": Exercise(
        near(12832),
        "Each of the 32 kernels reaches through all 16 maps, 5 x 5 x 16 = 400 weights, and has one bias: 32 x 401.",
        "A kernel of the second layer is as deep as the first layer has maps; and each kernel has one bias.",
        12832,
    ),
    "2.3": Exercise(
        softmax_is(0.5, 0.25, 0.25),
        "One logit larger by ln 2 = 0.69 is twice the probability. Adding a number to all three changes nothing.",
        "Give three numbers. The first must be larger than the others by so much that e to the power of it is twice as "
        "large.",
        (math.log(2), 0.0, 0.0),
    ),
    "2.4": Exercise(
        near(math.log(10), within=0.01),
        "It gives the right class a probability of 1/10, and -ln(1/10) = ln 10 = 2.30. A training that stays there has "
        "learned nothing.",
        "Which probability does it give to the right class, one of ten? The loss is minus the natural logarithm of it.",
        math.log(10),
    ),
    # 3: a deep model for digits
    "3.1": Exercise(
        near(469),
        "60,000 / 128 is 468.75: 468 whole batches, and a last one with the 96 images that are left.",
        "Divide; and the images that are left over make a batch too.",
        469,
    ),
    "3.2": Exercise(
        near(256),
        "28, 24, 20, pooled 10, 6, 2, pooled 1: one number in each of the 256 maps.",
        "Each convolution of 5 x 5 without padding takes 4 pixels off the side, each pooling halves it. There are two "
        "convolutions, a pooling, and the same again; then multiply the pixels of a map by the number of maps.",
        256,
    ),
    "3.3": Exercise(
        lambda answer: str(answer).strip().lower() == "b",
        "The training images were cropped and turned, and counted while the model was still worse; the test images are "
        "as they are, and asked at the end of the epoch.",
        'Answer with a letter in quotes, such as "a". Think of which images each accuracy is counted on, and when.',
        "b",
    ),
    "3.4": Exercise(
        near(0.1),
        "0.01 / (1 - 0.9): momentum 0.9 makes steps in a steady direction ten times as long.",
        "In the long run the velocity v stays the same: v = 0.9 v + 1. Solve that for v, and multiply by the rate.",
        0.1,
    ),
    # 4: colour photos, and why it learns
    "4.1": Exercise(
        fraction(0.956, within=0.01),
        "51,328 + 10,836 + 850 = 63,014 of 65,886: convolutions use the same few weights everywhere, so they need few.",
        "A linear layer has inputs x outputs weights and as many biases as outputs. Add the three up and divide by the "
        "sum of all layers; the answer is between 0 and 1.",
        63014 / 65886,
    ),
    "4.2": Exercise(
        fraction(0.1, within=0.005),
        "All ten become 0, equal, so each class gets 1/10. Without the ReLU the cat would have 45%: that is lost.",
        "What does max(0, x) make of negative numbers? Then take the softmax of ten equal numbers.",
        0.1,
    ),
    "4.3": Exercise(
        fraction(0.8, within=0.005),
        "Each tenth of the images belongs to one class; those of the two dead ones are lost, however good the rest is.",
        "Which fraction of the images belongs to the other eight classes, if all have as many?",
        0.8,
    ),
    "4.4": Exercise(
        near(4),
        "The noise of a mean falls with the root of the number: the root of 128 / 8 = 16 is 4.",
        "The noise falls with the square root of the batch size, not with the batch size itself.",
        4,
    ),
    "4.5": Exercise(
        near(1),
        "w becomes (1 - 2 lr) w. With 1 it jumps between 4 and -4 for ever; above 1, it grows.",
        "Write the step as w times something. Of what size must that something be so that w gets no smaller?",
        1,
    ),
    # 5: your own folder
    "5.1": Exercise(
        fraction(36 / 84, within=0.005),
        '36 of the 84 test images are boats: always saying "boat" is right 43% of the time, and a model that is '
        "right less often than that is worth nothing.",
        "Which class has the most test images, and what fraction of all of them is that?",
        36 / 84,
    ),
    "5.2": Exercise(
        fraction(0.25, within=0.005),
        "480 x 480 of 640 x 480 pixels are left, three quarters. What matters should be in the middle.",
        "A square that is as high as the photo: how many of the 640 columns does it have?",
        0.25,
    ),
    "5.3": Exercise(
        fraction(48 / 54, within=0.005),
        "48 of 54, so 89% and not 90%. With more leaks it would be far more; most of the time nobody counts them.",
        "Leave the six out of both numbers: how many new images are there, and how many of them does it get right?",
        48 / 54,
    ),
    "5.4": Exercise(
        lambda answer: tuple(answer) == (3, "train"),
        "The test image stays, because the test must not depend on the training, and none of its duplicates may be "
        "trained on.",
        "One of the four stays. Which must it be, so that nothing is trained on that is tested, and no test image is "
        "listed?",
        (3, "train"),
    ),
    "5.5": Exercise(
        chosen("BD"),
        '"Turn left" in a mirror says "turn right", and b in a mirror is d: the model would learn wrong labels.',
        "Hold each thing before a mirror: does its name change?",
        {"B", "D"},
    ),
    # 6: trust
    "6.1": Exercise(
        near(4500, within=350),
        "Between 4,100 and 4,850, depending on the rounding: to halve the width takes four times the images.",
        "The interval of 359 images reaches almost 2 points to either side. It shrinks with the root of the number "
        "of images; or try numbers in wilson_interval(round(0.97 * n), n).",
        4472,
    ),
    "6.2": Exercise(
        near(6),
        "Six coins in a row that all show the same side: 2 * (1/2)**6 = 3.1%. Five are not enough: 6.3%.",
        "If both models are equally good, each such image is a coin. How probable are n heads in a row, or n tails? "
        "McNemarResult(359, 0, n).p_value knows it too.",
        6,
    ),
    "6.3": Exercise(
        fraction(0.982, within=0.005),
        "The logits become 4 and 0, and 1 / (1 + exp(-4)) = 98.2%: temperatures below 1 raise confidence. The order "
        "of the classes stays, and so does the accuracy.",
        "Divide both logits by 0.5 first. Then exp of the first, by the sum of exp of both.",
        0.982,
    ),
    "6.4": Exercise(
        near(0.61, within=0.001),
        "Eight of the ten stretches lie above 0.61, and a new image falls into one of them in 80% of cases.",
        "Sort them, and count the stretches from above: the first reaches from the largest number up to 1. Where does "
        "the eighth begin?",
        0.61,
    ),
    "6.5": Exercise(
        fraction(490 / 670, within=0.005),
        "490 of the 670 warnings are about real digits. What is rare is seldom what a warning is about, however good "
        "the test: doctors know this too.",
        "Count the warnings of both kinds: 5% of 9,800 digits, and 90% of 200 others. What fraction of their sum is "
        "the first?",
        490 / 670,
    ),
    # 7: shipping
    "7.1": Exercise(
        near(94_698 * 4),
        "378,792 bytes. The rest of the file is the graph, the threshold for unknown images and the class names.",
        "32 bits are how many bytes? And how many numbers are there?",
        94_698 * 4,
    ),
    "7.2": Exercise(
        turns_paper_to_ink,
        "White becomes black and black white, and the file reads a 7. It may still call it unknown, because the paper "
        "is not quite white and the digit is not centered as in MNIST: `convlens predict` corrects both.",
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
        "The query after the question mark has pairs of name and value, with & between them.",
        'It begins as the one above: address + "/predict?top=...". Two pairs, with & between them.',
        "http://127.0.0.1:8000/predict?top=3&coverage=0.99",
    ),
    "7.5": Exercise(
        chosen("ACE"),
        "A and C say what was measured, on which data, and how much it varies; E names what was not measured. B "
        "promises it for every image in the world, and D mistakes an aid for a proof.",
        "For each sentence: is it what was measured, or what one would like to be true?",
        {"A", "C", "E"},
    ),
}
