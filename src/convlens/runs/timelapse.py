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
    image: str | None = None,
    out: str | Path | None = None,
    *,
    gif: str | Path | None = None,
    data: str | None = None,
    adapt: bool = True,
) -> tuple[Path, int]:
    """Write a page with a slider over the snapshots: filters, feature maps, prediction, confusion matrix.

    The confusion matrices are of validation images, or of training images if the run held none out.

    Args:
        source: Folder of a run that was trained with ``save_snapshots=True``.
        image: Image file to follow; by default the first validation image.
        out: File of the page; by default ``timelapse.html`` in the run folder.
        gif: File for an animation.
        data: Location of the run's data, if they have moved.
        adapt: Bring the image into the form of the training images.

    Returns:
        The file and the number of snapshots.

    Raises:
        UsageError: The run kept no snapshots, or its data have changed.
    """
    from convlens.reports.timelapse import write_animation, write_timelapse  # matplotlib takes half a second

    run = Run(source)
    page = Path(out) if out is not None else run.path / "timelapse.html"
    set_num_threads()
    for target, name in ((page, "out"), (gif, "gif")):
        if target is not None:
            refuse_inside_data(target, data or recorded_source(source), name)
    bundle, dataset = load_evaluation_data(run.path, data)
    recipe = run.config["recipe"]
    held_out = dataset.with_validation(recipe["val_fraction"], recipe["seed"]).validation
    asked = dataset.train if held_out is None else held_out
    classifier = Classifier(bundle)
    if image is None:
        pixels, name = asked.images[0].numpy(), f"an image of “{dataset.classes[int(asked.labels[0])]}”"
    else:
        pixels, name = classifier.preprocess.transform(open_image(image), adapt=adapt), Path(image).name
    moments = replay(classifier, run.run_dir, pixels, asked)
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
