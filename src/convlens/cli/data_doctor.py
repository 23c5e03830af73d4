"""``convlens data doctor``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.options import Data, ImageSize
from convlens.cli.output import Format, describe_findings
from convlens.cli.signals import restore_sigint
from convlens.cli.startup import gc_paused
from convlens.errors import UsageError
from convlens.system.text import quoted


def data_doctor(
    data: Data,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Check labels by training a few models.")] = True,
    out: Annotated[Path | None, typer.Option(help="New folder for doctor.json and image grids.")] = None,
    exclude_file: Annotated[
        Path | None, typer.Option(help="New file that lists the images to leave out, for `train --exclude`.")
    ] = None,
    format: Annotated[Format, typer.Option(help="Output format: text or json.")] = Format.text,
    image_size: ImageSize = 0,
) -> None:
    """Check a data set for duplicates, leaks between splits, odd images and label issues. Changes nothing.

    Examples:
      convlens data doctor photos/ --out doctor/

      convlens data doctor mnist --exclude-file remove.txt

      convlens train mnist --exclude remove.txt
    """
    if format is Format.csv:
        raise UsageError("`format` of data doctor is text or json")
    with gc_paused():
        from convlens.audit.audit import audit, require_new_outputs, write_exclude_file, write_report
        from convlens.data.loading import load_dataset
        from convlens.system.device import set_num_threads

    restore_sigint()
    for name, path in (("out", out), ("exclude_file", exclude_file)):
        if path is not None:
            require_new_outputs(path, data, name)
    set_num_threads()
    dataset = load_dataset(data, image_size=image_size, allow_unreadable=True)
    findings = audit(dataset, labels=labels)
    if format is Format.json:
        print(json.dumps(findings.to_json(), indent=2, ensure_ascii=False))
    else:
        for line in describe_findings(findings):
            print(line)
    if out is not None:
        write_report(findings, dataset, out)
    if exclude_file is not None:
        number = write_exclude_file(findings, dataset, exclude_file)
        message = f"nothing to leave out: {exclude_file} is empty"
        unreadable = " --allow-unreadable" if dataset.unreadable else ""
        if number:
            message = (
                f"{number:,} images in {exclude_file} (test images are never listed). Look at them first (--out), "
                f"then: convlens train {quoted(data)} --exclude {quoted(exclude_file)}{unreadable}"
            )
        print(message, file=sys.stderr)
