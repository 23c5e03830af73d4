"""Temperature, calibration error, Brier score and prediction sets, on data with a known distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convlens.evaluation.calibration import (
    brier_score,
    calibration_report,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from convlens.evaluation.conformal import COVERAGE_LEVELS, prediction_sets
from convlens.evaluation.uncertainty import conformal_thresholds, nonconformity


def draw(n: int, sharpness: float, seed: int, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits that are too sharp by a factor, and labels drawn from the right probabilities."""
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, classes, generator=g)
    labels = torch.multinomial(z.softmax(dim=1), 1, generator=g)[:, 0]
    return z * sharpness, labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_fit_temperature_recovers_the_temperature(sharpness: float) -> None:
    logits, labels = draw(20_000, sharpness, 0)
    assert fit_temperature(logits, labels) == pytest.approx(sharpness, rel=0.03)


def test_temperature_is_1_without_evidence() -> None:
    fitted = [fit_temperature(*draw(40, 1.0, seed)) for seed in range(200)]
    assert np.mean([temperature != 1.0 for temperature in fitted]) <= 0.03  # 1%, but for chance


@given(st.floats(0.1, 5.0), st.integers(0, 50))
def test_fitted_temperature_minimizes_the_loss(sharpness: float, seed: int) -> None:
    logits, labels = draw(300, sharpness, seed)
    best = fit_temperature(logits, labels)
    if best == 1.0:
        return  # nothing else was proven to be better
    loss = [
        torch.nn.functional.cross_entropy(logits.double() / t, labels).item() for t in (best, best * 0.9, best * 1.1)
    ]
    assert loss[0] <= min(loss[1:]) + 1e-9


def test_temperature_is_bounded_for_separable_data() -> None:
    logits, labels = 5 * torch.eye(4).repeat(10, 1), torch.arange(4).repeat(10)
    assert fit_temperature(logits, labels) == 1.0
    unsure = (logits / 10 / fit_temperature(logits / 10, labels)).softmax(dim=1).max()
    assert 1 - unsure == pytest.approx(0.75 / 42, rel=0.01)  # forty right answers do not make certain
    assert fit_temperature(logits, (torch.arange(4).repeat(10) + 1) % 4) == pytest.approx(20.0)


def test_calibration_error_on_a_small_example() -> None:
    # four images at 90%, three of them right; two at 60%, none right
    p = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    bins = reliability(p, labels)
    assert sum(b.count for b in bins) == 6
    assert expected_calibration_error(bins) == pytest.approx((4 * 0.15 + 2 * 0.6) / 6, abs=1e-6)
    assert brier_score(p, labels) == pytest.approx((3 * 0.02 + 1.62 + 2 * 0.72) / 6, abs=1e-6)


def test_calibration_report_before_and_after() -> None:
    logits, labels = draw(50_000, 3.0, 1)
    report = calibration_report(logits, labels, 3.0)
    assert report.after.ece < 0.01 < 0.1 < report.before.ece
    assert report.after.brier_score < report.before.brier_score


def sets_of(logits: torch.Tensor, bounds: list[float], coverage: float) -> torch.Tensor:
    return torch.from_numpy(prediction_sets(nonconformity(logits).numpy(), bounds, coverage))


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_prediction_sets_have_the_target_coverage(coverage: float) -> None:
    logits, labels = draw(40_000, 2.0, 2)
    bounds = conformal_thresholds(logits[:20_000], labels[:20_000])
    sets = sets_of(logits[20_000:], bounds, coverage)
    measured = sets.gather(1, labels[20_000:, None]).float().mean().item()
    assert abs(measured - coverage) < 0.01


def test_coverage_holds_on_average_for_small_validation_sets() -> None:
    covered = []
    for seed in range(300):
        logits, labels = draw(150, 2.0, seed)
        bounds = conformal_thresholds(logits[:50], labels[:50])
        covered.append(sets_of(logits[50:], bounds, 0.9).gather(1, labels[50:, None]).float().mean().item())
    assert 0.895 <= np.mean(covered) <= 0.93  # between 0.9 and 0.9 + 1 / 51, but for chance


def test_prediction_sets_grow_with_coverage() -> None:
    logits, labels = draw(400, 2.0, 3)
    bounds = conformal_thresholds(logits, labels)
    before = sets_of(logits, bounds, COVERAGE_LEVELS[0])
    for level in COVERAGE_LEVELS[1:]:
        sets = sets_of(logits, bounds, level)
        assert bool((sets | ~before).all())
        before = sets


def test_too_few_images_give_the_set_of_all_classes() -> None:
    logits, labels = draw(10, 2.0, 4)
    bounds = conformal_thresholds(logits, labels)
    assert bounds[-1] == math.inf and bool(sets_of(logits, bounds, 0.99).all())
