"""The images that a run has wrong, and those it was least sure of, as files."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from convlens.data.loading import refuse_inside_data
from convlens.errors import UnknownNameError, UsageError
from convlens.reports.image_grid import prediction_grid, to_hwc
from convlens.run_dir import atomic_dir
from convlens.runs.evaluate import load_evaluation_data
from convlens.runs.run import Run
from convlens.system.files import write_csv
from convlens.system.progress import track
from convlens.system.text import cut, unique

MAX_GRID_IMAGES = 120  # images on the contact sheet


def write_mistakes(
    source: str | Path,
    to: str | Path | None = None,
    *,
    data: str | None = None,
    doubtful: int = 50,
    true: str | None = None,
    predicted: str | None = None,
) -> tuple[Path, int, int]:
    """Write a contact sheet, ``mistakes.csv`` and a PNG of every wrong test image and of the most doubtful right ones.

    Into ``to``, a new folder, or the run's own ``mistakes``. ``true`` and ``predicted`` limit it to images of that
    class and to those taken for that class. The wrong ones come first, the surest of them before the others; then the
    right ones, the least sure first. Returns the folder and how many are wrong and doubtful. Raises UsageError if the
    folder exists, the data have changed, or those in ``data``, where they are now, are others.
    """
    run = Run(source)
    folder = Path(to) if to is not None else run.path / "mistakes"
    if folder.exists():
        raise UsageError(f"{folder} exists already; choose another place with --to")
    _, dataset = load_evaluation_data(run.path, data)
    refuse_inside_data(folder, dataset)
    for name in (true, predicted):
        if name is not None and name not in dataset.classes:
            raise UnknownNameError("class", name, dataset.classes)
    row = {image: number for number, image in enumerate(dataset.test.ids)}
    answers = [
        answer
        for answer in run.predictions
        if true in (None, answer["label"]) and predicted in (None, answer["prediction"])
    ]
    wrong = [answer for answer in answers if answer["label"] != answer["prediction"]]
    right = [answer for answer in answers if answer["label"] == answer["prediction"]]
    wrong.sort(key=lambda answer: -float(answer["probability"]))
    right.sort(key=lambda answer: float(answer["probability"]))
    chosen = [*wrong, *right[:doubtful]]
    kinds = ["wrong"] * len(wrong) + ["doubtful"] * (len(chosen) - len(wrong))
    names = unique([file_name(answer) for answer in chosen])
    with atomic_dir(folder) as new:
        (new / "images").mkdir()
        for name, answer in track(zip(names, chosen, strict=True), "writing images", len(chosen)):
            Image.fromarray(to_hwc(dataset.test.images[row[answer["id"]]])).save(new / "images" / name)
        if chosen:
            shown = chosen[:MAX_GRID_IMAGES]
            images = dataset.test.images[[row[answer["id"]] for answer in shown]]
            said = [(answer["prediction"], float(answer["probability"]), answer["label"]) for answer in shown]
            more = f"; the first {MAX_GRID_IMAGES} of {len(chosen):,}" if len(chosen) > MAX_GRID_IMAGES else ""
            unsure = f"{len(chosen) - len(wrong):,} right ones that it was least sure of"
            heading = f"{len(wrong):,} wrong, then the {unsure}{more}"
            prediction_grid(images, said, heading).save(new / "mistakes.png")
        columns = ("id", "label", "prediction", "probability")
        rows = [
            (name, *(answer[key] for key in columns), kind)
            for name, answer, kind in zip(names, chosen, kinds, strict=True)
        ]
        write_csv(new / "mistakes.csv", ["file", *columns, "kind"], rows)
    return folder, len(wrong), len(chosen) - len(wrong)


def file_name(answer: dict[str, str]) -> str:
    """Return true_predicted_probability_id.png, with nothing in it that a file name cannot hold."""
    identity = re.sub(r"\.\w{1,5}$", "", answer["id"])
    parts = (answer["label"], answer["prediction"], f"{float(answer['probability']):.3f}", identity)
    return "_".join(cut(re.sub(r"[^\w.-]+", "-", part)) for part in parts) + ".png"
