"""A recipe: every setting of a training as flat, typed, frozen data."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from convlens.errors import UnknownNameError, UsageError

# the length of a training: exactly one of these fields is set
LENGTHS = ("epochs", "max_steps", "max_seconds")
# fields that are constructor arguments of the model
MODEL_OPTIONS = ("width", "kernel_size", "pool", "output_relu")


def option(default: Any, text: str, *, panel: str, choices: tuple[str, ...] = (), low: float | None = None) -> Any:
    """Declare a field: its default, help text, help panel, allowed values and lower bound."""
    return field(default=default, metadata={"help": text, "panel": panel, "choices": choices, "low": low})


_model = partial(option, panel="Model")
_training = partial(option, panel="Training")
_augmentation = partial(option, panel="Data augmentation")
_runtime = partial(option, panel="Runtime")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a training.

    Every field is a flag of ``convlens train`` and a key of a run's ``config.json``. Exactly one of ``epochs``,
    ``max_steps`` and ``max_seconds`` is set. The metadata of a field hold its help text and the values it takes.

    Raises:
        UsageError: A value has the wrong type or is out of range, or fields contradict each other.

    >>> recipe = Recipe(epochs=3, optimizer="adamw", lr=0.01)
    >>> recipe.override(max_steps=100).epochs is None
    True
    >>> recipe.override(optimizer="adamm")
    Traceback (most recent call last):
    convlens.errors.UnknownNameError: unknown value of `optimizer` 'adamm'; did you mean 'adam'?
    """

    name: str = option("custom", "name of the recipe this one was made from", panel="")
    # model; None keeps the model's own default
    model: str = _model("small", "architecture; `convlens models` lists them")
    width: int | None = _model(None, "number of filters in the first stage", low=1)
    kernel_size: int | None = _model(None, "side of the convolution kernels", low=1)
    pool: str | None = _model(None, "kind of pooling", choices=("max", "avg"))
    output_relu: bool | None = _model(None, "apply a ReLU to the last layer's output")
    pretrained: str = _model("", "initial weights: a .safetensors file, or timm for timm's own")
    freeze: int = _model(0, "number of first stages whose weights stay fixed", low=0)
    # data
    image_size: int = _training(
        0, "side in pixels to which the images of a folder are resized; 0: that of the pretrained weights, else the "
        "images' own, up to 64", low=0,
    )  # fmt: skip
    val_fraction: float = _training(0.1, "fraction of the training images held out for validation; 0: none", low=0)
    balanced_sampling: bool = _training(False, "sample every class equally often, whatever its number of images")
    # length
    epochs: int | None = _training(None, "passes over the training images", low=1)
    max_steps: int | None = _training(None, "training steps, instead of epochs", low=1)
    max_seconds: float | None = _training(None, "seconds of training and validation, instead of epochs", low=0.01)
    batch_size: int = _training(256, "images per step, over all processes and micro-batches", low=1)
    grad_accum_steps: int = _training(
        1, "micro-batches per step; BatchNorm uses the statistics of each micro-batch", low=1
    )
    sync_batchnorm: bool = _training(False, "compute BatchNorm statistics over the images of all processes")
    initial_size: int = _training(0, "side in pixels of images in the first part of the training; 0: full size", low=0)
    initial_size_fraction: float = _training(0.5, "fraction of the steps that use the initial size", low=0)
    # objective and optimizer
    loss: str = _training("cross-entropy", "loss function", choices=("cross-entropy", "nll"))
    label_smoothing: float = _training(0.0, "probability spread evenly over all classes", low=0)
    optimizer: str = _training("sgd", "optimizer", choices=("sgd", "adam", "adamw", "muon"))
    lr: float = _training(0.1, "learning rate, at its peak if a schedule changes it", low=0)
    head_lr: float = _training(0.0, "learning rate of linear layers; 0: the same as for the others", low=0)
    bias_lr: float = _training(
        0.0, "learning rate of biases and BatchNorm weights; 0: the same as for the others", low=0
    )
    momentum: float = _training(0.9, "momentum of SGD, first beta of Adam", low=0)
    nesterov: bool = _training(False, "use Nesterov momentum")
    muon_momentum: float = _training(0.6, "momentum of convolution filters with Muon", low=0)
    weight_decay: float = _training(0.0, "weight decay; not applied to biases, BatchNorm and filters with Muon", low=0)
    max_grad_norm: float = _training(0.0, "maximum norm of the gradient; 0: no clipping", low=0)
    lr_schedule: str = _training(
        "linear", "learning rate schedule", choices=("constant", "step", "one-cycle", "cosine", "linear")
    )
    warmup_fraction: float = _training(0.0, "fraction of the steps in which the learning rate rises", low=0)
    lr_step_size: int = _training(15, "epochs between two decays of the step schedule", low=1)
    lr_gamma: float = _training(0.1, "factor of each decay of the step schedule", low=0)
    ema_decay: float = _training(0.0, "decay of the exponential moving average of the weights; 0: none", low=0)
    # model selection, by the validation split only
    restore_best: bool = _training(False, "keep the weights of the epoch with the best validation accuracy")
    patience: int = _training(0, "epochs without a better validation accuracy before training stops; 0: never", low=0)
    # augmentation
    translate: int = _augmentation(0, "largest random shift in pixels", low=0)
    rotation: float = _augmentation(0.0, "largest random rotation in degrees", low=0)
    scale: float = _augmentation(0.0, "largest random zoom, as a fraction of the size", low=0)
    hflip: bool = _augmentation(False, "mirror each image left to right in every second epoch (alternating flip)")
    center_crop_prob: float = _augmentation(0.0, "probability of cropping to the center and resizing back", low=0)
    center_crop_ratio: float = _augmentation(22 / 28, "side of the center crop, as a fraction of the image's", low=0)
    cutout: int = _augmentation(0, "side in pixels of a square erased from each image", low=0)
    color_jitter: float = _augmentation(0.0, "largest relative change of brightness, contrast and saturation", low=0)
    mixup: float = _augmentation(0.0, "alpha of mixup; 0: none", low=0)
    cutmix: float = _augmentation(0.0, "alpha of CutMix; 0: none", low=0)
    # runtime
    seed: int = _runtime(0, "random seed of everything", low=0)
    device: str = _runtime("auto", "device to compute on", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = _runtime(0, "CPU threads; 0: all cores", low=0)
    precision: str = _runtime("auto", "arithmetic of the forward pass in training", choices=("auto", "fp32", "bf16"))
    tta: bool = _runtime(False, "also report test-time augmentation over mirrored and shifted views")
    log_test_metrics: bool = _runtime(False, "evaluate the test split after every epoch, for the curves only")
    save_every: int = _runtime(0, "steps between two checkpoints within an epoch; 0: only after each epoch", low=0)
    save_snapshots: bool = _runtime(False, "keep the weights of many steps, for `convlens timelapse`")
    tensorboard: bool = _runtime(False, "also write the curves for TensorBoard")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, check_value(item, getattr(self, item.name)))
        if sum(getattr(self, name) is not None for name in LENGTHS) != 1:
            raise UsageError("a recipe needs exactly one of `epochs`, `max_steps` and `max_seconds`")
        for name in ("val_fraction", "momentum", "muon_momentum", "ema_decay"):
            if getattr(self, name) >= 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}; it must be below 1", field=name)
        for name in ("label_smoothing", "scale", "center_crop_prob", "warmup_fraction", "initial_size_fraction"):
            if getattr(self, name) > 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}; it must be at most 1", field=name)
        if self.max_seconds is not None and self.lr_schedule == "step":
            raise UsageError("`lr_schedule=step` counts epochs and does not go with `max_seconds`; try linear")
        if self.nesterov and not (self.optimizer in ("sgd", "muon") and self.momentum > 0):
            raise UsageError("`nesterov` needs `optimizer=sgd` or muon, and a `momentum` above 0", field="nesterov")

    def override(self, **changes: Any) -> Recipe:
        """Return the recipe with ``changes``.

        A new length (``epochs``, ``max_steps`` or ``max_seconds``) replaces the old one. Another optimizer resets
        ``head_lr`` and ``bias_lr``, which are tuned for one optimizer, unless they are given too.

        Raises:
            UnknownNameError: There is no such field; the message names the nearest one.
            UsageError: A field does not take the value.
        """
        known = [item.name for item in dataclasses.fields(self)]
        for key in changes:
            if key not in known:
                raise UnknownNameError("recipe option", key, known)
        if changes.get("optimizer", self.optimizer) != self.optimizer:
            changes = {"head_lr": 0.0, "bias_lr": 0.0, **changes}
        if any(changes.get(name) is not None for name in LENGTHS):
            changes = {**dict.fromkeys(LENGTHS), **changes}
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from the values of :func:`dataclasses.asdict`; raises like :meth:`override`."""
        return cls(epochs=1).override(**{**dict.fromkeys(LENGTHS), **values})

    def model_options(self) -> dict[str, Any]:
        """Return the constructor arguments of the model that this recipe sets.

        >>> Recipe(epochs=1, width=8).model_options()
        {'width': 8}
        """
        options = {name: getattr(self, name) for name in MODEL_OPTIONS}
        return {name: value for name, value in options.items() if value is not None}

    def total_steps(self, steps_per_epoch: int, step: int = 0, seconds: float = 0.0) -> int:
        """Return the number of steps of the whole training.

        With ``max_seconds`` it is an estimate from the first ``step`` steps, which took ``seconds``; before the first
        step it is one epoch.
        """
        if self.max_seconds is not None:
            return max(math.ceil(step * self.max_seconds / seconds), step) if seconds else steps_per_epoch
        return self.max_steps if self.max_steps is not None else (self.epochs or 0) * steps_per_epoch


FIELD_TYPES: dict[str, Any] = typing.get_type_hints(Recipe)


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def plain_type(name: str) -> tuple[type, bool]:
    """Return the type of a field (bool, int, float or str) and whether it may be None."""
    hint = FIELD_TYPES[name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def check_value(item: dataclasses.Field[Any], value: Any) -> Any:
    """Return ``value`` converted to the field's type; UsageError for another type or a value out of range."""
    name = item.name
    kind, optional = plain_type(name)
    if value is None and optional:
        return None
    if isinstance(value, numbers.Number) and hasattr(value, "item"):
        value = value.item()  # a NumPy scalar
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"`{name}` takes {KIND_NAMES[kind]}, not {value!r}", field=name)
    choices, low = item.metadata["choices"], item.metadata["low"]
    if choices and value not in choices:
        raise UnknownNameError(f"value of `{name}`", str(value), choices, field=name)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"`{name}` is {value}; it must be finite", field=name)
    if name == "seed" and typing.cast(int, value) >= 2**63:
        raise UsageError(f"`seed` is {value}; it must be below 2**63", field=name)
    if low is not None and not typing.cast(float, value) >= low:
        raise UsageError(f"`{name}` is {value}; it must be at least {low}", field=name)
    return value


KIND_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
