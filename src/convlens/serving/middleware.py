"""Admission control: who may send requests, how much at once, for how long, and how many at a time."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")

LOOPBACK_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)  # in a Host header

OPEN_ROUTES = ("/livez", "/readyz")  # for supervisors, without a token

HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """How much the server accepts; it rejects the rest with 413, 408 or 503."""

    max_body_bytes: int = 16 << 20  # of one request
    max_buffered_bytes: int = 128 << 20  # of all requests that are being read or processed
    body_seconds: float = 10.0  # for a body to arrive
    max_in_flight: int = 256  # requests that have arrived and are being processed
    answer_seconds: float = 5.0  # for an answer to be ready


class Rejected(Exception):
    """A request that is not passed on to the routes."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})

    @classmethod
    def overloaded(cls, detail: str) -> Rejected:
        """Return the rejection of a request that may succeed a moment later."""
        return cls(503, detail, {"retry-after": "1"})


class Metrics:
    """The metrics of requests at ``/metrics``."""

    def __init__(self, registry: CollectorRegistry):
        self.requests = Counter("convlens_requests", "Requests by response", ["method", "status"], registry=registry)
        self.seconds = Histogram("convlens_request_seconds", "Seconds from request to response", registry=registry)
        self.in_flight = Gauge("convlens_requests_in_flight", "Requests being processed", registry=registry)


@dataclass
class AdmissionControl:
    """An ASGI application in front of the routes that checks host, origin, token, size, time and number.

    Another site can make a browser send requests to this server, even under a host name of its own (DNS rebinding):
    hence the checks of Host and Origin. A body is read completely before its request counts as in flight, so that slow
    senders do not occupy the places of others.
    """

    app: ASGIApp
    metrics: Metrics
    token: str | None = None  # required for all routes but OPEN_ROUTES; without one, only loopback names are served
    limits: Limits = field(default_factory=Limits)
    draining: bool = False  # the server is about to stop: connections are closed after their response
    in_flight: int = 0
    buffered_bytes: int = 0
    uploads: set[asyncio.Timeout] = field(default_factory=set)  # the timeouts of bodies that are still arriving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, headers, status = time.perf_counter(), Headers(scope=scope), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                more = HEADERS | ({"connection": "close"} if self.draining else {})
                added = [(k.encode(), v.encode()) for k, v in more.items() if k.encode() not in present]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            self.check(scope, headers)
            if scope["method"] == "POST":
                await self.handle_upload(scope, headers, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
        except Rejected as error:
            if not status:
                response = JSONResponse({"detail": error.detail}, error.status, error.headers)
                await response(scope, receive, send_with_headers)
        finally:
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self.metrics.requests.labels(method, status or "none").inc()
            self.metrics.seconds.observe(time.perf_counter() - started)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise Rejected unless host, origin and token are right."""
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if len(hosts) != 1 or (self.token is None and not LOOPBACK_HOST.fullmatch(hosts[0])):
            raise Rejected(
                421, "without a token this server answers to localhost only; set CONVLENS_TOKEN to serve other names"
            )
        own = (f"http://{hosts[0]}", f"https://{hosts[0]}")  # a reverse proxy may speak TLS
        cross_site = scope["method"] != "GET" and headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if cross_site or (origin is not None and origin not in own):
            raise Rejected(403, "pages of other sites may not use this server")
        if self.token is not None and scope["path"] not in OPEN_ROUTES and not self.has_token(headers):
            detail = "the token is required: Authorization: Bearer TOKEN, or any user name with the token as password"
            # browsers do not ask for a password if Bearer is offered as well
            raise Rejected(401, detail, {"www-authenticate": 'Basic realm="convlens", charset="UTF-8"'})

    def has_token(self, headers: Headers) -> bool:
        """Return True if the token was sent, as a bearer token or as the password of a browser."""
        kind, _, sent = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                sent = base64.b64decode(sent, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(sent.encode(), (self.token or "").encode())

    async def handle_upload(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """Read the body, then let the routes respond, if there is room.

        The request's place and bytes are freed when its work has ended, which may be after a response that it took too
        long.
        """
        body, late = bytearray(), False
        try:
            if not await self.read_body(body, headers, receive):
                return  # the client has disconnected
            if self.in_flight >= self.limits.max_in_flight:
                raise Rejected.overloaded("too many requests at a time")
        except Rejected:
            self.buffered_bytes -= len(body)
            raise
        unread, size = [bytes(body)], len(body)
        body.clear()

        async def replay() -> Message:
            return {"type": "http.request", "body": unread.pop()} if unread else await receive()

        async def send_in_time(message: Message) -> None:
            if not late:
                await send(message)

        def count(change: int) -> None:
            self.in_flight += change
            self.metrics.in_flight.set(self.in_flight)

        def release(_task: asyncio.Task[None]) -> None:
            count(-1)
            self.buffered_bytes -= size

        count(1)
        deadline = time.monotonic() + self.limits.answer_seconds
        task = asyncio.ensure_future(self.app({**scope, "deadline": deadline}, replay, send_in_time))
        task.add_done_callback(release)
        await asyncio.wait({task}, timeout=self.limits.answer_seconds)
        if task.done():
            await task  # raises what it raised
        else:
            late = True
            raise Rejected.overloaded(f"no answer within {self.limits.answer_seconds:g} seconds")

    async def read_body(self, body: bytearray, headers: Headers, receive: Receive) -> bool:
        """Fill ``body``; return False if the client disconnects. Raises Rejected if it is too large or too slow."""
        too_large = Rejected(413, f"a request may have at most {self.limits.max_body_bytes:,} bytes")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self.limits.max_body_bytes:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_seconds) as timeout:
                self.uploads.add(timeout)
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        self.buffered_bytes -= len(body)
                        return False
                    part = message.get("body", b"")
                    if len(body) + len(part) > self.limits.max_body_bytes:
                        raise too_large
                    if self.buffered_bytes + len(part) > self.limits.max_buffered_bytes:
                        raise Rejected.overloaded("too many bytes at a time")
                    body += part
                    self.buffered_bytes += len(part)
                    if not message.get("more_body"):
                        return True
        except TimeoutError:
            if self.draining:
                raise Rejected.overloaded("the server is about to stop") from None
            raise Rejected(408, f"the body did not arrive within {self.limits.body_seconds:g} seconds") from None
        finally:
            self.uploads.discard(timeout)

    def cancel_slow_uploads(self) -> None:
        """Stop waiting for bodies that are still arriving."""
        for timeout in self.uploads:
            if not timeout.expired():
                timeout.reschedule(0)
