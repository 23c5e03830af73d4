"""The loop: it learns, tells what it did, stops anywhere and goes on bit for bit, chooses by validation alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens.data.dataset import Dataset, IndexIds, Split
from convlens.data.images import InputStyle
from convlens.data.loader import BatchLoader
from convlens.data.preprocess import Preprocess
from convlens.data.resize import downscale
from convlens.distributed.process_group import World
from convlens.errors import ConvlensError, DivergenceError, TrainingInterruptedError, UsageError
from convlens.evaluation.metrics import Scores, evaluate
from convlens.models import ConvNet, create_model
from convlens.training import build, grad_accum
from convlens.training.callbacks import Callback, StopWhen
from convlens.training.checkpoint import CheckpointStore
from convlens.training.loop import fit
from convlens.training.metrics import Progress, RunningMetrics
from convlens.training.precision import choose_precision
from convlens.training.recipe import Recipe
from convlens.training.state import EpochRecord, TrainState

CPU = torch.device("cpu")
SIDE = 8


def make_split(count: int, seed: int) -> Split:
    """Return noise with one bright quadrant: the upper left, upper right, lower left or lower right, by class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = label // 2 * 4, label % 2 * 4
        image[:, top : top + 4, left : left + 4] += 100
    return Split(images=images, labels=labels, ids=[str(i) for i in range(count)])


def make_dataset(train: int = 36, validation: int = 12, test: int = 8) -> Dataset:
    held_out = make_split(validation, 1) if validation else None
    return Dataset(
        name="toy", classes=tuple("abcd"), train=make_split(train, 0), test=make_split(test, 2), validation=held_out
    )


def make_recipe(**changes: Any) -> Recipe:
    """Return a recipe of three epochs of five steps on :func:`make_dataset`."""
    base = Recipe(epochs=3, batch_size=8, lr=0.05, val_fraction=0.0, device="cpu", threads=1, precision="fp32")
    return base.override(**changes)


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("small", channels=1, image_height=SIDE, image_width=SIDE, classes=4, width=4)


class DropoutNet(ConvNet):
    """A net that draws random numbers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(6, 6, 3))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * 36, 4))


def make_dropout_net() -> nn.Module:
    torch.manual_seed(0)
    return DropoutNet()


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Say whether two sets of tensors are equal, to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def timeless(records: Sequence[EpochRecord]) -> list[EpochRecord]:
    return [replace(record, seconds=0.0) for record in records]


def train(net: nn.Module, dataset: Dataset, recipe: Recipe, **options: Any) -> list[EpochRecord]:
    return list(fit(net, dataset, recipe, **options))


class StopAt(Callback):
    """Stops a training as Ctrl-C does: from one step on, for good."""

    def __init__(self, step: int) -> None:
        self.step = step

    def should_stop(self, step: int) -> bool:
        return step >= self.step


# learning, and the records


def test_it_learns_what_can_be_separated() -> None:
    net, dataset = make_net(), make_dataset()
    records = train(net, dataset, make_recipe(epochs=8))
    assert [record.epoch for record in records] == list(range(1, 9))
    assert records[-1].train_loss < 0.1 * records[0].train_loss
    assert records[-1].train_acc == records[-1].val_acc == 1.0
    normalise = Preprocess.fit(dataset.train.images, dataset.input_style).normalizer()
    assert evaluate(net, dataset.test, normalise).accuracy == 1.0


def test_a_record_is_yielded_as_soon_as_its_epoch_is_over() -> None:
    net = make_net()
    epochs = fit(net, make_dataset(), make_recipe())
    before = state_of(net)
    first = next(epochs)
    assert (first.epoch, first.lr > 0, first.seconds > 0) == (1, True, True)
    assert not same(state_of(net), before)
    middle = state_of(net)
    assert next(epochs).epoch == 2
    assert not same(state_of(net), middle)
    assert next(epochs).epoch == 3
    with pytest.raises(StopIteration):
        next(epochs)


def test_what_a_record_holds() -> None:
    records = train(make_net(), make_dataset(), make_recipe(lr_schedule="constant"))
    for record in records:
        assert record.lr == 0.05
        assert 0 <= record.train_acc <= 1
        assert record.val_loss is not None and record.val_acc is not None
        assert record.test_loss is None and record.test_acc is None
    assert [r.seconds for r in records] == sorted(r.seconds for r in records)
    watched = train(make_net(), make_dataset(validation=0), make_recipe(log_test_metrics=True))
    assert all(r.val_loss is None and r.val_acc is None for r in watched)
    assert all(r.test_loss is not None and r.test_acc is not None for r in watched)


def test_figures_of_training_are_those_of_the_batches() -> None:
    # without a step that changes anything, the epoch's mean is that of the whole split, last small batch included
    net, dataset = make_dropout_net(), make_dataset()
    for module in net.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    normalise = Preprocess.fit(dataset.train.images, dataset.input_style).normalizer()
    expected = evaluate(net, dataset.train, normalise)
    (record,) = train(net, dataset, make_recipe(epochs=1, lr=0.0))
    assert record.train_loss == pytest.approx(expected.loss, rel=1e-5)
    assert record.train_acc == pytest.approx(expected.accuracy)


def test_validation_is_carved_from_train_only() -> None:
    dataset = make_dataset(validation=0)
    (record,) = train(make_net(), dataset, make_recipe(epochs=1, val_fraction=0.25))
    assert record.val_acc is not None and (record.val_acc * 8) % 1 == 0  # two images of each class
    assert len(dataset.train) == 36 and dataset.validation is None


@pytest.mark.parametrize(("max_steps", "epochs"), [(1, 1), (4, 1), (5, 1), (6, 2), (12, 3), (15, 3)])
def test_steps_need_not_be_whole_epochs(max_steps: int, epochs: int, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    records = train(make_net(), make_dataset(), make_recipe(max_steps=max_steps), checkpoints=store)
    assert [record.epoch for record in records] == list(range(1, epochs + 1))
    saved = store.load()
    assert saved is not None and saved[0].step == max_steps


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    dataset = make_dataset()
    marked = replace(dataset.train, labels=torch.arange(36))

    def keep(x: Tensor, y: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
        return x, y

    normalise = Preprocess.fit(dataset.train.images, dataset.input_style).normalizer()

    def orders(seed: int) -> list[list[int]]:
        batches = BatchLoader(marked, 8, normalise, seed=seed, augment=keep)
        assert len(batches) == 5
        return [[row for i in range(5) for row in batches(epoch, i)[1].tolist()] for epoch in range(3)]

    first = orders(0)
    assert all(sorted(order) == list(range(36)) for order in first)
    assert first[0] != first[1] != first[2] != first[0]
    assert orders(0) == first
    assert orders(1) != first
    # a batch is a function of (seed, epoch, step): asked for out of turn it is the same
    batches = BatchLoader(marked, 8, normalise, seed=0, augment=keep)
    assert batches(2, 4)[1].tolist() == first[2][32:]
    assert batches(0, 1)[1].tolist() == first[0][8:16]


@pytest.mark.parametrize("model", ["small", "whitened", "residual"])
def test_a_last_batch_of_one_image(model: str) -> None:
    # 33 = 4 * 8 + 1, and of 8x8 pixels the net "whitened" has one pixel left where its BatchNorm counts
    torch.manual_seed(0)
    # oneDNN corrupts the heap on CPUs with AVX2 only, in 1x1 convolutions of stride 2 with fewer than 8 channels
    width = 8 if model == "residual" else 4
    net = create_model(model, channels=1, image_height=SIDE, image_width=SIDE, classes=4, width=width)
    records = train(net, make_dataset(train=33), make_recipe(epochs=1))
    assert math.isfinite(records[0].train_loss)


def test_it_asks_for_freed_memory_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(grad_accum, "retain_freed_memory", lambda: asked.append(True))
    train(make_net(), make_dataset(), make_recipe(epochs=1))
    assert asked == [True]


def test_it_does_not_keep_memory_that_did_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(grad_accum, "retain_freed_memory", lambda: asked.append("keep"))
    monkeypatch.setattr(grad_accum, "release_memory", lambda: asked.append("return"))

    def short(net: nn.Module, arguments: tuple[Tensor]) -> None:
        if net.training and len(arguments[0]) > 4:
            raise MemoryError

    net = make_net()
    net.register_forward_pre_hook(short)
    train(net, make_dataset(), make_recipe(epochs=1))
    assert asked == ["return"]


def test_it_gives_back_what_it_kept_when_a_later_step_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(grad_accum, "retain_freed_memory", lambda: asked.append("keep"))
    monkeypatch.setattr(grad_accum, "release_memory", lambda: asked.append("return"))

    def short(net: nn.Module, arguments: tuple[Tensor]) -> None:
        if net.training and len(arguments[0]) > 4 and arguments[0].shape[-1] == SIDE:
            raise MemoryError

    net = make_net()
    net.register_forward_pre_hook(short)
    train(net, make_dataset(), make_recipe(epochs=2, initial_size=SIDE // 2, initial_size_fraction=0.5))
    assert asked == ["keep", "return"]


# the sums of an epoch


def test_sums_do_not_depend_on_when_somebody_asks() -> None:
    torch.manual_seed(0)
    sizes = (7, 11, 7, 7, 3)
    batches = [(torch.rand(()) * 0.1**i, torch.randn(n, 3), torch.randint(0, 3, (n,)), n) for i, n in enumerate(sizes)]
    states = []
    for asked in ((), (0, 1, 2, 3), (1, 2)):
        state = TrainState(grad_accum_steps=1, loss_sum=0.1, correct=4, seen=9)
        metrics = RunningMetrics(state, CPU, World())
        for index, batch in enumerate(batches):
            metrics.update(*batch)
            if index in asked:
                metrics.compute()
        metrics.flush()
        states.append((state.loss_sum, state.correct, state.seen))
    assert states[0] == states[1] == states[2]
    right = sum(int((logits.argmax(dim=1) == labels).sum()) for _, logits, labels, _ in batches)
    assert states[0][1:] == (4 + right, 9 + sum(sizes))
    assert states[0][0] == pytest.approx(0.1 + sum(float(loss) * n for loss, *_, n in batches))


# the same bits


def test_same_seed_same_bits_and_other_seed_other_bits() -> None:
    def run(seed: int) -> tuple[list[EpochRecord], dict[str, Tensor]]:
        net = make_net()
        records = train(net, make_dataset(), make_recipe(seed=seed, translate=1, rotation=5.0))
        return timeless(records), state_of(net)

    first, again, other = run(0), run(0), run(1)
    assert first[0] == again[0] and same(first[1], again[1])
    assert first[0] != other[0] and not same(first[1], other[1])


def test_the_global_generator_does_not_matter() -> None:
    nets = []
    for seed in (5, 6):
        net = make_dropout_net()
        torch.manual_seed(seed)
        train(net, make_dataset(), make_recipe(mixup=0.4))
        nets.append(state_of(net))
    assert same(*nets)


RESUMED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "sgd": (make_net, {"nesterov": True, "weight_decay": 1e-3, "warmup_fraction": 0.2}),
    "adamw": (make_net, {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.01, "lr_schedule": "cosine"}),
    "muon": (make_net, {"optimizer": "muon", "lr": 0.1, "nesterov": True, "initial_size": 5, "hflip": True}),
    "adam": (make_net, {"optimizer": "adam", "lr": 0.003, "lr_schedule": "one-cycle"}),
    "ema_decay": (make_net, {"ema_decay": 0.9}),
    "augmentation": (
        make_net,
        {"translate": 2, "rotation": 10.0, "scale": 0.1, "hflip": True, "cutout": 3, "mixup": 0.3},
    ),
    "cutmix": (make_net, {"cutmix": 1.0, "center_crop_prob": 0.5, "color_jitter": 0.2, "label_smoothing": 0.1}),
    "dropout": (make_dropout_net, {"max_grad_norm": 0.5}),
    "best": (make_net, {"restore_best": True, "ema_decay": 0.8, "log_test_metrics": True}),
    "partial epoch": (make_net, {"max_steps": 13, "lr_schedule": "step", "lr_step_size": 1}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_stopping_anywhere_and_resuming_changes_no_bit(case: str, tmp_path: Path) -> None:
    make, options = RESUMED[case]
    dataset, recipe = make_dataset(), make_recipe(**options)
    whole_net, whole_store = make(), CheckpointStore(tmp_path / "whole")
    whole_records = train(whole_net, dataset, recipe, checkpoints=whole_store)
    whole = whole_store.load()
    assert whole is not None

    # stopped before and behind the first step, in mid-epoch, at the last step of an epoch (5), right behind it, later
    store = CheckpointStore(tmp_path / "grad_accum_steps")
    for stop in (0, 1, 2, 5, 6, 9):
        yielded: list[EpochRecord] = []
        with pytest.raises(TrainingInterruptedError, match=f"^stopped at step {stop} of "):
            for record in fit(make(), dataset, recipe, checkpoints=store, callbacks=[StopAt(stop)]):
                yielded.append(record)
        assert [record.epoch for record in yielded] == list(range(1, stop // 5 + 1))
        saved = store.load()
        assert saved is not None and saved[0].step == stop
    net = make()
    records = train(net, dataset, recipe, checkpoints=store)
    parts = store.load()
    assert parts is not None
    clockless = {"seconds": 0.0, "elapsed": 0.0, "records": []}

    assert timeless(records) == timeless(whole_records)
    assert same(state_of(net), state_of(whole_net))
    assert same(parts[1], whole[1])
    if recipe.momentum:
        assert any(key.startswith("optimizer.") for key in parts[1])
    assert replace(parts[0], **clockless) == replace(whole[0], **clockless)


def test_stopping_at_every_step_in_turn(tmp_path: Path) -> None:
    dataset, recipe, store = make_dataset(), make_recipe(epochs=2, ema_decay=0.9), CheckpointStore(tmp_path)
    whole = make_net()
    expected = train(whole, dataset, recipe)
    for stop in range(10):
        with pytest.raises(TrainingInterruptedError, match=f"^stopped at step {stop} of 10$") as caught:
            train(make_net(), dataset, recipe, checkpoints=store, callbacks=[StopAt(stop)])
        assert caught.value.exit_code == 130
    net = make_net()
    records = train(net, dataset, recipe, checkpoints=store)
    assert timeless(records) == timeless(expected)
    assert same(state_of(net), state_of(whole))


def test_stopping_without_a_store() -> None:
    with pytest.raises(TrainingInterruptedError, match="^stopped at step 7 of 15$"):
        train(make_net(), make_dataset(), make_recipe(), callbacks=[StopAt(7)])


def test_a_stop_at_the_very_last_step_comes_too_late() -> None:
    net, whole = make_net(), make_net()
    records = train(net, make_dataset(), make_recipe(), callbacks=[StopAt(15)])
    assert timeless(records) == timeless(train(whole, make_dataset(), make_recipe()))
    assert same(state_of(net), state_of(whole))


def test_a_finished_training_tells_its_records_again_and_does_nothing(tmp_path: Path) -> None:
    dataset, recipe, store = make_dataset(), make_recipe(restore_best=True), CheckpointStore(tmp_path / "store")
    first = make_net()
    records = train(first, dataset, recipe, checkpoints=store)
    files = {path: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    again = make_net(seed=1)
    assert train(again, dataset, recipe, checkpoints=store) == records
    assert same(state_of(again), state_of(first))
    assert {path: path.read_bytes() for path in (tmp_path / "store").iterdir()} == files


# choosing


def script(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> list[dict[str, Tensor]]:
    """Let the validation give these accuracies, epoch by epoch; return the list of the weights that were measured."""
    seen: list[dict[str, Tensor]] = []

    def scripted(net: nn.Module, *_: Any, **__: Any) -> Scores:
        seen.append(state_of(net))
        return Scores(1.0, accuracies[len(seen) - 1])

    monkeypatch.setattr(build, "evaluate", scripted)
    return seen


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize(("restore_best", "kept"), [(True, 1), (False, 2)])
def test_which_epochs_weights_are_kept(
    restore_best: bool, kept: int, ema_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = script(monkeypatch, [0.5, 0.9, 0.7])
    net = make_net()
    train(net, make_dataset(), make_recipe(restore_best=restore_best, ema_decay=ema_decay))
    assert len(seen) == 3
    assert [same(state_of(net), weights) for weights in seen] == [i == kept for i in range(3)]


def test_of_equal_epochs_the_lower_loss_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [Scores(0.8, 0.9), Scores(0.3, 0.9), Scores(0.5, 0.9)]
    seen: list[dict[str, Tensor]] = []

    def scripted(net: nn.Module, *_: Any, **__: Any) -> Scores:
        seen.append(state_of(net))
        return scores[len(seen) - 1]

    monkeypatch.setattr(build, "evaluate", scripted)
    net = make_net()
    train(net, make_dataset(), make_recipe(restore_best=True))
    assert [same(state_of(net), weights) for weights in seen] == [False, True, False]


@pytest.mark.parametrize(
    ("accuracies", "patience", "epochs"),
    [
        ([0.5, 0.6, 0.6, 0.5, 0.9, 0.9], 2, 4),
        ([0.5, 0.4, 0.6, 0.5, 0.4, 0.3], 2, 5),
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.4], 1, 2),
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.4], 0, 6),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 1, 6),
    ],
)
def test_patience(
    accuracies: list[float], patience: int, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, accuracies)
    recipe, store = make_recipe(epochs=6, patience=patience), CheckpointStore(tmp_path)
    assert len(train(make_net(), make_dataset(), recipe, checkpoints=store)) == epochs
    # what has ended is not taken up again
    monkeypatch.setattr(build, "evaluate", None)
    assert len(train(make_net(), make_dataset(), recipe, checkpoints=store)) == epochs


@pytest.mark.parametrize("choice", [{"patience": 1}, {"restore_best": True}])
def test_without_validation_there_is_nothing_to_choose_by(choice: dict[str, Any]) -> None:
    recipe = make_recipe(log_test_metrics=True, **choice)
    with pytest.raises(UsageError, match="choose by validation images; set `val_fraction` above 0$"):
        train(make_net(), make_dataset(validation=0), recipe)


@pytest.mark.parametrize("restore_best", [True, False])
def test_nothing_is_chosen_by_the_test_split(restore_best: bool) -> None:
    # a test split turned upside down changes what is watched, and nothing else
    recipe = make_recipe(restore_best=restore_best, log_test_metrics=True, patience=2, epochs=5, ema_decay=0.8)
    honest = make_dataset()
    turned = replace(honest, test=replace(honest.test, labels=3 - honest.test.labels))
    unwatched = recipe.override(log_test_metrics=False)
    results = []
    for dataset, rules in ((honest, recipe), (turned, recipe), (honest, unwatched)):
        net = make_net()
        results.append((train(net, dataset, rules), state_of(net)))
    (first, weights), (second, other_weights), (third, third_weights) = results
    assert same(weights, other_weights) and same(weights, third_weights)
    blank = {"test_loss": None, "test_acc": None, "seconds": 0.0}
    assert [replace(r, **blank) for r in first] == [replace(r, **blank) for r in second] == timeless(third)
    assert [r.test_acc for r in first] != [r.test_acc for r in second]


def test_averaged_weights_are_what_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = script(monkeypatch, [0.5, 0.6, 0.7])
    net, store = make_net(), CheckpointStore(tmp_path)
    averages, own = [], []
    for _ in fit(net, make_dataset(), make_recipe(ema_decay=0.9), checkpoints=store):
        saved = store.load()
        assert saved is not None
        tensors = saved[1]
        averages.append({k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")})
        own.append({k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})
    for measured, average, weights in zip(seen, averages, own, strict=True):
        assert same({key: measured[key] for key in average}, average)
        assert not same({key: weights[key] for key in average}, average)
    assert same({key: state_of(net)[key] for key in averages[-1]}, averages[-1])


def test_average_by_hand() -> None:
    from convlens.training.ema import EMA

    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
        average = EMA(net, 0.9)
        net.weight.fill_(2.0)
        average.update(0)  # early on the decay is (1 + 0) / (10 + 0)
        assert average.weights["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
        average.update(10**6)
        assert average.weights["weight"].item() == pytest.approx(0.9 * 1.9 + 0.1 * 2)
    with average.swapped_in():
        assert net.weight.item() == pytest.approx(1.91)
    assert net.weight.item() == 2.0


# what is refused, and what goes wrong


def test_a_loss_that_is_no_number_ends_the_training_with_advice() -> None:
    with pytest.raises(DivergenceError) as caught:
        train(make_dropout_net(), make_dataset(), make_recipe(lr=1e15, lr_schedule="constant"))
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert message.startswith("the loss is NaN or infinite (at step ")
    assert "try a lower `lr` (now 1e+15)" in message
    assert "`warmup_fraction`" in message and "`max_grad_norm` of 1" in message


@pytest.mark.parametrize(("images", "weight_decay"), [(0, 1000.0), (12, 1000.0), (12, 0.0)])
def test_a_net_that_the_very_last_step_ruins_is_not_passed_off_as_trained(
    images: int, weight_decay: float, tmp_path: Path
) -> None:
    # the loss of a step is that of the weights before it: of one step alone it is always a number; with the decay
    # the weights become infinite, without it they stay numbers and what the net says does not
    recipe = make_recipe(max_steps=1, lr=1e38, momentum=0.0, weight_decay=weight_decay, lr_schedule="constant")
    with pytest.raises(DivergenceError, match="try a lower `lr`"):
        train(make_net(), make_dataset(validation=images), recipe, checkpoints=CheckpointStore(tmp_path))


def test_nll_needs_log_probabilities() -> None:
    with pytest.raises(UsageError, match="^`loss` nll needs a model that ends in log-softmax, and small does not$"):
        train(make_net(), make_dataset(), make_recipe(loss="nll"))


# checkpoints


def test_two_checkpoints_are_kept_and_no_scrap(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    for record in fit(make_net(), make_dataset(), make_recipe(epochs=4), checkpoints=store):
        files = sorted(path.name for path in (tmp_path / "store").iterdir())
        assert files[-2:] == [f"step-{5 * record.epoch:08d}.{kind}" for kind in ("json", "safetensors")]
        assert len(files) == 4
    assert files[0] == "step-00000015.json"


def test_what_a_kill_behind_the_last_save_left_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    dataset, recipe, store = make_dataset(), make_recipe(epochs=4), CheckpointStore(folder)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "clear", lambda *_: None)  # killed before it came to that, every time
        records = train(make_net(), dataset, recipe, checkpoints=store)
    (folder / ".step-00000020.json.scrap").write_text("{")
    assert len(list(folder.iterdir())) > 5
    assert train(make_net(), dataset, recipe, checkpoints=store) == records
    names = ["step-00000015.json", "step-00000015.safetensors", "step-00000020.json", "step-00000020.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").load() is None


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    train(make_net(), make_dataset(), make_recipe(epochs=2, lr_schedule="constant"), checkpoints=store)
    newest, older = tmp_path / "step-00000010.safetensors", tmp_path / "step-00000005.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    damage = f"the checkpoint {newest} is damaged: its SHA-256 is not the one that was written"
    net, whole = make_net(), make_net()
    records = train(net, make_dataset(), make_recipe(epochs=3, lr_schedule="constant"), checkpoints=store)
    assert caplog.messages == [f"{damage}; resuming from step 5 instead of 10"]
    assert timeless(records) == timeless(train(whole, make_dataset(), make_recipe(epochs=3, lr_schedule="constant")))
    for path in (newest, tmp_path / "step-00000015.safetensors", older):
        path.unlink(missing_ok=True)
    with pytest.raises(
        ConvlensError, match=r"^the checkpoint .* cannot be read: No such file.*no whole checkpoint is left"
    ):
        store.load()


@pytest.mark.parametrize("content", ['{"format": 1}', '{"file": 3, "sha256": "", "state": []}', "[]", "{"])
def test_a_damaged_manifest_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "step-00000005.json").write_text(content)
    with pytest.raises(ConvlensError, match=str(tmp_path)):
        CheckpointStore(tmp_path).load()


def test_a_crash_while_writing_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "store")
    epochs = fit(make_net(), make_dataset(), make_recipe(), checkpoints=store)
    next(epochs)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("convlens.system.files.os.replace", fail)
        with pytest.raises(ConvlensError, match="No space left on device; nothing was changed"):
            next(epochs)
    saved = store.load()
    assert saved is not None and saved[0].step == 5
    assert sorted(path.name for path in (tmp_path / "store").iterdir() if path.name.startswith(".")) == []
    net, whole = make_net(), make_net()
    records = train(net, make_dataset(), make_recipe(), checkpoints=store)
    assert timeless(records) == timeless(train(whole, make_dataset(), make_recipe()))
    assert same(state_of(net), state_of(whole))


# precision


def test_precision_is_chosen_among_two() -> None:
    net = make_net()
    assert choose_precision(Recipe(epochs=1), CPU, net, (1, 8, 8)) in ("fp32", "bf16")
    assert [choose_precision(Recipe(epochs=1, precision=name), CPU, net, (1, 8, 8)) for name in ("fp32", "bf16")] == [
        "fp32",
        "bf16",
    ]


def test_bf16_trains_too() -> None:
    net, plain = make_net(), make_net()
    records = train(net, make_dataset(), make_recipe(epochs=6, precision="bf16"))
    train(plain, make_dataset(), make_recipe(epochs=6))
    assert records[-1].train_loss < 0.3 * records[0].train_loss
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    assert not same(state_of(net), state_of(plain)), "bf16 was asked for and not used"


# smaller images at first


@pytest.mark.parametrize(
    ("shape", "size", "expected"), [((8, 8), 4, (4, 4)), ((6, 12), 6, (3, 6)), ((5, 5), 9, (5, 5))]
)
def test_shrink(shape: tuple[int, int], size: int, expected: tuple[int, int]) -> None:
    images = torch.rand(3, 2, *shape)
    small = downscale(images, size)
    assert tuple(small.shape) == (3, 2, *expected)
    assert torch.allclose(small.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=0.1)


def test_small_images_come_first() -> None:
    net, sides = make_net(), list[int]()
    net.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[3]) if net.training else None)
    train(net, make_dataset(), make_recipe(max_steps=10, initial_size=5, initial_size_fraction=0.4))
    assert sides == [5] * 4 + [8] * 6


class Timed(nn.Module):
    """A net that takes as many seconds for a step of training as an image has pixels; it looks at its own clock."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.clock = make_net(), 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.clock += x.shape[2] * x.shape[3] * self.training
        return self.net(x)  # type: ignore[no-any-return]


class Listener(Callback):
    """Writes down how many seconds are estimated to be left."""

    def __init__(self) -> None:
        self.left: list[float] = []

    def on_step_end(self, progress: Progress) -> None:
        self.left.append(progress.eta_seconds)


WHOLE, SMALL = SIDE**2, 4**2  # seconds of a step of Timed


def test_the_time_that_is_left_knows_that_whole_images_take_longer(tmp_path: Path) -> None:
    # five steps an epoch, and progress is reported at the end of each; the first six of the 15 steps are small
    recipe = make_recipe(max_steps=15, initial_size=4, initial_size_fraction=0.37)
    net, listener = Timed(), Listener()
    list(fit(net, make_dataset(), recipe, callbacks=[listener], clock=lambda: net.clock))
    assert listener.left == pytest.approx([SMALL + 9 * WHOLE, 5 * WHOLE, 0])

    # the same if it is stopped in the middle of the second epoch and resumed, on a machine of half the speed
    net, store = Timed(), CheckpointStore(tmp_path)
    stop = StopWhen(lambda: net.clock > 5 * SMALL + WHOLE)
    with pytest.raises(TrainingInterruptedError):
        list(fit(net, make_dataset(), recipe, checkpoints=store, callbacks=[stop], clock=lambda: net.clock))
    resumed, listener = Timed(), Listener()
    list(
        fit(
            resumed,
            make_dataset(),
            recipe,
            checkpoints=store,
            callbacks=[listener],
            clock=lambda: 2 * resumed.clock,
        )
    )
    assert listener.left == pytest.approx([2 * 5 * WHOLE, 0])


def test_with_a_time_limit_the_time_that_is_left_is_the_clocks() -> None:
    net, listener = Timed(), Listener()
    recipe = make_recipe(epochs=None, max_seconds=12 * WHOLE)
    list(fit(net, make_dataset(), recipe, callbacks=[listener], clock=lambda: net.clock))
    assert listener.left == pytest.approx([7 * WHOLE, 2 * WHOLE, 0])


@pytest.mark.parametrize("fraction", [0.0, 0.6, 1.0])
def test_with_a_time_limit_as_many_steps_are_small_and_the_learning_rate_falls_as_evenly(fraction: float) -> None:
    net, sides = Timed(), list[int]()
    net.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[3]) if net.training else None)
    recipe = make_recipe(epochs=None, max_seconds=100 * WHOLE, initial_size=4, initial_size_fraction=fraction)
    records = list(fit(net, make_dataset(), recipe, clock=lambda: net.clock))
    assert net.clock == pytest.approx(100 * WHOLE, rel=0.02)
    assert sides == sorted(sides)  # the small ones first
    assert sides.count(4) / len(sides) == pytest.approx(fraction, abs=0.02)
    done = [5 * record.epoch / len(sides) for record in records[:-1]]  # whole epochs of five steps
    assert [record.lr / recipe.lr for record in records[:-1]] == pytest.approx([1 - part for part in done], abs=0.05)


class Log(Callback):
    """Writes down which hooks are called."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def on_train_start(self, records: Sequence[EpochRecord]) -> None:
        self.calls.append(("train", len(records)))

    def on_epoch_start(self, epoch: int, epochs: int | None) -> None:
        self.calls.append(("epoch", epoch, epochs))

    def on_step_end(self, progress: Progress) -> None:
        self.calls.append(("step", progress.step, progress.epoch_done))

    def on_snapshot(self, step: int, model: nn.Module) -> None:
        self.calls.append(("snapshot", step))

    def on_epoch_end(self, record: EpochRecord, model: nn.Module) -> None:
        self.calls.append(("end of epoch", record.epoch))

    def on_train_end(self) -> None:
        self.calls.append("end")


def test_every_hook_is_called_in_its_place(tmp_path: Path) -> None:
    recipe, store, log = make_recipe(epochs=2), CheckpointStore(tmp_path), Log()
    with pytest.raises(TrainingInterruptedError):
        train(make_net(), make_dataset(), recipe, checkpoints=store, callbacks=[log, StopAt(7)])
    first = [("epoch", 1, 2), *(("snapshot", step) for step in (1, 2, 4, 5)), ("step", 5, 1.0), ("end of epoch", 1)]
    assert log.calls == [("train", 0), ("snapshot", 0), *first, ("epoch", 2, 2), "end"]
    log = Log()
    train(make_net(), make_dataset(), recipe, checkpoints=store, callbacks=[log])
    second = [("epoch", 2, 2), ("snapshot", 10), ("step", 10, 1.0), ("end of epoch", 2)]
    assert log.calls == [("train", 1), *second, "end"]


def test_the_end_is_told_after_an_error_too() -> None:
    log = Log()
    with pytest.raises(DivergenceError):
        train(make_dropout_net(), make_dataset(), make_recipe(lr=1e15, lr_schedule="constant"), callbacks=[log])
    assert log.calls[-1] == "end"


def test_no_gradient_of_the_images_is_computed() -> None:
    net, asked = make_net(), list[bool]()
    net.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].requires_grad) if net.training else None)
    train(net, make_dataset(), make_recipe(max_steps=3, mixup=0.5, translate=1, initial_size=5))
    assert asked == [False] * 3


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_small_images_are_refused_for_nets_of_one_size(precision: str) -> None:
    torch.manual_seed(0)
    net = create_model("fashion-2conv", channels=1, image_height=8, image_width=8, classes=4)
    recipe = make_recipe(model="fashion-2conv", initial_size=4, precision=precision)
    with pytest.raises(UsageError, match="^`initial_size` is 4: the model fashion-2conv does not take"):
        train(net, make_dataset(), recipe)


def test_a_checkpoint_of_another_version_is_refused_in_a_line(tmp_path: Path) -> None:
    """Such as one of the time when the optimizers were PyTorch's."""
    store = CheckpointStore(tmp_path)
    train(make_net(), make_dataset(), make_recipe(), checkpoints=store)
    saved = store.load()
    assert saved is not None
    state, tensors = saved
    old = {key.replace("optimizer.", "optimizer.0."): value for key, value in tensors.items()}
    store.save(replace(state, step=99), old)
    with pytest.raises(ConvlensError, match="^the checkpoint does not fit this version of convlens: .*; train anew$"):
        train(make_net(), make_dataset(), make_recipe(), checkpoints=store)


def test_a_fresh_net_sees_images_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of a folder lie class by class; whitening by the first of them would know one class only."""
    seen: list[Tensor] = []
    monkeypatch.setattr(ConvNet, "initialize", lambda net, x: seen.append(x))
    images = torch.arange(250, dtype=torch.uint8).repeat_interleave(20)[:, None, None, None].expand(-1, 1, 100, 100)
    train = Split(images=images, labels=torch.arange(5000) % 2, ids=IndexIds(5000))
    dataset = Dataset(name="toy", classes=("a", "b"), train=train, test=train)
    preprocess = Preprocess(1, 100, 100, (0.0,), (1 / 255,), InputStyle())
    build.make_model(build.model_config(make_recipe(model="small"), dataset), dataset, preprocess)
    assert len(seen[0]) == 100
    assert seen[0][0].unique().tolist() == [0] and seen[0][-1].unique().tolist() == [249]
    assert len(seen[0][:, 0, 0, 0].unique()) == 100
