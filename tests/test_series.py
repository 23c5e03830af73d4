"""Seeds, folds, and runs beside each other."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens.data.cross_validation import take_fold
from convlens.data.loading import load_dataset
from convlens.errors import UsageError
from convlens.runs.compare import compare_runs
from convlens.runs.evaluate import evaluate_run
from convlens.runs.group import GroupSummary, RunGroup
from convlens.runs.request import TrainRequest
from convlens.runs.run import Run

QUICK: dict[str, Any] = {"epochs": 1, "device": "cpu", "threads": 1, "precision": "fp32"}

pytestmark = pytest.mark.usefixtures("no_plots")


def start_group(data: Any, *, seeds: int | None = None, folds: int | None = None, **options: Any) -> RunGroup:
    """Start a group of runs."""
    return RunGroup.start(TrainRequest.create(data, **options), seeds=seeds, folds=folds)


def test_from_python_and_the_callers_random_numbers_stay() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    summary = convlens.train_seeds("digits", 2, **QUICK)
    assert summary.n == 2 and Path("runs/digits-seeds-1/summary.json").exists()
    assert torch.equal(torch.get_rng_state(), state)
    for use in (Run, convlens.Classifier.load):  # what takes one run says so
        with pytest.raises(
            UsageError, match="^runs/digits-seeds-1 is a group of runs: name one of the run folders in it$"
        ):
            use("runs/digits-seeds-1")  # type: ignore[operator]


def test_seeds_differ_and_each_is_the_run_that_its_seed_makes_alone() -> None:
    summary = start_group("digits", seeds=3, out="series", seed=5, **QUICK).run()
    runs = [Run(f"series/seed-{seed}") for seed in (5, 6, 7)]
    assert len({(run.path / "model" / "model.safetensors").read_bytes() for run in runs}) == 3
    alone = convlens.train("digits", seed=6, **QUICK)
    assert alone.test == runs[1].test
    accuracies = [run.accuracy for run in runs]
    assert summary.mean == pytest.approx(np.mean(accuracies))
    assert summary.sd == pytest.approx(np.std(accuracies, ddof=1))
    assert summary.best["accuracy"] == max(accuracies) and summary.worst["accuracy"] == min(accuracies)
    assert summary.runs["seed-5"]["accuracy_ci95"] == runs[0].test["accuracy_ci95"]
    assert GroupSummary.from_json(json.loads(Path("series/summary.json").read_text())) == summary


def test_folds_test_every_image_once() -> None:
    digits = load_dataset("digits")
    parts = [take_fold(digits, number, 4) for number in (1, 2, 3, 4)]
    tested = [image for part in parts for image in part.test.ids]
    assert len(tested) == len(set(tested)) == 1797
    for part in parts:
        assert not set(part.train.ids) & set(part.test.ids) and len(part.train) + len(part.test) == 1797
        counts = torch.bincount(part.test.labels)
        assert counts.max() - counts.min() <= 4  # classes are about as frequent in each
    assert torch.equal(take_fold(digits, 3, 4).test.images, parts[2].test.images)


def test_a_cross_validation_uses_the_recipe_of_its_data_and_adds_up() -> None:
    summary = start_group("digits", folds=2, out="folds", **QUICK).run()
    runs = [Run("folds/fold-1"), Run("folds/fold-2")]
    assert {run.config["recipe"]["name"] for run in runs} == {"digits"}
    assert summary.pooled["num_images"] == 1797
    correct = sum(run.test["correct"] for run in runs)
    assert summary.pooled["accuracy"] == correct / 1797
    assert summary.mean == statistics.mean(run.accuracy for run in runs)


def test_a_fold_is_evaluated_on_itself_and_on_nothing_that_it_was_trained_on() -> None:
    start_group("digits", folds=2, out="folds", **QUICK).run()
    run = Run("folds/fold-2")
    assert evaluate_run(run.path)["accuracy"] == run.accuracy
    with pytest.raises(UsageError, match="^folds/fold-2 is one fold: it was trained on test images of digits"):
        evaluate_run(run.path, test_on="digits")


def test_a_series_never_writes_into_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    monkeypatch.chdir(tmp_path / "photos")
    with pytest.raises(UsageError, match="would be written into the data"):
        start_group(".", seeds=2, **QUICK)
    assert not (tmp_path / "photos" / "runs").exists()


def test_changed_data_cannot_be_gone_on_with(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez("toy.npz", x=x, y=np.arange(40) % 2)
    start_group("toy.npz", seeds=2, out="series", **QUICK)
    np.savez("toy.npz", x=255 - x, y=np.arange(40) % 2)
    with pytest.raises(UsageError, match="^the data in .*toy.npz have changed since series was started; train anew$"):
        RunGroup.resume("series")


def test_a_run_that_had_hardly_begun_is_begun_anew() -> None:
    series = start_group("digits", seeds=2, out="series", **QUICK)
    Path("series/seed-1").mkdir()  # killed before its config.json was there
    assert series.run().n == 2


@pytest.mark.parametrize("kind", ["seeds", "folds"])
def test_an_interrupted_series_goes_on(kind: str) -> None:
    options: dict[str, Any] = {kind: 2, **QUICK, "epochs": 2}
    whole = start_group("digits", out="whole", **options).run()
    parts = start_group("digits", out="parts", **options)
    experiment = next(parts.experiments())
    stopped: list[bool] = []
    with pytest.raises(convlens.ConvlensError, match="^stopped at step"):
        for _ in experiment.epochs(should_stop=lambda: bool(stopped)):
            stopped.append(True)
    assert RunGroup.resume("parts").run() == whole
    with pytest.raises(UsageError, match="^the group parts is finished; nothing to resume$"):
        RunGroup.resume("parts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 1}, "^`seeds` is 1; a spread needs at least 2$"),
        ({}, "^give either `seeds` or `folds`"),
        ({"folds": 1}, "^`folds` is 1; a spread needs at least 2$"),
        ({"seeds": 2, "folds": 2}, "^give either `seeds` or `folds`"),
        ({"folds": 500}, "^class '0' has 178 images, fewer than the 500 folds$"),
        ({"seeds": 2, "epoch": 3}, "^unknown recipe option 'epoch'; did you mean 'epochs'"),
        ({"seeds": 2, "model": "smal"}, "^unknown model 'smal'; did you mean 'small'"),
        ({"seeds": 2, "image_size": 96}, "^`image_size` is for folders"),
    ],
)
def test_a_wrong_series_leaves_no_folder(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        start_group("digits", **options)
    assert not list(Path().glob("runs/*"))


def test_compare_counts_what_one_alone_has_right() -> None:
    first = convlens.train("digits", out="first", **QUICK)
    second = convlens.train("digits", out="second", seed=1, **{**QUICK, "epochs": 3})
    (a, b, paired), (_, _, same) = compare_runs(["first", "second", "first"])
    assert (a, b) == ("first", "second")
    assert paired.n == 359 and math.isclose(paired.difference, second.accuracy - first.accuracy, abs_tol=1e-12)
    assert (same.only_a, same.only_b, same.p_value) == (0, 0, 1.0)


def test_only_runs_on_the_same_images_are_compared() -> None:
    convlens.train("digits", out="first", **QUICK)
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    convlens.train((x, np.arange(40) % 2), out="other", **{**QUICK, "batch_size": 8})
    with pytest.raises(UsageError, match="^first and other were tested on different images and cannot be compared$"):
        compare_runs(["first", "other"])
    with pytest.raises(UsageError, match="^name two or more runs to compare$"):
        compare_runs(["first"])


@pytest.mark.parametrize("kind", ["seeds", "folds"])
def test_images_are_left_out_of_every_run(kind: str) -> None:
    digits = load_dataset("digits")
    names = [f"train/{digits.train.ids[0]}", f"train/{digits.train.ids[5]}", f"test/{digits.test.ids[3]}"]
    Path("remove.txt").write_text("\tone colour\n".join(names))
    series = start_group("digits", out="series", exclude="remove.txt", **{kind: 2}, **QUICK)
    with contextlib.closing(series.experiments()) as experiments:  # interrupted after the first
        first = next(experiments)
        list(first.epochs())
        first.finish()
    Path("remove.txt").unlink()
    RunGroup.resume("series").run()
    for name in series.plan.runs:
        run = Run(f"series/{name}")
        assert sum(run.config["data"]["counts"].values()) == 1797 - 3
        assert (run.path / "excluded.txt").read_text().split() == sorted(names)
        ids = {row.split(",")[1] for row in (run.path / "split.csv").read_text().splitlines()}
        assert len(ids) == 1797 - 3 + 1 and not ids & {*names, *(name.split("/")[1] for name in names)}
        assert evaluate_run(run.path)["accuracy"] == run.accuracy


def test_a_series_goes_on_elsewhere_only_if_that_is_accepted() -> None:
    series = start_group("digits", seeds=2, out="series", **QUICK)
    with contextlib.closing(series.experiments()) as experiments:
        first = next(experiments)
        list(first.epochs())
        first.finish()
    config = json.loads(first.run_dir.config.read_text())
    config["machine"]["torch"] = "2.0.0"
    first.run_dir.config.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"^series was started with another version of PyTorch \(2.0.0, now "):
        RunGroup.resume("series")
    assert RunGroup.resume("series", accept_changes=True).run().n == 2


def test_what_is_left_out_adds_up() -> None:
    digits = load_dataset("digits")
    one, two, three = digits.train.ids[:2] + digits.test.ids[:1]
    less = digits.drop([one]).drop([f"train/{two}", f"test/{three}"])
    assert less.excluded == tuple(sorted([one, f"train/{two}", f"test/{three}"]))
    assert less.drop([]) is less
