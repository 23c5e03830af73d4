"""The live page's server: a few files of some run folders, for this machine only, with nothing but Python."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from convlens.errors import UsageError
from convlens.serving.live import list_runs, make_live_page, to_json

HOST = "127.0.0.1"
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


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
                return self.answer(200, "text/html; charset=utf-8", page)
            if self.path == "/runs.json":
                return self.answer(200, "application/json", to_json(runs))
            found = re.fullmatch(r"/(\d{1,4})/(mistakes\.json|report\.html)", self.path)
            if found and int(found[1]) < len(runs):
                run, kind = runs[int(found[1])], "application/json" if found[2].endswith("json") else "text/html"
                file = run.mistakes if found[2].endswith("json") else run.report
                if file.is_file():
                    return self.answer(200, kind, file.read_bytes())
            return self.answer(404, "text/plain", b"there is nothing here")

        def answer(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(content)),
                "Content-Security-Policy": POLICY,
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

        def handle_error(self, *_: object) -> None:
            """Say nothing: a browser that went away is no news."""

    try:
        server = Server((HOST, port), Handler)
    except OSError as error:
        raise UsageError(f"cannot listen on {HOST}:{port}: {error.strerror}; choose another --port") from None
    hosts = tuple(f"{name}:{server.server_port}" for name in (HOST, "localhost"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://{HOST}:{server.server_port}/"
