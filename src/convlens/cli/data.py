"""``convlens data``: looking at data sets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.app import data_app, gc_paused
from convlens.cli.options import AllowUnreadable, Data, Exclude, check_new_file
from convlens.cli.output import describe_findings, first_line, print_table
from convlens.cli.signals import restore_sigint
from convlens.system.text import quoted

MAX_LINES = 30  # of a table of classes; of more classes the smallest are printed
SMALLEST = 10


@data_app.command("list")
def data_list() -> None:
    """List the data sets that are known by name, and where they were found."""
    from convlens.data.builtin import DATASETS, locate
    from convlens.data.download import search_path

    rows = [("data set", "what", "where")]
    rows += [(name, first_line(DATASETS[name]), locate(name)) for name in DATASETS.names()]
    print_table(rows)
    print(f"looked in: {', '.join(map(str, search_path()))}")


@data_app.command("info")
def data_info(
    data: Data,
    to: Annotated[Path | None, typer.Option(help="File for the sample grid, instead of DATA-samples.png.")] = None,
    image_size: Annotated[int, typer.Option(min=0, help="Side that a folder's images are fitted to.")] = 0,
    allow_unreadable: AllowUnreadable = False,
) -> None:
    """Count a data set's images by class, and write a grid of samples as PNG.

    Examples:
      convlens data info mnist

      convlens data info photos/ --to photos.png
    """
    with gc_paused():
        import torch

        from convlens.data.image_folder import image_sizes
        from convlens.data.loading import load_dataset, refuse_inside_data
        from convlens.data.shards import is_sharded
        from convlens.reports.image_grid import image_grid, pick_samples

    restore_sigint()
    check_new_file(to, "--to", "png")
    dataset = load_dataset(data, image_size=image_size, allow_unreadable=allow_unreadable)
    channels, height, width = dataset.shape
    print(f"{dataset.name}: images {channels}x{height}x{width} (C x H x W), {len(dataset.classes)} classes")
    print(dataset.split_description)
    counts = {
        name: torch.bincount(split.labels, minlength=len(dataset.classes)).tolist()
        for name, split in dataset.splits.items()
    }
    rows = [("class", *counts)]
    shown = list(range(len(dataset.classes)))
    if len(shown) > MAX_LINES:
        print(f"the {SMALLEST} of {len(shown):,} classes with the fewest training images:")
        shown = sorted(shown, key=counts["train"].__getitem__)[:SMALLEST]
    rows += [(dataset.classes[i], *(f"{c[i]:,}" for c in counts.values())) for i in shown]
    rows.append(
        ("all classes" if len(shown) < len(dataset.classes) else "total", *(f"{sum(c):,}" for c in counts.values()))
    )
    print_table(rows)
    for file in dataset.unreadable:
        print(f"unreadable: {file}")
    if Path(data).is_dir() and not is_sharded(data) and dataset.source == str(Path(data).resolve()):
        sizes = ["{} x {}".format(*size) for size in image_sizes(data)]
        print(
            f"files are {sizes[0]} to {sizes[-1]} pixels (width x height), half of them over {sizes[len(sizes) // 2]}"
        )
    target = to or free_name(f"{dataset.name}-samples")
    refuse_inside_data(target, data)
    train = dataset.train
    chosen = pick_samples(train.labels, len(dataset.classes))
    captions = [dataset.classes[label] for label in train.labels[chosen].tolist()]
    image_grid(train.images[chosen], captions, f"{dataset.name}: training images").save(target)
    print(f"samples {target}")


@data_app.command("pack")
def data_pack(
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the shards.")],
    validation: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the training images held out.")] = 0.1,
    image_size: Annotated[int, typer.Option(min=0, help="Side that a folder's images are fitted to.")] = 0,
    shard_images: Annotated[
        int, typer.Option(min=0, show_default=False, help="Images in a shard, instead of 4 MiB of pixels.")
    ] = 0,
    exclude: Exclude = None,
    allow_unreadable: AllowUnreadable = False,
) -> None:
    """Write a data set as tar files that a training reads a few at a time, from a disk or a web server.

    Other readers of WebDataset take them too.

    Examples:
      convlens data pack photos/ --out shards/ --image-size 96

      convlens train shards/

      convlens train https://example.org/shards
    """
    with gc_paused():
        from convlens.data.loading import load_dataset, refuse_inside_data
        from convlens.data.shards import write_shards
        from convlens.run_dir import RunDir
        from convlens.system.files import read_name_list

    restore_sigint()
    RunDir.refuse_existing(out)
    refuse_inside_data(out, data)
    dataset = load_dataset(data, image_size=image_size, allow_unreadable=allow_unreadable)
    if exclude is not None:
        dataset = dataset.drop(read_name_list(exclude))
    index = write_shards(dataset.with_validation(validation, 0), out, shard_images)
    rows = [("split", "images", "shards")]
    for name, split in index["splits"].items():
        rows.append((name, f"{sum(s['images'] for s in split['shards']):,}", f"{len(split['shards']):,}"))
    print_table(rows)
    print(f"train with: convlens train {quoted(out)}")


@data_app.command("doctor")
def data_doctor(
    data: Data,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Judge labels, with some nets.")] = True,
    to: Annotated[Path | None, typer.Option(help="New folder for doctor.json and contact sheets.")] = None,
    list_file: Annotated[Path | None, typer.Option("--list", help="New file for the names of what to remove.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    image_size: Annotated[int, typer.Option(min=0, help="Side that a folder's images are fitted to.")] = 0,
) -> None:
    """Look for what is wrong with a data set: copies, leaks, odd images, likely wrong labels. Changes nothing.

    Examples:
      convlens data doctor photos/ --to doctor/

      convlens data doctor mnist --list remove.txt

      convlens train mnist --exclude remove.txt
    """
    with gc_paused():
        from convlens.audit.audit import audit, require_new_outputs, write_exclude_file, write_report
        from convlens.data.loading import load_dataset
        from convlens.system.device import set_num_threads

    restore_sigint()
    for name, path in (("out", to), ("exclude_file", list_file)):
        if path is not None:
            require_new_outputs(path, data, name)
    set_num_threads()
    dataset = load_dataset(data, image_size=image_size, allow_unreadable=True)
    findings = audit(dataset, labels=labels)
    if as_json:
        print(json.dumps(findings.to_json(), indent=2, ensure_ascii=False))
    else:
        for line in describe_findings(findings):
            print(line)
    if to is not None:
        write_report(findings, dataset, to)
    if list_file is not None:
        number = write_exclude_file(findings, dataset, list_file)
        told = f"nothing to leave out: {list_file} is empty"
        unreadable = " --allow-unreadable" if dataset.unreadable else ""
        if number:
            told = (
                f"{number:,} images in {list_file} (test images are never listed). Look at them first (--to), then: "
                f"convlens train {quoted(data)} --exclude {quoted(list_file)}{unreadable}"
            )
        print(told, file=sys.stderr)


def free_name(stem: str) -> Path:
    """Return STEM.png, or the first of STEM-2.png, STEM-3.png, ... that does not exist."""
    path, number = Path(f"{stem}.png"), 1
    while path.exists():
        number += 1
        path = Path(f"{stem}-{number}.png")
    return path
