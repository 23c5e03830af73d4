"""Running the server: its socket, its worker processes, and how it stops without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from convlens.errors import ConvlensError, UsageError, quoted
from convlens.serving.app import make_app
from convlens.serving.gate import LOOPBACK, Gate
from convlens.shipping.onnx_predictor import OnnxPredictor, find_onnx, load_onnx

TOKEN, SOCKET = "CONVLENS_TOKEN", "CONVLENS_SOCKET"  # environment variables; the second is for worker processes
SO_ATTACH_FILTER = 26
WAITING = 2048  # connections that wait to be accepted
HEADER_SECONDS = 10.0  # for the head of a request to arrive
GRACE = 1.0  # seconds in which the server is not ready but still takes what comes
LAST_CALL = 1.0  # seconds for what has connected to ask
DRAIN = 6  # seconds for what has been asked to be answered


class Connection(H11Protocol):
    """A connection that knows since when it waits for a request."""

    since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        self.since = time.monotonic()
        super().connection_made(transport)

    def on_response_complete(self) -> None:
        """Begin to wait for the next."""
        self.since = time.monotonic()
        super().on_response_complete()

    def is_waiting(self) -> bool:
        """Say whether no request is being worked on."""
        return self.cycle is None or self.cycle.response_complete


class Server(uvicorn.Server):
    """A server that, when it is told to stop, says that it is not ready, and then loses nothing that it accepted."""

    def __init__(self, gate: Gate, greeting: str = ""):
        super().__init__(
            uvicorn.Config(
                gate, http=Connection, ws="none", lifespan="off", log_level="warning", access_log=False,
                proxy_headers=False, server_header=False, backlog=WAITING, timeout_graceful_shutdown=DRAIN,
            )
        )  # fmt: skip
        self.gate, self.greeting = gate, greeting
        self.stop_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        print(self.greeting, end="", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and Ctrl-C: unlike uvicorn's own, without raising them again at the end."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second signal does not wait for answers."""
        self.force_exit = self.gate.draining
        self.gate.draining = True
        self.stop_at = time.monotonic() + (GRACE if sig == signal.SIGTERM else 0)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: close who is too slow to ask, and say whether it is time to stop."""
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection) and connection.is_waiting():
                if now - connection.since > HEADER_SECONDS:
                    connection.transport.close()
        return await super().on_tick(counter) or (self.stop_at is not None and now >= self.stop_at)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what waits, no more; answer it; and stop."""
        loop = asyncio.get_running_loop()
        listening = [one.dup() for server in self.servers for one in server.sockets]
        for server in self.servers:
            server.close()
        for one in listening:
            turn_away(one)
            one.setblocking(False)
            with one, contextlib.suppress(BlockingIOError):
                while True:
                    accepted, _ = one.accept()
                    await loop.connect_accepted_socket(self.make_connection, accepted)
        end = time.monotonic() + LAST_CALL
        while self.server_state.connections and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    def make_connection(self) -> Connection:
        """Return what talks to one client."""
        return Connection(self.config, self.server_state, self.lifespan.state)


def turn_away(listener: socket.socket) -> None:
    """Let nobody connect any more, but let those who have wait to be accepted: without this, who connects between the
    last look and the closing of the socket would be lost. On Linux, where a filter can drop what comes in.
    """
    if sys.platform == "linux":
        instruction = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF: return 0 bytes of the packet
        program = struct.pack("HP", 1, ctypes.addressof(instruction))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def serve(sources: Sequence[str], host: str = "127.0.0.1", port: int = 8000, workers: int = 1) -> None:
    """Serve runs, models by name, or ONNX files, until it is told to stop; with several workers, each a process.

    A host that is not this machine alone asks for the token in CONVLENS_TOKEN, or makes one up and says it. Raises
    UsageError for an address that cannot be used and for two models of the same name.
    """
    names = [Path(source).resolve().name.removesuffix(".onnx") for source in sources]
    if len(set(names)) < len(names):
        raise UsageError(f"two models have the same name: {', '.join(names)}; rename a folder or file")
    token = os.environ.get(TOKEN) or (None if host in LOOPBACK else secrets.token_urlsafe(24))
    allow_many_connections()
    inherited = os.environ.pop(SOCKET, None)
    if workers > 1:
        for source in sources:
            find_onnx(source)  # what is wrong with one is said once
    models = {} if workers > 1 else {name: load(source) for name, source in zip(names, sources, strict=True)}
    with socket.socket(fileno=int(inherited)) if inherited else listen(host, port) as listener:
        greeting = "" if inherited else greet(names, listener, token)
        if workers > 1:
            run_workers(sources, listener, workers, token, greeting)
        else:
            Server(make_app(models, token=token), greeting).run([listener])


def load(source: str) -> OnnxPredictor:
    """Load a model; one that has no ONNX graph yet is exported in memory, which takes a few seconds."""
    found = find_onnx(source)
    if found is None:
        print(f"exporting {source} to ONNX; `convlens export {quoted(source)}` does it once", file=sys.stderr)
    return found or load_onnx(source)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that clients can connect to; UsageError if that address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=WAITING)
    except OSError as error:
        # of an address: what the system says of it, without what Python adds; of a name that does not resolve: that
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UsageError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port") from None
    # asked anew what it is, it says TCP; only then does asyncio turn off Nagle's algorithm, which costs 40 ms an answer
    return socket.socket(fileno=made.detach())


def greet(names: Sequence[str], listener: socket.socket, token: str | None) -> str:
    """Return the lines that say where the server is."""
    host, port = listener.getsockname()[:2]
    told = f"serving {', '.join(names)} at http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C stops)\n"
    if token is not None and TOKEN not in os.environ:
        told += f"token   {token}  (made up; {TOKEN} sets another)\n"
    return told


def allow_many_connections() -> None:
    """Raise this process's limit of open files to what it may be, where there is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run_workers(
    sources: Sequence[str], listener: socket.socket, workers: int, token: str | None, greeting: str
) -> None:
    """Run ``workers`` processes that share a socket, until they are told to stop, or one of them fails."""
    if not hasattr(os, "fork"):
        raise UsageError("--workers: this system cannot share a socket between processes; leave it at 1")
    with tempfile.TemporaryDirectory() as folder:
        more = {SOCKET: str(listener.fileno()), "PROMETHEUS_MULTIPROC_DIR": folder} | ({TOKEN: token} if token else {})
        command = [sys.executable, "-m", "convlens", "serve", *sources]
        processes = [
            subprocess.Popen(command, env=os.environ | more, pass_fds=[listener.fileno()]) for _ in range(workers)
        ]
        told = False

        def stop(number: int, _frame: FrameType | None) -> None:
            nonlocal told
            told = True
            listener.close()  # what connects now is the workers' own to accept, or to refuse
            for process in processes:
                process.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        print(greeting, end="", flush=True)
        while not told and all(process.poll() is None for process in processes):
            time.sleep(0.1)
        failed = not told
        if failed:
            stop(signal.SIGTERM, None)
        for process in processes:
            process.wait()
        if failed:
            raise ConvlensError("a worker has ended by itself, so all were stopped")
