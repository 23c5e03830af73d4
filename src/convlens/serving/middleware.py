"""What stands before the server's routes: who may ask, how much at once, how long, and how many at a time."""

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

OPEN_ROUTES = ("/live", "/ready")  # what a supervisor asks, without a token

HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """How much the server takes on; beyond it says so, with 413, 408 or 503."""

    body: int = 16 << 20  # bytes of one request
    bodies: int = 128 << 20  # bytes of all requests that are being read or worked on
    body_seconds: float = 10.0  # for a body to arrive
    at_work: int = 256  # requests that have arrived and are not answered yet
    work_seconds: float = 5.0  # for an answer to be found


class Rejected(Exception):
    """A request that does not come through the gate."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})

    @classmethod
    def busy(cls, detail: str) -> Rejected:
        """Return the refusal of what may come through a moment later."""
        return cls(503, detail, {"retry-after": "1"})


class Metrics:
    """What ``/metrics`` tells of the requests."""

    def __init__(self, registry: CollectorRegistry):
        self.requests = Counter("convlens_requests", "Requests by answer", ["method", "status"], registry=registry)
        self.seconds = Histogram("convlens_request_seconds", "Seconds from request to answer", registry=registry)
        self.at_work = Gauge(
            "convlens_requests_at_work", "Requests not answered yet", registry=registry, multiprocess_mode="livesum"
        )


@dataclass
class Gate:
    """The routes, behind checks of host, origin, token, size, time and number; an ASGI application.

    A page of another site can make a browser send requests here, also under a name of its own that leads to this
    machine (DNS rebinding): hence the checks of Host and Origin. Bodies are read whole before a request counts as at
    work, so that slow senders keep nobody waiting.
    """

    app: ASGIApp
    metrics: Metrics
    token: str | None = None  # asked for on all routes but OPEN_ROUTES; without one, only loopback names are served
    limits: Limits = field(default_factory=Limits)
    draining: bool = False  # the server is about to stop: connections are closed after their answer
    at_work: int = 0
    held: int = 0  # bytes of bodies
    reading: set[asyncio.Timeout] = field(default_factory=set)  # of bodies that have not come to their end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, headers, status = time.perf_counter(), Headers(scope=scope), 0

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message["headers"]}
                more = HEADERS | ({"connection": "close"} if self.draining else {})
                added = [(k.encode(), v.encode()) for k, v in more.items() if k.encode() not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            self.check(scope, headers)
            if scope["method"] == "POST":
                await self.take(scope, headers, receive, send_safely)
            else:
                await self.app(scope, receive, send_safely)
        except Rejected as error:
            if not status:
                answer = JSONResponse({"detail": error.detail}, error.status, error.headers)
                await answer(scope, receive, send_safely)
        finally:
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self.metrics.requests.labels(method, status or "none").inc()
            self.metrics.seconds.observe(time.perf_counter() - begun)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise Refused unless the request may come from where it comes."""
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if len(hosts) != 1 or (self.token is None and not LOOPBACK_HOST.fullmatch(hosts[0])):
            raise Rejected(421, "this server answers on localhost only; start it with --host to serve others")
        own = (f"http://{hosts[0]}", f"https://{hosts[0]}")  # a proxy before the server may speak TLS
        elsewhere = scope["method"] != "GET" and headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if elsewhere or (origin is not None and origin not in own):
            raise Rejected(403, "a page of another site may not use this server")
        if self.token is not None and scope["path"] not in OPEN_ROUTES and not self.has_token(headers):
            told = "this server asks for its token: Authorization: Bearer TOKEN, or any name with it as password"
            # browsers do not ask for a password where Bearer is offered beside it
            raise Rejected(401, told, {"www-authenticate": 'Basic realm="convlens", charset="UTF-8"'})

    def has_token(self, headers: Headers) -> bool:
        """Say whether the token was sent: as a bearer's, or as the password that a browser asks for."""
        kind, _, sent = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                sent = base64.b64decode(sent, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(sent.encode(), (self.token or "").encode())

    async def take(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """Read the request's body, and let the routes work on it if there is room.

        Its place and its bytes are free when the work has ended, which may be after the answer that it took too long.
        """
        body, late = bytearray(), False
        try:
            if not await self.read(body, headers, receive):
                return  # who asked has gone
            if self.at_work >= self.limits.at_work:
                raise Rejected.busy("too many requests at a time")
        except Rejected:
            self.held -= len(body)
            raise
        unread, size = [bytes(body)], len(body)
        body.clear()

        async def replay() -> Message:
            return {"type": "http.request", "body": unread.pop()} if unread else await receive()

        async def send_in_time(message: Message) -> None:
            if not late:
                await send(message)

        def release(_task: asyncio.Task[None]) -> None:
            self.at_work -= 1
            self.held -= size
            self.metrics.at_work.set(self.at_work)

        self.at_work += 1
        self.metrics.at_work.set(self.at_work)
        until = time.monotonic() + self.limits.work_seconds
        task = asyncio.ensure_future(self.app({**scope, "until": until}, replay, send_in_time))
        task.add_done_callback(release)
        await asyncio.wait({task}, timeout=self.limits.work_seconds)
        if task.done():
            await task  # and raise what it raised
        else:
            late = True
            raise Rejected.busy(f"no answer within {self.limits.work_seconds:g} seconds")

    async def read(self, body: bytearray, headers: Headers, receive: Receive) -> bool:
        """Fill ``body``; say whether it has come to its end. Raises Refused if it is too large or too slow."""
        too_large = Rejected(413, f"a request may have at most {self.limits.body:,} bytes")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self.limits.body:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_seconds) as patience:
                self.reading.add(patience)
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        self.held -= len(body)
                        return False
                    part = message.get("body", b"")
                    if len(body) + len(part) > self.limits.body:
                        raise too_large
                    if self.held + len(part) > self.limits.bodies:
                        raise Rejected.busy("too many bytes at a time")
                    body += part
                    self.held += len(part)
                    if not message.get("more_body"):
                        return True
        except TimeoutError:
            if self.draining:
                raise Rejected.busy("the server is about to stop") from None
            raise Rejected(408, f"the body did not come within {self.limits.body_seconds:g} seconds") from None
        finally:
            self.reading.discard(patience)

    def hurry(self) -> None:
        """Wait no longer for bodies that have not come to their end."""
        for patience in self.reading:
            if not patience.expired():
                patience.reschedule(0)
