"""``convlens lr-find``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convlens.cli.options import AllowUnreadable, Data, check_new_file, given_overrides, with_recipe_flags
from convlens.cli.output import echo
from convlens.cli.signals import restore_sigint
from convlens.cli.startup import gc_paused
from convlens.errors import UsageError
from convlens.system.text import quoted
from convlens.training.recipe import flag

if TYPE_CHECKING:
    from convlens.training.throughput import Throughput


@with_recipe_flags
def lr_find(
    data: Data,
    recipe: Annotated[str | None, typer.Option(help="Recipe by name (default: that of the data).")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the plot (default: DATA-lr.png).")] = None,
    allow_unreadable: AllowUnreadable = False,
    **overrides: Any,
) -> None:
    """Suggest a batch size and a learning rate for a recipe, and print the command that uses them.

    The batch size is the smallest one that reaches 95% of this machine's highest training speed, as far as memory
    allows and with at least 10 steps per epoch; --batch-size sets it instead. The learning rate is the geometric mean
    of the rate at which the loss falls most steeply and the rate at which it is lowest, in a range test (Smith 2015) of
    100 steps from 0.00001 to 10. Only training images are used. Compare both with the recipe's own in a sweep.

    Examples:
      convlens lr-find digits

      convlens lr-find mnist --recipe mnist-4conv --batch-size 512

      convlens lr-find photos/ --optimizer adam
    """
    overrides = given_overrides(overrides)
    check_new_file(out, "--out", "png")
    if "lr" in overrides:
        raise UsageError("lr-find suggests --lr; leave it out")
    with gc_paused():
        from convlens.data.loading import data_name, load_dataset, refuse_inside_data
        from convlens.reports.plots import draw_range_test
        from convlens.run_dir import next_free_path
        from convlens.system.device import set_num_threads
        from convlens.training.build import drop_unsupported_options
        from convlens.training.lr_finder import find_lr, with_lr
        from convlens.training.pretrained import reject_pretrained
        from convlens.training.recipes import default_recipe, get_recipe
        from convlens.training.throughput import pick_batch, probe_batches

    own = get_recipe(recipe) if recipe else default_recipe(data_name(data))
    restore_sigint()
    base = drop_unsupported_options(own.override(**overrides), overrides)
    reject_pretrained(base, "lr-find")
    set_num_threads(base.threads)
    dataset = load_dataset(data, image_size=base.image_size, allow_unreadable=allow_unreadable)
    target = out or next_free_path(Path(f"{dataset.name}-lr.png"))
    refuse_inside_data(target, dataset)
    echo(f"data    {dataset.name}: {len(dataset.train):,} training images; recipe {base.name}")
    if "batch_size" not in overrides:
        paces, limit = probe_batches(dataset, base, lambda pace: echo(describe_throughput(pace)))
        size = pick_batch(paces)
        if size < paces[-1].batch_size:
            limit = f"larger ones, up to {paces[-1].batch_size}, are at most about 5% faster here"
        echo(f"batch   {size}: {limit}")
        base = base.override(batch_size=size)
    found = find_lr(dataset, base)
    rates = with_lr(base, found.suggestion)
    marks = [("suggested", rates["lr"]), ("steepest descent", found.steepest), ("lowest loss", found.lowest)]
    draw_range_test(target, found.rates, found.losses, [*marks, ("the recipe's own", own.lr)][: 3 + (own.lr > 0)])
    echo(
        f"lr      {rates['lr']:g}: between the steepest descent of the loss at {found.steepest:.2g} and its minimum at "
        f"{found.lowest:.2g}"
    )
    echo(f"        the recipe's own is {own.lr:g}, for batches of {own.batch_size}; a sweep compares them")
    echo(f"plot    {target}")
    chosen = {**overrides, "batch_size": base.batch_size, **rates}
    words = [word for name, value in chosen.items() for word in format_flag(name, value)]
    words += ["--allow-unreadable"] * allow_unreadable
    named = f" --recipe {recipe}" if recipe else ""
    echo(f"train with: convlens train {quoted(data)}{named} {' '.join(words)}")


def format_flag(name: str, value: Any) -> list[str]:
    """Return the words of a recipe flag on a command line."""
    if isinstance(value, bool):
        return [flag(name) if value else f"--no-{flag(name)[2:]}"]
    return [flag(name), f"{value:g}" if isinstance(value, float) else quoted(str(value))]


def describe_throughput(pace: Throughput) -> str:
    """Return the line of a batch size, with its speed to two digits, which is the precision of the timing."""
    return f"batches of {pace.batch_size:>5}: about {float(f'{pace.training:.2g}'):>9,.0f} images/s"
