"""Mistakes as files, spoiled images, and classes that are shown as often as others."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens.data.dataset import Split
from convlens.data.images import InputStyle
from convlens.data.loader import BatchLoader
from convlens.data.loading import load_dataset
from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from convlens.runs.evaluate import evaluate_corruptions, evaluate_run
from convlens.runs.mistakes import file_name, write_mistakes
from convlens.runs.run import Run, load_training_images
from convlens.system.text import unique

QUICK: dict[str, Any] = {"epochs": 1, "device": "cpu", "threads": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the digits that has some wrong."""
    return convlens.train("digits", out=tmp_path_factory.mktemp("mistakes") / "run", **QUICK)


def read(folder: Path) -> list[dict[str, str]]:
    """Return mistakes.csv."""
    with open(folder / "mistakes.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_wrong_image_is_a_file_that_says_so(run: Run, tmp_path: Path) -> None:
    folder, wrong, doubtful = write_mistakes(run.path, tmp_path / "wrong", uncertain=7)
    assert wrong == run.test["num_images"] - run.test["correct"] and doubtful == 7
    rows = read(folder)
    assert [row["kind"] for row in rows] == ["misclassified"] * wrong + ["uncertain"] * 7
    assert {path.name for path in (folder / "images").iterdir()} == {row["file"] for row in rows}
    sure = [float(row["confidence"]) for row in rows]
    assert sure[:wrong] == sorted(sure[:wrong], reverse=True) and sure[wrong:] == sorted(sure[wrong:])
    test = load_dataset("digits").test
    for row in rows[:5]:
        pixels = np.asarray(Image.open(folder / "images" / row["file"]))
        assert np.array_equal(pixels, test.images[list(test.ids).index(row["image_id"]), 0].numpy())
        said = f"{row['true_label']}_{row['predicted_label']}_{float(row['confidence']):.3f}_{row['image_id']}.png"
        assert row["file"] == said
    assert (folder / "mistakes.png").stat().st_size > 5000


def test_a_pair_of_classes(run: Run, tmp_path: Path) -> None:
    worst = next(row for row in run.predictions if row["true_label"] != row["predicted_label"])
    pair = {"true": worst["true_label"], "predicted": worst["predicted_label"]}
    folder, wrong, doubtful = write_mistakes(run.path, tmp_path / "pair", **pair)
    assert wrong >= 1 and doubtful == 0
    assert {(row["true_label"], row["predicted_label"]) for row in read(folder)} == {(pair["true"], pair["predicted"])}
    with pytest.raises(UsageError, match="^unknown class 'x'"):
        write_mistakes(run.path, tmp_path / "none", true="x")
    assert not (tmp_path / "none").exists()


def test_other_images_are_not_taken_for_those_it_was_tested_on(run: Run, tmp_path: Path) -> None:
    """Although they have its classes, its size and its ids."""
    digits = load_dataset("digits")
    arrays = {"x_train": digits.train.images, "y_train": digits.train.labels, "x_test": digits.test.images.flip(0)}
    other = tmp_path / "other.npz"
    numbers = {key: value.numpy() for key, value in {**arrays, "y_test": digits.test.labels.flip(0)}.items()}
    np.savez(other, **numbers, classes=np.array(digits.classes))
    with pytest.raises(UsageError, match=rf"^the data in {other} are not those that .* was trained on \(digits\), or"):
        write_mistakes(run.path, tmp_path / "mistakes", data=str(other))
    with pytest.raises(UsageError, match="are not those that"):
        load_training_images(run.path, run.classifier, str(other))
    assert not (tmp_path / "mistakes").exists()
    assert evaluate_run(run.path, test_on=str(other))["num_images"] == run.test["num_images"]  # which is for other data


def test_data_that_were_moved_are_those_it_was_tested_on(tmp_path: Path) -> None:
    """Less the images that it left out."""
    digits = load_dataset("digits")
    old, new, excluded = tmp_path / "old.npz", tmp_path / "new.npz", tmp_path / "excluded.txt"
    np.savez(old, x=digits.train.images[:200, 0].numpy(), y=digits.train.labels[:200].numpy())
    excluded.write_text("3\n5\n")
    run = convlens.train(str(old), "digits", exclude=excluded, out=tmp_path / "run", **QUICK)
    old.rename(new)
    with pytest.raises(ConvlensError) as caught:
        write_mistakes(run.path, tmp_path / "mistakes")
    assert str(caught.value).endswith(f"; if the data of {run.path} have moved, say where with `data`")
    assert str(old) in str(caught.value)
    with pytest.raises(
        UsageError, match=r"^the data in digits are not those that .* \(old\), or were packed or decoded"
    ):
        write_mistakes(run.path, tmp_path / "mistakes", data="digits")
    assert (
        write_mistakes(run.path, tmp_path / "mistakes", data=str(new))[1]
        == run.test["num_images"] - run.test["correct"]
    )
    assert load_training_images(run.path, run.classifier, str(new)) is not None
    shutil.copytree(run.path / "model", tmp_path / "elsewhere" / "model")
    with pytest.raises(UsageError, match="excludes images that are listed in its run folder; name that"):
        load_training_images(tmp_path / "elsewhere" / "model", run.classifier, str(new))


def test_nothing_is_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="mine exists already; choose another `out`$"):
        write_mistakes(run.path, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_names_of_files_hold_nothing_strange() -> None:
    answer = {
        "true_label": "a/b",
        "predicted_label": "c d:*",
        "confidence": "0.5",
        "image_id": "../x/y z.jpeg",
    }
    name = file_name(answer)
    assert name == "a-b_c-d-_0.500_..-x-y-z.png" and "/" not in name
    assert unique(["a.png", "b.png", "A.png", "a-2.png"]) == ["a.png", "b.png", "A-2.png", "a-2-2.png"]
    long = file_name(
        {"true_label": "x" * 300, "predicted_label": "\u732b" * 300, "confidence": "1", "image_id": "\u72ac" * 300}
    )
    assert len(long.encode()) < 255 and long.endswith(".png")


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_corruptions_grow_and_are_always_the_same(kind: str, channels: int) -> None:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, channels, 6, 6, generator=g) * 200
    images = torch.nn.functional.interpolate(coarse, size=(20, 20), mode="bilinear").to(torch.uint8)
    before = images.clone()
    change = []
    for severity in SEVERITIES:
        spoiled = corrupt(images, kind, severity, batch_size=5)
        assert spoiled.shape == images.shape and spoiled.dtype == torch.uint8
        assert torch.equal(spoiled, corrupt(images, kind, severity, batch_size=5))
        change.append((spoiled.float() - images.float()).abs().mean().item())
    assert torch.equal(images, before)
    assert 0 < change[0] < change[2] < change[4]


def test_corruptions_of_images_of_one_pixel() -> None:
    for kind in CORRUPTIONS:
        assert corrupt(torch.full((2, 1, 1, 1), 90, dtype=torch.uint8), kind, 5).shape == (2, 1, 1, 1)


def test_a_net_is_worse_on_spoiled_images(run: Run) -> None:
    clean, figures = evaluate_corruptions(run.path)
    assert clean == pytest.approx(run.accuracy)  # which is rounded
    assert list(figures) == list(CORRUPTIONS) and all(len(values) == 5 for values in figures.values())
    assert figures["noise"][4] < run.accuracy
    assert np.mean([figures[kind][0] for kind in figures]) > np.mean([figures[kind][4] for kind in figures])


def test_a_balanced_epoch_shows_every_class_as_often() -> None:
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    images = torch.arange(1000).view(-1, 1, 1, 1).remainder(250).to(torch.uint8)
    split = Split(images=images, labels=labels, ids=[str(i) for i in range(1000)])
    normalise = Preprocess.fit(images, InputStyle()).normalizer()

    def shown(epoch: int, *, balance: bool) -> torch.Tensor:
        batches = BatchLoader(split, 100, normalise, seed=0, augment=lambda x, y, _: (x, y), balanced_sampling=balance)
        return torch.cat([batches(epoch, index)[1] for index in range(len(batches))])

    counts = torch.bincount(shown(0, balance=True), minlength=3)
    assert counts.sum() == 1000 and counts.min() > 270
    assert torch.bincount(shown(0, balance=False)).tolist() == [900, 90, 10]
    assert torch.equal(shown(3, balance=True), shown(3, balance=True))
    assert not torch.equal(shown(3, balance=True), shown(4, balance=True))


def test_balance_helps_the_rare_class() -> None:
    digits = load_dataset("digits")
    few = torch.ones(len(digits.train), dtype=torch.bool)
    for label in range(5):
        rows = (digits.train.labels == label).nonzero().squeeze(1)
        few[rows[6:]] = False  # 6 images of 0 to 4, some 143 of the others
    x, y = digits.train.images[few].numpy(), digits.train.labels[few].numpy()
    skewed = (x, y, digits.test.images.numpy(), digits.test.labels.numpy())
    figures = {}
    for balance in (False, True):
        options: dict[str, Any] = {
            **QUICK,
            "recipe": "digits",
            "epochs": 12,
            "val_fraction": 0.0,
            "balanced_sampling": balance,
        }
        figures[balance] = np.mean(
            [convlens.train(skewed, seed=s, **options).test["balanced_accuracy"] for s in (0, 1)]
        )
    assert figures[True] > figures[False]
