"""The lessons: each notebook runs as it is, holds no outputs, and asks what can be answered."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

import convlens
from convlens.errors import UnknownNameError
from convlens.lessons import check, show_solution, terminal
from convlens.lessons.exercises import EXERCISES
from convlens.lessons.scenes import draw_scene

FOLDER = Path(__file__).parents[1] / "docs" / "lessons"
LESSONS = sorted(FOLDER.glob("*.ipynb"))
ASKED = re.compile(r'lessons\.check\(\\"([\d.]+)\\"')  # as JSON writes it
SLOW = re.compile(r"convlens\.train|\btrial\(\)|lessons\.terminal\(")  # a training, or a process of its own
SHAPES = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
load_real = convlens.load_dataset


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    assert notebook.metadata.kernelspec.name == "python3"


def test_the_lessons_ask_every_exercise_once():
    asked = [number for path in LESSONS for number in ASKED.findall(path.read_text())]
    assert sorted(asked) == sorted(EXERCISES)


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_takes_its_solution_and_nothing_else(number, capsys):
    assert check(number, show_solution(number))
    assert capsys.readouterr().out == f"{number}: right. {EXERCISES[number].right}\n"
    for wrong in (..., None, "no", object(), -12345.6):
        assert not check(number, wrong)
        assert EXERCISES[number].hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "answer", "right"),
    [
        ("1.2", torch.tensor([[1, 1, 1], [0, 0, 0], [-1, -1, -1]]), True),  # bright above dark
        ("1.2", [[0, 0, 0], [-1, -1, -1], [1, 1, 1]], True),
        ("1.2", [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], False),  # finds edges that stand
        ("1.2", [[1, 1, 1], [1, 1, 1], [1, 1, 1]], False),
        ("1.2", [[0, 0, 0]] * 3, False),
        ("1.3", torch.Size([13, 13]), True),
        ("1.3", (13, 12), False),
        ("1.3", (), False),
        ("1.3", "13", True),
        ("1.4", [8, 2], True),
        ("1.4", (2, 8), False),
        ("1.4", (8,), False),
        ("1.5", (8, 8), True),
        ("2.3", torch.tensor([5.0, 4.307, 4.307]), True),
        ("2.3", (2, 1, 1), False),
        ("2.4", 2.3, True),
        ("3.2", (256,), True),
        ("3.3", " B", True),
        ("3.3", "a", False),
        ("4.1", 0.96, True),
        ("6.3", 0.98, True),
        ("6.3", 98.2, True),
        ("6.3", "98.2%", True),
        ("6.3", "0.982", True),
        ("6.3", 0.88, False),
        ("6.4", 0.35, False),
        ("6.5", 73, True),
        ("6.5", "73 %", True),
        ("6.5", "0.73%", False),
    ],
)
def test_an_answer_counts_by_what_it_does(number, answer, right):
    assert check(number, answer) is right


@pytest.mark.parametrize(
    ("kernel", "hint"),
    [
        ([-1, 0, 1], "not yet. Give three rows"),
        ([[-1, 1], [1, -1]], "must be three rows of three"),
        ([[-1, 0, 1]] * 3, "says nothing where bright lies above dark"),
        ([[1, 1, 1]] * 3, "where every pixel is 1 it says 9,"),
        ([[-1, -1, 0], [-1, 0, 1], [0, 1, 1]], "a standing one 2:"),
    ],
)
def test_a_wrong_kernel_is_told_what_it_lacks(kernel, hint, capsys):
    assert not check("1.2", kernel)
    assert hint in capsys.readouterr().out


def made_up(name, **options):
    """Return noise in the place of a data set that would be downloaded, as load_dataset would."""
    if name not in SHAPES:
        return load_real(name, **options)
    images = torch.randint(0, 256, (6000, *SHAPES[name]), dtype=torch.uint8)
    labels = torch.arange(6000) % 10
    return convlens.from_arrays(images, labels, images[:2000], labels[:2000], name=name)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # PyTorch's, where Matplotlib draws a tensor
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_up_to_its_first_training(path, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.setattr(convlens, "load_dataset", made_up, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            if SLOW.search(cell.source):
                break
            exec(TransformerManager().transform_cell(cell.source), names)
    else:
        pytest.fail("nothing in it is slow: is SLOW still right?")
    plt.close("all")


def test_a_terminal_says_what_the_command_says(capfd):
    with pytest.raises(subprocess.CalledProcessError):
        terminal("convlens fly 'to the moon'")
    assert "No such command 'fly'" in capfd.readouterr().out


def test_a_scene_is_the_same_for_the_same_numbers():
    first, again, dry = (draw_scene("boat", np.random.default_rng(1), ground) for ground in ("", "water", "grass"))
    assert first.tobytes() == again.tobytes() != dry.tobytes()


def test_an_exercise_that_there_is_not():
    with pytest.raises(UnknownNameError, match="exercise"):
        check("9.9", 1)


def unpack_photos(folder):
    """Unpack a part of CIFAR-10 from its JPEG copy, if CONVLENS_DATA has that: as many images as lesson 4 takes."""
    for place in os.environ["CONVLENS_DATA"].split(os.pathsep):
        if (archive := Path(place) / "cifar10-jpeg.tar.xz").is_file():
            with tarfile.open(archive) as tar:
                most = {"train": 600, "test": 200}  # of each class; their files are numbered: train/cat/0000.jpg
                wanted = [m for m in tar if m.isfile() and int(Path(m.name).stem) < most[m.name.split("/")[0]]]
                safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python 3.11.2
                tar.extractall(folder, wanted, **safe)
            return True
    return False


@pytest.mark.slow  # minutes each; make lessons runs them all
@pytest.mark.data
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs(path, tmp_path, monkeypatch):
    if path.stem == "4-cifar" and unpack_photos(tmp_path / "photos"):
        monkeypatch.setenv("LESSON_CIFAR10", str(tmp_path / "photos"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
