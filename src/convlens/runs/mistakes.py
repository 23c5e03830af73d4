"""Write the misclassified and the most uncertain test images of a run as files."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from convlens.data.dataset import Split
from convlens.data.loading import refuse_inside_data
from convlens.errors import UnknownNameError
from convlens.reports.image_grid import prediction_grid, to_hwc
from convlens.run_dir import atomic_dir, require_new_path
from convlens.runs.evaluate import load_evaluation_data
from convlens.runs.run import Run
from convlens.system.files import write_csv
from convlens.system.progress import track
from convlens.system.text import cut, unique

MAX_GRID_IMAGES = 120


def write_mistakes(
    source: str | Path,
    out: str | Path | None = None,
    *,
    data: str | None = None,
    uncertain: int = 50,
    true: str | None = None,
    predicted: str | None = None,
) -> tuple[Path, int, int]:
    """Write an image grid, ``mistakes.csv`` and a PNG of each misclassified and each uncertain test image.

    The misclassified images come first, the most confident ones before the others; then the correctly classified
    ones, the least confident first.

    Args:
        source: Folder of a finished run.
        out: New folder; by default ``mistakes`` in the run folder.
        data: Location of the run's data, if they have moved.
        uncertain: Number of correctly classified images.
        true: Only images of this class.
        predicted: Only images predicted as this class.

    Returns:
        The folder, the number of misclassified images, and the number of uncertain images.

    Raises:
        UsageError: The folder exists, or the data have changed.
    """
    run = Run(source)
    folder = Path(out) if out is not None else run.path / "mistakes"
    require_new_path(folder)
    _, dataset = load_evaluation_data(run.path, data)
    refuse_inside_data(folder, dataset)
    for name in (true, predicted):
        if name is not None and name not in dataset.classes:
            raise UnknownNameError("class", name, dataset.classes)
    rows = [
        row
        for row in run.predictions
        if true in (None, row["true_label"]) and predicted in (None, row["predicted_label"])
    ]
    wrong = [row for row in rows if row["true_label"] != row["predicted_label"]]
    correct = [row for row in rows if row["true_label"] == row["predicted_label"]]
    wrong.sort(key=lambda row: -float(row["confidence"]))
    correct.sort(key=lambda row: float(row["confidence"]))
    chosen = [*wrong, *correct[:uncertain]]
    with atomic_dir(folder) as new:
        write_images(new, dataset.test, chosen, len(wrong))
    return folder, len(wrong), len(chosen) - len(wrong)


def write_images(folder: Path, test: Split, rows: list[dict[str, str]], num_wrong: int) -> None:
    """Write the PNG files, the grid and the CSV of some rows of ``predictions.csv``, misclassified ones first."""
    position = {image: number for number, image in enumerate(test.ids)}
    files = unique([file_name(row) for row in rows])
    kinds = ["misclassified"] * num_wrong + ["uncertain"] * (len(rows) - num_wrong)
    (folder / "images").mkdir()
    for file, row in track(zip(files, rows, strict=True), "writing images", len(rows)):
        Image.fromarray(to_hwc(test.images[position[row["image_id"]]])).save(folder / "images" / file)
    if rows:
        shown = rows[:MAX_GRID_IMAGES]
        images = test.images[[position[row["image_id"]] for row in shown]]
        labels = [(row["predicted_label"], float(row["confidence"]), row["true_label"]) for row in shown]
        more = f"; the first {MAX_GRID_IMAGES} of {len(rows):,}" if len(rows) > MAX_GRID_IMAGES else ""
        heading = f"{num_wrong:,} misclassified, then {len(rows) - num_wrong:,} uncertain{more}"
        prediction_grid(images, labels, heading).save(folder / "mistakes.png")
    columns = list(rows[0]) if rows else ["image_id", "true_label", "predicted_label", "confidence"]
    table = [(file, kind, *row.values()) for file, row, kind in zip(files, rows, kinds, strict=True)]
    write_csv(folder / "mistakes.csv", ["file", "kind", *columns], table)


def file_name(row: dict[str, str]) -> str:
    """Return true_predicted_confidence_id.png, without characters that a file name cannot have."""
    image = re.sub(r"\.\w{1,5}$", "", row["image_id"])
    parts = (row["true_label"], row["predicted_label"], f"{float(row['confidence']):.3f}", image)
    return "_".join(cut(re.sub(r"[^\w.-]+", "-", part)) for part in parts) + ".png"
