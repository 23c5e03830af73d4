"""Explanations: heatmaps find planted evidence, gradients and receptive fields are exact, and the page."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_bundle import make_bundle
from test_onnx import NETS, SHAPES, run
from test_twin import seven, train_on_photos
from torch import nn

import convlens
from convlens.data.dataset import Dataset
from convlens.errors import UnknownNameError, UsageError
from convlens.explain.activations import feature_maps, most_active_unit, receptive_field
from convlens.explain.cam import class_activation_map
from convlens.explain.explanation import TrainingImages, explain
from convlens.explain.occlusion import occlusion_map
from convlens.inference.bundle import load_bundle
from convlens.inference.classifier import Classifier
from convlens.models import MODELS
from convlens.models.base import ConvNet
from convlens.runs.explain import explain_images
from convlens.runs.run import Run


def net_and_images(name: str, count: int = 2) -> tuple[nn.Module, torch.Tensor]:
    """Return an untrained model and normalized images (N, C, H, W) for it."""
    channels, side = SHAPES.get(name, (1, 20))
    net = make_bundle(channels, side, name).model
    return net, torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))


# planted evidence

SIDE, MARK = 64, 14  # pixels of an image, and of the mark that makes it one of the second class


def marked(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images (N, H, W), labels and the places (N, 2) of a checkered mark, which only the second class has.

    All images are clouds with a plain square, as bright as the mark, that means nothing.
    """
    g = np.random.default_rng(seed)
    coarse = torch.from_numpy(g.integers(20, 180, (count, 1, 5, 5)).astype(np.float32))
    images = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 255).byte().numpy()[:, 0]
    labels = np.arange(count) % 2
    places = g.integers(0, SIDE - MARK, (count, 2))
    check = np.where(np.indices((MARK, MARK)).sum(axis=0) // 3 % 2 == 0, 255, 0).astype(np.uint8)
    for image, label, (y, x) in zip(images, labels, places, strict=True):
        top, left = (y + SIDE // 2) % (SIDE - MARK), (x + SIDE // 2) % (SIDE - MARK)
        image[top : top + MARK, left : left + MARK] = 255
        if label:
            image[y : y + MARK, x : x + MARK] = check
    return images, labels, places


@pytest.fixture(
    scope="module", params=["small", "tiny", pytest.param("whitened", marks=pytest.mark.slow), "folder-cnn"]
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a model on marked images."""
    images, labels, _ = marked(1200, 0)
    muon = {"optimizer": "muon", "lr": 0.1, "head_lr": 0.05, "width": 16}
    special = {"tiny": muon, "whitened": {**muon, "width": 8}, "small": {"width": 16}, "folder-cnn": {"lr": 0.05}}
    run = convlens.train(
        convlens.from_arrays(images, labels, classes=("plain", "marked")), "folder",
        out=tmp_path_factory.mktemp("runs") / request.param, model=request.param, epochs=8, translate=0, rotation=0.0,
        scale=0.0, hflip=False, color_jitter=0.0, device="cpu", threads=1, **special[request.param],
    )  # fmt: skip
    assert run.accuracy > 0.97
    return run


def share_on_the_mark(heat: np.ndarray, place: np.ndarray, margin: float) -> float:
    """Return the fraction of a heatmap's sum on the mark, or within the margin around it."""
    near = np.zeros(heat.shape, bool)
    (top, left), (bottom, right) = np.maximum(place - margin, 0).astype(int), np.ceil(place + MARK + margin).astype(int)
    near[top:bottom, left:right] = True
    return float(heat[near].sum() / max(heat.sum(), 1e-9))


def test_heatmaps_find_the_mark(trained: Run) -> None:
    images, labels, places = marked(60, 1)
    images, places = images[labels == 1][:, None], places[labels == 1]
    name, net = trained.config["model"]["name"], trained.classifier.model
    x = trained.classifier.preprocess.normalizer()(torch.from_numpy(images))
    shares = {}
    for stage, maps in feature_maps(net, x).items():
        cell = SIDE / maps.shape[2]  # pixels of a place on the map: nothing on it can be told more exactly
        heats = class_activation_map(net, x, 1, stage).numpy()
        found = [share_on_the_mark(heat, place, cell) for heat, place in zip(heats, places, strict=True)]
        shares[stage] = round(float(np.mean(found)), 3)
    hangs = [occlusion_map(lambda covered: trained.classifier.run(covered)[0], image, 1) for image in images]
    found = [share_on_the_mark(heat.clip(0), place, SIDE // 8) for heat, place in zip(hangs, places, strict=True)]
    shares["occlusion"] = round(float(np.mean(found)), 3)
    print(name, shares)
    # units of the deeper stages of `whitened` see most of the image, and may stand beside what they have found
    certain = ["stem", "group1"] if name == "whitened" else [*list(shares)[-2:]]
    if name == "tiny" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        # a training that rounds otherwise is another training: on AVX2 the last stage of `tiny`, whose units see 35
        # pixels, had 0.48 to 0.82 on the mark in eleven trainings
        assert shares["conv3"] > 0.5, shares
        certain = ["conv1", "conv2", "occlusion"]
    assert all(shares[stage] > 0.8 for stage in certain), shares


def test_heatmaps_depend_on_the_weights(trained: Run) -> None:
    """The sanity check of Adebayo et al. (2018): other weights give another map."""
    images, labels, _ = marked(40, 2)
    x = trained.classifier.preprocess.normalizer()(torch.from_numpy(images[labels == 1])[:, None])
    net = load_bundle(trained.path / "model").model
    stage = next(iter(net.stages()))  # type: ignore[operator]
    before = class_activation_map(net, x, 1, stage)
    torch.manual_seed(0)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    after = class_activation_map(net, x, 1, stage)
    alike = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(before, after, strict=True) if b.any()]
    assert np.mean(alike) < 0.5


# arithmetic


@pytest.mark.parametrize("name", NETS)
def test_cam_matches_finite_differences(name: str) -> None:
    net, x = net_and_images(name, 1)
    net, x = net.double().eval(), x.double()
    with torch.no_grad():
        maps = net.features(x)  # type: ignore[operator]
        slope, step = torch.zeros_like(maps), 1e-6
        for place in range(maps.numel()):
            change = torch.zeros(maps.numel(), dtype=torch.float64)
            change[place] = step
            change = change.view_as(maps)
            both = net.head(torch.cat([maps + change, maps - change]))  # type: ignore[operator]
            both = both[:, 1] - both.mean(dim=1) * net.log_probabilities  # the logit, but for what all share
            slope.view(-1)[place] = (both[0] - both[1]) / (2 * step)
        heat = (slope * maps).sum(dim=1, keepdim=True).relu()
        heat = nn.functional.interpolate(heat, x.shape[2:], mode="bilinear")[0, 0]
    expected = heat / heat.max().clamp_min(1e-12)
    assert torch.allclose(class_activation_map(net, x, 1)[0], expected, atol=1e-4)
    last = list(net.stages())[-1]  # type: ignore[operator]
    if torch.equal(feature_maps(net, x)[last], maps):
        assert torch.allclose(class_activation_map(net, x, 1, last)[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_receptive_field_is_exact(name: str) -> None:
    net, x = net_and_images(name)
    shape = (x.shape[1], x.shape[2], x.shape[3])
    for stage, maps in feature_maps(net, x).items():
        channel, row, column = 0, maps.shape[2] // 2, maps.shape[3] // 2
        unit = receptive_field(net, stage, (channel, row, column), shape)
        seen = torch.zeros(shape[1:], dtype=torch.bool)
        seen[unit.top : unit.bottom, unit.left : unit.right] = True
        outside = torch.where(seen, x, torch.randn_like(x) * 3)
        assert torch.equal(feature_maps(net, outside)[stage][:, :, row, column], maps[:, :, row, column]), stage
        for edge in (
            (slice(unit.top, unit.top + 1), slice(None)), (slice(unit.bottom - 1, unit.bottom), slice(None)),
            (slice(None), slice(unit.left, unit.left + 1)), (slice(None), slice(unit.right - 1, unit.right)),
        ):  # fmt: skip
            changed = x.repeat(8, 1, 1, 1)
            part = seen.clone()
            part[:] = False
            part[edge] = True
            changed = torch.where(part & seen, torch.randn_like(changed) * 9, changed)
            now = feature_maps(net, changed)[stage][:, :, row, column]
            assert not torch.equal(now, maps[:, :, row, column].repeat(8, 1)), (stage, edge)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2)), min_size=1, max_size=3))
def test_receptive_field_of_a_chain_matches_the_formula(layers: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)

    class Chain(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Sequential(*[nn.Conv2d(1, 1, size, stride) for size, stride in layers]))
            self.head = nn.Flatten()

    size, jump = 1, 1
    for kernel, stride in layers:
        size, jump = size + (kernel - 1) * jump, jump * stride
    unit = receptive_field(Chain(), "0", (0, 0, 1 if jump + size <= 40 else 0), (1, 40, 40))
    assert (unit.top, unit.bottom) == (0, size)
    assert unit.size == (size, size) and unit.left in (0, jump)


def test_occlusion_map_finds_the_evidence() -> None:
    image = np.full((1, 16, 24), 200, np.uint8)
    image[0, 6, 18] = 90

    def classify(images: np.ndarray) -> np.ndarray:
        there = (images[:, 0, 6, 18] == 90).astype(np.float32)
        return np.stack([1 - 0.9 * there, 0.9 * there], axis=1)

    heat = occlusion_map(classify, image, 1)
    assert heat.shape == (16, 24) and heat.dtype == np.float32
    assert heat[6, 18] == heat.max() == pytest.approx(0.9)  # every square over it costs all
    assert (heat[:, :14] == 0).all() and (heat[11:] == 0).all()
    assert occlusion_map(classify, image, 0)[6, 18] == pytest.approx(-0.9)


@pytest.mark.parametrize("name", sorted(set(MODELS.names()) - {"whitened"}))
def test_every_model_can_be_explained(name: str) -> None:
    channels, side = SHAPES.get(name, (1, 14))
    classifier = Classifier(make_bundle(channels, side, name))
    pixels = np.random.default_rng(0).integers(0, 256, (channels, side, side), dtype=np.uint8)
    e = explain(classifier, pixels)
    assert list(e.feature_maps) == list(classifier.model.stages())  # type: ignore[operator]
    for heat in e.cams.values():
        assert heat.shape == e.occlusion.shape == (side, side)
        assert 0 <= heat.min() and heat.max() in (0, pytest.approx(1))
    assert e.pooling_demo["max"].max() == e.pooling_demo["original"].max()
    assert e.pooling_demo["average"].shape == e.pooling_demo["max"].shape
    assert e.nearest_training_images == () and e.label == e.prediction.label
    for stage, unit in e.receptive_fields.items():
        assert e.feature_maps[stage][unit.channel, unit.y, unit.x] == e.feature_maps[stage].max()


def test_training_image_is_its_own_nearest_neighbor() -> None:
    classifier = Classifier(make_bundle(3, 8))
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=g)
    dataset = convlens.from_arrays(images.numpy(), np.arange(30) % 3, classes=("cat", "dog", "owl"))
    assert isinstance(dataset, Dataset)
    first, second, *_ = explain(
        classifier, dataset.train.images[4].numpy(), training=TrainingImages(classifier, dataset)
    ).nearest_training_images
    assert first.similarity == pytest.approx(1, abs=1e-5) and first.id == dataset.train.ids[4]
    assert (first.image == dataset.train.images[4].numpy()).all()
    assert first.label == dataset.classes[int(dataset.train.labels[4])] and second.similarity <= first.similarity


def test_unknown_class_stage_and_unit_are_named() -> None:
    classifier = Classifier(make_bundle(3, 8))
    pixels = np.zeros((3, 8, 8), np.uint8)
    with pytest.raises(UnknownNameError, match="^unknown class 'cow'; did you mean 'owl'?"):
        explain(classifier, pixels, label="cow")
    with pytest.raises(UnknownNameError, match="^unknown stage 'conv9'; did you mean 'conv"):
        explain(classifier, pixels, unit=("conv9", 0, 0, 0))
    told = r"^stage conv1 has no unit 0,9,0: it has 64 maps of \d rows and \d columns, counted from 0$"
    with pytest.raises(UsageError, match=told):
        explain(classifier, pixels, unit=("conv1", 0, 9, 0))


def test_explaining_has_no_side_effects() -> None:
    bundle = make_bundle(1, 14)
    bundle.model.train()
    before = {key: value.clone() for key, value in bundle.model.state_dict().items()}
    explain(Classifier(bundle), np.zeros((1, 14, 14), np.uint8))
    assert all(torch.equal(value, before[key]) for key, value in bundle.model.state_dict().items())
    assert all(parameter.grad is None for parameter in bundle.model.parameters())
    assert not any(module._forward_hooks for module in bundle.model.modules())


def test_most_active_unit() -> None:
    maps = torch.zeros(3, 4, 5)
    maps[2, 1, 3] = 1
    assert most_active_unit(maps) == (2, 1, 3)


# the command


@pytest.fixture
def photos(tmp_path: Path) -> Run:
    """Train on a folder of small photos."""
    return train_on_photos(tmp_path, 12, 16)


def test_the_page(photos: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (tmp_path / "photos" / name for name in ("dark/0.png", "light/3.png"))
    assert run("explain", photos.path, one, two) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"{one}: .*\n{two}: .*\nwrote   explained/run-1/index.html\n", out)
    assert "convlens: " not in err  # on a slow machine it says how far it is
    folder = Path("explained/run-1")
    assert sorted(path.name for path in folder.iterdir()) == ["1-0", "2-3", "index.html", "kernels.png"]
    names = ["alike.png", "maps-1-stem.png", "maps-2-conv1.png", "maps-3-conv2.png", "maps-4-conv3.png", "pooling.png",
             "sees.png", "where.png"]  # fmt: skip
    for part in ("1-0", "2-3"):
        assert sorted(path.name for path in (folder / part).iterdir()) == names
    for file in folder.rglob("*.png"):
        with Image.open(file) as picture:
            picture.load()
            assert picture.width == 1296 and len(set(picture.convert("L").tobytes())) > 2, file
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("<section><h3>") == 17 and "Prediction: " in page
    assert page.count("<figure>") == page.count('src="data:image/png;base64,') > 17
    assert not re.search(r"https?:|src=\"[^d]", page)
    # the next one gets a name of its own
    assert run("explain", photos.path, one) == 0
    assert (Path("explained/run-2") / "where.png").is_file()


def test_from_python(photos: Run, tmp_path: Path) -> None:
    e = photos.explain(tmp_path / "photos" / "dark" / "0.png", label="light", unit=("conv1", 1, 0, 0))
    assert e.label == "light" and (e.receptive_fields["conv1"].channel, e.receptive_fields["conv1"].y) == (1, 0)
    assert len(e.nearest_training_images) == 8 and e.nearest_training_images[0].label in ("dark", "light")
    shutil.rmtree(tmp_path / "photos")
    again = Run(photos.path)
    assert again.explain(e.pixels).nearest_training_images == ()


def test_bad_input_gets_a_line(photos: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "photos" / "dark" / "0.png"
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "there").mkdir()
    cases = [
        (("--unit", "3"), 2, "--unit '3' is not STAGE:CHANNEL,ROW,COLUMN, such as conv1:5,3,3"),
        (("--label", "bright"), 2, "unknown class 'bright'; did you mean 'light'?"),
        (("--unit", "conv7:1,2,3"), 2, "unknown stage 'conv7'; did you mean 'conv"),
        (("--unit", "conv3:500,0,0"), 2, "stage conv3 has no unit 500,0,0: it has "),
        (("--out", tmp_path / "there"), 2, f"{tmp_path / 'there'} exists already; choose another --out"),
        (
            ("--out", tmp_path / "photos" / "new"),
            2,
            f"{tmp_path / 'photos' / 'new'} would be written into the data in ",
        ),
        (("--data", tmp_path / "nothing"), 2, ""),
        ((tmp_path / "bad.png",), 1, f"{tmp_path / 'bad.png'}"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, code, told in cases:
        assert run("explain", photos.path, picture, *arguments) == code, arguments
        err = capsys.readouterr().err
        assert err.startswith(f"convlens: {told}") and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written
    shutil.rmtree(tmp_path / "photos" / "light")
    assert run("explain", photos.path, picture) == 0
    assert capsys.readouterr().err.startswith("convlens: no training images to compare with: ")
    assert not list(Path("explained/run-1").glob("alike*"))


def test_what_fills_a_page_is_explained(
    photos: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="^51 images are too many for one page; explain 50 at a time$"):
        explain_images(str(photos.path), ["one.png"] * 51)
    monkeypatch.setattr("convlens.runs.explain.MAX_IMAGES", 2)
    dark = tmp_path / "photos" / "dark"
    assert run("explain", photos.path, *(dark / f"{number}.png" for number in range(3))) == 0
    out, err = capsys.readouterr()
    assert err.startswith("convlens: 3 images; only the first 2 are explained\n")
    assert out.startswith(f"{dark / '0.png'}: dark") and out.count("\n") == 3
    page = Path("explained/run-1/index.html").read_text(encoding="utf-8")
    assert re.findall(r'<a href="#(\d)">([^<]*)</a>', page) == [
        ("0", "0.png"),
        ("1", "1.png"),
        ("2", "The model itself"),
    ]
    assert all(f"<h2 id={number}>" in page for number in range(3))


@pytest.mark.data
def test_a_seven_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "mnist", seven(tmp_path), "--out", tmp_path / "seven") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'seven.png'}: 7 (")
    e = explain(Classifier.load("mnist"), Classifier.load("mnist").adapt(tmp_path / "seven.png"))
    assert e.prediction.in_distribution and e.occlusion.max() > 0.01
