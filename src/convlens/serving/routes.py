"""The server's routes: predict, explain, the page, and what a supervisor asks."""

import base64
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from convlens.data.images import InvalidImageError
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.conformal import COVERAGE_LEVELS
from convlens.export.html import render_playground
from convlens.inference.onnx_runtime import OnnxPredictor
from convlens.inference.predictor import Prediction
from convlens.serving.batching import BatchWorker, DeadlineExceeded, list_files
from convlens.serving.middleware import Gate, Limits, Metrics
from convlens.serving.schemas import ErrorResponse, ExplainResponse, ModelInfo, PredictResponse, PredictResponses

T = TypeVar("T")

MAX_ENUM = 100  # classes that /openapi.json lists

FILE = {"type": "string", "format": "binary"}

KINDS = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "image/tiff", "application/octet-stream")

PICTURE = {kind: {"schema": FILE} for kind in KINDS}

PICTURE_BODY = {"requestBody": {"required": True, "description": "One picture.", "content": PICTURE}}

BODY = {
    "requestBody": {
        "required": True,
        "description": "One picture as the body, or any number of them as files of a form.",
        "content": {
            **PICTURE,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "items": FILE, "minItems": 1}},
                    "required": ["images"],
                    "additionalProperties": False,
                }
            },
        },
    }
}


def tell(**problems: str) -> dict[int | str, dict[str, Any]]:
    """Return statuses and what they mean as OpenAPI has them, such as ``_413="..."``."""
    content = {"application/json": {"schema": ErrorResponse.model_json_schema()}}
    return {int(status[1:]): {"description": told, "content": content} for status, told in problems.items()}


WRONG_HOST = tell(_421="The host is not one that is served")

REFUSALS = WRONG_HOST | tell(_401="The token is missing or wrong", _403="A page of another site asks")

WRONG_VALUE = tell(_422="A picture or a value cannot be used")

OVERLOAD = tell(
    _408="The body did not come in time",
    _413="The body is too large",
    _415="The body is neither a picture nor a form",
    _503="Too much to do; try again after a moment",
)


async def read_body(request: Request, *options: str) -> tuple[bytes, bool]:
    """Return the body of a request for pictures, and whether it is a form; HTTPException for what is neither.

    ``options`` may stand in the address, and no others.
    """
    if unknown := request.query_params.keys() - set(options):
        raise HTTPException(422, f"unknown option {min(unknown)!r}; choose from: {', '.join(options)}")
    body, kind = await request.body(), request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data" and kind not in KINDS:
        raise HTTPException(415, "send a picture (image/png, image/jpeg, ...) or a form (multipart/form-data)")
    if not body:
        raise HTTPException(422, "the request has no body: send a picture")
    return body, kind == "multipart/form-data"


@contextlib.contextmanager
def told_as_http() -> Iterator[None]:
    """Answer what goes wrong inside the block in HTTP."""
    try:
        yield
    except (InvalidImageError, UsageError) as error:
        raise HTTPException(422, str(error)) from None
    except DeadlineExceeded:
        raise HTTPException(503, "too much to do", {"retry-after": "1"}) from None


def make_app(models: Mapping[str, OnnxPredictor], *, token: str | None = None, limits: Limits | None = None) -> Gate:
    """Return the server of ``models``, by name, as an ASGI application; the first is asked where none is named.

    Without a ``token`` it answers on loopback names only.
    """
    names = tuple(models)
    among: dict[str, Any] = {"enum": list(names)}
    classes = sorted({name for predictor in models.values() for name in predictor.classes})
    labels = {"enum": classes} if len(classes) <= MAX_ENUM else {}  # /models lists the classes, however many
    shown = [name for name, predictor in models.items() if not predictor.is_quantized] or list(names)
    api = FastAPI(title="convlens", version=version("convlens"), docs_url=None, redoc_url=None, redirect_slashes=False)
    registry = CollectorRegistry()
    images = Counter("convlens_images", "Images classified", ["model"], registry=registry)
    together = Histogram(
        "convlens_images_together", "Images that went through a net at a time", ["model"], registry=registry,
        buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
    )  # fmt: skip
    workers = {
        name: BatchWorker(predictor, images.labels(name), together.labels(name)) for name, predictor in models.items()
    }
    pages: dict[str, HTMLResponse | str] = {}
    making = threading.Lock()

    @api.exception_handler(RequestValidationError)
    async def tell_what_is_wrong(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}, and not {first['input']!r}"}, 422)

    @api.exception_handler(404)
    @api.exception_handler(405)
    async def tell_where_to_look(_request: Request, error: HTTPException) -> JSONResponse:
        told = f"{error.detail}; /openapi.json lists what there is"
        return JSONResponse({"detail": told}, error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def tell_nothing(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "the server made a mistake; its log says which"}, 500)

    @api.post(
        "/predict", response_model=PredictResponses, responses=REFUSALS | WRONG_VALUE | OVERLOAD, openapi_extra=BODY
    )
    async def predict(
        request: Request,
        model: Annotated[str, Query(description="Which model to ask", json_schema_extra=among)] = names[0],
        top: Annotated[int, Query(ge=1, le=1000, description="How many classes to name")] = 1,
        adapt: Annotated[bool, Query(description="Bring the image into the form of the training images")] = True,
        coverage: Annotated[
            float | None,
            Query(
                ge=COVERAGE_LEVELS[0],
                le=COVERAGE_LEVELS[-1],
                description="Also name classes that hold the right one so often",
            ),
        ] = None,
    ) -> Response:
        """Say what pictures show."""
        body, is_form = await read_body(request, "model", "top", "adapt", "coverage")
        worker = find(workers, model)
        if coverage is not None and worker.predictor.conformal_thresholds is None:
            raise HTTPException(422, f"coverage: {model} cannot say, for it was trained without validation images")

        def files() -> list[bytes]:
            return list_files(body, request.headers["content-type"]) if is_form else [body]

        def write(found: list[Prediction]) -> bytes:
            return (
                PredictResponses(model=model, predictions=list(map(PredictResponse.of, found)))
                .model_dump_json()
                .encode()
            )

        with told_as_http():
            content = await worker.predict(
                files, request.scope["until"], write, top=top, adapt=adapt, coverage=coverage
            )
        return Response(content, media_type="application/json")

    @api.post("/explain", responses=REFUSALS | WRONG_VALUE | OVERLOAD, openapi_extra=PICTURE_BODY)
    async def explain(
        request: Request,
        model: Annotated[str, Query(description="Which model to ask", json_schema_extra=among)] = names[0],
        adapt: Annotated[bool, Query(description="Bring the image into the form of the training images")] = True,
        label: Annotated[
            str | None,
            Query(description="Class to look for, instead of the most probable", json_schema_extra=labels),
        ] = None,
    ) -> ExplainResponse:
        """Say what a picture shows, and on which places of it the answer hangs."""
        body, is_form = await read_body(request, "model", "adapt", "label")
        if is_form:
            raise HTTPException(415, "send one picture (image/png, image/jpeg, ...): a form is for /predict")
        worker = find(workers, model)
        if label is not None and label not in worker.predictor.classes:
            raise HTTPException(422, f"label: {model} knows no class {label!r}")
        with told_as_http():
            found, heat = await worker.explain(body, request.scope["until"], adapt=adapt, label=label)
        about = {"about": label or found.label, "occlusion": heat.round(4).tolist()}
        return ExplainResponse(
            model=model, label=found.label, probability=found.confidence, known=found.in_distribution, **about
        )

    @api.get("/models", responses=REFUSALS)
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
                trained=p.metadata["training"],
            )
            for name, p in models.items()
        ]

    @api.get("/", response_class=HTMLResponse, responses=REFUSALS | WRONG_VALUE)
    def page(
        model: Annotated[str, Query(description="Which model to show", json_schema_extra=among)] = shown[0],
    ) -> HTMLResponse:
        """Show a model at work: a page that runs it in the browser."""
        predictor = find(models, model)
        with making:  # once, also if many ask at the same time
            if model not in pages:
                try:
                    content = render_playground(predictor, current=model, models=shown)
                    pages[model] = HTMLResponse(content, headers={"content-security-policy": policy_of(content)})
                except ConvlensError as error:
                    pages[model] = f"there is no page of this model: {error}"
        found = pages[model]
        if isinstance(found, str):
            raise HTTPException(422, found)
        return found

    @api.get("/live", responses=WRONG_HOST)
    async def live() -> dict[str, str]:
        """Say that the server runs."""
        return {"status": "live"}

    @api.get("/ready", responses=WRONG_HOST | tell(_503="About to stop"))
    async def ready() -> dict[str, str]:
        """Say that the server takes requests."""
        if gate.draining:
            raise HTTPException(503, "the server is about to stop")
        return {"status": "ready"}

    @api.get("/metrics", response_class=Response, responses=REFUSALS)
    def metrics() -> Response:
        """Tell Prometheus what was done."""
        told = registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # of all workers together
            MultiProcessCollector(told := CollectorRegistry())  # type: ignore[no-untyped-call]
        return Response(generate_latest(told), media_type=CONTENT_TYPE_LATEST)

    gate = Gate(api, Metrics(registry), token, limits or Limits())
    return gate


def find(models: Mapping[str, T], name: str) -> T:
    """Return what belongs to the model called ``name``; HTTPException if there is none."""
    if name not in models:
        raise HTTPException(422, f"model: there is no {name!r}; choose from: {', '.join(models)}")
    return models[name]


def policy_of(page: str) -> str:
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
