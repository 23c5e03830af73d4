"""The optimizers: torch.optim's numbers, Muon's properties, and what a checkpoint holds of them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from convlens.models import create_model
from convlens.training.build import make_optimizer
from convlens.training.optimizers import SGD, Muon, Optimizer, zeropower_via_newtonschulz
from convlens.training.recipe import Recipe

TWINS: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "plain": ({"momentum": 0.0}, torch.optim.SGD, {}),
    "momentum": ({"momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8}),
    "nesterov": ({"momentum": 0.8, "nesterov": True}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "adam": ({"optimizer": "adam", "momentum": 0.7}, torch.optim.Adam, {"betas": (0.7, 0.999)}),
    "adamw": ({"optimizer": "adamw", "momentum": 0.7}, torch.optim.AdamW, {"betas": (0.7, 0.999)}),
}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return create_model("small", channels=1, image_height=8, image_width=8, classes=3, width=2)


def set_gradients(net: nn.Module, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for weight in net.parameters():
        weight.grad = torch.randn(weight.shape, generator=g)


@pytest.mark.parametrize("name", TWINS)
def test_the_numbers_are_those_of_torch_optim(name: str) -> None:
    options, kind, settings = TWINS[name]
    ours, theirs = make_net(), make_net()
    optimizer = make_optimizer(ours, Recipe(epochs=1, lr=0.1, weight_decay=0.5, **options))
    weights = list(theirs.parameters())
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    twin = kind(groups, lr=0.1, **settings)
    for step in range(10):
        lr = 0.1 / (step + 1)
        for group in twin.param_groups:
            group["lr"] = lr
        for net in (ours, theirs):
            set_gradients(net, step)
        optimizer.step(lr)
        twin.step()
    for (key, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, its, rtol=1e-5, atol=1e-6), key
        assert not torch.equal(mine, dict(make_net().named_parameters())[key])


def test_every_weight_is_in_one_group_and_only_matrices_and_filters_decay() -> None:
    net = make_net()
    groups = make_optimizer(net, Recipe(epochs=1, weight_decay=0.5)).groups
    names = {id(p): name for name, p in net.named_parameters()}
    found = [(names[id(w)], group.weight_decay) for group in groups for w in group.weights if isinstance(group, SGD)]
    assert sorted(name for name, _ in found) == sorted(names.values())
    assert {name for name, decay in found if decay} == {n for n, p in net.named_parameters() if p.dim() > 1}


def test_head_and_biases_have_learning_rates_of_their_own() -> None:
    recipe = Recipe(epochs=1, lr=0.5, head_lr=0.1, bias_lr=2.0, momentum=0.0)
    net = make_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight)
    make_optimizer(net, recipe).step(0.25)  # half of the peak
    moved = {key: float((before[key] - value.detach()).mean()) for key, value in net.named_parameters()}
    expected = {4: 0.25, 2: 0.05, 1: 1.0}
    for key, weight in net.named_parameters():
        assert moved[key] == pytest.approx(expected[weight.dim()], rel=1e-5), key


def test_frozen_weights_are_not_optimised() -> None:
    net = create_model("cifar-lenet", channels=3, image_height=32, image_width=32, classes=3)
    net.body.requires_grad_(False)
    groups = make_optimizer(net, Recipe(epochs=1)).groups
    assert sum(len(group.weights) for group in groups) == len(list(net.head.parameters()))


def test_a_weight_without_a_gradient_is_taken_as_one_with_gradient_zero() -> None:
    weights = [torch.ones(2), torch.ones(2)]
    weights[0].grad = torch.ones(2)
    Optimizer([SGD(weights)]).step(0.5)
    assert weights[0].tolist() == [0.5, 0.5] and weights[1].tolist() == [1.0, 1.0]


@given(rows=st.integers(2, 24), columns=st.integers(2, 24), seed=st.integers(0, 99))
def test_orthogonalise_brings_the_singular_values_near_one(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    result = zeropower_via_newtonschulz(matrix)
    assert result.shape == matrix.shape and result.dtype == matrix.dtype
    turned = u.T @ result @ vt.T  # diagonal, as far as bf16 goes
    large = values > 0.15 * values.norm()
    assert bool(((turned.diagonal() > 0.4) & (turned.diagonal() < 1.4))[large].all())
    assert float((turned - turned.diagonal().diag()).abs().max()) < 0.1


@given(rows=st.integers(2, 40), columns=st.integers(2, 40), seed=st.integers(0, 99))
def test_orthogonalise_is_three_steps_of_the_quintic(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(zeropower_via_newtonschulz(matrix), u @ values.diag() @ vt, atol=1e-5)
    assert torch.allclose(zeropower_via_newtonschulz(matrix.float()).double(), u @ values.diag() @ vt, atol=1e-4)


def test_muon_keeps_the_norm_of_filters_and_goes_against_the_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, generator=g)
    target = torch.randn(8, 4, 3, 3, generator=g)
    target *= 8**0.5 / target.norm()

    def distance() -> float:
        return float((weight - target).norm())

    muon = Muon([weight], momentum=0.6)
    first = distance()
    for step in range(60):
        weight.grad = weight - target
        muon.update(0.1 * (1 - step / 60))
    assert distance() < 0.1 * first
    weight.grad = torch.zeros_like(weight)
    muon.slots["momentum"][0].zero_()
    muon.update(0.0)
    assert float(weight.norm()) == pytest.approx(8**0.5, rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_going_on_from_the_tensors_gives_the_same_bits(name: str) -> None:
    recipe = Recipe(epochs=1, optimizer=name, lr=0.01, weight_decay=0.1)
    nets: list[nn.Module] = []
    for stop in (False, True):
        net = make_net()
        optimizer = make_optimizer(net, recipe)
        for step in range(6):
            if stop and step == 3:
                kept: dict[str, Tensor] = {key: value.clone() for key, value in optimizer.tensors().items()}
                optimizer = make_optimizer(net, recipe)
                optimizer.load_tensors(kept)
            set_gradients(net, step)
            optimizer.step(0.01)
        nets.append(net)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_tensors_of_another_optimizer_are_refused() -> None:
    net = make_net()
    sgd, adam = (make_optimizer(net, Recipe(epochs=1, optimizer=name)) for name in ("sgd", "adam"))
    with pytest.raises(ValueError, match="^it was written by another optimizer, or by another version of convlens$"):
        sgd.load_tensors(adam.tensors())


def test_a_training_imports_neither_the_compiler_nor_sympy() -> None:
    program = (
        "import sys, convlens\n"
        "net = convlens.create_model('small', channels=1, image_height=8, image_width=8, classes=10)\n"
        "recipe = convlens.get_recipe('digits').override(max_steps=2, precision='auto')  # bf16 is tried out\n"
        "for _ in convlens.fit(net, convlens.load_dataset('digits'), recipe): pass\n"
        "print({'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    environment = {**os.environ, "CONVLENS_CACHE": "empty"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"
