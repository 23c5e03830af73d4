"""The live page's server: a few files of some run folders, for this machine only, with nothing but Python."""

from __future__ import annotations

import json
import re
import socketserver
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from convlens.errors import UsageError
from convlens.serving.live import describe_run, list_runs, make_live_page

HOST = "127.0.0.1"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; frame-ancestors 'none'; "
OWN, REPORT = "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'", "sandbox"  # a report runs nothing


def start_watching(paths: Sequence[str | Path], port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """Serve the live page of some runs in a thread; return the server, and where it is.

    Raises UsageError for what is no run, and for a port that is taken.
    """
    runs = list_runs(paths)
    page = make_live_page().encode()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds for a request to arrive

        def do_GET(self) -> None:
            if self.headers.get("Host") not in hosts:
                return self.answer(421, "text/plain", b"the host is not one that is served")  # no rebinding
            if self.path == "/":
                return self.answer(200, "text/html; charset=utf-8", page, OWN)
            if self.path == "/runs.json":
                return self.answer(200, "application/json", json.dumps([describe_run(run) for run in runs]).encode())
            found = re.fullmatch(r"/(\d{1,4})/(mistakes\.json|report\.html)", self.path)
            if found and int(found[1]) < len(runs):
                run = runs[int(found[1])]
                file, kind = (run.mistakes, "application/json") if "json" in found[2] else (run.report, "text/html")
                if file.is_file():
                    return self.answer(200, kind, file.read_bytes(), REPORT)
            return self.answer(404, "text/plain", b"there is nothing here")

        def answer(self, status: int, kind: str, content: bytes, policy: str = REPORT) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(content)),
                "Content-Security-Policy": POLICY + policy,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Cache-Control": "no-store",
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing: the terminal is the training's."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def server_bind(self) -> None:
            """Bind without asking the network for this machine's name, which can take seconds."""
            socketserver.TCPServer.server_bind(self)

        def handle_error(self, *_: object) -> None:
            """Say nothing: a browser that went away is no news."""

    try:
        server = Server((HOST, port), Handler)
    except OSError as error:
        raise UsageError(f"cannot listen on {HOST}:{port}: {error.strerror}; choose another --port") from None
    number = server.server_address[1]
    hosts = [f"{name}:{number}" for name in (HOST, "localhost")] + [HOST, "localhost"] * (number == 80)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://{HOST}:{number}/"
