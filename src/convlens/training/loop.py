"""The training loop: batch, forward, loss, backward, step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.data.resize import downscale
from convlens.errors import TrainingInterruptedError
from convlens.training.best_weights import BestWeights
from convlens.training.build import TrainSetup
from convlens.training.callbacks import Callback, CallbackList
from convlens.training.checkpoint import Checkpointer, CheckpointStore
from convlens.training.clock import TrainClock
from convlens.training.finite import divergence_error
from convlens.training.grad_accum import GradientAccumulator
from convlens.training.metrics import Progress, RunningMetrics
from convlens.training.recipe import Recipe
from convlens.training.schedule import Schedule
from convlens.training.state import EpochRecord, TrainState


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    preprocess: Preprocess | None = None,
    checkpoints: CheckpointStore | None = None,
    callbacks: Iterable[Callback] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[EpochRecord]:
    """Train ``model`` in place, and yield a record after every epoch.

    At the end the model has the weights that the recipe selects; if the caller stops iterating early, the raw weights
    of that moment. The test split is not used, unless ``recipe.log_test_metrics`` asks for its curve. If torchrun has
    started several processes, each trains on its part of every batch, and all end with the same weights. On a CPU,
    with glibc, the process retains the memory that it frees. The caller sets the number of CPU threads:
    ``recipe.threads`` is for :func:`convlens.train`.

    Args:
        model: Takes normalized float images (N, C, H, W) and returns logits (N, K). It is moved to the recipe's device.
        dataset: Images to train on. Without a validation split, the recipe's ``val_fraction`` is held out.
        recipe: How to train.
        preprocess: Normalization of the images; by default fitted on the training images.
        checkpoints: Where to save, after every epoch and every ``recipe.save_every`` steps. If it has a checkpoint, the
            training resumes from there, bit-identical to an uninterrupted one on a CPU, and yields the records of the
            earlier epochs first.
        callbacks: Objects whose hooks are called.
        clock: Returns seconds from an arbitrary origin; for tests.

    Yields:
        The record of each epoch.

    Raises:
        DivergenceError: At the first step whose loss, gradients or BatchNorm statistics are NaN or infinite
            (accelerators: within 20 steps). Nothing of it is saved.
        TrainingInterruptedError: If a callback asks to stop; the step in progress is finished and saved.
        UsageError: At the first record, if the model, the data or this machine do not allow what the recipe asks for.
    """
    setup = TrainSetup.build(model, dataset, recipe, preprocess)
    best = BestWeights(recipe)
    checkpointer = Checkpointer(checkpoints, setup, best)
    state = checkpointer.restore()
    schedule = Schedule(recipe, state, len(setup.loader), setup.shape)
    metrics = RunningMetrics(state, setup.device, setup.world)
    accumulate_gradients = GradientAccumulator(setup, state)
    timer = TrainClock(state, setup.world, clock)

    def snapshot() -> None:
        if schedule.snapshot_due:
            with timer.paused(), setup.ema.swapped_in():
                hooks.on_snapshot(state.step, model)

    with CallbackList(callbacks) as hooks:
        hooks.on_train_start(state.records)
        yield from list(state.records)
        if state.step == 0:
            snapshot()
            checkpointer.save(state, metrics)

        while not schedule.finished:
            model.train()
            hooks.on_epoch_start(schedule.epoch, schedule.epochs)
            timer.start_epoch()
            stop = setup.world.any(hooks.should_stop(state.step))
            for images, labels, count in setup.batches(state.step):
                if stop:
                    checkpointer.save(state, metrics)
                    raise TrainingInterruptedError(f"stopped at {schedule.position}")

                images = downscale(images, schedule.image_size)
                loss, logits = accumulate_gradients(images, labels)  # forward, loss, backward
                setup.average_gradients(loss, len(images))
                setup.finite.check(loss, state.step)
                setup.clip()
                lr = schedule.lr
                setup.optimizer.step(lr)
                setup.ema.update(state.step)
                state.step += 1
                stop = timer.tick(hooks.should_stop(state.step))
                metrics.update(loss, logits, labels, count)
                snapshot()
                if schedule.log_due:
                    hooks.on_step_end(make_progress(state, schedule, metrics, timer))
                if schedule.finished:
                    break
                if schedule.save_due:
                    checkpointer.save(state, metrics)
            timer.tick()
            with timer.paused(), setup.ema.swapped_in():
                record = make_record(setup, state, metrics, lr)
                best.update(record, state, model)
                hooks.on_epoch_end(record, model)
            timer.tick()
            metrics.reset()
            checkpointer.save(state, metrics)
            yield record
    best.restore(model, setup.ema)


def make_progress(state: TrainState, schedule: Schedule, metrics: RunningMetrics, timer: TrainClock) -> Progress:
    """Return position, running metrics and estimated time left; an accelerator waits."""
    loss, accuracy = metrics.compute()
    throughput = metrics.images / max(timer.epoch_seconds, 1e-9)
    epoch = state.step / schedule.steps_per_epoch
    left, done = schedule.eta(timer), schedule.epoch_done(timer)
    return Progress(state.step, schedule.total, epoch, loss, accuracy, throughput, left, done)


def make_record(setup: TrainSetup, state: TrainState, metrics: RunningMetrics, lr: float) -> EpochRecord:
    """Evaluate the model and return the record of the epoch; DivergenceError if a loss is NaN or infinite."""
    train_loss, train_acc = metrics.compute()
    columns: dict[str, float] = {}
    for name, score in setup.evaluate().items():
        if not math.isfinite(score.loss):
            raise divergence_error("the loss", state.step, setup.recipe)
        columns |= {f"{name}_loss": score.loss, f"{name}_acc": score.accuracy}
    return EpochRecord(len(state.records) + 1, round(state.seconds, 3), lr, train_loss, train_acc, **columns)
