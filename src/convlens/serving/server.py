"""Run the HTTP server: its socket, its models, and its graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from convlens.errors import UsageError
from convlens.export.load import load_onnx
from convlens.inference.onnx_runtime import OnnxPredictor, find_onnx
from convlens.serving.middleware import LOOPBACK, AdmissionControl
from convlens.serving.routes import make_app
from convlens.system.text import quoted

TOKEN = "CONVLENS_TOKEN"
MIN_TOKEN_LENGTH = 8
BACKLOG = 2048  # connections that wait to be accepted
KEEP_ALIVE_SECONDS = 75  # longer than the 60 s of common proxies: they must be the ones to close idle connections
HEADER_SECONDS = 10.0  # a request head that takes longer is cut off, at the latest after twice this time
DRAIN_SECONDS = 3.0  # for which a server that received SIGTERM is not ready, but accepts requests
SHUTDOWN_SECONDS = 6  # for accepted requests to be answered


class Server(uvicorn.Server):
    """A uvicorn server that drains before it stops, and cuts off slow request heads."""

    def __init__(self, admission: AdmissionControl, greeting: str = ""):
        super().__init__(
            uvicorn.Config(
                admission, http="h11", ws="none", lifespan="off", log_level="error", access_log=False,
                proxy_headers=False, server_header=False, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS, timeout_notify=int(HEADER_SECONDS),
                callback_notify=self.close_slow_connections,
            )
        )  # fmt: skip
        self.admission, self.greeting = admission, greeting
        self._waiting: dict[H11Protocol, Any] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and print the greeting: from now on signals are handled."""
        await super().startup(sockets)
        print(self.greeting, end="", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, on SIGTERM after a while in which it reports not ready; a second Ctrl-C does not wait for responses.

        Unlike uvicorn's own handler, it does not raise the signal again after the shutdown: the exit code is 0.
        """
        if self.admission.draining and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        self.admission.draining = True
        asyncio.get_running_loop().call_later(DRAIN_SECONDS if sig == signal.SIGTERM else 0, self._stop)

    def _stop(self) -> None:
        self.admission.cancel_slow_uploads()
        self.should_exit = True

    async def close_slow_connections(self) -> None:
        """Close connections on which the same request head was missing at the last call; uvicorn has no such timeout.

        Connections that wait for another request are not among them: uvicorn closes them after the keep-alive time.
        """
        waiting = {
            connection: connection.cycle
            for connection in self.server_state.connections
            if isinstance(connection, H11Protocol)
            and (connection.cycle is None or connection.cycle.response_complete)
            and connection.timeout_keep_alive_task is None
        }
        for connection, cycle in waiting.items():
            if connection in self._waiting and self._waiting[connection] is cycle:
                connection.transport.close()
        self._waiting = waiting


def serve(sources: Sequence[str], host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve runs, bundled models by name, or ONNX files until SIGTERM or Ctrl-C; ``NAME=SOURCE`` renames one.

    Beyond this machine, requests need the token in ``CONVLENS_TOKEN``; without one, a token is generated and printed.
    Raises UsageError for an address or token that cannot be used, and for two models of the same name.
    """
    named = dict(name_model(source) for source in sources)
    if len(named) < len(sources):
        names = ", ".join(name_model(source)[0] for source in sources)
        raise UsageError(f"two models would have the same name: {names}; give one another: NAME={quoted(sources[-1])}")
    token = read_token()
    if token is None and host not in LOOPBACK:
        token = secrets.token_urlsafe(24)
    raise_file_limit()
    found = {name: find_onnx(source) for name, source in named.items()}  # fails before anything slow
    with listen(host, port) as listener:
        models = {name: predictor or export(named[name]) for name, predictor in found.items()}
        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the responses have its messages
        Server(make_app(models, token=token), startup_message(named, listener, token)).run([listener])


def name_model(source: str) -> tuple[str, str]:
    """Return the name that a model is served by, and its source."""
    if not Path(source).exists():  # both parts of NAME=SOURCE may contain a =
        splits = [(source[:at], source[at + 1 :]) for at, sign in enumerate(source) if sign == "=" and at]
        if splits:
            return next((split for split in splits if split[1] and Path(split[1]).exists()), splits[0])
    path = Path(os.path.abspath(source))  # a link is served by its own name
    return (path.parent if path.name == "model" else path).name.removesuffix(".onnx"), source


def read_token() -> str | None:
    """Return the token in the environment, if any; UsageError if it cannot be sent, or is too easy to guess."""
    token = os.environ.get(TOKEN)
    if token is None:
        return None
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{TOKEN} must have at least {MIN_TOKEN_LENGTH} printable ASCII characters, without spaces")
    return token


def export(source: str) -> OnnxPredictor:
    """Export a run that has no ONNX graph yet, in memory."""
    print(f"exporting {source} to ONNX; `convlens export {quoted(source)}` does it once", file=sys.stderr)
    return load_onnx(source)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; UsageError if the address is not available."""
    if not host:
        raise UsageError("`host` is empty: give an address, such as 127.0.0.1, or 0.0.0.0 for all of this machine's")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (")[0]  # without Python's addition
        raise UsageError(f"cannot listen on {host}, port {port}: {reason}; choose another host or port") from None
    # a socket made from its number has `proto` set to TCP; only then does asyncio set TCP_NODELAY, which saves 40 ms
    return socket.socket(fileno=listener.detach())


def startup_message(names: Iterable[str], listener: socket.socket, token: str | None) -> str:
    """Return the lines with the server's address and token."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all addresses of this machine: print a name that others can use
        host = socket.gethostname()
    message = f"serving {', '.join(names)} at http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C stops)\n"
    if token is not None:
        message += (
            f"token   that of {TOKEN}\n" if TOKEN in os.environ else f"token   {token}  (generated; or set {TOKEN})\n"
        )
    return message


def raise_file_limit() -> None:
    """Raise this process's limit of open files, and so of connections, as far as possible."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
