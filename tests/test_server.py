"""The server as a process: how it starts, what it prints, how it bears a crowd, and how it stops."""

import asyncio
import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from browser import browse, in_browser
from test_bundle import make_bundle
from test_onnx import run
from test_serving import golden

from convlens.export.load import load_onnx
from convlens.serving.server import listen, name_model

ROOT = Path(__file__).parent.parent
IN_THE_CONTAINER = re.search(r"constraints.txt \\\n(.*?) \\\n", (ROOT / "Dockerfile").read_text())[1].split()  # type: ignore[index]
# everything else that convlens depends on is not there
WITHOUT = f"""
import re, sys
from importlib.metadata import packages_distributions, requires
needed = {{re.split("[ <>=;]", line)[0] for line in requires("convlens")}} - {{*{IN_THE_CONTAINER}}}
for module, distributions in packages_distributions().items():
    if set(distributions) & needed:
        sys.modules[module] = None
assert sys.modules["torch"] is sys.modules["matplotlib"] is sys.modules["sklearn"] is None
from convlens.cli.main import main
main()
"""


class Running:
    """A server process."""

    def __init__(self, *arguments: object, program: Sequence[str] = ("-m", "convlens"), **more: str):
        self.command = [sys.executable, *program, "serve", *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | more
        )
        assert self.process.stdout
        self.line = self.process.stdout.readline()
        found = re.search(r":(\d+)  \(Ctrl-C stops\)$", self.line)
        if not found:
            assert self.process.stderr
            raise AssertionError(self.line + self.process.stderr.read())
        self.port = int(found[1])

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def stop(self, number: int | None = signal.SIGTERM) -> tuple[int, str]:
        """Stop it, or wait for its end if it has been told (``None``); return its exit code and what else it printed.

        A second signal would kill a Python that is on its way out, and has given its handlers back.
        """
        if number is not None and self.process.poll() is None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out + err

    def memory(self, name: str) -> float:
        """Return VmRSS or VmHWM of the server, in MiB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


@contextlib.contextmanager
def running(*arguments: object, **more: str) -> Iterator[Running]:
    server = Running(*arguments, **more)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def picture() -> bytes:
    return golden(load_onnx("digits"))[6]


def request_of(body: bytes, more: str = "") -> bytes:
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{more}\r\n".encode() + body


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Read an answer to its end; ConnectionResetError if it does not come whole."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        await reader.readexactly(int(headers["content-length"]))
    except asyncio.IncompleteReadError as error:
        raise ConnectionResetError("no answer") from error
    return int(head[0].split()[1]), headers


async def ask_once(port: int, body: bytes, more: str = "") -> tuple[int, dict[str, str]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_of(body, f"{more}Connection: close\r\n"))
        return await answer_of(reader)
    finally:
        writer.close()


# start and stop


def test_it_starts_answers_and_stops(picture: bytes) -> None:
    with running("digits", "mnist") as server:
        assert server.line == f"serving digits, mnist at http://127.0.0.1:{server.port}  (Ctrl-C stops)\n"
        status, headers = asyncio.run(ask_once(server.port, picture))
        assert (status, headers["content-type"]) == (200, "application/json")
        with urllib.request.urlopen(server.url("/readyz")) as response:
            assert response.read() == b'{"status":"ready"}'
        begun = time.monotonic()
        assert server.stop(signal.SIGINT) == (0, "")
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("kind", ["a model by name", "a file"])
def test_it_needs_only_what_the_container_has(kind: str, picture: bytes, tmp_path: Path) -> None:
    if kind == "a file":
        assert run("export", "digits", "--out", tmp_path / "net.onnx") == 0
    source = tmp_path / "net.onnx" if kind == "a file" else "digits"
    with running(source, program=("-c", WITHOUT)) as server:  # type: ignore[arg-type]
        assert asyncio.run(ask_once(server.port, picture))[0] == 200
        with urllib.request.urlopen(server.url("/")) as page:
            assert page.headers["content-type"] == "text/html; charset=utf-8" and b'id="pad"' in page.read()
        assert server.stop() == (0, "")


def test_a_run_without_a_graph_is_exported_first(tmp_path: Path, picture: bytes) -> None:
    make_bundle(1, 8).save(tmp_path / "run" / "model")
    with running(tmp_path / "run" / "model") as server:
        assert asyncio.run(ask_once(server.port, picture))[0] == 200
        code, told = server.stop()
    assert (code, told) == (
        0, f"exporting {tmp_path}/run/model to ONNX; `convlens export {tmp_path}/run/model` does it once\n"
    )  # fmt: skip


def test_answers_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # what asyncio asks for before it sets TCP_NODELAY


def test_wrong_arguments_get_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (("digits", "--port", port), f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose"),
            (
                ("digits", "--host", "no.such.host.example", "--port", 0),
                "cannot listen on no.such.host.example, port 0",
            ),
            (
                ("digits", "digits"),
                "two models would have the same name: digits, digits; give one another: NAME=digits",
            ),
            (
                ("digits", "--host", "", "--port", 0),
                "--host is empty: give an address, such as 127.0.0.1, or 0.0.0.0 for all",
            ),
            (("digit",), "unknown run folder or model 'digit'; did you mean 'digits'?"),
            (("digits", "--port", "99999"), "Invalid value for '--port'"),
        ]
        for arguments, told in cases:
            assert run("serve", *arguments) == 2
            assert told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("convlens.serving")]:
        monkeypatch.delitem(sys.modules, name)
    assert run("serve", "digits") == 2
    assert capsys.readouterr().err == "convlens: serving needs more packages: pip install 'convlens[serve]'\n"


def test_other_hosts_need_the_token(picture: bytes) -> None:
    with running("digits", "--host", "0.0.0.0") as server:
        assert server.process.stdout
        token = server.process.stdout.readline().split()[1]
        for sent, status in (
            ("", 401),
            ("Authorization: Bearer wrong\r\n", 401),
            (f"Authorization: Bearer {token}\r\n", 200),
        ):
            assert asyncio.run(ask_once(server.port, picture, sent))[0] == status
    with running("digits", "--host", "0.0.0.0", CONVLENS_TOKEN="mine-alone") as server:
        assert server.process.stdout
        assert server.process.stdout.readline() == "token   that of CONVLENS_TOKEN\n"  # which is not printed
        assert server.stop() == (0, "")


def test_half_a_request_does_not_keep_it_from_stopping(picture: bytes) -> None:
    with running("digits") as server, socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(request_of(picture)[:-10])
        assert asyncio.run(ask_once(server.port, picture))[0] == 200  # by now the half has been read
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        half.settimeout(10)
        answer = b"".join(iter(lambda: half.recv(2000), b"")).decode()
        assert answer.startswith("HTTP/1.1 503 ") and "retry-after: 1" in answer
        assert answer.endswith('{"detail":"the server is about to stop"}')
        assert server.stop(None) == (0, "") and time.monotonic() - begun < 8


def test_names_and_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("current.onnx").symlink_to("digits-17.onnx")
    for source, named in (
        ("runs/pets", ("pets", "runs/pets")), ("runs/pets/model/", ("pets", "runs/pets/model/")),
        ("current.onnx", ("current", "current.onnx")), ("cats=runs/pets", ("cats", "runs/pets")),
        ("cats=a=b", ("cats", "a=b")), ("lr=1=current.onnx", ("lr", "1=current.onnx")),
        ("cats=x=", ("cats", "x=")),
        (f"lr=1={tmp_path}", ("lr=1", str(tmp_path))),
        ("a=b", ("a=b", "a=b")), ("=b", ("=b", "=b")),
    ):  # fmt: skip
        assert name_model(source) == named
    for token in ("", "short", "ümlautümlaut", "with a blank", "line\nbreak"):
        monkeypatch.setenv("CONVLENS_TOKEN", token)
        assert run("serve", "digits") == 2
        told = "convlens: CONVLENS_TOKEN must have at least 8 printable ASCII characters, without spaces\n"
        assert capsys.readouterr().err == told


@in_browser
def test_its_page_runs_under_its_policy(tmp_path: Path) -> None:
    with running("digits", "mnist") as server, browse(tmp_path) as tab:
        for address, here, others in (("/", "digits", ["mnist"]), ("/?model=mnist", "mnist", ["digits"])):
            tab.open(server.url(address))
            assert tab.wait("at('proof').dataset.good") == "true"
            assert tab.run("document.querySelector('[aria-current=page]').textContent") == here
            assert tab.run("[...document.querySelectorAll('#others a')].map((one) => one.textContent)") == others
        assert not tab.errors


# nothing is lost when it stops


async def keep_asking(
    port: int, body: bytes, answers: Counter[object], draining: asyncio.Event, *, alive: bool
) -> None:
    """Ask one request after another, each on a connection of its own or not, as a balancer does: until not ready."""
    while not draining.is_set():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                writer.write(request_of(body, "" if alive else "Connection: close\r\n"))
                status, headers = await answer_of(reader)
                answers[status] += 1
                if headers.get("connection") == "close":
                    break
        except OSError as error:
            answers[f"lost: {error!r}"] += 1
        finally:
            writer.close()


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_no_accepted_request_is_lost(rounds: int, picture: bytes) -> None:
    for number in range(rounds):
        answers: Counter[object] = Counter()
        with running("digits") as server:

            async def load() -> int:
                draining = asyncio.Event()
                clients = [
                    asyncio.create_task(keep_asking(server.port, picture, answers, draining, alive=bool(i % 2)))  # noqa: B023
                    for i in range(12)
                ]
                while not answers:  # noqa: B023
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.3 + 0.01 * number)  # noqa: B023
                server.process.send_signal(signal.SIGTERM)  # noqa: B023
                seen = 200
                while seen == 200:  # until the signal has come through
                    seen, _ = await get(server.port, "/readyz")  # noqa: B023
                await asyncio.sleep(0.5)  # a balancer asks now and then: until it does, all is still accepted
                draining.set()
                await asyncio.wait_for(asyncio.gather(*clients), 15)
                return seen

            begun = time.monotonic()
            assert asyncio.run(load()) == 503
            code, told = server.stop(None)
            assert time.monotonic() - begun < 12
        assert (code, told) == (0, "") and set(answers) <= {200, 503} and answers[200] > 50, answers


async def get(port: int, path: str) -> tuple[int, dict[str, str]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    found = await answer_of(reader)
    writer.close()
    return found


# a crowd


def percentile(seconds: list[float], share: float) -> float:
    return float(np.quantile(seconds, share))


async def time_requests(port: int, body: bytes, count: int) -> list[float]:
    """Return the seconds of requests of one client, 50 a second, that were all answered."""
    seconds = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(count):
        begun = time.perf_counter()
        writer.write(request_of(body))
        status, _ = await answer_of(reader)
        seconds.append(time.perf_counter() - begun)
        assert status == 200
        await asyncio.sleep(max(0.02 - seconds[-1], 0))
    writer.close()
    return seconds


@pytest.mark.parametrize("crowd", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_crowd_is_answered_or_told_to_come_again(crowd: int, picture: bytes) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with running("mnist") as server:
        asyncio.run(ask_once(server.port, picture))
        before = server.memory("VmRSS")

        async def all_at_once() -> list[tuple[int, dict[str, str]]]:
            return await asyncio.gather(*(ask_once(server.port, picture) for _ in range(crowd)))

        statuses: Counter[int] = Counter()
        for _ in range(5):
            for status, headers in asyncio.run(all_at_once()):
                statuses[status] += 1
                assert status == 200 or headers["retry-after"] == "1"
        growth = server.memory("VmHWM") - before
        print(f"{5 * crowd} requests, {crowd} at a time: {dict(statuses)}, memory +{growth:.0f} MiB")
        assert set(statuses) <= {200, 503} and statuses[200] and growth < 300
        assert server.stop() == (0, "")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# many clients that send a byte of a request every half second, until they are cut off: port, how many; stdin: request
SLOW = """
import asyncio, sys
port, clients, whole = int(sys.argv[1]), int(sys.argv[2]), sys.stdin.buffer.read()

async def be_slow(number):
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = len(whole) - 60 if number % 2 else 0  # some send the head and a part of the body at once
    writer.write(whole[:begun])
    try:
        for byte in whole[begun:]:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.5)
    except ConnectionError:
        pass
    finally:
        writer.close()

async def all_of_them():
    await asyncio.gather(*map(be_slow, range(clients)), return_exceptions=True)

asyncio.run(all_of_them())
"""


@pytest.mark.slow
def test_slow_clients_keep_nobody_waiting(picture: bytes) -> None:
    with running("mnist") as server:

        def measure(requests: int) -> list[float]:
            return asyncio.run(time_requests(server.port, picture, requests))

        measure(50)
        alone = measure(500)
        # in a process of their own: in the healthy client's, it would wait for 500 tasks of its own loop
        slow = subprocess.Popen([sys.executable, "-c", SLOW, str(server.port), "500"], stdin=subprocess.PIPE)
        try:
            assert slow.stdin
            slow.stdin.write(request_of(picture))
            slow.stdin.close()
            time.sleep(1)
            beside = measure(400)
            assert slow.poll() is None
        finally:
            slow.kill()
            slow.wait()
        told = [f"{1000 * percentile(x, 0.5):.1f}, {1000 * percentile(x, 0.99):.1f} ms" for x in (alone, beside)]
        print(f"median, 99th percentile: alone {told[0]}; beside 500 slow clients {told[1]}")
        assert percentile(beside, 0.99) <= 2 * percentile(alone, 0.99)


def test_who_does_not_finish_asking_is_cut_off(picture: bytes) -> None:
    slow = "from convlens.cli.main import main; from convlens.serving import server; server.HEADER_SECONDS = 1; main()"
    with running("digits", program=("-c", slow)) as server:  # type: ignore[arg-type]
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.settimeout(10)
            begun = time.monotonic()
            half.sendall(b"POST /predict HTTP/1.1\r\nHost: ")
            assert half.recv(10) == b"" and 0.5 < time.monotonic() - begun < 5
        assert asyncio.run(ask_once(server.port, picture))[0] == 200
