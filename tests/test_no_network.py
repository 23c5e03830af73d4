"""Nothing phones home: what the verbs write into an empty home folder, and whom they connect to."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import convlens

SCAN = Path(__file__).parent / "golden" / "images" / "1-bit.png"
VERBS = [  # train, and all that import ONNX Runtime; later ones take what the first ones made
    "train digits --epochs 1 --out run",
    "export run --int8 --out run.onnx",
    "verify run.onnx",
    f"predict run.onnx {SCAN}",
]
SERVE = "serve digits --port 0"
SERVING = 12  # seconds; ONNX Runtime's telemetry connects within ten
# train draws plots: matplotlib keeps a list of this machine's fonts, which holds nothing of the user's and goes nowhere
KNOWN = re.compile(r"\.cache/(convlens|matplotlib)/")
CONNECT = re.compile(r'sa_family=AF_INET6?, sin6?_port=htons\((\d+)\).*?"([0-9a-f.:]+)"')


def trace(log: Path) -> list[str]:
    """Return what to put before a command so that ``log`` lists whom it connects to; nothing without strace."""
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    start = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", calls, "-o", str(log)]
    works = shutil.which("strace") and subprocess.run([*start, "true"], capture_output=True).returncode == 0
    return start if works else []


def start(verb: str, folder: Path) -> subprocess.Popen[str]:
    """Start a verb in a home of its own, ``folder/VERB/home``, with its connections in ``folder/VERB/connections``."""
    home = folder / verb.split()[0] / "home"
    home.mkdir(parents=True)
    # nothing else of our own environment: convlens sets ORT_DISABLE_TELEMETRY here too, and ONNX Runtime's telemetry
    # hides from CI
    own = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(Path(convlens.__file__).parents[1])}
    command = [*trace(home.parent / "connections"), sys.executable, "-m", "convlens", *verb.split()]
    return subprocess.Popen(
        command, env=own, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,  # to stop it together with strace, which passes no signal on
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which every verb has run."""
    folder = tmp_path_factory.mktemp("verbs")
    server, started = start(SERVE, folder), time.monotonic()
    assert server.stdout
    address = server.stdout.readline()
    try:
        for verb in VERBS:
            process = start(verb, folder)
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, f"{verb}\n{said}"
        time.sleep(max(0, started + SERVING - time.monotonic()))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        _, said = server.communicate(timeout=30)
    assert "http" in address, said
    return folder


def test_no_verb_leaves_a_file_of_a_library_in_the_home_folder(folder: Path) -> None:
    homes = list(folder.glob("*/home"))
    found = {file.relative_to(folder).as_posix() for home in homes for file in home.rglob("*") if file.is_file()}
    assert len(homes) == len(VERBS) + 1
    assert {file for file in found if not KNOWN.search(file)} == set()


def test_no_verb_connects_to_another_machine(folder: Path) -> None:
    logs = list(folder.glob("*/connections"))
    if not logs:
        pytest.skip("no strace that may trace processes")
    assert len(logs) == len(VERBS) + 1
    # port 53 asks for an address, if only of a name server on this machine
    found = {
        (log.parent.name, address, port)
        for log in logs
        for port, address in CONNECT.findall(log.read_text())
        if port == "53" or not re.match(r"(::ffff:)?127\.|::1$", address)
    }
    assert found == set()
