"""Seconds of training to an accuracy: convlens beside what one would write or take instead, on a CPU and a GPU.

This file is run once more for each contender: of a race with --enter, its data and its name; of ``gpu`` with its name.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import convlens
from benchmarks import baselines
from benchmarks.harness import Record, answer, load_named, percent, spread, table
from convlens.data.dataset import Dataset
from convlens.system.device import select_device, set_num_threads
from convlens.training.recipe import Recipe
from convlens.training.recipes import get_recipe


@dataclass(frozen=True)
class Race:
    """What is raced for on a data set, and by whom."""

    targets: tuple[float, ...]  # accuracies on the test split
    recipes: tuple[str, ...]
    plain: tuple[str, int]  # our net for a plain loop, and its filters
    classic: str  # the recipe that says net, batch and transforms of the tutorial program
    patience: tuple[float, float]  # seconds that this program, and the others, may train: longer than convlens needs


OURS = "convlens, recipe `"  # what the name of an entrant begins with
RACES = {
    "mnist": Race((0.99, 0.995), ("mnist-99", "mnist-995"), ("tiny", 32), "mnist-4conv", (900.0, 60.0)),
    "fashion-mnist": Race(
        (0.85, 0.92), ("fashion-85", "fashion-92"), ("whitened", 16), "fashion-2conv", (300.0, 200.0)
    ),
    "cifar10": Race(
        (0.80, 0.87, 0.906), ("cifar10-small", "cifar10-90", "cifar10-94"), ("whitened", 64), "cifar-lenet",
        (480.0, 480.0),
    ),
}  # fmt: skip


def race(name: str) -> tuple[list[Record], str]:
    """Seconds of training to an accuracy on the test split: convlens beside what one would write or take instead.

    Each trains in a process of its own, one after the other, as whoever runs it would.
    """
    records: list[Record] = [answer(__name__, "--enter", name, who) for who in entrants(name)]
    return records, race_table(records)


def entrants(name: str) -> dict[str, Callable[[Dataset], baselines.Course]]:
    """Return who races on a data set, by what the table calls them."""
    asked = RACES[name]
    (model, filters), (longest, others) = asked.plain, asked.patience
    rivals = {
        f"plain loop with our model `{model} --width {filters}`, Adam, fp32": (
            partial(baselines.plain_loop, model=model, filters=filters), others,
        ),
        "scikit-learn's MLPClassifier": (baselines.scikit_learn, others),
        f"the tutorial program, as `{asked.classic}`": (partial(baselines.tutorial, classic=asked.classic), longest),
    }  # fmt: skip
    return {
        **{f"{OURS}{recipe}`": partial(baselines.convlens, recipe=settled(recipe)) for recipe in asked.recipes},
        **{
            who: lambda data, course=course, most=most: until(course(data), most, max(asked.targets))
            for who, (course, most) in rivals.items()
        },
    }


def settled(recipe: str) -> Recipe:
    """Return a recipe as it races: nothing is held out."""
    return get_recipe(recipe).override(val_fraction=0.0)


def enter(name: str, who: str) -> None:
    """Train one entrant in this process, and print its record."""
    set_num_threads()
    data = load_named(name)
    course = list(entrants(name)[who](data))
    record: Record = {"data": data.name, "who": who, "targets": RACES[name].targets, "course": course}
    if who.startswith(OURS) and settled(who.removeprefix(OURS).rstrip("`")).tta:
        record["averaged"] = course.pop()[1]
    print(json.dumps(record))


def until(course: baselines.Course, seconds: float, accuracy: float) -> baselines.Course:
    """Follow a course to its first point past so many seconds, or with such an accuracy."""
    for point in course:
        yield point
        if point[0] > seconds or point[1] >= accuracy:
            return


def race_table(records: list[Record]) -> str:
    """Return the table of a race, convlens at its head: when each contender reached each target first.

    What is reached, or best, only with test-time augmentation says so; it is looked at once, at the end.
    """
    rows = []
    for record in sorted(records, key=lambda record: "convlens" not in record["who"]):
        course, averaged = record["course"], record.get("averaged", 0.0)
        last = course[-1][0]
        reached = []
        for target in record["targets"]:
            late = f"{last:.1f} with augmentation" if averaged >= target else f"not in {last:,.0f} s"
            reached.append(next((f"{s:.1f}" for s, a in course if a >= target), late))
        best = f"{max(accuracy for _, accuracy in course):.2%}"
        rows.append([record["who"], *reached, f"{best}, {averaged:.2%} with augmentation" if averaged else best])
    return table([records[0]["data"], *(f"{100 * target:g}%, s" for target in records[0]["targets"]), "best"], rows)


SPEEDRUN = "the published speedrun recipe"


def test_of(recipe: str, data: Dataset, seed: int = 0) -> Record:
    """Train a recipe in this process as ``convlens train`` does, and return its seconds and accuracies."""
    with tempfile.TemporaryDirectory() as folder:
        run = convlens.train(data, recipe, seed=seed, out=Path(folder) / "run")
        views = run.test.get("test_time_augmentation", {})
        seconds = run.metrics[-1]["seconds"]
        return {"seconds": seconds, "plain": run.accuracy, "averaged": views.get("accuracy")}


def speedrun_of(data: Dataset, device: torch.device, seed: int = 0) -> Record:
    """Train the published recipe, and return its seconds and accuracies."""
    return dict(zip(("seconds", "plain", "averaged"), baselines.speedrun(data, device, seed), strict=True))


def speedrun() -> tuple[list[Record], str]:
    """The recipe `cifar10-94` beside the published speedrun recipe on CIFAR-10, one after the other."""
    data = load_named("cifar10")
    # first, for fit() lets the process keep its memory, which this does not ask for
    published = {"who": SPEEDRUN, **speedrun_of(data, torch.device("cpu"))}
    records = [{"who": "convlens, recipe `cifar10-94`", **test_of("cifar10-94", data)}, published]
    rows = [[r["who"], f"{r['seconds']:,.0f}", percent(r["plain"]), percent(r["averaged"])] for r in records]
    ratio = records[0]["seconds"] / records[1]["seconds"]
    rows.append(["ratio of the seconds", f"{ratio:.2f}", "", ""])
    head = [data.name, "training, s", "test accuracy", "with test-time augmentation"]
    return records, table(head, rows)


ON_GPU = {  # who, on which data
    "mnist-99": "mnist", "mnist-995": "mnist", "fashion-92": "fashion-mnist", "fashion-94": "fashion-mnist",
    "cifar10-90": "cifar10", "cifar10-94": "cifar10", SPEEDRUN: "cifar10",
}  # fmt: skip


def gpu() -> tuple[list[Record], str]:
    """The same recipes on a CUDA device, beside the published speedrun: each in a fresh process, cold and then warm."""
    if not torch.cuda.is_available():
        sys.exit("bench-gpu needs a CUDA device, and PyTorch sees none here")
    records, rows = [], []
    for who in ON_GPU:
        cold, *warm = answer(__name__, who)
        records.append({"who": who, "cold": cold, "warm": warm})
        plain, averaged = (
            percent(None if None in shares else statistics.mean(shares))
            for shares in ([run[key] for run in (cold, *warm)] for key in ("plain", "averaged"))
        )
        rows.append([who, f"{cold['seconds']:.2f}", *spread([run["seconds"] for run in warm]), plain, averaged])
    head = ["who", "training, cold, s", "warm: median, s", "fastest, slowest", "mean test accuracy",
            "with test-time augmentation"]  # fmt: skip
    return records, table(head, rows)


def cold_and_warm(who: str, times: int = 6) -> None:
    """Train a contender several times in this process, with a seed each, and print what came of it."""
    data = load_named(ON_GPU[who])
    train = partial(speedrun_of, data, select_device()) if who == SPEEDRUN else partial(test_of, who, data)
    print(json.dumps([train(seed) for seed in range(times)]))


if __name__ == "__main__":
    if sys.argv[1] == "--enter":
        enter(*sys.argv[2:])
    else:
        cold_and_warm(sys.argv[1])
