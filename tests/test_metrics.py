"""Metrics: intervals, classification report, and logits without side effects."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn

from convlens.data.dataset import Split
from convlens.data.normalize import Normalize
from convlens.evaluation.inference import compute_logits, make_tta
from convlens.evaluation.metrics import (
    Scores,
    confusion_matrix,
    dense_confusion,
    evaluate,
    wilson_interval,
)
from convlens.evaluation.report import TestReport, classification_report
from convlens.models import create_model

PLAIN = Normalize((0.0,), (1.0,))  # pixels / 255


# the interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96; Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (5, 10, 0.2366, 0.7634),
        (9900, 10_000, 0.9879, 0.9918),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_interval_against_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_at_another_level() -> None:
    # of 0 hits the upper end is z^2 / (n + z^2)
    for z in (1.0, 2.576):
        assert wilson_interval(0, 50, z) == pytest.approx((0.0, z * z / (50 + z * z)))


counts = st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts)
def test_wilson_interval_contains_the_proportion(case: tuple[int, int]) -> None:
    correct, n = case
    low, high = wilson_interval(correct, n)
    assert 0 <= low < high <= 1
    assert low <= correct / n + 1e-12 and correct / n - 1e-12 <= high
    # the mistakes' interval is the hits', seen from the other end
    assert wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(counts, st.floats(0.1, 5), st.floats(0.1, 5))
def test_wilson_interval_grows_with_confidence(case: tuple[int, int], z: float, other: float) -> None:
    assume(abs(z - other) > 1e-3)
    (low, high), (wide_low, wide_high) = (wilson_interval(*case, z=level) for level in sorted((z, other)))
    assert wide_low <= low + 1e-12 and high <= wide_high + 1e-12
    assert wide_high - wide_low > high - low


@given(st.integers(0, 100), st.integers(2, 50))
def test_wilson_interval_shrinks_with_images(percent: int, times: int) -> None:
    low, high = wilson_interval(percent, 100)
    narrow_low, narrow_high = wilson_interval(percent * times, 100 * times)
    assert narrow_high - narrow_low < high - low


# the figures of a test


def answers(pairs: list[tuple[int, int]], classes: int) -> tuple[Tensor, Tensor]:
    """Return logits, 5 for the predicted class and 0 for the others, and labels, of (label, prediction) pairs."""
    logits = torch.zeros(len(pairs), classes)
    for row, (_, prediction) in enumerate(pairs):
        logits[row, prediction] = 5.0
    return logits, torch.tensor([label for label, _ in pairs])


def test_classification_report_on_a_small_example() -> None:
    #          says cat  dog  owl
    # is cat         3    1    0
    # is dog         0    2    0
    # is owl         1    1    2
    matrix = [[3, 1, 0], [0, 2, 0], [1, 1, 2]]
    pairs = [(i, j) for i in range(3) for j in range(3) for _ in range(matrix[i][j])]
    report = classification_report(*answers(pairs, 3), ("cat", "dog", "owl"))
    test = report.to_json()
    assert dense_confusion(test["confusion_matrix"], ("cat", "dog", "owl")).tolist() == matrix
    assert ["dog", "cat", 0] not in test["confusion_matrix"] and ["owl", "owl", 2] in test["confusion_matrix"]
    assert (test["num_images"], test["correct"], test["accuracy"]) == (10, 7, 0.7)
    assert test["accuracy_ci95"] == list(wilson_interval(7, 10))
    assert test["classes"] == {
        "cat": {
            "precision": pytest.approx(3 / 4),
            "recall": pytest.approx(3 / 4),
            "f1": pytest.approx(3 / 4),
            "support": 4,
        },
        "dog": {
            "precision": pytest.approx(2 / 4),
            "recall": pytest.approx(2 / 2),
            "f1": pytest.approx(2 / 3),
            "support": 2,
        },
        "owl": {
            "precision": pytest.approx(2 / 2),
            "recall": pytest.approx(2 / 4),
            "f1": pytest.approx(2 / 3),
            "support": 4,
        },
    }
    right, wrong = math.log(1 + 2 * math.exp(-5)), 5 + math.log(1 + 2 * math.exp(-5))
    assert test["loss"] == pytest.approx((7 * right + 3 * wrong) / 10, rel=1e-6)


def test_classification_report_with_absent_classes() -> None:
    report = classification_report(*answers([(0, 0), (0, 2)], 4), ("a", "b", "c", "d"))
    test = report.to_json()
    assert test["confusion_matrix"] == [["a", "a", 1], ["a", "c", 1]]
    assert dense_confusion(test["confusion_matrix"], "abcd").tolist() == [[1, 0, 1, 0], [0] * 4, [0] * 4, [0] * 4]
    assert list(report.worst_classes(2)) == ["a"], "only a class that was tested can be the worst"
    assert test["classes"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert list(test["classes"]) == ["a", "b", "c", "d"]


def plain(value: Any) -> bool:
    """Return True if a value consists of plain dicts, lists, strings and numbers."""
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(plain(item) for item in value)
    return type(value) in (int, float, str)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_classification_report_matches_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    report = classification_report(*answers(pairs, 3), ("a", "b", "c"))
    test = report.to_json()
    assert plain(test) and TestReport.from_json(json.loads(json.dumps(test))) == report
    matrix = dense_confusion(test["confusion_matrix"], ("a", "b", "c")).tolist()
    assert matrix == confusion_matrix(*map(torch.tensor, zip(*pairs, strict=True)), 3).tolist()
    assert sum(map(sum, matrix)) == test["num_images"] == len(pairs)
    assert sum(matrix[i][i] for i in range(3)) == test["correct"] == round(test["accuracy"] * test["num_images"])
    assert [figures["support"] for figures in test["classes"].values()] == [sum(row) for row in matrix]
    numbers = [
        [figures[name] for figures in test["classes"].values()] for name in ("precision", "recall", "f1", "support")
    ]
    true, predicted = zip(*pairs, strict=True)
    theirs = precision_recall_fscore_support(true, predicted, labels=[0, 1, 2], zero_division=0)
    assert numbers == [column.tolist() for column in theirs]
    low, high = test["accuracy_ci95"]
    assert low <= test["accuracy"] + 1e-12 and test["accuracy"] - 1e-12 <= high


def test_scores() -> None:
    scores = Scores.of(torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), torch.tensor([0, 1, 1]))
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.loss == pytest.approx(math.log(1 + math.exp(-2)) + 2 / 3)


def test_scores_accept_log_probabilities() -> None:
    logits, labels = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5
    of_logits, of_logs = Scores.of(logits, labels), Scores.of(logits.log_softmax(dim=1), labels)
    assert of_logs.accuracy == of_logits.accuracy
    assert of_logs.loss == pytest.approx(of_logits.loss, rel=1e-6)


# logits


class Noticing(nn.Module):
    """A model that returns the mean of its input, records its mode, and can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.modes: list[tuple[bool, bool, int]] = []
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled(), len(x)))
        if self.fails:
            raise RuntimeError("no")
        return torch.stack([x.mean(dim=(1, 2, 3)), -x.mean(dim=(1, 2, 3))], dim=1) * self.weight


@pytest.mark.parametrize("training", [True, False])
def test_compute_logits_restores_the_mode(training: bool) -> None:
    net = Noticing().train(training)
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2) * 51
    logits = compute_logits(net, images, PLAIN, batch_size=2)
    assert net.training is training
    assert net.modes == [(False, False, 2), (False, False, 2), (False, False, 1)]
    assert not logits.requires_grad
    torch.testing.assert_close(logits[:, 0], torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]))
    net.fails = True
    with pytest.raises(RuntimeError):
        compute_logits(net, images, PLAIN)
    assert net.training is training


def test_compute_logits_is_independent_of_the_batch_size() -> None:
    torch.manual_seed(0)
    net = create_model("small", channels=1, image_height=8, image_width=8, classes=3, width=4)
    images = torch.randint(0, 256, (11, 1, 8, 8), dtype=torch.uint8)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    whole = compute_logits(net, images, PLAIN)
    torch.testing.assert_close(compute_logits(net, images, PLAIN, batch_size=3), whole)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images.float() / 255), whole)
    assert whole.dtype == torch.float32
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())  # BatchNorm's too


def test_compute_logits_under_autocast_are_float32() -> None:
    net = create_model("small", channels=1, image_height=8, image_width=8, classes=3, width=4)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    logits = compute_logits(net, images, PLAIN, autocast=torch.autocast("cpu", dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, compute_logits(net, images, PLAIN))


def test_evaluate() -> None:
    images = torch.tensor([255, 0, 255, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    net = Noticing()
    scores = evaluate(net, Split(images=images, labels=torch.tensor([0, 1, 1, 0]), ids=list("abcd")), PLAIN)
    # white gives (1, -1), black a tie, which goes to class 0
    right = math.log(1 + math.exp(-2))
    assert scores.accuracy == 0.5
    assert scores.loss == pytest.approx((2 * right + (right + 2) + math.log(2)) / 4, rel=1e-6)


# test-time augmentation


@pytest.mark.parametrize("mirrored", [False, True])
def tta_are_shifts_and_mirror_images_whose_weights_are_one(mirrored: bool) -> None:
    x = torch.arange(30.0).reshape(1, 1, 5, 6)
    views = make_tta(mirrored)(x)
    assert sum(weight for weight, _ in views) == pytest.approx(1)
    assert len(views) == (6 if mirrored else 3)
    step = 2 if mirrored else 1
    plain, down, up = (view for _, view in views[::step])
    assert torch.equal(plain, x)
    assert torch.equal(down[..., 1:, 1:], x[..., :-1, :-1]) and torch.equal(up[..., :-1, :-1], x[..., 1:, 1:])
    if mirrored:
        assert all(torch.equal(views[i + 1][1], views[i][1].flip(3)) for i in (0, 2, 4))


def test_tta_is_the_weighted_mean_of_the_views() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(25, 2))
    images = torch.randint(0, 256, (7, 1, 5, 5), dtype=torch.uint8)
    normalise = Normalize((0.0,), (1.0,))
    views = make_tta(True)
    expected = sum(weight * net(x) for weight, x in views(normalise(images)))
    assert torch.allclose(compute_logits(net, images, normalise, batch_size=3, tta=views), expected, atol=1e-5)
