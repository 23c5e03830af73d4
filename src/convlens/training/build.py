"""Build what a step needs from a recipe: model, loss, optimizer, augmentation, clipping."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convlens.data import augment
from convlens.data.augment import BatchRandom
from convlens.data.dataset import Dataset
from convlens.data.loader import Augment
from convlens.data.preprocess import Preprocess
from convlens.errors import UsageError
from convlens.models import ConvNet, create_model, model_options
from convlens.training.grad_accum import is_out_of_memory
from convlens.training.optimizers import SGD, Adam, Muon, Optimizer, ParamGroup
from convlens.training.recipe import Recipe

MAX_INIT_PIXELS = 1_000_000  # pixels that a fresh net may look at


def drop_unsupported_options(recipe: Recipe, asked: Collection[str]) -> Recipe:
    """Return the recipe without options that its net does not have: those of a recipe are for its own net.

    One of the fields that were ``asked`` for stays; to build such a net is refused.
    """
    unfit = set(recipe.model_options()) - set(model_options(recipe.model)) - set(asked)
    return recipe.override(**dict.fromkeys(unfit))


def model_config(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Return the name and the constructor arguments of the recipe's net for these images: what a run records."""
    channels, height, width = dataset.shape
    sizes = {"channels": channels, "image_height": height, "image_width": width, "classes": len(dataset.classes)}
    return {"name": recipe.model, "arguments": {**sizes, **recipe.model_options()}}


def make_model(described: dict[str, Any], dataset: Dataset, preprocess: Preprocess) -> nn.Module:
    """Build the net that :func:`model_config` names, and let it take what it wants to from the training images.

    Weights are random, drawn from PyTorch's global generator. Raises UsageError if the net does not fit into memory.
    """
    try:
        net = create_model(described["name"], **described["arguments"])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"there is not enough memory for this net {described['name']}; try fewer --width") from None
    if isinstance(net, ConvNet):
        _, height, width = dataset.shape
        some = dataset.train.evenly_spaced(max(MAX_INIT_PIXELS // (height * width), 50))
        net.initialize(preprocess.normalizer()(dataset.train.images[some]))
    return net


def freeze(net: nn.Module, recipe: Recipe) -> None:
    """Freeze the recipe's first stages of ``net``; UsageError if it has not so many, or is none that can."""
    if recipe.freeze:
        if not isinstance(net, ConvNet):
            raise UsageError(f"--freeze: the net {recipe.model} is no convlens.models.ConvNet, which it takes")
        net.freeze(recipe.freeze)


def make_optimizer(net: nn.Module, recipe: Recipe) -> Optimizer:
    """Return the recipe's optimizer; weight decay leaves biases and BatchNorm's factors alone.

    Filters, matrices and vectors are groups of their own: with Muon only filters go its way, the others by SGD, and
    both ``head_lr`` and ``bias_lr`` take the place of ``lr`` where they are given.
    """
    weights = [p for p in net.parameters() if p.requires_grad]
    filters = [p for p in weights if p.dim() > 2]
    matrices = [p for p in weights if p.dim() == 2]
    vectors = [p for p in weights if p.dim() < 2]
    head_scale, bias_scale = (own / recipe.lr if own and recipe.lr else 1.0 for own in (recipe.head_lr, recipe.bias_lr))

    def make(weights: list[nn.Parameter], lr_scale: float, weight_decay: float) -> ParamGroup:
        if recipe.optimizer in ("sgd", "muon"):
            return SGD(
                weights,
                lr_scale=lr_scale,
                momentum=recipe.momentum,
                nesterov=recipe.nesterov,
                weight_decay=weight_decay,
            )
        betas, decoupled = (recipe.momentum, 0.999), recipe.optimizer == "adamw"
        return Adam(weights, lr_scale=lr_scale, betas=betas, decoupled=decoupled, weight_decay=weight_decay)

    if recipe.optimizer == "muon":
        first: ParamGroup = Muon(filters, momentum=recipe.muon_momentum)
    else:
        first = make(filters, 1.0, recipe.weight_decay)
    return Optimizer([first, make(matrices, head_scale, recipe.weight_decay), make(vectors, bias_scale, 0.0)])


def make_loss(recipe: Recipe, net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss: (outputs (N, K), labels (N,) or probabilities (N, K)) -> mean over the batch.

    Raises UsageError if NLL is asked for with a net that does not give log-probabilities.
    """
    if recipe.loss == "cross-entropy":
        return lambda logits, target: F.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing)
    if not getattr(net, "log_probabilities", False):
        raise UsageError(f"--loss nll needs a net that ends in log-softmax, and {recipe.model} does not")
    if recipe.label_smoothing or recipe.mixup or recipe.cutmix:
        raise UsageError("--loss nll takes plain labels: no label smoothing, mixup or cutmix")
    return F.nll_loss


def make_clip(net: nn.Module, recipe: Recipe) -> Callable[[], object]:
    """Return what clips the gradient before a step, or nothing at all."""
    if not recipe.max_grad_norm:
        return lambda: None
    return lambda: nn.utils.clip_grad_norm_(net.parameters(), recipe.max_grad_norm)


def make_augment(recipe: Recipe, classes: int) -> Augment:
    """Return the recipe's augmentation as one function of (images, labels, draws)."""

    def apply(x: Tensor, y: Tensor, draws: BatchRandom) -> tuple[Tensor, Tensor]:
        if recipe.center_crop_prob:
            x = augment.center_crop_resize(x, draws, recipe.center_crop_prob, recipe.center_crop_ratio)
        if recipe.rotation or recipe.scale:
            x = augment.affine(x, draws, recipe.rotation, recipe.scale)
        if recipe.translate:
            x = augment.translate(x, draws, recipe.translate)
        if recipe.color_jitter:
            x = augment.color_jitter(x, draws, recipe.color_jitter)
        if recipe.cutout:
            x = augment.cutout(x, draws, recipe.cutout)
        if recipe.mixup:
            x, y = augment.mixup(x, y, draws, recipe.mixup, classes)
        if recipe.cutmix:
            x, y = augment.cutmix(x, y, draws, recipe.cutmix, classes)
        return x, y

    return apply
