"""--budget: what it reads, what it picks, and that the training ends when it should."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import convlens
from convlens.data.dataset import Dataset
from convlens.errors import UsageError
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest
from convlens.training import throughput, time_budget
from convlens.training.loop import fit
from convlens.training.recipe import Recipe
from convlens.training.recipes import BUDGET_RECIPES, RECIPES, get_recipe
from convlens.training.throughput import Throughput, measure_rate, measure_throughput
from convlens.training.time_budget import budget_candidates, choose_for_budget, parse_budget


@pytest.fixture
def digits() -> Dataset:
    return convlens.load_dataset("digits")


@pytest.mark.parametrize(
    ("text", "max_seconds"),
    [("60", 60), ("60s", 60), (" 90 s ", 90), ("1.5m", 90), ("5min", 300), ("1h", 3600), ("0.5h", 1800)],
)
def test_times(text: str, max_seconds: float) -> None:
    assert parse_budget(text) == max_seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "soon", "-5", "5 parsecs", "1e9", "nan", "inf", "1m30s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="^`budget` takes a time such as 60s, 5m or 1h, not "):
        parse_budget(text)


def test_the_ladders_are_of_recipes() -> None:
    for names in BUDGET_RECIPES.values():
        assert [RECIPES[name]().name for name in names] == list(names)
    assert [recipe.name for recipe in budget_candidates("mnist", None)] == list(BUDGET_RECIPES["mnist"])
    assert [recipe.name for recipe in budget_candidates("some/folder", None)] == ["folder"]
    asked = Recipe(epochs=3)
    assert budget_candidates("mnist", asked) == [asked]


def paces(monkeypatch: pytest.MonkeyPatch, *paces: float) -> None:
    """Let the recipes, the quickest first, train so many images a second."""
    left = list(paces)
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: NOW)  # the arithmetic is tested, not the machine
    # the test split takes a second
    monkeypatch.setattr(time_budget, "measure_throughput", lambda *_: Throughput(64, left.pop(0), 359.0))


NOW = 100.0  # what the clock says, all the time
# 1437 digits are 22 whole batches of 64: an epoch is 1408 images
SHORT = Recipe(name="short", epochs=1, batch_size=64, val_fraction=0.0)
LONG = Recipe(name="long", epochs=10, batch_size=64, val_fraction=0.0)
LONGEST = Recipe(name="longest", epochs=100, batch_size=64, val_fraction=0.0)


@pytest.mark.parametrize(
    ("seconds", "name"), [(6, "short"), (7, "short"), (9, "long"), (52, "long"), (54, "longest"), (150, "longest")]
)
def test_the_richest_that_fits(seconds: float, name: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    paces(monkeypatch, 1408, 1408, 1408)
    recipe = choose_for_budget(seconds, NOW, digits, [SHORT, LONG, LONGEST])
    assert recipe.name == name
    # the report and the 359 test images go off
    assert recipe.max_seconds == pytest.approx(seconds - time_budget.FINISH_SECONDS - 1)
    assert recipe.epochs is None


def test_what_has_been_spent_and_tta_go_off(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    paces(monkeypatch, 1408)
    recipe = choose_for_budget(20, NOW - 4, digits, [SHORT.override(hflip=True, tta=True)])
    assert recipe.max_seconds == pytest.approx(20 - 4 - time_budget.FINISH_SECONDS - 7)


def test_steps_on_smaller_images_are_counted_by_their_pixels(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them at a quarter of the pixels make ten epochs as long as 6.25; whole ones would not fit."""
    for initial_size, name in ((4, "long"), (0, "short")):
        paces(monkeypatch, 1408, 1408)
        longer = LONG.override(initial_size=initial_size, initial_size_fraction=0.5)
        assert choose_for_budget(7, NOW, digits, [SHORT, longer]).name == name


def test_a_budget_that_is_too_short(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    paces(monkeypatch, 1408)
    with pytest.raises(UsageError, match="^`budget` 2.5s is too short: loading, testing and the report take 2 s here$"):
        choose_for_budget(2.5, NOW, digits, [SHORT])


def test_images_are_tested_once_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = get_recipe("fashion-94")
    assert asked.tta
    for recipe in (None, asked):
        assert not any(choice.tta for choice in budget_candidates("fashion-mnist", recipe))
    monkeypatch.setattr(time_budget, "measure_throughput", lambda *_: Throughput(64, 1e6, 1e6))
    for given in ({}, {"tta": True}):
        experiment = Experiment.start(
            TrainRequest.create("digits", asked, budget=60, initial_size=0, out=f"views{len(given)}", **given)
        )
        assert experiment.recipe.tta is bool(given)


def test_the_pace_is_measured_and_nothing_random_is_touched(digits: Dataset) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pace = measure_throughput(digits, RECIPES["digits"]())
    assert pace.training > 0 and pace.inference > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("stalled", "done"),
    [
        (
            1,
            [1, 2, 4, 8, 16, 16],
        ),  # the first time; the last took more than a quarter of a second, and is done once more
        (2, [1, 2, 2, 4, 8, 16, 16]),  # a moment in which the machine was busy
    ],
)
def test_what_is_slow_once_does_not_count(stalled: int, done: list[int]) -> None:
    seen: list[int] = []

    def work(times: int) -> float:
        seen.append(times)
        return times / 50 + (100 if len(seen) == stalled else 0)

    assert measure_rate(work) == pytest.approx(50)
    assert seen == done


@pytest.mark.parametrize(("batch_size", "grad_accum_steps", "images", "batch"), [(1000, 4, 1437, 250), (64, 1, 40, 40)])
def test_the_pace_is_that_of_the_recipes_own_batches(
    batch_size: int, grad_accum_steps: int, images: int, batch: int, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    monkeypatch.setattr(throughput, "PROBE_SECONDS", 0.0)
    made = throughput.make_model

    def make_model(*arguments: Any) -> torch.nn.Module:
        net = made(*arguments)
        net.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
        return net

    monkeypatch.setattr(throughput, "make_model", make_model)
    few = replace(digits, train=digits.train.select(torch.arange(images)))
    measure_throughput(
        few, Recipe(model="small", width=4, epochs=1, batch_size=batch_size, grad_accum_steps=grad_accum_steps)
    )
    assert sizes - {1} == {batch}  # the arithmetic is chosen with single images


def test_a_training_in_seconds_ends_then(digits: Dataset) -> None:
    ticks = itertools.count()
    recipe = get_recipe("digits").override(max_seconds=1.0, device="cpu", precision="fp32")
    net = convlens.create_model("small", channels=1, image_height=8, image_width=8, classes=10)
    last = list(fit(net, digits, recipe, clock=lambda: next(ticks) / 100))[-1]  # a machine of an even pace
    assert 0.8 < last.seconds <= 1.0
    assert 0 <= last.lr < 0.01  # of 0.1: the schedule ended with it


def test_a_run_in_seconds_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from convlens.errors import TrainingInterruptedError
    from convlens.runs.experiment import Experiment

    options = {"max_seconds": 3.0, "threads": 1, "device": "cpu", "precision": "fp32"}
    experiment = Experiment.start(TrainRequest.create("digits", out="cut", **options))
    stop: list[bool] = []
    should_stop: Callable[[], bool] = lambda: bool(stop)  # noqa: E731
    with pytest.raises(TrainingInterruptedError, match=r"^stopped at step \d+$"):  # of how many, nobody can know
        for _ in experiment.epochs(should_stop=should_stop):
            stop.append(True)
    resumed = Experiment.resume("cut")
    records = list(resumed.epochs())
    assert len(records) > 1
    assert resumed.finish().accuracy > 0.8


def test_a_budget_in_python_may_be_text() -> None:
    with pytest.raises(UsageError, match="^`budget` takes a time such as 60s, 5m or 1h, not 'soon'$"):
        convlens.train("digits", budget="soon")
    with pytest.raises(UsageError, match="^`budget` 0.1s is too short"):
        convlens.train("digits", budget="0.1s")


def test_seconds_know_no_epochs_to_step_at() -> None:
    with pytest.raises(
        UsageError, match="^`lr_schedule=step` counts epochs and does not go with `max_seconds`; try linear$"
    ):
        Recipe(max_seconds=5, lr_schedule="step")


def test_budget_and_a_length_are_refused() -> None:
    for name in ("epochs", "max_steps", "max_seconds"):
        with pytest.raises(
            UsageError, match="^`budget` sets the length; leave out `epochs`, `max_steps` and `max_seconds`$"
        ):
            convlens.train("digits", budget=60, **{name: 3})
