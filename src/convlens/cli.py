"""The ``convlens`` command: thin verbs that parse, call one function and print.

Nothing heavy is imported here: each verb imports what it needs, so that ``convlens --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer

from convlens import __version__
from convlens.console import (
    Format,
    Printer,
    describe_experiment,
    describe_record,
    describe_test,
    first_line,
    print_csv,
    print_table,
    say,
)
from convlens.errors import ConvlensError, Interrupted, UsageError
from convlens.training.recipe import FIELD_TYPES, Recipe, flag, plain_type

if TYPE_CHECKING:
    from convlens.experiment import Experiment
    from convlens.run import Run

STARTED = time.perf_counter()  # what --budget counts from

app = typer.Typer(
    help="Train, see through and ship small convolutional image classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


# what typer raises for a wrong command line; the class itself lies in click, or in typer's own copy of it
ParseError: Any = typer.BadParameter.__mro__[1]


def show_version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        print(f"convlens {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Options of every verb."""


def with_recipe_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb one flag for every field of Recipe; they arrive as its keyword arguments."""
    hints = get_type_hints(verb, include_extras=True)
    declared = [p for p in inspect.signature(verb).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [p.replace(annotation=hints[p.name]) for p in declared]
    for item in dataclasses.fields(Recipe):
        if item.name == "name":
            continue
        kind, _ = plain_type(item.name)
        choices = item.metadata["choices"]
        text = item.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        names = [f"{flag(item.name)}/--no-{flag(item.name)[2:]}"] if kind is bool else [flag(item.name)]
        option = typer.Option(
            *names, help=text, rich_help_panel="Recipe (default: the recipe's own)", show_default=False
        )
        annotation: Any = Annotated[(FIELD_TYPES[item.name] | None, option)]
        parameters.append(
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    def call(**values: Any) -> None:
        verb(**values)

    call.__doc__, call.__name__ = verb.__doc__, verb.__name__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


@app.command()
@with_recipe_flags
def train(
    data: Annotated[
        str | None,
        typer.Argument(help="digits, mnist, fashion-mnist, cifar10, a folder of class folders, or a .npz file."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe by name; `convlens recipes` lists them.")] = None,
    config: Annotated[Path | None, typer.Option(help="Take the recipe from a run's config.json.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run, instead of runs/DATA-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
    init: Annotated[str | None, typer.Option(help="Start from this run's or model's trained stages.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time for all of it, such as 60s or 5m: what fits is chosen.")
    ] = None,
    allow_unreadable: Annotated[bool, typer.Option(help="Skip unreadable files, however many.")] = False,
    **overrides: Any,
) -> None:
    """Train a classifier on DATA, test it once, and write everything into a run folder.

    Examples:
      convlens train mnist

      convlens train mnist --budget 60s

      convlens train photos/ --epochs 40 --image-size 96

      convlens train mnist --recipe mnist-4conv --lr 0.02

      convlens train --resume runs/mnist-1
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if (data is None) == (resume is None):
        raise UsageError("name the data to train on, or a run to --resume, one of the two")
    if resume is not None and (overrides or recipe or config or out or init or budget):
        raise UsageError("--resume goes on with the run's own recipe; it takes no other option")
    if recipe is not None and config is not None:
        raise UsageError("give --recipe or --config, not both")
    from convlens.experiment import Experiment
    from convlens.training.budget import parse_budget

    if resume is not None:
        experiment = Experiment.resume(resume, allow_unreadable=allow_unreadable)
    else:
        chosen: Any = recipe
        if config is not None:
            from convlens.runfolder import read_json

            values = read_json(config)
            chosen = Recipe.from_json(values.get("recipe", values))
        experiment = Experiment.create(
            data,
            chosen,
            out=out,
            init=init,
            allow_unreadable=allow_unreadable,
            budget=None if budget is None else parse_budget(budget),
            started=STARTED,
            **overrides,
        )
    run_experiment(experiment)


def run_experiment(experiment: Experiment) -> Run:
    """Train with a line an epoch; Ctrl-C (or a polite kill) finishes the step, saves, and says how to go on."""
    describe_experiment(experiment)
    stopping = False

    def stop(*_: Any) -> None:
        nonlocal stopping
        if stopping:  # asked twice
            raise KeyboardInterrupt
        stopping = True
        print("stopping after this step ...", file=sys.stderr)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for record in experiment.epochs(should_stop=lambda: stopping, show_progress=True):
            say(describe_record(record))
    except Interrupted as error:
        folder = experiment.folder.path
        raise Interrupted(f"{error}; saved. Go on with: convlens train --resume {folder}") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run = experiment.finish()
    except KeyboardInterrupt:
        folder = experiment.folder.path
        raise Interrupted(f"trained, but not tested; go on with: convlens train --resume {folder}") from None
    say(describe_test(run.test))
    say(f"report  {run.report}")
    program = "convlens" if shutil.which("convlens") else sys.argv[0]  # make demo uses it without a path to it
    say(f"predict with: {program} predict {run.path} IMAGE")
    return run


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model by name.")],
    data: Annotated[str | None, typer.Option(help="Test on this data instead of the run's own.")] = None,
    test_views: Annotated[
        bool, typer.Option("--test-views", help="Also average over mirrored, shifted views.")
    ] = False,
    format: Annotated[Format, typer.Option(help="How to print.")] = Format.text,
) -> None:
    """Test a trained net again on the test split, and print every figure. Writes nothing.

    Examples:
      convlens evaluate runs/mnist-1

      convlens evaluate mnist --format json
    """
    from convlens.run import evaluate_run

    test = evaluate_run(run, data, test_views=test_views)
    if format is Format.json:
        print(json.dumps(test, indent=2))
        return
    rows = [("class", "precision", "recall", "f1", "n")]
    for name, c in test["classes"].items():
        rows.append((name, *(f"{c[key]:.4f}" for key in ("precision", "recall", "f1")), str(c["n"])))
    if format is Format.csv:
        print_csv(rows)
        return
    print(describe_test(test))
    print_table(rows)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model by name.")],
    images: Annotated[list[str], typer.Argument(help="Files, folders, globs; - reads a list of files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 1,
    format: Annotated[Format, typer.Option(help="How to print.")] = Format.text,
    raw: Annotated[bool, typer.Option("--raw", help="Only resize; do not look for ink on paper.")] = False,
) -> None:
    """Say what pictures show.

    Examples:
      convlens predict mnist scan.png --top 3

      convlens predict runs/photos-1 holiday/ --format csv

      find . -name '*.jpg' | convlens predict runs/photos-1 -
    """
    from convlens.data.preprocess import BadImage, open_image
    from convlens.runtime import use_threads
    from convlens.shipping.classifier import Classifier

    use_threads()
    classifier = Classifier.load(model)
    files = expand(images)
    batch: list[tuple[str, Any]] = []
    bad, printer = 0, Printer(format, top)
    for number, file in enumerate(files, start=1):
        try:
            batch.append((file, classifier.preprocess.adapt(open_image(file), raw=raw)))
        except BadImage as error:
            bad += 1
            print(f"convlens: {error}", file=sys.stderr)
        if batch and (len(batch) == 256 or number == len(files)):
            predictions = classifier.describe(classifier.probabilities([pixels for _, pixels in batch]), top)
            for (name, _), prediction in zip(batch, predictions, strict=True):
                printer.add(name, prediction.top)
            batch = []
    printer.close()
    if bad and len(files) == 1:
        raise typer.Exit(1)  # what is wrong has been said
    if bad:
        raise ConvlensError(f"{bad} of {len(files)} images could not be read")


def expand(images: list[str]) -> list[str]:
    """Return the files that arguments name: files, what is in folders, globs, and - for a list on standard input."""
    import glob

    files: list[str] = []
    for name in images:
        if name == "-":
            files += [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        elif Path(name).is_dir():
            inside = sorted(p for p in Path(name).rglob("*") if p.is_file())
            visible = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(name).parts)]
            if not visible:
                raise UsageError(f"the folder {name} is empty")
            files += map(str, visible)
        elif not Path(name).exists() and glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True))
            if not found:
                raise UsageError(f"no file matches {name}")
            files += found
        else:
            files.append(name)
    return files


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="This net layer by layer, or this model's card.")] = None,
    channels: Annotated[int, typer.Option(min=0, help="Channels of the image; 0: the net's usual.")] = 0,
    size: Annotated[int, typer.Option(min=0, help="Side of the image in pixels; 0: the net's usual.")] = 0,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
) -> None:
    """List the nets and the trained models, or show one net layer by layer.

    Examples:
      convlens models

      convlens models mnist-4conv

      convlens models small --size 64 --channels 3
    """
    from convlens.models import MODELS, create_model, summarise
    from convlens.shipping.bundle import shipped_models

    if name is None:
        print("nets")
        print_table([(net, first_line(MODELS[net])) for net in MODELS.names()], head=False)
        print("trained models (convlens predict NAME IMAGE)")
        from convlens.runfolder import read_json

        trained_rows: list[Any] = []
        for model, path in shipped_models().items():
            trained = read_json(path / "config.json")["trained"]
            trained_rows.append((model, f"{trained['test']['accuracy']:.2%} on {trained['data']['name']}'s test split"))
        print_table(trained_rows, head=False)
        return
    if name not in MODELS and name in shipped_models():
        print((shipped_models()[name] / "README.md").read_text(encoding="utf-8"))
        return
    usual = getattr(MODELS[name], "usual_shape", (1, 28, 28))
    channels, side = channels or usual[0], size or usual[1]
    net = create_model(name, channels=channels, height=side, width=side, classes=classes)
    layers = summarise(net, channels, side, side)
    rows: list[Any] = [("layer", "kind", "output", "parameters", "MFLOPs", "sees")]
    for layer in layers:
        shape = "x".join(map(str, layer.output_shape))
        field = "all" if layer.receptive_field is None else f"{layer.receptive_field}x{layer.receptive_field}"
        flops = f"{layer.flops / 1e6:.2f}" if layer.flops else "-"
        rows.append(
            (
                layer.name,
                layer.kind,
                shape,
                f"{layer.parameters:,}" if layer.parameters else "-",
                flops,
                field,
            )
        )
    print(f"{name} on {channels}x{side}x{side} images, {classes} classes: {first_line(type(net))}")
    print_table(rows)
    total = sum(layer.parameters for layer in layers)
    print(f"{total:,} parameters, {sum(layer.flops for layer in layers) / 1e6:.1f} MFLOPs forward an image")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show every setting of this recipe.")] = None,
) -> None:
    """List the recipes, or show one as JSON.

    Examples:
      convlens recipes

      convlens recipes mnist-4conv
    """
    from convlens.training.recipes import RECIPES, get_recipe

    if name is not None:
        print(inspect.getdoc(RECIPES[name]), file=sys.stderr)
        print(json.dumps(dataclasses.asdict(get_recipe(name)), indent=2))
        return
    print_table([(recipe, first_line(RECIPES[recipe])) for recipe in RECIPES.names()], head=False)


@data_app.command("list")
def data_list() -> None:
    """List the data sets that are known by name, and where they were found."""
    from convlens.data.fetch import search_path
    from convlens.data.published import DATASETS, whereabouts

    rows = [("data set", "what", "where")]
    rows += [(name, first_line(DATASETS[name]), whereabouts(name)) for name in DATASETS.names()]
    print_table(rows)
    print(f"looked in: {', '.join(map(str, search_path()))}")


@data_app.command("info")
def data_info(
    data: Annotated[str, typer.Argument(help="A data set by name, a folder of class folders, or a .npz file.")],
    to: Annotated[Path | None, typer.Option(help="File for the sample grid, instead of DATA-samples.png.")] = None,
    image_size: Annotated[int, typer.Option(min=0, help="Side that a folder's images are fitted to.")] = 0,
    allow_unreadable: Annotated[bool, typer.Option(help="Skip unreadable files, however many.")] = False,
) -> None:
    """Count a data set's images by class, and write a grid of samples as PNG.

    Examples:
      convlens data info mnist

      convlens data info photos/ --to photos.png
    """
    import torch

    from convlens.data.catalog import load_dataset
    from convlens.data.folder import image_sizes
    from convlens.reporting.plots import draw_images, pick_samples

    if to is not None and (to.exists() or to.suffix.lower() != ".png"):
        raise UsageError(f"--to {to}: " + ("that file exists" if to.exists() else "the name must end in .png"))
    dataset = load_dataset(data, image_size=image_size, allow_unreadable=allow_unreadable)
    channels, height, width = dataset.shape
    print(f"{dataset.name}: images {channels}x{height}x{width} (C x H x W), {len(dataset.classes)} classes")
    print(dataset.note)
    counts = {
        name: torch.bincount(split.labels, minlength=len(dataset.classes)).tolist()
        for name, split in dataset.splits.items()
    }
    rows = [("class", *counts)]
    rows += [(label, *(f"{c[i]:,}" for c in counts.values())) for i, label in enumerate(dataset.classes)]
    rows.append(("total", *(f"{sum(c):,}" for c in counts.values())))
    print_table(rows)
    for file in dataset.unreadable:
        print(f"unreadable: {file}")
    if Path(data).is_dir() and dataset.source == str(Path(data).resolve()):
        sizes = ["{} x {}".format(*size) for size in image_sizes(data)]
        print(
            f"files are {sizes[0]} to {sizes[-1]} pixels (width x height), half of them over {sizes[len(sizes) // 2]}"
        )
    target = to or free_name(f"{dataset.name}-samples")
    train = dataset.train
    chosen = pick_samples(train.labels, len(dataset.classes))
    captions = [dataset.classes[label] for label in train.labels[chosen].tolist()]
    draw_images(target, train.images[chosen], captions, f"{dataset.name}: training images")
    print(f"samples {target}")


def free_name(stem: str) -> Path:
    """Return STEM.png, or the first of STEM-2.png, STEM-3.png, ... that does not exist."""
    path, number = Path(f"{stem}.png"), 1
    while path.exists():
        number += 1
        path = Path(f"{stem}-{number}.png")
    return path


def fail(error: BaseException, message: str, code: int, *, debug: bool) -> NoReturn:
    """Print one line on standard error and leave with ``code``; with ``debug`` the traceback too."""
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"convlens: {message}", file=sys.stderr)
    raise SystemExit(code)


def leave(*_: object) -> NoReturn:
    """Leave at once: Ctrl-C while nothing is at stake, such as an import that must not be cut in two."""
    print("convlens: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def main() -> None:
    """Run the command; every error becomes one line and its exit code. ``--debug`` may stand anywhere."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, leave)
    try:
        code = app(arguments, standalone_mode=False)
        raise SystemExit(code if isinstance(code, int) else 0)
    except ConvlensError as error:
        fail(error, str(error), error.exit_code, debug=debug)
    except ParseError as error:
        if not error.format_message():  # no verb at all: the help has been shown
            raise SystemExit(2) from None
        fail(error, error.format_message(), 2, debug=debug)
    except (KeyboardInterrupt, typer.Abort) as error:
        fail(error, "interrupted", 130, debug=debug)
    except (OSError, MemoryError) as error:
        fail(error, str(error) or "out of memory", 1, debug=debug)
    except Exception as error:
        what = str(error).split("\n", 1)[0]
        fail(error, f"unexpected {type(error).__name__}: {what} (--debug shows where)", 1, debug=debug)
