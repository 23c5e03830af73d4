"""The ``convlens`` application: its commands in the order of ``--help``.

Nothing heavy is imported here. Each command imports what it needs, so that ``convlens --help`` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from convlens import __version__
from convlens.cli.compare import compare
from convlens.cli.data_doctor import data_doctor
from convlens.cli.data_info import data_info
from convlens.cli.data_list import data_list
from convlens.cli.data_pack import data_pack
from convlens.cli.evaluate import evaluate
from convlens.cli.explain import explain
from convlens.cli.export import export
from convlens.cli.lr_find import lr_find
from convlens.cli.mistakes import mistakes
from convlens.cli.models import models
from convlens.cli.predict import predict
from convlens.cli.recipes import recipes
from convlens.cli.serve import serve
from convlens.cli.sweep import sweep
from convlens.cli.timelapse import timelapse
from convlens.cli.train import train
from convlens.cli.verify import verify
from convlens.cli.watch import watch

# typer raises a subclass of this for a wrong command line; the class lives in click or in typer's own copy of it
ParseError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Train, see through and ship small convolutional image classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Inspect data sets.", no_args_is_help=True)


def show_version(value: bool) -> None:
    """Print the version and exit."""
    if value:
        print(f"convlens {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")] = False,
) -> None:
    """Options of every command."""


app.command()(train)
app.command()(sweep)
app.command()(lr_find)
app.command()(evaluate)
app.command()(mistakes)
app.command()(compare)
app.command()(predict)
app.command()(explain)
app.command()(timelapse)
app.command()(watch)
app.command()(export)
app.command()(verify)
app.command()(serve)
app.command()(models)
app.command()(recipes)
app.add_typer(data_app, name="data")
data_app.command("list")(data_list)
data_app.command("info")(data_info)
data_app.command("pack")(data_pack)
data_app.command("doctor")(data_doctor)


def render_flags(message: str, arguments: Sequence[str]) -> str:
    """Return a library's message with `name` and `name=value` in backticks written as on the command line.

    Names are options of the command in ``arguments``, or else of ``train``, as every recipe field is; a positional
    argument becomes its upper-case name. Other names stay as they are.
    """
    root: Any = typer.main.get_command(app)
    running = root
    for word in arguments:
        running = getattr(running, "commands", {}).get(word, running)
    known = [p for p in root.commands["train"].params if p.param_type_name == "option"] + running.params

    def render(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        parameter = next((p for p in reversed(known) if p.name == name), None)
        if parameter is None:
            return found[0]
        if parameter.param_type_name == "argument":
            return name.upper()
        shown = parameter.secondary_opts[0] if value == "False" and parameter.secondary_opts else parameter.opts[0]
        return shown if value in (None, "True", "False") else f"{shown} {value}"

    return re.sub(r"`([a-z]\w*)(?:=([^`]*))?`", render, message)
