"""Weights that a training starts from: those of a trained model (`init_from`) or of a file (`pretrained`).

Either way the classification head is new, and images are normalized as they were for those weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError, UsageError
from convlens.inference.bundle import load_bundle
from convlens.inference.store import bundled_models, resolve_bundle
from convlens.models import ConvNet, model_options
from convlens.models.timm import PREFIX, download_weights, pretrained_cfg
from convlens.system.files import read_json
from convlens.training.recipe import MODEL_OPTIONS, Recipe

TIMM = "timm"  # as `pretrained`: timm's own weights


@dataclass(frozen=True, eq=False)
class PretrainedWeights:
    """Trained weights, and what is known of the images that they were trained on.

    Attributes:
        option: Name of the option that asked for them: ``init_from`` or ``pretrained``.
        origin: Where they come from, as a run records it.
        tensors: The weights by name.
        mean: Mean per channel, of pixels in 0..1; empty if it is not known.
        std: Standard deviation per channel; empty if it is not known.
        channels: Number of channels; 0 if any will do.
        image_size: Side in pixels that a folder's images are resized to by default; 0: none.
        options: Recipe fields that rebuild their model; None if the recipe names the model.
    """

    option: str
    origin: str
    tensors: Mapping[str, Tensor]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels: int = 0
    image_size: int = 0
    options: Mapping[str, Any] | None = None

    def normalise(self, fitted: Preprocess) -> Preprocess:
        """Return ``fitted`` with mean and standard deviation of these weights, if the number of channels agrees."""
        if len(self.mean) == fitted.channels:
            return replace(fitted, mean=self.mean, std=self.std)
        return fitted


def start_from_model(source: str | Path) -> PretrainedWeights:
    """Return the weights of a run, a bundle, or a model that comes with convlens."""
    bundle = load_bundle(resolve_bundle(source))
    origin = str(source) if str(source) in bundled_models() else str(Path(source).resolve())
    name, arguments = bundle.architecture.name, bundle.architecture.arguments
    unset = dict.fromkeys(MODEL_OPTIONS)  # an option that the bundle lacks has its model's default, not the recipe's
    options = {"model": name, **unset, **{key: arguments[key] for key in model_options(name) if key in arguments}}
    shape = bundle.preprocess
    return PretrainedWeights(
        "init_from", origin, bundle.model.state_dict(), shape.mean, shape.std, shape.channels, options=options
    )


def start_from_weights(recipe: Recipe) -> PretrainedWeights | None:
    """Return the weights of the recipe's ``pretrained``, None if it is not set.

    These are timm's own weights of the model, or a safetensors file: of a bundle, or with timm's names. A
    ``config.json`` next to the file (a bundle's, or as timm writes it) says how its images were normalized; without
    one, timm's configuration of the model does.

    Raises:
        UsageError: If there is no such file.
        ConvlensError: If it is damaged.
    """
    if not recipe.pretrained:
        return None
    backbone = recipe.model.removeprefix(PREFIX) if recipe.model.startswith(PREFIX) else ""
    if recipe.pretrained == TIMM:
        if not backbone:
            raise UsageError(f"`pretrained` timm needs a model of timm, such as {PREFIX}resnet18")
        path, origin = download_weights(backbone), TIMM
    else:
        path = Path(recipe.pretrained)
        origin = str(path.resolve())
        if path.is_dir():
            raise UsageError(
                f"`pretrained` takes a .safetensors file; for the run or model {path} there is `init_from`"
            )
        if not path.is_file():
            raise UsageError(f"`pretrained`: there is no file {path}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConvlensError(f"`pretrained`: {path} is not a complete .safetensors file: {error}") from None
    form = pretrained_cfg(backbone) if backbone else {}
    beside = path.with_name("config.json")
    return PretrainedWeights(
        "pretrained", origin, tensors, **(form | (read_sidecar_config(beside) if beside.is_file() else {}))
    )


def reject_pretrained(recipe: Recipe, what: str) -> None:
    """Raise UsageError if the recipe starts from trained weights; ``what`` names the task that cannot."""
    if recipe.pretrained or recipe.freeze:
        option = "pretrained" if recipe.pretrained else "freeze"
        raise UsageError(f"{what} starts every model from random weights, so it takes no `{option}`")


def read_sidecar_config(config: Path) -> dict[str, Any]:
    """Return normalization and size in the config.json next to a weight file; empty if its format is unknown."""
    values = read_json(config)
    try:
        if "preprocess" in values:
            known = Preprocess.from_json(values["preprocess"])
            side, mean, std = known.height, known.mean, known.std
        elif "pretrained_cfg" in values:
            cfg = values["pretrained_cfg"]
            side = int(cfg["input_size"][1])
            mean, std = (tuple(float(value) for value in cfg[key]) for key in ("mean", "std"))
        else:
            return {}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConvlensError(f"`pretrained`: {config}, next to the weights, is damaged: {error!r}") from None
    return {"mean": mean, "std": std, "channels": len(mean), "image_size": side}


def input_spec(recipe: Recipe, start: PretrainedWeights | None) -> dict[str, int]:
    """Return the ``image_size`` and ``channels`` that images are converted to if possible; 0: as they are."""
    if start is None:
        return {"image_size": recipe.image_size, "channels": 0}
    return {"image_size": recipe.image_size or start.image_size, "channels": start.channels}


def load_matching_weights(model: nn.Module, start: PretrainedWeights, freeze: int = 0) -> str:
    """Copy the trained stages of ``start`` into ``model``, but not the head.

    Args:
        model: The model to train.
        start: Trained weights; those with another name or shape are ignored.
        freeze: Number of stages that will be frozen, and so must be complete.

    Returns:
        How many of the model's tensors were copied: "12 of 14".

    Raises:
        UsageError: If no weight fits, or a stage to be frozen is incomplete.
    """
    own = model.state_dict(keep_vars=True)
    fresh = model.head_names if isinstance(model, ConvNet) else ("head.",)
    # Backbone wraps timm's model as its attribute `net`
    trained = {key if key in own else f"net.{key}": value for key, value in start.tensors.items()}
    fitting = {
        key: value
        for key, value in trained.items()
        if not key.startswith(fresh) and key in own and own[key].shape == value.shape
    }
    if not any(value.dim() > 1 for value in fitting.values()):
        source = f" of its {start.options['model']}" if start.options else f" in {start.origin}"
        raise UsageError(f"`{start.option}`: no weight{source} fits a model {type(model).__name__} here")
    if freeze and isinstance(model, ConvNet):
        frozen = {id(v) for part in model.first_modules(freeze) for v in part.state_dict(keep_vars=True).values()}
        if missing := [key for key, value in own.items() if id(value) in frozen and key not in fitting]:
            raise UsageError(
                f"`freeze` {freeze}: {len(missing)} of the frozen tensors are not in {start.origin}, such as "
                f"{missing[0]}"
            )
    model.load_state_dict({**model.state_dict(), **fitting})
    return f"{len(fitting)} of {len(own)}"
