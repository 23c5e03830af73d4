"""What convlens is measured against still runs, and learns."""

from __future__ import annotations

import contenders
import pytest
import torch

import convlens
from convlens.data.dataset import Dataset


def make_dataset(train: int, side: int, channels: int) -> Dataset:
    """Return images of ten classes: a random picture each, in noise."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(train) % 10
    pictures = torch.randint(0, 128, (10, channels, side, side), generator=chance)
    noise = torch.randint(0, 128, (train, channels, side, side), generator=chance)
    images = (pictures[labels] + noise).to(torch.uint8)
    return convlens.from_arrays(images, labels, images[:100], labels[:100])


def test_the_published_speedrun() -> None:
    _, plain, averaged = contenders.speedrun(make_dataset(6000, 12, 3), torch.device("cpu"), epochs=2)
    assert plain > 0.9 and averaged > 0.5  # of such pictures, mirrored ones are others


@pytest.mark.parametrize("contender", ["tutorial", "plain_loop", "scikit_learn"])
def test_one_epoch_of_the_others(contender: str) -> None:
    data = make_dataset(1000, 28, 1)
    arguments = {"tutorial": ("mnist-4conv",), "plain_loop": ("tiny", 8), "scikit_learn": ()}[contender]
    seconds, accuracy = next(getattr(contenders, contender)(data, *arguments))
    assert seconds > 0 and 0.0 <= accuracy <= 1.0
