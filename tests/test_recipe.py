"""Recipes: plain data that refuses what it does not know, and the schedules and groups that are made of them."""

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convlens.data.builtin import DATASETS
from convlens.errors import UnknownNameError, UsageError
from convlens.models import create_model, model_options
from convlens.training.build import make_clip, make_loss
from convlens.training.recipe import FIELD_TYPES, Recipe
from convlens.training.recipes import RECIPES, default_recipe, get_recipe
from convlens.training.schedule import learning_rate

SCHEDULES = ("constant", "step", "one-cycle", "cosine", "linear")
CLASSIC_DATA = {"fashion-2conv": (1, 28), "folder-cnn": (3, 64), "cifar-lenet": (3, 32), "mnist-4conv": (1, 28)}


def rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    """Return the learning rate of every step."""
    total = recipe.total_steps(steps_per_epoch)
    return [learning_rate(recipe, step, total, steps_per_epoch) for step in range(total)]


# the named recipes


@pytest.mark.parametrize("name", RECIPES.names())
def test_every_recipe_builds_and_survives_json(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    assert RECIPES[name].__doc__
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    again = Recipe.from_json(values)
    assert again == recipe
    assert {k: type(v) for k, v in vars(again).items()} == {k: type(v) for k, v in vars(recipe).items()}
    assert set(recipe.model_options()) <= set(model_options(recipe.model))


def test_the_recipes_that_the_design_promises() -> None:
    strong = {"digits", "mnist-995", "fashion-94", "cifar10-90", "folder"}
    fast = {"mnist-99", "fashion-92", "cifar10-small", "cifar10-94"}
    assert strong | fast | set(CLASSIC_DATA) <= set(RECIPES.names())
    assert {name: default_recipe(name).name for name in DATASETS.names()} == {
        "digits": "digits",
        "mnist": "mnist-995",
        "fashion-mnist": "fashion-94",
        "cifar10": "cifar10-90",
    }
    assert default_recipe("some/photos").name == "folder"
    assert default_recipe("arrays").name == "folder"


@pytest.mark.parametrize("name", sorted(CLASSIC_DATA))
def test_classic_recipes_train_their_own_net(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.model == name
    channels, side = CLASSIC_DATA[name]
    net = create_model(
        name, channels=channels, image_height=side, image_width=side, classes=10, **recipe.model_options()
    )
    assert net(torch.zeros(1, channels, side, side)).shape == (1, 10)


def test_fashion_2conv_derives_five_epochs() -> None:
    recipe = get_recipe("fashion-2conv")
    assert (recipe.max_steps, recipe.epochs, recipe.batch_size) == (3000, None, 100)
    steps_per_epoch = 60_000 // recipe.batch_size
    assert recipe.total_steps(steps_per_epoch) == 3000
    assert recipe.total_steps(steps_per_epoch) / steps_per_epoch == 5
    assert (recipe.optimizer, recipe.lr, recipe.momentum, recipe.lr_schedule) == ("sgd", 0.01, 0.0, "constant")
    assert (recipe.loss, recipe.val_fraction, recipe.log_test_metrics) == ("cross-entropy", 0.0, True)


def test_mnist_4conv_has_the_documents_batches() -> None:
    recipe = get_recipe("mnist-4conv")
    assert math.ceil(60_000 / recipe.batch_size) == 118
    assert math.ceil(10_000 / recipe.batch_size) == 20
    assert recipe.total_steps(118) == 20 * 118
    assert (recipe.loss, recipe.optimizer, recipe.lr, recipe.momentum) == ("nll", "sgd", 0.01, 0.9)
    assert (recipe.lr_schedule, recipe.center_crop_prob, recipe.rotation) == ("step", 0.1, 15.0)
    assert recipe.center_crop_ratio == 22 / 28


def test_cifar_lenet_keeps_the_output_relu_unless_told() -> None:
    recipe = get_recipe("cifar-lenet")
    assert recipe.model_options() == {}
    assert recipe.override(output_relu=False).model_options() == {"output_relu": False}


# what a recipe takes


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe(epochs=1).lr = 3.0  # type: ignore[misc]


def test_unknown_keys_have_the_nearest_name() -> None:
    recipe = Recipe(epochs=1)
    with pytest.raises(UnknownNameError, match=r"^unknown recipe option 'learning_rat'; "):
        recipe.override(learning_rat=0.1)
    with pytest.raises(UnknownNameError, match=r"^unknown recipe option 'batchsize'; did you mean 'batch_size'\?$"):
        recipe.override(batchsize=3)
    with pytest.raises(UnknownNameError, match="'momentun'; did you mean 'momentum'"):
        Recipe.from_json({"epochs": 1, "momentun": 0.9})
    with pytest.raises(UnknownNameError, match=r"^unknown recipe 'mnist4conv'; did you mean 'mnist-4conv'\?$"):
        get_recipe("mnist4conv")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", 1.5, "`epochs` takes an integer, not 1.5"),
        ("epochs", "3", "`epochs` takes an integer, not '3'"),
        ("batch_size", True, "`batch_size` takes an integer, not True"),
        ("batch_size", None, "`batch_size` takes an integer, not None"),
        ("lr", "fast", "`lr` takes a number, not 'fast'"),
        ("lr", False, "`lr` takes a number, not False"),
        ("hflip", 1, "`hflip` takes True or False, not 1"),
        ("output_relu", "no", "`output_relu` takes True or False, not 'no'"),
        ("model", 4, "`model` takes a string, not 4"),
        ("pool", 2, "`pool` takes a string, not 2"),
        ("translate", [1], r"`translate` takes an integer, not \[1\]"),
    ],
)
def test_wrong_types(key: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        Recipe(epochs=1).override(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", 0, "`epochs` is 0; it must be at least 1"),
        ("max_steps", 0, "`max_steps` is 0; it must be at least 1"),
        ("batch_size", 0, "`batch_size` is 0; it must be at least 1"),
        ("lr", -0.1, "`lr` is -0.1; it must be at least 0"),
        ("lr", math.nan, "`lr` is nan; it must be finite"),
        ("seed", -1, "`seed` is -1; it must be at least 0"),
        ("val_fraction", 1, "`val_fraction` is 1.0; it must be below 1"),
        ("momentum", 1.0, "`momentum` is 1.0; it must be below 1"),
        ("ema_decay", 1.0, "`ema_decay` is 1.0; it must be below 1"),
        ("label_smoothing", 1.1, "`label_smoothing` is 1.1; it must be at most 1"),
        ("scale", 2, "`scale` is 2.0; it must be at most 1"),
        ("center_crop_prob", 1.5, "`center_crop_prob` is 1.5; it must be at most 1"),
        ("warmup_fraction", 1.01, "`warmup_fraction` is 1.01; it must be at most 1"),
    ],
)
def test_out_of_range(key: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        Recipe(epochs=1).override(**{key: value})


def test_infinity_is_refused_by_a_message_that_is_true() -> None:
    with pytest.raises(UsageError, match="^`lr` is inf; it must be (?!at least 0$)"):
        Recipe(epochs=1, lr=math.inf)


def test_a_seed_that_torch_cannot_take_is_refused() -> None:
    torch.manual_seed(Recipe(epochs=1, seed=2**63 - 1).seed)
    with pytest.raises(UsageError, match="`seed`"):
        Recipe(epochs=1, seed=2**64)


def test_choices() -> None:
    with pytest.raises(UnknownNameError, match="^unknown value of `lr_schedule` 'cosin'; did you mean 'cosine'"):
        Recipe(epochs=1, lr_schedule="cosin")
    with pytest.raises(UnknownNameError, match="^unknown value of `optimizer` 'lion'; "):
        Recipe(epochs=1, optimizer="lion")
    with pytest.raises(UnknownNameError, match="^unknown value of `precision` 'int8'; choose from: auto, bf16, fp32$"):
        Recipe(epochs=1, precision="int8")


def test_whole_numbers_are_taken_where_a_number_is_asked_for() -> None:
    recipe = Recipe(epochs=1, lr=1, weight_decay=0)
    assert (type(recipe.lr), type(recipe.weight_decay)) == (float, float)


def test_nesterov_needs_momentum_of_sgd() -> None:
    assert Recipe(epochs=1, nesterov=True).nesterov
    for options in ({"momentum": 0.0}, {"optimizer": "adamw"}):
        with pytest.raises(UsageError, match="^`nesterov` needs `optimizer=sgd` or muon, and a `momentum` above 0$"):
            Recipe(epochs=1, nesterov=True, **options)


def test_epochs_and_iterations_take_each_others_place() -> None:
    recipe = Recipe(epochs=4)
    assert recipe.total_steps(7) == 28
    by_iterations = recipe.override(max_steps=10)
    assert (by_iterations.epochs, by_iterations.max_steps, by_iterations.total_steps(7)) == (None, 10, 10)
    by_epochs = by_iterations.override(epochs=2)
    assert (by_epochs.epochs, by_epochs.max_steps, by_epochs.total_steps(7)) == (2, None, 14)
    assert recipe.override(lr=0.5).epochs == 4


@pytest.mark.parametrize("options", [{}, {"epochs": 1, "max_steps": 1}])
def test_one_of_epochs_and_iterations_is_needed(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="^a recipe needs exactly one of `epochs`, `max_steps` and `max_seconds`$"):
        Recipe(**options)


def test_every_field_says_what_it_is() -> None:
    for item in dataclasses.fields(Recipe):
        assert item.metadata["help"], item.name
        assert item.name in FIELD_TYPES


# the learning rate


def test_constant() -> None:
    assert rates(Recipe(epochs=2, lr=0.3, lr_schedule="constant"), 3) == [0.3] * 6


def test_step() -> None:
    recipe = Recipe(epochs=5, lr=1.0, lr_schedule="step", lr_step_size=2, lr_gamma=0.1)
    assert rates(recipe, 2) == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 2)
    classic = get_recipe("mnist-4conv")
    of_epoch = [learning_rate(classic, epoch * 118 + 117, 20 * 118, 118) for epoch in range(20)]
    assert of_epoch == pytest.approx([0.01] * 15 + [0.001] * 5)


def test_linear() -> None:
    assert rates(Recipe(max_steps=4, lr=1.0, lr_schedule="linear"), 10) == [1.0, 0.75, 0.5, 0.25]
    # warm-up over 4 of 8 steps: fifths of the peak, then down from the whole of it
    warm = rates(Recipe(max_steps=8, lr=1.0, lr_schedule="linear", warmup_fraction=0.5), 10)
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25])


def test_cosine() -> None:
    values = rates(Recipe(max_steps=4, lr=1.0, lr_schedule="cosine"), 10)
    assert values == pytest.approx([1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2])


def test_one_cycle() -> None:
    recipe = Recipe(max_steps=100, lr=1.0, lr_schedule="one-cycle")
    values = rates(recipe, 10)
    assert 1 / 25 < values[0] < 1 / 25 + 0.01
    assert max(values) == values[30] == 1.0
    assert values[:31] == sorted(values[:31])
    assert values[30:] == sorted(values[30:], reverse=True)
    assert values[-1] < 0.001
    assert rates(recipe.override(warmup_fraction=0.1), 10)[10] == 1.0


@given(
    lr_schedule=st.sampled_from(SCHEDULES),
    lr=st.floats(1e-6, 100),
    warmup_fraction=st.floats(0, 1),
    max_steps=st.integers(1, 200),
    steps_per_epoch=st.integers(1, 50),
    lr_step_size=st.integers(1, 5),
    lr_gamma=st.floats(0, 1),
)
def test_learning_rate_lies_between_zero_and_the_peak(
    lr_schedule: str,
    lr: float,
    warmup_fraction: float,
    max_steps: int,
    steps_per_epoch: int,
    lr_step_size: int,
    lr_gamma: float,
) -> None:
    recipe = Recipe(
        max_steps=max_steps,
        lr=lr,
        warmup_fraction=warmup_fraction,
        lr_schedule=lr_schedule,
        lr_step_size=lr_step_size,
        lr_gamma=lr_gamma,
    )
    values = rates(recipe, steps_per_epoch)
    assert len(values) == max_steps
    assert all(0 <= value <= lr * (1 + 1e-12) for value in values)
    if lr_schedule != "step":
        assert all(value > 0 for value in values), "a step that learns nothing is a step wasted"
    # one rise, then one fall
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


@given(
    lr_schedule=st.sampled_from(SCHEDULES),
    lr=st.floats(1e-3, 10),
    warmup_fraction=st.floats(0, 1),
    step=st.integers(0, 59),
)
def test_learning_rate_is_in_proportion_to_the_peak(
    lr_schedule: str, lr: float, warmup_fraction: float, step: int
) -> None:
    recipe = Recipe(epochs=6, lr=1.0, lr_schedule=lr_schedule, warmup_fraction=warmup_fraction, lr_step_size=2)
    one = learning_rate(recipe, step, 60, 10)
    assert learning_rate(recipe.override(lr=lr), step, 60, 10) == pytest.approx(one * lr)


# what is made of a recipe


def test_cross_entropy_with_smoothing_and_with_probabilities() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    net = nn.Linear(1, 1)
    plain = make_loss(Recipe(epochs=1), net)
    by_hand = (math.log(1 + math.exp(-2.0)) + math.log(2)) / 2
    assert plain(logits, labels).item() == pytest.approx(by_hand)
    assert plain(logits, torch.eye(2)).item() == pytest.approx(by_hand)
    smooth = make_loss(Recipe(epochs=1, label_smoothing=0.2), net)
    # a fifth of the label is spread evenly: half of it goes to the wrong class, 2 nats further off
    assert smooth(logits, labels).item() == pytest.approx(by_hand + 0.1 * 2 / 2)


def test_nll_is_for_nets_that_end_in_log_softmax() -> None:
    net = create_model("mnist-4conv", channels=1, image_height=16, image_width=16, classes=2)
    loss = make_loss(Recipe(epochs=1, loss="nll"), net)
    assert loss(torch.tensor([[-0.5, -1.0]]), torch.tensor([1])).item() == 1.0
    with pytest.raises(UsageError, match="^`loss` nll needs a model that ends in log-softmax, and small does not$"):
        make_loss(Recipe(epochs=1, loss="nll"), nn.Linear(1, 1))
    for options in ({"label_smoothing": 0.1}, {"mixup": 0.2}, {"cutmix": 1.0}):
        with pytest.raises(UsageError, match="^`loss` nll takes plain labels"):
            make_loss(Recipe(epochs=1, loss="nll", **options), net)


def test_clipping() -> None:
    net = nn.Linear(3, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    make_clip(net, Recipe(epochs=1))()
    assert net.weight.grad.norm().item() == 5.0
    make_clip(net, Recipe(epochs=1, max_grad_norm=1.0))()
    assert net.weight.grad.norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", RECIPES.names())
def test_a_recipe_says_what_came_of_it_as_the_results_page_does(name: str) -> None:
    """The docstring's accuracies, number of seeds and seconds are those of the row of docs/results/accuracy.md."""
    told = inspect.getdoc(RECIPES[name]) or ""
    found = re.search(
        r"`convlens train (.+?)`: test accuracy ([\d.]+% \+- [\d.]+|[\d.]+%)\s+\((\d+) seeds?\),\s+([\d.,]+) s", told
    )
    assert found is not None, told
    command, accuracy, seeds, seconds = found.groups()
    page = (Path(__file__).parent.parent / "docs" / "results" / "accuracy.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{command}` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (cells[2], cells[3], cells[8].split(", ")[1]) == (seeds, accuracy, seconds)
    augmented = re.search(r"; with test-time augmentation (\S+%(?: \+- [\d.]+)?)\.\n", told + "\n")
    assert (augmented[1] if augmented else "") == cells[10]
