"""``convlens data info``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convlens.cli.options import AllowUnreadable, Data, ImageSize, check_new_file
from convlens.cli.output import print_table
from convlens.cli.signals import restore_sigint
from convlens.cli.startup import gc_paused

if TYPE_CHECKING:
    from convlens.data.dataset import Dataset

MAX_LINES = 30  # of a table of classes; with more classes only the smallest are printed
SMALLEST = 10


def data_info(
    data: Data,
    out: Annotated[Path | None, typer.Option(help="File for the sample grid (default: DATA-samples.png).")] = None,
    image_size: ImageSize = 0,
    allow_unreadable: AllowUnreadable = False,
) -> None:
    """Count a data set's images by class, and write a grid of samples as PNG.

    Examples:
      convlens data info mnist

      convlens data info photos/ --out photos.png
    """
    with gc_paused():
        from convlens.data.image_folder import image_sizes
        from convlens.data.loading import load_dataset, refuse_inside_data
        from convlens.data.shards import is_sharded
        from convlens.reports.image_grid import image_grid, pick_samples
        from convlens.run_dir import next_free_path

    restore_sigint()
    check_new_file(out, "--out", "png")
    dataset = load_dataset(data, image_size=image_size, allow_unreadable=allow_unreadable)
    channels, height, width = dataset.shape
    print(f"{dataset.name}: images {channels}x{height}x{width} (C x H x W), {len(dataset.classes)} classes")
    print(dataset.split_description)
    print_class_counts(dataset)
    for file in dataset.unreadable:
        print(f"unreadable: {file}")
    if Path(data).is_dir() and not is_sharded(data) and dataset.source == str(Path(data).resolve()):
        sizes = ["{} x {}".format(*size) for size in image_sizes(data)]
        print(f"files: {sizes[0]} to {sizes[-1]} pixels (width x height), median {sizes[len(sizes) // 2]}")
    target = out or next_free_path(Path(f"{dataset.name}-samples.png"))
    refuse_inside_data(target, data)
    train = dataset.train
    chosen = pick_samples(train.labels, len(dataset.classes))
    captions = [dataset.classes[label] for label in train.labels[chosen].tolist()]
    image_grid(train.images[chosen], captions, f"{dataset.name}: training images").save(target)
    print(f"samples {target}")


def print_class_counts(dataset: Dataset) -> None:
    """Print the number of images of each class in each split."""
    import torch

    classes = dataset.classes
    counts = {
        name: torch.bincount(split.labels, minlength=len(classes)).tolist() for name, split in dataset.splits.items()
    }
    rows = [("class", *counts)]
    shown = list(range(len(classes)))
    if len(shown) > MAX_LINES:
        print(f"the {SMALLEST} of {len(shown):,} classes with the fewest training images:")
        shown = sorted(shown, key=counts["train"].__getitem__)[:SMALLEST]
    rows += [(classes[i], *(f"{c[i]:,}" for c in counts.values())) for i in shown]
    rows.append(("all classes" if len(shown) < len(classes) else "total", *(f"{sum(c):,}" for c in counts.values())))
    print_table(rows)
