"""``convlens tune``: a learning rate and a batch size for this machine, and the command that uses them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convlens.cli.app import app, gc_paused
from convlens.cli.options import AllowUnreadable, Data, check_new_file
from convlens.cli.output import echo
from convlens.cli.signals import restore_sigint
from convlens.cli.train import with_recipe_flags
from convlens.errors import UsageError
from convlens.system.text import quoted
from convlens.training.recipe import flag

if TYPE_CHECKING:
    from convlens.training.throughput import Throughput


@app.command()
@with_recipe_flags
def lr_find(
    data: Data,
    recipe: Annotated[str | None, typer.Option(help="Recipe by name; by default that of the data.")] = None,
    to: Annotated[Path | None, typer.Option(help="File for the picture, instead of DATA-lr.png.")] = None,
    allow_unreadable: AllowUnreadable = False,
    **overrides: Any,
) -> None:
    """Find a batch size and a learning rate for a recipe, from a moment of training, and print the command to use.

    The batch size is the smallest with which this machine is within 5% of its highest pace, as far as memory goes and
    an epoch keeps 10 steps; with --batch-size it is that. The learning rate lies between the one at which the loss
    falls most steeply and the one at which it is lowest (their geometric mean), in a range test (Smith 2015): 100 steps
    from 0.00001 up to 10, or until the loss explodes. Only training images are used. Both are a start: the recipe's own
    rate may be better, and a sweep compares.

    Examples:
      convlens tune digits

      convlens tune mnist --recipe mnist-4conv --batch-size 512

      convlens tune photos/ --optimizer adam
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    check_new_file(to, "--to", "png")
    if "lr" in overrides:
        raise UsageError("--lr is what is looked for; leave it out")
    from convlens.cli.data import free_name

    with gc_paused():
        from convlens.data.loading import data_name, load_dataset, refuse_inside_data
        from convlens.reports.plots import draw_range_test
        from convlens.system.device import set_num_threads
        from convlens.training.build import drop_unsupported_options
        from convlens.training.lr_finder import find_lr, with_lr
        from convlens.training.pretrained import reject_pretrained
        from convlens.training.recipes import default_recipe, get_recipe
        from convlens.training.throughput import pick_batch, probe_batches

    own = get_recipe(recipe) if recipe else default_recipe(data_name(data))
    restore_sigint()
    base = drop_unsupported_options(own.override(**overrides), overrides)
    reject_pretrained(base, "tune")
    set_num_threads(base.threads)
    dataset = load_dataset(data, image_size=base.image_size, allow_unreadable=allow_unreadable)
    target = to or free_name(f"{dataset.name}-lr")
    refuse_inside_data(target, dataset)
    echo(f"data    {dataset.name}: {len(dataset.train):,} training images; recipe {base.name}")
    if "batch_size" not in overrides:
        paces, limit = probe_batches(dataset, base, lambda pace: echo(describe_pace(pace)))
        size = pick_batch(paces)
        if size < paces[-1].batch_size:
            limit = f"larger ones, up to {paces[-1].batch_size}, are hardly faster here (about 5% at most)"
        echo(f"batch   {size}: {limit}")
        base = base.override(batch_size=size)
    found = find_lr(dataset, base)
    rates = with_lr(base, found.suggestion)
    marks = [("suggested", rates["lr"]), ("steepest descent", found.steepest), ("lowest loss", found.lowest)]
    draw_range_test(target, found.rates, found.losses, [*marks, ("the recipe's own", own.lr)][: 3 + (own.lr > 0)])
    echo(f"lr      {rates['lr']:g}: between where the loss fell most steeply, {found.steepest:.2g}, and where it was "
        f"lowest, {found.lowest:.2g}")  # fmt: skip
    echo(f"        the recipe's own is {own.lr:g}, for batches of {own.batch_size}: a sweep compares them")
    echo(f"picture {target}")
    chosen = {**overrides, "batch_size": base.batch_size, **rates}
    words = [f"{flag(k)} {v:g}" if isinstance(v, float) else f"{flag(k)} {quoted(str(v))}" for k, v in chosen.items()
             if not isinstance(v, bool)]  # fmt: skip
    words += [flag(k) if v else f"--no-{flag(k)[2:]}" for k, v in chosen.items() if isinstance(v, bool)]
    words += ["--allow-unreadable"] * allow_unreadable
    named = f" --recipe {recipe}" if recipe else ""
    echo(f"train with: convlens train {quoted(data)}{named} {' '.join(words)}")


def describe_pace(pace: Throughput) -> str:
    """Return the line of a batch size: "batches of    64: about    12,000 images/s"; timings tell no more than that."""
    return f"batches of {pace.batch_size:>5}: about {float(f'{pace.training:.2g}'):>9,.0f} images/s"
