"""Sweeps: the search space, no use of test images, resuming; learning rate and batch size of lr-find."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

import convlens
from convlens.cli.sweep import confirm_best
from convlens.data.loading import load_dataset
from convlens.errors import ConvlensError, TrainingInterruptedError, UsageError
from convlens.evaluation.significance import SeedComparison
from convlens.run_dir import RunDir
from convlens.sweep import confirm, storage, study, worker
from convlens.sweep.results import best_trial, recipe_file, trial_rows, write_outcome
from convlens.sweep.space import Choice, Range, parse_space
from convlens.sweep.storage import absolute_storage
from convlens.sweep.study import Sweep
from convlens.sweep.worker import Worker
from convlens.training import lr_finder, throughput
from convlens.training.recipe import Recipe
from convlens.training.recipes import RECIPES, get_recipe, read_recipe
from convlens.training.throughput import Throughput

QUICK: dict[str, Any] = {
    "epochs": 1, "width": 4, "batch_size": 16, "val_fraction": 0.25, "device": "cpu", "threads": 1, "precision": "fp32",
    "translate": 0, "lr_schedule": "constant", "warmup_fraction": 0.0,
}  # fmt: skip
FLAGS = [
    word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", str(value))
]  # the same for the command line
LR = ("lr=1e-3..1:log",)


@pytest.fixture
def big() -> str:
    """The path of forty images of 28 pixels, which all nets take."""
    x = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    np.savez("big.npz", x=x, y=np.arange(40) % 2)
    return "big.npz"


@pytest.fixture
def toy() -> str:
    """A file of 100 images of two kinds that are easy to tell apart."""
    random = np.random.default_rng(0)
    y = np.arange(100) % 2
    x = (random.integers(0, 120, (100, 8, 8)) + 100 * y[:, None, None]).astype(np.uint8)
    np.savez("toy.npz", x=x, y=y)
    return "toy.npz"


def run_all(sweep: Sweep) -> list[dict[str, Any]]:
    Worker(sweep, threads=1).run()
    return trial_rows(sweep)


def values_of(rows: list[dict[str, Any]]) -> list[Any]:
    return [(row["state"], row["lr"], row["val_acc"]) for row in rows if row["state"] != "interrupted"]


@given(st.floats(1e-9, 0.5), st.floats(0.6, 100), st.booleans())
def test_a_range_is_read_as_it_is_written(low: float, high: float, log: bool) -> None:
    space = parse_space([f"lr={low!r}..{high!r}" + ":log" * log])
    assert space == {"lr": Range(low, high, log)} == parse_space([f"lr={space['lr']}"])
    assert space["lr"].middle() in space["lr"] and low in space["lr"] and high + 1 not in space["lr"]  # type: ignore[union-attr]


@given(st.lists(st.integers(1, 9999), min_size=2, unique=True))
def test_choices_are_read_as_they_are_written(values: list[int]) -> None:
    space = parse_space([f"batch-size={','.join(map(str, values))}"])
    assert space == {"batch_size": Choice(tuple(values))} == parse_space([f"batch-size={space['batch_size']}"])


def test_the_type_is_that_of_the_field() -> None:
    space = parse_space(["epochs=1..9", "momentum=0..0.9", "hflip=yes,no", "optimizer=sgd,adam", "--kernel-size=3,5"])
    assert space["epochs"] == Range(1, 9) and isinstance(space["epochs"].middle(), int)  # type: ignore[union-attr]
    assert space["momentum"] == Range(0.0, 0.9) and space["hflip"] == Choice((True, False))
    assert space["optimizer"] == Choice(("sgd", "adam")) and space["kernel_size"] == Choice((3, 5))
    assert str(space["hflip"]) == "yes,no"


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("lr", "write NAME=VALUES, such as lr=1e-4..1e-1:log or kernel-size=3,5, not 'lr'"),
        ("batchsize=3,5", "unknown field to search 'batchsize'; did you mean 'batch-size'?"),
        ("seed=1..9", "cannot search `seed`: the luckiest of many seeds is not a better recipe"),
        ("device=cpu,cuda", "cannot search `device`: it does not change what the model learns"),
        ("val-fraction=0.1,0.2", "cannot search `val-fraction`: "),
        ("lr=a..b", "cannot search `lr=a..b`: --lr takes a number, not 'a'"),
        ("epochs=1.5..9", "cannot search `epochs=1.5..9`: --epochs takes an integer, not '1.5'"),
        ("lr=1..0.1", "cannot search `lr=1..0.1`: a range goes from a smaller number to a larger one"),
        ("lr=0..1:log", "cannot search `lr=0..1:log`: a range with :log starts above 0"),
        ("lr=0..1:exp", "cannot search `lr=0..1:exp`: a range ends with :log or nothing, not with :exp"),
        ("momentum=0..1", "cannot search `momentum=0..1`: `momentum` is 1.0; it must be below 1"),
        ("batch-size=0,8", "cannot search `batch-size=0,8`: `batch_size` is 0; it must be at least 1"),
        ("optimizer=sgd,adan", "unknown value of `optimizer` 'adan'; did you mean 'adam'?"),
        ("optimizer=a..z", "--optimizer takes a string: list its values with commas"),
        ("lr=0.1", "give at least two different values; a single one is fixed for all trials with its own flag"),
        ("lr=0.1,0.1,0.2", "a value is listed twice"),
        ("kernel-size=3,5", "cannot search `kernel-size=3`: model 'small' has no option 'kernel_size'; it takes width"),
        (
            "momentum=0,0.9",
            "cannot search `momentum=0.0`: `nesterov` needs `optimizer=sgd` or muon, and a `momentum` above 0",
        ),
        ("model=small,tiny,smal", "cannot search `model=smal`: unknown model 'smal'; did you mean 'small'?"),
    ],
)
def test_values_that_cannot_be_searched_are_refused_before_anything_runs(param: str, message: str, toy: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Sweep.create(toy, params=[param], **{k: v for k, v in QUICK.items() if k not in ("epochs", "batch_size")})
    assert not Path("runs").exists()


def test_other_plans_that_cannot_work(toy: str) -> None:
    for options, message in (
        ({}, "name what to search, such as lr="),
        ({"params": LR, "trials": 0}, "`trials` is 0"),
        ({"params": LR, "lr": 0.1}, "`lr` is both searched and fixed"),
        ({"params": [*LR, *LR]}, "`lr` is given twice"),
        ({"params": ["epochs=1,2", "max-steps=5,9"]}, "search `epochs` or `max-steps`, not both"),
        ({"params": LR, "val_fraction": 0.0}, "a sweep compares trials on validation images: set `val_fraction`"),
        ({"params": LR, "loss": "nll"}, "`loss` nll needs a model that ends in log-softmax"),
        (
            {"params": ["loss=cross-entropy,nll"]},
            "cannot search `loss=nll`: `loss` nll needs a model that ends in log-",
        ),
        ({"params": ["model=tiny,whitened"], "loss": "nll"}, "`loss` nll needs a model that ends in log-softmax"),
        ({"params": LR, "pool": "avg"}, "model 'small' has no option 'pool'"),
        ({"params": LR, "epoch": 1}, "unknown recipe option 'epoch'; did you mean 'epochs'"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
            Sweep.create(toy, **{**QUICK, **options})  # type: ignore[arg-type]
    assert not Path("runs").exists()


# nll takes a model that ends in log-softmax, as mnist-4conv does, which has no width, and plain labels
@pytest.mark.parametrize(
    ("params", "overrides"),
    [
        (["model=small,mnist-4conv", "loss=cross-entropy,nll", "width=8,16", "mixup=0,0.4"], {}),
        (["model=small,mnist-4conv", "width=8..16"], {"kernel_size": 5}),
        (["model=small,mnist-4conv", "lr=0.1,0.2"], {"width": 8, "kernel_size": 5}),
        (["model=fashion-2conv,mnist-4conv", "kernel-size=1..15"], {}),
        (["kernel-size=1,5"], {"model": "mnist-4conv"}),
        (["optimizer=sgd,adam", "nesterov=yes,no"], {}),
        (["model=small,fashion-2conv", "initial-size=0,14"], {}),
    ],
)
def test_a_value_is_searched_if_it_trains_with_one_other_value(
    params: list[str], overrides: dict[str, Any], big: str
) -> None:
    assert Sweep.create(big, "digits", params=params, val_fraction=0.1, **overrides).space == parse_space(params)


@pytest.mark.parametrize(
    ("params", "overrides", "message"),
    [
        (["model=small,mnist-4conv", "loss=cross-entropy,nll", "mixup=0.1..0.4"], {"mixup": 0}, "`mixup` is both"),
        (
            ["model=tiny,mnist-4conv"],
            {"loss": "nll"},
            "cannot search `model=tiny`: `loss` nll needs a model that ends ",
        ),
        (
            ["model=small,tiny", "lr=0.1,0.2"],
            {"kernel_size": 5},
            "model 'small' has no option 'kernel_size'; it takes ",
        ),
        (["kernel-size=5,99"], {"model": "mnist-4conv"}, "cannot search `kernel-size=99`: the images are too small "),
        (["kernel-size=5..99"], {"model": "mnist-4conv"}, "cannot search `kernel-size=99`: the images are too small "),
        (
            ["model=small,fashion-2conv"],
            {"initial_size": 14},
            "cannot search `model=fashion-2conv`: `initial_size` is 14: ",
        ),
        (
            ["initial-size=7,14"],
            {"model": "fashion-2conv"},
            "cannot search `initial-size=7`: `initial_size` is 7: the ",
        ),
        (["lr=0.1,0.2"], {"device": "cuda"}, "this machine has no"),
        (["lr=0.1,0.2"], {"image_size": 32}, "`image_size` is for folders; big has images of 28 pixels"),
        (["width=8..10000000000000000000"], {}, "cannot search `width=10000000000000000000`: model 'small' cannot be "),
    ],
)
def test_a_value_is_refused_if_it_trains_with_no_other_value(
    params: list[str], overrides: dict[str, Any], message: str, big: str
) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        Sweep.create(big, "digits", params=params, val_fraction=0.1, **overrides)
    assert not Path("runs").exists()


def test_no_trial_can_look_at_a_test_image(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Untouchable:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"the test split was touched: {name}")

    dataset = dataclasses.replace(load_dataset(toy), test=Untouchable())  # type: ignore[arg-type]
    monkeypatch.setattr(study, "load_dataset", lambda *_, **__: dataset)
    sweep = Sweep.create(toy, params=LR, trials=2, log_test_metrics=True, **QUICK)
    assert len(sweep.data.test) == 0
    run_all(sweep)
    assert write_outcome(sweep)["states"] == {"complete": 2}


def test_a_trial_is_what_train_does_and_its_recipe_travels_in_a_file(toy: str, no_plots: None) -> None:
    sweep = Sweep.create(toy, params=[*LR, "momentum=0.1..0.8"], trials=3, **QUICK)
    assert [row["state"] for row in run_all(sweep)] == ["complete"] * 3
    said = write_outcome(sweep)
    best = best_trial(sweep)
    assert best is not None and said["best"]["val_acc"] == best.value == max(r["val_acc"] for r in trial_rows(sweep))
    recipe = read_recipe(sweep.folder / "best.json")
    assert recipe.override(device="cpu", threads=1) == sweep.base.override(**best.params)
    values = json.loads((sweep.folder / "best.json").read_text())
    assert values["recipe"] == "folder" and values["momentum"] == best.params["momentum"] and "loss" not in values
    run = convlens.train(toy, recipe, device="cpu", threads=1)
    assert run.run_dir.read_metrics()[-1]["val_acc"] == best.value
    with open(sweep.folder / "trials.csv", newline="", encoding="utf-8") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    page = (sweep.folder / "report.html").read_text()
    assert "nothing is claimed" in page and page.count("<svg") == 2
    assert not list(sweep.folder.rglob("model"))


@pytest.mark.parametrize("name", RECIPES.names())
def test_every_recipe_can_be_a_file(name: str) -> None:
    for recipe in (get_recipe(name), get_recipe(name).override(max_steps=7, lr=0.3, optimizer="sgd", momentum=0.5)):
        Path("recipe.json").write_text(json.dumps(recipe_file(recipe)))
        assert read_recipe("recipe.json") == recipe
    own = Recipe(epochs=1, lr=0.2)
    Path("own.json").write_text(json.dumps(recipe_file(own)))
    assert read_recipe("own.json") == own


def test_a_wrong_recipe_file_says_what_is_wrong() -> None:
    for content, message in (
        ('{"recipe": "digits", "learning": 1}', "unknown recipe option 'learning'"),
        ('{"recipe": "digits", "momentun": 0.1}', "unknown recipe option 'momentun'; did you mean 'momentum'?"),
        ('{"recipe": "digit"}', "unknown recipe 'digit'; did you mean 'digits'?"),
        ('{"recipe": "digits", "lr": "fast"}', "`lr` takes a number, not 'fast'"),
        ('{"recipe": 3}', '"recipe" is neither the name of a recipe nor the recipe of a run'),
    ):
        Path("r.json").write_text(content)
        with pytest.raises(UsageError, match=f"^r.json: {re.escape(message)}"):
            read_recipe("r.json")


def test_the_same_seed_gives_the_same_trials_however_often_it_is_interrupted(toy: str) -> None:
    options: dict[str, Any] = {"params": LR, **QUICK, "epochs": 2}
    whole = run_all(Sweep.create(toy, trials=12, **options))
    parts = Sweep.create(toy, trials=4, **options)
    run_all(parts)
    parts = Sweep.resume(parts.folder, trials=12)
    epochs = iter(range(100))
    with pytest.raises(TrainingInterruptedError):  # in the middle of a trial
        Worker(parts, threads=1, should_stop=lambda: next(epochs) > 15).run()
    assert [row["state"] for row in trial_rows(parts)].count("interrupted") == 1
    assert values_of(run_all(Sweep.resume(parts.folder))) == values_of(whole)
    assert len(values_of(whole)) == 12
    other = run_all(Sweep.create(toy, trials=3, seed=1, **options))
    assert values_of(other)[1:] != values_of(whole)[1:3]


def test_the_base_recipe_comes_first(toy: str) -> None:
    sweep = Sweep.create(toy, params=["lr=0.01..1", "momentum=0.95,0.99"], trials=1, **QUICK)
    (row,) = run_all(sweep)
    assert row["lr"] == sweep.base.lr == 0.02 and row["momentum"] in (0.95, 0.99)
    sweep = Sweep.create(toy, params=["lr=0.01..1"], trials=1, **QUICK)
    run_all(sweep)
    assert confirm.is_base(sweep)


def test_trials_that_lag_behind_are_stopped(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "WARM_UP_TRIALS", 2)
    sweep = Sweep.create(toy, params=["lr=0.02,0.03,1e-12"], trials=8, **{**QUICK, "epochs": 4})
    rows = run_all(sweep)
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned and all(row["lr"] == 1e-12 and row["epochs"] < 4 for row in pruned)
    said = write_outcome(sweep)
    assert said["states"]["pruned"] == len(pruned) and said["best"]["params"]["lr"] != 1e-12
    page = (sweep.folder / "report.html").read_text()
    assert "<th>reason</th>" not in page and "no trial used a test image" in page


@pytest.mark.parametrize("length", [{"epochs": 3}, {"epochs": None, "max_steps": 12}])  # 5 steps an epoch
def test_no_trial_is_stopped_in_its_last_epoch(
    length: dict[str, int | None], toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda _: asked.append(1) or len(asked) > 2)
    asked: list[int] = []
    sweep = Sweep.create(toy, params=LR, trials=1, **{**QUICK, **length})
    (row,) = run_all(sweep)
    assert (row["state"], row["epochs"], len(asked)) == ("complete", 3, 2)


def test_a_trial_that_diverges_is_written_down_and_the_sweep_goes_on(toy: str) -> None:
    sweep = Sweep.create(toy, params=["lr=0.02,1e30"], trials=6, **{**QUICK, "epochs": 3})
    rows = run_all(sweep)
    failed = [row for row in rows if row["state"] == "failed"]
    assert failed and failed[0]["lr"] == 1e30 and failed[0]["reason"].startswith("DivergenceError: ")
    assert len(rows) == 6 and write_outcome(sweep)["states"]["failed"] == len(failed)


def test_where_all_fail_that_is_said(toy: str) -> None:
    sweep = Sweep.create(toy, params=["lr=1e29,1e30"], trials=2, **{**QUICK, "epochs": 3})
    run_all(sweep)
    with pytest.raises(
        ConvlensError, match="^no trial of runs/toy-sweep-1 is complete; the most frequent reason: DivergenceError"
    ):
        write_outcome(sweep)
    assert (sweep.folder / "trials.csv").exists()


def test_only_the_same_search_is_joined(toy: str) -> None:
    url = "sqlite:///shared.db"
    first = Sweep.create(toy, params=LR, trials=2, storage=url, **QUICK)
    assert not first.joined
    run_all(first)
    again = Sweep.create(toy, params=LR, trials=3, storage=url, **{**QUICK, "device": "auto"})
    assert again.joined and len(run_all(again)) == 3 and len(trial_rows(first)) == 3
    assert len(trial_rows(Sweep.resume(again.folder))) == 3
    np.savez("other.npz", x=255 - np.load(toy)["x"], y=np.load(toy)["y"])
    for data, options in (
        (toy, {"params": ["lr=1e-3..2:log"]}), (toy, {"params": LR, "epochs": 2}), ("other.npz", {"params": LR}),
    ):  # fmt: skip
        other = Sweep.create(data, trials=2, storage=url, **{**QUICK, **options})
        assert not other.joined and trial_rows(other) == []


def test_storages_that_cannot_be_opened(toy: str) -> None:
    for url, message in (
        ("nothing://x", "cannot open the storage nothing://x: "),
        ("sqlite:////nowhere/at/all.db", "cannot open the storage sqlite:////nowhere/at/all.db: "),
        ("postgresql://me:secret@host/db", "the command is written into the sweep's folder"),
        ("journal.log", "storage journal.log: give a database URL, such as sqlite:///trials.db"),
    ):
        with pytest.raises(ConvlensError, match=f"^{re.escape(message)}") as caught:
            Sweep.create(toy, params=LR, storage=url, **QUICK)
        assert "secret" not in str(caught.value)
    assert not Path("runs").exists()


def test_a_storage_may_come_whole_from_the_environment(
    toy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRIALS", f"sqlite:///{tmp_path}/trials.db")
    sweep = Sweep.create(toy, params=LR, storage="$TRIALS", **QUICK)
    assert sweep.plan["storage"] == "$TRIALS" and (tmp_path / "trials.db").exists()
    assert Sweep.create(toy, params=LR, storage="$TRIALS", **QUICK).joined
    monkeypatch.setenv("TRIALS", "nothing://me:secret@host:abc/db")
    with pytest.raises(ConvlensError) as caught:
        Sweep.create(toy, params=LR, storage="$TRIALS", **QUICK)
    assert "secret" not in str(caught.value) and "unexpected" not in str(caught.value)
    with pytest.raises(UsageError, match=r"^storage \$NOWHERE: there is no \$NOWHERE in the environment$"):
        absolute_storage("$NOWHERE")


def test_a_password_is_taken_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB", "trials")
    monkeypatch.setenv("PASSWORD", "secret")
    with pytest.raises(UsageError, match="^the command is written into the sweep's folder"):
        absolute_storage("postgresql://me:secret@host/$DB")
    for kept in ("postgresql://me:$PASSWORD@host/db", "postgresql://me@host/$DB"):
        assert absolute_storage(kept) == kept


def ask(sweep: Sweep) -> optuna.Trial:
    """Take a trial, as a process does that dies then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's: no heartbeat comes by itself
        trial = sweep.study.ask({"lr": optuna.distributions.FloatDistribution(1e-3, 1, log=True)})
    if sweep.plan["storage"]:
        sweep.study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
    return trial


def test_a_trial_whose_process_has_died_is_repeated(toy: str) -> None:
    sweep = Sweep.create(toy, params=LR, trials=3, **QUICK)
    ask(sweep)
    rows = run_all(Sweep.resume(sweep.folder))
    assert [row["state"] for row in rows] == ["interrupted", "complete", "complete", "complete"]
    assert rows[0]["reason"] == "it is repeated" and rows[1]["lr"] == rows[0]["lr"] == 0.02


def test_a_trial_without_a_heartbeat_is_repeated(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "GRACE_SECONDS", 2)
    sweep = Sweep.create(toy, params=LR, trials=2, storage="sqlite:///shared.db", **QUICK)
    lost, started = ask(sweep), time.monotonic()
    rows = run_all(sweep)
    assert [row["state"] for row in rows] == ["interrupted", "complete", "complete"]
    assert rows[1]["lr"] != rows[0]["lr"] == rows[2]["lr"] == 0.02 and time.monotonic() - started > 2
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):  # it comes back, too late
        lost.report(0.5, 1)


def test_a_worker_that_was_taken_for_dead_changes_nothing(toy: str) -> None:
    sweep = Sweep.create(toy, params=LR, trials=1, **{**QUICK, "epochs": 2})
    taken = iter([True])

    def take_it() -> None:
        for trial in sweep.study.get_trials(states=(TrialState.RUNNING,)):
            if next(taken, False):
                sweep.study.tell(trial.number, state=TrialState.FAIL)
                storage.retry_callback(None)(sweep.study, trial)

    Worker(sweep, threads=1, on_progress=take_it).run()
    assert [row["state"] for row in trial_rows(sweep)] == ["interrupted", "complete"]


def test_a_trial_that_kills_its_processes_is_given_up(toy: str) -> None:
    sweep = Sweep.create(toy, params=LR, trials=2, **QUICK)
    for _ in range(storage.MAX_RETRIES + 1):
        ask(sweep)
        Worker(sweep)._repeat_lost_trials()
    rows = run_all(sweep)
    assert [row["state"] for row in rows] == ["interrupted", "interrupted", "failed", "complete"]
    assert rows[2]["reason"] == "its process died"


def test_an_incomplete_last_line_of_the_journal_is_cut(toy: str) -> None:
    sweep = Sweep.create(toy, params=LR, trials=2, **QUICK)
    run_all(sweep)
    journal = sweep.folder / study.JOURNAL
    for lost in (1, 30):  # bytes that a full disk or a power failure lost
        journal.write_bytes(journal.read_bytes()[:-lost])
        rows = run_all(Sweep.resume(sweep.folder, trials=3))
        assert [row["state"] for row in rows].count("complete") == 3
        assert run_all(Sweep.resume(sweep.folder, trials=3)) == rows


def test_a_storage_that_fails_at_the_end_of_a_trial_raises_its_own_error(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep.create(toy, params=LR, trials=2, **QUICK)
    change = sweep.study._storage.set_trial_state_values

    def fail(trial: int, state: TrialState, *values: Any, **more: Any) -> bool:
        if state is TrialState.RUNNING:
            return change(trial, state, *values, **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep.study._storage, "set_trial_state_values", fail)
    with pytest.raises(OSError, match="No space left on device"):
        run_all(sweep)
    rows = run_all(Sweep.resume(sweep.folder))
    assert [row["state"] for row in rows] == ["interrupted", "complete", "complete"]


def test_a_database_that_is_away_for_a_moment_is_tried_again(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep.create(toy, params=LR, trials=2, storage="sqlite:///shared.db", **QUICK)
    away = iter([True, True])

    def report(self: optuna.Trial, value: float, step: int) -> None:
        if next(away, False):
            raise optuna.exceptions.StorageInternalError("the server restarts")

    monkeypatch.setattr(optuna.Trial, "report", report)
    rows = run_all(sweep)
    assert [row["state"] for row in rows] == ["interrupted", "interrupted", "complete", "complete"]
    assert rows[2]["lr"] == rows[0]["lr"]
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0)
    monkeypatch.setattr(sweep.study, "get_trials", lambda **_: report(None, 0, 0))  # type: ignore[arg-type]
    away = iter([True] * 5)
    with pytest.raises(optuna.exceptions.StorageInternalError):
        Worker(sweep).run()


@pytest.mark.slow
def test_two_processes_share_the_work(toy: str) -> None:
    sweep = Sweep.create(toy, params=LR, trials=6, **{**QUICK, "epochs": 10})
    with worker.helper_processes(sweep, 1, 1) as count:
        while not sweep.study.get_trials(states=(TrialState.RUNNING,)):
            assert count() == 1
            time.sleep(0.01)
        Worker(sweep, threads=1, count_helpers=count).run()
    rows = trial_rows(sweep)
    workers = write_outcome(sweep)["workers"]
    assert len(workers) == 2 and 6 <= sum(workers.values()) <= 7, workers
    assert len({row["lr"] for row in rows}) == len(rows)  # none was done twice


def test_the_best_is_confirmed_on_fresh_seeds_and_no_claim_without(toy: str, no_plots: None) -> None:
    base = get_recipe("folder").override(**QUICK, lr=1e-6)
    sweep = Sweep.create(toy, base, params=["lr=0.01,0.02"], trials=2)
    run_all(sweep)
    write_outcome(sweep)
    runs = list(confirm.confirm(sweep, 2, lambda: False))
    assert [(which, name) for which, name, _ in runs] == [
        ("base", "seed-1"), ("base", "seed-2"), ("best", "seed-1"), ("best", "seed-2"),
    ]  # fmt: skip
    said = confirm.compare_confirmed(sweep, 2)
    assert said["test_accuracy"]["base"] == pytest.approx(np.mean([run.accuracy for w, _, run in runs if w == "base"]))
    assert said["difference"] == pytest.approx(said["test_accuracy"]["best"] - said["test_accuracy"]["base"])
    assert list(confirm.confirm(sweep, 2, lambda: False)) == []  # it is there already
    line, worth_it = confirm_best(sweep, 2, lambda: False)
    assert worth_it == (said["interval"][0] > 0) != ("there is no reason to change" in line)
    assert line.startswith(f"verdict {said['verdict']}")
    assert write_outcome(Sweep.resume(sweep.folder))["confirmation"] == said  # as with --resume and --confirm-seeds 0
    assert said["verdict"] in html.unescape((sweep.folder / "report.html").read_text())


def test_a_verdict_takes_seeds_and_images_into_account() -> None:
    random = np.random.default_rng(0)
    worse, better = random.random((3, 2000)) < 0.90, random.random((3, 2000)) < 0.99
    pair = SeedComparison(worse, better)
    low, high = pair.interval
    assert 0 < low < pair.difference < high
    assert pair.verdict("a", "b").startswith("b is better than a: +")
    assert SeedComparison(better, worse).verdict("b", "a") == pair.verdict("a", "b")
    alike = SeedComparison(worse, random.random((3, 2000)) < 0.90).verdict("a", "b")
    assert alike.startswith("may be chance: b against a ") and "3 fresh seeds each, 2,000 test images" in alike
    # one seed that fails makes the mean uncertain, however many images agree
    lucky = better.copy()
    lucky[0] = worse[0]
    lucky[1] = worse[1]
    assert SeedComparison(worse, lucky).verdict("a", "b").startswith("may be chance")


def test_ctrl_c_writes_what_there_is(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from convlens.cli import main
    from convlens.cli.sweep import TrialReporter

    def report(self: TrialReporter) -> None:
        if len(self._rows(self._sweep)) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrialReporter, "report", report)
    monkeypatch.setattr(sys, "argv", ["convlens", "sweep", toy, *FLAGS, "--param", LR[0], "--trials", "4"])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    last = "convlens: interrupted; nothing is lost. Continue with: convlens sweep --resume runs/toy-sweep-1"
    assert leaving.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["stopping after this step ...", last]
    folder = Path("runs/toy-sweep-1")
    states = [row["state"] for row in csv.DictReader((folder / "trials.csv").read_text().splitlines())]
    assert states == ["complete", "complete", "interrupted"]
    assert "not finished, 2 of 4 trials are done: nothing is claimed" in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_nothing_is_lost(kind: signal.Signals, toy: str) -> None:
    command = [
        sys.executable,
        "-m",
        "convlens",
        "sweep",
        toy,
        *FLAGS,
        "--param",
        LR[0],
        "--trials",
        "4",
        "--confirm-seeds",
        "0",
    ]
    command += ["--epochs", "30", "--out", "mine", "--jobs", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith("trial "):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(kind)
        _, err = process.communicate(timeout=60)  # until the helper, which holds the pipes too, has gone
    if kind is signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 130
        last = "convlens: interrupted; nothing is lost. Continue with: convlens sweep --resume mine"
        assert err.strip().splitlines() == ["stopping after this step ...", last]
    sweep = Sweep.resume("mine")
    rows = run_all(sweep)
    counted = [row for row in rows if row["state"] != "interrupted"]
    assert len(counted) == 4 and len({row["lr"] for row in counted}) == 4


def test_stopped_while_it_loads_it_says_that_nothing_was_begun(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from convlens.cli import main

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(study, "load_dataset", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["convlens", "sweep", toy, "--param", LR[0]])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    assert leaving.value.code == 130 and capsys.readouterr().err == "convlens: interrupted; nothing was started\n"
    assert not Path("runs").exists()


def test_the_trial_of_a_helper_that_dies_is_repeated(toy: str) -> None:
    sweep = Sweep.create(toy, params=LR, trials=2, **QUICK)
    with worker.helper_processes(sweep, 1, 1) as count:
        ask(sweep)  # as the helper may have
        (helper,) = multiprocessing.active_children()
        os.kill(helper.pid or 0, signal.SIGKILL)
        Worker(sweep, threads=1, count_helpers=count).run()
    assert [row["state"] for row in trial_rows(sweep)].count("complete") == 2


def test_the_process_that_created_a_shared_study_confirms(toy: str) -> None:
    options: dict[str, Any] = {"params": ["lr=0.5,0.6"], "trials": 1, "storage": "sqlite:///shared.db", **QUICK}
    run_all(Sweep.create(toy, **options))
    joined = Sweep.create(toy, **options)
    line, is_better = confirm_best(joined, 2, lambda: False)
    assert line == f"the process that created the study confirms it; to do so here as well: {joined.command}"
    assert not is_better and not Sweep.resume(joined.folder).joined


def test_one_command_at_a_time_works_in_a_folder(toy: str) -> None:
    sweep = Sweep.create(toy, params=LR, trials=1, **QUICK)
    with RunDir(sweep.folder).locked():
        done = subprocess.run([sys.executable, "-m", "convlens", *sweep.command.split()[1:]], capture_output=True)
    assert done.returncode == 2 and b"another process is training in runs/toy-sweep-1" in done.stderr


def test_torchrun_is_refused(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convlens.distributed.process_group.init_world", lambda: SimpleNamespace(size=2))
    with pytest.raises(UsageError, match="^a sweep cannot be shared by several processes: start it without torchrun$"):
        Sweep.create(toy, params=LR, **QUICK)
    assert not Path("runs").exists()


def test_on_the_command_line(
    toy: str, no_plots: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from convlens.cli import main

    monkeypatch.setenv("COLUMNS", "60")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convlens", *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            main.main()
        return int(leaving.value.code or 0), *capsys.readouterr()

    code, out, err = call("sweep", toy, *FLAGS, "--param", "lr=0.01..0.5", "--trials", 3, "--confirm-seeds", 0)
    assert (code, err) == (0, "")
    assert "best    trial " in out and "trials never see the test images" in out
    if "nothing better than the base recipe was found: there is no reason to change it" in out:
        assert "train with" not in out
    else:
        assert "nothing is claimed" in out and "--config runs/toy-sweep-1/best.json" in out
    assert max(map(len, (line for line in out.splitlines() if line.startswith("trial  ")))) <= 60
    code, out, _ = call("train", toy, "--config", "runs/toy-sweep-1/best.json", "--epochs", 2, "--device", "cpu")
    assert code == 0 and "epoch   2" in out  # a flag wins
    code, out, _ = call("sweep", "--resume", "runs/toy-sweep-1", "--trials", 4, "--confirm-seeds", 0)
    assert code == 0 and re.search("^trial   4  .*, 0 s left  lr ", out, re.MULTILINE) and "trial   3  " not in out
    Path("empty").mkdir()
    for words, message in (
        ((), "name the data to search on, or a sweep to --resume, one of the two"),
        (("--resume", "runs/toy-sweep-1", "--lr", 1), "--resume continues the sweep as planned"),
        (("--resume", "runs"), "runs is not the folder of a sweep: it has no sweep.json"),
        ((toy, "--param", "lrr=1,2"), "unknown field to search 'lrr'; did you mean 'lr'?"),
        ((toy, "--param", LR[0], "--jobs", 9999), "--jobs is 9999; this machine lets convlens use"),
        ((toy, "--param", LR[0], "--confirm-seeds", 1), "--confirm-seeds is 1; it takes 2 seeds or more"),
        ((toy, "--param", LR[0], "--pretrained", "x.safetensors"), "a sweep starts every model from random weights"),
        (
            (toy, "--param", "model=small,tiny", "--param", "pool=avg,max"),
            "cannot search --pool avg: model 'small' has no option 'pool'; it takes width; model 'tiny' has no",
        ),
        ((toy, "--param", LR[0], "--freeze", 1), "a sweep starts every model from random weights, so it takes no --fr"),
        ((toy, "--param", "freeze=0,1"), "cannot search --freeze: every trial starts from random weights"),
        ((toy, "--param", LR[0], "--out", "runs"), "runs exists already; choose another --out"),
        (
            (toy, "--param", LR[0], "--out", "empty"),
            "empty exists already; choose another",
        ),
    ):
        code, _, err = call("sweep", *words)
        assert code == 2 and err.startswith(f"convlens: {message}") and err.count("\n") == 1, err
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = call("sweep", toy, "--param", LR[0])
    assert (code, err) == (2, "convlens: a sweep needs Optuna: pip install 'convlens[sweep]'\n")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_the_range_test_finds_a_rate_between_nothing_and_too_much(optimizer: str) -> None:
    recipe = get_recipe("digits").override(optimizer=optimizer, nesterov=False, width=4, bias_lr=0.5)
    dataset = load_dataset("digits")
    found = lr_finder.find_lr(dataset, recipe)
    assert (
        1e-4 < found.steepest <= found.lowest < 10
        and found.steepest <= found.suggestion <= found.lowest
        and len(found.rates) == len(found.losses)
    )
    assert found == lr_finder.find_lr(dataset, recipe)
    rates = lr_finder.with_lr(recipe, found.suggestion)
    assert rates["bias_lr"] / rates["lr"] == pytest.approx(0.5 / recipe.lr, rel=0.1)


def test_the_steepest_place_is_found() -> None:
    rates = [10 ** (-4 + 0.05 * k) for k in range(100)]
    losses = [2 / (1 + np.exp(8 * (np.log10(rate) + 2))) + 0.3 for rate in rates]  # falls most steeply at 0.01
    assert lr_finder.steepest(rates, losses) == pytest.approx(0.01, rel=0.15)
    assert lr_finder.steepest([0.1], [1.0]) == 0.1


def test_batch_sizes_are_tried_until_they_bring_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = {16: 100.0, 32: 190.0, 64: 300.0, 128: 310.0, 256: 280.0, 512: 270.0}
    memory = dict.fromkeys(pace, 0)
    dataset = load_dataset("digits")
    dataset = dataclasses.replace(dataset, train=dataset.train.select(torch.arange(1200).repeat(5)))
    monkeypatch.setattr(
        throughput, "measure_batch_size", lambda _, __, size: Throughput(size, pace[size], memory=memory[size])
    )
    recipe = get_recipe("digits")
    told: list[Throughput] = []
    tried, why = throughput.probe_batches(dataset, recipe, told.append)
    assert (
        [p.batch_size for p in tried] == [16, 32, 64, 128, 256] and throughput.pick_batch(tried) == 64 and told == tried
    )
    assert why == "batches of 128 and 256 are hardly faster"
    memory[32] = 1 << 60
    tried, why = throughput.probe_batches(dataset, recipe)
    assert [p.batch_size for p in tried] == [16, 32] and throughput.pick_batch(tried) == 32
    assert why == "batches of 64 may need more than half of the memory that is free"

    def run_out(*_: object) -> Throughput:
        raise MemoryError

    few = dataclasses.replace(dataset, train=dataset.train.select(torch.arange(350)))  # ten steps an epoch at least
    tried, why = throughput.probe_batches(few, recipe)
    assert [p.batch_size for p in tried] == [16]
    assert why == "with batches of 32 an epoch would have fewer than 10 steps"
    monkeypatch.setattr(throughput, "measure_batch_size", run_out)
    assert throughput.probe_batches(dataset, recipe) == ([], "batches of 16 do not fit into memory")
    with pytest.raises(ConvlensError, match="^there is not enough memory for 16 images at once"):
        throughput.pick_batch([])


def test_what_a_batch_costs_is_measured_without_a_test_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "BATCH_PROBE_SECONDS", 0.01)
    dataset = dataclasses.replace(load_dataset("digits"), test=None)  # type: ignore[arg-type]
    recipe = get_recipe("digits").override(width=4)
    small, large = (throughput.measure_batch_size(dataset, recipe, size) for size in (16, 64))
    assert small.training > 0 and large.memory == 4 * small.memory > 0
    assert throughput.free_memory(recipe) > 0


def test_a_model_without_an_option_is_searched_with_one_that_has_it(toy: str) -> None:
    sweep = Sweep.create(toy, "digits", params=["model=small,fashion-2conv", "width=4,8"], trials=1)
    assert worker.resolve(sweep, {"model": "small", "width": 4}).width == 4
    assert worker.resolve(sweep, {"model": "fashion-2conv", "width": 4}).width is None


def test_tune_takes_another_net(
    no_plots: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although the recipe's width is no option of it."""
    from convlens.cli import main

    words = ["lr-find", "digits", "--model", "fashion-2conv", "--batch-size", "64", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["convlens", *words])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    said = capsys.readouterr().out.splitlines()[-1]
    assert not leaving.value.code and "--model fashion-2conv" in said and "--width" not in said


def test_tune_prints_a_command_that_runs(
    no_plots: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from convlens.cli import main

    monkeypatch.setattr(throughput, "BATCH_PROBE_SECONDS", 0.01)
    monkeypatch.setattr(sys, "argv", ["convlens", "lr-find", "digits", "--width", "4", "--no-nesterov", "--seed", "2"])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    out = capsys.readouterr().out
    assert not leaving.value.code and Path("digits-lr.png").stat().st_size > 5000
    assert re.search(r"^batches of +16: about +\d", out, re.MULTILINE)
    assert "the recipe's own is 0.1, for batches of 64" in out
    line = out.splitlines()[-1]
    words = line.removeprefix("train with: convlens ").split()
    assert words[:2] == ["train", "digits"] and "--no-nesterov" in words and "--lr" in words and "--batch-size" in words
    monkeypatch.setattr(sys, "argv", ["convlens", "lr-find", "digits", "--out", "nowhere/x.png"])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    said = "--out nowhere/x.png: there is no folder nowhere; create it or choose another place"
    assert leaving.value.code == 2 and capsys.readouterr().err == f"convlens: {said}\n"
    assert not Path("nowhere").exists()
    monkeypatch.setattr(sys, "argv", ["convlens", *words, "--epochs", "1"])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    assert not leaving.value.code
