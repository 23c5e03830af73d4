"""The report of a sweep: its history, its trials, and the importance of the searched fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator

from convlens.reports.html import make_cards, make_figures, write_page
from convlens.reports.image_grid import MUTED, TEXT
from convlens.reports.plots import BACKGROUND, GRID, TRAIN, VALIDATION, new_figure, save_for_page, style_axes, title
from convlens.reports.run import pairs_table, table

Rows = Sequence[Mapping[str, Any]]

CAPTIONS = {
    "history.png": "Each dot is a trial, each orange cross one that was stopped early. Arrows at the lower edge are "
    "trials far below. The line is the best so far.",
    "parallel.png": "Each line is a trial, from its values to its accuracy. Darker lines are better, the thick one is "
    "the best. The last axis ranks the trials evenly, so equal accuracies can be apart.",
    "importance.png": "How much each field affects whether a trial is among the best tenth (PED-ANOVA).",
}

SIZE = (7.2, 3.6)  # inches: two plots next to each other, each half as wide as the page

TEXT_POINTS = 10  # of all text but the title

BACKING = {"facecolor": BACKGROUND, "alpha": 0.75, "edgecolor": "none", "pad": 0.6}  # of text in front of lines


def draw_history(path: Path, rows: Rows) -> str:
    """Plot the validation accuracy of the trials in their order."""
    figure = new_figure(*SIZE)
    axes = figure.subplots()
    style_axes(axes)
    axes.tick_params(labelsize=TEXT_POINTS)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    complete = [(row["trial"], row["val_acc"]) for row in rows if row["state"] == "complete"]
    pruned = [(row["trial"], row["val_acc"]) for row in rows if row["state"] == "pruned" and row["val_acc"] is not None]
    best = [max(value for _, value in complete[: number + 1]) for number in range(len(complete))]
    title(figure, f"The best of {len(rows)} trials: {best[-1]:.2%} on validation images")
    axes.step([number for number, _ in complete], best, where="post", color=TEXT, lw=1.6, label="best so far")
    # a few trials that learned nothing would compress all others
    ordered = sorted(value for _, value in [*complete, *pruned])
    low = ordered[len(ordered) // 4]
    bottom = max(min(low, best[0]) - 1.5 * (best[-1] - low) - 0.005, 0.0)
    margin = 0.05 * (best[-1] - bottom)
    axes.set_ylim(bottom - margin, best[-1] + margin)
    for found, color, marker, label in (
        (complete, TRAIN, "o", "trained to the end"),
        (pruned, VALIDATION, "x", "stopped early"),
    ):
        inside = [(number, value) for number, value in found if value >= bottom]
        below = [number for number, value in found if value < bottom]
        shape: dict[str, Any] = {"color": color, "label": label, "zorder": 3}
        if found:  # otherwise its legend entry would disappear
            axes.scatter([n for n, _ in inside], [v for _, v in inside], s=36, marker=marker, linewidths=1.4, **shape)
        axes.scatter(below, [bottom] * len(below), color=color, s=40, marker="v", zorder=3)
    axes.set_xlim(0, len(rows) + 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if value <= 1 else "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial", fontsize=TEXT_POINTS, color=MUTED)
    axes.legend(frameon=False, fontsize=TEXT_POINTS, labelcolor=TEXT, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return save_for_page(figure, path)


def positions(values: Sequence[Any], log: bool) -> tuple[list[float], dict[float, str]]:
    """Return the positions of values on an axis from 0 to 1, and its ticks."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        ordered = sorted(set(values))
        if len(ordered) > 8 or log:
            scale = math.log if log else float
            low, high = scale(ordered[0]), scale(ordered[-1])
            span = (high - low) or 1.0
            marks = [low + span * k / 4 for k in range(5)]
            texts = [f"{math.exp(mark) if log else mark:.3g}" for mark in marks]
            return [(scale(v) - low) / span for v in values], {k / 4: text for k, text in enumerate(texts)}
        found: list[Any] = ordered
    else:
        found = sorted(set(values), key=str)
    place = {value: number / max(len(found) - 1, 1) for number, value in enumerate(found)}
    names = {True: "yes", False: "no"}
    texts_at = {
        at: names[value] if isinstance(value, bool) else f"{value:.3g}" if isinstance(value, float) else str(value)
        for value, at in place.items()
    }
    return [place[value] for value in values], texts_at


def draw_parallel(path: Path, rows: Rows, logs: Mapping[str, bool]) -> str:
    """Plot the complete trials as lines over one axis for each field, with the accuracy at the right."""
    chosen = sorted(
        (row for row in rows if row["state"] == "complete"), key=lambda row: (row["val_acc"], -row["val_loss"])
    )
    figure = new_figure(*SIZE)
    title(figure, f"The {len(chosen)} complete trials: dark lines are the good ones")
    axes = figure.subplots()
    axes.set_axis_off()
    columns = [*logs, "val_acc"]
    places = []
    for at, name in enumerate(columns):
        values = [row[name] for row in chosen]
        # accuracies by rank: most are close together at the top
        if name == "val_acc":
            where = [number / max(len(chosen) - 1, 1) for number in range(len(chosen))]
            at_rank = {round(k / 4 * (len(values) - 1)): "" for k in range(5)}  # fewer than five for few trials
            ticks = {where[rank]: f"{values[rank]:.2%}" for rank in at_rank}
        else:
            where, ticks = positions(values, logs[name])
        places.append(where)
        axes.plot([at, at], [0, 1], color=GRID, lw=1.2, zorder=1)
        for height, text in ticks.items():
            axes.text(at + 0.03, height, text, fontsize=TEXT_POINTS, color=TEXT, va="center", zorder=5, bbox=BACKING)
        label = "val accuracy, by rank" if name == "val_acc" else name.replace("_", " ") + " (log)" * logs[name]
        axes.text(at, 1.08, label, fontsize=TEXT_POINTS, color=TEXT, ha="center", parse_math=False)
    for number in range(len(chosen)):
        best, rank = number == len(chosen) - 1, (number + 1) / len(chosen)
        color = TEXT if best else colormaps["Blues"](0.15 + 0.8 * rank)
        heights = [where[number] for where in places]
        axes.plot(range(len(columns)), heights, color=color, lw=3.2 if best else 0.8 + rank, zorder=4 if best else 2)
    axes.set_xlim(-0.3, len(columns) - 0.6)
    return save_for_page(figure, path)


def draw_importance(path: Path, importance: Mapping[str, float]) -> str:
    """Plot the importance of each field, the largest first."""
    figure = new_figure(SIZE[0], 0.9 + 0.4 * len(importance))
    names, values = list(importance), list(importance.values())
    title(figure, f"What mattered most: {names[0].replace('_', ' ')}")
    axes = figure.subplots()
    style_axes(axes)
    axes.barh(range(len(names)), values, color=TRAIN, height=0.55)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], parse_math=False)
    axes.tick_params(labelsize=TEXT_POINTS)
    axes.invert_yaxis()
    for number, value in enumerate(values):
        axes.text(value + 0.005, number, f"{value:.0%}", va="center", fontsize=TEXT_POINTS, color=TEXT)
    axes.set_xlim(0, max(values) * 1.1)
    axes.set_xticks([])
    return save_for_page(figure, path)


def format_value(value: Any) -> str:
    """Return the text of a table cell: short numbers, and nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(folder: Path, outcome: Mapping[str, Any], rows: Rows, logs: Mapping[str, bool]) -> None:
    """Write the plots to ``plots/`` of the sweep's folder, and ``report.html``."""
    plots, best, importance = folder / "plots", outcome["best"], outcome["importance"]
    drawn = {
        "history.png": draw_history(plots / "history.png", rows),
        "parallel.png": draw_parallel(plots / "parallel.png", rows, logs),
    }
    if importance:
        drawn["importance.png"] = draw_importance(plots / "importance.png", importance)
    else:
        (plots / "importance.png").unlink(missing_ok=True)
    confirmation = outcome["confirmation"]
    done = sum(row["state"] != "interrupted" for row in rows)
    if confirmation:
        verdict = confirmation["verdict"]
    elif done < outcome["trials"]:
        verdict = f"not finished, {done} of {outcome['trials']} trials are done: nothing is claimed"
    else:
        verdict = "not confirmed on fresh seeds: nothing is claimed"
    values = ", ".join(f"{name.replace('_', ' ')} {format_value(value)}" for name, value in best["params"].items())
    cards = [
        ("best on validation", f"{best['val_acc']:.2%}", f"trial {best['trial']}: {values}"),
        ("trials", str(len(rows)), ", ".join(f"{count} {state}" for state, count in outcome["states"].items())),
    ]
    if confirmation:
        means = confirmation["test_accuracy"]
        cards.append(("test accuracy", f"{means['best']:.2%}", f"base recipe {means['base']:.2%}; {verdict}"))
    ordered = sorted(
        rows, key=lambda row: (row["state"] != "complete", -(row["val_acc"] or 0), row["val_loss"] or 0, row["trial"])
    )
    columns = [name for name in rows[0] if name != "worker" and any(row[name] is not None for row in rows)]
    cells = [
        [f"{row[c]:.2%}" if c == "val_acc" and row[c] is not None else format_value(row[c]) for c in columns]
        for row in ordered
    ]
    body = f"""\
<p class=quiet>{escape(outcome["data_name"])}, base recipe {escape(outcome["recipe"]["name"])}. Trials were compared on
validation images; no trial used a test image.</p>
<p><code>{escape(outcome["command"])}</code></p>
<section class=figures>{make_cards(cards)}</section>
<section class=wide><h2>Confirmation</h2><p>{escape(verdict)}</p><p class=quiet>The best of many trials looks better
on the validation images than it is. Fresh seeds and test images show whether it is.</p></section>
<div class=pictures>{make_figures(drawn, CAPTIONS)}</div>
<section class=wide><h2>Trials, the best first</h2>{table([c.replace("_", " ") for c in columns], cells)}</section>
<section class=wide><details><summary>Space and base recipe</summary>{pairs_table({**outcome["space"]})}
{pairs_table({**outcome["recipe"]})}</details></section>
"""
    write_page(folder / "report.html", folder.name, body)
