"""The training loop on PyTorch's device `meta`, which has shapes but no numbers.

What would make an accelerator wait (a number that is read in the middle of a step), or mixes tensors of two devices,
fails there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from convlens.data import loader
from convlens.data.augment import BatchRandom
from convlens.data.dataset import Dataset, Split
from convlens.data.normalize import Normalize
from convlens.data.preprocess import Preprocess
from convlens.errors import UsageError
from convlens.system.random import preserve_rng_state
from convlens.training import build, checkpoint, finite, step
from convlens.training.build import make_augment, make_model, model_config
from convlens.training.loop import fit
from convlens.training.metrics import RunningMetrics
from convlens.training.recipe import Recipe
from convlens.training.recipes import RECIPES

META = torch.device("meta")


def made_up(channels: int, side: int) -> Dataset:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, channels, side, side), dtype=torch.uint8, generator=g)
    split = Split(images=images, labels=torch.arange(40) % 4, ids=[str(number) for number in range(40)])
    return Dataset(name="made up", classes=("a", "b", "c", "d"), train=split, test=split)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let fit() train on ``meta``, with stand-ins for what PyTorch lacks there; returns when numbers were looked at."""
    looks: list[str] = []

    class Generator:
        device = META

        def manual_seed(self, _: int) -> Generator:
            return self

    def draw(draws: BatchRandom) -> Tensor:
        return torch.rand(draws.count, device=META)[draws.rows]

    class Torch:
        """PyTorch, but for its generators."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def Generator(device: Any = "cpu") -> Any:
            return Generator() if device == META else torch.Generator(device)

    monkeypatch.setattr(loader, "torch", Torch())
    monkeypatch.setattr(BatchRandom, "uniform", lambda draws, low=0.0, high=1.0: draw(draws) * (high - low) + low)
    monkeypatch.setattr(BatchRandom, "integers", lambda draws, end: (draw(draws) * end).long())
    monkeypatch.setattr(build, "select_device", lambda _: META)
    monkeypatch.setattr(build, "choose_precision", lambda *_: "fp32")
    for module in (build, step):
        monkeypatch.setattr(module, "autocast", lambda *_: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(torch, "_standard_gamma", lambda shape, generator: torch.empty_like(shape))
    for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
        monkeypatch.setattr(torch, name, same_device)

    def look_through(values: list[Tensor]) -> bool:
        looks.append("numbers")
        same_device(values)
        return False

    def read(metrics: RunningMetrics) -> tuple[float, int]:
        looks.append("sums")
        return 1.0, 1

    monkeypatch.setattr(finite, "has_nonfinite", look_through)
    monkeypatch.setattr(checkpoint, "check_finite", lambda values, *_: look_through(list(values.values())))
    monkeypatch.setattr(RunningMetrics, "_read", read)
    return looks


def same_device(*tensors: list[Tensor], **_: Any) -> None:
    assert {tensor.device for some in tensors for tensor in some} <= {META}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in sorted(RECIPES.names())),
        ("digits", {"ema_decay": 0.9, "max_grad_norm": 1.0, "balanced_sampling": True, "cutout": 3}),
        ("digits", {"mixup": 0.5, "cutmix": 0.5, "color_jitter": 0.2, "center_crop_prob": 0.1}),
        ("digits", {"optimizer": "adamw", "nesterov": False, "lr_schedule": "cosine", "grad_accum_steps": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:for body:UserWarning")  # BatchNorm's own way to load what is on meta
def test_no_step_waits_or_mixes_devices(name: str, options: dict[str, Any], looked: list[str]) -> None:
    dataset = made_up(3, 32) if "cifar" in name or name == "folder" else made_up(1, 28)
    settings = {"max_steps": 25, "batch_size": 8, "val_fraction": 0.0, "log_test_metrics": False, **options}
    recipe: Recipe = RECIPES[name]().override(**settings)
    preprocess = Preprocess.fit(dataset.train.images, dataset.input_style)
    net = make_model(model_config(recipe, dataset), dataset, preprocess)
    records = list(fit(net, dataset, recipe, preprocess=preprocess))
    assert len(records) == 5
    assert {weight.device for weight in net.parameters()} == {META}
    # before the first step, every 20 steps, and at the end of each epoch of five
    assert looked.count("numbers") == 1 + 2 + 5
    assert looked.count("sums") == 5  # at the end of each epoch


def test_random_numbers_of_all_gpus_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    @contextlib.contextmanager
    def fork_rng(devices: Iterable[int]) -> Iterator[None]:
        kept.extend(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with preserve_rng_state():
        pass
    assert kept == [0, 1]


def test_images_that_do_not_fit_into_the_device_are_said() -> None:
    class Full:
        def to(self, device: torch.device) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    dataset = made_up(1, 8)
    train = replace(dataset.train, images=Full())  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match="^the 40 training images do not fit into the memory of the cpu device; convert"
    ):
        loader.BatchLoader(
            train,
            8,
            Normalize((0.5,), (0.5,)),
            seed=0,
            augment=make_augment(Recipe(epochs=1), 4),
        )
