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
from convlens.run_dir import RunDir, atomic_dir, next_free_path, require_new_path
from convlens.runs.run import load_training_images
from convlens.system.device import set_num_threads
from convlens.system.files import read_json
from convlens.system.progress import track
from convlens.system.text import cut

MAX_IMAGES = 50  # of one page, which has about 20 MB


def explain_images(
    source: str,
    images: Sequence[str],
    out: str | Path | None = None,
    *,
    data: str | None = None,
    adapt: bool = True,
    label: str | None = None,
    unit: tuple[str, int, int, int] | None = None,
) -> tuple[Path, list[Explanation], str]:
    """Write a page that explains the predictions for some images, and its images as PNG files.

    Args:
        source: A run folder, a model folder, or a model by name.
        images: Image files, at most 50.
        out: New folder; by default the next free ``explained/<model>-<n>``.
        data: Location of the training images, if they have moved.
        adapt: Bring the images into the form of the training images.
        label: See :func:`convlens.explain.explanation.explain`.
        unit: See :func:`convlens.explain.explanation.explain`.

    Returns:
        The folder, the explanations, and the reason why similar training images are missing, or "".

    Raises:
        UsageError: The folder exists, there are too many images, or ``data`` are not the run's.
        InvalidImageError: An image cannot be read; nothing is written then.
    """
    if len(images) > MAX_IMAGES:
        raise UsageError(f"{len(images)} images are too many for one page; explain {MAX_IMAGES} at a time")
    if out is not None:
        require_new_path(out)
    refuse_inside_data(out or "explained", data or recorded_source(source))
    set_num_threads()
    classifier = Classifier.load(source)
    if label is not None:
        require_class(label, classifier.classes)
    pixels = [classifier.preprocess.transform(open_image(file), adapt=adapt) for file in images]
    training, missing = None, ""
    try:
        training = load_training_images(source, classifier, data)
    except ConvlensError as error:
        if data is not None:
            raise
        missing = str(error)
    name = Path(source).resolve().name
    folder = Path(out) if out is not None else next_free_path(Path("explained") / name, numbered=True)
    explanations = [
        explain(classifier, each, label=label, unit=unit, training=training)
        for each in track(pixels, "explaining", len(pixels))
    ]
    write_page(folder, name, images, explanations)
    return folder, explanations, missing


def write_page(folder: Path, name: str, images: Sequence[str], explanations: Sequence[Explanation]) -> None:
    """Write ``index.html`` and the PNG files of some explanations by the model ``name`` into a new folder."""
    with atomic_dir(folder) as new:
        parts = []
        numbered = enumerate(zip(images, explanations, strict=True), start=1)
        for number, (file, explanation) in track(numbered, "drawing", len(images)):
            own = new if len(images) == 1 else new / f"{number}-{cut(Path(file).stem)}"
            own.mkdir(exist_ok=True)
            shown = make_panels(explanation)
            for part in shown:
                part.grid.save(own / part.file)
            parts.append((Path(file).name, summarize(explanation), shown))
        kernels = kernels_panel(explanations[0].kernels)
        kernels.grid.save(new / kernels.file)
        parts.append(("The model itself", "", [kernels]))
        write_explanations(new / "index.html", f"What {name} sees", parts)


def recorded_source(source: str | Path) -> Any:
    """Return the location of a run's data, or None for a bundle outside a run."""
    run_dir = RunDir(source)
    return read_json(run_dir.config)["data"]["source"] if run_dir.test.is_file() else None


def summarize(explanation: Explanation) -> str:
    """Return a few sentences on a prediction."""
    prediction = explanation.prediction
    others = [f"{label} ({probability:.1%})" for label, probability in prediction.top[1:4] if probability >= 0.001]
    text = f"Prediction: {prediction}. " + (f"Next: {', '.join(others)}." if others else "No other class is likely.")
    if explanation.label != prediction.label:
        text += f" Explained class: {explanation.label} ({dict(prediction.top)[explanation.label]:.1%})."
    if np.ptp(explanation.pixels) == 0:
        text += " The model's input is blank: all pixels have one color."
    return text
