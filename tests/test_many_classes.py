"""Many classes: files, pages, tables and memory grow linearly with their number."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_onnx import run

import convlens
from convlens.audit.audit import AuditReport
from convlens.cli.output import describe_findings
from convlens.evaluation import metrics
from convlens.evaluation.calibration import calibration_report, fit_temperature
from convlens.evaluation.metrics import Scores
from convlens.evaluation.ood import MahalanobisModel
from convlens.evaluation.uncertainty import conformal_thresholds
from convlens.inference.classifier import Classifier
from convlens.reports.plots import draw_confusion
from convlens.runs.run import Run

CLASSES = 3000  # so many that a dense matrix would not fit into a JSON file that can be read


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run of one step on 3,000 classes, whose data are a file beside it."""
    folder = tmp_path_factory.mktemp("many")
    y = np.repeat(np.arange(CLASSES), 2)
    x = np.random.default_rng(0).integers(0, 256, (len(y), 8, 8), dtype=np.uint8)
    np.savez(folder / "many.npz", x_train=x, y_train=y, x_test=x[::2], y_test=y[::2])
    options = {"model": "small", "width": 4, "max_steps": 1, "batch_size": 64, "val_fraction": 0.5}
    return convlens.train(folder / "many.npz", out=folder / "run", device="cpu", precision="fp32", **options)


def test_run_folder_grows_linearly(trained: Run) -> None:
    sizes = {path.relative_to(trained.path): path.stat().st_size for path in trained.path.rglob("*") if path.is_file()}
    assert max(sizes.values()) < 1000 * CLASSES, sizes
    page = trained.report.read_text(encoding="utf-8")
    assert f"The 20 of {CLASSES:,} classes with the lowest F1" in page and len(page) < 1_000_000
    assert f"the 30 of {CLASSES:,} classes with the most errors" in page
    assert len((trained.path / "model" / "README.md").read_text(encoding="utf-8")) < 10_000


def test_confusion_matrix_is_complete(trained: Run) -> None:
    matrix = trained.confusion_matrix
    assert matrix.shape == (CLASSES, CLASSES) and matrix.sum() == trained.test["num_images"] == CLASSES
    assert np.trace(matrix) == trained.test["correct"]
    number = {name: i for i, name in enumerate(trained.config["data"]["classes"])}
    for row in trained.predictions[:50]:
        assert matrix[number[row["true_label"]], number[row["predicted_label"]]] > 0
    assert [c["support"] for c in trained.test["classes"].values()] == matrix.sum(axis=1).tolist()


def test_commands_limit_their_output(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", trained.path) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 20
    assert "the 10 of 3,000 classes with the lowest F1; --format csv has all" in out
    assert run("data", "info", trained.path.parent / "many.npz") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 20 and "the 10 of 3,000 classes with the fewest training images:" in out
    findings = AuditReport("many", 9, small_classes={f"class {k}": 3 for k in range(300)})
    (_, told) = describe_findings(findings)
    assert told.startswith("300 classes have too few training images to learn from: 'class 0' has 3; ")
    assert told.endswith("and 295 more")


def test_confusion_plot_shows_classes_with_errors(tmp_path: Path) -> None:
    names = [f"class {k}" for k in range(500)]
    cells = [(name, name, 3) for name in names] + [("class 7", "class 400", 2)]
    svg = draw_confusion(tmp_path / "confusion.png", cells, names)
    assert "class 400" in svg and "class 7" in svg and "class 499" not in svg
    assert len(re.findall("class \\d+<", svg)) == 60  # 30 classes, at both axes


def test_chunks_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(20, (300,), generator=g)
    logits = 4 * torch.randn(300, 20, generator=g) + 6 * torch.nn.functional.one_hot(labels, 20)
    features = torch.randn(300, 5, generator=g) + labels[:, None]

    def measure() -> tuple[object, ...]:
        temperature = fit_temperature(logits, labels)
        space = MahalanobisModel.fit(features, labels, 20)
        numbers = [temperature, Scores.of(logits, labels).loss, *space.distances(features).tolist()]
        return np.array(numbers), conformal_thresholds(logits, labels), calibration_report(logits, labels, temperature)

    whole = measure()
    monkeypatch.setattr(metrics, "MAX_CHUNK_VALUES", 20 * 70)
    assert len(list(metrics.row_chunks(20, logits, labels))) == 5
    parts = measure()
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-4)
    assert whole[1] == parts[1]
    assert str(whole[2])[:60] == str(parts[2])[:60]


def test_response_size_is_limited(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from convlens.serving import batching, routes

    class InTorch(Classifier):  # a graph of ONNX is not needed to see it
        is_quantized, metadata = False, {"training": {}}

    model = InTorch.load(trained.path)
    client = testclient.TestClient(routes.make_app({"many": model}), base_url="http://localhost")
    content = (Path(trained.path) / "plots" / "samples.png").read_bytes()

    def post(images: int, **params: object) -> tuple[int, dict[str, object]]:
        form = [("images", (f"{n}.png", content, "image/png")) for n in range(images)]
        response = client.post("/predict", params=params, files=form)
        return response.status_code, response.json()

    monkeypatch.setattr(batching, "MAX_NAMED", 6000)
    status, told = post(4, top=1000)
    assert status == 200 and [len(one["top"]) for one in told["predictions"]] == 4 * [1000]
    threads: list[str] = []
    write = routes.PredictResponses.model_dump_json
    monkeypatch.setattr(
        routes.PredictResponses, "model_dump_json",
        lambda self: threads.append(__import__("threading").current_thread().name) or write(self),
    )  # fmt: skip
    assert post(4, top=1000)[0] == 200 and threads[0].startswith("decode"), "not on the event loop"
    told = "a request may have at most 6 images if each can be answered with 1,000 classes"
    assert post(7, top=1000) == (422, {"detail": told})
    told = "a request may have at most 2 images if each can be answered with 3,000 classes"
    assert post(3, coverage=0.9) == (422, {"detail": told})
    assert "enum" not in json.dumps(client.get("/openapi.json").json()["paths"]["/explain"]["post"]["parameters"][2])


def test_the_most_probable_of_many_classes() -> None:
    classifier = Classifier.load("digits")
    classifier.classes = tuple(map(str, range(20_000)))
    probabilities = np.random.default_rng(0).random((100, 20_000), dtype=np.float32)
    found = classifier.interpret(probabilities, None, top=2)
    assert [int(one.label) for one in found] == probabilities.argmax(axis=1).tolist()
    assert all(len(one.top) == 2 and one.top[0][1] >= one.top[1][1] for one in found)
