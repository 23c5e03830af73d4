"""The bundled models: small, documented, and as accurate as their cards."""

import json
import shlex

import pytest
from safetensors import safe_open

from convlens.inference.bundle import load_bundle
from convlens.inference.classifier import Classifier
from convlens.inference.store import bundled_models
from convlens.runs.evaluate import evaluate_run

NAMES = ["cifar10", "digits", "fashion-mnist", "mnist"]


def test_there_are_four_models() -> None:
    assert list(bundled_models()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_model_is_small_and_documented(name: str) -> None:
    folder = bundled_models()[name]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
    files = ["README.md", "config.json", "graph.onnx", "model.safetensors", "uncertainty.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files
    bundle = load_bundle(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == bundle.card()
    command = shlex.split(bundle.training["command"])
    assert command[:2] == ["convlens", "train"] and not any(word.startswith("/") for word in command)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert sum(weights.get_tensor(key).numel() for key in weights.keys()) >= bundle.training["parameters"]
    if name == "cifar10":
        assert "CIFAR-10 (JPEG copy)" in card
    assert "/work" not in json.dumps(dict(bundle.training)) and "/tmp" not in json.dumps(dict(bundle.training))


@pytest.mark.parametrize(
    "name", ["digits", *(pytest.param(n, marks=pytest.mark.data) for n in ("mnist", "fashion-mnist"))]
)
def test_model_is_as_accurate_as_its_card(name: str) -> None:
    recorded = Classifier.load(name).bundle.training["test"]
    again = evaluate_run(name)
    assert again["num_images"] == recorded["num_images"]
    assert again["accuracy"] == pytest.approx(recorded["accuracy"], abs=2e-4)  # another processor may round otherwise
    assert again["loss"] == pytest.approx(recorded["loss"], rel=1e-3)
