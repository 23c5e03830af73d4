"""Audit a data set: duplicates, leaks, constant images and label issues. Nothing is changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlens.audit.duplicates import describe_images, find_exact_duplicates, find_near_duplicates
from convlens.data.cross_validation import assign_folds, merge
from convlens.data.dataset import Dataset, Split
from convlens.data.loading import refuse_inside_data
from convlens.data.preprocess import Preprocess
from convlens.evaluation.inference import compute_logits
from convlens.reports.image_grid import image_grid
from convlens.run_dir import atomic_dir, require_new_path
from convlens.system.device import select_device, set_num_threads
from convlens.system.files import write_json, write_name_list
from convlens.system.random import derive_seed, preserve_rng_state, seed_everything
from convlens.training.build import make_model, model_config
from convlens.training.callbacks import ProgressBarCallback
from convlens.training.loop import fit
from convlens.training.recipe import Recipe
from convlens.training.recipes import default_recipe, get_recipe

FOLDS = 3
# The fraction of a class's average confidence by which a prediction must exceed the given label. Northcutt et al. use
# the whole as a threshold, without a margin: that finds 76% of the wrong labels planted in MNIST instead of 97%.
LABEL_ISSUE_MARGIN = 0.7
MIN_CLASS_SIZE = 10  # training images
MAX_DRIFT_IMAGES = 2000  # of each side
MAX_GRID_ISSUES, MAX_GRID_GROUPS, MAX_GRID_GROUP_IMAGES = 100, 40, 4
# Faster recipes than the defaults, because an ensemble of folds does not need the last tenth of a percent.
AUDIT_RECIPES = {"mnist": ("mnist-995", 4), "fashion-mnist": ("fashion-92", 4), "cifar10": ("cifar10-small", 5)}


@dataclass(frozen=True)
class LabelIssue:
    """An image whose label is likely wrong.

    Args:
        image_id: ``split/id``.
        given_label: The label in the data set.
        predicted_label: The class that models predict which were not trained on the image.
        score: The predicted probability of that class minus that of the given label, 0..1.
    """

    image_id: str
    given_label: str
    predicted_label: str
    score: float


@dataclass
class AuditReport:
    """The result of an audit. Images are named ``split/id``, those of a folder by their path.

    Args:
        data: The name of the data set.
        num_images: The number of images.
        unreadable: Why each of the files that were skipped cannot be read.
        constant_images: Images of a single color.
        small_classes: The number of training images of classes with fewer than 10.
        imbalance: The size of the largest class divided by that of the smallest.
        exact_duplicates: Groups of images with equal pixels.
        near_duplicates: Groups of near-duplicates.
        leaks: The number of groups of either kind that are in more than one split.
        label_issues: Likely wrong labels, by descending score.
        label_check_skipped: Why labels could not be checked, if they were not.
        train_test_drift_auroc: AUROC of a classifier that separates test images from others, 0.5 (cannot) to 1.
    """

    data: str
    num_images: int
    unreadable: list[str] = field(default_factory=list)
    constant_images: list[str] = field(default_factory=list)
    small_classes: dict[str, int] = field(default_factory=dict)
    imbalance: float = 1.0
    exact_duplicates: list[list[str]] = field(default_factory=list)
    near_duplicates: list[list[str]] = field(default_factory=list)
    leaks: int = 0
    label_issues: list[LabelIssue] = field(default_factory=list)
    label_check_skipped: str = ""
    train_test_drift_auroc: float = 0.5

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return dataclasses.asdict(self)

    def to_exclude(self) -> dict[str, str]:
        """Return the images to exclude from training, with the reason.

        One image of each group of duplicates stays, a test image if there is one. Test images are never excluded,
        because models must not choose what they are tested on.
        """
        reasons = dict.fromkeys(self.constant_images, "a single color")
        for groups, kind in ((self.exact_duplicates, "duplicate"), (self.near_duplicates, "near-duplicate")):
            for group in groups:
                remaining = [image for image in group if image not in reasons]
                kept = max(remaining, key=lambda image: image.startswith("test/"), default="")
                reasons |= {image: f"{kind} of {kept}" for image in remaining if image != kept}
        for issue in self.label_issues:
            reasons.setdefault(issue.image_id, f"labeled {issue.given_label}, predicted {issue.predicted_label}")
        return {image: reason for image, reason in reasons.items() if not image.startswith("test/")}


def audit(dataset: Dataset, recipe: Recipe | None = None, *, labels: bool = True) -> AuditReport:
    """Audit the images and labels of a data set.

    Args:
        dataset: The data set, not in shards.
        recipe: Trains the models that check the labels, by default a fast one for the data.
        labels: Check labels.

    Raises:
        UsageError: The data set is in shards.
    """
    merged, splits = merge(dataset)
    names = [image_name(split, image) for split, image in zip(splits, merged.ids, strict=True)]
    report = AuditReport(dataset.name, len(merged), list(dataset.unreadable))
    flat = merged.images.flatten(1)
    constant = (flat.amax(dim=1) == flat.amin(dim=1)).nonzero().squeeze(1)
    report.constant_images = [names[row] for row in constant.tolist()]
    counts = torch.bincount(dataset.train.labels, minlength=len(dataset.classes)).tolist()
    report.imbalance = max(counts) / max(min(counts), 1)
    report.small_classes = {
        label: count for label, count in zip(dataset.classes, counts, strict=True) if count < MIN_CLASS_SIZE
    }

    exact = find_exact_duplicates(merged.images)
    # One image represents each group of exact duplicates, a test image if there is one.
    represented: set[int] = set()
    for group in exact:
        represented |= {*group} - {max(group, key=lambda row: splits[row] == "test")}
    unique = torch.tensor([row for row in range(len(merged)) if row not in represented])
    shapes, tints = describe_images(merged.images, unique)
    near = [[int(unique[i]) for i in group] for group in find_near_duplicates(shapes, tints)]
    report.exact_duplicates = [[names[row] for row in group] for group in exact]
    report.near_duplicates = [[names[row] for row in group] for group in near]
    report.leaks = sum(len({splits[row] for row in group}) > 1 for group in [*exact, *near])
    report.train_test_drift_auroc = train_test_drift_auroc(shapes, [splits[int(row)] == "test" for row in unique])

    rarest = int(torch.bincount(merged.labels, minlength=len(dataset.classes)).min())
    if rarest < FOLDS:
        report.label_check_skipped = f"a class has {rarest} images, and the check needs {FOLDS} folds"
    elif labels:
        report.label_issues = find_label_issues(dataset, merged, names, recipe or default_audit_recipe(dataset))
    return report


def image_name(split: str, image: str) -> str:
    """Return the name of an image in reports: split/id, or the id if it is a path that begins with the split."""
    return image if image.startswith(f"{split}/") else f"{split}/{image}"


def train_test_drift_auroc(shapes: Tensor, is_test: list[bool]) -> float:
    """Return how well a logistic regression separates test images from others, as AUROC, 0.5 (not) to 1.

    Cross-validated, on up to 2000 images of each side. 0.5 if a side has fewer than 5 images.

    Args:
        shapes: float32 (N, H, W).
        is_test: For each of them.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict

    target = torch.tensor(is_test)
    generator = torch.Generator().manual_seed(0)
    sides = []
    for side in (True, False):
        rows = (target == side).nonzero().squeeze(1)
        sides.append(rows[torch.randperm(len(rows), generator=generator)[:MAX_DRIFT_IMAGES]])
    if min(map(len, sides)) < 5:
        return 0.5
    chosen = torch.cat(sides)
    x, y = shapes[chosen].flatten(1).numpy(), target[chosen].numpy()
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)
    scores = cross_val_predict(LogisticRegression(C=0.01, max_iter=200), x, y, cv=5, method="decision_function")
    return max(float(roc_auc_score(y, scores)), 0.5)


def default_audit_recipe(dataset: Dataset) -> Recipe:
    """Return the recipe of the models that check the labels."""
    known = dataset.source or dataset.name
    if known in AUDIT_RECIPES:
        name, epochs = AUDIT_RECIPES[known]
        return get_recipe(name).override(epochs=epochs)
    return default_recipe(known)


def find_label_issues(dataset: Dataset, merged: Split, names: list[str], recipe: Recipe) -> list[LabelIssue]:
    """Return likely wrong labels, by descending score: confident learning (Northcutt et al. 2021).

    An image has a label issue if models that were not trained on it prefer another class by a margin of 0.7 times the
    average confidence in that class on the images labeled with it.

    Args:
        dataset: The data set.
        merged: Its images as one split.
        names: Their names in the report.
        recipe: Trains the models.
    """
    given, top, predicted = out_of_fold_probabilities(dataset, merged, recipe)
    labels = merged.labels
    confidence = torch.bincount(labels, given.double()) / torch.bincount(labels)  # (K,)
    score = top - given
    rows = ((predicted != labels) & (score >= LABEL_ISSUE_MARGIN * confidence[predicted])).nonzero().squeeze(1)
    rows = rows[score[rows].argsort(descending=True)]
    classes = dataset.classes
    return [
        LabelIssue(names[row], classes[int(labels[row])], classes[int(predicted[row])], round(float(score[row]), 4))
        for row in rows.tolist()
    ]


def out_of_fold_probabilities(dataset: Dataset, merged: Split, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Predict each image with a model that was trained on the other folds.

    Returns:
        The probability of the given label, the highest probability, and its class, (N,) each.
    """
    recipe = recipe.override(val_fraction=0.0, restore_best=False, patience=0, log_test_metrics=False)
    fold = assign_folds(merged.labels, dataset.classes, FOLDS)
    device = select_device(recipe.device)
    given, top = torch.zeros(2, len(merged))
    predicted = torch.zeros(len(merged), dtype=torch.int64)
    with preserve_rng_state():
        set_num_threads(recipe.threads)
        for number in range(FOLDS):
            held_out = (fold == number).nonzero().squeeze(1)
            train = merged.select((fold != number).nonzero().squeeze(1))
            part = dataclasses.replace(dataset, train=train, test=train.select(torch.arange(0)), validation=None)
            preprocess = Preprocess.fit(train.images, dataset.input_style)
            seed_everything(derive_seed(recipe.seed, number), device)
            model = make_model(model_config(recipe, part), part, preprocess)
            for _ in fit(model, part, recipe, preprocess=preprocess, callbacks=[ProgressBarCallback()]):
                pass
            logits = compute_logits(model, merged.images[held_out], preprocess.normalizer())
            probabilities = logits.softmax(dim=1).cpu()  # (n, K)
            given[held_out] = probabilities.gather(1, merged.labels[held_out, None])[:, 0]
            top[held_out], predicted[held_out] = probabilities.max(dim=1)
    return given, top, predicted


def require_new_outputs(path: Path, data: Any, field: str) -> None:
    """Raise UsageError if ``path``, given as ``field``, exists or is inside the folder of the data."""
    require_new_path(path, field)
    refuse_inside_data(path, data, field)


def write_report(report: AuditReport, dataset: Dataset, folder: Path) -> None:
    """Write ``doctor.json`` and image grids of label issues and duplicates into the new folder ``folder``.

    Raises:
        UsageError: The folder exists or is inside the folder of the data.
    """
    require_new_outputs(folder, dataset, "out")
    merged, splits = merge(dataset)
    row = {image_name(split, image): i for i, (split, image) in enumerate(zip(splits, merged.ids, strict=True))}
    with atomic_dir(folder) as new:
        if issues := report.label_issues[:MAX_GRID_ISSUES]:
            images = merged.images[[row[issue.image_id] for issue in issues]]
            captions = [f"{i.given_label}? {i.predicted_label}\n{shorten(i.image_id)}" for i in issues]
            image_grid(images, captions, "Label issues: given label? predicted label").save(new / "label_issues.png")
        groups = [*report.exact_duplicates, *report.near_duplicates]
        if groups:
            groups.sort(key=lambda group: -len({splits[row[name]] for name in group}))  # leaks first
            numbered = enumerate(groups[:MAX_GRID_GROUPS], start=1)
            shown = [(number, name) for number, group in numbered for name in group[:MAX_GRID_GROUP_IMAGES]]
            images = merged.images[[row[name] for _, name in shown]]
            captions = [f"{number}\n{shorten(name)}" for number, name in shown]
            image_grid(images, captions, "Duplicates by group; leaks first").save(new / "duplicates.png")
        write_json(new / "doctor.json", report.to_json())


def shorten(name: str) -> str:
    """Return the end of an image's name, for a caption."""
    return name if len(name) <= 12 else "…" + name[-11:]


def write_exclude_file(report: AuditReport, dataset: Dataset, file: Path) -> int:
    """Write the images to exclude from training to a new file, one name and reason per line.

    Returns:
        Their number.

    Raises:
        UsageError: The file exists or is inside the folder of the data.
    """
    require_new_outputs(file, dataset, "exclude_file")
    reasons = report.to_exclude()
    write_name_list(file, reasons)
    return len(reasons)
