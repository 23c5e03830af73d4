"""Bundles and Classifier: round trips, damaged files, and every type of image."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlens.data.builtin import DATASETS
from convlens.data.images import InputStyle, InvalidImageError
from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError, UnknownNameError, UsageError
from convlens.inference import store
from convlens.inference.bundle import Bundle, load_bundle
from convlens.inference.classifier import Classifier
from convlens.inference.metadata import Architecture
from convlens.inference.predictor import Prediction
from convlens.inference.store import bundled_models, resolve_bundle
from convlens.models import MODELS, create_model, register

TRAINED: dict[str, Any] = {
    "version": "0.1.0",
    "command": "convlens train pets --epochs 3",
    "recipe": {"name": "folder", "seed": 7},
    "data": {
        "name": "pets",
        "source": None,
        "counts": {"train": 1200, "test": 300},
        "split_description": "20% of every class is the test split (seed 0)",
    },
    "machine": {"device_name": "A Processor", "threads": 2},
    "parameters": 12_345,
    "seconds": 61.7,
    "test": {"num_images": 300, "accuracy": 0.91234, "accuracy_ci95": [0.8751, 0.9391], "loss": 0.3},
}


def make_bundle(channels: int = 3, side: int = 8, model: str = "small", **options: Any) -> Bundle:
    """Return a bundle of an untrained model with three classes."""
    torch.manual_seed(0)
    arguments = {"channels": channels, "image_height": side, "image_width": side, "classes": 3, **options}
    net = create_model(model, **arguments).eval()
    # fresh BatchNorms are the identity: let them be something that has to be saved
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = torch.rand_like(module.running_mean) * 0.01
            module.running_var = torch.rand_like(module.running_mean) * 0.1 + 0.01
    preprocess = Preprocess(channels, side, side, (0.4,) * channels, (0.2,) * channels, InputStyle())
    return Bundle(net, Architecture(model, arguments), ("cat", "dog", "owl"), preprocess, TRAINED)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the folder of a saved bundle."""
    make_bundle(width=4).save(tmp_path / "pets")
    return tmp_path / "pets"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# saving and loading


@pytest.mark.parametrize(
    ("channels", "side", "model", "options"),
    [
        (3, 8, "small", {"width": 4}),
        (3, 16, "whitened", {"width": 4}),
        (1, 12, "fashion-2conv", {"pool": "avg"}),
        (3, 16, "cifar-lenet", {"output_relu": False}),
        (1, 16, "mnist-4conv", {}),
    ],
)
def test_round_trip_keeps_every_bit(
    channels: int, side: int, model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    first = make_bundle(channels, side, model, **options)
    first.save(tmp_path / "b")
    second = load_bundle(tmp_path / "b")
    assert (second.classes, second.preprocess, second.architecture) == (
        first.classes,
        first.preprocess,
        first.architecture,
    )
    assert second.training == first.training
    assert not second.model.training
    images = torch.randint(0, 256, (5, channels, side, side), dtype=torch.uint8)
    logits = Classifier(second).logits(images)
    assert torch.equal(logits, Classifier(first).logits(images))
    assert len(logits.unique(dim=0)) == 5, "every image has an answer of its own"
    again = tmp_path / "again"
    second.save(again)
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (again / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bundle_has_three_files(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == 2
    assert config["classes"] == ["cat", "dog", "owl"]
    assert config["model"]["name"] == "small"
    assert config["preprocess"]["mean"] == [0.4, 0.4, 0.4]


def test_model_card(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    for fact in (
        "# pets: small",
        "cat, dog, owl",
        "8 x 8 pixels, RGB",
        "12,345",
        "1,200 train, 300 test images",
        "20% of every class is the test split (seed 0)",
        "91.23% of 300 images (95% interval 87.51% to 93.91%)",
        "`folder`, seed 7",
        "`convlens train pets --epochs 3`",
        "62 s on A Processor, 2 thread(s)",
        'convlens.Classifier.load("FOLDER").predict("image.png")',
    ):
        assert fact in card
    top = card.split("---\n")[1].splitlines()
    assert top[:2] == ["library_name: convlens", "pipeline_tag: image-classification"]
    assert '      name: "pets"' in top and "      value: 0.9123" in top
    assert "pixels, grayscale" in make_bundle(channels=1).card()


# what cannot be read


def test_newer_format_is_rejected(saved: Path) -> None:
    edit_config(saved, format=3)
    with pytest.raises(ConvlensError) as caught:
        load_bundle(saved)
    assert str(caught.value) == (
        f"{saved} was made by a newer convlens (bundle format 3, this one reads 2); "
        "upgrade with: pip install --upgrade convlens"
    )


@pytest.mark.parametrize("place", [0, 100, -1])
def test_flipped_byte_in_weights_is_detected(place: int, saved: Path) -> None:
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[place] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConvlensError) as caught:
        load_bundle(saved)
    assert str(caught.value) == f"{weights} is damaged: its SHA-256 is not the one in config.json"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(ConvlensError) as caught:
        load_bundle(saved)
    assert str(caught.value) == f"{saved / name} is missing"


@pytest.mark.parametrize(
    "config", ["", "[1, 2]", "{}", '{"format": 2}', '{"sha256": 3, "model": []}', "not json", '{"format": "1"}', "\x00"]
)
def test_foreign_config_is_rejected(config: str, saved: Path) -> None:
    (saved / "config.json").write_text(config)
    with pytest.raises(ConvlensError) as caught:
        load_bundle(saved)
    message = str(caught.value)
    assert str(saved) in message and "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {
            "model": {
                "name": "small",
                "arguments": {"channels": 3, "image_height": 8, "image_width": 8, "classes": 4, "width": 4},
            }
        },
        {"model": {"name": "small", "arguments": ["channels"]}},
        {"model": {"name": "small", "arguments": {}}},
        {"model": "small"},
        {"preprocess": {"channels": 3}},
        {"preprocess": None},
        {"classes": 3},
        {"classes": None},
    ],
)
def test_config_that_does_not_match_the_weights_is_rejected(changes: dict[str, Any], saved: Path) -> None:
    edit_config(saved, **changes)
    with pytest.raises(ConvlensError, match="is not a bundle that can be read") as caught:
        load_bundle(saved)
    assert "\n" not in str(caught.value)


def test_wrong_number_of_class_names_is_rejected(saved: Path) -> None:
    edit_config(saved, classes=["cat", "dog"])
    with pytest.raises(ConvlensError, match="is not a bundle that can be read"):
        load_bundle(saved)


@pytest.fixture
def own_model() -> Iterator[None]:
    register("own")(MODELS["small"])
    yield
    MODELS._entries.pop("own", None)


@pytest.mark.usefixtures("own_model")
def test_unregistered_model_is_named(tmp_path: Path) -> None:
    make_bundle(model="own", width=2).save(tmp_path / "b")
    assert load_bundle(tmp_path / "b").architecture.name == "own"
    del MODELS._entries["own"]
    with pytest.raises(ConvlensError, match="unknown model 'own'; .*; import the module that registers it first$"):
        load_bundle(tmp_path / "b")


# finding


def test_resolve_bundle(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_bundle(saved) == resolve_bundle(str(saved)) == saved
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is not finished; resume it first$"):
        resolve_bundle(run)
    saved.rename(run / "model")
    assert resolve_bundle(run) == run / "model"
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UsageError, match=f"^{other} is neither a run folder nor a model bundle$"):
        resolve_bundle(other)
    monkeypatch.setattr(store, "bundled_models", lambda: {"mnist": run / "model", "cifar10": run})
    assert resolve_bundle("mnist") == run / "model"
    with pytest.raises(UnknownNameError, match=r"^unknown run folder or model 'mnits'; did you mean 'mnist'\?$"):
        resolve_bundle("mnits")
    with pytest.raises(UnknownNameError, match="choose from: cifar10, mnist$"):
        resolve_bundle("zzzzzz")


def test_bundle_without_weights_is_not_an_unfinished_run(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ConvlensError, match="model.safetensors is missing"):
        Classifier.load(saved)


def test_bundled_models_load() -> None:
    for name, folder in bundled_models().items():
        assert resolve_bundle(name) == folder
        bundle = load_bundle(folder)
        assert len(bundle.classes) == bundle.architecture.arguments["classes"]
        source = bundle.training["data"]["source"]
        assert source is None or source in DATASETS, "no path of its maker's"


# predicting


@pytest.fixture
def classifier(saved: Path) -> Classifier:
    return Classifier.load(saved)


@pytest.fixture
def picture() -> Image.Image:
    """Return an image of the model's input size, so that nothing is resampled."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_all_image_types_give_the_same_prediction(classifier: Classifier, picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    pixels = np.asarray(picture)
    expected = classifier.predict(picture)
    assert isinstance(expected, Prediction)
    forms: list[Any] = [path, str(path), path.read_bytes(), pixels, pixels.transpose(2, 0, 1), pixels / 255.0]
    for form in forms:
        assert classifier.predict(form) == expected
    for prediction in classifier.predict([picture, *forms]):
        assert prediction.label == expected.label
        assert prediction.confidence == pytest.approx(expected.confidence, rel=1e-5)


def test_gray_arrays_and_other_modes(classifier: Classifier) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    expected = classifier.predict(grey)
    assert classifier.predict(np.stack([grey] * 3, axis=2)) == expected
    assert classifier.predict(Image.fromarray(grey)) == expected
    assert classifier.predict(grey[:, :, None]) == expected
    assert classifier.predict(Image.fromarray(grey).convert("RGBA")) == expected


def test_image_of_any_size(classifier: Classifier) -> None:
    for size in ((1, 1), (640, 3), (9, 8)):
        prediction = classifier.predict(Image.new("RGB", size, "red"))
        assert prediction.label in classifier.classes


def test_top(classifier: Classifier, picture: Image.Image) -> None:
    one = classifier.predict(picture)
    assert one.top == ((one.label, one.confidence),)
    three = classifier.predict(picture, top=3)
    assert (three.label, three.confidence) == three.top[0] == one.top[0]
    assert {label for label, _ in three.top} == set(classifier.classes)
    values = [value for _, value in three.top]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1.0)
    assert classifier.predict(picture, top=99) == three
    assert classifier.predict(picture, top=0) == one
    assert str(one) == f"{one.label} ({one.confidence:.1%})"


def test_probabilities_match_the_model(classifier: Classifier, picture: Image.Image) -> None:
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0).float() / 255
    with torch.no_grad():
        expected = classifier.model((x - 0.4) / 0.2).softmax(dim=1)[0]
    told = dict(classifier.predict(picture, top=3).top)
    assert [told[name] for name in classifier.classes] == pytest.approx(expected.tolist(), rel=1e-4)


def test_no_adapt_does_not_extract_strokes() -> None:
    bundle = make_bundle(channels=1, width=4)
    ink = replace(bundle, preprocess=replace(bundle.preprocess, input_style=InputStyle(content_size=6)))
    classifier = Classifier(ink)
    paper = Image.new("L", (40, 40), 255)
    paper.paste(0, (20, 20, 24, 34))
    adapted, raw = classifier.adapt(paper), classifier.adapt(paper, adapt=False)
    assert adapted[0, 0, 0] == 0 and adapted.max() == 255  # black paper, white ink
    assert raw[0, 0, 0] == 255
    assert classifier.predict(paper).confidence != classifier.predict(paper, adapt=False).confidence
    assert classifier.predict(paper, adapt=False) == Classifier(bundle).predict(paper)


def test_empty_list(classifier: Classifier) -> None:
    assert classifier.predict([]) == []


def test_invalid_images_are_rejected(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(InvalidImageError, match="nothing.png: there is no such file$"):
        classifier.predict(tmp_path / "nothing.png")
    with pytest.raises(InvalidImageError, match="^the image is not an image"):
        classifier.predict(b"hello")
    with pytest.raises(InvalidImageError, match="^a dict is not an image: pass a path, a PIL image or an array$"):
        classifier.predict({})  # type: ignore[call-overload]
    buffer = io.BytesIO()
    Image.new("RGB", (50, 50), "blue").save(buffer, "PNG")
    with pytest.raises(InvalidImageError, match="cannot be decoded"):
        classifier.predict(buffer.getvalue()[:-40])
    for array in (np.zeros((2, 3, 4, 5), dtype=np.uint8), np.full((4, 4), 300), np.full((4, 4), np.nan)):
        with pytest.raises(InvalidImageError):
            classifier.predict(array)


def test_prediction_has_no_side_effects(classifier: Classifier, picture: Image.Image) -> None:
    before = {key: value.clone() for key, value in classifier.model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    classifier.predict([picture] * 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in classifier.model.state_dict().items())
