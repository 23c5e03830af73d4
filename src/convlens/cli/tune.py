"""``convlens tune``: a learning rate and a batch size for this machine, and the command that uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convlens.cli.app import app, check_new_file
from convlens.cli.train import with_recipe_flags
from convlens.console import say
from convlens.errors import UsageError, quoted
from convlens.training.recipe import flag


@app.command()
@with_recipe_flags
def tune(
    data: Annotated[
        str, typer.Argument(help="digits, mnist, fashion-mnist, cifar10, a folder of class folders, or a .npz file.")
    ],
    recipe: Annotated[str | None, typer.Option(help="Recipe by name; by default that of the data.")] = None,
    to: Annotated[Path | None, typer.Option(help="File for the picture, instead of DATA-lr.png.")] = None,
    allow_unreadable: Annotated[
        bool, typer.Option("--allow-unreadable", help="Skip unreadable files, however many.")
    ] = False,
    **overrides: Any,
) -> None:
    """Find a batch size and a learning rate for a recipe, from a moment of training, and print the command to use.

    The batch size is the smallest with which this machine is within 5% of its highest pace, as far as memory goes; with
    --batch-size it is that. The learning rate is where the loss falls most steeply in a range test (Smith 2015): 100
    steps from 0.00001 up to 10, or until the loss explodes. Only training images are used. Both are a start: a sweep
    finds better ones.

    Examples:
      convlens tune digits

      convlens tune mnist --recipe mnist-4conv --batch-size 512

      convlens tune photos/ --optimizer adam
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    check_new_file(to, "--to", "png")
    if "lr" in overrides:
        raise UsageError("--lr is what is looked for; leave it away")
    from convlens.cli.data import free_name
    from convlens.data.catalog import load_dataset
    from convlens.experiment import data_name, refuse_inside_data
    from convlens.reporting.plots import draw_range_test
    from convlens.runtime import use_threads
    from convlens.training.recipes import default_recipe, get_recipe
    from convlens.tuning import find_lr, pick_batch, probe_batches, with_lr

    base = (get_recipe(recipe) if recipe else default_recipe(data_name(data))).override(**overrides)
    use_threads(base.threads)
    dataset = load_dataset(data, image_size=base.image_size, allow_unreadable=allow_unreadable)
    target = to or free_name(f"{dataset.name}-lr")
    refuse_inside_data(target, dataset, "--to")
    say(f"data    {dataset.name}: {len(dataset.train):,} training images; recipe {base.name}")
    if "batch_size" not in overrides:
        paces = []
        for pace in probe_batches(dataset, base):
            paces.append(pace)
            say(f"batches of {pace.batch_size:>5}: {pace.images_per_second:>9,.0f} images/s")
        base = base.override(batch_size=pick_batch(paces))
        say(f"batch   {base.batch_size}: larger ones are hardly faster here, or do not fit into memory")
    found = find_lr(dataset, base)
    draw_range_test(target, found.rates, found.losses, found.suggestion)
    rates = with_lr(base, found.suggestion)
    say(f"lr      {rates['lr']:g}: the loss falls most steeply there, and falls up to {found.lowest:.2g}: the best "
        "often lies between, where a sweep finds it")  # fmt: skip
    say(f"picture {target}")
    chosen = {**overrides, "batch_size": base.batch_size, **rates}
    words = [f"{flag(k)} {v:g}" if isinstance(v, float) else f"{flag(k)} {v}" for k, v in chosen.items()
             if not isinstance(v, bool)]  # fmt: skip
    words += [flag(k) if v else f"--no-{flag(k)[2:]}" for k, v in chosen.items() if isinstance(v, bool)]
    named = f" --recipe {recipe}" if recipe else ""
    say(f"train with: convlens train {quoted(data)}{named} {' '.join(words)}")
