"""What every test gets: a cache and a working folder of its own, and one thread, so that bits are the same."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small nets gain nothing from more

from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # a busy machine is no bug
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Give the test its own cache and working folder; real data only where the test is marked for it."""
    monkeypatch.setenv("CONVLENS_CACHE", str(tmp_path / "cache"))
    if request.node.get_closest_marker("data") is None:
        monkeypatch.delenv("CONVLENS_DATA", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    torch.set_num_threads(1)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, for tests that look at something else."""
    monkeypatch.setattr("convlens.runs.finalize.draw_plots", lambda *_: {})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine lacks: real data, a GPU, the internet; and slow tests unless -m asks for them."""
    lacking = {
        "data": "" if os.environ.get("CONVLENS_DATA") else "CONVLENS_DATA is not set",
        "gpu": "" if torch.cuda.is_available() else "no CUDA device",
        "network": "only with -m network",
        "slow": "only with -m slow",
    }
    asked = config.getoption("-m") or ""
    for item in items:
        for marker, reason in lacking.items():
            if item.get_closest_marker(marker) and reason and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=reason))
