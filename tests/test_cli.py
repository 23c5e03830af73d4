"""The command line: what it prints, where, with which exit code; wrong input; the frozen list of flags."""

import csv
import dataclasses
import gzip
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import convlens
from convlens.cli import main
from convlens.cli.app import render_flags
from convlens.cli.lr_find import lr_find
from convlens.cli.sweep import sweep
from convlens.cli.train import train
from convlens.run_dir import RunDir
from convlens.training.recipe import Recipe, flag

QUICK = ["--epochs", "1", "--device", "cpu", "--threads", "1", "--precision", "fp32"]


class Shell:
    """Runs the command in this process and gives exit code, standard output and standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object, stdin: str = "") -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["convlens", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main.main()
        out, err = self._capsys.readouterr()
        return int(leaving.value.code or 0), out, err

    def fails(self, *arguments: object, code: int, says: str) -> str:
        """Run, expect one line on standard error with ``says`` in it, and return that line."""
        found, _, err = self(*arguments)
        assert says in err
        assert found == code
        assert len(err.strip().splitlines()) == 1, err
        assert err.startswith("convlens: ")
        return err


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def make_folder(root: Path, counts: dict[str, int], side: int = 12) -> Path:
    """Make class folders of coloured noise, one brightness a class."""
    random = np.random.default_rng(0)
    for level, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 60, (side, side, 3)) + 60 * level
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short training on digits that several tests look at."""
    import convlens

    out = tmp_path_factory.mktemp("runs") / "digits"
    convlens.train("digits", out=out, epochs=2, device="cpu", threads=1, precision="fp32")
    return out


def test_train_prints_the_run_and_writes_every_file(shell: Shell) -> None:
    code, out, _ = shell("train", "digits", *QUICK)
    assert code == 0
    assert "data    digits: 1,295 train, 143 validation, 359 test images 1x8x8, 10 classes" in out
    assert "test    accuracy " in out
    assert "report  runs/digits-1/report.html" in out
    run = RunDir("runs/digits-1")
    for path in (run.config, run.metrics, run.checkpoint, run.model, run.test, run.predictions, run.report, run.split):
        assert path.exists(), path
    assert {p.name for p in run.plots.iterdir()} == {
        "samples.png", "augmented.png", "curves.png", "confusion.png", "mistakes.png", "filters.png",
        "calibration.png",
    }  # fmt: skip
    assert run.read_config()["command"] == "convlens train digits " + " ".join(QUICK)


def test_two_runs_never_share_a_folder(shell: Shell) -> None:
    shell("train", "digits", *QUICK)
    _, out, _ = shell("train", "digits", *QUICK)
    assert "run     runs/digits-2" in out


def test_evaluate_says_what_test_json_says(shell: Shell, digits_run: Path) -> None:
    saved = json.loads((digits_run / "test.json").read_text())
    code, out, _ = shell("evaluate", digits_run, "--format", "json")
    assert code == 0
    again = json.loads(out)
    _, *cells = csv.reader((digits_run / "confusion_matrix.csv").read_text().splitlines())
    assert [[true, predicted, str(n)] for true, predicted, n in again.pop("confusion_matrix")] == cells
    assert again.keys() == saved.keys()
    assert again["loss"] == pytest.approx(saved["loss"], rel=1e-5)
    _, text, _ = shell("evaluate", digits_run)
    assert f"accuracy {saved['accuracy']:.2%}" in text
    _, table, err = shell("evaluate", digits_run, "--format", "csv", "--tta")
    assert "with test-time augmentation (" in err  # it is no row of the table
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["class"] for row in rows] == list("0123456789")
    assert sum(int(row["support"]) for row in rows) == saved["num_images"]


def draw_one(path: Path) -> Path:
    """Draw a black one on white paper."""
    page = Image.new("L", (200, 300), 255)
    ImageDraw.Draw(page).line([(100, 60), (100, 240)], fill=0, width=24)
    page.save(path)
    return path


def test_predict_in_every_format(shell: Shell, tmp_path: Path) -> None:
    image = draw_one(tmp_path / "one.png")
    code, out, _ = shell("predict", "mnist", image)
    assert code == 0
    assert out.startswith(f"{image}: 1 ")
    _, out, _ = shell("predict", "mnist", image, "--top", "3")
    assert len(out.split(": ")[1].split(", ")) == 3
    columns = ["image_id", "predicted_label", "confidence", *(f"p_{label}" for label in range(10))]
    columns += ["in_distribution", "prediction_set"]
    _, out, _ = shell("predict", "mnist", image, "--format", "json")
    (row,) = json.loads(out)
    assert list(row) == columns
    assert row["image_id"] == str(image) and row["predicted_label"] == "1" and row["prediction_set"] is None
    assert row["confidence"] == row["p_1"] and sum(row[f"p_{label}"] for label in range(10)) == pytest.approx(1)
    _, out, _ = shell("predict", "mnist", image, "--format", "csv")
    (cells,) = csv.DictReader(io.StringIO(out))
    assert list(cells) == columns and cells["predicted_label"] == "1" and float(cells["p_1"]) == row["p_1"]


def test_predict_takes_folders_globs_and_lists(shell: Shell, tmp_path: Path) -> None:
    inside = tmp_path / "scans"
    inside.mkdir()
    names = [str(draw_one(inside / f"{i}.png")) for i in range(3)]
    (inside / ".hidden.png").write_bytes(b"not looked at")
    for arguments, stdin in (
        ([inside], ""),
        ([inside / "*.png"], ""),
        (["-"], "\n".join(names) + "\n"),
    ):
        code, out, err = shell("predict", "mnist", *arguments, stdin=stdin)
        assert (code, err) == (0, "")
        assert [line.split(": ")[0] for line in out.splitlines()] == names
    assert shell("predict", "mnist", "-", stdin="\n") == (2, "", "convlens: standard input lists no files\n")


def test_predict_names_bad_images_and_goes_on(shell: Shell, tmp_path: Path) -> None:
    good = draw_one(tmp_path / "good.png")
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    code, out, err = shell("predict", "mnist", bad, good, tmp_path / "none.png")
    assert code == 1
    assert out.startswith(f"{good}: 1 ")
    assert f"{bad} is not an image" in err
    assert f"{tmp_path / 'none.png'}: there is no such file" in err
    assert err.strip().endswith("2 of 3 images could not be read")


def test_no_adapt_turns_the_adaptation_off(shell: Shell, tmp_path: Path) -> None:
    image = draw_one(tmp_path / "one.png")
    adapted = json.loads(shell("predict", "mnist", image, "--format", "json")[1])
    raw = json.loads(shell("predict", "mnist", image, "--format", "json", "--no-adapt")[1])
    assert adapted[0]["confidence"] != raw[0]["confidence"]


def test_unknown_names_are_answered_with_the_nearest(shell: Shell) -> None:
    shell.fails("train", "digit", code=2, says="unknown data set or folder 'digit'; did you mean 'digits'?")
    shell.fails("train", "digits", "--recipe", "digit", code=2, says="unknown recipe 'digit'; did you mean 'digits'?")
    shell.fails("train", "digits", "--model", "smal", code=2, says="unknown model 'smal'; did you mean 'small'?")
    shell.fails("train", "digits", "--epoch", "3", code=2, says="--epochs")
    shell.fails("trian", "digits", code=2, says="'train'")
    shell.fails("train", "digits", "--device", "gpu", code=2, says="unknown value of --device 'gpu'")
    shell.fails("predict", "mnits", "x.png", code=2, says="unknown run folder or model 'mnits'; did you mean 'mnist'?")
    shell.fails("models", "mnist-4con", code=2, says="unknown model 'mnist-4con'; did you mean 'mnist-4conv'?")
    assert not Path("runs").exists()


def test_wrong_values_name_their_flag(shell: Shell) -> None:
    shell.fails("train", "digits", "--lr", "abc", code=2, says="--lr")
    shell.fails("train", "digits", "--batch-size", "0", code=2, says="--batch-size is 0; it must be at least 1")
    shell.fails("train", "digits", "--momentum", "1", code=2, says="--momentum is 1.0; it must be below 1")
    shell.fails("train", "digits", "--pool", "max", code=2, says="model 'small' has no option 'pool'")
    shell.fails(
        "train",
        "digits",
        "--epochs",
        "1",
        "--max-steps",
        "5",
        code=2,
        says="a recipe needs exactly one of --epochs, --max-steps and --max-seconds",
    )
    shell.fails("train", code=2, says="give either the data to train on, or a run to --resume")
    shell.fails("train", "--resume", "runs/none", code=2, says="there is no run folder runs/none")
    shell.fails("train", "--resume", "x", "--lr", "1", code=2, says="--resume uses the run's own recipe")
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(shell: Shell) -> None:
    shell.fails("train", "digits", "--device", "cuda", code=2, says="this machine has no cuda device")


def test_folders_that_cannot_be_trained_on(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shell.fails("train", tmp_path / "empty", code=2, says="has no class folders with images")
    make_folder(tmp_path / "single", {"ants": 5})
    shell.fails("train", tmp_path / "single", code=2, says="only one class, 'ants'; a classifier needs at least two")
    make_folder(tmp_path / "lonely", {"ants": 5, "bees": 1})
    shell.fails("train", tmp_path / "lonely", code=2, says="class 'bees' has only one image")
    shell.fails("train", tmp_path / "none", code=2, says="there is no folder")
    assert not Path("runs").exists()


def test_unreadable_files_stop_the_run_unless_allowed(shell: Shell, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"dark": 12, "light": 12})
    (root / "dark" / "broken.jpg").write_text("not a picture")
    line = shell.fails("train", root, *QUICK, code=1, says="1 of 25 files")
    assert "broken.jpg is not an image" in line
    assert "--allow-unreadable" in line
    code, out, _ = shell("train", root, *QUICK, "--allow-unreadable")
    assert code == 0
    assert "1 unreadable file skipped" in out
    assert "broken.jpg" in Path("runs/photos-1/report.html").read_text()


def test_an_existing_run_is_never_overwritten(shell: Shell, digits_run: Path) -> None:
    before = (digits_run / "test.json").read_bytes()
    shell.fails("train", "digits", "--out", digits_run, code=2, says="exists already; choose another --out")
    shell.fails("train", "--resume", digits_run, code=2, says="is finished; nothing to resume")
    assert (digits_run / "test.json").read_bytes() == before


def test_a_place_that_cannot_be_written(shell: Shell) -> None:
    Path("runs").write_text("a file where the folder should be")
    shell.fails("train", "digits", *QUICK, code=1, says="cannot create the run folder runs/digits-1")


def test_a_full_disk_leaves_no_checkpoint_that_claims_to_be_one(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import convlens.system.files

    real = convlens.system.files.fsync

    def full(path: Path) -> None:
        if "metrics.csv" in path.name:
            raise OSError(28, "No space left on device")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(convlens.system.files, "fsync", full)
        shell.fails("train", "digits", *QUICK, code=1, says="metrics.csv: No space left on device; nothing was changed")
    assert not Path("runs/digits-1/metrics.csv").exists()
    code, out, _ = shell("train", "--resume", "runs/digits-1")
    assert code == 0
    assert "epoch   1" in out


def test_diverged_training_leaves_with_3(shell: Shell) -> None:
    line = shell.fails(
        "train", "digits", *QUICK, "--lr", "1e30", "--epochs", "3", code=3, says="is NaN or infinite (at step "
    )
    assert "try a lower --lr" in line


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    quick = ["--device", "cpu", "--threads", "1", "--precision", "fp32", "--batch-size", "16", "--epochs", "4"]
    command = [sys.executable, "-m", "convlens", "train", "digits", *quick, "--out", "interrupted"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    while not process.stdout.readline().startswith("epoch"):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "saved. Resume with: convlens train --resume interrupted" in err
    resumed = subprocess.run([sys.executable, "-m", "convlens", "train", "--resume", "interrupted"], check=True)
    assert resumed.returncode == 0
    subprocess.run([*command[:-1], "whole"], check=True)
    weights = [Path(run, "model", "model.safetensors").read_bytes() for run in ("interrupted", "whole")]
    assert weights[0] == weights[1]
    columns = [c for c in RunDir("whole").read_metrics()[0] if c != "seconds"]
    first, second = (
        [[row[c] for c in columns] for row in RunDir(run).read_metrics()] for run in ("interrupted", "whole")
    )
    assert first == second


def test_config_repeats_a_run(shell: Shell, digits_run: Path) -> None:
    code, _, _ = shell("train", "digits", "--config", digits_run / "config.json", "--out", "again")
    assert code == 0
    weights = [Path(run, "model", "model.safetensors").read_bytes() for run in (digits_run, "again")]
    assert weights[0] == weights[1]


def test_init_starts_from_trained_weights(shell: Shell, tmp_path: Path, digits_run: Path) -> None:
    root = make_folder(tmp_path / "shapes", {"a": 12, "b": 12, "c": 12}, side=8)
    code, out, _ = shell("train", root, *QUICK, "--init-from", digits_run, "--recipe", "digits")
    assert code == 0
    assert f"initialized from {digits_run}: " in out
    assert "3 classes" in out


def test_data_list_and_info(shell: Shell, tmp_path: Path) -> None:
    _, out, _ = shell("data", "list")
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["digits", "mnist", "fashion-mnist", "cifar10"]
    root = make_folder(tmp_path / "photos", {"dark": 10, "light": 5})
    code, out, _ = shell("data", "info", root)
    assert code == 0
    assert out.splitlines()[0] == "photos: images 3x12x12 (C x H x W), 2 classes"
    assert [line.split() for line in out.splitlines() if line.startswith(("dark", "light", "total"))] == [
        ["dark", "8", "2"],
        ["light", "4", "1"],
        ["total", "12", "3"],
    ]
    with Image.open("photos-samples.png") as picture:
        assert picture.format == "PNG"


def test_models_and_recipes(shell: Shell) -> None:
    _, out, _ = shell("models")
    for name in (
        "fashion-2conv",
        "folder-cnn",
        "cifar-lenet",
        "mnist-4conv",
        "small",
        "tiny",
        "whitened",
        "residual",
        "digits",
        "mnist",
    ):
        assert any(line.split()[:1] == [name] for line in out.splitlines()), name
    _, out, _ = shell("models", "mnist-4conv")
    assert out.splitlines()[-1].startswith("593,200 parameters")
    _, out, _ = shell("recipes")
    assert len(out.splitlines()) == 17
    _, out, _ = shell("recipes", "mnist-4conv")
    assert json.loads(out)["batch_size"] == 512


def test_help_has_examples_for_every_verb(shell: Shell) -> None:
    verbs = ["train", "evaluate", "mistakes", "compare", "predict", "models", "recipes", "data info", "data doctor"]
    verbs += ["sweep", "lr-find"]
    for verb in map(str.split, verbs):
        code, out, _ = shell(*verb, "--help")
        assert code == 0
        assert f"convlens {' '.join(verb)}" in out


def test_seeds_compare_mistakes_and_doctor_in_the_shell(shell: Shell, tmp_path: Path) -> None:
    _, out, _ = shell("train", "digits", *QUICK, "--seeds", "2")
    assert out.splitlines()[0] == "group   runs/digits-seeds-1: seed-0, seed-1"
    assert "seed-1   accuracy " in out and "all 2    " in out and " (mean +- sd), worst " in out
    runs = [f"runs/digits-seeds-1/seed-{seed}" for seed in (0, 1)]
    code, out, _ = shell("compare", *runs)
    assert code == 0 and "that these 359 images show" in out and "exact McNemar test p = " in out
    _, out, _ = shell("compare", *runs, "--format", "json")
    assert json.loads(out)[0]["n"] == 359
    _, out, _ = shell("compare", *runs, "--format", "csv")
    assert out.splitlines()[0] == "a,b,n,only_a,only_b,difference,p_value,interval_low,interval_high"
    shell.fails("compare", runs[0], code=2, says="name two or more runs to compare")
    _, out, _ = shell("mistakes", runs[0], "--uncertain", "3")
    assert f" misclassified and 3 uncertain images in {runs[0]}/mistakes" in out
    shell.fails("mistakes", runs[0], code=2, says="mistakes exists already; choose another --out")
    code, out, err = shell("data", "doctor", "digits", "--no-labels", "--exclude-file", "remove.txt")
    assert code == 0 and out.startswith("digits: 1,797 images") and "convlens train digits --exclude remove.txt" in err
    shell.fails("data", "doctor", "digits", "--exclude-file", "remove.txt", code=2, says="remove.txt exists already")
    code, out, _ = shell("train", "digits", *QUICK, "--exclude", "remove.txt")
    assert code == 0 and "images excluded on request" in Path("runs/digits-1/config.json").read_text()
    shell.fails("train", "digits", "--seeds", "1", code=2, says="--seeds is 1; a spread needs at least 2")
    shell.fails("train", "digits", "--folds", "0", code=2, says="--folds is 0; a spread needs at least 2")
    shell.fails("train", "", code=2, says="the name of the data is empty; use . for the current folder")
    shell.fails(
        "train",
        "digits",
        "--seeds",
        "2",
        "--budget",
        "9s",
        code=2,
        says="--seeds and --folds do not go with --init-from or --budget",
    )


def test_predict_says_unknown_and_names_a_set(shell: Shell, digits_run: Path) -> None:
    Image.new("L", (8, 8), 128).save("blank.png")
    _, out, _ = shell("predict", digits_run, "blank.png", "--no-adapt", "--coverage", "0.9")
    assert out.startswith("blank.png: unknown (most like ") and "  set: " in out
    _, out, _ = shell("predict", digits_run, "blank.png", "--no-adapt", "--format", "csv", "--coverage", "0.9")
    row = next(csv.DictReader(io.StringIO(out)))
    assert row["in_distribution"] == "false" and "prediction_set" in row
    _, out, _ = shell("predict", digits_run, "blank.png", "--no-adapt", "--format", "json")
    assert json.loads(out)[0]["in_distribution"] is False and json.loads(out)[0]["prediction_set"] is None
    shell.fails("predict", digits_run, "blank.png", "--coverage", "2", code=2, says="it must be from 0.5 to 0.995")


def test_evaluate_on_spoiled_images(shell: Shell, digits_run: Path) -> None:
    code, out, _ = shell("evaluate", digits_run, "--corruptions", "--plot", "spoiled.png")
    last = rf"{digits_run}: accuracy [\d.]+% on average, [\d.]+% on the clean test images"
    assert code == 0 and re.fullmatch(last, out.splitlines()[-1])
    assert len(out.splitlines()) == 12 and Path("spoiled.png").stat().st_size > 5000
    _, out, err = shell("evaluate", digits_run, "--corruptions", "--format", "csv")
    assert len(out.splitlines()) == 10 and re.fullmatch(last, err.splitlines()[-1])
    shell.fails("evaluate", digits_run, "--plot", "x.png", code=2, says="--plot draws --corruptions; give both")
    shell.fails("evaluate", digits_run, "--corruptions", "--plot", "spoiled.png", code=2, says="that file exists")


def test_the_flags_of_train_are_the_recipe_and_these(shell: Shell) -> None:
    import inspect

    own = {
        "data",
        "recipe",
        "config",
        "out",
        "resume",
        "init_from",
        "allow_unreadable",
        "budget",
        "seeds",
        "folds",
        "exclude",
        "accept_changes",
        "live",
        "processes",
    }
    fields = {item.name for item in dataclasses.fields(Recipe)} - {"name"}
    assert set(inspect.signature(train).parameters) == own | fields
    assert {flag(name) for name in fields} == set(FROZEN_RECIPE_FLAGS.split())


def test_the_flags_of_sweep_and_lr_find_are_the_recipe_and_these() -> None:
    import inspect

    fields = {item.name for item in dataclasses.fields(Recipe)} - {"name"}
    searching = "data param trials jobs recipe config storage confirm_seeds out resume allow_unreadable"
    for verb, own in ((sweep, searching), (lr_find, "data recipe out allow_unreadable")):
        assert set(inspect.signature(verb).parameters) == set(own.split()) | fields


# taking a flag away, or renaming one, breaks people's scripts
FROZEN_RECIPE_FLAGS = """
--model --width --kernel-size --pool --output-relu --pretrained --freeze --image-size --val-fraction
--log-test-metrics --epochs --max-steps --max-seconds --batch-size --grad-accum-steps --sync-batchnorm --initial-size
--initial-size-fraction --save-every --balanced-sampling --loss --label-smoothing --optimizer --lr --head-lr --bias-lr
--momentum --nesterov --muon-momentum --weight-decay --max-grad-norm --lr-schedule --warmup-fraction --lr-step-size
--lr-gamma --ema-decay --restore-best --patience --translate --rotation --scale --hflip --center-crop-prob
--center-crop-ratio --cutout --color-jitter --mixup --cutmix --tta --save-snapshots --tensorboard --seed --device
--threads --precision
"""


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], ["torch", "matplotlib", "sklearn", "scipy", "numpy", "PIL", "pooch"]),
        (
            ["train", "digits", "--epochs", "1", "--device", "cpu"],
            ["sklearn", "scipy", "pooch", "optuna", "onnx", "sympy", "pydantic"],
        ),
    ],
)
def test_what_takes_long_to_import_waits_until_it_is_needed(words: list[str], heavy: list[str]) -> None:
    script = (
        f"import sys\nsys.argv = ['convlens', *{words!r}]\nfrom convlens.cli.main import main\n"
        f"try: main()\nexcept SystemExit: pass\nprint([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said, imported = done.stdout.splitlines()[-2:]
    assert ("predict with: " in said) == (words[0] == "train") and imported == "[]"


def test_the_program_leaves_at_once_with_its_exit_code_and_all_that_it_has_said() -> None:
    script = (
        "import atexit, os, sys\nfrom convlens.cli.main import run\n"
        "class Left:\n    def __del__(self): print('taken apart')\nleft = Left()\n"
        "atexit.register(print, 'goodbye')\nsys.argv[0] = 'convlens'\nrun()"
    )
    for words, code, said, rank in (
        (["--version"], 0, "goodbye\n", ""),
        (["train", "digit"], 2, "goodbye\n", ""),
        (["--version"], 0, "goodbye\ntaken apart\n", "0"),  # one of several processes leaves as Python does
    ):
        environment = {**os.environ, **({"RANK": rank} if rank else {})}
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == code and done.stdout.endswith(said)
        assert done.stdout.startswith("convlens ") == (code == 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("data list >&-", 0),
        ("data list >&- 2>&-", 0),
        ("data list 2>&-", 0),
        ("train digt >&-", 2),
        ("train digt 2>&-", 2),
        ("train digt 2>/dev/full", 2),
        ("predict mnist nope.png 2>&-", 1),
        ("data list > /dev/full", 1),
    ],
)
def test_the_exit_code_is_that_of_the_work_whoever_listens(words: str, code: int) -> None:
    command = f"{shlex.quote(sys.executable)} -m convlens {words}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr and "unexpected" not in done.stderr
    assert "convlens:" not in done.stdout


def test_messages_name_options_as_they_are_typed() -> None:
    for words, message, shown in (
        (["train", "digits"], "`val_fraction` is 2", "--val-fraction is 2"),
        (["train"], "`device=cpu`, `hflip=False` or `hflip=True`", "--device cpu, --no-hflip or --hflip"),
        (["evaluate", "x"], "say where with `data`, not `test_on`", "say where with --data, not --test-on"),
        (["data", "pack", "x"], "choose another `out` for `data`", "choose another --out for DATA"),
        (["compare", "x"], "use `save_snapshots=True` and `nothing`", "use --save-snapshots and `nothing`"),
        ([], "see `convlens recipes`", "see `convlens recipes`"),
    ):
        assert render_flags(message, words) == shown


def test_the_library_warns_through_its_logger(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("convlens.data")
    monkeypatch.setattr("convlens.cli.data_list.first_line", lambda _: logger.warning("set `image_size`") or "")
    code, _, err = shell("data", "list")
    assert code == 0 and err.splitlines()[0] == "convlens: set --image-size"


def test_debug_shows_the_traceback(shell: Shell) -> None:
    _, _, err = shell("--debug", "train", "digit")
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("convlens: unknown data set")


def damaged_mnist(kind: str, root: Path) -> None:
    """Put a damaged first file of MNIST where it is looked for."""
    header = b"\0\0\x08\x03" + (60000).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
    content = {
        "truncated": header + bytes(1000),
        "wrong magic": b"\x89PNG" + header[4:] + bytes(60000 * 784),
        "wrong hash": header + bytes(60000 * 784),
        "torn gzip": gzip.compress(header + bytes(60000 * 784))[:5000],
    }[kind]
    (root / "mnist").mkdir(parents=True)
    (root / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "wrong magic", "wrong hash", "torn gzip"])
def test_a_damaged_data_file_is_named(kind: str, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged_mnist(kind, tmp_path / "sets")
    monkeypatch.setenv("CONVLENS_DATA", str(tmp_path / "sets"))
    says = "cannot be read" if kind == "torn gzip" else "is not the published file"
    line = shell.fails("train", "mnist", code=1, says=says)
    assert "sets/mnist/train-images-idx3-ubyte.gz" in line
    assert "delete" in line
    assert not Path("runs").exists()


def test_data_that_cannot_be_had_say_where_to_put_them(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convlens.data import builtin, download

    monkeypatch.setattr(download, "search_path", lambda: [tmp_path])
    nowhere = dataclasses.replace(builtin.MNIST, mirrors=("http://127.0.0.1:9/a/", "http://127.0.0.1:9/b/"))
    monkeypatch.setattr(builtin, "MNIST", nowhere)
    line = shell.fails("train", "mnist", code=1, says="is not on this machine and could not be downloaded")
    assert "http://127.0.0.1:9/a/: " in line
    assert "http://127.0.0.1:9/b/: " in line
    assert "CONVLENS_DATA" in line


def test_a_model_of_a_newer_version(shell: Shell, digits_run: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(digits_run / "model", newer)
    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps({**config, "format": 99}))
    shell.fails("predict", newer, "x.png", code=1, says="made by a newer convlens (bundle format 99, this one reads 2)")


def test_image_size_is_for_folders(shell: Shell) -> None:
    shell.fails("train", "digits", "--image-size", "32", code=2, says="--image-size is for folders")


def test_a_folder_that_changed_is_not_judged_by(shell: Shell, tmp_path: Path) -> None:
    """One more file in an unsplit folder moves the test split: what was trained on could be in it."""
    root = make_folder(tmp_path / "photos", {"dark": 10, "light": 10})
    shell("train", root, *QUICK, "--out", "run")
    assert shell("evaluate", "run")[0] == 0
    assert len(list((tmp_path / "cache").rglob("images.npy"))) == 1  # decoded once for both
    Image.new("RGB", (12, 12), "red").save(root / "dark" / "new.png")
    shell.fails("evaluate", "run", code=2, says="have changed since the training")
    assert shell("evaluate", "run", "--test-on", root)[0] == 0


def test_strange_class_and_file_names(shell: Shell, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a_$5_$b": 6, "\\frac": 6})
    name = os.fsdecode(b"caf\xe9.png")  # not UTF-8, as old archives have them
    Image.new("RGB", (12, 12), "red").save(root / "a_$5_$b" / name)
    code, _, err = shell("train", root, *QUICK)
    assert (code, err) == (0, "")
    assert name.encode(errors="surrogateescape") in Path("runs/photos-1/split.csv").read_bytes()


def test_four_images_are_enough_to_run(shell: Shell, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"dark": 2, "light": 2})
    code, out, err = shell("train", root, *QUICK)
    assert (code, err) == (0, "")
    assert "2 train, 2 test images" in out


def test_the_run_never_lies_in_the_data(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "photos", {"dark": 6, "light": 6})
    monkeypatch.chdir(root)
    shell.fails("train", ".", *QUICK, code=2, says="would be written into the data in .")
    shell.fails("train", root, "--out", root / "x", code=2, says="choose a place outside")
    assert sorted(path.name for path in root.iterdir()) == ["dark", "light"]


def test_data_info_replaces_no_file(shell: Shell) -> None:
    Path("mine.png").write_text("precious")
    shell.fails("data", "info", "digits", "--out", "mine.png", code=2, says="--out mine.png: that file exists")
    shell.fails("data", "info", "digits", "--out", "mine.jpg", code=2, says="the name must end in .png")
    assert Path("mine.png").read_text() == "precious"
    for number in ("", "-2"):
        _, out, _ = shell("data", "info", "digits")
        assert out.splitlines()[-1] == f"samples digits-samples{number}.png"


def test_commands_that_are_printed_can_be_pasted(shell: Shell) -> None:
    name = "my run; echo $(x)"
    code, out, _ = shell("train", "digits", *QUICK, "--out", name)
    assert code == 0 and f"predict '{name}' IMAGE" in out
    code, out, _ = shell("train", "digits", *QUICK, "--out", "-x")
    assert code == 0 and "predict ./-x IMAGE" in out


def test_what_helps_is_said(shell: Shell, digits_run: Path) -> None:
    shell.fails(
        "train",
        digits_run,
        code=2,
        says="is a run, not a data set; give the data that it was trained on, or resume the run",
    )
    Path("mine.txt").write_text("mine")
    line = shell.fails("train", "digits", "--out", "mine.txt", code=2, says="mine.txt exists already; choose another")
    assert "--resume" not in line
    shell.fails("train", "digits", "--width", 10**8, code=2, says="not enough memory for this model small; try less")
    assert not Path("runs").exists()


def test_a_run_without_its_checkpoints_begins_anew_and_says_so(shell: Shell) -> None:
    convlens.train("digits", out="run", epochs=1, device="cpu", threads=1, precision="fp32")
    Path("run/report.html").unlink()
    Path("run/split.csv").unlink()
    shutil.rmtree("run/checkpoint")
    code, out, err = shell("train", "--resume", "run")
    assert code == 0, err
    assert "its checkpoints are missing: training starts over" in out and Path("run/split.csv").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--loss", "nll"], "--loss nll needs a model that ends in log-softmax"),
        (["--patience", "3", "--val-fraction", "0"], "--patience and --restore-best choose by validation images"),
        (["--init-from", "digits", "--freeze", "99"], "--freeze 99: the model has 4 stages"),
        (
            ["--model", "fashion-2conv", "--initial-size", "4", "--precision", "auto"],
            "--initial-size is 4: the model fashion-2",
        ),
    ],
)
def test_what_cannot_be_trained_leaves_no_run(words: list[str], says: str, shell: Shell) -> None:
    shell.fails("train", "digits", *QUICK, *words, code=2, says=says)
    assert not Path("runs").exists()


def test_ctrl_c_before_a_run_has_begun_leaves_nothing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("convlens.runs.experiment.write_split", press)
    assert shell("train", "digits", *QUICK)[0] == 130
    assert not list(Path("runs").iterdir())


def test_ctrl_c_while_shards_are_written_leaves_none(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object) -> None:
        assert list(Path().glob(".shards*"))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("convlens.data.shards.make_tar", press)
    shell.fails("data", "pack", "digits", "--out", "shards", code=130, says="interrupted")
    assert not list(Path().iterdir())


def test_nothing_is_written_into_the_data(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"dark": 9, "light": 9})
    monkeypatch.chdir(root)
    shell.fails(
        "data", "info", ".", code=2, says="would be written into the data in .; choose a place outside with --out"
    )
    monkeypatch.chdir(tmp_path)
    assert shell("train", "photos", *QUICK, "--out", "run")[0] == 0
    shell.fails("mistakes", "run", "--out", "photos/dark/m", code=2, says="choose a place outside with --out")
    assert sorted(path.name for path in root.iterdir()) == ["dark", "light"]


def test_a_list_of_files_may_hold_any_name(tmp_path: Path) -> None:
    draw_one(tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    done = subprocess.run(
        [sys.executable, "-m", "convlens", "predict", "mnist", "-"],
        input=os.fsencode(tmp_path) + b"/caf\xe9.png\n",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"") and b"caf\\udce9.png: 1 " in done.stdout


def test_what_nobody_foresaw_is_one_line_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.fails("train", "a" * 300, code=1, says="File name too long")
    Path("bad.json").write_text('{"recipe": 3}')
    shell.fails("train", "digits", "--config", "bad.json", code=2, says='bad.json: "recipe" is neither')
    monkeypatch.setattr("convlens.cli.predict.expand", lambda _: 1 / 0)
    shell.fails("predict", "mnist", "x.png", code=1, says="unexpected ZeroDivisionError: division by zero")
    _, _, err = shell("predict", "mnist", "x.png", "--debug")
    assert "Traceback" in err


def test_a_reader_who_leaves_ends_what_only_prints(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("L", (28, 28)).save(tmp_path / f"{number}.png")
    command = [sys.executable, "-m", "convlens", "predict", "mnist", str(tmp_path), "--format", "csv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_a_reader_who_leaves_does_not_stop_the_training() -> None:
    command = f"{sys.executable} -m convlens train digits {' '.join(QUICK)} --epochs 3 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("data    digits")
    assert done.stderr == ""
    assert Path("runs/digits-1/report.html").exists()


def test_plots_that_fail_lose_no_figure(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from convlens.reports import plots

    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw_curves", lambda *_: 1 / 0)
        shell.fails("train", "digits", *QUICK, code=1, says="ZeroDivisionError")
    accuracy = json.loads(Path("runs/digits-1/test.json").read_text())["accuracy"]
    code, out, _ = shell("train", "--resume", "runs/digits-1")
    assert code == 0
    assert f"test    accuracy {accuracy:.2%}" in out
    assert Path("runs/digits-1/report.html").exists()
