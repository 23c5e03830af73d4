"""One experiment from data to report: every file of a run, what resuming refuses, and what an old run can start."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens.data.loading import load_dataset
from convlens.errors import ConvlensError, TrainingInterruptedError, UnknownNameError, UsageError
from convlens.evaluation.metrics import dense_confusion
from convlens.inference.classifier import Classifier
from convlens.reports.image_grid import MUTED, TEXT
from convlens.reports.plots import GRID
from convlens.reports.run import PLOTS
from convlens.run_dir import RunDir
from convlens.runs.artifacts import current_command
from convlens.runs.config import InitFrom, RunConfig
from convlens.runs.evaluate import evaluate_run
from convlens.runs.experiment import Experiment, train
from convlens.runs.request import TrainRequest
from convlens.runs.run import Run
from convlens.training.recipe import Recipe
from convlens.training.recipes import get_recipe

QUICK: dict[str, Any] = {"threads": 1, "device": "cpu", "precision": "fp32"}
TINY = Recipe(name="tiny", width=4, epochs=2, batch_size=16, val_fraction=0.25, **QUICK)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Train on the digits once for the whole file; the run is only read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["/usr/local/bin/convlens", "train", "digits", "--epochs", "1", "--out", "a b"])
        yield convlens.train("digits", epochs=1, seed=3, out=tmp_path_factory.mktemp("runs") / "digits-1", **QUICK)


def write_npz(path: Path, classes: int = 4, seed: int = 0) -> Path:
    """Write a data set of 80 images 8x8, one bright quadrant for each of (up to four) classes."""
    generator = np.random.default_rng(seed)
    y = np.arange(80) % classes
    x = generator.integers(0, 100, (80, 8, 8), dtype=np.uint8)
    for image, label in zip(x, y, strict=True):
        top, left = label // 2 * 4, label % 2 * 4
        image[top : top + 4, left : left + 4] += 100
    np.savez(path, x=x, y=y)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stop(experiment: Experiment, steps: int) -> None:
    """Train for so many looks at the flag, then interrupt."""
    left = iter(range(steps))
    with pytest.raises(TrainingInterruptedError):
        for _ in experiment.epochs(should_stop=lambda: next(left, None) is None):
            pass


# a run folder


def test_every_file_of_the_layout_is_there(run: Run) -> None:
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoint",
        "config.json",
        "confusion_matrix.csv",
        "live",
        "metrics.csv",
        "model",
        "plots",
        "predictions.csv",
        "report.html",
        "split.csv",
        "test.json",
    ]
    assert sorted(path.name for path in (run.path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "uncertainty.safetensors",
    ]
    assert {path.name for path in (run.path / "plots").iterdir()} == set(PLOTS)
    assert sorted(path.suffix for path in (run.path / "checkpoint").iterdir()) == 2 * [".json"] + 2 * [".safetensors"]
    scrap = [path for path in run.path.rglob("*") if path.name.startswith(".")]
    assert scrap == []


def test_config(run: Run) -> None:
    config = run.config
    assert config["version"] == version("convlens")
    assert config["command"] == "convlens train digits --epochs 1 --out 'a b'"
    assert Recipe.from_json(config["recipe"]) == get_recipe("digits").override(epochs=1, seed=3, **QUICK)
    assert config["model"]["name"] == "small"
    assert config["model"]["arguments"] == {
        "channels": 1,
        "image_height": 8,
        "image_width": 8,
        "classes": 10,
        "width": 16,
    }
    digits = load_dataset("digits")
    assert config["data"]["fingerprint"] == digits.fingerprint()
    assert config["data"]["source"] == config["data"]["name"] == "digits"
    assert config["data"]["classes"] == list("0123456789")
    assert config["data"]["shape"] == [1, 8, 8]
    counts = config["data"]["counts"]
    assert counts["train"] + counts["validation"] == len(digits.train) and counts["test"] == len(digits.test)
    assert config["machine"]["torch"] == torch.__version__
    assert config["machine"]["device"] == "cpu" and config["machine"]["threads"] == 1
    assert config["preprocess"]["height"] == 8


def test_metrics(run: Run) -> None:
    rows = rows_of(run.run_dir.metrics)
    assert list(rows[0]) == ["epoch", "seconds", "lr", "train_loss", "train_acc", "val_loss", "val_acc"]
    assert [row["epoch"] for row in rows] == ["1"]
    assert run.metrics == [{key: float(value) for key, value in rows[0].items()}]
    assert 0 <= float(rows[0]["val_acc"]) <= 1


def test_predictions_agree_with_the_test(run: Run) -> None:
    rows = rows_of(run.run_dir.predictions)
    assert list(rows[0]) == [
        "image_id",
        "true_label",
        "predicted_label",
        "confidence",
        *(f"p_{label}" for label in range(10)),
    ]
    test = run.test
    assert len(rows) == test["num_images"] == len(load_dataset("digits").test)
    right = sum(row["true_label"] == row["predicted_label"] for row in rows)
    assert right == test["correct"]
    assert test["accuracy"] == run.accuracy == right / len(rows)
    low, high = test["accuracy_ci95"]
    assert low < test["accuracy"] < high
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)
    matrix = np.zeros((10, 10), dtype=int)
    for row in rows:
        matrix[int(row["true_label"]), int(row["predicted_label"])] += 1
    assert np.array_equal(matrix, run.confusion_matrix)
    cells = rows_of(run.run_dir.confusion)
    assert list(cells[0]) == ["true_label", "predicted_label", "count"]
    assert all(int(cell["count"]) > 0 for cell in cells) and len(cells) == np.count_nonzero(matrix)
    assert test["accuracy"] > 0.3, "an epoch teaches something"


def test_split_tells_every_image_once(run: Run) -> None:
    rows = rows_of(run.run_dir.split)
    assert sorted(int(row["image_id"]) for row in rows) == list(range(1797))
    counts = {name: sum(row["split"] == name for row in rows) for name in ("train", "validation", "test")}
    assert counts == run.config["data"]["counts"]
    assert [row["image_id"] for row in rows if row["split"] == "test"] == [
        row["image_id"] for row in rows_of(run.run_dir.predictions)
    ]


def test_bundle_of_a_run(run: Run) -> None:
    config = json.loads((run.path / "model" / "config.json").read_text())
    assert config["training"]["test"]["accuracy"] == run.accuracy
    assert config["training"]["recipe"] == run.config["recipe"]
    card = (run.path / "model" / "README.md").read_text()
    assert f"{run.accuracy:.2%} of {run.test['num_images']} images" in card
    assert run.config["command"] in card
    rows = rows_of(run.run_dir.predictions)
    test = load_dataset("digits").test
    prediction = run.predict(test.images[0, 0].numpy())
    assert prediction.label == rows[0]["predicted_label"]
    assert prediction.confidence == pytest.approx(float(rows[0]["confidence"]), abs=1e-4)


def test_evaluating_a_run_again_gives_the_same_figures(run: Run) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    again = evaluate_run(run.path)
    loss, cells = again.pop("loss"), again.pop("confusion_matrix")
    assert np.array_equal(dense_confusion(cells, run.config["data"]["classes"]), run.confusion_matrix)
    assert again == {key: value for key, value in run.test.items() if key != "loss"}
    assert loss == pytest.approx(run.test["loss"], rel=1e-5)
    assert evaluate_run(run.path / "model")["accuracy"] == run.accuracy
    assert evaluate_run(run.path, test_on="digits")["accuracy"] == run.accuracy
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_evaluating_on_other_data_is_refused(run: Run, tmp_path: Path) -> None:
    data = write_npz(tmp_path / "toy.npz")
    with pytest.raises(UsageError) as caught:
        evaluate_run(run.path, test_on=data)
    assert str(caught.value) == f"{data} has other classes than {run.path}: it lacks 4, 5, 6, 7, 8, 9"
    with pytest.raises(UsageError, match=r"has images of \(C, H, W\) \(1, 9, 9\), .* takes \(1, 8, 8\)$"):
        evaluate_run(run.path, test_on=convlens.from_arrays(np.zeros((40, 9, 9), dtype=np.uint8), np.arange(40) % 10))


def test_evaluating_on_arrays_is_refused_in_one_line(run: Run) -> None:
    x, y = np.zeros((40, 8, 8), dtype=np.uint8), np.arange(40) % 4
    for data in ((x, y), convlens.from_arrays(x, y)):
        with pytest.raises(UsageError, match="has other classes than ") as caught:
            evaluate_run(run.path, test_on=data)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_run_reads_its_folder(run: Run) -> None:
    again = Run(str(run.path))
    assert (again.accuracy, again.config, again.metrics) == (run.accuracy, run.config, run.metrics)
    assert again.report == run.path / "report.html"
    assert repr(again) == f"Run({str(run.path)!r})"
    with pytest.raises(UsageError, match="^there is no run folder nowhere"):
        Run("nowhere")
    with pytest.raises(UsageError, match="is not a run folder: it has no config.json$"):
        Run(run.path / "plots")


def test_a_run_hands_out_its_plots_for_a_notebook(run: Run) -> None:
    with Image.open(run.path / "plots" / "curves.png") as drawn:
        assert np.array_equal(run.plot("curves"), drawn)
    with pytest.raises(UnknownNameError, match="^unknown plot 'curve'; did you mean 'curves'"):
        run.plot("curve")


# the report


class References(HTMLParser):
    """Collects what a page refers to, and the tags that were never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "img", "br", "hr", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_needs_no_network_and_holds_every_plot(run: Run) -> None:
    page = run.report.read_text(encoding="utf-8")
    parser = References()
    parser.feed(page)
    assert parser.open == []
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    text = re.sub(r"base64,[^\"]*|xmlns(:xlink)?=\"[^\"]*\"", "", page)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", text)
    assert page.count("<svg") == 3 and page.count('<div class=cells style="--columns:') == 4 == len(PLOTS) - 3
    for heading in ("Confusion matrix", "Reliability diagram", "Learning curves"):
        assert page.count(heading) == 1  # text, to be read aloud and found
    for name in PLOTS:
        assert (run.path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_report_is_dark_in_the_dark(run: Run) -> None:
    svg = "".join(re.findall(r"<svg.*?</svg>", run.report.read_text(encoding="utf-8"), flags=re.DOTALL))
    for colour in (TEXT, MUTED, GRID):
        assert colour not in svg
    assert svg.count("var(--ink)") > 20 and "var(--quiet)" in svg and "var(--line)" in svg


def test_report_says_what_was_measured(run: Run) -> None:
    page = run.report.read_text(encoding="utf-8")
    low, high = run.test["accuracy_ci95"]
    assert f"{run.accuracy:.2%}" in page
    assert f"95% interval {low:.2%} to {high:.2%}, n = {run.test['num_images']}" in page
    assert "convlens train digits --epochs 1 --out &#x27;a b&#x27;" in page
    assert "<td>nesterov</td>" in page
    for column in run.metrics[0]:
        assert f"<th>{column.replace('_', ' ')}</th>" in page


def test_plots_are_pictures_that_show_something(run: Run) -> None:
    for name in PLOTS:
        with Image.open(run.path / "plots" / name) as image:
            assert min(image.size) > 100
            low, high = image.convert("L").getextrema()
            assert high - low > 100, name


def test_names_from_outside_are_escaped_in_the_report(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    classes = ["<b>cat</b>", "d&g", "a$b^{", '"owl"']
    data = convlens.from_arrays(x, np.arange(40) % 4, classes=classes, name="<i>pets")
    finished = train(data, TINY.override(epochs=1), out=tmp_path / "run")
    page = finished.report.read_text(encoding="utf-8")
    assert "<b>cat" not in page and "<i>pets" not in page
    assert "&lt;b&gt;cat&lt;/b&gt;" in page and "&lt;i&gt;pets" in page
    parser = References()
    parser.feed(page)
    assert parser.open == []


# the command that is recorded


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/convlens", "train", "my photos", "--lr", "0.1"], "convlens train 'my photos' --lr 0.1"),
        ([str(Path(convlens.__file__).parent / "__main__.py"), "train", "mnist"], "convlens train mnist"),
        (["script.py", "train"], "convlens.train(...) in Python"),
        ([""], "convlens.train(...) in Python"),
        (["/lib/python/site-packages/pytest/__main__.py", "tests"], "convlens.train(...) in Python"),
    ],
)
def test_command_line(argv: list[str], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert current_command() == command


# where a run goes


def test_runs_are_numbered_and_never_overwritten(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40) % 4
    places = [str(Experiment.start(TrainRequest.create((x, y), TINY)).run_dir.path) for _ in range(3)]
    assert places == ["runs/arrays-1", "runs/arrays-2", "runs/arrays-3"]


def test_an_existing_out_is_refused(run: Run, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as caught:
        train("digits", epochs=1, out=run.path, **QUICK)
    assert str(caught.value) == (f"{run.path} exists already; choose another `out`, or continue that run with `resume`")
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("digts", {}, "^unknown data set or folder 'digts'; did you mean 'digits'"),
        ("digits", {"recipe": "mnst-99"}, "^unknown recipe 'mnst-99'; did you mean 'mnist-99'"),
        ("digits", {"epoch": 3}, "^unknown recipe option 'epoch'; did you mean 'epochs'"),
        ("digits", {"epochs": 0}, "^`epochs` is 0; it must be at least 1$"),
        ("digits", {"model": "mnist-4conv"}, "has no option 'width'|images are too small"),
        ("digits", {"recipe": "mnist-4conv"}, "^the images are too small for model 'mnist-4conv'"),
        ("digits", {"init_from": "nowhere"}, "^unknown run folder or model 'nowhere'"),
    ],
)
def test_a_wrong_call_leaves_no_folder(data: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train(data, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists() and not Path("runs").exists()


def test_another_net_without_the_filters_of_the_recipe_for_digits() -> None:
    # --model folder-cnn on the digits: the recipe's own `filters` are of the net that was replaced
    experiment = Experiment.start(TrainRequest.create("digits", model="folder-cnn", **QUICK))
    assert type(experiment.model).__name__ == "FolderCNN"


# resuming


@pytest.mark.usefixtures("no_plots")
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "toy.npz")
    whole = train(data, TINY, out=tmp_path / "whole", translate=1)
    for steps in (2, 5):
        out = tmp_path / f"parts-{steps}"
        stop(Experiment.start(TrainRequest.create(data, TINY, out=out, translate=1)), steps)
        with pytest.raises(UsageError, match="is not finished; resume it first"):
            Classifier.load(out)
        torch.manual_seed(99)
        experiment = Experiment.resume(out)
        parts = experiment.run()
        assert parts.test == whole.test
        for name in ("predictions.csv", "model/model.safetensors", "split.csv"):
            assert (out / name).read_bytes() == (whole.path / name).read_bytes()
        timeless = [[{**row, "seconds": 0} for row in each.metrics] for each in (parts, whole)]
        assert timeless[0] == timeless[1]


@pytest.mark.usefixtures("no_plots")
def test_a_run_that_was_stopped_while_it_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_npz(tmp_path / "toy.npz")
    experiment = Experiment.start(TrainRequest.create(data, TINY, out=tmp_path / "run"))
    for _ in experiment.epochs():
        pass
    with monkeypatch.context() as patch:
        patch.setattr("convlens.runs.finalize.write_predictions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            experiment.finish()
    again = Experiment.resume(tmp_path / "run")
    assert [record.epoch for record in again.epochs()] == [1, 2]
    assert again.finish().test == train(data, TINY, out=tmp_path / "whole").test


def test_a_finished_run_cannot_be_resumed(run: Run) -> None:
    with pytest.raises(UsageError, match=f"^the training of {run.path} is finished; nothing to resume$"):
        Experiment.resume(run.path)


def test_changed_data_cannot_be_resumed(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "toy.npz")
    stop(Experiment.start(TrainRequest.create(data, TINY, out=tmp_path / "run")), 2)
    write_npz(data, seed=1)
    with pytest.raises(UsageError) as caught:
        Experiment.resume(tmp_path / "run")
    assert str(caught.value) == f"the data in {data} have changed since {tmp_path / 'run'} was started; train anew"
    write_npz(data)
    assert Experiment.resume(tmp_path / "run").recipe == TINY


def test_objects_in_memory_cannot_be_resumed(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40) % 4
    stop(Experiment.start(TrainRequest.create((x, y), TINY, out=tmp_path / "run")), 1)
    with pytest.raises(UsageError, match="were objects in memory; only data on disk can be resumed$"):
        Experiment.resume(tmp_path / "run")


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text("{}")
    with pytest.raises(ConvlensError, match=f"^{folder.config} is damaged"):
        Experiment.resume(folder.path)


# starting from a trained net


def test_init_takes_the_stages_and_a_new_head(run: Run, tmp_path: Path) -> None:
    data = write_npz(tmp_path / "toy.npz")
    experiment = Experiment.start(TrainRequest.create(data, init_from=run.path, out=tmp_path / "run", **QUICK))
    trained, fresh = run.classifier.model.state_dict(), experiment.model.state_dict()
    assert experiment.recipe.model == "small" and experiment.recipe.width == 16
    assert fresh["head.2.weight"].shape == (4, 64) and trained["head.2.weight"].shape == (10, 64)
    stages = [key for key in trained if not key.startswith("head.")]
    assert all(torch.equal(fresh[key], trained[key]) for key in stages)
    assert experiment.config.init_from == InitFrom(str(run.path), f"{len(stages)} of {len(trained)}")


@pytest.mark.usefixtures("no_plots")
def test_init_helps_and_can_be_resumed(run: Run, tmp_path: Path) -> None:
    rules: dict[str, Any] = {"epochs": 2, "batch_size": 64, "lr": 0.02, **QUICK}
    whole = train("digits", init_from=run.path, out=tmp_path / "whole", **rules)
    cold = train("digits", out=tmp_path / "cold", **rules)
    assert whole.metrics[0]["train_loss"] < cold.metrics[0]["train_loss"]
    stop(Experiment.start(TrainRequest.create("digits", init_from=run.path, out=tmp_path / "parts", **rules)), 3)
    experiment = Experiment.resume(tmp_path / "parts")
    assert experiment.run().test == whole.test


@pytest.mark.usefixtures("no_plots")
def test_init_of_a_whitened_net_keeps_the_whitening_it_was_trained_with(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "toy.npz")
    rules: dict[str, Any] = {"model": "whitened", "width": 4, "epochs": 2, "batch_size": 16, "lr": 0.02, **QUICK}
    first = train("digits", out=tmp_path / "first", **rules)
    whole = train(data, init_from=first.path, out=tmp_path / "whole", **rules)
    stem = first.classifier.model.state_dict()["body.stem.0.weight"]
    assert torch.equal(whole.classifier.model.state_dict()["body.stem.0.weight"], stem)
    stop(Experiment.start(TrainRequest.create(data, init_from=first.path, out=tmp_path / "parts", **rules)), 3)
    experiment = Experiment.resume(tmp_path / "parts")
    assert experiment.run().test == whole.test


def test_whitening_looks_at_every_class_of_a_set_that_lies_class_by_class() -> None:
    images = np.zeros((4000, 32, 32), dtype=np.uint8)
    images[2000:] = np.random.default_rng(0).integers(0, 256, (2000, 32, 32))  # the first class is blank
    rules: dict[str, Any] = {"model": "whitened", "width": 4, "val_fraction": 0.0, "image_size": 32, **QUICK}
    experiment = Experiment.start(TrainRequest.create((images, np.arange(4000) // 2000), **rules))
    stem = experiment.model.state_dict()["body.stem.0.weight"]
    # of blank patches alone every filter would have the largest scale there is, 1 / sqrt(5e-4)
    assert stem.flatten(1).norm(dim=1).max() < 10


@pytest.mark.usefixtures("no_plots")
def test_init_from_a_net_of_default_width(tmp_path: Path) -> None:
    # its bundle does not say `filters`, and the default recipe of the digits does
    data = write_npz(tmp_path / "toy.npz")
    wide = Recipe(epochs=1, batch_size=64, val_fraction=0.0, **QUICK)
    first = train(data, wide, out=tmp_path / "wide")
    experiment = Experiment.start(TrainRequest.create("digits", init_from=first.path, out=tmp_path / "next", **QUICK))
    assert experiment.model.state_dict()["head.2.weight"].shape == (10, 128)


@pytest.mark.usefixtures("no_plots")
def test_init_from_a_net_that_does_not_fit(run: Run, tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (40, 3, 40, 40), dtype=np.uint8)
    with pytest.raises(UsageError, match="^(--init-from|`init_from`): no weight of its small fits"):
        Experiment.start(
            TrainRequest.create((colour, np.arange(40) % 4), init_from=run.path, width=3, out=tmp_path / "run", **QUICK)
        )
    assert not (tmp_path / "run").exists()


# what is asked for, and what is recorded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": 3}, "^a recipe is a name or a Recipe, not a int"),
        (
            {"budget": "9s", "epochs": 2},
            "^`budget` sets the length; leave out `epochs`, `max_steps` and",
        ),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainRequest.create("digits", **options)


def test_a_request_tells_its_own_options_from_those_of_the_recipe() -> None:
    request = TrainRequest.create("digits", "digits", out="run", epochs=3, seed=1)
    assert (request.out, request.overrides) == ("run", {"epochs": 3, "seed": 1})


def test_the_config_of_a_run_is_read_as_it_was_written(run: Run) -> None:
    config = RunConfig.read(run.run_dir.config)
    assert json.loads(json.dumps(config.to_json())) == run.config
    assert config.recipe == get_recipe("digits").override(epochs=1, seed=3, **QUICK)
    assert config.init_from is None and "init_from" not in run.config
    started = replace(config, init_from=InitFrom("digits", "12 of 14"), environment_changes=("device (cpu, now cuda)",))
    assert RunConfig.from_json(json.loads(json.dumps(started.to_json()))) == started


# from Python


def test_data_forms_and_recipes(tmp_path: Path) -> None:
    data = load_dataset(write_npz(tmp_path / "toy.npz"))
    assert Experiment.start(TrainRequest.create(data, TINY, out=tmp_path / "a")).recipe == TINY
    assert Experiment.start(TrainRequest.create(data, out=tmp_path / "b", **QUICK)).recipe.name == "folder"
    digits = Experiment.start(TrainRequest.create(load_dataset("digits"), out=tmp_path / "c", **QUICK))
    assert asdict(digits.recipe) == asdict(get_recipe("digits").override(**QUICK))
    named = Experiment.start(TrainRequest.create(data, "fashion-2conv", out=tmp_path / "d", **QUICK))
    assert type(named.model).__name__ == "FashionTwoConv"


def test_the_seed_fixes_weights_and_validation(tmp_path: Path) -> None:
    data = load_dataset(write_npz(tmp_path / "toy.npz"))

    def create(seed: int, generator: int) -> Experiment:
        torch.manual_seed(generator)
        return Experiment.start(TrainRequest.create(data, TINY, seed=seed))

    first, again, other = create(0, 1), create(0, 2), create(1, 1)
    weights = [experiment.model.state_dict()["body.stem.0.weight"] for experiment in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    ids = [list(e.dataset.validation.ids) for e in (first, again, other) if e.dataset.validation]
    assert ids[0] == ids[1] != ids[2]
    tests = [list(experiment.dataset.test.ids) for experiment in (first, other)]
    assert tests[0] == tests[1], "every run is judged on one test split"


@pytest.mark.usefixtures("no_plots")
def test_test_columns_are_there_where_the_test_is_watched(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "toy.npz")
    finished = train(data, TINY, log_test_metrics=True, val_fraction=0.0, out=tmp_path / "run")
    (_, last) = rows_of(finished.run_dir.metrics)
    assert list(last)[-2:] == ["test_loss", "test_acc"]
    assert last["val_loss"] == last["val_acc"] == ""
    assert float(last["test_acc"]) == pytest.approx(finished.accuracy)
    assert finished.metrics[0]["val_acc"] is None


@pytest.mark.usefixtures("no_plots")
def test_classic_with_log_softmax_has_probabilities_that_sum_to_one(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    finished = train((x, np.arange(40) % 4), "mnist-4conv", epochs=1, out=tmp_path / "run", **QUICK)
    top = finished.predict(x[0], top=4).top
    assert sum(value for _, value in top) == pytest.approx(1.0, abs=1e-5)
    assert finished.test["loss"] == pytest.approx(np.log(4), abs=0.1)


def test_tensorboard_shows_the_curves_of_metrics_csv(tmp_path: Path) -> None:
    stopped = Experiment.start(TrainRequest.create("digits", out=tmp_path / "run", epochs=3, tensorboard=True))
    stop(stopped, 25)  # in the second epoch
    experiment = Experiment.resume(tmp_path / "run")
    assert len(list(experiment.epochs())) == 3
    # in a process of its own: it leaves files open
    code = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""
    folder = tmp_path / "run/tensorboard"
    read = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True, timeout=60)
    columns = {"loss/train": "train_loss", "accuracy/train": "train_acc", "learning rate": "lr"}
    columns |= {"loss/val": "val_loss", "accuracy/val": "val_acc"}
    curves, rows = json.loads(read.stdout), rows_of(tmp_path / "run/metrics.csv")
    assert sorted(curves) == sorted(columns)
    for tag, column in columns.items():
        assert curves[tag] == [[number + 1, pytest.approx(float(row[column]))] for number, row in enumerate(rows)]


def test_tensorboard_that_is_not_installed_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'convlens\[tensorboard\]'"):
        train("digits", out=tmp_path / "run", epochs=1, tensorboard=True)
    assert not (tmp_path / "run").exists()
