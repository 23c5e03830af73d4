"""The contract of a model: logits from features and a head, named stages, and a constructor of plain values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from convlens.errors import ConvlensError, UsageError
from convlens.system.registry import Registry


class ConvNet(nn.Module):
    """Base class of the convolutional models: ``body``, an ``nn.Sequential`` of named stages, then ``head``.

    A subclass sets ``body`` and ``head`` in its constructor, or overrides the methods below.
    :func:`convlens.models.check_model` tests it.

    Attributes:
        body: The stages, in order.
        head: Maps the last feature maps to logits.
        log_probabilities: True if the model ends in log-softmax, which the loss ``nll`` needs.
        default_input_shape: (C, H, W) of the images that ``convlens models`` describes the model with.
        head_names: The prefixes of the weights that depend on the classes. Fine-tuning reinitializes them.
        is_chain: Whether each layer feeds only the next, so that a formula gives the receptive fields.
        frozen: The modules that are not trained.
    """

    body: nn.Sequential
    head: nn.Module
    log_probabilities = False
    default_input_shape = (1, 28, 28)
    head_names: tuple[str, ...] = ("head.",)
    is_chain = True
    frozen: tuple[nn.Module, ...] = ()

    def initialize(self, x: Tensor) -> None:
        """Initialize weights from training images ``x``, normalized float (N, C, H, W). Most models do nothing."""

    def features(self, x: Tensor) -> Tensor:
        """Return the last feature maps, float (N, C', H', W'), of normalized images, float (N, C, H, W)."""
        return self.body(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, float (N, K), of normalized images, float (N, C, H, W)."""
        return self.head(self.features(x))  # type: ignore[no-any-return]

    def stages(self) -> dict[str, nn.Module]:
        """Return the stages by name, in forward order."""
        return dict(self.body.named_children())

    def first_modules(self, count: int) -> list[nn.Module]:
        """Return the modules with all weights of the first ``count`` stages."""
        return list(self.stages().values())[:count]

    def freeze(self, count: int) -> None:
        """Freeze the weights and the BatchNorm statistics of the first ``count`` stages.

        Raises:
            UsageError: The model has fewer stages.
        """
        stages = list(self.stages())
        if count > len(stages):
            raise UsageError(f"`freeze` {count}: the model has {len(stages)} stages, {', '.join(stages)}")
        self.frozen = tuple(self.first_modules(count))
        for module in self.frozen:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode. Frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


MODELS: Registry[Callable[..., nn.Module]] = Registry("model")
"""The registered models: constructors (channels, image_height, image_width, classes, **options) of plain values.

``MODELS.names()`` lists the names in the order of registration. ``MODELS["small"]`` is a constructor; an unknown name
raises UnknownNameError.
"""


def model_options(name: str) -> dict[str, Any]:
    """Return the options of the model ``name``, beyond its input and output sizes, with their defaults.

    Raises:
        UnknownNameError: There is no such model.

    >>> model_options("fashion-2conv")
    {'pool': 'max', 'kernel_size': 5}
    """
    parameters = inspect.signature(MODELS[name]).parameters.values()
    sizes = ("channels", "image_height", "image_width", "classes")
    return {p.name: p.default for p in parameters if p.name not in sizes}


def create_model(
    name: str, *, channels: int, image_height: int, image_width: int, classes: int, **options: int | float | str | bool
) -> nn.Module:
    """Build a registered model with random float32 weights from PyTorch's global generator.

    Args:
        name: The name of the model.
        channels: The number of image channels, 1 or 3.
        image_height: In pixels.
        image_width: In pixels.
        classes: The number of classes.
        **options: See :func:`model_options`.

    Raises:
        UnknownNameError: There is no such model.
        UsageError: The model has no such option, or the images are too small for it.

    >>> model = create_model("small", channels=1, image_height=8, image_width=8, classes=10, width=4)
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    >>> list(model.stages())
    ['stem', 'conv1', 'conv2', 'conv3']
    """
    known = model_options(name)
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UsageError(f"model {name!r} has no option {option!r}; {takes}")
    return MODELS[name](
        channels=channels, image_height=image_height, image_width=image_width, classes=classes, **options
    )


def require_pixels(name: str, height: int, width: int) -> None:
    """Raise UsageError if the feature maps of model ``name`` have no pixels."""
    if min(height, width) < 1:
        raise UsageError(f"the images are too small for model {name!r}, or its kernel is too large")


def check_model(
    name: str, *, channels: int = 1, image_height: int = 28, image_width: int = 28, classes: int = 7
) -> None:
    """Test that a registered model keeps the contract.

    It is built twice and runs a random batch forward and backward. The checks:

    - the constructor takes plain values, and builds the same architecture again,
    - logits are finite, (N, K), and features (N, C', H', W'),
    - ``head(features(x))`` equals ``model(x)``,
    - every stage is part of the forward pass,
    - every parameter gets a finite gradient,
    - a second model with the same weights gives the same logits.

    Args:
        name: The name of the model.
        channels: The number of image channels.
        image_height: In pixels.
        image_width: In pixels.
        classes: The number of classes.

    Raises:
        UnknownNameError: There is no such model.
        ConvlensError: A check failed.

    >>> check_model("tiny", image_height=12, image_width=12)
    """
    require = _Requirements(name)
    for option, default in model_options(name).items():
        plain = isinstance(default, (int, float, str, bool))
        require(plain, f"option {option!r} must have a plain number or string as its default")

    def build() -> Any:
        return create_model(
            name, channels=channels, image_height=image_height, image_width=image_width, classes=classes
        )

    try:
        model, rebuilt = build(), build()
        rebuilt.load_state_dict(model.state_dict())
    except (TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConvlensError(f"model {name!r}: it cannot be built twice with the same weights: {reason}") from None
    x = torch.rand(5, channels, image_height, image_width)  # (N, C, H, W)
    _check_training(require, model, x, classes)
    model.eval()
    with torch.no_grad():
        _check_stages(require, model, x)
        rebuilt.eval()
        rebuilt.load_state_dict(model.state_dict())
        require(torch.equal(rebuilt(x), model(x)), "a second model with the same weights gives other logits")


class _Requirements:
    """Raises ConvlensError, with the name of the model, when a condition does not hold."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, condition: bool, message: str) -> None:
        if not condition:
            raise ConvlensError(f"model {self._name!r}: {message}")


def _check_training(require: _Requirements, model: Any, x: Tensor, classes: int) -> None:
    """Check the logits and the gradients of a batch (N, C, H, W)."""
    model.train()
    logits = model(x)
    require(isinstance(logits, Tensor), f"model(x) is a {type(logits).__name__}, not a tensor")
    require(logits.shape == (len(x), classes), f"model(x) is {tuple(logits.shape)}, not {(len(x), classes)}")
    require(bool(logits.isfinite().all()), "random weights give logits that are NaN or infinite")
    # Weighted at random, because the plain sum of log-softmax has no informative gradient.
    (logits * torch.rand(len(x), classes)).sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            finite = parameter.grad is not None and bool(parameter.grad.isfinite().all())
            require(finite, f"{key} gets no finite gradient")


def _check_stages(require: _Requirements, model: Any, x: Tensor) -> None:
    """Check ``features``, ``head`` and ``stages`` with a batch (N, C, H, W)."""
    for attribute in ("features", "head", "stages"):
        require(hasattr(model, attribute), f"it has no {attribute!r}")
    features = model.features(x)
    require(features.dim() == 4, f"features(x) must be N x C x H x W, not {features.dim()}-d")
    same = torch.allclose(model.head(features), model(x), atol=1e-5)
    require(same, "head(features(x)) differs from model(x)")
    stages = model.stages()
    require(len(stages) > 0, "stages() is empty")
    used: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, n=n: used.add(n)) for n, m in stages.items()]
    model(x)
    for hook in hooks:
        hook.remove()
    unused = sorted(set(stages) - used)
    require(not unused, f"stages() names {unused}, which model(x) does not use")
