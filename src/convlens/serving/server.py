"""Running the server: its socket, its worker processes, and how it stops without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from convlens.errors import ConvlensError, UsageError
from convlens.export.load import load_onnx
from convlens.inference.onnx_runtime import OnnxPredictor, find_onnx
from convlens.serving.middleware import LOOPBACK, Gate
from convlens.serving.routes import make_app
from convlens.system.text import quoted

TOKEN = "CONVLENS_TOKEN"
INHERITED = "CONVLENS_INHERITED"  # what a worker process gets: the file numbers of its socket and of its parent's pipe
SHORTEST = 8  # letters of a token
SO_ATTACH_FILTER = 26
BACKLOG = 2048  # connections that wait to be accepted
HEADER_SECONDS = 10.0  # for the head of a request to arrive
EXIT_GRACE_SECONDS = 1.0  # seconds in which the server is not ready but still takes what comes
LAST_ACCEPT_SECONDS = 1.0  # seconds for what has connected to ask
DRAIN_SECONDS = 6  # seconds for what has been asked to be answered


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
                gate, http=Connection, ws="none", lifespan="off", log_level="error", access_log=False,
                proxy_headers=False, server_header=False, backlog=BACKLOG, timeout_graceful_shutdown=DRAIN_SECONDS,
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
        """Begin to stop; a second Ctrl-C does not wait for answers."""
        self.force_exit = self.gate.draining and sig == signal.SIGINT
        self.gate.draining = True
        self.stop_at = time.monotonic() + (EXIT_GRACE_SECONDS if sig == signal.SIGTERM else 0)

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
        for server in self.servers:
            for one in server.sockets:
                with contextlib.suppress(OSError), one.dup() as listener:
                    server.close()
                    reject_new_connections(listener)
                    listener.setblocking(False)
                    while True:  # until there is nobody left, which is an OSError too
                        accepted, _ = listener.accept()
                        await loop.connect_accepted_socket(self.make_connection, accepted)
        end = time.monotonic() + LAST_ACCEPT_SECONDS
        while self.server_state.connections and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        self.gate.hurry()
        await super().shutdown(sockets)

    def make_connection(self) -> Connection:
        """Return what talks to one client."""
        return Connection(self.config, self.server_state, self.lifespan.state)


def reject_new_connections(listener: socket.socket) -> None:
    """Let nobody connect any more, but let those who have wait to be accepted: without this, who connects between the
    last look and the closing of the socket would be lost. On Linux, where a filter can drop what comes in.
    """
    if sys.platform == "linux":
        instruction = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF: return 0 bytes of the packet
        program = struct.pack("HP", 1, ctypes.addressof(instruction))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def serve(sources: Sequence[str], host: str = "127.0.0.1", port: int = 8000, workers: int = 1) -> None:
    """Serve runs, models by name, or ONNX files, until it is told to stop; with several workers, each a process.

    ``NAME=SOURCE`` gives a model another name. A host that is not this machine alone asks for the token in
    CONVLENS_TOKEN, or makes one up and says it. Raises UsageError for an address or a token that cannot be used, and
    for two models of the same name.
    """
    named = dict(name_model(source) for source in sources)
    if len(named) < len(sources):
        names = ", ".join(name_model(source)[0] for source in sources)
        raise UsageError(f"two models would have the same name: {names}; give one another: NAME={quoted(sources[-1])}")
    token = read_token()
    if token is None and host not in LOOPBACK:
        token = secrets.token_urlsafe(24)
    allow_many_connections()
    found = {
        name: find_onnx(source) for name, source in named.items()
    }  # what is wrong with one is said before all else
    inherited = os.environ.pop(INHERITED, None)
    if inherited:
        exit_with_parent(int(inherited.split()[1]))
    with socket.socket(fileno=int(inherited.split()[0])) if inherited else listen(host, port) as listener:
        greeting = "" if inherited else startup_message(named, listener, token)
        models = {name: predictor or export(named[name]) for name, predictor in found.items()}
        if workers > 1:
            run_workers(models, listener, workers, token, greeting)
        else:
            logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # each answer says what was wrong
            Server(make_app(models, token=token), greeting).run([listener])


def name_model(source: str) -> tuple[str, str]:
    """Return the name that a model is served by, and what it is loaded from."""
    if not Path(source).exists():  # each part may have an = of its own
        splits = [(source[:at], source[at + 1 :]) for at, sign in enumerate(source) if sign == "=" and at]
        if splits:
            return next((split for split in splits if split[1] and Path(split[1]).exists()), splits[0])
    path = Path(os.path.abspath(source))  # a link has its own name, whatever it leads to
    return (path.parent if path.name == "model" else path).name.removesuffix(".onnx"), source


def read_token() -> str | None:
    """Return the token that was given, if one was; UsageError if it cannot be sent, or is too easy to guess."""
    token = os.environ.get(TOKEN)
    if token is not None and (len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token):
        raise UsageError(f"{TOKEN} must have {SHORTEST} or more letters, digits and signs of ASCII, and no blank")
    return token


def export(source: str) -> OnnxPredictor:
    """Make the ONNX graph of a run that has none yet, in memory, which takes a few seconds."""
    print(f"exporting {source} to ONNX; `convlens export {quoted(source)}` does it once", file=sys.stderr)
    return load_onnx(source)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that clients can connect to; UsageError if that address cannot be had."""
    if not host:
        raise UsageError("--host: give an address, such as 127.0.0.1, or 0.0.0.0 for all of this machine's")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (")[0]  # without what Python adds
        raise UsageError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port") from None
    # asked anew what it is, it says TCP; only then does asyncio turn off Nagle's algorithm, which costs 40 ms an answer
    return socket.socket(fileno=made.detach())


def startup_message(names: Iterable[str], listener: socket.socket, token: str | None) -> str:
    """Return the lines that say where the server is."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all addresses of this machine; its name is one that others can use
        host = socket.gethostname()
    told = f"serving {', '.join(names)} at http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C stops)\n"
    if token is not None:
        told += (
            f"token   that of {TOKEN}\n" if TOKEN in os.environ else f"token   {token}  (made up; {TOKEN} sets one)\n"
        )
    return told


def allow_many_connections() -> None:
    """Raise this process's limit of open files to what it may be, where there is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def exit_with_parent(pipe: int) -> None:
    """Stop this process when the one that holds the other end of ``pipe`` is gone, however it ended."""

    def watch() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run_workers(
    models: Mapping[str, OnnxPredictor], listener: socket.socket, workers: int, token: str | None, greeting: str
) -> None:
    """Run ``workers`` processes that share a socket, until they are told to stop, or one of them ends by itself."""
    if not hasattr(os, "fork"):
        raise UsageError("--workers: this system cannot share a socket between processes; leave it at 1")
    told = False

    def tell(_number: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, tell)
    theirs, ours = os.pipe()  # its other end closes when this process ends
    with tempfile.TemporaryDirectory() as folder, os.fdopen(theirs), os.fdopen(ours, "w"):
        given = [listener.fileno(), theirs]
        more = {INHERITED: " ".join(map(str, given)), "PROMETHEUS_MULTIPROC_DIR": folder}
        more |= {TOKEN: token} if token else {}
        command = [sys.executable, "-P", "-m", "convlens", "serve"]  # -P: no module of the folder that we are in
        for index, (name, predictor) in enumerate(models.items()):
            predictor.write(file := Path(folder) / f"{index}.onnx")
            command.append(f"{name}={file}")
        processes: list[subprocess.Popen[bytes]] = []
        while len(processes) < workers and not told:
            # a session of its own: a terminal's Ctrl-C comes to this process alone, which passes it on
            processes.append(subprocess.Popen(command, env=os.environ | more, pass_fds=given, start_new_session=True))
        print(greeting, end="", flush=True)
        while not told and all(process.poll() is None for process in processes):
            time.sleep(0.1)
        listener.close()  # what connects now is the workers' own to accept, or to refuse
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    if not told:
        raise ConvlensError("a worker has ended by itself, so all were stopped; start the server again")
