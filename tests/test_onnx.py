"""ONNX export: outputs match PyTorch, without PyTorch or convlens; foreign and damaged files are rejected."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data
from PIL import Image
from test_bundle import make_bundle

from convlens.cli import main
from convlens.data.dataset import Dataset, Split
from convlens.data.images import InputStyle
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.inference import compute_outputs
from convlens.evaluation.uncertainty import UncertaintyModel
from convlens.export import onnx as onnx_export
from convlens.export.onnx import add_graph, build_onnx, write_onnx
from convlens.export.quantize import build_int8
from convlens.inference.bundle import Bundle, load_bundle
from convlens.inference.classifier import Classifier
from convlens.inference.onnx_runtime import OnnxPredictor, embed_digest, load_predictor
from convlens.inference.store import bundled_models
from convlens.models import MODELS

SHAPES = {"cifar-lenet": (3, 32), "fashion-2conv": (1, 28), "mnist-4conv": (1, 28), "folder-cnn": (3, 32)}
NETS = ["small", "tiny", "whitened", "residual", *SHAPES]


def some_images(channels: int, side: int, n: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, channels, side, side), dtype=np.uint8)


def with_uncertainty(bundle: Bundle) -> Bundle:
    """Return the bundle with an uncertainty model, fitted on noise, so that some images are out-of-distribution."""
    shape = bundle.preprocess
    images = torch.from_numpy(some_images(shape.channels, shape.height, 60, seed=1))
    split = Split(images=images, labels=torch.arange(60) % 3, ids=[str(i) for i in range(60)])
    uncertainty = UncertaintyModel.fit(bundle.model, split, split, 3, shape.normalizer())
    # a deep net of random weights is as good as certain of everything, and then any answers are alike
    temperature = max(compute_outputs(bundle.model, images, shape.normalizer())[0].std().item(), 1.7)
    test = {**bundle.training["test"], "in_distribution_rate": 0.95, "ece": [0.1, 0.01]}
    training = {**bundle.training, "test": test}
    return replace(bundle, uncertainty=replace(uncertainty, temperature=temperature), training=training)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small color model with an uncertainty model."""
    path = tmp_path_factory.mktemp("bundle") / "pets"
    with_uncertainty(make_bundle(width=4)).save(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return build_onnx(folder)


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    write_onnx(model, tmp_path / "pets.onnx")
    return tmp_path / "pets.onnx"


# the same answers


@pytest.mark.parametrize("name", NETS)
def test_every_model_matches_pytorch(name: str, tmp_path: Path) -> None:
    channels, side = SHAPES.get(name, (1, 14))
    images = some_images(channels, side)
    bundle = with_uncertainty(make_bundle(channels, side, name))
    assert bundle.uncertainty is not None
    normalise = bundle.preprocess.normalizer()
    strange = bundle.uncertainty.ood_score(*compute_outputs(bundle.model, torch.from_numpy(images), normalise))
    # between two images, so that no rounding decides
    threshold = float(strange.sort().values[19:21].mean())
    bundle = replace(bundle, uncertainty=replace(bundle.uncertainty, ood_threshold=threshold))
    bundle.save(tmp_path / "bundle")
    built = build_onnx(tmp_path / "bundle")
    assert write_onnx(built, tmp_path / "net.onnx") < 1e-5
    add_graph(built, tmp_path / "bundle")
    expected, known = Classifier(load_bundle(tmp_path / "bundle")).run(images)
    assert known is not None and known.sum() == 20
    for predictor in (OnnxPredictor.load(tmp_path / "net.onnx"), OnnxPredictor.from_bundle(tmp_path / "bundle")):
        for n in (len(images), 1):
            probabilities, says = predictor.run(images[:n])
            assert np.abs(probabilities - expected[:n]).max() < 1e-5
            assert says is not None and says.tolist() == known[:n].tolist()
    assert (tmp_path / "bundle" / "graph.onnx").stat().st_size < 60_000
    assert set(MODELS.names()) >= {name}


@pytest.mark.parametrize("name", sorted(bundled_models()))
def test_bundled_models_match_pytorch(name: str) -> None:
    predictor, classifier = OnnxPredictor.from_bundle(bundled_models()[name]), Classifier.load(name)
    assert predictor.verify() < 1e-5
    shape = predictor.preprocess
    assert (shape, predictor.classes) == (classifier.preprocess, classifier.classes)
    assert predictor.conformal_thresholds == pytest.approx(classifier.conformal_thresholds)
    picture = Image.radial_gradient("L").rotate(20).resize((70, 50)).convert("RGB")
    for how in ({}, {"adapt": False}, {"top": 3, "coverage": 0.9}):
        a, b = predictor.predict(picture, **how), classifier.predict(picture, **how)  # type: ignore[call-overload]
        assert (a.label, a.in_distribution, a.prediction_set) == (b.label, b.in_distribution, b.prediction_set)
        assert [label for label, _ in a.top] == [label for label, _ in b.top]
        assert a.confidence == pytest.approx(b.confidence, abs=1e-5)


def test_without_validation_images_there_is_no_in_distribution_output(tmp_path: Path) -> None:
    make_bundle(width=4).save(tmp_path)
    model = build_onnx(tmp_path)
    assert [output.name for output in model.graph.output] == ["probabilities", "label"]
    predictor = OnnxPredictor(embed_digest(model.SerializeToString()), "it")
    assert predictor.run(some_images(3, 8, 2))[1] is None and predictor.conformal_thresholds is None
    with pytest.raises(UsageError, match="this model has no prediction sets"):
        predictor.predict(Image.new("L", (8, 8)), coverage=0.9)


def answers(model: Any, images: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"images": images})  # type: ignore[no-any-return]


def test_gray_images_are_accepted_by_a_color_model(model: Any) -> None:
    grey = some_images(1, 8).transpose(0, 2, 3, 1)
    for a, b in zip(answers(model, grey), answers(model, grey.repeat(3, axis=3)), strict=True):
        assert np.array_equal(a, b)


def test_grayscale_conversion_matches_pillow(tmp_path: Path) -> None:
    make_bundle(1, 8, width=4).save(tmp_path)
    model = build_onnx(tmp_path)
    colour = some_images(3, 8, 200).transpose(0, 2, 3, 1)
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])[..., None]
    for a, b in zip(answers(model, colour), answers(model, grey), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("size", [(8, 8), (40, 30), (30, 40), (9, 8), (5, 5), (3, 16), (200, 8), (1, 1)])
def test_resizing_matches_pillow(size: tuple[int, int], model: Any, folder: Path) -> None:
    waves = np.sin(np.arange(size[0])[None, :] / 9) * np.cos(np.arange(size[1])[:, None] / 7) * 100 + 120
    picture = Image.fromarray(waves.astype(np.uint8)).convert("RGB")
    expected, _ = Classifier(load_bundle(folder)).run(Classifier(load_bundle(folder)).adapt(picture, adapt=False)[None])
    assert np.abs(answers(model, np.asarray(picture)[None])[0] - expected).max() < 0.04


# alone


README_LINES = """
import sys
for name in ("torch", "convlens"):
    sys.modules[name] = None  # as if they were not installed
# the lines of README
import os
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import, or ONNX Runtime sends telemetry
import json, numpy, onnxruntime, PIL.Image
session = onnxruntime.InferenceSession("pets.onnx")
image = numpy.asarray(PIL.Image.open("photo.png").convert("RGB"))[None]  # uint8 (N, H, W, C), any size
probabilities, label, in_distribution = session.run(None, {"images": image})
print(json.loads(session.get_modelmeta().custom_metadata_map["convlens"])["classes"][label[0]])
"""


def test_readme_example_runs_without_convlens_and_torch(file: Path, folder: Path) -> None:
    Image.fromarray(some_images(1, 8)[0, 0]).save(file.parent / "photo.png")
    done = subprocess.run(
        [sys.executable, "-c", README_LINES], cwd=file.parent, capture_output=True, text=True, check=False
    )
    expected = Classifier(load_bundle(folder)).predict(file.parent / "photo.png")
    assert (done.stdout.strip(), done.stderr) == (expected.label, "")


def test_readme_contains_the_example() -> None:
    lines = README_LINES.split("README\n")[1].strip().splitlines()
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert "\n".join(lines).replace("pets.onnx", "digits-1.onnx").replace("photo.png", "scan.png") in readme


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
sys.argv = ["convlens", *sys.argv[1:]]
from convlens.cli.main import main
main()
"""


@pytest.mark.parametrize("kind", ["a model by name", "a bundle", "a file"])
def test_predict_and_verify_without_torch(kind: str, model: Any, folder: Path, file: Path, tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((28, 28)).save(tmp_path / "x.png")
    add_graph(model, folder)
    source = {"a model by name": "mnist", "a bundle": folder, "a file": file}[kind]
    told = []
    for arguments in (["predict", source, tmp_path / "x.png", "--top", "2", "--coverage", "0.9"], ["verify", file]):
        command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        told.append(done.stdout)
    expected = Classifier.load(folder if kind == "a file" else source).predict(tmp_path / "x.png")
    assert expected.label in told[0]
    assert told[1].startswith("passed  probabilities differ by at most ")


# the commands


def run(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convlens", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            main.main()
    return int(leaving.value.code or 0)


def test_export_writes_one_file_and_adds_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with_uncertainty(make_bundle(width=4)).save(Path("runs") / "pets-1")
    assert isinstance(load_predictor("runs/pets-1"), Classifier)
    assert run("export", "runs/pets-1") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("wrote   pets-1.onnx (")
    assert isinstance(load_predictor("runs/pets-1"), OnnxPredictor)
    assert isinstance(load_predictor("pets-1.onnx"), OnnxPredictor)
    assert load_bundle(Path("runs") / "pets-1").classes == ("cat", "dog", "owl")
    onnx.checker.check_model("pets-1.onnx", full_check=True)
    before = Path("pets-1.onnx").read_bytes()
    assert run("export", "runs/pets-1") == 2
    assert "pets-1.onnx exists; name another file with --out" in capsys.readouterr().err
    assert run("export", "runs/pets-1", "--out", "x.txt") == 2
    assert Path("pets-1.onnx").read_bytes() == before and not Path("x.txt").exists()


def test_other_programs_load_the_graph_of_a_bundle(folder: Path, model: Any) -> None:
    import onnxruntime

    add_graph(model, folder)
    session = onnxruntime.InferenceSession(folder / "graph.onnx")
    images = some_images(3, 8).transpose(0, 2, 3, 1)
    assert np.array_equal(session.run(None, {"images": images})[0], answers(model, images)[0])


def test_missing_extra_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert run("export", folder, "--out", tmp_path / "x.onnx") == 2
    assert capsys.readouterr().err == "convlens: ONNX export needs the extra `export`: pip install 'convlens[export]'\n"
    assert not (tmp_path / "x.onnx").exists()


def test_unexportable_model_gives_a_one_line_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(self: object, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x  # which no graph can say

    monkeypatch.setattr("convlens.models.compact.SmallNet.features", odd)
    with pytest.raises(ConvlensError, match="^this model cannot be exported to ONNX: "):
        onnx_export.export_module(make_bundle().model, make_bundle().preprocess)


# what is not as it should be


def test_deviation_is_detected_and_nothing_is_written(model: Any, tmp_path: Path) -> None:
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    weight = next(tensor for tensor in changed.graph.initializer if tensor.name == "net.head.2.weight")
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * 1.01).tobytes()
    with pytest.raises(ConvlensError, match="gives other outputs than when it was made: a probability differs by 0.0"):
        write_onnx(changed, tmp_path / "new" / "x.onnx")
    assert not (tmp_path / "new").exists()


def test_verify_fails_on_deviation(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    about = json.loads(changed.metadata_props[0].value)
    about["reference"]["probabilities"][3][0] += 0.001
    changed.metadata_props[0].value = json.dumps(about, separators=(",", ":"))
    (tmp_path / "x.onnx").write_bytes(embed_digest(changed.SerializeToString()))
    assert run("verify", tmp_path / "x.onnx") == 1
    assert f"{tmp_path / 'x.onnx'} gives other outputs than when it was made" in capsys.readouterr().err


def test_flipped_bit_is_detected(file: Path) -> None:
    content, luck = file.read_bytes(), np.random.default_rng(0)
    OnnxPredictor(content, "it")
    for at in luck.integers(0, len(content), 300).tolist():
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(luck.integers(8))
        with pytest.raises(ConvlensError, match="^it was damaged or changed since|^it is not a complete ONNX file"):
            OnnxPredictor(bytes(damaged), "it")


def test_changed_class_names_are_detected(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"cat","dog"', b'"dog","cat"'))
    with pytest.raises(ConvlensError, match="was damaged or changed since convlens wrote it"):
        load_predictor(file)


@pytest.mark.parametrize("key", ["classes", "conformal_thresholds"])
def test_inconsistent_metadata_are_rejected(key: str, model: Any) -> None:
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    about = json.loads(changed.metadata_props[0].value)
    about[key] = about[key][:-1]
    changed.metadata_props[0].value = json.dumps(about, separators=(",", ":"))
    with pytest.raises(ConvlensError, match="^it cannot be loaded: its metadata do not fit its graph$"):
        OnnxPredictor(embed_digest(changed.SerializeToString()), "it")


def test_files_that_are_not_models_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: Path) -> None:
    for words, says in (
        (("predict", "no.onnx", "x.png"), "there is no file no.onnx"),
        (("verify", "no.onnx"), "there is no file no.onnx"),
        (("verify", tmp_path), "pass the .onnx file that `convlens export` wrote"),
        (
            ("evaluate", file),
            "is an ONNX file, for `predict`, `serve`, `verify` and `export --format html`; name the run",
        ),
    ):
        assert run(*words) == 2
        assert says in capsys.readouterr().err


def foreign(**metadata: str) -> bytes:
    """Return a harmless ONNX file of another program."""
    node = helper.make_node("Identity", ["images"], ["out"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("images", "out")]
    made = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), ir_version=10)
    made.opset_import[0].version = 20
    helper.set_model_props(made, metadata)
    return sealed(made)


def outside(model: Any, location: str) -> bytes:
    """Return the model with its first large weight in another file."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    weight = max(changed.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    set_external_data(weight, location, offset=0, length=len(weight.raw_data))
    weight.ClearField("raw_data")
    return sealed(changed)


def sealed(model: Any) -> bytes:
    """Return a serialized model with a valid digest, if it has a place for one."""
    content: bytes = model.SerializeToString()
    return embed_digest(content) if b'"digest":"' in content else content


HOSTILE = {
    "nothing": lambda model: b"",
    "no ONNX": lambda model: b"\x80\x04\x95pickle",
    "half a file": lambda model: model.SerializeToString()[: model.ByteSize() // 2],
    "another program's": lambda model: foreign(),
    "metadata that are no JSON": lambda model: foreign(convlens=f'{{"digest":"{"0" * 64}"'),
    "metadata that say nothing": lambda model: foreign(convlens=f'{{"digest":"{"0" * 64}", "format": 3}}'),
    "metadata of a newer convlens": lambda model: foreign(convlens=f'{{"digest":"{"0" * 64}", "format": 99}}'),
    "weights in a file beside it": lambda model: outside(model, "secret.bin"),
    "weights in a file above it": lambda model: outside(model, "../secret.bin"),
    "weights in any file": lambda model: outside(model, "/etc/passwd"),
    "weights under a name like ours": lambda model: outside(model, "model.safetensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_malicious_files_are_rejected(name: str, model: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for place in (tmp_path / "secret.bin", tmp_path / "in" / "secret.bin", tmp_path / "in" / "model.safetensors"):
        place.write_bytes(bytes(100_000))
    path = tmp_path / "in" / "x.onnx"
    path.write_bytes(HOSTILE[name](model))
    with pytest.raises(ConvlensError) as caught:
        load_predictor(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("file", ["graph.onnx", "model.safetensors", "uncertainty.safetensors"])
def test_bundle_with_changed_files_is_rejected(file: str, folder: Path, model: Any, tmp_path: Path) -> None:
    add_graph(model, folder)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / file).read_bytes())
    content[-3] ^= 1
    (tmp_path / file).write_bytes(bytes(content))
    with pytest.raises(ConvlensError, match=rf"{file} is damaged: its SHA-256 is not the one in config.json"):
        load_predictor(tmp_path)


def test_graph_cannot_read_other_files(folder: Path, model: Any, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = outside(model, "config.json")
    (tmp_path / "graph.onnx").write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    config["onnx"] = {"sha256": hashlib.sha256(content).hexdigest(), "external_initializers": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvlensError, match="cannot be loaded: "):
        load_predictor(tmp_path)


def test_reference_images() -> None:
    for channels in (1, 3):
        bundle = make_bundle(channels, 20, width=4)
        images = onnx_export.reference_images(replace(bundle.preprocess, input_style=InputStyle()))
        assert images.shape == (8, 20, 20, channels) and images.dtype == np.uint8
        assert [len(np.unique(image)) > 3 for image in images] == [False, False, *[True] * 6]
        assert np.array_equal(images, onnx_export.reference_images(bundle.preprocess))


# in 8 bits


@pytest.mark.parametrize("name", NETS)
def test_int8_stays_close_to_float32(name: str, tmp_path: Path) -> None:
    channels, side = SHAPES.get(name, (1, 14))
    with_uncertainty(make_bundle(channels, side, name)).save(tmp_path / "net")
    g = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (120, channels, side, side), dtype=torch.uint8, generator=g)
    split = Split(images=images, labels=torch.arange(120) % 3, ids=[str(i) for i in range(120)])
    classes = load_bundle(tmp_path / "net").classes
    dataset = Dataset(name="noise", classes=classes, train=split, test=split)
    model, exact, cost = build_int8(tmp_path / "net", dataset)
    assert cost.num_images == 120 and cost.agreement > 0.8
    plain, small = (OnnxPredictor(embed_digest(m.SerializeToString()), "x") for m in (exact, model))
    # an untrained net's logits are wild, and a label that hangs by a thread changes
    assert np.abs(plain.run(images.numpy())[0] - small.run(images.numpy())[0]).mean() < 0.05
    filters = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4 and tensor.dims[3] > 1]
    assert {tensor.data_type for tensor in filters} == {TensorProto.INT8}
    assert small.metadata["training"]["bits"] == 8 and small.metadata["training"]["accuracy"] == cost.after
    assert write_onnx(model, tmp_path / "small.onnx") == 0.0  # proved against itself


def test_export_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.onnx"
    assert run("export", "digits", "--int8", "--out", file) == 0
    told = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"8 bits  test accuracy 9\d\.\d\d% instead of 98\.89%; \d+\.\d\d% of 359 labels agree", told[0])
    assert told[1].startswith(f"wrote   {file} (") and file.stat().st_size < 0.4 * 289_000
    assert run("verify", file) == 0
    assert run("export", "digits", "--int8", "--format", "html", "--out", tmp_path / "x.html") == 2
    assert capsys.readouterr().err == "convlens: --int8 is for ONNX files; the page has its own small numbers\n"
    assert run("export", file, "--format", "html", "--out", tmp_path / "x.html") == 1
    assert (
        "the page cannot run int8 models; export the float32 model, without " in capsys.readouterr().err
        and not (tmp_path / "x.html").exists()
    )


def test_export_int8_without_data(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", folder, "--int8", "--out", tmp_path / "x.onnx") == 2
    told = capsys.readouterr().err
    assert told.startswith("convlens: --int8 needs the images that the model was trained on: ") and "--data" in told
    Path("digits-int8.onnx").touch()
    assert run("export", "digits", "--int8") == 2
    assert capsys.readouterr().err == "convlens: digits-int8.onnx exists; name another file with --out\n"


def test_file_of_an_older_convlens_is_rejected(model: Any, tmp_path: Path) -> None:
    about = onnx_export.read_metadata(model)
    older = onnx.ModelProto.FromString(model.SerializeToString())
    onnx_export.write_metadata(older, {**about, "format": 2})
    with pytest.raises(ConvlensError, match="^x was made by an older convlens: export it again$"):
        OnnxPredictor(embed_digest(older.SerializeToString()), "x")
