"""The documentation is true: examples run, public names say what they do, and the site is whole and stands alone."""

import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
import yaml
from browser import browse, in_browser

import convlens
from convlens import models
from convlens.cli.main import app
from convlens.explain.explanation import Explanation

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ELSEWHERE = re.compile(r"https?:|//")
FOREIGN = ("pip ", "python ", "docker ", "torchrun ", "tensorboard ", "--rdzv", "curl ")  # flags of other programs


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def verbs(group=None, name="convlens"):
    """Yield every verb of the command, as it is typed, and what it takes."""
    for word, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, f"{name} {word}")
        else:
            yield f"{name} {word}", {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}


VERBS = dict(verbs())


def test_the_examples_in_docstrings_run():
    tried = 0
    for module in pkgutil.walk_packages(convlens.__path__, "convlens."):
        if not module.name.endswith("__main__"):
            failed, attempted = doctest.testmod(importlib.import_module(module.name))
            assert not failed, f"python -m doctest says more of {module.name}"
            tried += attempted
    assert tried > 30


def public():
    """Yield every public function and class by name, and what a public class has of its own."""
    names = {f"convlens.{name}": getattr(convlens, name) for name in convlens.__all__ if name != "__version__"}
    names |= {f"convlens.models.{name}": getattr(models, name) for name in models.__all__ if name != "MODELS"}
    for name, entry in {**names, "Explanation": Explanation}.items():
        yield name, entry
        for member, value in vars(entry).items() if inspect.isclass(entry) else ():
            value = getattr(value, "__func__", getattr(value, "func", getattr(value, "fget", value)))
            if inspect.isfunction(value) and not member.startswith("_"):
                yield f"{name}.{member}", value


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_says_what_it_takes_and_raises(name):
    entry = PUBLIC[name]
    text = entry.__doc__ or ""
    assert len(text.split()) > 3
    if inspect.isfunction(entry):
        raised = set(re.findall(r"raise ([A-Z]\w+)\(", inspect.getsource(entry)))
        assert {error for error in raised if error not in text} == set()
        if {"images", "x", "X"} & set(inspect.signature(entry).parameters):
            assert re.search(r"\(N, ", text), "an array or tensor has a shape"


@pytest.mark.slow  # a minute: whole trainings with their reports
def test_the_python_on_the_pages_runs():
    found = {f"{page.relative_to(ROOT)} {n}": code for page in PAGES for n, code in enumerate(blocks(page, "python"))}
    assert len(found) > 6
    runner = (
        f"for name, code in {found!r}.items():\n    print(name, flush=True)\n    exec(code, {{'__name__': name}})\n"
    )
    Path("pages.py").write_text(runner, encoding="utf-8")  # a file: PyTorch looks for the source of a net's class
    done = subprocess.run([sys.executable, "pages.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_on_the_pages_exist():
    pages = [*PAGES, ROOT / "README.md"]
    listed = [line for page in pages for block in blocks(page, "sh") for line in block.replace("\\\n", "").splitlines()]
    listed = [line for line in listed if line.startswith("convlens ") and line != "convlens --version"]
    assert len(listed) > 30
    for line in listed:
        words = shlex.split(line, comments=True)
        verb = next((verb for verb in VERBS if words[: len(verb.split())] == verb.split()), None)
        assert verb, line
        assert {word for word in words if word.startswith("--")} <= VERBS[verb], line


def test_the_flags_in_the_text_of_the_pages_exist():
    """A flag in inline code belongs to the command it is written with, or else to any command."""
    known = set().union(*VERBS.values()) | {"--debug", "--version", "--help"}
    unknown = set()
    for page in [*PAGES, ROOT / "README.md"]:
        text = re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8"))
        for code in map(" ".join, map(str.split, re.findall(r"`([^`]+)`", text))):
            if not code.startswith(FOREIGN):
                verb = next((verb for verb in VERBS if code.startswith(f"{verb} ")), None)
                flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code))
                unknown |= {(page.name, code, flag) for flag in flags - (VERBS[verb] | {"--debug"} if verb else known)}
    assert unknown == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_a_lesson_becomes_a_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    hooks = importlib.import_module("hooks")
    prose = "# 1. One\n\nIt is $p$, not \\$5:\n\n$$\\frac{a}{b}$$\n\n[on](2-two.ipynb), [away](../../README.md#why)"
    output = (
        {"output_type": "stream", "text": ["1\n"]},
        {"output_type": "display_data", "data": {"image/png": "QQ==\n"}},
    )
    cells = [
        {"cell_type": "markdown", "source": [prose]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": output},
    ]
    Path("1-one.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    page = hooks.on_page_markdown(hooks.lesson(Path("1-one.ipynb")))
    assert page.startswith("# 1. One\n\n[This lesson as a notebook](1-one.ipynb){ download }")
    assert re.findall(r"<math [^>]*display=\"(\w+)\"", page) == ["inline", "block"]
    assert "not \\$5:" in page
    assert "[on](2-two.md), away" in page
    assert (
        "```python\nprint(1)\n```\n\n```text\n1\n```\n\n![Output of the cell above](data:image/png;base64,QQ==)" in page
    )


class Loaded(HTMLParser):
    """What a page loads by itself: not what its links lead to."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        if tag != "a":
            self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]


def test_every_page_of_the_navigation_is_there(site):
    def walk(entry):
        if isinstance(entry, str):
            yield entry
        for below in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from walk(below)

    named = list(walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    named += [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs" / "lessons").glob("*.ipynb")]
    assert len(named) > 20
    for name in named:
        assert (site / name).with_suffix(".html").is_file(), name


def test_nothing_on_the_site_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        page = Loaded()
        page.feed(path.read_text(encoding="utf-8"))
        assert [address for address in page.addresses if address and ELSEWHERE.match(address)] == [], path
    for path in site.rglob("*.css"):
        style = path.read_text(encoding="utf-8")
        assert re.findall(r"""(?:url\(|@import )["']?(?:https?:|//)[^)]*""", style) == [], path


def test_the_reference_has_every_verb_and_flag(site):
    page = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    for verb, flags in VERBS.items():
        assert f'id="{verb.replace(" ", "-")}"' in page, verb
        assert {flag for flag in flags if flag.startswith("--") and flag not in page} == set(), verb


def test_the_reference_has_every_public_name(site):
    python, nets, errors = (
        (site / "reference" / f"{name}.html").read_text(encoding="utf-8") for name in ("python", "models", "python")
    )
    for name in convlens.__all__:
        assert name == "__version__" or f'id="convlens.{name}"' in python, name
    for name in models.__all__:
        assert f'id="convlens.models.{name}"' in nets + python or name == "create_model", name
    assert 'id="convlens.errors.DivergenceError"' in errors


@in_browser
def test_the_site_is_read_and_searched_without_a_server(site, tmp_path):
    with browse(tmp_path) as tab:
        tab.open((site / "how-to" / "data-audit.html").as_uri())
        tab.run("document.querySelector('.md-search__input').focus()")
        for letter in "calibration":
            tab.key(letter)
        tab.wait("document.querySelectorAll('.md-search-result__item').length > 0")
        loaded = tab.run("[...document.querySelectorAll('[src], link[href]')].map((one) => one.src || one.href)")
        assert len(loaded) > 6  # with what its scripts have added
        assert {address.split(":")[0] for address in loaded} <= {"file", "data"}
        assert tab.errors == []
