"""The convolutional nets of timm, by name: ``timm:resnet18``. timm is imported when one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlens.errors import ConvlensError, UnknownNameError, UsageError
from convlens.models.base import MODELS, ConvNet

PREFIX = "timm:"


def import_timm() -> Any:
    """Return the package timm; UsageError with the line that installs it where it is missing."""
    try:
        import timm
    except ImportError:
        raise UsageError("this needs a package more: pip install 'convlens[backbones]'") from None
    return timm


@MODELS.family(PREFIX)
def find_backbone(name: str) -> Callable[..., nn.Module]:
    """A convolutional net of timm, such as timm:resnet18; with the extra backbones.

    Returns its constructor. Raises UnknownNameError, which offers the nearest name, if timm has no such net.
    """
    timm = import_timm()
    if name not in (known := timm.list_models()) and name not in timm.list_pretrained():
        raise UnknownNameError("net of timm", name, known)
    made = functools.partial(Backbone, name)
    # what the command line asks of every net's class
    made.usual_shape = tuple(timm.get_pretrained_cfg(name).input_size)  # type: ignore[attr-defined]
    return made


def pretrained_cfg(name: str) -> dict[str, Any]:
    """Return mean, std, channels and image_size of the images that timm's own weights of a net were made with."""
    told = import_timm().get_pretrained_cfg(name)
    channels, side, _ = told.input_size
    return {"mean": tuple(told.mean), "std": tuple(told.std), "channels": channels, "image_size": side}


def download_weights(name: str) -> Path:
    """Return the file of timm's own weights of the net ``name``, downloaded unless it is in Hugging Face's cache.

    Always the safetensors file: others that timm takes are pickles, which can run code. Raises UsageError if timm has
    no weights of the net, ConvlensError if they cannot be had.
    """
    place = import_timm().get_pretrained_cfg(name).hf_hub_id
    if not place:
        raise UsageError(f"timm has no weights of {PREFIX}{name}; train from a file of them: --pretrained FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(place, "model.safetensors"))
    except Exception as error:  # of the network, the server, the disk: many packages' own
        reason = str(error).strip().split("\n", 1)[0].removesuffix(".")
        raise ConvlensError(
            f"the weights of {PREFIX}{name} cannot be downloaded from {place}: {reason}; "
            "where there is no network, copy the file and name it: --pretrained FILE"
        ) from None


class Backbone(ConvNet):
    """A convolutional net of timm, with random weights and a head for our classes.

    ``net`` is timm's own net, so weights keep timm's names behind ``net.``. The stages are those that timm takes
    features from, called what they are called there, with ``-`` for ``.``; a stage's weights are all from the end of
    the one before it to its own. Raises UsageError for a net whose last features are no maps (N, C, H, W), and for
    images that it does not take.
    """

    is_chain = False

    def __init__(self, name: str, channels: int, image_height: int, image_width: int, classes: int):
        super().__init__()
        timm = import_timm()
        self.net = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
        own = self.net.pretrained_cfg["classifier"]  # one name, or several
        self.head_names = tuple(f"net.{head}." for head in ([own] if isinstance(own, str) else own))
        modules = dict(self.net.named_modules())
        places = [about["module"] for about in self.net.feature_info]
        self._places = [place for place in places if place and place in modules]
        try:
            with torch.no_grad():
                maps = self.net.eval().forward_features(torch.zeros(1, channels, image_height, image_width))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise UsageError(
                f"the net {PREFIX}{name} takes no images of {image_width} x {image_height} pixels: {reason}"
            ) from None
        finally:
            self.net.train()
        if not isinstance(maps, Tensor) or maps.dim() != 4 or maps.shape[1] != self.net.num_features:
            raise UsageError(f"the net {PREFIX}{name} gives no maps of features; take a convolutional one")

    def features(self, x: Tensor) -> Tensor:
        """Return the last spatial map, float (N, C', H', W'), of normalised images, float (N, C, H, W)."""
        return self.net.forward_features(x)  # type: ignore[no-any-return]

    def head(self, maps: Tensor) -> Tensor:  # type: ignore[override]  # timm has no module for it
        """Return logits, float (N, K), of the last spatial map, float (N, C', H', W')."""
        return self.net.forward_head(maps)  # type: ignore[no-any-return]

    def stages(self) -> dict[str, nn.Module]:
        """Return the modules that timm takes features from, in the order in which an image passes them."""
        return {place.replace(".", "-"): self.net.get_submodule(place) for place in self._places}

    def first_modules(self, count: int) -> list[nn.Module]:
        """Return the modules up to the end of stage ``count``: timm holds them in the order of their use."""
        if not count:
            return []
        modules, last = list(self.net.named_modules()), self._places[count - 1]
        end = max(n for n, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{last}."))
        behind = tuple(name for name, _ in modules[end + 1 :])
        # without those that hold something of what comes behind too
        return [part for name, part in modules[1 : end + 1] if not any(b.startswith(f"{name}.") for b in behind)]
