"""What stands before the server's routes: who may ask, how much at once, how long, and how many at a time."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_ROUTES = ("/live", "/ready")  # what a supervisor asks, without a token
DISCARDED = 4  # times the largest body: what is read and dropped of one that is too large, so that its sender listens
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
    work_seconds: float = 10.0  # for an answer to be found


class Refused(Exception):
    """A request that does not come through the gate."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})

    @classmethod
    def busy(cls, detail: str) -> Refused:
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
        except Refused as error:
            if not status:
                answer = JSONResponse({"detail": error.detail}, error.status, error.headers)
                await answer(scope, receive, send_safely)
            if error.status == 413:
                await self.discard(receive)
        finally:
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self.metrics.requests.labels(method, status or "none").inc()
            self.metrics.seconds.observe(time.perf_counter() - begun)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise Refused unless the request may come from where it comes."""
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if len(hosts) != 1 or (self.token is None and name_of(hosts[0]) not in LOOPBACK):
            raise Refused(421, "this server answers on localhost only; start it with --host to serve others")
        own = (f"http://{hosts[0]}", f"https://{hosts[0]}")  # a proxy before the server may speak TLS
        elsewhere = scope["method"] != "GET" and headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if elsewhere or (origin is not None and origin not in own):
            raise Refused(403, "a page of another site may not use this server")
        if self.token is not None and scope["path"] not in OPEN_ROUTES and not self.has_token(headers):
            asked = 'Bearer, Basic realm="convlens: any name, and the token as password"'
            raise Refused(401, "this server asks for its token", {"www-authenticate": asked})

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
        """Read the request's body, and let the routes work on it if there is room."""
        body = bytearray()
        try:
            if not await self.read(body, headers, receive):
                return  # who asked has gone
            if self.at_work >= self.limits.at_work:
                raise Refused.busy("too many requests at a time")
            self.at_work += 1
            self.metrics.at_work.set(self.at_work)
            unread = [bytes(body)]

            async def replay() -> Message:
                return {"type": "http.request", "body": unread.pop()} if unread else await receive()

            try:
                async with asyncio.timeout(self.limits.work_seconds):
                    await self.app(scope, replay, send)
            except TimeoutError:
                raise Refused.busy(f"no answer within {self.limits.work_seconds:g} seconds") from None
            finally:
                self.at_work -= 1
                self.metrics.at_work.set(self.at_work)
        finally:
            self.held -= len(body)

    async def read(self, body: bytearray, headers: Headers, receive: Receive) -> bool:
        """Fill ``body``; say whether it has come to its end. Raises Refused if it is too large or too slow."""
        too_large = Refused(413, f"a request may have {self.limits.body:,} bytes")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self.limits.body:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    part = message.get("body", b"")
                    if len(body) + len(part) > self.limits.body:
                        raise too_large
                    if self.held + len(part) > self.limits.bodies:
                        raise Refused.busy("too many bytes at a time")
                    body += part
                    self.held += len(part)
                    if not message.get("more_body"):
                        return True
        except TimeoutError:
            raise Refused(408, f"the body did not come within {self.limits.body_seconds:g} seconds") from None

    async def discard(self, receive: Receive) -> None:
        """Read on, for a while: who is still sending does not hear the answer."""
        left = DISCARDED * self.limits.body
        try:
            async with asyncio.timeout(2):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            return


def name_of(host: str) -> str:
    """Return the name in a Host header, without its port, in lower case; "" if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
