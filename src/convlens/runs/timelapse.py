"""Write the timelapse page of a run that kept snapshots."""

from __future__ import annotations

from pathlib import Path

from convlens.data.images import open_image
from convlens.data.loading import refuse_inside_data
from convlens.explain.timelapse import MAX_IMAGES, replay
from convlens.inference.classifier import Classifier
from convlens.runs.evaluate import load_evaluation_data
from convlens.runs.explain import recorded_source
from convlens.runs.run import Run
from convlens.system.device import set_num_threads


def write_timelapse_page(
    source: str | Path,
    picture: str | None = None,
    out: str | Path | None = None,
    *,
    gif: str | Path | None = None,
    data: str | None = None,
    raw: bool = False,
) -> tuple[Path, int]:
    """Write a page with a slider over the snapshots of a run: filters, feature maps, verdict, confusion matrix.

    To ``out``, or ``timelapse.html`` in the run's folder; with ``gif`` an animated picture too. It follows ``picture``,
    a file, or else the first image held out. The snapshots are asked about images held out for validation, or, where
    there were none, training images. Returns the file and how many snapshots there were. Raises UsageError if the run
    kept none or its data have changed.
    """
    from convlens.reports.timelapse import write_animation, write_timelapse  # matplotlib takes half a second

    run = Run(source)
    page = Path(out) if out is not None else run.path / "timelapse.html"
    set_num_threads()
    for place, field in ((page, "out"), (gif, "gif")):
        if place is not None:
            refuse_inside_data(place, data or recorded_source(source), field)
    bundle, dataset = load_evaluation_data(run.path, data)
    recipe = run.config["recipe"]
    held_out = dataset.with_validation(recipe["val_fraction"], recipe["seed"]).validation
    asked = dataset.train if held_out is None else held_out
    classifier = Classifier(bundle)
    if picture is None:
        pixels, name = asked.images[0].numpy(), f"an image of “{dataset.classes[int(asked.labels[0])]}”"
    else:
        pixels, name = classifier.preprocess.transform(open_image(picture), adapt=not raw), Path(picture).name
    moments = replay(classifier, run.folder, pixels, asked)
    about = {
        "name": run.path.resolve().name,
        "data": dataset.name,
        "model": bundle.architecture.name,
        "classes": list(dataset.classes),
        "image": name,
        "images": f"{min(MAX_IMAGES, len(asked)):,} {'training' if held_out is None else 'validation'} images",
    }
    write_timelapse(page, moments, pixels, about)
    if gif is not None:
        write_animation(Path(gif), moments, pixels, about)
    return page, len(moments)
