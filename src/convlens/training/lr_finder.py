"""A learning rate and a batch size for a recipe on this machine, from a moment of training each."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from convlens.data.dataset import Dataset
from convlens.data.loader import BatchLoader
from convlens.data.preprocess import Preprocess
from convlens.data.resize import downscale
from convlens.errors import ConvlensError
from convlens.system.device import select_device
from convlens.system.progress import track
from convlens.training.build import make_augment, make_clip, make_loss, make_model, make_optimizer, model_config
from convlens.training.grad_accum import is_out_of_memory
from convlens.training.precision import autocast, choose_precision
from convlens.training.recipe import Recipe

STEPS = 100

LOWEST, HIGHEST = 1e-5, 10.0  # learning rates of the range test

SMOOTHING = 0.9  # share of what was before in the smoothed loss

EXPLODED = 3.0  # so many times the lowest loss ends the range test

SMALLEST_BATCH, LARGEST_BATCH = 16, 8192

PROBE_SECONDS = 0.5  # of each timing, and two steps at least

TIMINGS = 3  # of each batch size; the median counts

FEWEST_STEPS = 10  # of an epoch: larger batches would hardly learn

AS_GOOD = 0.95  # of the highest pace: what lies above is not worth a larger batch

MEMORY_SHARE = 0.5  # of the memory that is free: the other half is for validation, and for other programs


@dataclass(frozen=True)
class RangeTest:
    """What a learning-rate range test saw: the rate and the smoothed loss of every step, and where it fell most."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    steepest: float

    @property
    def lowest(self) -> float:
        """The rate at which the loss was lowest: larger ones undo what was learned."""
        return self.rates[self.losses.index(min(self.losses))]

    @property
    def suggestion(self) -> float:
        """The middle of both rates, as their geometric mean: the loss fell there, and has not yet begun to rise."""
        return math.sqrt(self.steepest * self.lowest)


@dataclass(frozen=True)
class Pace:
    """What a batch size costs: images a second, and bytes of memory at the peak, where the system tells."""

    batch_size: int
    images_per_second: float
    memory: int


class Trainer:
    """One step after another of a recipe on training images alone, at whatever learning rate."""

    def __init__(self, dataset: Dataset, recipe: Recipe):
        self.device = select_device(recipe.device)
        train = dataset.with_validation(recipe.val_fraction, recipe.seed).train
        preprocess = Preprocess.fit(train.images, dataset.input_style)
        torch.manual_seed(recipe.seed)
        self.net: nn.Module = make_model(
            model_config(recipe, dataset), dataclasses.replace(dataset, train=train), preprocess
        )
        self.precision = choose_precision(recipe, self.device, self.net, dataset.shape)
        self.net.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._batches = BatchLoader(
            train, recipe.batch_size, preprocess.normalizer().to(self.device), seed=recipe.seed,
            augment=make_augment(recipe, len(dataset.classes)), hflip=recipe.hflip,
            balanced_sampling=recipe.balanced_sampling,
        )  # fmt: skip
        self.whole = max(len(self._batches) - 1, 1)  # batches of an epoch without the last, which may be smaller
        self._loss, self._clip = make_loss(recipe, self.net), make_clip(self.net, recipe)
        self._optimizer, self._small = make_optimizer(self.net, recipe), recipe.initial_size

    def step(self, number: int, lr: float) -> Tensor:
        """Take step ``number`` (from 0) and return its loss, before the weights moved."""
        images, labels = self._batches(*divmod(number, len(self._batches)))  # (N, C, H, W)
        if self._small:
            images = downscale(images, self._small)
        self._optimizer.zero_grad()
        with autocast(self.precision, self.device):
            logits = self.net(images)
        loss = self._loss(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._clip()
        self._optimizer.step(lr)
        return loss.detach()


def find_lr(dataset: Dataset, recipe: Recipe, steps: int = STEPS) -> RangeTest:
    """Return the range test of the recipe (L. Smith 2015): the learning rate rises from step to step, the loss is seen.

    It rises by the same factor each time and stops where the loss explodes. Rates of other layers
    (``head_lr``, ``bias_lr``) rise with it.
    """
    trainer = Trainer(dataset, recipe)
    rates, losses, mean = list[float](), list[float](), 0.0
    for number in track(range(steps), "looking for a learning rate", steps):
        lr = LOWEST * (HIGHEST / LOWEST) ** (number / (steps - 1))
        loss = float(trainer.step(number, lr))
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth = mean / (1 - SMOOTHING ** (number + 1))
        if not math.isfinite(smooth) or (losses and smooth > EXPLODED * min(losses)):
            break
        rates.append(lr)
        losses.append(smooth)
    return RangeTest(tuple(rates), tuple(losses), steepest(rates, losses))


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the rate at which the loss falls most over its logarithm, between its neighbours; of one, that.

    The first tenth is left out: the mean of the first few losses is not yet smooth.
    """
    first = max(len(rates) // 10, 1)
    slopes = {i: losses[i + 1] - losses[i - 1] for i in range(first, len(rates) - 1)}
    return rates[min(slopes, key=slopes.__getitem__)] if slopes else rates[0]


def with_lr(recipe: Recipe, lr: float) -> dict[str, float]:
    """Return the fields of the recipe with another learning rate: those of other layers keep their share of it."""
    lr = float(f"{lr:.2g}")
    scale = lr / recipe.lr if recipe.lr else 1.0
    own = {name: float(f"{value * scale:.2g}") for name in ("head_lr", "bias_lr") if (value := getattr(recipe, name))}
    return {"lr": lr, **own}


def probe_batches(
    dataset: Dataset, recipe: Recipe, tell: Callable[[Pace], None] = lambda pace: None
) -> tuple[list[Pace], str]:
    """Train for a moment with batches of 16, 32, 64, ... images; return what each costs, and why no larger was tried.

    It ends where the pace has not grown for two sizes, where half of the free memory would not suffice for the next
    size, and where an epoch would have fewer than 10 steps. ``tell`` is called with each as it is measured.
    """
    train = len(dataset.with_validation(recipe.val_fraction, recipe.seed).train)
    size = min(SMALLEST_BATCH, train)
    most = max(min(train // FEWEST_STEPS, LARGEST_BATCH), size)
    seen: list[Pace] = []
    while size <= most:
        try:
            seen.append(measure(dataset, recipe, size))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return seen, f"batches of {size:,} do not fit into memory"
        tell(seen[-1])
        size *= 2
        if len(seen) > 2 and max(p.images_per_second for p in seen[-2:]) * AS_GOOD < seen[-3].images_per_second:
            return seen, f"batches of {seen[-2].batch_size:,} and {seen[-1].batch_size:,} are hardly faster"
        if 2 * seen[-1].memory > MEMORY_SHARE * free_memory(recipe):
            return seen, f"batches of {size:,} may need more than half of the memory that is free"
    if size > LARGEST_BATCH:
        return seen, f"batches of more than {LARGEST_BATCH:,} are not tried"
    return seen, f"with batches of {size:,} an epoch would have fewer than {FEWEST_STEPS} steps"


def measure(dataset: Dataset, recipe: Recipe, size: int) -> Pace:
    """Return what batches of ``size`` cost; the pace is that of the quickest step, the median of three timings.

    The quickest step is the one that other programs disturbed least.
    """
    trainer = Trainer(dataset, recipe.override(batch_size=size))
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    float(trainer.step(0, 0.0))
    quickest: list[float] = []
    for _ in range(TIMINGS):
        seconds: list[float] = []
        while len(seconds) < 2 or sum(seconds) < PROBE_SECONDS:
            started = time.perf_counter()
            float(trainer.step(len(seconds) % trainer.whole, 0.0))  # only timed; reading the loss waits for the step
            seconds.append(time.perf_counter() - started)
        quickest.append(min(seconds))
    pace = size / statistics.median(quickest)
    memory = torch.cuda.max_memory_allocated() if trainer.device.type == "cuda" else activations(trainer, dataset, size)
    return Pace(size, pace, memory)


def activations(trainer: Trainer, dataset: Dataset, size: int) -> int:
    """Return the bytes that a batch of ``size`` keeps for the backward pass: what two images keep, times as many."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(2, *dataset.shape, device=trainer.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.net(images)
    weights = {w.untyped_storage().data_ptr() for w in trainer.net.parameters()}
    return sum(count for place, count in kept.items() if place not in weights) * size // 2


def free_memory(recipe: Recipe) -> float:
    """Return the bytes of memory that are free on the recipe's device; infinity where the system does not tell."""
    device = select_device(recipe.device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    bounds = [float("inf")]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        bounds += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()  # of a container
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        bounds += [float(limit) - float(used)] if limit != "max" else []
    except OSError:
        pass
    return min(bounds)


def pick_batch(paces: Sequence[Pace]) -> int:
    """Return the smallest batch size whose pace is within 5% of the highest: beyond it nothing is gained."""
    if not paces:
        raise ConvlensError(f"there is not enough memory for {SMALLEST_BATCH} images at once; try fewer --width")
    best = max(pace.images_per_second for pace in paces)
    return next(pace.batch_size for pace in paces if pace.images_per_second >= AS_GOOD * best)
