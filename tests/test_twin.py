"""The playground: it matches PyTorch in a real browser, preprocesses alike, and makes no network requests."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Tab, browse, in_browser
from PIL import Image, ImageDraw
from test_bundle import make_bundle
from test_onnx import NETS, SHAPES, run, with_uncertainty

import convlens
from convlens.data.images import InputStyle
from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError
from convlens.export.html import pack, render_playground
from convlens.export.load import load_onnx
from convlens.inference.bundle import Bundle
from convlens.inference.classifier import Classifier
from convlens.inference.store import bundled_models
from convlens.runs.run import Run
from convlens.web.render import read_static


def save_page(page: str, folder: Path) -> str:
    """Write a page to disk; return its address."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    return (folder / "page.html").as_uri()


def proof_of(page: str, folder: Path) -> tuple[float, bool]:
    """Open a page; return the error of its self-check, and whether it passed."""
    with browse(folder) as tab:
        tab.open(save_page(page, folder))
        drift, good = tab.wait("at('check').dataset.error && [at('check').dataset.error, at('check').dataset.passed]")
        assert not tab.errors
    return float(drift), good == "true"


def made(name: str, **options: Any) -> Bundle:
    channels, side = SHAPES.get(name, (1, 14))
    return with_uncertainty(make_bundle(channels, side, name, **options))


def page_of(bundle: Bundle, folder: Path) -> str:
    bundle.save(folder / "net")
    return render_playground(load_onnx(folder / "net"))


@pytest.mark.parametrize(("name", "count"), [("fashion-2conv", 4), ("residual", 11)])
def test_steps_are_activated_convolutions_and_poolings(name: str, count: int, tmp_path: Path) -> None:
    model = json.loads(model_of(page_of(made(name), tmp_path)))
    kinds = {layer["output"]: layer["op"] for layer in model["layers"]}
    assert len(model["steps"]) == count
    assert {kinds[step["output"]] for step in model["steps"] if not step["pooled"]} == {"Relu"}
    assert model["steps"][-1]["output"] == model["last_map"]


# in a browser


@in_browser
@pytest.mark.parametrize("name", [*NETS, "fashion-2conv with average pooling"])
def test_every_model_matches_pytorch(name: str, tmp_path: Path) -> None:
    average = {"pool": "avg"} if name.endswith("pooling") else {}
    drift, good = proof_of(page_of(made(name.split()[0], **average), tmp_path), tmp_path)
    assert drift < 1e-3 and good


@in_browser
@pytest.mark.parametrize("name", sorted(bundled_models()))
def test_bundled_models_match_pytorch(name: str, tmp_path: Path) -> None:
    page = render_playground(load_onnx(name))
    assert len(page.encode()) < 1_500_000
    drift, good = proof_of(page, tmp_path)
    assert drift < 3e-4 and good


@in_browser
def test_self_check_detects_a_deviation(tmp_path: Path) -> None:
    page = page_of(made("tiny"), tmp_path)
    golden = json.loads(model_of(page))["reference"]["probabilities"][0][0]
    drift, good = proof_of(page.replace(f"{golden!r}", f"{golden + 0.01!r}", 1), tmp_path)
    assert drift == pytest.approx(0.01, abs=1e-4) and not good


def model_of(page: str) -> str:
    return page.split('id="model">')[1].split("</script>")[0]


def pictures() -> dict[str, Image.Image]:
    """Return a photo, a digit on paper in uneven light, strokes, and small or transparent images."""
    y, x = np.mgrid[0:90, 0:130]
    photo = np.stack([x * 1.9, y * 2.7, 128 + 100 * np.sin(x / 9) * np.cos(y / 7)], axis=2).clip(0, 255)
    page = Image.fromarray((235 - x[:, :130] * 0.5).astype(np.uint8))
    ImageDraw.Draw(page).line([(60, 20), (75, 40), (58, 70)], fill=30, width=7)
    pad = Image.new("RGB", (280, 280), "white")
    ImageDraw.Draw(pad).line([(90, 70), (190, 70), (130, 220)], fill=(17, 17, 17), width=22, joint="curve")
    clear = Image.new("RGBA", (40, 60))
    ImageDraw.Draw(clear).ellipse([10, 10, 30, 50], fill=(200, 30, 60, 180))
    return {
        "photo": Image.fromarray(photo.astype(np.uint8)),
        "page": page,
        "pad": pad,
        "small": Image.fromarray(photo[::9, ::9].astype(np.uint8)),
        "see-through": clear,
        "blank": Image.new("RGB", (60, 60), "white"),
        "right size": page.resize((28, 28)),
    }


@in_browser
def test_preprocessing_matches_python(tmp_path: Path) -> None:
    styles = {
        "photo": Preprocess(3, 28, 28, (0.5,) * 3, (0.5,) * 3, InputStyle()),
        "wide grey photo": Preprocess(1, 12, 30, (0.5,), (0.5,), InputStyle()),
        "ink by mass": Preprocess(1, 28, 28, (0.5,), (0.5,), InputStyle(20, True)),
        "ink by box": Preprocess(1, 28, 28, (0.5,), (0.5,), InputStyle(28, False)),
    }
    cases = [(style, name) for style in styles for name in pictures()]
    given = []
    for style, name in cases:
        image = pictures()[name].convert("RGBA")
        data = {"width": image.width, "height": image.height, "data": list(image.tobytes())}
        given.append({"image": data, "shape": styles[style].to_json()})
    page = f"""<script>{read_static("preprocess.js")}
const given = {json.dumps(given)};
</script>"""
    with browse(tmp_path) as tab:
        tab.open(save_page(page, tmp_path))
        adapted = tab.run("given.map((one) => Array.from(adapt(one.image, one.shape)))")
    for (style, name), pixels in zip(cases, adapted, strict=True):
        expected = styles[style].transform(pictures()[name])
        apart = np.abs(np.array(pixels).reshape(expected.shape) - expected.astype(int))
        # rounding of grey levels and sub-pixel places; a single stroke's edge may fall on the other side of a bound
        assert np.mean(apart) < 0.5 and np.quantile(apart, 0.98) <= 3, (style, name, apart.max())


@in_browser
def test_content_of_the_page(tmp_path: Path) -> None:
    page = render_playground(load_onnx("mnist"), [("7", np.zeros((1, 28, 28), np.uint8))])
    with browse(tmp_path) as tab:
        tab.open(save_page(page, tmp_path))
        assert answer(tab) == "7. It is sure."  # it begins with a seven
        text = tab.run("document.body.innerText")
        assert tab.run("document.querySelectorAll('.bar').length") == 10
        assert tab.run("at('samples').firstChild.ariaLabel") == "Try an image of: 7"
        assert "Step 1: 32 maps of 12 × 12" in text and "Step 2: shrunk to 6 × 6" in text
        assert "94,698 parameters" in text and "Accuracy on 10,000 test images: 99.54%" in text
        nameless = "[...document.querySelectorAll('[id]:is(canvas, input)')].filter((one) => !one.ariaLabel).length"
        assert tab.run(nameless) == 0


def answer(tab: Tab) -> str:
    """Return the prediction on the page, once it has drawn the last input."""
    tab.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return str(tab.run("`${at('answer').textContent}. ${at('words').textContent}`"))


def seven(folder: Path) -> Path:
    """Write an image of a seven, dark on white, and return its file."""
    picture = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(picture).line([(100, 50), (180, 50), (130, 160)], fill=(20, 20, 30), width=16, joint="curve")
    picture.save(folder / "seven.png")
    return folder / "seven.png"


@in_browser
def test_drawing_files_and_camera(tmp_path: Path) -> None:
    file = seven(tmp_path)
    camera = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with browse(tmp_path, 1200, 900, *camera) as tab:
        tab.open(save_page(render_playground(load_onnx("mnist")), tmp_path))
        blank = "I do not know this."
        assert answer(tab) == "7. It is sure."
        x, y, width, height = tab.run(
            "(() => { const box = at('pad').getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"
        )

        def press(button: str) -> str:
            tab.run(f"at('{button}').click()")
            return answer(tab)

        def drop() -> None:
            data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
            for kind in ("dragEnter", "dragOver", "drop"):
                tab.call("Input.dispatchDragEvent", type=kind, x=x + 20, y=y + 20, data=data)

        # the first stroke of one's own clears what the page began with
        tab.draw(*((x + width * a, y + height * b) for a, b in ((0.5, 0.2), (0.5, 0.5), (0.5, 0.8))))
        assert answer(tab).startswith("1. ")
        assert press("clear").startswith(blank)

        tab.run("at('pad').focus()")
        tab.key(" ")
        tab.key("ArrowDown", 10)
        assert answer(tab).startswith("1. ")
        assert tab.run("at('hint').textContent") == "The pen is down, 50% from the left, 75% from the top."

        # a file: dropped, opened, pasted
        press("clear")
        drop()
        tab.wait("at('answer').textContent === '7'")
        assert press("clear").startswith(blank)
        document = tab.call("DOM.getDocument")["root"]["nodeId"]
        node = tab.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
        tab.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
        tab.wait("at('answer').textContent === '7'")
        tab.run("at('pad').focus()")
        tab.key(" ")
        tab.key("ArrowDown", 10)  # keys clear a picture too
        assert answer(tab).startswith("1. ")
        tab.run(
            f"""(() => {{
            const bytes = Uint8Array.from({list(file.read_bytes())}), data = new DataTransfer();
            data.items.add(new File([bytes], "a.png", {{ type: "image/png" }}));
            document.dispatchEvent(new ClipboardEvent("paste", {{ bubbles: true, clipboardData: data }}));
            }})()"""
        )
        tab.wait("at('answer').textContent === '7'")
        file.write_bytes(b"no picture")
        drop()
        tab.wait("at('words').textContent === 'The browser cannot read this file as an image.'")

        # the browser's false camera: a green disc that beeps
        tab.run("at('camera').click()")
        tab.wait("!at('video').hidden && at('pad').hidden && at('camera').textContent === 'Take a photo'")
        tab.wait("at('video').videoWidth > 0")
        assert press("camera")
        assert tab.run("[at('video').hidden, at('pad').hidden, at('camera').textContent]") == [True, False, "Camera"]
        assert tab.run("pad.getImageData(0, 0, SIDE, SIDE).data.some((v, i) => i % 4 == 0 && v != 255)")
        assert not tab.errors


@in_browser
def test_missing_camera_is_reported(tmp_path: Path) -> None:
    with browse(tmp_path) as tab:
        tab.open(save_page(render_playground(load_onnx("mnist")), tmp_path))
        tab.run("at('camera').click()")
        tab.wait("at('hint').textContent === 'The camera is not available.'")


# without a browser


def test_page_makes_no_requests(tmp_path: Path) -> None:
    page = page_of(made("tiny"), tmp_path)
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//[a-z]+\.[a-z]|src=|href=|fetch\(|XMLHttpRequest|import\(|eval\(", page)
    assert not re.search(r"\[[A-Z]{3,}\]", page)  # no part was left to fill in


def test_class_names_are_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    bundle = made("tiny")
    training = {**bundle.training, "data": {**bundle.training["data"], "name": evil}}
    page = page_of(replace(bundle, classes=(evil, "dog", "owl"), training=training), tmp_path)
    assert evil not in page and page.count("<script") == 3
    assert json.loads(model_of(page))["classes"][0] == evil


def test_large_tensors_are_packed_in_16_bits() -> None:
    g = np.random.default_rng(0)
    weight = (g.normal(size=(16, 8, 3, 3)) * 10.0 ** g.integers(-4, 4, (16, 1, 1, 1))).astype(np.float32)
    told, packed = pack({"small": np.array([[1.5], [2.25]], np.float32), "weight": weight, "zero": np.zeros((4, 100))})
    assert told["small"] == {"shape": [2, 1], "values": [1.5, 2.25]}
    numbers = np.frombuffer(packed, "<i2")
    assert len(numbers) == weight.size + 400 and told["zero"]["offset"] == weight.size
    rows = numbers[: weight.size].reshape(16, -1) * np.array(told["weight"]["scales"])[:, None]
    most = np.abs(weight).reshape(16, -1).max(axis=1)
    assert (np.abs(rows - weight.reshape(16, -1)).max(axis=1) <= most / 65_000).all()


def test_unsupported_layer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda self, x: torch.sigmoid(x))
    with pytest.raises(
        ConvlensError, match="^the page cannot compute Sigmoid with the options of this model; ONNX can$"
    ):
        page_of(made("tiny"), tmp_path)


def train_on_photos(folder: Path, height: int, width: int) -> Run:
    """Make a folder ``photos`` of dark and light images, and train on it."""
    g = np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 200)):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(12):
            pixels = (g.integers(0, 40, (height, width, 3)) + level).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / label / f"{number}.png")
    return convlens.train(folder / "photos", out=folder / "run", epochs=1, device="cpu", threads=1)


def test_export_takes_samples_from_the_data_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train_on_photos(tmp_path, 9, 9)
    assert run("export", trained.path, "--format", "html", "--out", tmp_path / "a.html") == 0
    assert capsys.readouterr().out.startswith(
        "samples 2 test images, one per class; --no-samples leaves them out\nwrote"
    )
    samples = json.loads(model_of((tmp_path / "a.html").read_text(encoding="utf-8")))["samples"]
    assert [sample["label"] for sample in samples] == ["dark", "light"]
    assert run("export", trained.path, "--format", "html", "--out", tmp_path / "b.html", "--no-samples") == 0
    assert json.loads(model_of((tmp_path / "b.html").read_text(encoding="utf-8")))["samples"] == []
    shutil.rmtree(tmp_path / "photos")
    assert run("export", trained.path, "--format", "html", "--out", tmp_path / "c.html") == 0
    assert "convlens: no sample images on the page: " in capsys.readouterr().err
    assert isinstance(Classifier.load(trained.path), Classifier)
