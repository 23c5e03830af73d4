"""Every Python block of README runs, and every command that needs only the embedded data."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
# commands that need real data (tests marked "data" cover them) or another folder, take long, or run until stopped
ELSEWHERE = (
    "convlens train mnist",
    "convlens serve",
    "convlens sweep mnist",
    "convlens sweep --resume",
    "convlens train photos/",
    "make ",
    "pip ",
    ". .venv",
)


def blocks(language: str) -> list[str]:
    """Return the code blocks of README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """Return every convlens command of README, without its comment."""
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("convlens ") and not line.startswith(ELSEWHERE)]


# flags that make a command quick here without changing what it does
QUICK = {
    "convlens train digits": ["--epochs", "2"],
    "convlens sweep digits": ["--confirm-seeds", "0"],
    "convlens data doctor": ["--no-labels"],
}


def test_the_commands_run_in_their_order() -> None:
    page = Image.new("L", (120, 160), 255)
    ImageDraw.Draw(page).line([(60, 30), (60, 130)], fill=0, width=14)
    page.save("scan.png")
    listed = commands()
    assert listed[0] == "convlens train digits"
    assert len(listed) >= 20
    for command in listed:
        quick = next((flags for start, flags in QUICK.items() if command.startswith(start)), [])
        words = [*shlex.split(command), *(quick if quick and quick[0] not in command else [])]
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip(), command


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_runs(number: int) -> None:
    script = Path("readme.py")
    script.write_text(blocks("python")[number], encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
