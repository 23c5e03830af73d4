"""A recipe: everything that decides how a net is trained, as flat, typed, frozen data."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convlens.errors import UnknownNameError, UsageError

# the fields that say how long it trains: one of them is set
LENGTHS = ("epochs", "max_steps", "max_seconds")
# the fields that are options of the net
MODEL_OPTIONS = ("width", "kernel_size", "pool", "output_relu")


def option(default: Any, text: str, *, choices: tuple[str, ...] = (), low: float | None = None) -> Any:
    """Declare a field: its default, its help text, and what values it takes."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a net is trained. Every field is a flag of ``convlens train`` and a key of a run's config.json.

    Exactly one of ``epochs``, ``max_steps`` and ``max_seconds`` is set. What each field is, and takes, stands in its
    metadata, and is checked: UsageError for a value of another type or out of range, or for fields that do not go
    together.

    >>> recipe = Recipe(epochs=3, optimizer="adamw", lr=0.01)
    >>> recipe.override(max_steps=100).epochs is None
    True
    >>> recipe.override(optimizer="adamm")
    Traceback (most recent call last):
    convlens.errors.UnknownNameError: unknown value of --optimizer 'adamm'; did you mean 'adam'?
    """

    name: str = option("custom", "name of the recipe this one was made from")
    # the net; None leaves an option of the net at its default
    model: str = option("small", "net to train; `convlens models` lists them")
    width: int | None = option(None, "width of the net: filters in its first stage", low=1)
    kernel_size: int | None = option(None, "side of the convolution kernels", low=1)
    pool: str | None = option(None, "pooling of the net", choices=("max", "avg"))
    output_relu: bool | None = option(None, "keep the ReLU behind the last layer")
    pretrained: str = option("", "weights to start from: a .safetensors file, or timm for timm's own")
    freeze: int = option(0, "leave so many of the first stages as they were trained", low=0)
    # data
    image_size: int = option(
        0, "side in pixels that a folder's images are fitted to; 0: as --pretrained has them, else their own, up to 64",
        low=0,
    )  # fmt: skip
    val_fraction: float = option(0.1, "share of the training images held out for validation; 0: none", low=0)
    log_test_metrics: bool = option(False, "measure the test split every epoch, for the curves only")
    # length
    epochs: int | None = option(None, "passes over the training images", low=1)
    max_steps: int | None = option(None, "training steps, instead of epochs", low=1)
    max_seconds: float | None = option(None, "seconds of training and validating, instead of epochs", low=0.01)
    batch_size: int = option(256, "images in a step", low=1)
    grad_accum_steps: int = option(
        1, "parts that a step's images go through the net in; BatchNorm measures each by itself", low=1
    )
    sync_batchnorm: bool = option(False, "let BatchNorm measure the images of all processes together")
    initial_size: int = option(
        0, "side in pixels that images have in the first part of the training; 0: always whole", low=0
    )
    initial_size_fraction: float = option(0.5, "share of the steps that --initial-size is for", low=0)
    save_every: int = option(0, "save every so many steps too; 0: after each epoch only", low=0)
    balanced_sampling: bool = option(False, "show every class as often as the others, however many images it has")
    # objective and optimizer
    loss: str = option("cross-entropy", "loss function", choices=("cross-entropy", "nll"))
    label_smoothing: float = option(0.0, "share of the label spread over all classes", low=0)
    optimizer: str = option("sgd", "optimizer", choices=("sgd", "adam", "adamw", "muon"))
    lr: float = option(0.1, "learning rate (its peak, where a schedule changes it)", low=0)
    head_lr: float = option(0.0, "learning rate of linear layers; 0: as the others", low=0)
    bias_lr: float = option(0.0, "learning rate of biases and BatchNorm's factors; 0: as the others", low=0)
    momentum: float = option(0.9, "momentum of SGD, first beta of Adam", low=0)
    nesterov: bool = option(False, "Nesterov momentum")
    muon_momentum: float = option(0.6, "momentum of Muon's filters; --momentum is for its other weights", low=0)
    weight_decay: float = option(0.0, "weight decay, of weights but not of biases, BatchNorm and Muon's filters", low=0)
    max_grad_norm: float = option(0.0, "largest norm of the gradient; 0: not clipped", low=0)
    lr_schedule: str = option(
        "linear",
        "course of the learning rate",
        choices=("constant", "step", "one-cycle", "cosine", "linear"),
    )
    warmup_fraction: float = option(0.0, "share of the steps in which the learning rate rises", low=0)
    lr_step_size: int = option(15, "epochs between the steps of the step schedule", low=1)
    lr_gamma: float = option(0.1, "what a step multiplies the learning rate by", low=0)
    ema_decay: float = option(0.0, "decay of the exponential moving average of the weights; 0: none", low=0)
    # choosing, on validation only
    restore_best: bool = option(False, "keep the weights of the epoch with the best validation accuracy")
    patience: int = option(0, "stop after so many epochs without a better validation accuracy; 0: never", low=0)
    # augmentation
    translate: int = option(0, "move images by up to so many pixels", low=0)
    rotation: float = option(0.0, "turn images by up to so many degrees", low=0)
    scale: float = option(0.0, "zoom images by up to this share", low=0)
    hflip: bool = option(False, "mirror images left to right, each in every second epoch")
    center_crop_prob: float = option(0.0, "probability of cutting to the centre and resizing back", low=0)
    center_crop_ratio: float = option(22 / 28, "side of that centre, as a share of the image's", low=0)
    cutout: int = option(0, "side of a square that is blanked in each image", low=0)
    color_jitter: float = option(0.0, "change brightness, contrast, saturation by up to this share", low=0)
    mixup: float = option(0.0, "alpha of mixup; 0: none", low=0)
    cutmix: float = option(0.0, "alpha of cutmix; 0: none", low=0)
    # testing
    tta: bool = option(False, "test once more, averaging over mirrored and shifted views; said beside the plain test")
    # running
    save_snapshots: bool = option(False, "keep the weights along the way, for `convlens timelapse`")
    tensorboard: bool = option(False, "write the curves for TensorBoard too")
    seed: int = option(0, "fixes everything random", low=0)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = option(0, "CPU threads; 0: all cores", low=0)
    precision: str = option("auto", "arithmetic of the net in training", choices=("auto", "fp32", "bf16"))

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, check_value(item, getattr(self, item.name)))
        if sum(getattr(self, name) is not None for name in LENGTHS) != 1:
            raise UsageError("a recipe needs epochs, max_steps or max_seconds, one of the three")
        for name in ("val_fraction", "momentum", "muon_momentum", "ema_decay"):
            if getattr(self, name) >= 1:
                raise UsageError(f"{flag(name)} is {getattr(self, name)}; it must be below 1")
        for name in ("label_smoothing", "scale", "center_crop_prob", "warmup_fraction", "initial_size_fraction"):
            if getattr(self, name) > 1:
                raise UsageError(f"{flag(name)} is {getattr(self, name)}; it must be at most 1")
        if self.max_seconds is not None and self.lr_schedule == "step":
            raise UsageError("--lr-schedule step counts epochs, and a training given in seconds has none; try linear")
        if self.nesterov and not (self.optimizer in ("sgd", "muon") and self.momentum > 0):
            raise UsageError("--nesterov needs --optimizer sgd or muon and a --momentum above 0")

    def override(self, **changes: Any) -> Recipe:
        """Return the recipe with ``changes``; a new length replaces the old: epochs, max_steps or max_seconds.

        Another optimizer forgets ``head_lr`` and ``bias_lr``, which mean nothing to it, unless they are given too.
        Raises UnknownNameError for an unknown key (with the nearest one), UsageError for a value the field does not
        take.
        """
        known = [item.name for item in dataclasses.fields(self)]
        for key in changes:
            if key not in known:
                raise UnknownNameError("recipe option", key, known)
        if changes.get("optimizer", self.optimizer) != self.optimizer:  # rates of another rule mean nothing to it
            changes = {"head_lr": 0.0, "bias_lr": 0.0, **changes}
        if any(changes.get(name) is not None for name in LENGTHS):
            changes = {**dict.fromkeys(LENGTHS), **changes}
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from the values that :func:`dataclasses.asdict` gave; raises as :meth:`override` does."""
        return cls(epochs=1).override(**{**dict.fromkeys(LENGTHS), **values})

    def model_options(self) -> dict[str, Any]:
        """Return the options of the net that this recipe sets.

        >>> Recipe(epochs=1, width=8).model_options()
        {'width': 8}
        """
        options = {name: getattr(self, name) for name in MODEL_OPTIONS}
        return {name: value for name, value in options.items() if value is not None}

    def total_steps(self, steps_per_epoch: int, step: int = 0, seconds: float = 0.0) -> int:
        """Return how many steps the whole training has.

        One that is given in seconds goes by the pace of the ``step`` steps so far, which took ``seconds``; before
        the first, an epoch is as good a guess as any.
        """
        if self.max_seconds is not None:
            return max(math.ceil(step * self.max_seconds / seconds), step) if seconds else steps_per_epoch
        return self.max_steps if self.max_steps is not None else (self.epochs or 0) * steps_per_epoch


FIELD_TYPES: dict[str, Any] = typing.get_type_hints(Recipe)


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def plain_type(name: str) -> tuple[type, bool]:
    """Return (bool, int, float or str; may it be None?) of a field."""
    hint = FIELD_TYPES[name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def check_value(item: dataclasses.Field[Any], value: Any) -> Any:
    """Return ``value`` as the field's type; UsageError if it is of another type or out of range."""
    kind, optional = plain_type(item.name)
    if value is None and optional:
        return None
    if isinstance(value, numbers.Number) and hasattr(value, "item"):
        value = value.item()  # NumPy's numbers
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{flag(item.name)} takes {KIND_NAMES[kind]}, not {value!r}")
    choices, low = item.metadata["choices"], item.metadata["low"]
    if choices and value not in choices:
        raise UnknownNameError(f"value of {flag(item.name)}", str(value), choices)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{flag(item.name)} is {value}; it must be finite")
    if item.name == "seed" and typing.cast(int, value) >= 2**63:
        raise UsageError(f"--seed is {value}; it must be below 2**63")
    if low is not None and not typing.cast(float, value) >= low:
        raise UsageError(f"{flag(item.name)} is {value}; it must be at least {low}")
    return value


KIND_NAMES = {int: "a whole number", float: "a number", bool: "yes or no", str: "a word"}
