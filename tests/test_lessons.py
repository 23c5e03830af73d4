"""The lessons: each notebook runs as it is, holds no outputs, and asks what can be answered."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from convlens.errors import UnknownName
from convlens.lesson import EXERCISES, check, show_solution

FOLDER = Path(__file__).parents[1] / "docs" / "lessons"
LESSONS = sorted(FOLDER.glob("*.ipynb"))
ASKED = re.compile(r'lesson\.check\("([\d.]+)"')


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


def test_an_exercise_that_there_is_not():
    with pytest.raises(UnknownName, match="exercise"):
        check("9.9", 1)


@pytest.mark.slow  # minutes each; make lessons runs them all
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
