"""The training loop, from top to bottom: schedule, batch, forward, backward, step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn

from convlens.data.dataset import Dataset
from convlens.data.loader import BatchLoader
from convlens.data.preprocess import Preprocess
from convlens.data.resize import downscale
from convlens.distributed.process_group import init_world
from convlens.distributed.sync_batchnorm import SyncBatchNorm, batchnorm_statistics
from convlens.errors import TrainingInterruptedError, UsageError
from convlens.evaluation.metrics import Scores, evaluate
from convlens.system.device import select_device
from convlens.system.memory import retain_freed_memory
from convlens.system.progress import ProgressBar
from convlens.training.build import freeze, make_augment, make_clip, make_loss, make_optimizer
from convlens.training.callbacks import Callback
from convlens.training.checkpoint import CheckpointStore, from_tensors, to_tensors
from convlens.training.ema import EMA
from convlens.training.finite import FiniteCheck, check_finite, divergence_error
from convlens.training.grad_accum import accumulate_gradients
from convlens.training.metrics import RunningMetrics
from convlens.training.precision import autocast, choose_precision
from convlens.training.recipe import Recipe
from convlens.training.schedule import equivalent_seconds, learning_rate, work_between
from convlens.training.state import EpochRecord, TrainState

LOG_EVERY_STEPS = 20  # steps between looks at the figures, which make an accelerator wait


def fit(
    net: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    preprocess: Preprocess | None = None,
    store: CheckpointStore | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    watcher: Callback | None = None,
    show_progress: bool = False,
) -> Iterator[EpochRecord]:
    """Train ``net`` in place and yield one EpochRecord an epoch; at the end it holds the weights that were chosen.

    ``net`` takes normalised float images (N, C, H, W) and gives logits (N, K); it is moved to the recipe's device.
    Where the data set has no validation split, the recipe's share of train is held out. The test split is not looked
    at, unless ``recipe.watch_test`` asks for its curve.

    ``preprocess`` normalises the images (by default measured on the training images). With a ``store`` every
    epoch is saved, and every ``recipe.save_every`` steps, and training goes on from what the store holds, bit for
    bit as if it had not been interrupted. When ``should_stop`` says so, the step under way is finished and saved,
    and Interrupted raised. A ``watcher`` is told how it goes. Raises Diverged at the first step whose loss, gradient or
    BatchNorm statistics are not numbers (accelerators are asked every 20 steps), and nothing of it is saved. A caller
    who stops iterating early is left with the raw weights of that moment. In processes that torchrun has started, each
    trains on its part of every batch, and all end with the same weights; the first writes. CPU threads are the
    caller's: ``recipe.threads`` is for :func:`convlens.train`. On a CPU, with glibc, the process keeps the memory that
    it frees from the first step on, if there was enough for that one. Raises UsageError, at the first record, for a
    recipe that the net, the data or this machine cannot follow.
    """
    watcher = watcher or Callback()
    ranks = init_world()
    device = select_device(recipe.device)
    precision = ranks.share(choose_precision(recipe, device, net, dataset.shape))
    dataset = dataset.with_validation(recipe.val_fraction, recipe.seed)
    require_possible(recipe, net, dataset)
    normalise = (preprocess or Preprocess.fit(dataset.train.images, dataset.input_style)).normalizer()
    augment = make_augment(recipe, len(dataset.classes))
    batches = BatchLoader(
        dataset.train,
        recipe.batch_size,
        normalise.to(device),
        seed=recipe.seed,
        augment=augment,
        hflip=recipe.hflip,
        balanced_sampling=recipe.balanced_sampling,
        world=ranks,
    )
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ranks.equalise(net)
    freeze(net, recipe)
    compute_loss, clip = make_loss(recipe, net), make_clip(net, recipe)
    optimizer, average = make_optimizer(net, recipe), EMA(net, recipe.ema_decay)

    together = recipe.sync_batchnorm and ranks.size > 1
    if together and recipe.grad_accum_steps > 1:
        raise UsageError("--sync-batchnorm measures a batch in one go; leave --grad-accum-steps out")
    batchnorm = SyncBatchNorm(net) if together else contextlib.nullcontext()
    state, best = TrainState(grad_accum_steps=recipe.grad_accum_steps), dict[str, Tensor]()

    def save() -> None:
        weights = {f"the weight {k}": v for k, v in net.state_dict().items() if v.is_floating_point()}
        check_finite(weights, state, recipe)
        if not math.isfinite(state.loss_sum):
            raise divergence_error("the loss", state, recipe)
        if store is not None and ranks.first:
            store.save(state, to_tensors(net, optimizer, average, best))

    def forward_backward(images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
        with autocast(precision, device), batchnorm:
            logits = net(images)  # (N, K)
        loss = compute_loss(logits.float(), labels)
        # not backward(share): PyTorch imports SymPy to look at the shape of what it is given, a third of a second
        (loss * share).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), logits.detach()

    saved = store.load() if store is not None else None
    ranks.require_same(saved[0].step if saved else 0, "the step of the last checkpoint")
    if saved:
        state, tensors = saved
        best = from_tensors(tensors, net, optimizer, average)
        if store is not None and ranks.first:
            store.clear(state.step)  # a kill behind the last save left that to us
        yield from state.records
    else:
        watcher.keep(0, net)
        save()

    def count_steps() -> int:
        return recipe.total_steps(len(batches), state.step, equivalent_seconds(recipe, dataset.shape, state.elapsed))

    weights = [p for p in net.parameters() if p.requires_grad]
    statistics = batchnorm_statistics(net)
    numbers = FiniteCheck(net, statistics)
    check_every = 1 if device.type == "cpu" else LOG_EVERY_STEPS
    unkept = device.type == "cpu"
    begun = time.perf_counter() - state.elapsed
    total = count_steps()
    while state.step < total and not state.finished:
        if ranks.agree(should_stop(), 0.0)[0]:
            raise TrainingInterruptedError(f"stopped at {describe_position(recipe, state.step, total)}")
        first_step = state.step
        epoch, first = divmod(first_step, len(batches))
        tally = RunningMetrics(state, device, ranks)
        net.train()
        stopped, before = False, state.seconds
        started = time.perf_counter() - before
        # the last epoch may be a part of one
        steps = min(len(batches), total - epoch * len(batches))
        title = f"epoch {epoch + 1}" + ("" if recipe.max_seconds else f" of {math.ceil(total / len(batches))}")
        whole = work_between(recipe, dataset.shape, total, first_step, first_step + steps - first)
        with ProgressBar(title, whole, shown=show_progress) as meter:
            for index in range(first, len(batches)):
                images, labels = batches(epoch, index)  # (N, C, H, W), (N,) or (N, K)
                if recipe.initial_size and state.step < recipe.initial_size_fraction * total:
                    images = downscale(images, recipe.initial_size)
                lr = learning_rate(recipe, state.step, total, len(batches))
                loss, logits, state.grad_accum_steps = accumulate_gradients(
                    forward_backward, optimizer.zero_grad, images, labels, state.grad_accum_steps, again=not together
                )
                if (
                    unkept and state.grad_accum_steps == recipe.grad_accum_steps
                ):  # a step has shown that there is enough
                    retain_freed_memory()
                    unkept = False
                gradients = [p.grad for p in weights if p.grad is not None]
                ranks.average([loss, *gradients, *statistics.values()], len(images))
                if state.step % check_every == 0:
                    numbers.check(loss, state, recipe)
                clip()
                optimizer.step(lr)
                average.update(state.step)
                state.step += 1
                state.seconds = time.perf_counter() - started
                stopped, state.elapsed = ranks.agree(should_stop(), time.perf_counter() - begun)
                total = count_steps()
                tally.add(loss, logits, labels, batches.size(index))
                if is_snapshot_step(state.step, len(batches), total):
                    paused = time.perf_counter()
                    with average.applied():
                        watcher.keep(state.step, net)
                    started += time.perf_counter() - paused
                ends = index + 1 == len(batches) or state.step >= total
                if state.step % LOG_EVERY_STEPS == 0 or ends:
                    done = work_between(recipe, dataset.shape, total, first_step, state.step)
                    if recipe.max_seconds is not None:  # the clock decides, whatever the steps cost
                        left = max(recipe.max_seconds - state.elapsed, 0.0)
                    else:  # at the pace of this epoch, for that of a machine changes
                        ahead = work_between(recipe, dataset.shape, total, state.step, total)
                        left = (state.seconds - before) / done * ahead
                    progress = tally.describe(state, total, len(batches), state.seconds - before, left)
                    meter.update(done - meter.done, str(progress))
                    watcher.tell(progress)
                if state.step >= total or stopped:
                    break
                if recipe.save_every and state.step % recipe.save_every == 0 and index + 1 < len(batches):
                    tally.store_into(state)
                    save()
        state.seconds = time.perf_counter() - started
        _, state.elapsed = ranks.agree(False, time.perf_counter() - begun)
        total = count_steps()
        tally.store_into(state)
        if stopped and state.step < total and state.step < (epoch + 1) * len(batches):  # in the middle of an epoch
            save()
            raise TrainingInterruptedError(f"stopped at {describe_position(recipe, state.step, total)}")

        scores: dict[str, Scores] = {}
        with average.applied():
            watcher.look(epoch + 1, net)
            watched = {"val": dataset.validation, "test": dataset.test if recipe.log_test_metrics else None}
            for name, split in watched.items():
                if split is not None:
                    cast = autocast(precision, device)
                    score = evaluate(net, split, normalise, batch_size=recipe.batch_size, autocast=cast, ranks=ranks)
                    scores[name] = Scores(*ranks.share([score.loss, score.accuracy]))  # to the last bit
            if not all(math.isfinite(score.loss) for score in scores.values()):
                raise divergence_error("the loss", state, recipe)
            record = make_record(epoch + 1, state, lr, scores)
            # chosen by validation alone; the test split is never looked at here
            if "val" in scores and is_best(record, state):
                state.best_epoch = record.epoch
                if recipe.restore_best:
                    best = {key: value.detach().clone() for key, value in net.state_dict().items()}
        state.records.append(record)
        state.loss_sum, state.correct, state.seen = 0.0, 0, 0
        _, state.elapsed = ranks.agree(False, time.perf_counter() - begun)
        total = count_steps()
        state.finished = 0 < recipe.patience <= record.epoch - state.best_epoch and "val" in scores
        save()
        yield record

    net.load_state_dict({**net.state_dict(), **average.weights, **best})


def require_possible(recipe: Recipe, net: nn.Module, dataset: Dataset) -> None:
    """Raise UsageError for what the recipe asks of the net, or of ``dataset`` (divided already), and cannot have."""
    if dataset.validation is None and (recipe.patience or recipe.restore_best):
        raise UsageError(
            "--patience and --restore-best choose by validation images; set a --val-fraction share above 0"
        )
    make_loss(recipe, net)


def is_snapshot_step(step: int, epoch_steps: int, total: int) -> bool:
    """Say whether the net after ``step`` steps is worth keeping: most happens early."""
    return step >= total or step % epoch_steps == 0 or (step < epoch_steps and step.bit_count() == 1)


def describe_position(recipe: Recipe, step: int, total: int) -> str:
    """Return where a training is; one that is given in seconds has no total that would not change."""
    return f"step {step}" if recipe.max_seconds else f"step {step} of {total}"


def make_record(epoch: int, state: TrainState, lr: float, scores: dict[str, Scores]) -> EpochRecord:
    """Return the record of the epoch that has just ended."""
    columns: dict[str, float] = {}
    for name, score in scores.items():
        columns |= {f"{name}_loss": score.loss, f"{name}_acc": score.accuracy}
    train_loss, train_acc = state.loss_sum / state.seen, state.correct / state.seen
    return EpochRecord(epoch, round(state.seconds, 3), lr, train_loss, train_acc, **columns)


def is_best(record: EpochRecord, state: TrainState) -> bool:
    """Say whether ``record`` has the best validation accuracy so far; of equals, the lower loss."""
    if not state.best_epoch:
        return True
    best = asdict(state.records[state.best_epoch - 1])
    return (record.val_acc or 0, -(record.val_loss or 0)) > (best["val_acc"], -best["val_loss"])
