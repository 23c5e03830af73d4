"""Proof of honesty: the test labels reach no training artifact, and the pages say what the records say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import harness, time_to_accuracy
from scripts import results

from convlens.data.dataset import Split
from convlens.data.loading import load_dataset
from convlens.evaluation.metrics import wilson_interval
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGE, BENCHMARKS, README = RESULTS / "accuracy.md", RESULTS / "benchmarks.md", ROOT / "README.md"


def between(path: Path, mark: str) -> str:
    """Return what stands between the marks of that name."""
    return path.read_text(encoding="utf-8").split(f"<!-- {mark} -->\n")[1].split(f"\n<!-- end {mark} -->")[0]


@pytest.mark.parametrize("mark", ["strong", "fast", "best", "classics"])
def test_the_tables_are_those_of_the_records(mark: str) -> None:
    content = between(PAGE, mark)
    assert results.table(getattr(results, mark.upper()), content) == content


def test_the_calibration_table_is_that_of_the_records() -> None:
    content = between(PAGE, "calibration")
    assert results.calibration(content) == content and content.count("\n") >= 6


RECORDED = sorted(path for path in (ROOT / "benchmarks" / "records").glob("*.json") if path.stem != "results")


@pytest.mark.parametrize("path", RECORDED, ids=[path.stem for path in RECORDED])
def test_the_tables_of_the_benchmarks_are_those_of_their_records(path: Path) -> None:
    table = harness.shown(json.loads(path.read_text(encoding="utf-8")))
    pages = [page for page in (PAGE, BENCHMARKS) if f"<!-- {path.stem} -->" in page.read_text(encoding="utf-8")]
    assert [between(page, path.stem) for page in pages] == [table]


@pytest.mark.parametrize("name", time_to_accuracy.RACES)
def test_the_races_are_tables_of_their_courses(name: str) -> None:
    told = json.loads((ROOT / "benchmarks" / "records" / f"race-{name}.json").read_text(encoding="utf-8"))
    assert time_to_accuracy.race_table(told["records"]).splitlines() == told["table"]
    race = time_to_accuracy.RACES[name]  # the races that were run are those that would be run
    assert all(tuple(record["targets"]) == race.targets for record in told["records"])
    ours = [record["who"] for record in told["records"] if "convlens" in record["who"]]
    assert ours == [f"convlens, recipe `{recipe}`" for recipe in race.recipes]


def test_every_table_has_its_records() -> None:
    recorded = {path.stem for path in RECORDED} | {"strong", "fast", "best", "classics", "calibration"}
    for page in (PAGE, BENCHMARKS):
        for mark in re.findall("<!-- end (.*) -->", page.read_text(encoding="utf-8")):
            assert mark in recorded or between(page, mark).startswith("Not measured"), mark


def test_the_headline_of_readme_is_that_of_the_results() -> None:
    assert results.headline(PAGE.read_text(encoding="utf-8")) == between(README, "headline")


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("restore_best", [False, True])
def test_shuffled_test_labels_change_no_training_artifact_by_one_bit(restore_best: bool) -> None:
    digits = load_dataset("digits")
    shuffled = digits.test.labels[torch.randperm(len(digits.test), generator=torch.Generator().manual_seed(0))]
    assert not torch.equal(shuffled, digits.test.labels)
    other = dataclasses.replace(digits, test=Split(images=digits.test.images, labels=shuffled, ids=digits.test.ids))
    options: dict[str, Any] = {
        "epochs": 3,
        "restore_best": restore_best,
        "patience": 2,
        "threads": 1,
        "precision": "fp32",
    }
    runs = []
    for name, dataset in (("true", digits), ("shuffled", other)):
        experiment = Experiment.start(TrainRequest.create(dataset, out=name, device="cpu", **options))
        for _ in experiment.epochs():
            pass
        runs.append(experiment.finish())
    first, second = runs
    assert first.accuracy > 0.9 and second.accuracy < 0.3
    files = [Path("model/model.safetensors"), Path("model/uncertainty.safetensors"), Path("split.csv")]
    files += [path.relative_to(first.path) for path in first.run_dir.checkpoint.glob("*.safetensors")]
    assert len(files) >= 4
    for file in files:
        assert (first.path / file).read_bytes() == (second.path / file).read_bytes(), file
    timeless = [[{**row, "seconds": 0} for row in run.metrics] for run in runs]
    assert timeless[0] == timeless[1]
    trust = [run.classifier.bundle.uncertainty for run in runs]
    assert trust[0] is not None and trust[1] is not None and trust[0].to_json() == trust[1].to_json()
    said = [[(row["image_id"], row["predicted_label"], row["confidence"]) for row in run.predictions] for run in runs]
    assert said[0] == said[1]


@pytest.mark.parametrize(("n", "share"), [(1000, 0.9), (10_000, 0.99), (500, 0.5)])
def test_wilson_intervals_cover_what_they_say(n: int, share: float) -> None:
    hits = np.random.default_rng(7).binomial(n, share, size=10_000)
    covered = [low <= share <= high for low, high in (wilson_interval(int(k), n) for k in hits)]
    assert 0.94 <= np.mean(covered) <= 0.96
