"""Comparing two models on the same images: interval, exact test, verdict."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convlens.evaluation.significance import McNemarResult


def test_p_value_matches_scipy() -> None:
    from scipy.stats import binomtest

    for only_a, only_b in [(0, 0), (0, 1), (3, 9), (40, 12), (500, 430)]:
        expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert McNemarResult(1000, only_a, only_b).p_value == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 5000))
def test_swapping_the_models_negates_the_difference(only_a: int, only_b: int, same: int) -> None:
    n = max(only_a + only_b + same, 1)
    one, other = McNemarResult(n, only_a, only_b), McNemarResult(n, only_b, only_a)
    assert one.difference == -other.difference and one.p_value == other.p_value
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert -1 <= one.interval[0] <= one.interval[1] <= 1
    assert 0 < one.p_value <= 1


def test_interval_has_its_nominal_coverage() -> None:
    # A right on 92%, B on 93%, with 4% of the images on which they differ
    rng = np.random.default_rng(0)
    only_a, only_b, truth, n, covered = 0.015, 0.025, 0.01, 2000, 0
    for cells in rng.multinomial(n, [only_a, only_b, 1 - only_a - only_b], size=4000):
        low, high = McNemarResult(n, int(cells[0]), int(cells[1])).interval
        covered += low <= truth <= high
    assert 0.94 <= covered / 4000 <= 0.965


def test_verdict() -> None:
    assert McNemarResult(10_000, 20, 51).verdict("A", "B") == (
        "B is better than A: +0.31 points, 95% interval +0.14 to +0.48"
    )
    assert McNemarResult(10_000, 51, 20).verdict("A", "B") == (
        "A is better than B: +0.31 points, 95% interval +0.14 to +0.48"
    )
    told = McNemarResult(1_000, 7, 5).verdict("A", "B")
    assert told.startswith("no difference between A and B that these 1,000 images show: -0.20 points")
    assert McNemarResult(1_000, 3, 11).verdict("A", "B").startswith("B may be better than A: +0.80 points")
    told = McNemarResult(1_000, 5, 7).verdict("A", "B")
    assert told.startswith("no difference between A and B that these 1,000 images show: +0.20 points, 95% interval -0.")


def test_one_image() -> None:
    only = McNemarResult(1, 0, 1)
    assert only.p_value == 1.0 and only.difference == 1.0 and math.isfinite(only.interval[0])
