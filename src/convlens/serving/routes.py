"""The routes of the server: prediction, explanation, the playground page, health and metrics."""

import base64
import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest

from convlens.data.images import InvalidImageError
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.conformal import COVERAGE_LEVELS
from convlens.export.html import render_playground
from convlens.inference.onnx_runtime import OnnxPredictor
from convlens.inference.predictor import Prediction
from convlens.serving.batching import BatchWorker, DeadlineExceeded, list_files
from convlens.serving.middleware import AdmissionControl, Limits, Metrics
from convlens.serving.schemas import ErrorResponse, ExplainResponse, ModelInfo, PredictResponse, PredictResponses

T = TypeVar("T")

MAX_ENUM = 100  # classes that /openapi.json lists
FILE = {"type": "string", "format": "binary"}
IMAGE_TYPES = (
    "image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "image/tiff", "application/octet-stream",
)  # fmt: skip
IMAGE = {kind: {"schema": FILE} for kind in IMAGE_TYPES}
IMAGE_BODY = {"requestBody": {"required": True, "description": "One image.", "content": IMAGE}}
FORM = {
    "schema": {
        "type": "object",
        "properties": {"images": {"type": "array", "items": FILE, "minItems": 1}},
        "required": ["images"],
        "additionalProperties": False,
    }
}
BODY = {
    "requestBody": {
        "required": True,
        "description": "One image as the body, or any number of them as the files of a form.",
        "content": {**IMAGE, "multipart/form-data": FORM},
    }
}


def describe_errors(**errors: str) -> dict[int | str, dict[str, Any]]:
    """Return statuses and their meanings for OpenAPI, such as ``_413="..."``."""
    content = {"application/json": {"schema": ErrorResponse.model_json_schema()}}
    return {int(status[1:]): {"description": meaning, "content": content} for status, meaning in errors.items()}


WRONG_HOST = describe_errors(_421="The host name is not served")
REJECTED = WRONG_HOST | describe_errors(_401="The token is missing or wrong", _403="A page of another site sent it")
WRONG_VALUE = describe_errors(_422="An image or a value cannot be used")
UPLOAD = (REJECTED | WRONG_VALUE) | describe_errors(
    _408="The body did not arrive in time",
    _413="The body is too large",
    _415="The body is neither an image nor a form",
    _503="The server is overloaded; try again after a moment",
)


def make_app(
    models: Mapping[str, OnnxPredictor], *, token: str | None = None, limits: Limits | None = None
) -> AdmissionControl:
    """Return the ASGI application for models by name; requests that name none go to the first.

    Without a ``token``, it answers to loopback host names only.
    """
    api = FastAPI(title="convlens", version=version("convlens"), docs_url=None, redoc_url=None, redirect_slashes=False)
    registry = CollectorRegistry()
    images = Counter("convlens_images", "Images classified", ["model"], registry=registry)
    batch_size = Histogram(
        "convlens_batch_size", "Images in a batch", ["model"], registry=registry,
        buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
    )  # fmt: skip
    workers = {name: BatchWorker(model, images.labels(name), batch_size.labels(name)) for name, model in models.items()}
    admission = AdmissionControl(api, Metrics(registry), token, limits or Limits())
    handle_errors(api)
    add_prediction(api, workers)
    add_explanation(api, workers)
    add_playground(api, models)
    add_status(api, models, admission, registry)
    return admission


def handle_errors(api: FastAPI) -> None:
    """Respond to errors with an ErrorResponse."""

    @api.exception_handler(RequestValidationError)
    async def invalid_value(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}, and not {first['input']!r}"}, 422)

    @api.exception_handler(404)
    @api.exception_handler(405)
    async def unknown_route(_request: Request, error: HTTPException) -> JSONResponse:
        detail = f"{error.detail}; /openapi.json lists the routes"
        return JSONResponse({"detail": detail}, error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def internal_error(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "internal error; the server's log has the details"}, 500)


def add_prediction(api: FastAPI, workers: Mapping[str, BatchWorker]) -> None:
    """Add ``POST /predict``."""
    names = list(workers)

    @api.post("/predict", response_model=PredictResponses, responses=UPLOAD, openapi_extra=BODY)
    async def predict(
        request: Request,
        model: Annotated[str, Query(description="The model to ask", json_schema_extra={"enum": names})] = names[0],
        top: Annotated[int, Query(ge=1, le=1000, description="How many classes to name")] = 1,
        adapt: Annotated[bool, Query(description="Adapt images to the training images; else only resize them")] = True,
        coverage: Annotated[
            float | None,
            Query(
                ge=COVERAGE_LEVELS[0],
                le=COVERAGE_LEVELS[-1],
                description="Return prediction sets that contain the true class at this rate",
            ),
        ] = None,
    ) -> Response:
        """Classify images."""
        body, is_form = await read_body(request, "model", "top", "adapt", "coverage")
        worker = get_model(workers, model)
        if coverage is not None and worker.predictor.conformal_thresholds is None:
            raise HTTPException(422, f"coverage: {model} was trained without validation images")

        def files() -> list[bytes]:
            return list_files(body, request.headers["content-type"]) if is_form else [body]

        def write(found: list[Prediction]) -> bytes:
            response = PredictResponses(model=model, predictions=[PredictResponse.of(one) for one in found])
            return response.model_dump_json().encode()

        with http_errors():
            content = await worker.predict(
                files, request.scope["deadline"], write, top=top, adapt=adapt, coverage=coverage
            )
        return Response(content, media_type="application/json")


def add_explanation(api: FastAPI, workers: Mapping[str, BatchWorker]) -> None:
    """Add ``POST /explain``."""
    names = list(workers)
    classes = sorted({name for worker in workers.values() for name in worker.predictor.classes})
    labels = {"enum": classes} if len(classes) <= MAX_ENUM else {}  # /models lists them all

    @api.post("/explain", responses=UPLOAD, openapi_extra=IMAGE_BODY)
    async def explain(
        request: Request,
        model: Annotated[str, Query(description="The model to ask", json_schema_extra={"enum": names})] = names[0],
        adapt: Annotated[bool, Query(description="Adapt the image to the training images; else only resize it")] = True,
        label: Annotated[
            str | None, Query(description="Class to explain, instead of the most probable", json_schema_extra=labels)
        ] = None,
    ) -> ExplainResponse:
        """Classify one image, and return an occlusion map."""
        body, is_form = await read_body(request, "model", "adapt", "label")
        if is_form:
            raise HTTPException(415, "send one image (image/png, image/jpeg, ...): forms are for /predict")
        worker = get_model(workers, model)
        if label is not None and label not in worker.predictor.classes:
            raise HTTPException(422, f"label: {model} has no class {label!r}")
        with http_errors():
            found, heat = await worker.explain(body, request.scope["deadline"], adapt=adapt, label=label)
        return ExplainResponse(
            model=model,
            label=found.label,
            confidence=found.confidence,
            in_distribution=found.in_distribution,
            about=label or found.label,
            occlusion=heat.round(4).tolist(),
        )


def add_playground(api: FastAPI, models: Mapping[str, OnnxPredictor]) -> None:
    """Add ``GET /``: a page that runs a model in the browser."""
    names = list(models)
    shown = [name for name, predictor in models.items() if not predictor.is_quantized] or names

    @functools.lru_cache
    def render(model: str) -> HTMLResponse:
        content = render_playground(models[model], current=model, models=shown)
        return HTMLResponse(content, headers={"content-security-policy": content_policy(content)})

    @api.get("/", response_class=HTMLResponse, responses=REJECTED | WRONG_VALUE)
    def playground(
        model: Annotated[str, Query(description="The model to show", json_schema_extra={"enum": names})] = shown[0],
    ) -> HTMLResponse:
        """Return a page that runs the model in the browser."""
        get_model(models, model)
        try:
            return render(model)
        except ConvlensError as error:
            raise HTTPException(422, f"there is no page of this model: {error}") from None


def add_status(
    api: FastAPI, models: Mapping[str, OnnxPredictor], admission: AdmissionControl, registry: CollectorRegistry
) -> None:
    """Add ``GET /models``, ``/livez``, ``/readyz`` and ``/metrics``."""

    @api.get("/models", responses=REJECTED)
    async def list_models() -> list[ModelInfo]:
        """List the models."""
        return [
            ModelInfo(
                name=name,
                classes=list(p.classes),
                channels=p.preprocess.channels,
                height=p.preprocess.height,
                width=p.preprocess.width,
                coverage=p.conformal_thresholds is not None,
                training=p.metadata["training"],
            )
            for name, p in models.items()
        ]

    @api.get("/livez", responses=WRONG_HOST)
    async def livez() -> dict[str, str]:
        """Report that the server is running."""
        return {"status": "live"}

    @api.get("/readyz", responses=WRONG_HOST | describe_errors(_503="About to stop"))
    async def readyz() -> dict[str, str]:
        """Report whether the server accepts requests."""
        if admission.draining:
            raise HTTPException(503, "the server is about to stop")
        return {"status": "ready"}

    @api.get("/metrics", response_class=Response, responses=REJECTED)
    def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


async def read_body(request: Request, *options: str) -> tuple[bytes, bool]:
    """Return the body, and whether it is a form; HTTPException if it is neither an image nor a form.

    The query parameters may be ``options``, and no others.
    """
    if unknown := request.query_params.keys() - set(options):
        raise HTTPException(422, f"unknown option {min(unknown)!r}; choose from: {', '.join(options)}")
    body, kind = await request.body(), request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data" and kind not in IMAGE_TYPES:
        raise HTTPException(415, "send an image (image/png, image/jpeg, ...) or a form (multipart/form-data)")
    if not body:
        raise HTTPException(422, "the request has no body: send an image")
    return body, kind == "multipart/form-data"


@contextlib.contextmanager
def http_errors() -> Iterator[None]:
    """Turn errors into HTTP statuses."""
    try:
        yield
    except (InvalidImageError, UsageError) as error:
        raise HTTPException(422, str(error)) from None
    except DeadlineExceeded:
        raise HTTPException(503, "the server is overloaded", {"retry-after": "1"}) from None


def get_model(models: Mapping[str, T], name: str) -> T:
    """Return the entry of model ``name``; HTTPException if there is none."""
    if name not in models:
        raise HTTPException(422, f"model: there is no {name!r}; choose from: {', '.join(models)}")
    return models[name]


def content_policy(page: str) -> str:
    """Return the Content-Security-Policy that lets a page run its own script and style, by their hashes, no others."""
    hashes = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data: blob:; "
        "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
