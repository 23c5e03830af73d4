"""The lessons: each notebook runs as it is, holds no outputs, and asks what can be answered."""

import os
import re
import tarfile
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from convlens.errors import UnknownName
from convlens.lesson import EXERCISES, check, show_solution

FOLDER = Path(__file__).parents[1] / "docs" / "lessons"
LESSONS = sorted(FOLDER.glob("*.ipynb"))
ASKED = re.compile(r'lesson\.check\(\\"([\d.]+)\\"')  # as JSON writes it


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
        ("1.4", [8, 2], True),
        ("1.4", (2, 8), False),
        ("2.3", torch.tensor([5.0, 4.307, 4.307]), True),
        ("2.3", (2, 1, 1), False),
        ("2.4", 2.3, True),
        ("3.3", " B", True),
        ("3.3", "a", False),
        ("4.1", 0.96, True),
    ],
)
def test_an_answer_counts_by_what_it_does(number, answer, right):
    assert check(number, answer) is right


def test_an_exercise_that_there_is_not():
    with pytest.raises(UnknownName, match="exercise"):
        check("9.9", 1)


def unpack_photos(folder):
    """Unpack a part of CIFAR-10 from its JPEG copy, if CONVLENS_DATA has that: as many images as lesson 4 takes."""
    for place in os.environ["CONVLENS_DATA"].split(os.pathsep):
        if (archive := Path(place) / "cifar10-jpeg.tar.xz").is_file():
            with tarfile.open(archive) as tar:
                most = {"train": 600, "test": 200}  # of each class; their files are numbered: train/cat/0000.jpg
                wanted = [m for m in tar if m.isfile() and int(Path(m.name).stem) < most[m.name.split("/")[0]]]
                tar.extractall(folder, wanted, filter="data")
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
