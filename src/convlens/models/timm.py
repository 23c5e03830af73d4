"""timm's convolutional models, by name: ``timm:resnet18``. timm is imported when one is used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlens.errors import ConvlensError, UnknownNameError, UsageError
from convlens.models.base import MODELS, ConvNet
from convlens.system.extras import missing_extra

PREFIX = "timm:"


def import_timm() -> Any:
    """Return the package timm; UsageError, with the command that installs it, if it is missing."""
    try:
        import timm
    except ImportError:
        raise missing_extra("timm is not installed", "backbones") from None
    return timm


@MODELS.family(PREFIX)
def find_backbone(name: str) -> Callable[..., nn.Module]:
    """A convolutional model of timm, such as timm:resnet18; needs the extra backbones.

    Returns:
        Its constructor.

    Raises:
        UnknownNameError: timm has no such model.
    """
    timm = import_timm()
    if name not in (known := timm.list_models()) and name not in timm.list_pretrained():
        raise UnknownNameError("timm model", name, known)
    constructor = functools.partial(Backbone, name)
    constructor.default_input_shape = tuple(  # type: ignore[attr-defined]  # as ConvNet's classes have it
        timm.get_pretrained_cfg(name).input_size
    )
    return constructor


def pretrained_cfg(name: str) -> dict[str, Any]:
    """Return the mean, std, channels and image_size that timm's own weights of a model were trained with."""
    cfg = import_timm().get_pretrained_cfg(name)
    channels, side, _ = cfg.input_size
    return {"mean": tuple(cfg.mean), "std": tuple(cfg.std), "channels": channels, "image_size": side}


def download_weights(name: str) -> Path:
    """Return the safetensors file of timm's own weights, from Hugging Face's cache or downloaded.

    Other formats that timm accepts are pickles, which can run code.

    Raises:
        UsageError: timm has no weights of the model.
        ConvlensError: The download failed.
    """
    repository = import_timm().get_pretrained_cfg(name).hf_hub_id
    if not repository:
        raise UsageError(f"timm has no weights of {PREFIX}{name}; set `pretrained` to a file with weights")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # several packages have their own errors of the network, the server and the disk
        reason = str(error).strip().split("\n", 1)[0].removesuffix(".")
        raise ConvlensError(
            f"the weights of {PREFIX}{name} cannot be downloaded from {repository}: {reason}; "
            "without network access, copy the file here and set `pretrained` to it"
        ) from None


class Backbone(ConvNet):
    """A convolutional model of timm with random weights and a head for our classes.

    The names of the weights are timm's after ``model.``. The stages are the modules that timm extracts features from,
    with ``-`` for ``.`` in their names. The weights of a stage are those after the previous stage up to its own end.

    Args:
        name: timm's name of the model.
        channels: The number of image channels.
        image_height: In pixels.
        image_width: In pixels.
        classes: The number of classes.

    Raises:
        UsageError: The model does not accept the images, or its last features are not maps (N, C, H, W).
    """

    is_chain = False

    def __init__(self, name: str, channels: int, image_height: int, image_width: int, classes: int):
        super().__init__()
        timm = import_timm()
        self.model = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
        heads = self.model.pretrained_cfg["classifier"]  # one name, or several
        self.head_names = tuple(f"model.{head}." for head in ([heads] if isinstance(heads, str) else heads))
        modules = dict(self.model.named_modules())
        paths = [info["module"] for info in self.model.feature_info]
        self._stage_paths = [path for path in paths if path and path in modules]
        try:
            with torch.no_grad():
                maps = self.model.eval().forward_features(torch.zeros(1, channels, image_height, image_width))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise UsageError(
                f"the model {PREFIX}{name} does not accept images of {image_width} x {image_height} pixels: {reason}"
            ) from None
        finally:
            self.model.train()
        if not isinstance(maps, Tensor) or maps.dim() != 4 or maps.shape[1] != self.model.num_features:
            raise UsageError(f"the model {PREFIX}{name} has no feature maps; choose a convolutional one")

    def features(self, x: Tensor) -> Tensor:
        """Return the last feature maps, float (N, C', H', W'), of normalized images, float (N, C, H, W)."""
        return self.model.forward_features(x)  # type: ignore[no-any-return]

    def head(self, maps: Tensor) -> Tensor:  # type: ignore[override]  # timm has no module for it
        """Return logits, float (N, K), of the last feature maps, float (N, C', H', W')."""
        return self.model.forward_head(maps)  # type: ignore[no-any-return]

    def stages(self) -> dict[str, nn.Module]:
        """Return the modules that timm extracts features from, in forward order."""
        return {path.replace(".", "-"): self.model.get_submodule(path) for path in self._stage_paths}

    def first_modules(self, count: int) -> list[nn.Module]:
        """Return the modules up to the end of stage ``count``; timm defines modules in forward order."""
        if not count:
            return []
        modules, last = list(self.model.named_modules()), self._stage_paths[count - 1]
        end = max(i for i, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{last}."))
        later = tuple(name for name, _ in modules[end + 1 :])
        # without the parents of later modules
        return [module for name, module in modules[1 : end + 1] if not any(n.startswith(f"{name}.") for n in later)]
