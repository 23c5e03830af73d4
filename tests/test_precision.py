"""The choice between fp32 and bf16: by the net's own convolutions, kept in the cache, never wrong for speed's sake."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from convlens.models import create_model
from convlens.system.files import cache_dir
from convlens.training import precision
from convlens.training.precision import choose_precision, find_convolutions
from convlens.training.recipe import Recipe

CPU = torch.device("cpu")
SHAPE = (1, 28, 28)
AUTO = Recipe(epochs=1)


def make_net() -> nn.Module:
    return create_model("small", channels=1, image_height=28, image_width=28, classes=3, width=4)


def answers(monkeypatch: pytest.MonkeyPatch, *results: dict[str, Any]) -> list[tuple[int, ...]]:
    """Let the trials give ``results`` in turn, the last one for ever; return the list of what was tried."""
    tried: list[tuple[int, ...]] = []

    def answer(_layer: nn.Conv2d, shape: tuple[int, ...]) -> dict[str, Any]:
        tried.append(shape)
        return results[min(len(tried), len(results)) - 1]

    monkeypatch.setattr(precision, "try_convolution", answer)
    return tried


FAST = {"fp32": 1.0, "bf16": 0.5, "right": True}
SLOW = {"fp32": 1.0, "bf16": 10.0, "right": True}
WRONG = {"fp32": 1.0, "bf16": 0.1, "right": False}


def test_fast_and_right_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, FAST)
    assert choose_precision(AUTO, CPU, make_net(), SHAPE) == "bf16"


@pytest.mark.parametrize("bad", [SLOW, WRONG])
def test_one_bad_convolution_keeps_all_in_fp32(bad: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, FAST, bad, FAST)
    assert choose_precision(AUTO, CPU, make_net(), SHAPE) == "fp32"


def test_what_was_found_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = answers(monkeypatch, FAST)
    choose_precision(AUTO, CPU, make_net(), SHAPE)
    assert [shape[0] for shape in tried] == [1, 4, 8, 16]
    choose_precision(AUTO, CPU, make_net(), SHAPE)
    assert len(tried) == 4
    choose_precision(AUTO, CPU, make_net(), (1, 32, 32))  # other shapes are tried
    assert len(tried) == 8


@pytest.mark.parametrize("damage", ["", "[]", '{"format"', "null"])
def test_a_damaged_cache_is_tried_again(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = answers(monkeypatch, FAST)
    cache_dir().mkdir(parents=True)
    (cache_dir() / "precision.json").write_text(damage, encoding="utf-8")
    assert choose_precision(AUTO, CPU, make_net(), SHAPE) == "bf16"
    assert len(tried) == 4
    assert len(json.loads((cache_dir() / "precision.json").read_text(encoding="utf-8"))) == 4


def test_a_damaged_entry_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = answers(monkeypatch, FAST)
    choose_precision(AUTO, CPU, make_net(), SHAPE)
    file = cache_dir() / "precision.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept[next(iter(kept))] = {"fp32": "soon", "right": True}
    file.write_text(json.dumps(kept), encoding="utf-8")
    choose_precision(AUTO, CPU, make_net(), SHAPE)
    assert len(tried) == 5


def test_a_cache_that_cannot_be_written_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, FAST)
    cache_dir().parent.mkdir(parents=True, exist_ok=True)
    cache_dir().write_text("a file where the folder should be", encoding="utf-8")
    assert choose_precision(AUTO, CPU, make_net(), SHAPE) == "bf16"


def test_the_trial_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_convolutions(make_net(), SHAPE)
    assert [shape[0] for _, shape in found] == [1, 4, 8, 16]
    for layer, shape in found:
        result = precision.try_convolution(layer, shape)
        assert result["right"] and result["fp32"] > 0 and result["bf16"] > 0


def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a 1-channel bf16 convolution of an older PyTorch gave them."""
    true = nn.functional.conv2d

    def conv2d(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        wrong = torch.is_autocast_enabled("cpu") and x.shape[1] == 1
        return true(x, *rest) * (1.5 if wrong else 1.0)

    monkeypatch.setattr(nn.functional, "conv2d", conv2d)
    results = [
        precision.try_convolution(layer, shape)["right"] for layer, shape in find_convolutions(make_net(), SHAPE)
    ]
    assert results == [False, True, True, True]
    assert choose_precision(AUTO, CPU, make_net(), SHAPE) == "fp32"


def test_a_machine_without_bf16_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    true = nn.functional.conv2d

    def conv2d(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("could not create a primitive")
        return true(x, *rest)

    monkeypatch.setattr(nn.functional, "conv2d", conv2d)
    assert choose_precision(AUTO, CPU, make_net(), SHAPE) == "fp32"


def test_small_images_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = answers(monkeypatch, FAST)
    choose_precision(Recipe(epochs=1, initial_size=20), CPU, make_net(), SHAPE)
    assert tried[0] == (1, 28, 28) and tried[4] == (1, 20, 20) and len(tried) == 8
