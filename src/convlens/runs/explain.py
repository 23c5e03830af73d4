"""Write the page that explains a model's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convlens.data.images import open_image
from convlens.data.loading import refuse_inside_data
from convlens.errors import ConvlensError, UsageError
from convlens.explain.explanation import Explanation, explain, require_class
from convlens.inference.classifier import Classifier
from convlens.reports.explanation import kernels_panel, make_panels, write_explanations
from convlens.run_dir import RunDir, atomic_dir
from convlens.runs.run import load_training_images
from convlens.system.device import set_num_threads
from convlens.system.files import read_json
from convlens.system.progress import track
from convlens.system.text import cut

MAX_IMAGES = 50  # pictures at a time: a page of them has about 20 MB


def explain_images(
    source: str,
    pictures: Sequence[str],
    out: str | Path | None = None,
    *,
    data: str | None = None,
    raw: bool = False,
    label: str | None = None,
    unit: tuple[str, int, int, int] | None = None,
) -> tuple[Path, list[Explanation], str]:
    """Write ``index.html`` and the pictures of what the net ``source`` sees in each of some files.

    Into ``out``, a new folder, or the next free ``explained/<model>-<n>``. ``data`` says where the training images are
    now, if not where the run says. ``label`` and ``unit`` are those of :func:`convlens.explain.explanation.explain`.
    Returns the folder, the explanations, and why there are no training images beside the pictures, or "". Raises
    UsageError if the folder exists, there are too many pictures or ``data`` are others, BadImage for one that cannot be
    read; then nothing is written.
    """
    if len(pictures) > MAX_IMAGES:
        raise UsageError(f"{len(pictures)} pictures are too many for a page; explain {MAX_IMAGES} at a time")
    if out is not None:
        RunDir.refuse_existing(out)
    refuse_inside_data(out or "explained", data or recorded_source(source))
    set_num_threads()
    classifier = Classifier.load(source)
    if label is not None:
        require_class(label, classifier.classes)
    images = [classifier.preprocess.transform(open_image(file), adapt=not raw) for file in pictures]
    training, missing = None, ""
    try:
        training = load_training_images(source, classifier, data)
    except ConvlensError as error:
        if data is not None:
            raise
        missing = str(error)
    name = Path(source).resolve().name
    folder = Path(out) if out is not None else next_free_dir(Path("explained"), name)
    explanations = [
        explain(classifier, pixels, label=label, unit=unit, training=training)
        for pixels in track(images, "explaining", len(images))
    ]
    with atomic_dir(folder) as new:
        parts = []
        for number, (file, e) in enumerate(
            track(zip(pictures, explanations, strict=True), "drawing", len(pictures)), start=1
        ):
            own = new if len(pictures) == 1 else new / f"{number}-{cut(Path(file).stem)}"
            own.mkdir(exist_ok=True)
            shown = make_panels(e)
            for one in shown:
                one.grid.save(own / one.file)
            parts.append((Path(file).name, progress_line(e), shown))
        itself = kernels_panel(explanations[0].kernels)
        itself.grid.save(new / itself.file)
        parts.append(("The net itself", "", [itself]))
        write_explanations(new / "index.html", f"What {name} sees", parts)
    return folder, explanations, missing


def recorded_source(source: str | Path) -> Any:
    """Return where the data of a run lie, or None for a model that came from elsewhere."""
    run = RunDir(source)
    return read_json(run.config)["data"]["source"] if run.test.is_file() else None


def progress_line(e: Explanation) -> str:
    """Return what the net says in a few sentences."""
    shares = dict(e.prediction.top)
    others = [f"{label} ({share:.1%})" for label, share in e.prediction.top[1:4] if share >= 0.001]
    told = f"The net says: {e.prediction}. " + (
        f"Then come {', '.join(others)}." if others else "Nothing else comes near."
    )
    if e.label != e.prediction.label:
        told += f" You asked about {e.label}: {shares[e.label]:.1%}."
    if np.ptp(e.pixels) == 0:
        told += " What it got of the picture is blank: all of one colour."
    return told


def next_free_dir(parent: Path, name: str) -> Path:
    """Return ``parent/name-n`` with the first n that is free."""
    number = 1
    while (path := parent / f"{name}-{number}").exists():
        number += 1
    return path
