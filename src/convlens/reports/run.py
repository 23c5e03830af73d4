"""report.html: all of a run on one page that needs no network, light or dark, on any screen."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from convlens.evaluation.metrics import worst_classes
from convlens.inference.bundle import UNSEEN, WATCHED
from convlens.reports.html import make_cards, make_pictures, write_page
from convlens.run_dir import RunDir
from convlens.system.files import read_json

MAX_ROWS = 100  # of the table of classes; of more classes the worst are shown

WORST = 20

PLOTS = {
    "confusion.png": "Each row is a true class, each column what the net said; the diagonal is right.",
    "mistakes.png": "What it said, how sure it was, and what the picture is.",
    "calibration.png": "Dots on the dotted line would be perfect; bars are 95% intervals, long where images are few.",
    "curves.png": "Loss and accuracy over the epochs; in training, of the augmented images as they pass.",
    "filters.png": "What the first layer looks for.",
    "samples.png": "Images of the training split with their classes.",
    "augmented.png": "The same images after the random changes of the recipe.",
}


def write_report(folder: RunDir, drawn: Mapping[str, str]) -> None:
    """Write ``report.html`` from the run's config, metrics and test figures, and its plots as HTML by their files."""
    config, test, metrics = read_json(folder.config), read_json(folder.test), folder.read_metrics()
    data, recipe, machine = config["data"], config["recipe"], config["machine"]
    low, high = test["accuracy_interval"]
    seconds = metrics[-1]["seconds"] or 0.0
    counts = ", ".join(f"{count:,} {split}" for split, count in data["counts"].items())
    figures = [
        (
            "test accuracy",
            f"{test['accuracy']:.2%}",
            f"95% interval {low:.2%} to {high:.2%}, n = {test['n']:,}",
        ),
        (
            "training",
            format_seconds(seconds),
            f"{len(metrics)} epoch{'s' * (len(metrics) != 1)} on {machine['device_name']}",
        ),
        ("parameters", f"{config['model']['parameters']:,}", f"net {config['model']['name']}"),
        ("test loss", f"{test['loss']:.4f}", "cross-entropy, nats an image"),
    ]
    if views := test.get("test_time_augmentation"):
        low, high = views["accuracy_interval"]
        note = f"the mean over shifted and mirrored views; 95% interval {low:.2%} to {high:.2%}"
        figures.append(("with test-time augmentation", f"{views['accuracy']:.2%}", note))
    body = f"""\
<p class=quiet>{escape(data["name"])}: {counts} images of {" x ".join(map(str, reversed(data["shape"][1:])))} pixels;
{escape(data["split_description"])}. Recipe {escape(recipe["name"])}, seed {recipe["seed"]}.</p>
<p><code>{escape(config["command"])}</code></p>
<section class=figures>{make_cards(figures)}</section>
{unreadable_note(data["unreadable"])}
<section class=wide><h2>How far to trust it</h2><ul>{uncertainty_items(test)}</ul></section>
<div class=pictures>{make_pictures(drawn, PLOTS)}</div>
<section class=wide><h2>By class</h2>{class_table(test)}</section>
<section class=wide><details><summary>Epochs</summary>{epoch_table(metrics)}</details></section>
<section class=wide><details><summary>Recipe and machine</summary>
{pairs_table({**recipe, **machine})}</details></section>
<p class=quiet>{WATCHED if recipe["log_test_metrics"] else UNSEEN} The interval is that of the test sample; another seed
gives
another net.</p>
"""
    write_page(folder.report, folder.path.name, body)


def uncertainty_items(test: dict[str, Any]) -> str:
    """Return what the test says to a person who is no statistician, as list items."""
    low, high = test["accuracy_interval"]
    items = [
        f"Of {test['n']:,} images that it was not trained on it has {test['correct']:,} right. "
        f"Its accuracy on all images of that kind lies between {low:.2%} and {high:.2%}, as far as such intervals go: "
        "19 of 20 are right.",
        f"If every class counted the same it would be {test['balanced_accuracy']:.2%} (balanced accuracy); "
        f"macro-F1, which counts false alarms too, is {test['macro_f1']:.2%}.",
    ]
    if calibration := test.get("calibration"):
        before, after, coverage = calibration["before"], calibration["after"], test["coverage"]
        changed = f"{before['calibration_error']:.2%} before they were tempered by {calibration['temperature']:.2f}"
        if calibration["temperature"] == 1:
            changed = "left as the net gives them: the validation images prove no need to change them"
        items += [
            f"Its probabilities are off by {after['calibration_error']:.2%} on average (expected calibration error; "
            f"{changed}). Brier score {after['brier_score']:.4f}, before {before['brier_score']:.4f}; 0 is perfect.",
            f"Asked for sets of classes that hold the right one {coverage['asked']:.0%} of the time, it gave sets of "
            f"{coverage['classes_in_a_set']:.2f} classes on average, and they held it {coverage['measured']:.1%} of "
            "the time.",
            f"It would call {1 - test['known']:.1%} of these images unknown; 5% is what it was set to. Pictures of "
            "other things should be called unknown far more often, but some will pass.",
        ]
    else:
        items.append(
            "There were no validation images: its probabilities are not calibrated, and it answers one of its classes "
            "for every picture, also for one that shows none of them."
        )
    return "".join(f"<li>{escape(item)}</li>" for item in items)


def format_seconds(seconds: float) -> str:
    """Return a time as people say it.

    >>> format_seconds(9.53), format_seconds(200)
    ('9.5 s', '3 min 20 s')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table of escaped cells."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def class_table(test: dict[str, Any]) -> str:
    """Return precision, recall, F1 and count of every class, or of many classes those with the lowest F1."""
    classes, note = test["classes"], ""
    if len(classes) > MAX_ROWS:
        note = f"<p>The {WORST} of {len(classes):,} classes with the lowest F1; test.json has all.</p>"
        classes = worst_classes(test, WORST)
    rows = [
        [name, f"{c['precision']:.2%}", f"{c['recall']:.2%}", f"{c['f1']:.2%}", f"{c['n']:,}"]
        for name, c in classes.items()
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
    """Return what to say of files that were skipped, if any were."""
    if not files:
        return ""
    items = "".join(f"<li>{escape(file)}</li>" for file in files)
    told = f"{len(files)} unreadable files were skipped" if len(files) > 1 else "1 unreadable file was skipped"
    return f"<section><h2>{told}</h2><ul>{items}</ul></section>"
