"""Prove what convlens says of trust, and write the tables of docs/results/accuracy.md.

    python -m benchmarks.ood                  # all sections: unknown, doctor, balance
    python -m benchmarks.ood unknown doctor   # some

It needs MNIST and Fashion-MNIST (CONVLENS_DATA), and ``cifar10-jpeg/`` here. Nets for ``unknown`` are those that come
with convlens.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import convlens
from benchmarks.harness import Record, peak_mib, run_sections, table
from convlens.audit.audit import AuditReport, audit
from convlens.audit.duplicates import move
from convlens.data.dataset import Dataset, Split
from convlens.data.loading import load_dataset
from convlens.evaluation.inference import compute_outputs
from convlens.evaluation.ood import auroc, energy, false_positive_rate
from convlens.inference.classifier import Classifier

PLANTED = 300  # copies of each kind

RESULTS = Path(__file__).parent.parent / "docs" / "results.md"


# pictures of other things


def fit_images(images: Tensor, classifier: Classifier) -> Tensor:
    """Return uint8 images (N, C, H, W) in the size and colour of a net: resized, grey or grey as RGB."""
    channels, side = classifier.preprocess.channels, classifier.preprocess.height
    x = images.float()
    if x.shape[1] != channels:
        x = x.mean(dim=1, keepdim=True) if channels == 1 else x.expand(-1, channels, -1, -1)
    x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8)


def written(head: list[str], rows: list[list[str]]) -> tuple[list[Record], str]:
    """Return the rows as records, and as a table."""
    return [dict(zip(head, row, strict=True)) for row in rows], table(head, rows)


def unknown() -> tuple[list[Record], str]:
    """Compare scores of being unknown: largest probability, energy, distance of features, and the last two together."""
    sets = {"mnist": load_dataset("mnist"), "fashion-mnist": load_dataset("fashion-mnist")}
    sets["cifar10"] = load_dataset("cifar10-jpeg")
    digits = load_dataset("digits")
    others = {name: data.test.images for name, data in sets.items()}
    others["digits"] = torch.cat([digits.train.images, digits.test.images])
    g = torch.Generator().manual_seed(0)
    rows = []
    for name, data in sets.items():
        classifier = Classifier.load(name)
        trust = classifier.uncertainty
        assert trust is not None
        own = data.test.images
        strange = {f"{other} test images": fit_images(x, classifier) for other, x in others.items() if other != name}
        strange["noise"] = torch.randint(0, 256, (2000, *own.shape[1:]), generator=g, dtype=torch.uint8)
        strange["blank"] = torch.arange(256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, *own.shape[1:]).contiguous()
        strange["its own test images, inverted"] = 255 - own

        def scores(images: Tensor, classifier: Classifier = classifier) -> tuple[Tensor, ...]:
            logits, features = compute_outputs(classifier.model, images, classifier.preprocess.normalizer())
            trust = classifier.uncertainty
            assert trust is not None
            largest = -logits.softmax(dim=1).max(dim=1).values
            distances = trust.mahalanobis.distances(features)
            return largest, energy(logits), distances, trust.ood_score(logits, features)

        known = scores(own)
        for what, images in strange.items():
            found = scores(images)
            cells = [f"{auroc(k, u):.4f}, {false_positive_rate(k, u):.1%}" for k, u in zip(known, found, strict=True)]
            refused = float((found[-1] > trust.ood_threshold).float().mean())
            rows.append([f"`{name}`", what, *cells, f"{refused:.1%}"])
        passed = float((known[-1] <= trust.ood_threshold).float().mean())
        rows.append([f"`{name}`", "its own test images", "", "", "", "", f"{1 - passed:.1%}"])
    head = ["model", "images", "largest probability", "energy", "feature distance", "sum", "reported unknown"]
    return written(head, rows)


# the doctor


def by_jpeg(images: Tensor) -> Tensor:
    """Save images (N, C, H, W) as JPEG of quality 75 and read them again."""
    parts = []
    for image in images:
        file, pixels = io.BytesIO(), image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=75)
        parts.append(torch.from_numpy(np.array(Image.open(file)).reshape(pixels.shape)).permute(2, 0, 1))
    return torch.stack(parts)


def plant(data: Dataset) -> tuple[Dataset, dict[str, list[tuple[str, str]]], set[str]]:
    """Return the data with copies put over training images, and 2% of its training labels changed; and which."""
    g = torch.Generator().manual_seed(0)
    images, labels = data.train.images.clone(), data.train.labels.clone()
    count = min(PLANTED, len(labels) // 20)
    order = torch.randperm(len(labels), generator=g)
    kinds = {
        "exact copies": lambda x: x,
        "moved by a pixel": lambda x: move(x[:, 0], 0, 1)[:, None],
        "saved as JPEG (quality 75)": by_jpeg,
        "brighter by 30 levels": lambda x: (x.int() + 30).clamp(0, 255).to(torch.uint8),
    }
    copies: dict[str, list[tuple[str, str]]] = {}
    for number, (kind, change) in enumerate(kinds.items()):
        rows = order[2 * count * number : 2 * count * (number + 1)]
        first, second = rows[:count], rows[count:]
        images[second] = change(images[first])
        labels[second] = labels[first]
        names = [[f"train/{data.train.ids[row]}" for row in part.tolist()] for part in (first, second)]
        copies[kind] = list(zip(*names, strict=True))
    untouched = order[8 * count :]
    wrong = untouched[torch.randperm(len(untouched), generator=g)[: len(labels) // 50]]
    moves = torch.randint(1, len(data.classes), (len(wrong),), generator=g)
    labels[wrong] = (labels[wrong] + moves) % len(data.classes)
    train = Split(images=images, labels=labels, ids=data.train.ids)
    return dataclasses.replace(data, train=train), copies, {f"train/{data.train.ids[row]}" for row in wrong.tolist()}


def together(groups: Iterable[list[str]]) -> dict[str, int]:
    """Return the number of the group that each image is in."""
    return {image: number for number, group in enumerate(groups) for image in group}


def judge(findings: AuditReport, copies: dict[str, list[tuple[str, str]]], wrong: set[str]) -> list[str]:
    """Return what was found of what was planted, as cells."""
    groups = together([*findings.exact_duplicates, *findings.near_duplicates])
    exact = together(findings.exact_duplicates)
    cells = []
    for kind, pairs in copies.items():
        where = exact if kind == "exact copies" else groups
        cells.append(f"{sum(a in where and where.get(a) == where.get(b) for a, b in pairs) / len(pairs):.1%}")
    suspects = {issue.image_id for issue in findings.label_issues}
    # what is suspected in the untouched data too is no false alarm of the planting; it is counted as one all the same
    hits = len(suspects & wrong)
    return [*cells, f"{hits / len(wrong):.3f}", f"{hits / max(len(suspects), 1):.3f}"]


def as_folder(data: Dataset, root: Path) -> None:
    """Write a data set as PNG files in class folders."""
    for name, split in data.splits.items():
        for image, label, number in zip(split.images, split.labels.tolist(), split.ids, strict=True):
            path = root / name / data.classes[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(path)


def doctor() -> tuple[list[Record], str]:
    """Plant copies and wrong labels in MNIST and in a folder, and see what is found; then in the data as they are."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        as_folder(load_dataset("digits"), Path(folder) / "digits")
        sets = {
            "MNIST": load_dataset("mnist"),
            "a folder (the digits as PNG files)": load_dataset(Path(folder) / "digits"),
        }
        for title, data in sets.items():
            planted, copies, wrong = plant(data)
            if title != "MNIST":
                names = {f"train/{image}": image for image in data.train.ids}
                copies = {kind: [(names[a], names[b]) for a, b in pairs] for kind, pairs in copies.items()}
                wrong = {names[image] for image in wrong}
            for what, examined in (("planted", planted), ("untouched", data)):
                start = time.perf_counter()
                findings = audit(examined)
                seconds = time.perf_counter() - start
                cells = judge(findings, copies, wrong) if what == "planted" else [""] * 6
                found = (
                    f"{len(findings.exact_duplicates)}, {len(findings.near_duplicates)}, "
                    f"{findings.leaks}, {len(findings.label_issues)}"
                )
                figures = [f"{findings.train_test_drift_auroc:.2f}", f"{seconds:.0f}", f"{peak_mib():,.0f}"]
                rows.append([f"{title}, {what}", *cells, found, *figures])
    head = [
        "data", "exact duplicates found", "moved by a pixel", "saved as JPEG", "brighter", "label issues: recall",
        "precision", "groups of duplicates, of near-duplicates, leaks; label issues", "drift, AUROC", "s",
        "peak MiB so far",
    ]  # fmt: skip
    return written(head, rows)


# classes of very different size


def balance() -> tuple[list[Record], str]:
    """Train on MNIST with a hundredth of the images of 0 to 4, with and without balanced sampling: three seeds."""
    mnist = load_dataset("mnist")
    g = torch.Generator().manual_seed(0)
    keep = (mnist.train.labels >= 5) | (torch.rand(len(mnist.train), generator=g) < 0.01)
    skewed = dataclasses.replace(mnist, source=None, train=mnist.train.select(keep.nonzero().squeeze(1)))
    counts = torch.bincount(skewed.train.labels).tolist()
    rows = []
    for balanced in (False, True):
        figures: dict[str, list[float]] = {"accuracy": [], "balanced_accuracy": [], "macro_f1": []}
        for seed in range(3):
            with tempfile.TemporaryDirectory() as folder:
                run = convlens.train(
                    skewed, "mnist-995", epochs=4, seed=seed, balanced_sampling=balanced, out=Path(folder) / "run"
                )
                for key, values in figures.items():
                    values.append(100 * run.test[key])
        cells = [f"{statistics.mean(v):.2f}% +- {statistics.stdev(v):.2f}" for v in figures.values()]
        rows.append(["`--balanced-sampling`" if balanced else "without", *cells])
    what = f"classes of {min(counts)} to {max(counts):,} images"
    return written([what, "accuracy", "balanced accuracy", "macro-F1"], rows)


SECTIONS = {"unknown": unknown, "doctor": doctor, "balance": balance}

if __name__ == "__main__":
    run_sections(SECTIONS, sys.argv[1:] or list(SECTIONS), RESULTS)
