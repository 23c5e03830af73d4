"""The structure of the code: sizes, layers, and the words of the glossary."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "convlens"
FILES = sorted(SOURCE.rglob("*.py"))


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every function of the package under ``file:name``; commands, whose parameters are flags, are left out."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and file.parent.name != "cli":
                yield f"{file.relative_to(SOURCE)}:{node.name}", node


def length(function: ast.FunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    first = function.body[0]
    docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    doc = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - doc


def test_the_top_level_has_few_modules_and_packages() -> None:
    entries = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert len(entries - {"__init__", "__main__"}) <= 20


def test_fit_reads_in_one_screen() -> None:
    tree = ast.parse((SOURCE / "training" / "loop.py").read_text(encoding="utf-8"))
    fit = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "fit")
    assert length(fit) <= 80


def test_no_function_is_long() -> None:
    assert [name for name, function in functions() if length(function) > MAX_LINES] == []


def test_no_function_has_many_parameters() -> None:
    def count(function: ast.FunctionDef) -> int:
        given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        return len([one for one in given if one.arg not in ("self", "cls")])

    # scikit-learn wants every hyperparameter of an estimator in the signature of its constructor
    found = {name for name, function in functions() if count(function) > MAX_PARAMETERS}
    assert found == {"estimator.py:__init__"}


MAX_LINES = 70
MAX_PARAMETERS = 8

# identifiers that the first version used; CHANGELOG.md says what each is called now
OLD_FLAGS = (
    "parts small-size small-share test-views validation watch-test iterations seconds clip-norm schedule warmup "
    "step-epochs step-factor ema select balance frozen shift flip colour-jitter crop-probability crop-fraction "
    "snapshots filters init"
).split()
OLD_NAMES = (
    "Tally NumberWatch WeightAverage BatchNormTogether LiveRecord UnknownName BadImage PeerGone PictureStyle RunFolder "
    "train_series small_size small_share test_views watch_test clip_norm step_epochs step_factor crop_probability "
    "crop_fraction colour_jitter one_colour near_copies callers_state_kept"
).split()


OLD = (("--(?:no-)?", OLD_FLAGS), ("", OLD_NAMES))


def texts() -> list[Path]:
    """Return the files in which a name may stand."""
    folders = ("src", "docs", "tests", "benchmarks", "scripts")
    kinds = {".py", ".md", ".ipynb", ".json", ".js", ".html"}
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    return [ROOT / "README.md", *(path for path in found if path.name not in ("test_house.py", "losses.json"))]


def test_old_flags_and_names_are_nowhere() -> None:
    flags, names = (rf"(?<![\w-]){start}(?:{'|'.join(words)})(?![\w-])" for start, words in OLD)
    pattern = re.compile(rf"{flags}|{names}")
    found = {str(path.relative_to(ROOT)): set(pattern.findall(path.read_text(encoding="utf-8"))) for path in texts()}
    assert {name: words for name, words in found.items() if words} == {}
