"""The dashboard: a local page that compares runs, finished or in progress."""

from __future__ import annotations

import json
import re
import socketserver
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError, UsageError
from convlens.run_dir import GROUP, RunDir
from convlens.system.files import read_json
from convlens.web.render import read_static, render


def list_runs(paths: Sequence[str | Path]) -> list[RunDir]:
    """Return the run folders at ``paths``, and those in a group of runs or a folder; UsageError if one is no run."""
    folders = []
    for path in paths:
        if RunDir.is_group(path):
            folders += [RunDir(Path(path) / name) for name in read_json(Path(path) / GROUP)["runs"]]
        elif not RunDir(path).config.exists() and (inside := find_runs(Path(path))):
            folders += list_runs(inside)
        else:
            folders.append(RunDir.open(path))
    return folders


def find_runs(folder: Path) -> list[Path]:
    """Return the runs and groups of runs in a folder, the oldest first."""
    configs = [*folder.glob("*/config.json"), *folder.glob(f"*/{GROUP}")]
    return [file.parent for file in sorted(configs, key=lambda file: file.stat().st_mtime)]


def describe_run(folder: RunDir) -> dict[str, Any]:
    """Return what the page shows of a run, as far as it exists."""
    shown: dict[str, Any] = {"name": folder.path.resolve().name, "metrics": []}
    try:
        config = folder.read_config()
        recipe = config["recipe"]
        shown |= {
            "data": config["data"]["name"],
            "recipe": recipe["name"],
            "seed": recipe["seed"],
            "model": config["model"]["name"],
        }
        if folder.metrics.is_file():
            shown["metrics"] = folder.read_metrics()
        if folder.mistakes.is_file():
            shown["mistakes"] = folder.mistakes.stat().st_mtime_ns
        if folder.report.is_file():
            test = read_json(folder.test)
            shown["test"] = {key: test[key] for key in ("accuracy", "accuracy_ci95", "num_images")}
        elif folder.progress.is_file():
            # a run that has not written for long may have been stopped
            written = max(file.stat().st_mtime for file in (folder.progress, folder.metrics) if file.is_file())
            idle = max(round(time.time() - written), 0)
            shown["progress"] = {**read_json(folder.progress), "seconds_since_update": idle}
        json.dumps(shown, allow_nan=False)
    except (ConvlensError, AttributeError, KeyError, OSError, TypeError, ValueError):
        return {"name": shown["name"], "metrics": []}  # it is being written, or was removed: the page asks again
    return shown


def make_dashboard_page() -> str:
    """Return the page as HTML; it fetches ``runs.json`` and ``N/mistakes.json``."""
    style = read_static("playground.css") + read_static("dashboard.css")
    script = read_static("canvas.js") + read_static("dashboard.js")
    return render("dashboard.html", {"STYLE": style, "SCRIPT": script})


HOST = "127.0.0.1"

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; frame-ancestors 'none'; "

PAGE_POLICY, REPORT_POLICY = (
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'",
    "sandbox",
)  # a report runs no script


def start_dashboard(paths: Sequence[str | Path], port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """Serve the dashboard of the runs at ``paths`` in a thread; return the server and its URL.

    Raises:
        UsageError: If a path is no run, or the port is taken.
    """
    runs = list_runs(paths)
    page = make_dashboard_page().encode()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds for a request to arrive

        def do_GET(self) -> None:
            if self.headers.get("Host") not in hosts:
                return self.answer(421, "text/plain", b"the host name is not served")  # DNS rebinding
            if self.path == "/":
                return self.answer(200, "text/html; charset=utf-8", page, PAGE_POLICY)
            if self.path == "/runs.json":
                return self.answer(200, "application/json", json.dumps([describe_run(run) for run in runs]).encode())
            found = re.fullmatch(r"/(\d{1,4})/(mistakes\.json|report\.html)", self.path)
            if found and int(found[1]) < len(runs):
                run = runs[int(found[1])]
                file, kind = (run.mistakes, "application/json") if "json" in found[2] else (run.report, "text/html")
                if file.is_file():
                    return self.answer(200, kind, file.read_bytes(), REPORT_POLICY)
            return self.answer(404, "text/plain", b"not found")

        def answer(self, status: int, kind: str, content: bytes, policy: str = REPORT_POLICY) -> None:
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
            """Print nothing: the terminal belongs to the training."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def server_bind(self) -> None:
            """Bind without looking up this machine's name in the network, which can take seconds."""
            socketserver.TCPServer.server_bind(self)

        def handle_error(self, *_: object) -> None:
            """Print nothing: a browser may disconnect."""

    try:
        server = Server((HOST, port), Handler)
    except OSError as error:
        raise UsageError(f"cannot listen on {HOST}:{port}: {error.strerror}; choose another --port") from None
    number = server.server_address[1]
    hosts = [f"{name}:{number}" for name in (HOST, "localhost")] + [HOST, "localhost"] * (number == 80)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://{HOST}:{number}/"
