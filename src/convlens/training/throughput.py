"""Measure the throughput of a recipe on this machine, and the memory of its batches."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError
from convlens.evaluation.inference import compute_logits
from convlens.system.device import select_device
from convlens.system.memory import is_out_of_memory
from convlens.system.random import preserve_rng_state
from convlens.training.build import make_model, model_config
from convlens.training.loop import fit
from convlens.training.lr_finder import RangeTestTrainer
from convlens.training.precision import choose_precision
from convlens.training.recipe import Recipe

PROBE_SECONDS = 0.25  # a shorter measurement is repeated with twice as many steps
PROBE_BATCHES = 8

MIN_BATCH_SIZE, MAX_BATCH_SIZE = 16, 8192
BATCH_PROBE_SECONDS = 0.5  # of each timing of a batch size, and two steps at least
NUM_TIMINGS = 3  # of each batch size; the median counts
MIN_STEPS_PER_EPOCH = 10  # with fewer steps a model hardly learns
GOOD_THROUGHPUT = 0.95  # of the highest; a faster batch size is not worth being larger
MAX_MEMORY_FRACTION = 0.5  # of the free memory: the rest is for validation and for other programs


@dataclass(frozen=True)
class Throughput:
    """Images per second of a recipe on this machine.

    Attributes:
        batch_size: Images of a training step, or of a micro-batch.
        training: Images per second in training, at full size.
        inference: Images per second in inference; 0 if it was not measured.
        memory: Bytes that the backward pass of a batch needs, or on CUDA its peak memory; 0 if it was not measured.
    """

    batch_size: int
    training: float
    inference: float = 0.0
    memory: int = 0


def measure_throughput(dataset: Dataset, recipe: Recipe) -> Throughput:
    """Return the throughput of ``recipe`` in training and in inference, from a few steps of each."""
    # one micro-batch stands for a step: the update of the weights costs little
    size = recipe.batch_size // max(min(recipe.grad_accum_steps, recipe.batch_size // 2), 1)
    size = max(min(size, len(dataset.train)), 1)
    rows = torch.arange(min(len(dataset.train) // size, PROBE_BATCHES) * size)
    few = dataclasses.replace(dataset, train=dataset.train.select(rows), validation=None)
    # a learning rate of 0: the model is only timed
    idle = recipe.override(
        batch_size=size,
        grad_accum_steps=1,
        initial_size=0,
        lr=0.0,
        head_lr=0.0,
        bias_lr=0.0,
        val_fraction=0.0,
        restore_best=False,
        patience=0,
        log_test_metrics=False,
    )
    preprocess = Preprocess.fit(few.train.images, dataset.input_style)
    images, normalize = few.train.images[:size], preprocess.normalizer()

    def train(steps: int) -> float:
        return list(fit(model, few, idle.override(max_steps=steps), preprocess=preprocess))[-1].seconds

    def infer(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            compute_logits(model, images, normalize).cpu()
        return time.perf_counter() - started

    with preserve_rng_state():
        model = make_model(model_config(idle, few), few, preprocess)
        # chosen here, outside of the timing, and with the recipe's own image sizes
        precision = choose_precision(recipe, select_device(recipe.device), model, dataset.shape)
        idle = idle.override(precision=precision)
        return Throughput(size, size * measure_rate(train), size * measure_rate(infer))


def measure_rate(work: Callable[[int], float]) -> float:
    """Return how many times per second ``work`` can be done.

    Args:
        work: Does it a number of times and returns the seconds.
    """
    work(1)  # warm up
    times = 2
    # a long enough timing is repeated: another program may have been busy
    while (seconds := work(times)) < PROBE_SECONDS or (seconds := min(seconds, work(times))) < PROBE_SECONDS:
        times *= 2
    return times / seconds


def probe_batches(
    dataset: Dataset, recipe: Recipe, report: Callable[[Throughput], None] = lambda throughput: None
) -> tuple[list[Throughput], str]:
    """Train for a moment with batches of 16, 32, 64, ... images.

    Stops if the throughput has not grown for two sizes, if the next size may need more than half of the free memory,
    or if an epoch would have fewer than 10 steps.

    Args:
        dataset: Training images.
        recipe: How to train.
        report: Called with each throughput as soon as it is measured.

    Returns:
        The throughput of each batch size, and the reason why no larger one was tried.
    """
    train = len(dataset.with_validation(recipe.val_fraction, recipe.seed).train)
    size = min(MIN_BATCH_SIZE, train)
    limit = max(min(train // MIN_STEPS_PER_EPOCH, MAX_BATCH_SIZE), size)
    found: list[Throughput] = []
    while size <= limit:
        try:
            found.append(measure_batch_size(dataset, recipe, size))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return found, f"batches of {size:,} do not fit into memory"
        report(found[-1])
        size *= 2
        if len(found) > 2 and max(t.training for t in found[-2:]) * GOOD_THROUGHPUT < found[-3].training:
            return found, f"batches of {found[-2].batch_size:,} and {found[-1].batch_size:,} are hardly faster"
        if 2 * found[-1].memory > MAX_MEMORY_FRACTION * free_memory(recipe):
            return found, f"batches of {size:,} may need more than half of the memory that is free"
    if size > MAX_BATCH_SIZE:
        return found, f"batches of more than {MAX_BATCH_SIZE:,} are not tried"
    return found, f"with batches of {size:,} an epoch would have fewer than {MIN_STEPS_PER_EPOCH} steps"


def measure_batch_size(dataset: Dataset, recipe: Recipe, size: int) -> Throughput:
    """Return throughput and memory of batches of ``size``: the fastest step, as the median of three timings.

    Other programs have disturbed the fastest step least.
    """
    trainer = RangeTestTrainer(dataset, recipe.override(batch_size=size))
    device = trainer.setup.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    float(trainer.step(0, 0.0))
    full_batches = max(len(trainer.setup.loader) - 1, 1)  # the last one may be smaller
    fastest: list[float] = []
    for _ in range(NUM_TIMINGS):
        seconds: list[float] = []
        while len(seconds) < 2 or sum(seconds) < BATCH_PROBE_SECONDS:
            started = time.perf_counter()
            float(trainer.step(len(seconds) % full_batches, 0.0))  # reading the loss waits for the step
            seconds.append(time.perf_counter() - started)
        fastest.append(min(seconds))
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else activation_bytes(trainer, size)
    return Throughput(size, size / statistics.median(fastest), memory=memory)


def activation_bytes(trainer: RangeTestTrainer, size: int) -> int:
    """Return the bytes that a batch of ``size`` stores for the backward pass, extrapolated from two images."""
    stored: dict[int, int] = {}

    def store(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    setup = trainer.setup
    images = torch.zeros(2, *setup.shape, device=setup.device)
    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        setup.model(images)
    weights = {w.untyped_storage().data_ptr() for w in setup.model.parameters()}
    return sum(count for address, count in stored.items() if address not in weights) * size // 2


def free_memory(recipe: Recipe) -> float:
    """Return the bytes of free memory on the recipe's device; infinity if the system does not say."""
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


def pick_batch(throughputs: Sequence[Throughput]) -> int:
    """Return the smallest batch size whose throughput is within 5% of the highest.

    Raises:
        ConvlensError: If no batch size fits into memory.
    """
    if not throughputs:
        raise ConvlensError(f"there is not enough memory for {MIN_BATCH_SIZE} images at once; try less `width`")
    best = max(throughput.training for throughput in throughputs)
    return next(t.batch_size for t in throughputs if t.training >= GOOD_THROUGHPUT * best)
