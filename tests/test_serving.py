"""The routes and the admission control of the server."""

import asyncio
import base64
import io
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from convlens.explain.occlusion import occlusion_map
from convlens.export.load import load_onnx
from convlens.export.onnx import reference_images
from convlens.inference.onnx_runtime import OnnxPredictor
from convlens.inference.store import bundled_models
from convlens.serving import batching, routes
from convlens.serving.middleware import AdmissionControl, Limits
from convlens.serving.routes import make_app

PNG = {"content-type": "image/png"}


def encode(pixels: np.ndarray[Any, Any]) -> bytes:
    """Return pixels, uint8 (H, W, C), as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    return file.getvalue()


def golden(predictor: OnnxPredictor) -> list[bytes]:
    """Return the golden images of a net as PNG files."""
    return [encode(image) for image in reference_images(predictor.preprocess)]


@pytest.fixture(scope="module")
def digits() -> OnnxPredictor:
    return load_onnx("digits")


@pytest.fixture(scope="module")
def picture(digits: OnnxPredictor) -> bytes:
    return golden(digits)[6]


def client_of(gate: AdmissionControl, **options: Any) -> TestClient:
    return TestClient(gate, base_url="http://localhost:8000", **options)


class Instead:
    """A predictor that runs otherwise."""

    def __init__(self, predictor: OnnxPredictor, run: Callable[[Any], Any]):
        self._predictor, self.run = predictor, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)


@pytest.fixture
def client(digits: OnnxPredictor) -> TestClient:
    return client_of(make_app({"digits": digits}))


def metric(client: TestClient, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


# answers


@pytest.mark.parametrize("name", sorted(bundled_models()))
def test_the_answers_are_those_of_predict(name: str) -> None:
    predictor = load_onnx(name)
    client = client_of(make_app({name: predictor}))
    files = golden(predictor)
    expected = predictor.predict(list(files), top=3, coverage=0.9)
    form = [("images", (f"{number}.png", file, "image/png")) for number, file in enumerate(files)]
    together = client.post("/predict?top=3&coverage=0.9", files=form).json()
    assert together["model"] == name and len(together["predictions"]) == len(files)
    for file, answer, wanted in zip(files, together["predictions"], expected, strict=True):
        (alone,) = client.post("/predict", params={"top": 3, "coverage": 0.9}, content=file, headers=PNG).json()[
            "predictions"
        ]
        for told in (answer, alone):
            assert set(told) == {"label", "confidence", "in_distribution", "top", "prediction_set"}
            assert (told["label"], told["in_distribution"]) == (wanted.label, wanted.in_distribution)
            assert told["prediction_set"] == list(wanted.prediction_set or ())
            assert told["confidence"] == pytest.approx(wanted.confidence, abs=1e-6)
            assert [one["label"] for one in told["top"]] == [label for label, _ in wanted.top]
            assert [one["confidence"] for one in told["top"]] == pytest.approx([p for _, p in wanted.top], abs=1e-6)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_what_an_answer_hangs_on(name: str) -> None:
    predictor = load_onnx(name)
    client = client_of(make_app({name: predictor}))
    file = golden(predictor)[6]
    wanted, pixels = predictor.predict(file), predictor.adapt(file)
    for params, about in (({}, wanted.label), ({"label": predictor.classes[3]}, predictor.classes[3])):
        told = client.post("/explain", params=params, content=file, headers=PNG).json()
        shown = (told["model"], told["label"], told["in_distribution"], told["about"])
        assert shown == (name, wanted.label, wanted.in_distribution, about)
        assert told["confidence"] == pytest.approx(wanted.confidence, abs=1e-6)
        heat = occlusion_map(lambda images: predictor.run(images)[0], pixels, predictor.classes.index(about))
        np.testing.assert_allclose(told["occlusion"], heat, atol=1e-4)


def test_what_cannot_be_explained(client: TestClient, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"params": {"label": "cow"}, "content": picture, "headers": PNG}, 422, "label: digits has no class 'cow'"),
        ({"params": {"top": "3"}, "content": picture, "headers": PNG}, 422,
         "unknown option 'top'; choose from: model, adapt, label"),
        ({"files": [("images", ("a.png", picture, "image/png"))]}, 415,
         "send one image (image/png, image/jpeg, ...): forms are for /predict"),
        ({"content": b"no picture", "headers": PNG}, 422, "the image is not an image (JPEG, PNG, GIF"),
        ({"params": {"model": "mnist"}, "content": picture, "headers": PNG}, 422, ""),
    ]  # fmt: skip
    for request, status, told in cases:
        response = client.post("/explain", **request)
        assert (response.status_code, response.json()["detail"][: len(told)]) == (status, told), request
    monkeypatch.setattr(batching, "MAX_INPUT_BYTES", 1000)
    told = client.post("/explain", content=picture, headers=PNG).json()["detail"]
    assert told == "this model takes images that are too large to be explained here"


def test_raw_and_more_than_one_model(digits: OnnxPredictor) -> None:
    mnist = load_onnx("mnist")
    client = client_of(make_app({"digits": digits, "mnist": mnist}))
    page = Image.new("L", (120, 90), "white")
    page.paste(20, (50, 20, 60, 70))
    file = io.BytesIO()
    page.save(file, "PNG")
    for params, wanted in (
        ({}, digits.predict(page)),
        ({"model": "mnist"}, mnist.predict(page)),
        ({"model": "mnist", "adapt": "false"}, mnist.predict(page, adapt=False)),
    ):
        answer = client.post("/predict", params=params, content=file.getvalue(), headers=PNG).json()
        assert answer["model"] == params.get("model", "digits")
        assert answer["predictions"][0]["confidence"] == pytest.approx(wanted.confidence, abs=1e-6)
    assert [about["name"] for about in client.get("/models").json()] == ["digits", "mnist"]
    assert client.get("/models").json()[1]["training"]["accuracy"] > 0.99


def test_requests_that_wait_together_go_through_the_net_together(
    digits: OnnxPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[batching.BatchWorker] = []

    def make(*arguments: Any) -> batching.BatchWorker:
        made.append(batching.BatchWorker(*arguments))
        return made[-1]

    monkeypatch.setattr(routes, "BatchWorker", make)
    files = golden(digits)
    expected = digits.predict(list(files))
    began, sizes, go = threading.Event(), [], threading.Event()

    def run_slowly(pixels: Any) -> Any:
        sizes.append(len(pixels))
        began.set()
        assert go.wait(20)
        return digits.run(pixels)

    gate = make_app({"digits": Instead(digits, run_slowly)})  # type: ignore[dict-item]

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost") as client:
            first = asyncio.create_task(client.post("/predict", content=files[0], headers=PNG))
            while not began.is_set():
                await asyncio.sleep(0.01)
            others = [asyncio.create_task(client.post("/predict", content=file, headers=PNG)) for file in files]
            while made[0].jobs.qsize() < 8:
                await asyncio.sleep(0.01)
            go.set()
            return await asyncio.gather(first, *others)

    answers = [response.json()["predictions"][0] for response in asyncio.run(ask())]
    assert sizes == [1, 8]
    for answer, wanted in zip(answers, [expected[0], *expected], strict=True):
        assert answer["confidence"] == pytest.approx(wanted.confidence, abs=1e-6)


# what it does not take


def test_bad_requests_get_a_line(client: TestClient, picture: bytes, digits: OnnxPredictor) -> None:
    form = [("images", ("a.png", picture)), ("images", ("/etc/secret.png", b"no image"))]
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"content": b"no image", "headers": PNG}, 422, "the image is not an image (JPEG, PNG,"),
        ({"files": form}, 422, "image 2 of 2 is not an image (JPEG"),
        ({"content": b"", "headers": PNG}, 422, "the request has no body: send an image"),
        ({"content": picture}, 415, "send an image (image/png, image/jpeg, ...) or a form"),
        ({"content": picture, "headers": {"content-type": "text/plain"}}, 415, "send an image"),
        (
            {"content": b"--x", "headers": {"content-type": "multipart/form-data"}},
            422,
            "the body is not a multipart form",
        ),
        ({"data": {"images": "text"}, "files": {}}, 415, "send an image"),
        ({"content": picture, "headers": PNG, "params": {"top": 0}}, 422, "top: Input should be greater than"),
        ({"content": picture, "headers": PNG, "params": {"coverage": 2}}, 422, "coverage: Input should be less"),
        ({"content": picture, "headers": PNG, "params": {"tpo": 2}}, 422, "unknown option 'tpo'; choose from: model,"),
        ({"data": {"top": "3"}, "files": form[:1]}, 422, "`top` is a query parameter, as in /predict?top=..."),
        ({"data": {"a": "3"}, "files": form[:1]}, 422, "the form has a field 'a' that is not a file"),
        (
            {"content": picture, "headers": PNG, "params": {"model": "digit"}},
            422,
            "model: there is no 'digit'; choose from: digits",
        ),
    ]
    for request, status, told in cases:
        response = client.post("/predict", **request)
        assert (response.status_code, list(response.json())) == (status, ["detail"])
        assert response.json()["detail"].startswith(told) and "/etc" not in response.text
    boundary = {"content-type": "multipart/form-data; boundary=x"}
    for body in (
        b"--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n--x--\r\n',
        b"nonsense",
    ):
        assert client.post("/predict", content=body, headers=boundary).status_code == 422
    many = [("images", ("a.png", picture))] * (batching.MAX_IMAGES + 1)
    assert client.post("/predict", files=many).json()["detail"] == "a request may have at most 1,000 images"
    begun = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n' + picture
    for kind in ("multipart/form-data; boundary=x", "Multipart/Form-Data; boundary=x"):
        whole = client.post("/predict", content=begun + b"\r\n--x--", headers={"content-type": kind})
        assert (whole.status_code, len(whole.json()["predictions"])) == (200, 1)
    for cut in (begun, begun + b"\r\n--x", begun + b"\r\n" + begun):
        assert client.post("/predict", content=cut, headers=boundary).json() == {"detail": "the form is incomplete"}
    digits.conformal_thresholds, bounds = None, digits.conformal_thresholds
    try:
        answer = client.post("/predict?coverage=0.9", content=picture, headers=PNG)
        assert (answer.status_code, answer.json()["detail"][:25]) == (422, "coverage: digits was trai")
    finally:
        digits.conformal_thresholds = bounds


def test_pictures_that_are_small_files_and_large_pictures(
    client: TestClient, digits: OnnxPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = io.BytesIO()
    Image.new("1", (2000, 2000)).save(page, "PNG")
    monkeypatch.setattr(batching, "MAX_PIXELS", 9_000_000)
    form = [("images", ("a.png", page.getvalue()))]
    assert client.post("/predict", files=2 * form).status_code == 200
    told = client.post("/predict", files=3 * form)
    detail = "the images of a request may have at most 9,000,000 pixels together"
    assert (told.status_code, told.json()["detail"]) == (422, detail)
    monkeypatch.setattr(batching, "MAX_INPUT_BYTES", 640)
    tiny = [("images", ("a.png", to_png(Image.new("L", (1, 1)))))]
    assert client.post("/predict", files=10 * tiny).status_code == 200
    told = client.post("/predict", files=11 * tiny)
    assert told.json()["detail"] == "a request may have at most 10 images for this model"


def test_work_that_is_too_late_is_not_done(digits: OnnxPredictor, picture: bytes) -> None:
    client = client_of(make_app({"digits": digits}, limits=Limits(answer_seconds=0)))
    assert client.post("/predict", content=picture, headers=PNG).status_code == 503
    time.sleep(0.2)
    assert metric(client, 'convlens_images_total{model="digits"}') == 0


def test_a_mistake_of_ours_says_nothing_of_this_machine(digits: OnnxPredictor, picture: bytes) -> None:
    def fail(_pixels: Any) -> Any:
        raise OSError("cannot read /home/me/secret")

    client = client_of(make_app({"digits": Instead(digits, fail)}), raise_server_exceptions=False)  # type: ignore[dict-item]
    response = client.post("/predict", content=picture, headers=PNG)
    assert (response.status_code, response.json()) == (
        500,
        {"detail": "internal error; the server's log has the details"},
    )
    assert client.get("/livez").status_code == 200
    assert metric(client, 'convlens_requests_total{method="POST",status="500"}') == 1


def test_bodies_that_are_too_large_or_too_slow(digits: OnnxPredictor, picture: bytes) -> None:
    limits = Limits(max_body_bytes=20_000, max_buffered_bytes=30_000, body_seconds=0.3)
    gate = make_app({"digits": digits}, limits=limits)
    client = client_of(gate)

    def parts(size: int) -> Iterator[bytes]:
        yield from itertools.repeat(b"x" * 1000, size // 1000)

    for content in (b"x" * 20_001, parts(21_000)):  # declared, and in chunks
        response = client.post("/predict", content=content, headers=PNG)
        assert (response.status_code, response.json()["detail"]) == (413, "a request may have at most 20,000 bytes")
    assert client.post("/predict", content=parts(20_000), headers=PNG).status_code == 422  # read, and no image
    asked: list[dict[str, Any]] = [{"type": "http.request", "body": b"x", "more_body": True}]
    told: list[Any] = []

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Any) -> None:
        told.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [(b"host", b"localhost")]}
    asyncio.run(gate(scope, receive, send))
    assert told[0]["status"] == 408 and b"did not arrive within 0.3 seconds" in told[1]["body"]
    assert gate.buffered_bytes == gate.in_flight == 0


def test_too_much_at_a_time_is_refused_at_once(digits: OnnxPredictor, picture: bytes) -> None:
    go = threading.Event()

    def run_slowly(pixels: Any) -> Any:
        assert go.wait(20)
        return digits.run(pixels)

    gate = make_app({"digits": Instead(digits, run_slowly)}, limits=Limits(max_in_flight=3, answer_seconds=2))  # type: ignore[dict-item]

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost") as client:

            async def post() -> httpx.Response:
                return await client.post("/predict", content=picture, headers=PNG)

            tasks = [asyncio.create_task(post()) for _ in range(20)]
            while sum(task.done() for task in tasks) < 17:  # while the others are still at work
                await asyncio.sleep(0.01)
            assert gate.in_flight == 3
            answers = await asyncio.gather(*tasks)
            assert gate.in_flight == 3 and gate.buffered_bytes == 3 * len(picture)  # told, but not yet done with
            go.set()
            while gate.in_flight:
                await asyncio.sleep(0.01)
            return list(answers)

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [503] * 20
    assert sum("too many requests at a time" in answer.text for answer in answers) == 17
    assert all(answer.headers["retry-after"] == "1" for answer in answers)
    assert sum("no answer within 2 seconds" in answer.text for answer in answers) == 3
    assert gate.in_flight == gate.buffered_bytes == 0


# to whom it answers


HOSTS = ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST", "evil.example", "localhost/..",
         "localhost?.a.b", "localhost.evil.example:8000",
         "127.0.0.1.nip.example", "0.0.0.0:8000", "[::2]", "[", "user@localhost", "")  # fmt: skip
ORIGINS = (None, "http://localhost:8000", "http://evil.example", "null", "http://localhost.evil.example", "file://",
           "http://127.0.0.1:9000", "http:localhost:8000", "")  # fmt: skip
SITES = (None, "same-origin", "cross-site", "same-site", "none")
METHODS = ("POST", "GET", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD")


def test_no_other_site_can_use_it(client: TestClient, picture: bytes) -> None:
    done = written = 0
    for host, origin, site, method in itertools.product(HOSTS, ORIGINS, SITES, METHODS):
        headers = {"host": host, "origin": origin, "sec-fetch-site": site, **PNG}
        kept = {key: value for key, value in headers.items() if value is not None}
        status = client.request(method, "/predict", content=picture, headers=kept).status_code
        ours = host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST")
        same = origin is None or origin == f"http://{host}"
        allowed = ours and same and (site in (None, "same-origin", "none") or method == "GET")
        if not ours:
            assert status == 421, (host, origin, site, method)
        elif not allowed:
            assert status == 403, (host, origin, site, method)
        else:
            assert status == (200 if method == "POST" else 405)
            written += status == 200
        done += 1
    assert done == 14 * 9 * 5 * 7
    assert metric(client, 'convlens_images_total{model="digits"}') == written


def test_two_hosts_are_none(digits: OnnxPredictor) -> None:
    gate, told = make_app({"digits": digits}), []

    async def send(message: Any) -> None:
        told.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    headers = [(b"host", b"localhost"), (b"host", b"evil.example")]
    asyncio.run(gate({"type": "http", "method": "GET", "path": "/models", "headers": headers}, receive, send))
    assert told[0]["status"] == 421


def test_beyond_this_machine_it_asks_for_its_token(digits: OnnxPredictor, picture: bytes) -> None:
    client = TestClient(make_app({"digits": digits}, token="secret"), base_url="http://nets.example")
    basic = base64.b64encode(b"me:secret").decode()
    for sent, status in (
        (None, 401), ("Bearer secret", 200), ("bearer secret", 200), ("Bearer wrong", 401), ("Bearer", 401),
        (f"Basic {basic}", 200), ("Basic !!", 401), (f"Basic {base64.b64encode(b'secret').decode()}", 401),
        (f"Basic {base64.b64encode(bytes([255])).decode()}", 401), ("Digest secret", 401),
    ):  # fmt: skip
        headers = {"authorization": sent} if sent else {}
        for path in ("/models", "/metrics", "/openapi.json"):
            assert client.get(path, headers=headers).status_code == status
        response = client.post("/predict", content=picture, headers={**PNG, **headers})
        assert response.status_code == status
        if status == 401:
            # Chromium asks for no password if Bearer stands in the same header
            assert response.headers["www-authenticate"] == 'Basic realm="convlens", charset="UTF-8"'
        # a browser that has been given the password sends it for other sites too
        other = {**PNG, **headers, "origin": "http://evil.example"}
        assert client.post("/predict", content=picture, headers=other).status_code == 403
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 200


def test_headers_that_keep_a_browser_safe(client: TestClient, picture: bytes) -> None:
    for response in (
        client.get("/models"), client.get("/nothing"), client.get("/", params={"model": "x"}),
        client.post("/predict", content=picture, headers=PNG), client.get("/", headers={"host": "evil.example"}),
    ):  # fmt: skip
        assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in response.headers and "server" not in response.headers


# the interface as it describes itself

PICTURES = st.sampled_from(["L", "RGB", "RGBA", "1"]).flatmap(
    lambda mode: st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda size: Image.new(mode, size))
)


def to_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


schemathesis.openapi.format("binary", PICTURES.map(to_png))
for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
    schemathesis.openapi.media_type(f"image/{kind}", PICTURES.map(to_png))
schemathesis.openapi.media_type("application/octet-stream", PICTURES.map(to_png))


GOOD, BAD = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
ROUTES = [(path, GOOD) for path in ("/predict", "/explain", "/models", "/", "/livez", "/readyz", "/metrics")]


@pytest.mark.parametrize(("path", "mode"), [*ROUTES, ("/predict", BAD), ("/explain", BAD), ("/", BAD)])
def test_it_answers_as_its_description_says(path: str, mode: Any, digits: OnnxPredictor) -> None:
    gate = make_app({"digits": digits, "mnist": load_onnx("mnist")})
    schema = schemathesis.openapi.from_asgi("/openapi.json", gate, headers={"host": "localhost"})
    operation = schema[path]["POST" if path in ("/predict", "/explain") else "GET"]
    took = {200: 0}

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call_and_validate(headers={"host": "localhost"})
        took[response.status_code] = took.get(response.status_code, 0) + 1

    ask()
    assert (took.keys() == {200}) if mode is GOOD else sum(took.values()) > 20


def test_what_is_described(client: TestClient) -> None:
    told = client.get("/openapi.json").json()
    assert set(told["paths"]) == {"/predict", "/explain", "/models", "/", "/livez", "/readyz", "/metrics"}
    assert "multipart/form-data" in told["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert client.get("/docs").status_code == 404  # it would load scripts from elsewhere


def test_the_names_of_the_metrics(client: TestClient, picture: bytes) -> None:
    client.post("/predict", content=picture, headers=PNG)
    assert metric(client, "convlens_requests_in_flight") == 0
    assert metric(client, 'convlens_batch_size_count{model="digits"}') == 1
    assert metric(client, "convlens_request_seconds_count") == 3  # two of /metrics
    assert metric(client, 'convlens_requests_total{method="POST",status="200"}') == 1
