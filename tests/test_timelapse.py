"""The time machine: snapshots that change nothing, moments that are what the net was, a page that a hand can use."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browse, in_browser
from PIL import Image
from test_onnx import run

import convlens
from convlens.data.loader import count_batches
from convlens.explain.snapshots import list_snapshots, load_snapshot
from convlens.explain.timelapse import replay
from convlens.models import create_model
from convlens.reports.timelapse import draw_snapshot, format_epoch
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest
from convlens.runs.run import Run
from convlens.training.schedule import is_snapshot_step

FAST = {"epochs": 3, "batch_size": 100, "device": "cpu", "threads": 1}


@pytest.fixture
def remembered(tmp_path: Path) -> Run:
    """Train on the digits and keep snapshots."""
    return convlens.train("digits", out=tmp_path / "remembered", save_snapshots=True, **FAST)


def test_what_is_kept() -> None:
    kept = [step for step in range(1, 41) if is_snapshot_step(step, 12, 40)]
    assert kept == [1, 2, 4, 8, 12, 24, 36, 40]


def test_snapshots_are_what_the_net_was_and_change_nothing(remembered: Run, tmp_path: Path) -> None:
    plain = convlens.train("digits", out=tmp_path / "plain", **FAST)
    assert (plain.path / "model" / "model.safetensors").read_bytes() == (
        remembered.path / "model" / "model.safetensors"
    ).read_bytes()
    assert not plain.run_dir.snapshots.exists()
    config = remembered.config
    steps = count_batches(config["data"]["counts"]["train"], 100)
    snapshots = list_snapshots(remembered.run_dir.snapshots)
    assert list(snapshots) == [0, 1, 2, 4, 8, steps, 2 * steps, 3 * steps]
    net = create_model(config["model"]["name"], **config["model"]["arguments"])
    load_snapshot(snapshots[3 * steps], net)
    for key, value in remembered.classifier.model.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key


def test_a_stopped_training_goes_on_with_its_snapshots(remembered: Run, tmp_path: Path) -> None:
    experiment = Experiment.start(TrainRequest.create("digits", out=tmp_path / "stopped", save_snapshots=True, **FAST))
    with pytest.raises(convlens.ConvlensError):
        asked = iter([False] * 17 + [True] * 2)
        list(experiment.epochs(should_stop=lambda: next(asked)))
    experiment = Experiment.resume(tmp_path / "stopped")
    list(experiment.epochs())
    kept = [list_snapshots(folder / "snapshots") for folder in (remembered.path, tmp_path / "stopped")]
    assert list(kept[0]) == list(kept[1])
    assert all(kept[0][step].read_bytes() == kept[1][step].read_bytes() for step in kept[0])


def test_moments(remembered: Run) -> None:
    dataset = convlens.load_dataset("digits")
    held_out = dataset.with_validation(remembered.config["recipe"]["val_fraction"], 0).validation
    assert held_out is not None
    pixels = held_out.images[0].numpy()
    moments = replay(remembered.classifier, remembered.run_dir, pixels, held_out)
    assert [round(m.epoch, 3) for m in moments][-3:] == [1, 2, 3] and moments[0].epoch == 0
    assert moments[0].accuracy < 0.5 < moments[-1].accuracy
    assert moments[-1].accuracy == pytest.approx(remembered.metrics[-1]["val_acc"], abs=1e-6)
    assert all(m.confusion is not None and m.confusion.sum() == len(held_out) for m in moments)
    e = remembered.explain(pixels)
    assert list(moments[-1].feature_maps) == list(e.feature_maps)
    for name, maps in e.feature_maps.items():
        np.testing.assert_allclose(moments[-1].feature_maps[name], maps, atol=1e-5)
    assert moments[-1].probabilities.max() == pytest.approx(e.prediction.confidence, abs=1e-6)
    assert not np.array_equal(moments[0].kernels, moments[-1].kernels)


def model_of(page: Path) -> dict[str, object]:
    text = page.read_text(encoding="utf-8")
    return dict(json.loads(text.split('id="model">')[1].split("</script>")[0]))


def test_the_command(remembered: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = tmp_path / "scan.png"
    Image.new("L", (20, 20), 255).save(scan)
    assert run("timelapse", remembered.path, "--gif", tmp_path / "a.gif", "--image", scan) == 0
    out, err = capsys.readouterr()
    page = remembered.path / "timelapse.html"
    size = page.stat().st_size
    assert "convlens: " not in err and out.startswith(
        f"replayed 8 snapshots\nwrote   {page} ({size:,} bytes)\nwrote   "
    )
    assert size < 500_000 and model_of(page)["image"] == "scan.png"
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.n_frames, picture.size) == (8, (864, 360))
        frames = []
        for number in range(picture.n_frames):
            picture.seek(number)
            frames.append(picture.convert("RGB").tobytes())
    assert len(set(frames)) == 8
    # again: the run's own page is made anew, the files of the user are not
    assert run("timelapse", remembered.path) == 0
    assert str(model_of(page)["image"]).startswith("an image of “")
    capsys.readouterr()
    assert run("timelapse", remembered.path, "--gif", tmp_path / "a.gif") == 2
    assert capsys.readouterr().err == f"convlens: --gif {tmp_path / 'a.gif'}: that file exists; choose another name\n"


def test_what_is_missing_is_said(remembered: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshots = list_snapshots(remembered.run_dir.snapshots)
    snapshots[2].write_bytes(snapshots[2].read_bytes()[:1000])
    assert run("timelapse", remembered.path) == 1
    assert capsys.readouterr().err.startswith(
        f"convlens: {snapshots[2]} is not a snapshot of this model; delete it to skip it: "
    )
    shutil.rmtree(remembered.run_dir.snapshots)
    capsys.readouterr()
    assert run("timelapse", remembered.path) == 2
    told = "has no snapshots; train with --save-snapshots, for example: convlens train digits --save-snapshots"
    assert capsys.readouterr().err == f"convlens: {remembered.path} {told}\n"
    assert not (remembered.path / "timelapse.html").exists()
    assert run("timelapse", tmp_path / "nothing") == 2


def test_without_validation_it_asks_about_training_images(tmp_path: Path) -> None:
    convlens.train("digits", out=tmp_path / "all", save_snapshots=True, val_fraction=0.0, **FAST)
    assert run("timelapse", tmp_path / "all") == 0
    assert str(model_of(tmp_path / "all" / "timelapse.html")["images"]).endswith(" training images")


def test_epochs_are_told_in_few_digits() -> None:
    assert [format_epoch(epoch) for epoch in (0, 1 / 12, 0.5, 1, 12.0)] == ["0", "0.083", "0.5", "1", "12"]


def test_a_class_may_have_any_name(remembered: Run) -> None:
    picture = convlens.load_dataset("digits").test.images[0].numpy()
    moment = replay(remembered.classifier, remembered.run_dir, picture, convlens.load_dataset("digits").test)[-1]
    about = {"images": "images", "image": "one", "classes": [r"$\x$", "a_b", "\udcff", *"3456789"]}
    assert draw_snapshot(moment, picture, about, 1.0, np.arange(10)).size == (864, 360)


@in_browser
def test_the_page_in_hands(remembered: Run, tmp_path: Path) -> None:
    assert run("timelapse", remembered.path) == 0
    with browse(tmp_path) as tab:
        tab.open((remembered.path / "timelapse.html").as_uri())
        last = tab.run("at('when').textContent")
        assert last.startswith("Epoch 3: ") and tab.run("document.querySelectorAll('.bar').length") == 10
        pixels = "at('kernels').firstChild.getContext('2d').getImageData(0, 0, 3, 3).data.join()"
        trained = tab.run(pixels)
        tab.run("at('slider').focus()")
        tab.key("Home")
        assert tab.wait("at('when').textContent.startsWith('Epoch 0: ')")
        assert tab.run("at('slider').getAttribute('aria-valuetext')") == "epoch 0"
        assert tab.run("[...at('matrix-true').children].map((one) => one.textContent).join('')") == "0123456789"
        assert tab.run("Math.abs(at('matrix-true').clientHeight - at('matrix').clientHeight)") <= 1
        assert tab.run(pixels) != trained
        tab.run("at('play').click()")
        assert tab.run("at('play').textContent") == "Pause"
        tab.wait(f"at('when').textContent === {json.dumps(last)} && at('play').textContent === 'Play'")
        assert tab.run(pixels) == trained
        assert not tab.errors
    page = (remembered.path / "timelapse.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and "http:" not in page.replace("http://www.w3.org/2000/svg", "")
