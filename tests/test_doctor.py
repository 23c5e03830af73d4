"""The data doctor: what is planted is found, what is sound is left alone, nothing is changed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens.audit.audit import audit, write_exclude_file, write_report
from convlens.audit.duplicates import describe_images, find_exact_duplicates, find_near_duplicates, move
from convlens.data.dataset import Dataset, Split
from convlens.data.loading import load_dataset
from convlens.errors import UsageError
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest
from convlens.system.files import read_name_list
from convlens.training.recipe import Recipe

QUICK: dict[str, Any] = {"epochs": 1, "device": "cpu", "threads": 1, "precision": "fp32"}


def smooth(n: int, side: int, channels: int, seed: int) -> torch.Tensor:
    """Return different smooth pictures, uint8 (N, C, side, side), as photos are."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 7, 7, generator=g) * 255
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    return fine.clamp(0, 255).round().to(torch.uint8)


def by_jpeg(image: torch.Tensor) -> torch.Tensor:
    """Save one image (C, H, W) as JPEG of quality 75 and read it again."""
    file = io.BytesIO()
    pixels = image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=75)
    return torch.from_numpy(np.array(Image.open(file)).reshape(pixels.shape)).permute(2, 0, 1)


def brighter(image: torch.Tensor) -> torch.Tensor:
    """Add 30 levels."""
    return (image.int() + 30).clamp(0, 255).to(torch.uint8)


def moved(image: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Move by a pixel."""
    return move(image, dy, dx)


def pairs_of(groups: list[list[int]]) -> set[tuple[int, int]]:
    """Return the pairs in groups of two."""
    return {(group[0], group[1]) for group in groups}


def test_exact_duplicates_are_grouped() -> None:
    images = smooth(20, 16, 1, 0)
    images[7], images[15], images[3] = images[2], images[2], images[19]
    assert find_exact_duplicates(images) == [[2, 7, 15], [3, 19]]
    assert find_exact_duplicates(smooth(20, 16, 1, 0)) == []


@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("how", ["jpeg", "brightness", "up", "down", "left", "right", "corner"])
def test_near_duplicates_are_found_and_others_are_not(how: str, side: int, channels: int) -> None:
    images = smooth(300, side, channels, 1)
    steps = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1), "corner": (-1, 1)}
    copies = []
    for row in range(20):
        original = images[10 * row]
        if how == "jpeg":
            copies.append(by_jpeg(original))
        elif how == "brightness":
            copies.append(brighter(original))
        else:
            copies.append(moved(original, *steps[how]))
    everything = torch.cat([images, torch.stack(copies)])
    found = find_near_duplicates(*describe_images(everything, torch.arange(len(everything))))
    assert pairs_of(found) == {(10 * row, 300 + row) for row in range(20)}


def test_constant_images_are_not_near_duplicates() -> None:
    images = torch.arange(0, 250, 10).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 9, 9).contiguous()
    assert find_near_duplicates(*describe_images(images, torch.arange(25))) == []


def plant() -> Dataset:
    """Return the digits with planted trouble: a leak, a copy in train, two plain images, thirty wrong labels."""
    digits = load_dataset("digits")
    images, labels = digits.train.images.clone(), digits.train.labels.clone()
    images[5] = digits.test.images[9]
    images[11] = images[10]
    images[20], images[21] = 0, 200
    rows = torch.arange(100, 1000, 30)
    labels[rows] = (labels[rows] + 3) % 10
    train = Split(images=images, labels=labels, ids=digits.train.ids)
    return Dataset(name="digits", classes=digits.classes, train=train, test=digits.test, input_style=digits.input_style)


def test_what_is_planted_in_the_digits_is_found() -> None:
    planted = plant()
    before = planted.fingerprint()
    report = audit(planted, Recipe(batch_size=64, lr=0.1, nesterov=True, **{**QUICK, "epochs": 8}))
    assert planted.fingerprint() == before
    ids = planted.train.ids
    assert report.constant_images == [f"train/{ids[20]}", f"train/{ids[21]}"]
    groups = {frozenset(group) for group in report.exact_duplicates}
    leak = frozenset({f"train/{ids[5]}", f"test/{planted.test.ids[9]}"})
    assert groups == {leak, frozenset({f"train/{ids[10]}", f"train/{ids[11]}"})}
    assert report.leaks >= 1
    wrong = {f"train/{ids[row]}" for row in range(100, 1000, 30)}
    suspected = {issue.image_id for issue in report.label_issues}
    assert len(wrong & suspected) >= 28  # of 30
    assert len(suspected - wrong) <= 15  # of 1,767
    assert report.label_issues == sorted(report.label_issues, key=lambda issue: -issue.score)
    reasons = report.to_exclude()
    assert reasons[f"train/{ids[5]}"] == f"duplicate of test/{planted.test.ids[9]}"  # the test image stays
    assert f"test/{planted.test.ids[9]}" not in reasons


def test_sound_data_get_a_clean_bill() -> None:
    report = audit(load_dataset("digits"), labels=False)
    assert (report.exact_duplicates, report.constant_images, report.small_classes) == ([], [], {})
    assert len(report.near_duplicates) <= 10  # 8x8 digits of the same writer
    assert report.train_test_drift_auroc < 0.7 and report.imbalance < 1.2


def test_small_and_uneven_classes_and_a_shifted_test_split() -> None:
    images = smooth(200, 8, 1, 3)
    labels = torch.tensor([0] * 90 + [1] * 4 + [0] * 6)
    test_images = (images[100:].int() // 2).to(torch.uint8)
    test_images[:, :, :2] = 255
    train = Split(images=images[:100], labels=labels, ids=[str(i) for i in range(100)])
    test = Split(images=test_images, labels=torch.arange(100) % 2, ids=[str(i) for i in range(100)])
    digits = load_dataset("digits")
    report = audit(
        Dataset(name="toy", classes=("a", "b"), train=train, test=test, input_style=digits.input_style), labels=False
    )
    assert report.small_classes == {"b": 4} and report.imbalance == 24
    assert report.train_test_drift_auroc > 0.9


def test_the_files_and_the_list_that_train_honours(capsys: pytest.CaptureFixture[str]) -> None:
    planted = plant()
    np.savez(
        "digits.npz",
        x_train=planted.train.images[:, 0].numpy(), y_train=planted.train.labels.numpy(),
        x_test=planted.test.images[:, 0].numpy(), y_test=planted.test.labels.numpy(),
    )  # fmt: skip
    dataset = load_dataset("digits.npz")
    report = audit(dataset, labels=False)
    write_report(report, dataset, Path("doctor"))
    assert json.loads(Path("doctor/doctor.json").read_text())["constant_images"] == ["train/20", "train/21"]
    assert (Path("doctor") / "duplicates.png").stat().st_size > 2000
    number = write_exclude_file(report, dataset, Path("remove.txt"))
    names = read_name_list("remove.txt")
    assert len(names) == number and {"train/5", "train/11", "train/20", "train/21"} <= set(names)
    for write in (
        lambda: write_exclude_file(report, dataset, Path("remove.txt")),
        lambda: write_report(report, dataset, Path("doctor")),
    ):
        with pytest.raises(UsageError, match="exists already"):
            write()
    run = convlens.train("digits.npz", exclude="remove.txt", val_fraction=0.0, **QUICK)
    assert run.config["data"]["counts"]["train"] == len(dataset.train) - sum(n.startswith("train/") for n in names)
    split = (run.path / "split.csv").read_text().splitlines()
    assert "train,5" not in split and "train,6" in split
    from convlens.runs.evaluate import evaluate_run

    assert evaluate_run(run.path)["accuracy"] == run.accuracy  # leaves out the same images


@pytest.mark.usefixtures("no_plots")
def test_a_run_with_exclusions_goes_on() -> None:
    digits = load_dataset("digits")
    Path("some.txt").write_text(f"train/{digits.train.ids[1]}\twhy\n\n{digits.test.ids[2]}\n")
    whole = convlens.train("digits", exclude="some.txt", out="whole", **QUICK)
    experiment = Experiment.start(TrainRequest.create("digits", exclude="some.txt", out="stopped", **QUICK))
    with pytest.raises(convlens.ConvlensError, match="^stopped at step 3"):
        steps = iter(range(100))
        for _ in experiment.epochs(should_stop=lambda: next(steps) == 3):
            pass
    again = Experiment.resume("stopped")
    for _ in again.epochs():
        pass
    assert again.finish().test == whole.test


@pytest.mark.parametrize(
    ("content", "message"),
    [("train/99999\n", "^digits has no image 'train/99999'$"), ("a\nb\n", r"^digits has no image 'a' \(nor 1 more\)$")],
)
def test_a_list_of_other_data_is_refused(content: str, message: str) -> None:
    Path("some.txt").write_text(content)
    with pytest.raises(UsageError, match=message):
        convlens.train("digits", exclude="some.txt", **QUICK)
    assert not Path("runs").exists()


def test_a_list_that_is_missing_is_said() -> None:
    with pytest.raises(convlens.ConvlensError, match="^cannot read none.txt: No such file"):
        convlens.train("digits", exclude="none.txt", **QUICK)
