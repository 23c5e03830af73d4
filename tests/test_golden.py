"""Every recipe's first ten losses, pinned: a change of nets, data order, augmentation or optimizer shows here.

The values are in golden/losses.json; ``CONVLENS_ACCEPT_GOLDEN=1 python -m pytest tests/test_golden.py`` writes it anew.

The steps are the first of many, where the schedules warm up: squeezed into ten steps, a schedule's peak makes
the strong nets so chaotic that the rounding of another processor's arithmetic changes a loss by 10%.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convlens.data.dataset import Dataset, Split
from convlens.data.preprocess import Preprocess
from convlens.errors import TrainingInterruptedError
from convlens.training import grad_accum
from convlens.training.build import make_model, model_config
from convlens.training.callbacks import StopWhen
from convlens.training.loop import fit
from convlens.training.recipe import Recipe
from convlens.training.recipes import RECIPES, get_recipe
from convlens.training.step import forward_backward

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
ACCEPT = os.environ.get("CONVLENS_ACCEPT_GOLDEN") == "1"
CAPABILITY = torch.backends.cpu.get_cpu_capability()  # such as AVX2
STEPS, OF_STEPS = 10, 30_000
# (C, side, images) of the data that a recipe is for: few images for the large nets
DATA = {
    "digits": (1, 8, 256),
    "mnist-99": (1, 28, 512),
    "mnist-995": (1, 28, 512),
    "mnist-best": (1, 28, 128),
    "fashion-85": (1, 28, 512),
    "fashion-92": (1, 28, 128),
    "fashion-94": (1, 28, 128),
    "fashion-best": (1, 28, 96),
    "cifar10-small": (3, 32, 128),
    "cifar10-90": (3, 32, 96),
    "cifar10-94": (3, 32, 96),
    "cifar10-best": (3, 32, 96),
    "folder": (3, 64, 96),
    "fashion-2conv": (1, 28, 256),
    "folder-cnn": (3, 64, 96),
    "cifar-lenet": (3, 32, 128),
    "mnist-4conv": (1, 28, 96),
}
CLASSES = 4


def make_split(count: int, channels: int, side: int, seed: int) -> Split:
    """Return noise with one bright quadrant: the upper left, upper right, lower left or lower right, by class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES
    half = side // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = label // 2 * half, label % 2 * half
        image[:, top : top + half, left : left + half] += 100
    return Split(images=images, labels=labels, ids=[str(i) for i in range(count)])


def ten_losses(recipe: Recipe, data: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Train the recipe's model for ten steps, or as many micro-batches, and return the loss of each."""
    channels, side, count = data
    train, test = make_split(count, channels, side, 0), make_split(2 * CLASSES, channels, side, 1)
    names = tuple("abcd")
    dataset = Dataset(name="toy", classes=names, train=train, test=test)
    losses: list[float] = []

    def recording(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, logits = forward_backward(*arguments)
        losses.append(loss.item())
        return loss, logits

    monkeypatch.setattr(grad_accum, "forward_backward", recording)
    recipe = recipe.override(max_steps=OF_STEPS, device="cpu", threads=1, precision="fp32", seed=0)
    torch.manual_seed(0)
    net = make_model(model_config(recipe, dataset), dataset, Preprocess.fit(train.images, dataset.input_style))
    with pytest.raises(TrainingInterruptedError):
        list(fit(net, dataset, recipe, callbacks=[StopWhen(lambda: len(losses) >= STEPS)]))
    return losses[:STEPS]


def read_golden() -> dict[str, dict[str, list[float]]]:
    """Return the pinned losses: by the CPU's instruction set, then by recipe.

    Kernels for other instruction sets round otherwise, and ten steps of a wide model make 0.3% of that.
    """
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


def golden_here() -> dict[str, list[float]]:
    """Return the losses that were pinned with this CPU's instruction set."""
    golden = read_golden()
    if CAPABILITY not in golden:
        pytest.skip(f"no losses are pinned for {CAPABILITY}")
    return golden[CAPABILITY]


@pytest.mark.parametrize("name", RECIPES.names())
def test_first_losses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = ten_losses(get_recipe(name), DATA.get(name, (3, 32, 96)), monkeypatch)
    assert len(losses) == STEPS
    if ACCEPT:
        golden = read_golden()
        accepted = {**golden.get(CAPABILITY, {}), name: [float(f"{loss:.7g}") for loss in losses]}
        golden[CAPABILITY] = {key: accepted[key] for key in RECIPES.names() if key in accepted}
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    pinned = golden_here()
    assert name in pinned, f"recipe {name} has no pinned losses; accept them with CONVLENS_ACCEPT_GOLDEN=1"
    assert losses == pytest.approx(pinned[name], rel=1e-3)


def test_the_file_pins_no_recipe_that_is_gone() -> None:
    for pinned in read_golden().values():
        assert sorted(pinned) == sorted(RECIPES.names())


def test_a_changed_learning_rate_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    # what the pin is worth: a tenth more learning rate is told from the pinned losses
    recipe = get_recipe("digits")
    losses = ten_losses(recipe.override(lr=recipe.lr * 1.1), DATA["digits"], monkeypatch)
    assert losses != pytest.approx(golden_here()["digits"], rel=1e-3)
