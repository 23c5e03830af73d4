"""The live page: what a training says of itself, a server for this machine only, and the page in a browser."""

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browse, in_browser
from test_onnx import run

import convlens
from convlens.data.dataset import Split
from convlens.errors import UsageError
from convlens.models import create_model
from convlens.run_dir import RunDir
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest
from convlens.runs.run import Run
from convlens.serving.dashboard import describe_run, start_dashboard
from convlens.system.files import write_json_best_effort
from convlens.training.callbacks import LiveStatus
from convlens.training.metrics import Progress
from convlens.training.state import EpochRecord

FAST: dict[str, Any] = {"batch_size": 50, "device": "cpu", "threads": 1}


@pytest.fixture
def half(tmp_path: Path) -> RunDir:
    """Train two of three epochs."""
    experiment = Experiment.start(TrainRequest.create("digits", out=tmp_path / "half", epochs=3, **FAST))
    epochs = experiment.epochs()
    next(epochs)
    next(epochs)
    epochs.close()  # type: ignore[attr-defined]
    return experiment.run_dir


@contextlib.contextmanager
def watching(*paths: Path) -> Iterator[str]:
    server, address = start_dashboard(paths)
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()


def ask(address: str, path: str, host: str | None = None, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body."""
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content


# what a training says of itself


def test_progress_and_mistakes(half: RunDir) -> None:
    progress = json.loads(half.progress.read_text())
    assert set(progress) == {"step", "total", "epoch", "loss", "accuracy", "images_per_second", "eta_seconds"}
    assert (
        0 < progress["step"] <= progress["total"] and progress["images_per_second"] > 0 and progress["eta_seconds"] >= 0
    )
    told = json.loads(half.mistakes.read_text())
    experiment = Experiment.resume(half.path)
    split = experiment.dataset.validation
    assert split is not None and told["asked"] == len(split) and told["shape"] == [1, 8, 8]
    assert 0 < len(told["mistakes"]) <= min(told["wrong"], 12)
    images = [image.numpy().tobytes() for image in split.images]
    for mistake in told["mistakes"]:
        row = images.index(base64.b64decode(mistake["pixels"]))
        assert mistake["label"] == str(split.labels[row].item()) != mistake["guess"]
    shares = [mistake["probability"] for mistake in told["mistakes"]]
    assert shares == sorted(shares, reverse=True)


def record(epoch: int) -> EpochRecord:
    return EpochRecord(epoch, 1.0, 0.1, 0.5, 0.9)


def test_it_takes_little_time(half: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("convlens.training.callbacks.time.monotonic", lambda: now[0])
    looked = []

    def slow(net: Any, images: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        looked.append(now[0])
        now[0] += 1.0
        return torch.zeros(len(images), 10)

    monkeypatch.setattr("convlens.training.callbacks.compute_logits", slow)
    experiment = Experiment.resume(half.path)
    live = LiveStatus(half, experiment.dataset, experiment.preprocess.normalizer())
    for epoch in range(1, 401):  # of a second each
        live.on_epoch_end(record(epoch), experiment.model)
        now[0] += 1
    assert len(looked) == 4 and looked[1] - looked[0] > 100
    live.on_step_end(Progress(10, 10, 400.0, 0.1, 1.0, 9.0, 0.0))
    live.on_epoch_end(record(400), experiment.model)  # after the end always
    assert len(looked) == 5 and json.loads(half.mistakes.read_text())["epoch"] == 400


def test_what_is_wrong_is_asked_of_all_classes(half: RunDir) -> None:
    experiment = Experiment.resume(half.path)
    split = experiment.dataset.validation
    assert split is not None
    labels, rows = split.labels.sort()
    by_class = replace(experiment.dataset, validation=Split(images=split.images[rows], labels=labels, ids=split.ids))
    live = LiveStatus(half, by_class, experiment.preprocess.normalizer())
    live.MAX_IMAGES = 50
    net = create_model("small", channels=1, image_height=8, image_width=8, classes=10, width=4)
    live.on_epoch_end(record(1), net)
    told = json.loads(half.mistakes.read_text())
    assert told["asked"] == 50 and len({one["label"] for one in told["mistakes"]}) > 3


def test_mistakes_are_those_of_the_net_that_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    monkeypatch.setattr(LiveStatus, "on_epoch_end", lambda _, row, net: seen.append((row.epoch, weight_of(net))))
    experiment = Experiment.start(TrainRequest.create("digits", out=tmp_path / "run", epochs=2, ema_decay=0.9, **FAST))
    raw = [weight_of(experiment.model) for _ in experiment.epochs()]
    assert [epoch for epoch, _ in seen] == [1, 2]
    assert not torch.equal(seen[0][1], raw[0])  # the average, not the weights that go on
    assert torch.equal(seen[1][1], weight_of(experiment.model))  # at the end they are those that stay
    # an epoch that an earlier process trained is not looked at
    again = Experiment.start(TrainRequest.create("digits", out=tmp_path / "again", epochs=3, **FAST))
    epochs = again.epochs()
    next(epochs)
    epochs.close()  # type: ignore[attr-defined]
    seen.clear()
    list(Experiment.resume(tmp_path / "again").epochs())
    assert [epoch for epoch, _ in seen] == [2, 3]


def weight_of(net: torch.nn.Module) -> torch.Tensor:
    return next(net.parameters()).detach().clone()


def test_what_cannot_be_written_is_left_away(half: RunDir) -> None:
    for file in half.progress.parent.iterdir():
        file.unlink()
    half.progress.parent.rmdir()
    half.progress.parent.write_text("a file is in the way")
    experiment = Experiment.resume(half.path)
    assert [record.epoch for record in experiment.epochs()] == [1, 2, 3]


def test_a_run_at_any_moment(half: RunDir, tmp_path: Path) -> None:
    told = describe_run(half)
    assert (told["recipe"], len(told["metrics"]), "test" in told) == ("digits", 2, False)
    assert 0 <= told["progress"]["seconds_since_update"] < 60
    old = time.time() - 3000
    for file in (half.progress, half.metrics):
        os.utime(file, (old, old))
    assert 3000 <= describe_run(half)["progress"]["seconds_since_update"] < 3100
    assert describe_run(RunDir(tmp_path / "gone")) == {"name": "gone", "metrics": []}
    half.metrics.write_text("epoch,sec")
    half.progress.write_text('{"step": 3')
    assert describe_run(half)["name"] == "half"


# the server


def test_routes(half: RunDir) -> None:
    with watching(half.path) as address:
        status, headers, page = ask(address, "/")
        assert status == 200 and headers["content-type"] == "text/html; charset=utf-8" and b"runs.json" in page
        assert "default-src 'none'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        (told,) = json.loads(ask(address, "/runs.json")[2])
        assert told["name"] == "half" and told["recipe"] == "digits" and len(told["metrics"]) == 2
        assert ask(address, "/0/mistakes.json")[2] == half.mistakes.read_bytes()
        assert "sandbox" in ask(address, "/0/mistakes.json")[1]["content-security-policy"]
        for path in ("/1/mistakes.json", "/0/report.html", "/0/config.json", "/../config.json", "/x", "/runs.json?a"):
            assert ask(address, path)[0] == 404, path
        for host in ("evil.example", "evil.example:80", f"{address.split('/')[2]}.evil.example", ""):
            assert ask(address, "/runs.json", host)[0] == 421, host
        assert ask(address, "/runs.json", f"localhost:{address.split(':')[2][:-1]}")[0] == 200
        assert ask(address, "/runs.json", method="POST")[0] == 501


def test_figures_that_are_no_numbers_are_not_told(half: RunDir) -> None:
    before = half.progress.read_bytes()
    write_json_best_effort(half.progress, {"loss": float("nan")})
    assert half.progress.read_bytes() == before


def test_a_series_is_its_runs(tmp_path: Path) -> None:
    convlens.train_seeds("digits", 2, out=tmp_path / "two", epochs=1, **FAST)
    with watching(tmp_path / "two") as address:
        told = json.loads(ask(address, "/runs.json")[2])
        assert [(one["name"], one["seed"]) for one in told] == [("seed-0", 0), ("seed-1", 1)]
        assert all(one["test"]["num_images"] == 359 for one in told)
        assert ask(address, "/1/report.html")[2] == (tmp_path / "two" / "seed-1" / "report.html").read_bytes()
    convlens.train("digits", out=tmp_path / "one", epochs=1, **FAST)
    with watching(tmp_path) as address:  # all that is in a folder
        told = json.loads(ask(address, "/runs.json")[2])
        assert [one["name"] for one in told] == ["seed-0", "seed-1", "one"]


def test_what_cannot_be_watched(half: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("watch", tmp_path / "nothing") == 2
    assert capsys.readouterr().err.startswith(f"convlens: there is no run folder {tmp_path / 'nothing'}; ")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"^cannot listen on 127.0.0.1:{port}: .*; choose another --port$"):
            start_dashboard([half.path], port)


# the commands


def test_watch_runs_until_it_is_stopped(half: RunDir) -> None:
    command = [sys.executable, "-m", "convlens", "watch", str(half.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        found = re.fullmatch(r"watch   (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", line)
        assert found and ask(found[1], "/runs.json")[0] == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")


def test_train_live(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convlens", "train", "digits", "--live", "--epochs", "300", "--out"]
    with subprocess.Popen([*command, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        address = next(line.split()[1] for line in process.stdout if line.startswith("live "))
        end = time.monotonic() + 30
        while time.monotonic() < end and len(json.loads(ask(address, "/runs.json")[2])[0]["metrics"]) < 2:
            time.sleep(0.05)
        told = json.loads(ask(address, "/runs.json")[2])[0]
        assert 2 <= len(told["metrics"]) < 300
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    short = [*command, str(tmp_path / "short"), "--epochs", "1"]
    said = subprocess.run(short, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[-1] == f"show this page again with: convlens watch {tmp_path / 'short'}"


# the page


@in_browser
def test_the_page_follows_a_training(half: RunDir, tmp_path: Path) -> None:
    done = convlens.train("digits", out=tmp_path / "done", epochs=2, **FAST)
    assert isinstance(done, Run)
    wrong = len(json.loads(half.mistakes.read_text())["mistakes"])
    server, address = start_dashboard([half.path, done.path])
    with browse(tmp_path) as tab:
        tab.open(address)
        tab.wait("document.querySelectorAll('.run').length === 2")
        assert tab.run("at('title').textContent") == "2 runs, 1 finished"
        states = tab.run("[...document.querySelectorAll('.state')].map((one) => one.textContent)")
        assert re.match(r"Epoch [1-3], \d+%$", states[0]) and states[1].endswith("% test accuracy")
        assert tab.run("document.querySelectorAll('#val_acc polyline').length") == 2
        points = "document.querySelector('#val_acc polyline').getAttribute('points').split(' ').length"
        assert tab.run(points) == 2
        assert tab.wait("document.querySelectorAll('#mistakes-0 figure').length") == wrong
        old = time.time() - 3000
        for file in (half.progress, half.metrics):
            os.utime(file, (old, old))
        tab.wait("document.querySelector('.state').textContent.startsWith('Stopped at ')")
        # the training goes on, and ends
        experiment = Experiment.resume(half.path)
        list(experiment.epochs())
        tab.wait(f"{points} === 3")
        experiment.finish()
        tab.wait("at('title').textContent === '2 runs, 2 finished'")
        tab.open(address)  # a reload
        tab.wait("at('title').textContent === '2 runs, 2 finished'")
        report = tab.run("document.querySelector('.run a').href")
        assert report == f"{address}0/report.html" and ask(address, "/0/report.html")[0] == 200
        assert not tab.errors
        server.shutdown()
        server.server_close()
        tab.wait("at('lost').textContent.startsWith('The server of this page has stopped')")
        assert tab.run("document.querySelectorAll('.run').length") == 2


def test_names_cannot_become_code() -> None:
    from convlens.serving.dashboard import make_dashboard_page

    page = make_dashboard_page()
    assert "innerHTML" not in page and not re.search(r"\[[A-Z]{3,}\]", page)
