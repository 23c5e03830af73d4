"""``convlens data pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.options import AllowUnreadable, Data, Exclude, ImageSize
from convlens.cli.output import print_table
from convlens.cli.signals import restore_sigint
from convlens.cli.startup import gc_paused
from convlens.system.text import quoted


def data_pack(
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the shards.")],
    val_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Fraction of the training images held out for validation.")
    ] = 0.1,
    image_size: ImageSize = 0,
    shard_images: Annotated[
        int, typer.Option(min=0, show_default=False, help="Images per shard, instead of 4 MiB of pixels.")
    ] = 0,
    exclude: Exclude = None,
    allow_unreadable: AllowUnreadable = False,
) -> None:
    """Pack a data set into tar files (WebDataset) that training streams from a disk or a web server.

    Examples:
      convlens data pack photos/ --out shards/ --image-size 96

      convlens train shards/

      convlens train https://example.org/shards
    """
    with gc_paused():
        from convlens.data.loading import load_dataset, refuse_inside_data
        from convlens.data.shards import write_shards
        from convlens.run_dir import require_new_path
        from convlens.system.files import read_name_list

    restore_sigint()
    require_new_path(out)
    refuse_inside_data(out, data)
    dataset = load_dataset(data, image_size=image_size, allow_unreadable=allow_unreadable)
    if exclude is not None:
        dataset = dataset.drop(read_name_list(exclude))
    index = write_shards(dataset.with_validation(val_fraction, 0), out, shard_images)
    rows = [("split", "images", "shards")]
    for name, split in index["splits"].items():
        rows.append((name, f"{sum(s['images'] for s in split['shards']):,}", f"{len(split['shards']):,}"))
    print_table(rows)
    print(f"train with: convlens train {quoted(out)}")
