"""Sweeps: what is searched, that no test image is, that nothing is lost; the learning rate and batch size of tune."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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
from convlens.sweep import confirm, study, worker
from convlens.sweep.results import pick_best, recipe_file, trial_rows, write_outcome
from convlens.sweep.space import Choice, Range, parse_space, read_space, space_texts
from convlens.sweep.storage import absolute_storage
from convlens.sweep.study import Sweep
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
    worker.run_worker(sweep, threads=1)
    return trial_rows(sweep)


def values_of(rows: list[dict[str, Any]]) -> list[Any]:
    return [(row["state"], row["lr"], row["val_acc"]) for row in rows if row["state"] != "interrupted"]


@given(st.floats(1e-9, 0.5), st.floats(0.6, 100), st.booleans())
def test_a_range_is_read_as_it_is_written(low: float, high: float, log: bool) -> None:
    space = parse_space([f"lr={low!r}..{high!r}" + ":log" * log])
    assert space == {"lr": Range(low, high, log)} == read_space(space_texts(space))
    assert space["lr"].inside() in space["lr"] and low in space["lr"] and high + 1 not in space["lr"]  # type: ignore[union-attr]


@given(st.lists(st.integers(1, 9999), min_size=2, unique=True))
def test_choices_are_read_as_they_are_written(values: list[int]) -> None:
    space = parse_space([f"batch-size={','.join(map(str, values))}"])
    assert space == {"batch_size": Choice(tuple(values))} == read_space(space_texts(space))


def test_the_type_is_that_of_the_field() -> None:
    space = parse_space(["epochs=1..9", "momentum=0..0.9", "flip=yes,no", "optimizer=sgd,adam", "--kernel-size=3,5"])
    assert space["epochs"] == Range(1, 9) and isinstance(space["epochs"].inside(), int)  # type: ignore[union-attr]
    assert space["momentum"] == Range(0.0, 0.9) and space["hflip"] == Choice((True, False))
    assert space["optimizer"] == Choice(("sgd", "adam")) and space["kernel_size"] == Choice((3, 5))
    assert str(space["hflip"]) == "yes,no"


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("lr", "--param takes NAME=VALUES, such as lr=1e-4..1e-1:log or kernel-size=3,5, not 'lr'"),
        ("batchsize=3,5", "unknown name of a --param 'batchsize'; did you mean 'batch-size'?"),
        ("seed=1..9", "--param seed makes no sense to search: the luckiest of many seeds is no better recipe"),
        ("device=cpu,cuda", "--param device makes no sense to search: it changes nothing that is learned"),
        ("validation=0.1,0.2", "--param validation makes no sense to search"),
        ("lr=a..b", "--param lr=a..b: --lr takes a number, not 'a'"),
        ("epochs=1.5..9", "--param epochs=1.5..9: --epochs takes a whole number, not '1.5'"),
        ("lr=1..0.1", "--param lr=1..0.1: a range goes from a smaller number to a larger one"),
        ("lr=0..1:log", "--param lr=0..1:log: a range with :log begins above 0"),
        ("lr=0..1:exp", "a range ends in :log or in nothing, not in :exp"),
        ("momentum=0..1", "--param momentum=0..1: --momentum is 1.0; it must be below 1"),
        ("batch-size=0,8", "--batch-size is 0; it must be at least 1"),
        ("optimizer=sgd,adan", "unknown value of --optimizer 'adan'; did you mean 'adam'?"),
        ("optimizer=a..z", "--optimizer takes a word: name its values with commas"),
        ("lr=0.1", "give two different values or more; one is fixed for all trials with --lr"),
        ("lr=0.1,0.1,0.2", "a value is named twice"),
        ("kernel-size=3,5", "--param kernel-size=3: model 'small' has no option 'kernel_size'; it takes filters"),
        ("momentum=0,0.9", "--param momentum=0.0: --nesterov needs --optimizer sgd or muon and a --momentum above 0"),
        ("model=small,tiny,smal", "--param model=smal: unknown model 'smal'; did you mean 'small'?"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(param: str, message: str, toy: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Sweep.create(toy, params=[param], **{k: v for k, v in QUICK.items() if k not in ("epochs", "batch_size")})
    assert not Path("runs").exists()


def test_other_plans_that_cannot_work(toy: str) -> None:
    for options, message in (
        ({}, "say what to search: --param lr="),
        ({"params": LR, "preset": "classics"}, "unknown preset 'classics'; choose from: classic"),
        ({"params": LR, "trials": 0}, "--trials is 0"),
        ({"params": LR, "lr": 0.1}, "--lr is searched and fixed"),
        ({"params": [*LR, *LR]}, "--param lr is given twice"),
        ({"params": ["epochs=1,2", "iterations=5,9"]}, "--param epochs or --param iterations, not both"),
        ({"params": LR, "val_fraction": 0.0}, "a sweep chooses on validation images, and this recipe holds none out"),
        ({"params": LR, "loss": "nll"}, "--loss nll needs a net that ends in log-softmax"),
        ({"preset": "classic", "loss": "nll"}, "--loss nll needs a net that ends in log-softmax"),
        ({"params": ["loss=cross-entropy,nll"]}, "--param loss=nll: --loss nll needs a net that ends in log-softmax"),
        ({"params": ["model=tiny,whitened"], "loss": "nll"}, "--loss nll needs a net that ends in log-softmax"),
        ({"params": LR, "pool": "avg"}, "model 'small' has no option 'pool'"),
        ({"params": LR, "epoch": 1}, "unknown recipe option 'epoch'; did you mean 'epochs'"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
            Sweep.create(toy, **{**QUICK, **options})  # type: ignore[arg-type]
    assert not Path("runs").exists()


def test_the_classic_preset_takes_what_fits(big: str) -> None:
    sweep = Sweep.create("digits", preset="classic", epochs=1)
    assert list(sweep.space) == ["batch_size", "lr", "momentum"]
    assert sweep.notes == ("kernel-size is left out: it is no option of the net small",)
    sweep = Sweep.create(big, "mnist-4conv", preset="classic", params=["lr=0.1,0.2"], val_fraction=0.1)
    assert sweep.space["kernel_size"] == Choice((3, 5)) and sweep.space["lr"] == Choice((0.1, 0.2))
    told = "kernel-size 7 is left out: the images are too small for model 'mnist-4conv', or its kernel is too large"
    assert sweep.notes == (told,)
    assert not sweep.base.log_test_metrics


# nll takes a net that ends in log-softmax, as mnist-4conv does, which has no filters, and plain labels
@pytest.mark.parametrize(
    ("params", "overrides"),
    [
        (["model=small,mnist-4conv", "loss=cross-entropy,nll", "filters=8,16", "mixup=0,0.4"], {}),
        (["model=small,mnist-4conv", "loss=cross-entropy,nll", "label-smoothing=0.1,0,0.2"], {}),
        (["model=small,mnist-4conv", "filters=8..16"], {"kernel_size": 5}),
        (["model=small,mnist-4conv", "lr=0.1,0.2"], {"width": 8, "kernel_size": 5}),
        (["model=fashion-2conv,mnist-4conv", "kernel-size=1..15"], {}),
        (["kernel-size=1,5"], {"model": "mnist-4conv"}),
        (["optimizer=sgd,adam", "nesterov=yes,no"], {}),
        (["model=small,fashion-2conv", "small-size=0,14"], {}),
    ],
)
def test_a_value_is_searched_if_some_trial_could_train_with_it(
    params: list[str], overrides: dict[str, Any], big: str
) -> None:
    assert Sweep.create(big, "digits", params=params, val_fraction=0.1, **overrides).space == parse_space(params)


@pytest.mark.parametrize(
    ("params", "overrides", "message"),
    [
        (["model=small,mnist-4conv", "loss=cross-entropy,nll", "mixup=0..0.4"], {}, "--param loss=nll: --loss nll "),
        (["model=tiny,mnist-4conv"], {"loss": "nll"}, "--param model=tiny: --loss nll needs a net that ends in "),
        (
            ["model=small,tiny", "lr=0.1,0.2"],
            {"kernel_size": 5},
            "model 'small' has no option 'kernel_size'; it takes ",
        ),
        (["kernel-size=5,99"], {"model": "mnist-4conv"}, "--param kernel-size=99: the images are too small "),
        (["kernel-size=5..99"], {"model": "mnist-4conv"}, "--param kernel-size=99: the images are too small "),
        (
            ["model=small,fashion-2conv"],
            {"initial_size": 14},
            "--param model=fashion-2conv: --initial-size 14: the net ",
        ),
        (["small-size=7,14"], {"model": "fashion-2conv"}, "--initial-size 7: the net fashion-2conv does not take "),
        (["lr=0.1,0.2"], {"device": "cuda"}, "this machine has no"),
        (["lr=0.1,0.2"], {"image_size": 32}, "--image-size is for folders; big has images of 28 pixels"),
        (
            ["filters=8..10000000000000000000"],
            {},
            "--param filters=10000000000000000000: the net small cannot be built: ",
        ),
    ],
)
def test_a_value_is_refused_if_no_trial_could_train_with_it(
    params: list[str], overrides: dict[str, Any], message: str, big: str
) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        Sweep.create(big, "digits", params=params, val_fraction=0.1, **overrides)
    assert not Path("runs").exists()


def test_a_preset_fits_one_of_the_nets_that_are_searched(big: str) -> None:
    sweep = Sweep.create(big, "digits", preset="classic", params=["model=small,mnist-4conv"], val_fraction=0.1)
    assert sweep.space["kernel_size"] == Choice((3, 5))
    assert len(sweep.notes) == 1 and sweep.notes[0].startswith("kernel-size 7 is left out: ")


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
    best = pick_best(sweep)
    assert best is not None and said["best"]["val_acc"] == best.value == max(r["val_acc"] for r in trial_rows(sweep))
    recipe = read_recipe(sweep.folder / "best.json")
    assert recipe.override(device="cpu", threads=1) == sweep.base.override(**best.params)
    values = json.loads((sweep.folder / "best.json").read_text())
    assert values["recipe"] == "folder" and values["momentum"] == best.params["momentum"] and "loss" not in values
    run = convlens.train(toy, recipe, device="cpu", threads=1)
    assert run.folder.read_metrics()[-1]["val_acc"] == best.value
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
        ('{"recipe": "digits", "lr": "fast"}', "--lr takes a number, not 'fast'"),
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
        worker.run_worker(parts, threads=1, should_stop=lambda: next(epochs) > 15)
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
    monkeypatch.setattr(study, "WARM_UP", 2)
    sweep = Sweep.create(toy, params=["lr=0.02,0.03,1e-12"], trials=8, **{**QUICK, "epochs": 4})
    rows = run_all(sweep)
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned and all(row["lr"] == 1e-12 and row["epochs"] < 4 for row in pruned)
    said = write_outcome(sweep)
    assert said["states"]["pruned"] == len(pruned) and said["best"]["params"]["lr"] != 1e-12
    page = (sweep.folder / "report.html").read_text()
    assert "<th>reason</th>" not in page and "no trial looked at a test image" in page


@pytest.mark.parametrize("length", [{"epochs": 3}, {"epochs": None, "max_steps": 12}])  # 5 steps an epoch
def test_no_trial_is_stopped_in_its_last_epoch(
    length: dict[str, int | None], toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.Trial, "should_prune", lambda _: asked.append(1) or len(asked) > 2)
    asked: list[int] = []
    sweep = Sweep.create(toy, params=LR, trials=1, **{**QUICK, **length})
    (row,) = run_all(sweep)
    assert (row["state"], row["epochs"], len(asked)) == ("complete", 3, 2)


def test_a_trial_that_diverges_is_written_down_and_the_sweep_goes_on(toy: str) -> None:
    sweep = Sweep.create(toy, params=["lr=0.02,1e30"], trials=6, **{**QUICK, "epochs": 3})
    rows = run_all(sweep)
    failed = [row for row in rows if row["state"] == "failed"]
    assert failed and failed[0]["lr"] == 1e30 and failed[0]["reason"].startswith("Diverged: ")
    assert len(rows) == 6 and write_outcome(sweep)["states"]["failed"] == len(failed)


def test_where_all_fail_that_is_said(toy: str) -> None:
    sweep = Sweep.create(toy, params=["lr=1e29,1e30"], trials=2, **{**QUICK, "epochs": 3})
    run_all(sweep)
    with pytest.raises(
        ConvlensError, match="^no trial of runs/toy-sweep-1 was trained to its end; most often: Diverged"
    ):
        write_outcome(sweep)
    assert (sweep.folder / "trials.csv").exists()


@pytest.mark.parametrize("storage", ["shared/journal.log", "sqlite:///shared.db"])
def test_only_the_same_search_is_joined(storage: str, toy: str) -> None:
    first = Sweep.create(toy, params=LR, trials=2, storage=storage, **QUICK)
    assert not first.joined
    run_all(first)
    again = Sweep.create(toy, params=LR, trials=3, storage=storage, **{**QUICK, "device": "auto"})
    assert again.joined and len(run_all(again)) == 3 and len(trial_rows(first)) == 3
    assert len(trial_rows(Sweep.resume(again.folder))) == 3
    np.savez("other.npz", x=255 - np.load(toy)["x"], y=np.load(toy)["y"])
    for data, options, message in (
        (toy, {"params": ["lr=1e-3..2:log"]}, "another space (lr is 0.001..1.0:log there and 0.001..2.0:log here)"),
        (toy, {"params": LR, "epochs": 2}, "another base recipe (epochs is 1 there and 2 here)"),
        ("other.npz", {"params": LR}, "other data"),
    ):
        with pytest.raises(
            UsageError, match=re.escape(f"{storage} holds a sweep of {message}; name another --storage")
        ):
            Sweep.create(data, trials=2, storage=storage, **{**QUICK, **options})
    assert len(list(Path("runs").iterdir())) == 2


def test_storages_that_cannot_be_opened(toy: str) -> None:
    for storage, message in (
        ("nothing://x", "cannot open the storage nothing://x: "),
        ("sqlite:////nowhere/at/all.db", "cannot open the storage sqlite:////nowhere/at/all.db: "),
        ("postgresql://me:secret@host/db", "--storage: the command is written into the sweep's folder"),
        ("toy.npz/journal", "cannot open the storage "),
    ):
        with pytest.raises(ConvlensError, match=f"^{re.escape(message)}") as caught:
            Sweep.create(toy, params=LR, storage=storage, **QUICK)
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
    with pytest.raises(UsageError, match=r"^--storage \$NOWHERE: there is no \$NOWHERE in the environment$"):
        absolute_storage("$NOWHERE")


def test_a_password_is_taken_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB", "trials")
    monkeypatch.setenv("PASSWORD", "secret")
    with pytest.raises(UsageError, match="^--storage: the command is written into the sweep's folder"):
        absolute_storage("postgresql://me:secret@host/$DB")
    for kept in ("postgresql://me:$PASSWORD@host/db", "postgresql://me@host/$DB"):
        assert absolute_storage(kept) == kept


def test_a_trial_whose_process_is_gone_is_done_again(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep.create(toy, params=LR, trials=3, **QUICK)
    asked = sweep.study.ask({"lr": sweep.space["lr"].distribution()})
    mine = worker.process_name()
    assert mine is not None and not worker.is_gone(mine) and not worker.is_gone("another 1 2 3 4")
    gone = " ".join([*mine.split(" ")[:-1], "1"])  # the same number, started at another time
    asked.set_user_attr("worker", gone if sys.platform == "linux" else mine)
    if sys.platform != "linux":
        monkeypatch.setattr(worker, "GRACE", 0.0)
    rows = run_all(sweep)
    assert [row["state"] for row in rows] == ["interrupted", "complete", "complete", "complete"]
    assert rows[0]["reason"] == "its process is gone" and rows[1]["lr"] == rows[0]["lr"] == 0.02


def test_another_machine_is_taken_for_dead_when_it_is_silent_for_long(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep.create(toy, params=LR, trials=3, **QUICK)
    crew, asked = worker.TrialTracker(sweep.study), sweep.study.ask({"lr": sweep.space["lr"].distribution()})
    asked.set_user_attr("worker", "another-machine 1 2 3 4")
    assert len(crew.running()) == 1
    clock = time.monotonic()
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock + worker.GRACE / 2)
    asked.set_user_attr("alive", 1.0)
    assert len(crew.running()) == 1
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock + 1.4 * worker.GRACE)
    assert len(crew.running()) == 1  # it gave a sign of life in between
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock + 1.6 * worker.GRACE)
    assert crew.running() == [] and crew.done() == []
    worker.run_trial(sweep, asked, 1, lambda: False, lambda: None, False)  # it comes back, too late: nothing happens
    assert crew.done() == []


def test_a_trial_that_kills_its_processes_is_given_up(toy: str) -> None:
    sweep = Sweep.create(toy, params=LR, trials=2, **QUICK)
    for deaths in range(worker.MAX_RETRIES):
        trial = sweep.study.ask({"lr": sweep.space["lr"].distribution()})
        assert trial.user_attrs.get("deaths", 0) == deaths
        worker.requeue(sweep.study, trial, "its process is gone", deaths + 1)
    rows = run_all(sweep)
    assert [row["state"] for row in rows] == ["interrupted", "interrupted", "failed", "complete"]
    assert sweep.study.get_trials()[-1].state is TrialState.COMPLETE


@pytest.mark.slow
def test_two_processes_share_the_work(toy: str) -> None:
    sweep = Sweep.create(toy, params=LR, trials=6, **{**QUICK, "epochs": 10})
    command = [sys.executable, "-m", "convlens.sweep.worker", str(sweep.folder), "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as helper:
        while not worker.TrialTracker(sweep.study).running():
            assert helper.poll() is None, helper.stderr and helper.stderr.read()
            time.sleep(0.01)
        rows = run_all(sweep)
        _, err = helper.communicate(timeout=60)
    assert (helper.returncode, err) == (0, "")
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
    assert line.startswith(f"verdict {said['verdict']}") and sweep.study.user_attrs["confirming"] is None
    assert write_outcome(Sweep.resume(sweep.folder))["confirmation"] == said  # as with --resume and --confirm 0
    assert said["verdict"] in html.unescape((sweep.folder / "report.html").read_text())
    for seeds in (1, -1):
        with pytest.raises(UsageError, match=f"^--confirm is {seeds}; it takes 2 seeds or more, or 0 for none$"):
            confirm.require_seeds(seeds)


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

    def tell(self: TrialReporter) -> None:
        if len(self._rows(self._sweep)) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrialReporter, "tell", tell)
    monkeypatch.setattr(sys, "argv", ["convlens", "sweep", toy, *FLAGS, "--param", LR[0], "--trials", "4"])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    last = "convlens: interrupted; nothing is lost. Go on with: convlens sweep --resume runs/toy-sweep-1"
    assert leaving.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["stopping after this step ...", last]
    folder = Path("runs/toy-sweep-1")
    states = [row["state"] for row in csv.DictReader((folder / "trials.csv").read_text().splitlines())]
    assert states == ["complete", "complete", "interrupted"]
    assert "not finished, 2 of 4 trials are done: nothing is claimed" in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_nothing_is_lost(kind: signal.Signals, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REGISTRATION_GRACE_SECONDS", 1.0)  # it may be killed before its trial has its name
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
        "--confirm",
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
        last = "convlens: interrupted; nothing is lost. Go on with: convlens sweep --resume mine"
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
    assert leaving.value.code == 130 and capsys.readouterr().err == "convlens: interrupted; nothing was begun\n"
    assert not Path("runs").exists()


def test_a_helper_that_dies_is_named_once(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep.create(toy, params=LR, trials=2, **QUICK)
    monkeypatch.setattr(worker.sys, "executable", "false")
    said: list[str] = []
    with worker.helpers(sweep, 1, 1, said.append) as look:
        worker.run_worker(sweep, threads=1, between=look)
    assert said == ["a helper process has died (exit code 1); the sweep goes on without it"]
    assert len(trial_rows(sweep)) == 2


def test_one_process_confirms_until_it_is_silent_for_long(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep.create(toy, params=LR, trials=1, **QUICK)
    claim = confirm.Lease(sweep)
    assert claim.take() is None and claim.take() is None  # its own
    claim.release()
    now = time.time()
    sweep.study.set_user_attr("confirming", {"process": "another-machine 1 2 3 4", "alive": now})
    other = confirm.Lease(sweep)
    assert other.take() == "another-machine 1 2 3 4"
    monkeypatch.setattr(confirm.time, "time", lambda: now + 1.1 * worker.GRACE)
    assert other.take() is None
    assert sweep.study.user_attrs["confirming"]["process"] == worker.process_name()


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

    code, out, err = call("sweep", toy, *FLAGS, "--param", "lr=0.01..0.5", "--trials", 3, "--confirm", 0)
    assert (code, err) == (0, "")
    assert "best    trial " in out and "no trial looks at the test images" in out
    if "nothing better than the base recipe was found: there is no reason to change it" in out:
        assert "train with" not in out
    else:
        assert "nothing is claimed" in out and "--config runs/toy-sweep-1/best.json" in out
    assert max(map(len, (line for line in out.splitlines() if line.startswith("trial  ")))) <= 60
    code, out, _ = call("train", toy, "--config", "runs/toy-sweep-1/best.json", "--epochs", 2, "--device", "cpu")
    assert code == 0 and "epoch   2" in out  # a flag wins
    code, out, _ = call("sweep", "--resume", "runs/toy-sweep-1", "--trials", 4, "--confirm", 0)
    assert code == 0 and re.search("^trial   4  .*, 0 s left  lr ", out, re.MULTILINE) and "trial   3  " not in out
    Path("empty").mkdir()
    for words, message in (
        ((), "name the data to search on, or a sweep to --resume, one of the two"),
        (("--resume", "runs/toy-sweep-1", "--lr", 1), "--resume goes on with the sweep's own plan"),
        (("--resume", "runs"), "runs is not the folder of a sweep: it has no sweep.json"),
        ((toy, "--param", "lrr=1,2"), "unknown name of a --param 'lrr'; did you mean 'lr'?"),
        ((toy, "--param", LR[0], "--jobs", 9999), "--jobs is 9999; this machine lets convlens use"),
        ((toy, "--param", LR[0], "--confirm", 1), "--confirm is 1; it takes 2 seeds or more"),
        ((toy, "--param", LR[0], "--pretrained", "x.safetensors"), "a sweep starts every model from random weights"),
        (
            (toy, "--param", "model=small,tiny", "--param", "pool=avg,max"),
            "--param pool=avg: model 'small' has no option 'pool'; it takes filters; model 'tiny' has no",
        ),
        ((toy, "--param", LR[0], "--freeze", 1), "a sweep starts every model from random weights, so it takes no --fr"),
        ((toy, "--param", "frozen=0,1"), "--param frozen makes no sense to search: all nets start from random weights"),
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
    assert (code, err) == (2, "convlens: a sweep needs a package more: pip install 'convlens[sweep]'\n")


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
    dataset = dataclasses.replace(dataset, train=dataset.train.take(torch.arange(1200).repeat(5)))
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

    few = dataclasses.replace(dataset, train=dataset.train.take(torch.arange(350)))  # ten steps an epoch at least
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


def test_a_net_without_an_option_is_searched_beside_one_with_it(toy: str) -> None:
    sweep = Sweep.create(toy, "digits", params=["model=small,fashion-2conv", "filters=4,8"], trials=1)
    assert worker.resolve(sweep, {"model": "small", "width": 4}).filters == 4
    assert worker.resolve(sweep, {"model": "fashion-2conv", "width": 4}).filters is None


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
    monkeypatch.setattr(sys, "argv", ["convlens", "lr-find", "digits", "--to", "nowhere/x.png"])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    said = "--to nowhere/x.png: there is no folder nowhere; make it, or choose another place"
    assert leaving.value.code == 2 and capsys.readouterr().err == f"convlens: {said}\n"
    assert not Path("nowhere").exists()
    monkeypatch.setattr(sys, "argv", ["convlens", *words, "--epochs", "1"])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    assert not leaving.value.code
