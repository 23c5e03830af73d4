"""The model card of a bundle, in Markdown with the YAML header of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from convlens.data.preprocess import Preprocess
from convlens.system.text import first_few

# how the test split was used; model card and report say one of these
TEST_UNSEEN = "The test split was evaluated once, after training, and played no part in model selection."

TEST_LOGGED = "The test split was evaluated after every epoch, to draw curves; it played no part in model selection."


def make_model_card(
    model: str,
    classes: Sequence[str],
    preprocess: Preprocess,
    training: Mapping[str, Any],
    uncertainty: tuple[float, int] | None,
) -> str:
    """Return the model card as Markdown.

    Args:
        model: The name of the model.
        classes: The class names.
        preprocess: The preprocessing of the model.
        training: The training record of the bundle.
        uncertainty: Temperature and number of validation images; None if there were none.
    """
    test, data, machine, recipe = (training[key] for key in ("test", "data", "machine", "recipe"))
    low, high = test["accuracy_ci95"]
    counts = ", ".join(f"{count:,} {name}" for name, count in data["counts"].items())
    color = "grayscale" if preprocess.channels == 1 else "RGB"
    return f"""{make_header(model, data["name"], test["accuracy"])}
# {data["name"]}: {model}

A small convolutional image classifier, trained with convlens {training["version"]}.

| | |
|---|---|
| classes | {first_few(classes, 100)} |
| input | {preprocess.width} x {preprocess.height} pixels, {color}; convlens adapts other images |
| parameters | {training["parameters"]:,} |
| data | {data["name"]}: {counts} images; {data["split_description"]} |
| test accuracy | {test["accuracy"]:.2%} of {test["num_images"]:,} images (95% interval {low:.2%} to {high:.2%}) |
| recipe | `{recipe["name"]}`, seed {recipe["seed"]} |
| command | `{training["command"]}` |
| training | {training["seconds"]:.0f} s on {machine["device_name"]}, {machine["threads"]} thread(s) |

{TEST_LOGGED if recipe.get("log_test_metrics") else TEST_UNSEEN} The interval
covers the sampling of test images only; another seed gives another model.

{describe_uncertainty(test, uncertainty)}

Use: `convlens predict FOLDER image.png`, or in Python `convlens.Classifier.load("FOLDER").predict("image.png")`.
"""


def make_header(model: str, data: str, accuracy: float) -> str:
    """Return the YAML header that Hugging Face reads."""
    name = json.dumps(data)  # a JSON string is a YAML string
    return f"""---
library_name: convlens
pipeline_tag: image-classification
tags:
- image-classification
model-index:
- name: {json.dumps(model)}
  results:
  - task:
      type: image-classification
    dataset:
      name: {name}
      type: {name}
      split: test
    metrics:
    - type: accuracy
      value: {accuracy:.4f}
---
"""


def describe_uncertainty(test: Mapping[str, Any], uncertainty: tuple[float, int] | None) -> str:
    """Return the paragraph on calibration and out-of-distribution detection."""
    if uncertainty is None:
        return """There were no validation images: the probabilities are not calibrated, and the model assigns one of
its classes to every image, even to one that shows none of them."""
    (temperature, count), (before, after) = uncertainty, test["ece"]
    if temperature == 1:
        calibrated = f"""The probabilities are those of the model; {count:,} validation images show no significant gain
from temperature scaling. Expected calibration error on the test images: {after:.2%}."""
    else:
        calibrated = f"""The probabilities are temperature-scaled (temperature {temperature:.2f}, fitted on {count:,}
validation images). Expected calibration error on the test images: {after:.2%} ({before:.2%} before)."""
    return f"""{calibrated}
Images unlike the training data are reported as "unknown". The detector accepts 95% of the validation images and
{test["in_distribution_rate"]:.1%} of the test images; some out-of-distribution images pass too."""
