"""The report of a run: ``report.html``, a self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from convlens.evaluation.report import TestReport
from convlens.inference.model_card import TEST_LOGGED, TEST_UNSEEN
from convlens.reports.html import make_cards, make_figures, write_page
from convlens.run_dir import RunDir
from convlens.system.files import read_json

MAX_ROWS = 100  # of the table of classes

NUM_WORST = 20  # classes in the table if there are more than MAX_ROWS

PLOTS = {
    "confusion.png": "Rows are true classes, columns are predicted classes; the diagonal is correct.",
    "mistakes.png": "Predicted class, confidence and true class.",
    "calibration.png": "Points on the dotted line are perfectly calibrated. Bars are 95% intervals, which are long for "
    "few images.",
    "curves.png": "Loss and accuracy over the epochs. Training metrics are measured on the augmented images, during "
    "the epoch.",
    "filters.png": "The patterns that the filters of the first layer respond to.",
    "samples.png": "Images of the training split with their classes.",
    "augmented.png": "The same images after the augmentation of the recipe.",
}


def write_report(folder: RunDir, drawn: Mapping[str, str]) -> None:
    """Write ``report.html`` from the config, the metrics and the test report of a run.

    Args:
        folder: The run.
        drawn: File name of a plot -> the plot as HTML.
    """
    config, test, metrics = (
        read_json(folder.config),
        TestReport.from_json(read_json(folder.test)),
        folder.read_metrics(),
    )
    data, recipe, machine = config["data"], config["recipe"], config["machine"]
    counts = ", ".join(f"{count:,} {split}" for split, count in data["counts"].items())
    body = f"""\
<p class=quiet>{escape(data["name"])}: {counts} images of {" x ".join(map(str, reversed(data["shape"][1:])))} pixels;
{escape(data["split_description"])}. Recipe {escape(recipe["name"])}, seed {recipe["seed"]}.</p>
<p><code>{escape(config["command"])}</code></p>
<section class=cards>{make_cards(list_cards(config, test, metrics))}</section>
{unreadable_note(data["unreadable"])}
<section class=wide><h2>Reliability</h2><ul>{reliability_items(test)}</ul></section>
<div class=plots>{make_figures(drawn, PLOTS)}</div>
<section class=wide><h2>Classes</h2>{class_table(test)}</section>
<section class=wide><details><summary>Epochs</summary>{epoch_table(metrics)}</details></section>
<section class=wide><details><summary>Recipe and machine</summary>
{pairs_table({**recipe, **machine})}</details></section>
<p class=quiet>{TEST_LOGGED if recipe["log_test_metrics"] else TEST_UNSEEN} The interval covers the sampling of test
images only; another seed gives another model.</p>
"""
    write_page(folder.report, folder.path.name, body)


def list_cards(
    config: Mapping[str, Any], test: TestReport, metrics: list[dict[str, float | None]]
) -> list[tuple[str, str, str]]:
    """Return the cards at the top of the report: name, value and note."""
    low, high = test.accuracy_ci95
    epochs = f"{len(metrics)} epoch{'s' * (len(metrics) != 1)}"
    cards = [
        ("test accuracy", f"{test.accuracy:.2%}", f"95% interval {low:.2%} to {high:.2%}, n = {test.num_images:,}"),
        (
            "training",
            format_seconds(metrics[-1]["seconds"] or 0.0),
            f"{epochs} on {config['machine']['device_name']}",
        ),
        ("parameters", f"{config['model']['parameters']:,}", f"model {config['model']['name']}"),
        ("test loss", f"{test.loss:.4f}", "mean cross-entropy, in nats"),
    ]
    if tta := test.test_time_augmentation:
        low, high = tta.accuracy_ci95
        note = f"mean over translated and mirrored views; 95% interval {low:.2%} to {high:.2%}"
        cards.append(("with test-time augmentation", f"{tta.accuracy:.2%}", note))
    return cards


def reliability_items(test: TestReport) -> str:
    """Return what the test shows, in words for non-statisticians, as list items."""
    low, high = test.accuracy_ci95
    items = [
        f"The model classified {test.correct:,} of {test.num_images:,} unseen images correctly. Its accuracy on all "
        f"images of this kind is between {low:.2%} and {high:.2%}, with 95% confidence.",
        f"Balanced accuracy, in which every class counts the same, is {test.balanced_accuracy:.2%}. Macro-F1, which "
        f"also counts false positives, is {test.macro_f1:.2%}.",
    ]
    if (calibration := test.calibration) and (conformal := test.conformal) and test.in_distribution_rate is not None:
        before, after = calibration.before, calibration.after
        change = f"{before.ece:.2%} before temperature scaling by {calibration.temperature:.2f}"
        if calibration.temperature == 1:
            change = "no temperature scaling: the validation images show no significant gain"
        items += [
            f"The expected calibration error is {after.ece:.2%} ({change}). Brier score {after.brier_score:.4f}, "
            f"before {before.brier_score:.4f}; 0 is perfect.",
            f"Prediction sets with a target coverage of {conformal.target_coverage:.0%} contained the true class for "
            f"{conformal.empirical_coverage:.1%} of the images; their mean size is {conformal.mean_set_size:.2f} "
            "classes.",
            f"The model reports {1 - test.in_distribution_rate:.1%} of these images as unknown; the threshold was set "
            "to 5% of the validation images. Images of other things are reported as unknown far more often, but not "
            "always.",
        ]
    else:
        items.append(
            "There were no validation images: the probabilities are not calibrated, and the model assigns one of its "
            "classes to every image, even to one that shows none of them."
        )
    return "".join(f"<li>{escape(item)}</li>" for item in items)


def format_seconds(seconds: float) -> str:
    """Return a duration for people.

    >>> format_seconds(9.53), format_seconds(200)
    ('9.5 s', '3 min 20 s')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table; the cells are escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def class_table(test: TestReport) -> str:
    """Return the metrics of every class as a table; of many classes, only those with the lowest F1."""
    classes, note = test.classes, ""
    if len(classes) > MAX_ROWS:
        note = f"<p>The {NUM_WORST} of {len(classes):,} classes with the lowest F1; test.json has all.</p>"
        classes = test.worst_classes(NUM_WORST)
    rows = [
        [name, f"{c.precision:.2%}", f"{c.recall:.2%}", f"{c.f1:.2%}", f"{c.support:,}"] for name, c in classes.items()
    ]
    return note + table(["class", "precision", "recall", "F1", "test images"], rows)


def epoch_table(metrics: list[dict[str, float | None]]) -> str:
    """Return ``metrics.csv`` as a table."""
    rows = [["" if value is None else f"{value:.5g}" for value in row.values()] for row in metrics]
    return table([name.replace("_", " ") for name in metrics[0]], rows)


def pairs_table(values: dict[str, Any]) -> str:
    """Return names and values as a table of two columns."""
    return table(["", ""], [[name, "" if value is None else str(value)] for name, value in values.items()])


def unreadable_note(files: list[str]) -> str:
    """Return a section that lists unreadable files; empty if there are none."""
    if not files:
        return ""
    items = "".join(f"<li>{escape(file)}</li>" for file in files)
    heading = f"Skipped {len(files)} unreadable file{'s' * (len(files) > 1)}"
    return f"<section><h2>{heading}</h2><ul>{items}</ul></section>"
