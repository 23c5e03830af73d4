"""No work is lost: kills, crashes at every file operation, damage, full disks, signals, numbers that are none."""

import contextlib
import errno
import functools
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import make_dataset, make_net, make_recipe, same, state_of, timeless, train
from torch import Tensor, nn

from convlens.cli import main
from convlens.data.image_folder import load_folder
from convlens.errors import ConvlensError, DivergenceError, UsageError
from convlens.run_dir import RunDir
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest
from convlens.system.device import select_device
from convlens.system.files import write_json
from convlens.training.callbacks import Callback, LiveStatus
from convlens.training.checkpoint import CheckpointStore
from convlens.training.finite import has_nonfinite
from convlens.training.recipe import Recipe
from convlens.training.state import TrainState

resource = pytest.importorskip("resource")  # and with it fork: not on Windows
KILLED = -signal.SIGKILL


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a child process; return its process id. It leaves with 0, or 1 for an error."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        work()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except KeyboardInterrupt:  # on the last lines
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int, seconds: float = 60.0) -> int:
    """Return the exit code of a child, negative for a signal; fail if it takes longer than ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the process still ran after {seconds} s")


def save_state(folder: Path, step: int) -> None:
    """Save a checkpoint whose tensors are full of its step."""
    CheckpointStore(folder).save(TrainState(step=step), {"net.x": torch.full((50,), float(step))})


def load_step(folder: Path) -> int:
    """Load the newest whole checkpoint, see that it is consistent, and return its step."""
    loaded = CheckpointStore(folder).load()
    assert loaded is not None
    state, tensors = loaded
    assert torch.equal(tensors["net.x"], torch.full((50,), float(state.step)))
    return state.step


# kill -9


def digits_experiment(out: Path) -> Experiment:
    """Set up a training of 4 epochs of 10 steps on the digits, saved every 3 steps, or set it up to go on."""
    if (out / "config.json").exists():
        return Experiment.resume(out)
    shutil.rmtree(out, ignore_errors=True)  # killed before there was anything to go on with
    return Experiment.start(TrainRequest.create(
        "digits", out=out, epochs=4, batch_size=130, save_every=3, width=4, ema_decay=0.9, device="cpu", threads=1,
        precision="fp32",
    ))  # fmt: skip


def run_and_tell(out: Path, step: mmap.mmap) -> None:
    """Train, and write the steps done where the parent sees them even if this process is killed."""

    def write(_: Callback, done: int) -> bool:
        step[:4] = struct.pack("i", done)
        return False

    LiveStatus.should_stop = write  # type: ignore[method-assign,assignment]
    for _ in digits_experiment(out).epochs():
        pass


def figures(out: Path) -> tuple[bytes, dict[str, Any], list[str]]:
    """Return what a training came to: all tensors of its last checkpoint, its state, and metrics.csv, but no clock."""
    manifest = max((out / "checkpoint").glob("*.json"))
    state = json.loads(manifest.read_text())["state"]
    for record in [state, *state["records"]]:
        record["seconds"] = record["elapsed"] = 0.0
    rows = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    return manifest.with_suffix(".safetensors").read_bytes(), state, [",".join([r[0], *r[2:]]) for r in rows]


def check_kills(tmp_path: Path, kills: int) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    for _ in digits_experiment(whole).epochs():
        pass
    longest = 1.2 * (time.monotonic() - started)  # at times it gets through, on slow machines too
    expected = figures(whole)
    luck, done, most_lost = random.Random(kills), 0, 0
    step = mmap.mmap(-1, 4)
    while done < kills:  # several trainings, if one is not enough
        shutil.rmtree(out, ignore_errors=True)
        code = KILLED
        while code == KILLED:
            step[:4] = struct.pack("i", 0)
            child = fork(lambda: run_and_tell(out, step))
            time.sleep(luck.uniform(0.0, longest))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = wait(child)
            assert code in (0, KILLED)
            done += code == KILLED
            saved = CheckpointStore(out / "checkpoint").load() if (out / "checkpoint").exists() else None
            (reached,) = struct.unpack("i", step[:4])
            most_lost = max(most_lost, reached - (saved[0].step if saved is not None else 0))
        assert figures(out) == expected
    assert most_lost <= 3
    # what kills left half-written is cleared away
    assert len(list((out / "checkpoint").iterdir())) == 4


def test_killed_at_random_instants_nothing_is_lost(tmp_path: Path) -> None:
    check_kills(tmp_path, 12)


@pytest.mark.slow
def test_killed_at_200_random_instants_nothing_is_lost(tmp_path: Path) -> None:
    check_kills(tmp_path, 200)


# a crash before and after every file operation

OPERATIONS = {
    "os.replace": (os, "replace"), "os.fsync": (os, "fsync"), "os.open": (os, "open"), "os.close": (os, "close"),
    "mkstemp": (tempfile, "mkstemp"), "write_bytes": (Path, "write_bytes"), "write_text": (Path, "write_text"),
    "chmod": (Path, "chmod"), "unlink": (Path, "unlink"), "mkdir": (Path, "mkdir"),
}  # fmt: skip


def crash_at(place: int, work: Callable[[], object], *, when: str) -> bool:
    """Run ``work`` in a process that dies at its file operation number ``place``; say whether it came to that."""

    def doomed() -> None:
        count = 0

        def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(operation)
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                number = count  # others may lie within it
                if number == place and when == "before":
                    os._exit(9)
                if number == place and when == "torn" and operation.__name__.startswith("write_"):
                    path, content = arguments
                    operation(path, content[: len(content) // 2], **options)
                    os._exit(9)
                result = operation(*arguments, **options)
                if number == place and when == "after":
                    os._exit(9)
                return result

            return call

        for owner, name in OPERATIONS.values():
            setattr(owner, name, wrap(getattr(owner, name)))
        work()

    code = wait(fork(doomed))
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("when", ["before", "torn", "after"])
def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(when: str, tmp_path: Path) -> None:
    place, crashes, found = 0, 0, set()
    while True:
        place += 1
        folder = tmp_path / str(place)
        for step in (10, 20, 30):
            save_state(folder, step)
        crashed = crash_at(place, lambda folder=folder: save_state(folder, 40), when=when)  # type: ignore[misc]
        step = load_step(folder)
        assert step in (30, 40)
        found.add(step)
        if crashed:
            crashes += 1
            save_state(folder, 50)  # and the next one clears up
            assert {path.name for path in folder.iterdir()} == {
                f"step-{number:08d}.{kind}" for number in (step, 50) for kind in ("json", "safetensors")
            }
        elif when != "torn" or place > 60:
            break
    assert crashes >= (2 if when == "torn" else 15)
    assert found == {30, 40} or when == "torn"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_file_operation_leaves_a_whole_json(when: str, tmp_path: Path) -> None:
    path, place = tmp_path / "file.json", 0
    crashed = True
    while crashed:
        place += 1
        write_json(path, {"version": "old"})
        crashed = crash_at(place, lambda: write_json(path, {"version": "new"}), when=when)
        assert json.loads(path.read_text())["version"] in ("old", "new")
    assert place > 6


# stopped and resumed


@pytest.mark.parametrize("save_every", [1, 2, 4, 200])
def test_saving_by_steps_changes_no_bit_and_loses_no_more_than_that(save_every: int, tmp_path: Path) -> None:
    whole = make_net()
    expected = train(whole, make_dataset(), make_recipe())
    recipe, store = make_recipe(save_every=save_every), CheckpointStore(tmp_path)

    class Crash(Exception):
        pass

    class CrashAfter(Callback):
        """Crashes in the forward pass of the step after ``last``."""

        def __init__(self, last: int, net: nn.Module):
            self.last, self.step = last, 0
            net.register_forward_pre_hook(self.look)

        def should_stop(self, step: int) -> bool:
            self.step = step
            return False

        def look(self, net: nn.Module, _: Any) -> None:
            if net.training and self.step == self.last:
                raise Crash

    for crash in range(1, 15):
        net = make_net()
        with pytest.raises(Crash):
            train(net, make_dataset(), recipe, checkpoints=store, callbacks=[CrashAfter(crash, net)])
        saved = store.load()
        assert saved is not None
        # epochs of 5 steps are saved too
        assert saved[0].step == max(step for step in range(crash + 1) if step % save_every == 0 or step % 5 == 0)
    net = make_net()
    records = train(net, make_dataset(), recipe, checkpoints=store)
    assert timeless(records) == timeless(expected)
    assert same(state_of(net), state_of(whole))


# damage


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Return a folder of two checkpoints, of steps 5 and 10, and what the newer one holds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints")
    store = CheckpointStore(folder)
    train(make_net(), make_dataset(), make_recipe(epochs=2), checkpoints=store)
    loaded = store.load()
    assert loaded is not None and loaded[0].step == 10
    return folder, loaded[1]


def take_messages(caplog: pytest.LogCaptureFixture) -> str:
    """Return what was logged since the last call."""
    messages = "\n".join(caplog.messages)
    caplog.clear()
    return messages


def check_damage(folder: Path, newest: dict[str, Tensor], path: Path, content: bytes, said: Callable[[], str]) -> bool:
    """Put ``content`` in the place of a checkpoint's file; say whether that was found out and the older one taken."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        loaded = CheckpointStore(folder).load()
        assert loaded is not None
        found = said()
        if loaded[0].step == 5:
            assert found.endswith("resuming from step 5 instead of 10") and str(folder) in found
            return True
        # a flip that means the same, such as 1e-05 and 1E-05
        assert same(loaded[1], newest) and found == "" and path.suffix == ".json"
        return False
    finally:
        path.write_bytes(before)


def test_a_flipped_bit_is_found_out(
    two_checkpoints: tuple[Path, dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, newest = two_checkpoints
    luck, found = random.Random(0), 0
    for flip in range(1000):
        path = folder / f"step-00000010.{'json' if flip % 2 else 'safetensors'}"
        content = bytearray(path.read_bytes())
        place = luck.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        found += check_damage(folder, newest, path, bytes(content), lambda: take_messages(caplog))
    assert found >= 998  # the others meant the same: their content was compared


def test_a_file_cut_short_is_found_out(
    two_checkpoints: tuple[Path, dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, newest = two_checkpoints
    for kind in ("json", "safetensors"):
        path = folder / f"step-00000010.{kind}"
        content = path.read_bytes()
        for percent in range(100):
            cut = content[: len(content) * percent // 100]
            assert check_damage(folder, newest, path, cut, lambda: take_messages(caplog)), (kind, percent)


def test_a_damaged_checkpoint_that_is_ahead_is_cleared_away(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for step in (10, 20):
        save_state(store, step)
    (store / "step-00000020.safetensors").write_bytes(b"")
    assert load_step(store) == 10
    save_state(store, 15)
    assert {path.stem for path in store.iterdir()} == {"step-00000010", "step-00000015"}
    assert load_step(store) == 15


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_a_whole_one(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for step in (10, 13):
        save_state(folder, step)
    (folder / "step-00000013.safetensors").write_bytes(b"")
    store = CheckpointStore(folder)
    loaded = store.load()
    assert loaded is not None and loaded[0].step == 10
    store.save(TrainState(step=15), {"net.x": torch.full((50,), 15.0)})
    assert {path.stem for path in folder.iterdir()} == {"step-00000010", "step-00000015"}


def test_what_others_put_into_the_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    save_state(folder, 10)
    for name in ("step-00000010 copy.json", ".DS_Store", "notes.txt"):
        (folder / name).write_text("mine")
    for step in (20, 30):
        save_state(folder, step)
    assert load_step(folder) == 30
    assert len(list(folder.iterdir())) == 3 + 4


# full disks, forbidden folders


def limited(size: int, work: Callable[[], object]) -> int:
    """Run ``work`` in a process that can write no file of more than ``size`` bytes; return its exit code."""

    def inside() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails, as on a full disk, and does not kill
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return wait(fork(inside))


def test_a_disk_that_is_full_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    store = tmp_path / "store"
    save_state(store, 10)
    big = {"net.x": torch.zeros(100_000)}
    assert limited(10_000, lambda: CheckpointStore(store).save(TrainState(step=20), big)) == 1
    assert load_step(store) == 10
    assert {path.stem for path in store.iterdir()} == {"step-00000010"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("operation", ["os.replace", "os.fsync", "mkstemp", "write_bytes", "write_text", "chmod"])
def test_a_save_that_fails_says_so_and_changes_nothing(
    operation: str, call: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    save_state(store, 10)

    owner, name = OPERATIONS[operation]
    real, calls = getattr(owner, name), 0

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        try:
            save_state(store, 20)
        except ConvlensError as error:
            assert str(error).startswith("cannot write ")
            assert f": {os.strerror(code)}; " in str(error)
            synced = operation == "os.fsync" and call % 2 == 0  # that of the folder: the file has its name by then
            assert str(error).endswith("may not survive a power failure" if synced else "nothing was changed")
        else:
            assert calls < call, "it failed, and nobody was told"
    if calls < call:  # a save has not so many of them
        assert load_step(store) == 20
    else:
        assert load_step(store) in (10, 20)
        whole = {f"step-{load_step(store):08d}", "step-00000010"}
        assert {path.stem for path in store.iterdir()} == whole


def command(*words: object) -> int:
    """Run the command in a process of its own; return its exit code."""

    def run() -> None:
        sys.argv = ["convlens", *map(str, words)]
        main.main()

    return wait(fork(run))


SHORT = ["--width", "4", "--device", "cpu", "--threads", "1", "--precision", "fp32", "--batch-size", "130"]


def test_a_training_without_room_fails_in_a_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    errors = tmp_path / "errors"

    def run() -> None:
        sys.stderr = open(errors, "w", buffering=1)
        sys.argv = ["convlens", "train", "digits", *SHORT, "--epochs", "1", "--out", str(out)]
        main.main()

    assert limited(20_000, run) == 1
    said = errors.read_text()
    assert said.count("\n") == 1 and said.startswith("convlens: cannot write ") and "File too large" in said
    assert "saved" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_forbidden_folder_is_said_in_a_line(tmp_path: Path) -> None:
    room = tempfile.TemporaryDirectory()  # pytest's own folders are closed to others
    Path(room.name).chmod(0o755)
    closed = Path(room.name) / "closed"
    closed.mkdir(mode=0o555)

    def run() -> None:
        os.setegid(65534)
        os.seteuid(65534)
        with pytest.raises(ConvlensError, match="Permission denied"):
            RunDir.create(closed / "run", "digits")
        with pytest.raises(ConvlensError, match="Permission denied; nothing was changed"):
            write_json(closed / "x.json", {})

    assert wait(fork(run)) == 0
    assert list(closed.iterdir()) == []
    room.cleanup()


def test_the_temporary_folder_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: Any, **__: Any) -> str:
        raise AssertionError("the temporary folder was asked for")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    for _ in digits_experiment(tmp_path / "run").epochs():
        pass
    assert (tmp_path / "run" / "metrics.csv").exists()


# resumed elsewhere


@pytest.mark.parametrize(
    ("key", "was", "says"),
    [
        ("torch", "2.0.0", "version of PyTorch (2.0.0, now "),
        ("threads", 9, "number of threads (9, now 1)"),
        ("device_name", "Intel 8086", "processor (Intel 8086, now "),
        ("version", "0.0.1", "version of convlens (0.0.1, now "),
    ],
)
def test_what_would_change_the_digits_is_refused_unless_accepted(key: str, was: Any, says: str, tmp_path: Path) -> None:
    experiment = digits_experiment(tmp_path / "run")
    config = json.loads(experiment.run_dir.config.read_text())
    (config if key == "version" else config["machine"])[key] = was
    write_json(experiment.run_dir.config, config)
    with pytest.raises(UsageError) as caught:
        Experiment.resume(tmp_path / "run")
    assert says in str(caught.value) and str(caught.value).endswith("resume it nevertheless with `accept_changes`")
    resumed = Experiment.resume(tmp_path / "run", accept_changes=True)
    assert len(list(resumed.epochs())) == 4
    (recorded,) = json.loads(experiment.run_dir.config.read_text())["environment_changes"]
    assert says in recorded


def test_a_run_of_a_machine_with_a_gpu_goes_on_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = digits_experiment(tmp_path / "run")
    config = json.loads(experiment.run_dir.config.read_text())
    config["recipe"] |= {"device": "mps", "precision": "fp32"}
    config["machine"] |= {"device": "mps", "device_name": "Apple M9"}
    write_json(experiment.run_dir.config, config)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"another device \(mps, now \w+\), another processor \(Apple M9, now "):
        Experiment.resume(tmp_path / "run")
    resumed = Experiment.resume(tmp_path / "run", accept_changes=True)
    config = json.loads(experiment.run_dir.config.read_text())
    for recipe in (resumed.recipe, Recipe.from_json(config["recipe"])):
        assert recipe.device == select_device().type
        assert recipe.precision in ("fp32", "bf16")  # settled, for all that is to come
    assert config["environment_changes"][0].startswith("device (mps, now ")
    assert len(list(resumed.epochs())) == 4


def test_one_folder_is_trained_in_by_one_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    digits_experiment(out)
    flag = tmp_path / "claimed"

    def hold() -> None:
        with RunDir(out).locked():
            flag.touch()
            time.sleep(60)

    child = fork(hold)
    for _ in range(3000):
        if not flag.exists():
            time.sleep(0.01)
    with pytest.raises(UsageError, match=f"^another process is training in {out}; wait for it or stop it$"):
        list(Experiment.resume(out).epochs())
    os.kill(child, signal.SIGKILL)
    wait(child)
    assert len(list(Experiment.resume(out).epochs())) == 4


def test_runs_started_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    def make() -> None:
        folder = RunDir.create(None, "digits", parent=tmp_path / "runs")
        (folder.path / "mine").open("x").close()  # fails if it was there already

    children = [fork(lambda: [make() for _ in range(5)]) for _ in range(8)]
    assert [wait(child) for child in children] == [0] * 8
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {f"digits-{n}" for n in range(1, 41)}


def test_the_cache_is_written_by_several_at_once(tmp_path: Path) -> None:
    from test_cli import make_folder

    root = make_folder(tmp_path / "photos", {"a": 60, "b": 60})
    prints = [tmp_path / f"print-{number}" for number in range(6)]

    def load(to: Path) -> None:
        to.write_text(load_folder(root).fingerprint())

    children = [fork(functools.partial(load, to)) for to in prints]
    assert [wait(child) for child in children] == [0] * 6
    assert {path.read_text() for path in prints} == {load_folder(root).fingerprint()}
    assert not list((tmp_path / "cache").rglob(".new-*"))


# signals


def check_signals(tmp_path: Path, count: int) -> None:
    options = [*SHORT, "--epochs", "6", "--save-every", "7", "--seed", "3"]
    assert command("train", "digits", *options, "--out", tmp_path / "whole") == 0
    expected = figures(tmp_path / "whole")
    luck, codes, compared = random.Random(1), [], 0
    for number in range(count):
        out = tmp_path / f"run-{number}"

        def run(out: Path = out) -> None:
            for stop in (signal.SIGTERM, signal.SIGINT):  # as in a process that has just begun
                signal.signal(stop, signal.SIG_DFL)
            sys.stderr = open(f"{out}.err", "w", buffering=1)
            sys.argv = ["convlens", "train", "digits", *options, "--out", str(out)]
            main.main()

        child = fork(run)
        time.sleep(luck.uniform(0.02, 1.0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM if number % 2 else signal.SIGINT)
        codes.append(wait(child, 20.0))
        said = Path(f"{out}.err").read_text() if Path(f"{out}.err").exists() else ""
        assert codes[-1] in (0, 130, -signal.SIGTERM, -signal.SIGINT), said
        if (out / "config.json").exists() and not (out / "report.html").exists():
            assert command("train", "--resume", out) == 0
            assert figures(out) == expected
            compared += 1
    assert 130 in codes and compared >= count // 4


def test_asked_to_stop_at_random_instants_it_saves_and_goes(tmp_path: Path) -> None:
    check_signals(tmp_path, 6)


@pytest.mark.slow
def test_asked_to_stop_at_100_random_instants_it_saves_and_goes(tmp_path: Path) -> None:
    check_signals(tmp_path, 100)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_in_the_last_step_it_goes_too(
    stop: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "said"

    def asked(*_: object) -> None:
        sys.stderr = open(said, "w", buffering=1)
        os.kill(os.getpid(), stop)

    with monkeypatch.context() as patch:
        patch.setattr(LiveStatus, "on_epoch_end", asked)
        assert command("train", "digits", *SHORT, "--epochs", "1", "--seeds", "2", "--out", tmp_path / "s") == 130
    assert "trained, but not tested; resume with: convlens train --resume" in said.read_text()
    assert not (tmp_path / "s" / "seed-0" / "report.html").exists() and not (tmp_path / "s" / "seed-1").exists()
    assert command("train", "--resume", tmp_path / "s") == 0
    assert (tmp_path / "s" / "seed-1" / "report.html").exists()


# numbers that are none


class Poison(torch.autograd.Function):
    """Passes values on, and gives gradients that are not numbers."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("nan")


class Poisoned(nn.Module):
    """A net that goes wrong at one step: in its loss, in a gradient or in BatchNorm's statistics."""

    def __init__(self, where: str, step: int):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.where, self.left = where, step

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.left -= 1
        wrong = self.training and self.left == -1
        x = self.norm(self.conv(x)).relu()
        if wrong and self.where == "statistics":
            self.norm.running_var.data.fill_(float("inf"))  # type: ignore[union-attr]
        if wrong and self.where == "gradient":
            x = Poison.apply(x)
        logits: Tensor = self.linear(x.amax(dim=(2, 3)))
        return logits * float("nan") if wrong and self.where == "loss" else logits


@pytest.mark.parametrize("step", [0, 3, 5, 7])
@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("loss", "the loss is NaN or infinite"),
        ("gradient", "the gradient of conv.weight is NaN or infinite"),
        ("statistics", "the buffer norm.running_var is NaN or infinite"),
    ],
)
def test_what_is_no_number_ends_the_training_at_that_step(where: str, says: str, step: int, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(DivergenceError, match=f"^{says}") as caught:
        train(Poisoned(where, step), make_dataset(), make_recipe(save_every=2), checkpoints=store)
    assert caught.value.exit_code == 3
    assert f"(at step {step})" in str(caught.value)
    saved = store.load()
    assert saved is not None and saved[0].step == max(s for s in (0, 2, 4, 5, 6) if s <= step)
    assert all(bool(value.isfinite().all()) for value in saved[1].values())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 500, -1])
def test_one_wrong_number_is_found_wherever_it_is(wrong: float, place: int) -> None:
    filters = torch.zeros(8, 5, 5, 5).to(memory_format=torch.channels_last)
    for values in ([torch.zeros(1001)], [filters], [torch.zeros(3, dtype=torch.float64), torch.zeros(())]):
        assert not has_nonfinite(values)
        flat = values[-1].flatten()
        flat[min(place, len(flat) - 1)] = wrong
        values[-1].copy_(flat.view_as(values[-1]))
        assert has_nonfinite(values)


def test_numbers_that_are_looked_through_keep_every_bit() -> None:
    extremes = torch.tensor([1e30, -1e-42, -0.0, 3.4e38])
    filters = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    values = [extremes, filters, torch.empty(0), torch.tensor(2.5)]
    before = [value.clone() for value in values]
    assert not has_nonfinite(values)
    for value, old in zip(values, before, strict=True):
        assert value.stride() == old.stride() and torch.equal(value.view(torch.int32), old.view(torch.int32))


# memory


class Hungry(nn.Module):
    """A net without BatchNorm that has memory for a few images only."""

    def __init__(self, most: int, error: Exception):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)
        self.most, self.error = most, error

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > self.most:
            raise self.error
        return self.linear(self.conv(x).relu().amax(dim=(2, 3)))  # type: ignore[no-any-return]


CPU_FULL = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.mark.parametrize("error", [CPU_FULL, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_when_memory_runs_out_the_batch_goes_in_parts(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, hungry = Hungry(99, error), Hungry(2, error)
    expected = train(plain, make_dataset(), make_recipe())
    store = CheckpointStore(tmp_path)
    records = train(hungry, make_dataset(), make_recipe(), checkpoints=store)
    assert caplog.messages == [
        "not enough memory for 8 images at once; from here on each step accumulates the gradients of 4 micro-batches"
    ]
    # the same gradients, but for the order in which they are added up
    for key, value in state_of(hungry).items():
        assert torch.allclose(value, state_of(plain)[key], atol=1e-5)
    assert records[-1].train_loss == pytest.approx(expected[-1].train_loss, rel=1e-4)
    saved = store.load()
    assert saved is not None and saved[0].grad_accum_steps == 4


def test_when_memory_is_too_small_for_anything_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train(Hungry(1, CPU_FULL), make_dataset(), make_recipe())


def test_other_errors_of_a_net_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="^of the net$"):
        train(Hungry(2, RuntimeError("of the net")), make_dataset(), make_recipe())


WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from convlens import Recipe, create_model, fit, from_arrays

torch.set_num_threads(1)
images = torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
labels = (torch.arange(2048) % 4).numpy()
data = from_arrays(images, labels, images[:8], labels[:8])
net = create_model("small", channels=3, image_height=32, image_width=32, classes=4, width=32)
own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = own + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
records = list(fit(net, data, Recipe(epochs=1, batch_size=2048, val_fraction=0.0, device="cpu", precision="fp32")))
print(len(records))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="it limits the process's memory as Linux does")
@pytest.mark.parametrize("more", ["250", "400"])  # MiB
def test_a_real_limit_of_memory_is_met(more: str) -> None:
    # in a program of its own: how much this one has in hand depends on the tests before it
    program = [sys.executable, "-c", WITH_LITTLE_MEMORY, more]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
    assert "not enough memory for 2048 images at once; from here on each step accumulates" in done.stderr
