"""Several processes train one net: as one process would, exactly tested, written by one, and none of them may hang."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from convlens.distributed import process_group
from convlens.errors import UsageError

# trains a net of each kind for 50 steps; prints loss and accuracy of each epoch, and the sum of the weights
TRAIN = """
import json, sys, torch
from torch import nn
import convlens
from convlens.data.preprocess import Preprocess
from convlens.evaluation.metrics import evaluate
from convlens.models import ConvNet
from convlens.distributed.process_group import init_world

class Plain(ConvNet):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, 10))

dataset = convlens.load_dataset("digits")
for kind, options in json.loads(sys.argv[1]):
    torch.manual_seed(init_world().rank)  # each process begins with other weights; those of the first count
    small = {"channels": 1, "image_height": 8, "image_width": 8, "classes": 10}
    net = Plain() if kind == "plain" else convlens.create_model("small", **small)
    options = {"max_steps": 50, "batch_size": 60, "lr": 0.05, "threads": 1, **options}
    recipe = convlens.get_recipe("digits").override(**options)
    torch.set_num_threads(1)
    records = [[r.train_loss, r.train_acc, r.val_loss, r.val_acc] for r in convlens.fit(net, dataset, recipe)]
    # three images are too few for some processes: all of them still test all three, once
    normalize = Preprocess.fit(dataset.train.images, dataset.input_style).normalizer()
    three = dataset.test.select(torch.arange(3))
    shared, alone = (evaluate(net, three, normalize, world=world) for world in (init_world(), None))
    assert abs(shared.loss - alone.loss) < 1e-6 and shared.accuracy == alone.accuracy
    print(json.dumps([records, torch.cat([p.detach().flatten() for p in net.parameters()])[::7].tolist()]))
"""
AUGMENTED = {"rotation": 10.0, "translate": 1, "scale": 0.1, "cutout": 2, "mixup": 0.2, "cutmix": 0.5, "hflip": True}
TRAININGS = [
    ("plain", {**AUGMENTED, "ema_decay": 0.9}),
    ("plain", {"grad_accum_steps": 2, "balanced_sampling": True, "batch_size": 61}),
    ("small", {"sync_batchnorm": True, "max_steps": 3}),  # further on, a maximum of two equal pixels falls otherwise
]


def in_processes(ranks: int, *arguments: str, code: str = TRAIN) -> list[str]:
    """Run ``code`` in ``ranks`` processes, as torchrun does; return what each prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    return printed


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_are_those_of_one_process(ranks: int) -> None:
    (alone,), shared = in_processes(1, json.dumps(TRAININGS)), in_processes(ranks, json.dumps(TRAININGS))
    assert all(printed == shared[0] for printed in shared)  # they end with the same weights, to the last bit
    for one, other in zip(alone.splitlines(), shared[0].splitlines(), strict=True):
        (records, weights), (their_records, their_weights) = json.loads(one), json.loads(other)
        for record, theirs in zip(records, their_records, strict=True):
            assert theirs == pytest.approx(record, abs=1e-5)
        assert their_weights == pytest.approx(weights, abs=1e-4)


def test_train_in_two_processes_writes_one_run_and_goes_on_in_one(tmp_path: Path) -> None:
    def convlens(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "convlens", "train", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)

    done = convlens("digits", "--epochs", "2", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   2") == 1
    assert "2 processes of " in done.stdout
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["digits-1"]
    config = json.loads((tmp_path / "runs/digits-1/config.json").read_text())
    assert config["machine"]["processes"] == 2
    (tmp_path / "runs/digits-1/report.html").unlink()
    again = convlens("--resume", "runs/digits-1", "--accept-changes")
    assert again.returncode == 0, again.stderr
    assert "another number of processes (2, now 1)" in again.stdout
    wrong = convlens("digits", "--budget", "9s", "--processes", "2")
    assert wrong.stderr == "convlens: --budget works with one process only; give several of them --max-seconds\n"
    wrong = convlens("nothing", "--processes", "2")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), wrong.stderr
    assert wrong.stderr.startswith("convlens: unknown data set or folder 'nothing'")


def workers_of(launcher: int) -> list[int]:
    """Return the training processes under a launcher, as the system lists them."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if b"train" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_what_cannot_be_shared_is_refused_by_all() -> None:
    code = """
import os, sys
import convlens

def refused(what):
    try:
        what()
    except convlens.ConvlensError as error:
        print(type(error).__name__, error)

digits = convlens.load_dataset("digits")
net = convlens.create_model("small", channels=1, image_height=8, image_width=8, classes=10)
parts = convlens.get_recipe("digits").override(epochs=1, grad_accum_steps=2, sync_batchnorm=True)
refused(lambda: list(convlens.fit(net, digits, parts)))
refused(lambda: convlens.train_seeds("digits", 2))
refused(lambda: convlens.train("digits", budget="9s"))
refused(lambda: convlens.train("digits", model="nothing"))
run = convlens.train((digits.train.images.numpy()[:200, 0], digits.train.labels.numpy()[:200]), epochs=1)
print(run.path, run.accuracy >= 0)
"""
    first, other = (text.splitlines() for text in in_processes(2, code=code))
    assert first[:3] == [
        "UsageError `sync_batchnorm` normalizes a batch as a whole; leave out `grad_accum_steps`",
        "UsageError a group of runs cannot be shared by several processes: start it without torchrun",
        "UsageError `budget` works with one process only; give several of them `max_seconds`",
    ]
    assert first[3].startswith("UnknownNameError unknown model 'nothing'")
    assert first[4].endswith("1 True")
    gone = [re.sub(r"^\w+", "WorkerLostError", line) for line in first[2:4]]
    assert other == [*first[:2], *gone, first[4]]


def test_several_processes_without_torchrun_are_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="MASTER_ADDR and MASTER_PORT are not set: start them with torchrun"):
        process_group.init_world.__wrapped__()


@pytest.mark.slow
def test_only_its_own_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(job: str, restarts: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TORCHELASTIC_RUN_ID": job, "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        command = [sys.executable, "-m", "convlens", "train", "digits", "--epochs", "1", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    def found() -> list[str]:
        return sorted(run.name for run in (tmp_path / "runs").iterdir())

    assert runs("100", 0).returncode == 0
    assert runs("100", 1).returncode == 0  # the same: it is finished
    assert found() == ["digits-1"]
    assert runs("100", 1, "--lr", "0.05").returncode == 0  # another command
    assert runs("101", 1).returncode == 0  # another job
    assert found() == ["digits-1", "digits-2", "digits-3"]
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "split.csv").touch()
    assert runs("102", 1, "--out", "begun").returncode == 0  # killed before it was a run
    assert (begun / "report.html").exists()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").touch()
    assert runs("102", 1, "--out", "theirs").returncode == 2
    assert (theirs / "thesis.txt").exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux' list of processes")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_processes_change_nothing(tmp_path: Path, kills: int) -> None:
    # a run for each kill, of one process or the other
    options = "digits --epochs 8 --threads 1 --save-every 5 --processes 2".split()
    command = [sys.executable, "-m", "convlens", "train", *options]
    subprocess.run([*command, "--out", "whole"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    whole = (tmp_path / "whole/model/model.safetensors").read_bytes()
    dice = random.Random(0)
    for number in range(kills):
        out = f"killed-{number}"
        run = subprocess.Popen(
            [*command, "--out", out], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert run.stdout is not None
        epoch = dice.randrange(7)
        while not run.stdout.readline().startswith(f"epoch {epoch:>3}" if epoch else "run "):
            assert run.poll() is None
        time.sleep(dice.uniform(0, 0.1))
        os.kill(dice.choice(workers_of(run.pid)), signal.SIGKILL)
        _, errors = run.communicate(timeout=180)
        assert run.returncode == 0, errors
        assert "a process was killed (signal 9); all processes resume from the last checkpoint" in errors
        assert (tmp_path / out / "model/model.safetensors").read_bytes() == whole


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux' list of processes")
def test_a_job_on_two_machines_goes_on_after_a_kill(tmp_path: Path) -> None:
    # two torchruns that meet on this machine, as they would from two; one learns of the kill from the other only
    train = "convlens train digits --epochs 8 --threads 1 --save-every 5 --out".split()
    subprocess.run([sys.executable, "-m", *train, "whole", "--processes", "2"], cwd=tmp_path, check=True, timeout=120)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free.getsockname()[1]} --rdzv-id job --max-restarts 1"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", *place.split(), "-m", *train, "shared"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    machines = [subprocess.Popen(command, cwd=tmp_path, **pipes) for _ in range(2)]
    try:
        metrics = tmp_path / "shared/metrics.csv"
        for _ in range(600):
            if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
                break
            time.sleep(0.1)
        os.kill(workers_of(machines[1].pid)[0], signal.SIGKILL)
        said = [machine.communicate(timeout=120)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    models = [(tmp_path / run / "model/model.safetensors").read_bytes() for run in ("whole", "shared")]
    assert models[0] == models[1]


def test_those_who_meet_again_agree_on_a_new_word() -> None:
    store, words = torch.distributed.HashStore(), set()
    for _ in range(3):  # in one store, where the questions and answers of the dead are left
        with ThreadPoolExecutor(3) as pool:
            said = list(pool.map(lambda rank: process_group.rendezvous(store, rank, 3), [1, 2, 0]))
        assert len(set(said)) == 1
        words.update(said)
    assert len(words) == 3


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_saves_in_all_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convlens", "train", "digits", "--epochs", "500", "--processes", "2"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("epoch   2"):
            break
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "saved. Resume with: convlens train --resume runs/digits-1" in errors
    assert list((tmp_path / "runs/digits-1/checkpoint").glob("step-*.json"))
