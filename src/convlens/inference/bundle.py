"""The model bundle: a folder that holds all a net needs to be used, and says what it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError, UnknownNameError, UsageError
from convlens.evaluation.uncertainty import UncertaintyModel
from convlens.inference.store import CARD, CONFIG, UNCERTAINTY, WEIGHTS, read_verified
from convlens.models import create_model
from convlens.system.files import atomic_write, read_json, write_json, write_text
from convlens.system.text import first_few

FORMAT = 1

SIDES = ("channels", "image_height", "image_width")

# how the test split was used: said on the model card and in the report
UNSEEN = "The test split was measured once, after training; nothing was chosen by it."

WATCHED = "The test split was measured after every epoch, for the curves; nothing was chosen by it."


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained net with its architecture, classes and preprocessing.

    ``model`` is the name and the constructor arguments that rebuild the net; ``trained`` is what the model card
    tells: data, recipe, machine, test figures. ``trust`` was fitted on validation images, where there were any.
    """

    net: nn.Module
    model: Mapping[str, Any]  # {"name": ..., "arguments": {...}}
    classes: tuple[str, ...]
    preprocess: Preprocess
    trained: Mapping[str, Any]
    trust: UncertaintyModel | None = None

    def save(self, folder: Path) -> None:
        """Write weights (safetensors), ``config.json`` and the model card; the config comes last."""
        sha256 = write_tensors(folder / WEIGHTS, self.net.state_dict())
        write_text(folder / CARD, self.card())
        config = {
            "format": FORMAT,
            "model": dict(self.model),
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_json(),
            "trained": dict(self.trained),
            "sha256": sha256,
        }
        if self.trust is not None:
            config["trust"] = {
                **self.trust.to_json(),
                "sha256": write_tensors(folder / UNCERTAINTY, self.trust.tensors()),
            }
        write_json(folder / CONFIG, config)

    def card(self) -> str:
        """Return the model card as Markdown: what it is, what on and how it was trained, how good, its limits."""
        about, shape = self.trained, self.preprocess
        test, data, machine = about["test"], about["data"], about["machine"]
        low, high = test["accuracy_interval"]
        counts = ", ".join(f"{count:,} {name}" for name, count in data["counts"].items())
        colour = "grey" if shape.channels == 1 else "RGB"
        return f"""{self.card_metadata()}
# {data["name"]}: {self.model["name"]}

A small convolutional image classifier, trained by convlens {about["convlens"]}.

| | |
|---|---|
| classes | {first_few(self.classes, 100)} |
| input | {shape.width} x {shape.height} pixels, {colour}; other pictures are adapted |
| parameters | {about["parameters"]:,} |
| data | {data["name"]}: {counts} images; {data["split_description"]} |
| test accuracy | {test["accuracy"]:.2%} of {test["n"]:,} images (95% interval {low:.2%} to {high:.2%}) |
| recipe | `{about["recipe"]["name"]}`, seed {about["recipe"]["seed"]} |
| command | `{about["command"]}` |
| training | {about["seconds"]:.0f} s on {machine["device_name"]}, {machine["threads"]} thread(s) |

{WATCHED if about["recipe"].get("log_test_metrics") else UNSEEN} The interval is that of the test sample
alone; another seed gives another net.

{self.say_trust()}

Use: `convlens predict FOLDER picture.png`, or in Python `convlens.Classifier.load("FOLDER").predict("picture.png")`.
"""

    def card_metadata(self) -> str:
        """Return what stands above the card for hubs of models, in YAML as Hugging Face's has it."""
        name = json.dumps(self.trained["data"]["name"])  # a string of JSON is one of YAML
        return f"""---
library_name: convlens
pipeline_tag: image-classification
tags:
- image-classification
model-index:
- name: {json.dumps(self.model["name"])}
  results:
  - task:
      type: image-classification
    dataset:
      name: {name}
      type: {name}
      split: test
    metrics:
    - type: accuracy
      value: {self.trained["test"]["accuracy"]:.4f}
---
"""

    def say_trust(self) -> str:
        """Return what the card says of probabilities and of pictures of other things."""
        if self.trust is None:
            return """There were no validation images: its probabilities are not calibrated, and it answers one of its
classes for every picture, also for one that shows none of them."""
        test = self.trained["test"]
        before, after = test["calibration_error"]
        fitted = f"{self.trust.n:,} validation images"
        if self.trust.temperature == 1:
            calibrated = f"""Its probabilities are those of the net, for {fitted} prove no need to change them: on
the test images they are off by {after:.2%} on average."""
        else:
            calibrated = f"""Its probabilities are calibrated: on the test images they are off by {after:.2%} on average
({before:.2%} before; temperature {self.trust.temperature:.2f}, fitted on {fitted})."""
        return f"""{calibrated} It says
"unknown" of a picture that is stranger to it than 95% of the validation images are; of the test images
{test["known"]:.1%} pass. That is a help and no proof: some strange pictures pass too."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as a safetensors file, atomically; return the SHA-256 of its content."""
    content = dump_tensors({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read a safetensors file; ConvlensError if its content is not the one with this SHA-256."""
    return load_tensors(read_verified(path, sha256))


def require_fitting(tensors: Mapping[str, Tensor], name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are the weights of the net, as far as that is known without building it.

    Numbers that make no sense must not fill the memory. A net that reads its own weights cannot do without any.
    """
    try:
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in create_model(name, **arguments).state_dict().items()}
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise
    else:
        if {key: value.shape for key, value in tensors.items()} != shapes:
            raise ValueError(f"its weights are not those of {name} with {arguments}")


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle; ConvlensError says what is missing, damaged, or made by a newer convlens."""
    config = read_json(folder / CONFIG)
    version = config.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise ConvlensError(
            f"{folder} was made by a newer convlens (bundle format {version}, this one reads {FORMAT}); "
            "upgrade with: pip install --upgrade convlens"
        )
    try:
        model, arguments = config["model"], config["model"]["arguments"]
        tensors = read_tensors(folder / WEIGHTS, config["sha256"])
        preprocess = Preprocess.from_json(config["preprocess"])
        classes = tuple(str(name) for name in config["classes"])
        if len(classes) != arguments["classes"]:
            raise ValueError(f"{len(classes)} class names for {arguments['classes']} outputs")
        if (preprocess.channels, preprocess.height, preprocess.width) != tuple(arguments[side] for side in SIDES):
            raise ValueError("its net takes images of another size than its preprocessing makes")
        require_fitting(tensors, model["name"], arguments)
        net = create_model(model["name"], **arguments)
        net.load_state_dict(tensors)
        trust = None
        if (fitted := config.get("trust")) is not None:
            trust = UncertaintyModel.from_json(fitted, read_tensors(folder / UNCERTAINTY, fitted["sha256"]))
        return Bundle(net.eval(), model, classes, preprocess, config["trained"], trust)
    except FileNotFoundError as error:
        raise ConvlensError(f"{error.filename} is missing") from None
    except UnknownNameError as error:
        raise ConvlensError(f"{folder}: {error}; import the module that registers it first") from None
    except (
        OSError, KeyError, TypeError, ValueError, OverflowError, RuntimeError, SafetensorError, UsageError
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ConvlensError(f"{folder} is not a bundle that can be read: {reason}") from None
