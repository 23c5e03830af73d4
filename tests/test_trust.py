"""The uncertainty model: calibration, prediction sets, out-of-distribution detection."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import convlens
from convlens.data.loading import load_dataset
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.calibration import CalibrationReport, CalibrationScores, ReliabilityBin
from convlens.evaluation.conformal import COVERAGE_LEVELS
from convlens.evaluation.metrics import wilson_interval
from convlens.evaluation.ood import MahalanobisModel, auroc, false_positive_rate, fit_threshold
from convlens.evaluation.uncertainty import UncertaintyModel
from convlens.inference.bundle import load_bundle
from convlens.inference.classifier import Classifier
from convlens.reports.plots import draw_reliability
from convlens.runs.run import Run

QUICK: dict[str, Any] = {"epochs": 6, "device": "cpu", "threads": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the digits, with validation images."""
    return convlens.train("digits", out=tmp_path_factory.mktemp("trust") / "run", **QUICK)


def test_mahalanobis_distances() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 3, generator=g) * torch.tensor([1.0, 10.0, 0.1])
    space = MahalanobisModel.fit(x, torch.zeros(5000, dtype=torch.int64), 1)
    # one standard deviation away along each axis
    away = space.means[0] + torch.diag(torch.tensor([1.0, 10.0, 0.1]))
    variance = torch.tensor([1.0, 100.0, 0.01])
    shrunk = 0.99 * variance + 0.01 * variance.mean()  # so that what hardly varies does not decide
    torch.testing.assert_close(space.distances(away), (variance / shrunk).sqrt(), rtol=0.03, atol=0.01)


def test_threshold_accepts_95_percent() -> None:
    distances = torch.arange(1000.0)
    assert (distances <= fit_threshold(distances)).float().mean() == pytest.approx(0.95, abs=0.002)


def test_auroc_and_fpr95() -> None:
    known, unknown = torch.arange(100.0), torch.arange(100.0) + 50
    assert auroc(known, unknown + 1000) == 1.0 and auroc(known, known) == 0.5
    assert false_positive_rate(known, unknown + 1000) == 0.0
    assert false_positive_rate(known, unknown) == pytest.approx(0.46)  # 95 of 0..99 pass, and so 50..95 of the others


def test_constant_features_give_finite_distances() -> None:
    space = MahalanobisModel.fit(torch.zeros(10, 4), torch.arange(10) % 2, 2)
    assert bool(space.distances(torch.ones(3, 4)).isfinite().all())


def test_run_reports_uncertainty(run: Run) -> None:
    test = run.test
    assert set(test["calibration"]) == {"temperature", "before", "after"}
    assert sum(b["count"] for b in test["calibration"]["after"]["bins"]) == test["num_images"]
    assert test["conformal"]["target_coverage"] == 0.95 and 0.9 <= test["conformal"]["empirical_coverage"] <= 1
    assert 0.85 <= test["in_distribution_rate"] <= 1
    assert 0.9 <= test["balanced_accuracy"] <= 1 and 0.9 <= test["macro_f1"] <= 1
    page, card = run.report.read_text(), (run.path / "model" / "README.md").read_text()
    for words in ("Reliability", "unknown", "Balanced accuracy", "Brier score"):
        assert words in page
    assert "The probabilities are " in card and "Expected calibration error" in card
    assert (run.path / "plots" / "calibration.png").stat().st_size > 5000


@pytest.mark.parametrize("temperature", [1, 2])
def test_reliability_diagram(temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("convlens.reports.plots.save", lambda figure, _: drawn.append(figure))
    bins = (*[ReliabilityBin(0, 0.0, 0.0)] * 14, ReliabilityBin(4, 0.98, 0.5))
    scores = CalibrationScores(0.48, 0.5, bins)
    draw_reliability(tmp_path / "it.png", CalibrationReport(temperature, scores, scores))
    axes, counts = drawn[0].axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    series = ["uncalibrated (no correction needed)"] if temperature == 1 else ["uncalibrated", "temperature-scaled"]
    assert names == ["perfect calibration", *(f"{name}: ECE 48.00%" for name in series)]
    for bars in axes.containers:
        point, _, (whisker,) = bars.lines
        assert (point.get_xdata(), point.get_ydata()) == ([0.98], [0.5])
        assert whisker.get_segments()[0][:, 1] == pytest.approx(wilson_interval(2, 4))
    assert len(counts.patches) == len(series) and list(counts.patches[0].get_data().values) == [0] * 14 + [4]


def test_probabilities_are_temperature_scaled(run: Run) -> None:
    dataset, classifier = load_dataset("digits"), run.classifier
    assert classifier.uncertainty is not None
    logits = classifier.logits(dataset.test.images)
    expected = (logits / classifier.uncertainty.temperature).softmax(dim=1).max(dim=1).values
    said = [float(row["confidence"]) for row in run.predictions]
    np.testing.assert_allclose(said, expected.numpy(), atol=2e-6)


def test_digits_are_in_distribution_and_noise_is_not(run: Run) -> None:
    dataset = load_dataset("digits")
    digits = [run.predict(image[0].numpy()) for image in dataset.test.images[:60]]
    assert sum(bool(p.in_distribution) for p in digits) >= 50
    g = np.random.default_rng(0)
    strange = [g.integers(0, 256, (8, 8), dtype=np.uint8) for _ in range(40)]
    assert sum(not run.predict(x, adapt=False).in_distribution for x in strange) >= 20  # most; 64 pixels are few
    blank = run.predict(np.zeros((8, 8), dtype=np.uint8), adapt=False)
    assert blank.in_distribution is False and str(blank).startswith("unknown; most like ")


def test_prediction_sets(run: Run) -> None:
    image = load_dataset("digits").test.images[0, 0].numpy()
    assert run.predict(image).prediction_set is None
    sizes = [len(run.predict(image, coverage=c).prediction_set or ()) for c in (0.5, 0.95, 0.995)]
    assert sizes == sorted(sizes)
    for coverage in (0.4, 1.0, float("nan")):
        with pytest.raises(UsageError, match="^`coverage` is .*; it must be from 0.5 to 0.995$"):
            run.predict(image, coverage=coverage)


@pytest.mark.usefixtures("no_plots")
def test_without_validation_images_there_is_no_uncertainty_model() -> None:
    run = convlens.train("digits", val_fraction=0.0, **QUICK)
    assert "calibration" not in run.test and run.classifier.uncertainty is None
    image = np.zeros((8, 8), dtype=np.uint8)
    assert run.predict(image).in_distribution is None
    with pytest.raises(
        UsageError, match="^this model has no prediction sets: it was trained without validation images$"
    ):
        run.predict(image, coverage=0.9)
    assert "There were no validation images" in (run.path / "model" / "README.md").read_text()
    assert "There were no validation images" in run.report.read_text()


def test_bundle_restores_the_uncertainty_model(run: Run) -> None:
    own = run.classifier.uncertainty
    again = load_bundle(run.path / "model").uncertainty
    assert own is not None and again is not None
    assert again.to_json() == own.to_json()
    assert all(torch.equal(own.tensors()[key], value) for key, value in again.tensors().items())


@pytest.mark.parametrize("how", ["flip", "missing", "nonsense", "short"])
def test_damaged_uncertainty_model_is_rejected(how: str, run: Run, tmp_path: Path) -> None:
    bundle = load_bundle(run.path / "model")
    bundle.save(tmp_path / "copy")
    weights, config = tmp_path / "copy" / "uncertainty.safetensors", tmp_path / "copy" / "config.json"
    if how == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "missing":
        weights.unlink()
    else:
        values = json.loads(config.read_text())
        values["uncertainty"] |= {"temperature": -1.0} if how == "nonsense" else {"conformal_thresholds": [0.1]}
        config.write_text(json.dumps(values))
    with pytest.raises(ConvlensError, match="damaged|is missing|is invalid"):
        load_bundle(tmp_path / "copy")


def test_infinite_thresholds_survive_json(run: Run) -> None:
    own = run.classifier.uncertainty
    assert own is not None
    endless = dataclasses.replace(own, conformal_thresholds=(*own.conformal_thresholds[:-1], float("inf")))
    again = UncertaintyModel.from_json(json.loads(json.dumps(endless.to_json())), endless.tensors())
    assert again.conformal_thresholds == endless.conformal_thresholds and len(again.conformal_thresholds) == len(
        COVERAGE_LEVELS
    )


@pytest.mark.data
def test_bundled_mnist_model_detects_fashion_mnist() -> None:
    classifier = Classifier.load("mnist")
    assert classifier.uncertainty is not None
    from convlens.evaluation.inference import compute_outputs

    strange = []
    for name in ("mnist", "fashion-mnist"):
        images = load_dataset(name).test.images[:3000]
        outputs = compute_outputs(classifier.model, images, classifier.preprocess.normalizer())
        strange.append(classifier.uncertainty.ood_score(*outputs))
    assert auroc(*strange) >= 0.99
    assert 0.93 <= (strange[0] <= classifier.uncertainty.ood_threshold).float().mean() <= 0.97
