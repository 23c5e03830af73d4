"""The ground floor: errors, registry, seeds, device and threads, run folders and atomic files, progress."""

import errno
import io
import json
import mmap
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convlens.errors import ConvlensError, DivergenceError, TrainingInterruptedError, UnknownNameError, UsageError
from convlens.run_dir import RunDir
from convlens.system import files
from convlens.system.device import select_device, set_num_threads, system_info
from convlens.system.files import atomic_write, read_json, write_csv, write_json, write_text
from convlens.system.hardware import available_cores
from convlens.system.progress import ProgressBar, track
from convlens.system.random import derive_seed
from convlens.system.registry import Registry

quick = settings(max_examples=50, deadline=None, database=None, derandomize=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder; tmp_path holds the test's cache and working folder too."""
    path = tmp_path / "here"
    path.mkdir()
    return path


def leftovers(folder: Path) -> list[str]:
    """The names of what lies in a folder, temporary files too."""
    return sorted(os.listdir(folder))


# errors and registry


def test_a_message_is_one_line_of_bearable_length() -> None:
    assert str(ConvlensError("a\nb\r\nc")) == "a\\nb\\r\\nc"
    message = str(UsageError("start " + "x" * 100_000 + " end"))
    assert message.startswith("start xxx") and message.endswith("xxx end") and len(message) < 1600


@pytest.mark.parametrize(
    ("kind", "code"),
    [(ConvlensError, 1), (UsageError, 2), (UnknownNameError, 2), (DivergenceError, 3), (TrainingInterruptedError, 130)],
)
def test_every_error_has_its_exit_code(kind: type[ConvlensError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, ConvlensError)


def test_an_unknown_name_offers_the_nearest() -> None:
    assert str(UnknownNameError("model", "tinny", ["wide", "tiny"])) == "unknown model 'tinny'; did you mean 'tiny'?"


def test_an_unknown_name_far_from_all_lists_the_choices_in_order() -> None:
    error = UnknownNameError("model", "zzzzzz", iter(["wide", "tiny"]))
    assert str(error) == "unknown model 'zzzzzz'; choose from: tiny, wide"


def test_a_registry_keeps_its_entries_in_order() -> None:
    registry: Registry[int] = Registry("thing")
    assert registry.register("b")(2) == 2
    registry.register("a")(1)
    assert registry.names() == ["b", "a"]
    assert (registry["a"], registry["b"]) == (1, 2)
    assert "a" in registry
    assert "c" not in registry
    assert 7 not in registry


def test_a_registry_refuses_a_name_that_is_taken() -> None:
    registry: Registry[int] = Registry("thing")
    registry.register("a")(1)
    with pytest.raises(UsageError, match=r"^thing 'a' is registered already; choose another name$"):
        registry.register("a")(2)
    assert registry["a"] == 1


def test_a_registry_offers_a_near_name() -> None:
    registry: Registry[int] = Registry("thing")
    registry.register("alpha")(1)
    with pytest.raises(UnknownNameError, match="unknown thing 'alpa'; did you mean 'alpha'"):
        registry["alpa"]


# seeds, device, threads


def test_derive_seed_is_splitmix64() -> None:
    # the first output of SplitMix64 seeded with 0 (Vigna's splitmix64.c), without its lowest bit
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1


@quick
@given(st.lists(st.integers(-(2**70), 2**70), max_size=4))
def test_derive_seed_is_a_function_into_63_bits(numbers: list[int]) -> None:
    seed = derive_seed(*numbers)
    assert 0 <= seed < 2**63
    assert derive_seed(*numbers) == seed
    torch.Generator().manual_seed(seed)  # takes it


def test_derive_seed_tells_neighbours_apart() -> None:
    seeds = [derive_seed(a, b) for a in range(40) for b in range(40)] + [derive_seed(a) for a in range(40)]
    assert len(set(seeds)) == len(seeds)
    different = [bin(derive_seed(3, i) ^ derive_seed(3, i + 1)).count("1") for i in range(200)]
    assert 28 < sum(different) / len(different) < 35  # about half of 63 bits


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^unknown device 'tpu'; choose from: auto, cpu, cuda, mps$"):
        select_device("tpu")


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: int) -> None:
    """Let PyTorch say that it sees so many devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(0, 0, "cpu"), (0, 1, "mps"), (1, 0, "cuda"), (4, 1, "cuda")])
def test_auto_takes_the_best_device(cuda: int, mps: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda, mps)
    assert select_device().type == chosen
    assert select_device("cpu").type == "cpu"


def test_processes_compute_on_cuda_where_there_is_a_device_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    pretend(monkeypatch, 2, 0)
    assert select_device().type == "cuda"
    pretend(monkeypatch, 1, 0)
    assert select_device().type == "cpu"
    with pytest.raises(UsageError, match="^this machine has no cuda device for each of 2 processes; use `device=auto`"):
        select_device("cuda")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0, 0)
    with pytest.raises(UsageError, match=f"^this machine has no {name} device; use `device=auto` or `device=cpu`$"):
        select_device(name)


def test_use_threads_sets_what_it_returns() -> None:
    assert set_num_threads(2) == 2 == torch.get_num_threads()
    assert set_num_threads(1) == 1 == torch.get_num_threads()


def test_use_threads_0_takes_the_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert available_cores() == 3
    assert set_num_threads() == 3


KEPT = """
import resource, torch
from convlens.system.memory import retain_freed_memory
retain_freed_memory()
torch.ones(1 << 16)  # loads what the first of them loads, and starts the threads
for _ in range(4):  # as the steps of a training do
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(1 << 22) for _ in range(8)]
    del held
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_of_each_step(**environment: str) -> list[int]:
    """Return how many fresh pages the system gives for the same 128 MiB, again and again."""
    asked = {**{k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}, **environment}
    told = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True, env=asked).stdout
    return [int(line) for line in told.splitlines()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is asked to")
def test_memory_that_was_freed_is_kept_for_what_comes_next() -> None:
    pages = pages_of_each_step()
    assert pages[0] > 0 and pages[-1] < pages[0] / 10


RETURNED = """
from pathlib import Path
import torch
from convlens.system.memory import release_memory, retain_freed_memory
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])  # that are in memory
retain_freed_memory()
torch.ones(1 << 16)  # loads what the first of them loads, and starts the threads
before = pages()
held = [torch.ones(1 << 22) for _ in range(8)]
del held
kept = pages() - before
release_memory()
print(kept, pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is asked to")
def test_memory_that_was_kept_goes_back_when_it_is_asked_for() -> None:
    told = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True).stdout
    kept, left = map(int, told.split())
    assert kept * mmap.PAGESIZE > 100 << 20 and left < kept / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is asked to")
@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_memory_goes_as_mallocs_own_variables_say_where_they_are_set(name: str, value: str) -> None:
    pages = pages_of_each_step(**{name: value})
    assert pages[-1] > pages[0] / 2


@pytest.mark.parametrize("count", [-1, 100_000])
def test_use_threads_refuses_more_than_there_are(count: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(UsageError, match=rf"^`threads` is {count}; this machine allows 1 to \d+ \(0: all\)$"):
        set_num_threads(count)
    assert torch.get_num_threads() == before


def test_the_machine_is_described_in_plain_values() -> None:
    machine = system_info(torch.device("cpu"))
    assert list(machine) == ["device", "device_name", "cores", "threads", "processes", "system", "python", "torch"]
    assert machine["device"] == "cpu"
    assert machine["torch"] == torch.__version__
    assert json.loads(json.dumps(machine)) == machine


# atomic files


def test_replacing_writes_and_leaves_nothing_else(folder: Path) -> None:
    path = folder / "new" / "folder" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("content")
        assert temporary.parent == path.parent
        assert temporary.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "content"
    assert leftovers(path.parent) == ["file.txt"]


@pytest.mark.parametrize("failure", [RuntimeError("mine"), KeyboardInterrupt(), ConvlensError("said already")])
def test_replacing_leaves_the_old_file_on_failure(failure: BaseException, folder: Path) -> None:
    path = folder / "file.txt"
    path.write_text("old")
    with pytest.raises(type(failure)) as caught, atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise failure
    assert caught.value is failure
    assert path.read_text() == "old"
    assert leftovers(folder) == ["file.txt"]


def test_a_full_disk_is_said_in_one_line_and_leaves_the_old_file(folder: Path) -> None:
    path = folder / "file.txt"
    path.write_text("old")
    with pytest.raises(ConvlensError) as caught, atomic_write(path):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == f"cannot write {path}: No space left on device; nothing was changed"
    assert path.read_text() == "old"
    assert leftovers(folder) == ["file.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_at_the_last_step_leaves_the_old_file(
    step: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "file.txt"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(ConvlensError, match="Input/output error; nothing was changed"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert leftovers(folder) == ["file.txt"]


def test_the_content_is_on_disk_before_the_name_points_to_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            steps.append(name)
            return call(*arguments)

        return wrapped

    monkeypatch.setattr(files.os, "fsync", noting("fsync", os.fsync))
    monkeypatch.setattr(files.os, "replace", noting("replace", os.replace))
    write_text(folder / "file.txt", "new")
    assert steps == ["fsync", "replace", "fsync"]  # the file, the name, the folder


def test_a_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    (folder / "file").write_text("")
    path = folder / "file" / "below.txt"
    with pytest.raises(ConvlensError, match=r"cannot write .*below\.txt: .*; nothing was changed"):
        write_text(path, "x")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_a_written_file_follows_the_umask(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(folder / "file", "x")
        assert os.umask(0o027) == 0o027  # and is left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o640


def test_json_round_trip_keeps_letters_readable(folder: Path) -> None:
    path = folder / "a.json"
    write_json(path, {"class": "Möwe", "n": [1, 2.5, None]})
    assert "Möwe" in path.read_text(encoding="utf-8")
    assert read_json(path) == {"class": "Möwe", "n": [1, 2.5, None]}


def test_json_refuses_nan_and_leaves_the_old_file(folder: Path) -> None:
    path = folder / "a.json"
    write_json(path, {"loss": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"loss": 1}
    assert leftovers(folder) == ["a.json"]


def test_a_failing_row_leaves_the_old_csv(folder: Path) -> None:
    path = folder / "a.csv"
    write_csv(path, ["a", "b"], [[1, None], ["x,y", 2]])
    content = path.read_bytes()
    assert content == b'a,b\r\n1,\r\n"x,y",2\r\n'

    class Bad:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    with pytest.raises(RuntimeError, match="no text"):
        write_csv(path, ["a"], [[1], [Bad()]])
    assert path.read_bytes() == content
    assert leftovers(folder) == ["a.csv"]


def test_read_json_says_that_a_file_is_missing(folder: Path) -> None:
    with pytest.raises(ConvlensError) as caught:
        read_json(folder / "a.json")
    assert str(caught.value) == f"{folder / 'a.json'} is missing"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting ',' delimiter"),
        (b"[1, 2]", "it is not a JSON object"),
        (b"null", "it is not a JSON object"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b"[" * 200_000, ""),
    ],
    ids=["empty", "cut", "list", "null", "not-utf8", "deep"],
)
def test_read_json_names_the_file_that_is_no_json_object(content: bytes, part: str, folder: Path) -> None:
    path = folder / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConvlensError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")
    assert part in str(caught.value)


def test_read_json_of_a_folder(folder: Path) -> None:
    with pytest.raises(ConvlensError, match="^cannot read "):
        read_json(folder)


# run folders


def test_runs_are_numbered_from_1(folder: Path) -> None:
    made = [RunDir.create(None, "mnist", folder / "runs") for _ in range(3)]
    assert [run.path.name for run in made] == ["mnist-1", "mnist-2", "mnist-3"]
    assert RunDir.create(None, "digits", folder / "runs").path == folder / "runs" / "digits-1"
    assert all(run.path.is_dir() for run in made)


def test_the_default_place_is_runs_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert RunDir.create(None, "mnist").path == Path("runs/mnist-1")
    assert (folder / "runs" / "mnist-1").is_dir()


def test_the_first_free_number_is_taken_and_a_file_counts_as_taken(folder: Path) -> None:
    (folder / "a-1").mkdir()
    (folder / "a-2").write_text("a file")
    (folder / "a-4").mkdir()
    assert RunDir.create(None, "a", folder).path.name == "a-3"
    assert (folder / "a-2").read_text() == "a file"


def test_a_chosen_out_is_made_with_its_parents(folder: Path) -> None:
    run = RunDir.create(folder / "deep" / "er", "ignored")
    assert run.path == folder / "deep" / "er"
    assert run.path.is_dir()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_an_existing_out_is_refused(what: str, folder: Path) -> None:
    out = folder / "out"
    if what == "folder":
        out.mkdir()
    else:
        out.write_text("mine")
    with pytest.raises(UsageError) as caught:
        RunDir.create(out, "mnist")
    assert str(caught.value) == f"{out} exists already; choose another `out`"
    assert leftovers(folder) == ["out"]


@pytest.mark.parametrize("out", [True, False], ids=["out", "numbered"])
def test_a_read_only_parent_is_named(out: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # chmod would not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    path = folder / ("x" if out else "a-1")
    hint = "" if out else "; choose a writable place with `out`"
    with pytest.raises(ConvlensError) as caught:
        RunDir.create(path if out else None, "a", folder)
    assert str(caught.value) == f"cannot create the run folder {path}: Permission denied{hint}"


@pytest.mark.parametrize("out", [True, False], ids=["out", "numbered"])
def test_a_parent_that_is_a_file_is_named(out: bool, folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(ConvlensError, match="^cannot create the run folder "):
        RunDir.create(folder / "file" / "x" if out else None, "a", folder / "file")


def test_a_parent_that_is_a_link_to_nowhere_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs` -> a scratch disk that is not mounted: an error, not a search for a free number without end."""
    (folder / "runs").symlink_to(folder / "not-mounted")
    calls, mkdir = 0, Path.mkdir

    def counting(self: Path, *arguments: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        assert calls < 50, "it tries number after number"
        mkdir(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", counting)
    with pytest.raises(ConvlensError, match="^cannot create the run folder "):
        RunDir.create(None, "mnist", folder / "runs")


def test_open_says_what_is_not_a_run(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        RunDir.open(folder / "no")
    assert str(caught.value) == f"there is no run folder {folder / 'no'}; `convlens train` creates one"
    with pytest.raises(UsageError) as caught:
        RunDir.open(folder)
    assert str(caught.value) == f"{folder} is not a run folder: it has no config.json"


def test_open_and_read_a_run(folder: Path) -> None:
    write_json(folder / "config.json", {"seed": 3})
    write_csv(folder / "metrics.csv", ["epoch", "loss", "test_loss"], [[1, 0.5, None], [2, 0.25, 1e-3]])
    run = RunDir.open(str(folder))
    assert run.read_config() == {"seed": 3}
    assert run.read_metrics() == [
        {"epoch": 1.0, "loss": 0.5, "test_loss": None},
        {"epoch": 2.0, "loss": 0.25, "test_loss": 0.001},
    ]


def test_the_names_in_a_run_folder() -> None:
    run = RunDir("r")
    names = {"config.json", "metrics.csv", "checkpoint", "model", "test.json", "predictions.csv", "split.csv"}
    names.add("confusion_matrix.csv")
    names |= {
        "excluded.txt",
        "plots",
        "report.html",
        "snapshots",
        "tensorboard",
        "live/progress.json",
        "live/mistakes.json",
    }
    assert {p.relative_to(run.path).as_posix() for p in vars(run).values() if p != run.path} == names


# progress


def test_what_is_quick_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "reading", 3)) == ["a", "b", "c"]
    assert capfd.readouterr() == ("", "")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_off_a_terminal_a_plain_line_comes_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr("convlens.system.progress.time.monotonic", clock)
    with ProgressBar("reading", 40) as meter:
        for _ in range(40):
            clock.now += 1
            meter.update(1)
    lines = capsys.readouterr().err.splitlines()
    expected = [
        "reading: 25%, 30 s left",
        "reading: 50%, 20 s left",
        "reading: 75%, 10 s left",
        "reading: 100%, 0 s left",
    ]
    assert lines == expected


def test_a_meter_that_is_not_shown_only_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr("convlens.system.progress.time.monotonic", clock)
    with ProgressBar("reading", 2, shown=False) as meter:
        clock.now = 1e6
        meter.update(2)
    assert meter.done == 2
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_drawn_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar("reading", 2, patience=0) as meter:
        meter.update(1, "half")
        assert meter._bar is not None
        meter.update(1)
    assert "reading" in terminal.getvalue()


def test_a_disk_that_becomes_read_only_in_between_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "a.txt").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fail)
        patch.setattr(Path, "unlink", fail)
        with pytest.raises(ConvlensError, match="^cannot write .*a.txt: Read-only file system; nothing was changed$"):
            files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_lists_of_names_hold_any_name_and_any_reason(tmp_path: Path) -> None:
    reasons = {"a\nb\t.png": "copy of two\nlines\\.png", "c.png": ""}
    files.write_name_list(tmp_path / "list.txt", reasons)
    assert files.read_name_list(tmp_path / "list.txt") == list(reasons)


def test_what_takes_long_to_import_waits_until_it_is_needed() -> None:
    code = (
        "import sys, convlens.runs.explain; print(*{'scipy.stats', 'optuna', 'timm', 'tensorboard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "\n"
