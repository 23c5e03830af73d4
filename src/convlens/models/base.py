"""What every net is: logits from features and a head, named stages, and a constructor of plain values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from convlens.errors import ConvlensError, UsageError
from convlens.system.registry import Registry


class ConvNet(nn.Module):
    """A convolutional net: ``body`` (an nn.Sequential of named stages), then ``head``.

    Calling it on normalised float images (N, C, H, W) gives logits (N, K). ``features`` gives the last spatial
    map (N, C', H', W'), and ``stages`` the named modules whose outputs are worth looking at. A net of your own sets
    ``body`` and ``head`` in its constructor, or overrides these methods; :func:`convlens.models.check_model` tests it.

    ``log_probabilities`` is True for a net that ends in log-softmax, which the loss ``nll`` needs; ``usual_shape`` is
    the (C, H, W) of the images that the net is shown with.
    """

    body: nn.Sequential
    head: nn.Module
    # True if the outputs are log-probabilities (the head ends in log-softmax): what the NLL loss needs
    log_probabilities = False
    # (C, H, W) of the images that the net is usually shown with
    usual_shape = (1, 28, 28)
    # what the names of the weights begin with that belong to the classes: other classes need fresh ones
    head_names: tuple[str, ...] = ("head.",)
    # whether each layer takes what the one before it gives, so that a formula says how far its units see
    is_chain = True
    # modules whose weights a training leaves as they are
    frozen: tuple[nn.Module, ...] = ()

    def initialise(self, x: Tensor) -> None:
        """Set what a fresh net takes from its training images: normalised, float (N, C, H, W). Most take nothing."""

    def features(self, x: Tensor) -> Tensor:
        """Return the last spatial map, float (N, C', H', W'), of normalised images, float (N, C, H, W)."""
        return self.body(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, float (N, K), of normalised images, float (N, C, H, W)."""
        return self.head(self.features(x))  # type: ignore[no-any-return]

    def stages(self) -> dict[str, nn.Module]:
        """Return the stages by name, in the order in which an image passes them."""
        return dict(self.body.named_children())

    def first_modules(self, count: int) -> list[nn.Module]:
        """Return the modules that hold all weights of the first ``count`` stages."""
        return list(self.stages().values())[:count]

    def freeze(self, count: int) -> None:
        """Let trainings leave the first ``count`` stages as they are, the statistics of their BatchNorm too.

        Raises UsageError if the net has not so many.
        """
        stages = list(self.stages())
        if count > len(stages):
            raise UsageError(f"--freeze {count}: the net has {len(stages)} stages, {', '.join(stages)}")
        self.frozen = tuple(self.first_modules(count))
        for module in self.frozen:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set whether the net is trained; what is frozen computes as in use either way."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


# name -> constructor (channels, image_height, image_width, classes, **options), all plain numbers and strings
MODELS: Registry[Callable[..., nn.Module]] = Registry("model")

"""Every model by name: constructors (channels, image_height, image_width, classes, **options) of plain values.

``MODELS.names()`` lists them in the order in which they were registered, ``MODELS["small"]`` is one of them, and a name
that there is not raises UnknownName.
"""


def model_options(name: str) -> dict[str, Any]:
    """Return the options that the model ``name`` takes beyond its input and output sizes, with their defaults.

    Raises UnknownName if there is no such model.

    >>> model_options("fashion-2conv")
    {'pool': 'max', 'kernel_size': 5}
    """
    parameters = inspect.signature(MODELS[name]).parameters.values()
    sizes = ("channels", "image_height", "image_width", "classes")
    return {p.name: p.default for p in parameters if p.name not in sizes}


def create_model(
    name: str, *, channels: int, image_height: int, image_width: int, classes: int, **options: int | float | str | bool
) -> nn.Module:
    """Build the registered model ``name`` for images (channels, image_height, image_width) and ``classes`` classes.

    Weights are random, float32, drawn from PyTorch's global generator. The height and the width are in pixels. Raises
    UsageError for an unknown model, an option that it does not take, and images that are too small for it.

    >>> net = create_model("small", channels=1, image_height=8, image_width=8, classes=10, width=4)
    >>> net(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    >>> list(net.stages())
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


def require_pixels(model: str, image_height: int, image_width: int) -> None:
    """Raise UsageError if nothing is left of the image after the unpadded convolutions and pools."""
    if min(image_height, image_width) < 1:
        raise UsageError(f"the images are too small for model {model!r}, or its kernel is too large")


def require(condition: bool, message: str) -> None:
    """Raise ConvlensError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConvlensError(message)


def check_model(
    name: str, *, channels: int = 1, image_height: int = 28, image_width: int = 28, classes: int = 7
) -> None:
    """Test that the registered model ``name``, a user's own too, keeps the model contract.

    Builds it twice, runs a batch through it forward and backward, and raises ConvlensError that says which part
    of the contract is broken: the shape of logits and features, ``features`` + ``head`` equal to the whole,
    stages that are really passed, gradients for every parameter, plain constructor arguments, and weights that
    fit a net rebuilt from the same arguments. The images that it is tried on are random, of the size that is given,
    in pixels. Returns None where all is well. Raises UnknownName if there is no such model.

    >>> check_model("tiny", image_height=12, image_width=12)
    """
    for option, default in model_options(name).items():
        plain = isinstance(default, (int, float, str, bool))
        require(plain, f"model {name!r}: option {option!r} must have a plain number or string as its default")

    def build() -> Any:
        return create_model(
            name, channels=channels, image_height=image_height, image_width=image_width, classes=classes
        )

    try:
        net, twin = build(), build()
        twin.load_state_dict(net.state_dict())
    except (TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConvlensError(f"model {name!r}: it cannot be built, and rebuilt with its weights: {reason}") from None
    x = torch.rand(5, channels, image_height, image_width)  # (N, C, H, W)
    net.train()
    logits = net(x)
    require(isinstance(logits, Tensor), f"model {name!r}: net(x) is a {type(logits).__name__}, not a tensor")
    require(logits.shape == (5, classes), f"model {name!r}: net(x) is {tuple(logits.shape)}, not {(5, classes)}")
    require(bool(logits.isfinite().all()), f"model {name!r}: fresh weights give logits that are not finite")
    # random weights on the logits: their plain sum is constant for nets that end in log-softmax
    (logits * torch.rand(5, classes)).sum().backward()
    for key, parameter in net.named_parameters():
        grad = parameter.grad
        missing = grad is None or not bool(grad.isfinite().all())
        require(not missing or not parameter.requires_grad, f"model {name!r}: {key} gets no finite gradient")
    net.eval()
    with torch.no_grad():
        for part in ("features", "head", "stages"):
            require(hasattr(net, part), f"model {name!r}: it has no {part!r}")
        features = net.features(x)
        require(features.dim() == 4, f"model {name!r}: features(x) must be N x C x H x W, not {features.dim()}-d")
        same = torch.allclose(net.head(features), net(x), atol=1e-5)
        require(same, f"model {name!r}: head(features(x)) differs from net(x)")
        stages = net.stages()
        require(len(stages) > 0, f"model {name!r}: stages() is empty")
        passed: set[str] = set()
        hooks = [m.register_forward_hook(lambda *_, n=n: passed.add(n)) for n, m in stages.items()]
        net(x)
        for hook in hooks:
            hook.remove()
        unused = sorted(set(stages) - passed)
        require(not unused, f"model {name!r}: stages() names {unused}, which net(x) does not pass")
        twin.eval()
        twin.load_state_dict(net.state_dict())
        require(torch.equal(twin(x), net(x)), f"model {name!r}: a rebuilt net with the same weights differs")
