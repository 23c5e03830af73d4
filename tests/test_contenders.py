"""What convlens is measured against still runs, and learns."""

from __future__ import annotations

import json
import random

import pytest
import torch
from benchmarks import baselines, time_to_accuracy
from torch import nn

import convlens
from convlens.data.dataset import Dataset
from convlens.training.recipes import get_recipe


def make_dataset(train: int, side: int, channels: int) -> Dataset:
    """Return images of ten classes: a random picture each, in noise."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(train) % 10
    pictures = torch.randint(0, 128, (10, channels, side, side), generator=chance)
    noise = torch.randint(0, 128, (train, channels, side, side), generator=chance)
    images = (pictures[labels] + noise).to(torch.uint8)
    return convlens.from_arrays(images, labels, images[:100], labels[:100])


def test_the_published_speedrun() -> None:
    _, plain, averaged = baselines.speedrun(make_dataset(6000, 12, 3), torch.device("cpu"), epochs=2)
    assert plain > 0.9 and averaged > 0.5  # of such pictures, mirrored ones are others


@pytest.mark.parametrize(("classic", "channels"), [("fashion-2conv", 1), ("cifar-lenet", 3), ("mnist-4conv", 1)])
def test_two_epochs_of_the_programs_of_the_documents(classic: str, channels: int) -> None:
    course = baselines.tutorial(make_dataset(1000, 32 if channels == 3 else 28, channels), classic)
    points = [next(course), next(course)]
    assert 0 < points[0][0] < points[1][0] and all(0.0 <= accuracy <= 1.0 for _, accuracy in points)


def test_pictures_are_cut_to_their_centre_as_often_as_the_document_says() -> None:
    random.seed(0)
    images = torch.full((200, 1, 28, 28), 255, dtype=torch.uint8)
    images[:, :, 3:25, 3:25] = 0  # the 22 pixels that are cut out
    data = convlens.from_arrays(images, torch.arange(200) % 10, images[:10], torch.arange(10))
    pictures = baselines.Pictures(data, get_recipe("mnist-4conv").override(rotation=0.0))
    uniform = [x.amax() == x.amin() for x, _ in (pictures[number] for number in range(200))]
    assert 0.02 < sum(uniform) / 200 < 0.25  # of 0.1
    assert [label for _, label in (pictures[number] for number in range(20))] == [*range(10), *range(10)]


def test_the_rate_of_the_programs_falls_as_the_document_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(net: nn.Module, loader: object, optimizer: torch.optim.Optimizer, *_: object) -> baselines.Course:
        for _ in range(31):
            optimizer.step()
            yield optimizer.param_groups[0]["lr"], 0.0

    monkeypatch.setattr(baselines, "tutorial_loop", loop)
    rates = {
        classic: [rate for rate, _ in baselines.tutorial(make_dataset(20, 28, 1), classic)]
        for classic in ("mnist-4conv", "fashion-2conv")
    }
    assert rates["mnist-4conv"] == pytest.approx([0.01] * 15 + [0.001] * 15 + [0.0001])
    assert rates["fashion-2conv"] == [0.01] * 31


def test_a_course_is_followed_until_it_is_there_or_too_late() -> None:
    course = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.9), (4.0, 0.8)]
    for seconds, accuracy, points in ((9.0, 0.7, 2), (1.0, 0.9, 2), (9.0, 0.95, 4), (2.5, 0.95, 3), (0.5, 0.95, 1)):
        assert list(time_to_accuracy.until((point for point in course), seconds, accuracy)) == course[:points]


def test_an_entrant_prints_its_record(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(time_to_accuracy, "load_named", lambda _: make_dataset(300, 28, 1))
    monkeypatch.setattr(baselines, "convlens", lambda data, recipe: iter([(1.0, 0.5), (1.0, 0.75)]))
    for name, who, course, averaged in (
        ("mnist", "convlens, recipe `mnist-99`", [[1.0, 0.5], [1.0, 0.75]], None),
        ("cifar10", "convlens, recipe `cifar10-90`", [[1.0, 0.5]], 0.75),
    ):
        assert who in time_to_accuracy.entrants(name)
        time_to_accuracy.enter(name, who)
        told = json.loads(capsys.readouterr().out)
        assert (told["who"], told["course"], told.get("averaged")) == (who, course, averaged)
        assert tuple(told["targets"]) == time_to_accuracy.RACES[name].targets


def test_convlens_is_looked_at_with_its_augmentation_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "test_accuracy", lambda net, data, normalise, views: 0.5 if views else 0.0)
    data = make_dataset(300, 32, 3)
    recipe = get_recipe("cifar10-90").override(
        max_steps=2, batch_size=150, grad_accum_steps=1, width=4, val_fraction=0.0
    )
    assert recipe.tta
    points = list(baselines.convlens(data, recipe))
    assert len(points) == 2 and points[1] == (points[0][0], 0.5)


@pytest.mark.parametrize(("contender", "arguments"), [("plain_loop", ("tiny", 8)), ("scikit_learn", ())])
def test_one_epoch_of_the_others(contender: str, arguments: tuple[object, ...]) -> None:
    seconds, accuracy = next(getattr(baselines, contender)(make_dataset(1000, 28, 1), *arguments))
    assert seconds > 0 and 0.0 <= accuracy <= 1.0
