"""What a training starts from other than random weights: a trained model (--init-from), or a file (--pretrained).

Either way the head is fresh, and images are normalised as they were for those weights.
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

TIMM = "timm"  # as --pretrained: timm's own weights


@dataclass(frozen=True, eq=False)
class PretrainedWeights:
    """Trained weights, and the form of the images that they were trained on, as far as it is known."""

    flag: str  # that asked for it
    origin: str  # as a run records it
    tensors: Mapping[str, Tensor]
    mean: tuple[float, ...] = ()  # per channel, of pixels in 0..1; empty: not known
    std: tuple[float, ...] = ()
    channels: int = 0  # 0: whatever the images have
    image_size: int = 0  # side in pixels that a folder's images are brought to, unless that is asked for; 0: none
    options: Mapping[str, Any] | None = None  # recipe options that rebuild its net; None: the net is the recipe's

    def normalise(self, measured: Preprocess) -> Preprocess:
        """Return the preprocessing with mean and spread of these weights, where they have as many channels."""
        if len(self.mean) == measured.channels:
            return replace(measured, mean=self.mean, std=self.std)
        return measured


def start_from_model(source: str | Path) -> PretrainedWeights:
    """Return what ``--init-from`` starts from: a run, a bundle, or a model that comes with convlens."""
    bundle = load_bundle(resolve_bundle(source))
    origin = str(source) if str(source) in bundled_models() else str(Path(source).resolve())
    name, arguments = bundle.architecture.name, bundle.architecture.arguments
    unset = dict.fromkeys(MODEL_OPTIONS)  # what the bundle does not name is its net's default, not the recipe's
    options = {"model": name, **unset, **{key: arguments[key] for key in model_options(name) if key in arguments}}
    shape = bundle.preprocess
    return PretrainedWeights(
        "--init-from", origin, bundle.model.state_dict(), shape.mean, shape.std, shape.channels, options=options
    )


def start_from_weights(recipe: Recipe) -> PretrainedWeights | None:
    """Return what the recipe's ``--pretrained`` starts from, None if it is not set.

    That is timm's own weights of the net, or a safetensors file: of a bundle of convlens, or with timm's names. What a
    ``config.json`` beside the file says of its images (a bundle's own, or one as timm writes it) goes before what timm
    says of the net. Raises UsageError if there is no such file, ConvlensError if it is damaged.
    """
    if not recipe.pretrained:
        return None
    backbone = recipe.model.removeprefix(PREFIX) if recipe.model.startswith(PREFIX) else ""
    if recipe.pretrained == TIMM:
        if not backbone:
            raise UsageError(f"--pretrained timm is for nets of timm, such as --model {PREFIX}resnet18")
        path, origin = download_weights(backbone), TIMM
    else:
        path = Path(recipe.pretrained)
        origin = str(path.resolve())
        if path.is_dir():
            raise UsageError(
                f"--pretrained takes a .safetensors file; for the run or model {path} there is --init-from"
            )
        if not path.is_file():
            raise UsageError(f"--pretrained: there is no file {path}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConvlensError(f"--pretrained: {path} is no whole .safetensors file: {error}") from None
    form = pretrained_cfg(backbone) if backbone else {}
    beside = path.with_name("config.json")
    return PretrainedWeights(
        "--pretrained", origin, tensors, **(form | (read_sidecar_config(beside) if beside.is_file() else {}))
    )


def reject_pretrained(recipe: Recipe, what: str) -> None:
    """Raise UsageError if the recipe starts from trained weights, which ``what`` does not do."""
    if recipe.pretrained or recipe.freeze:
        flag = "--pretrained" if recipe.pretrained else "--freeze"
        raise UsageError(f"{what} starts every net from random weights, so it takes no {flag}")


def read_sidecar_config(config: Path) -> dict[str, Any]:
    """Return what a config.json says of the images of the weights beside it: nothing, unless it is one we know."""
    values = read_json(config)
    try:
        if "preprocess" in values:
            known = Preprocess.from_json(values["preprocess"])
            side, mean, std = known.height, known.mean, known.std
        elif "pretrained_cfg" in values:
            told = values["pretrained_cfg"]
            side = int(told["input_size"][1])
            mean, std = (tuple(float(value) for value in told[key]) for key in ("mean", "std"))
        else:
            return {}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConvlensError(f"--pretrained: {config}, beside the weights, is damaged: {error!r}") from None
    return {"mean": mean, "std": std, "channels": len(mean), "image_size": side}


def input_spec(recipe: Recipe, start: PretrainedWeights | None) -> dict[str, int]:
    """Return ``image_size`` and ``channels`` that images are brought to, where they can be; 0 leaves it to them."""
    if start is None:
        return {"image_size": recipe.image_size, "channels": 0}
    return {"image_size": recipe.image_size or start.image_size, "channels": start.channels}


def load_matching_weights(net: nn.Module, start: PretrainedWeights, frozen: int = 0) -> str:
    """Copy the trained stages of ``start`` into ``net``, leaving its head fresh; say how many tensors fitted.

    Raises UsageError if none did, or one of the first ``frozen`` stages has not all of its own.
    """
    own = net.state_dict(keep_vars=True)
    fresh = net.head_names if isinstance(net, ConvNet) else ("head.",)
    # the names of timm are ours without what its net is called in Backbone
    trained = {key if key in own else f"model.{key}": value for key, value in start.tensors.items()}
    fitting = {
        key: value
        for key, value in trained.items()
        if not key.startswith(fresh) and key in own and own[key].shape == value.shape
    }
    if not any(value.dim() > 1 for value in fitting.values()):
        named = f" of its {start.options['model']}" if start.options else f" in {start.origin}"
        raise UsageError(f"{start.flag}: no weight{named} fits a net {type(net).__name__} here")
    if frozen and isinstance(net, ConvNet):
        kept = {id(v) for part in net.first_modules(frozen) for v in part.state_dict(keep_vars=True).values()}
        if lacking := [key for key, value in own.items() if id(value) in kept and key not in fitting]:
            raise UsageError(
                f"--freeze {frozen}: {len(lacking)} of the tensors that would stay as they are do not come from "
                f"{start.origin}, such as {lacking[0]}"
            )
    net.load_state_dict({**net.state_dict(), **fitting})
    return f"{len(fitting)} of {len(own)}"
