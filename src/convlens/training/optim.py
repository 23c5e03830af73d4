"""What a step needs, made from a recipe: schedule, optimizer, loss, clipping, averaged weights, augmentation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlens.data import augment
from convlens.data.augment import Draws
from convlens.data.loader import Augment
from convlens.errors import UsageError
from convlens.training.optimizers import SGD, Adam, Group, Muon, Optimizer
from convlens.training.recipe import Recipe


def learning_rate(recipe: Recipe, step: int, total: int, steps_per_epoch: int) -> float:
    """Return the learning rate of ``step`` (from 0) of ``total``: a pure function, so that resuming restores nothing.

    All rise in a line over ``warmup`` of the steps; ``cosine`` and ``linear`` fall to 0 at the end; ``one-cycle``
    rises from 1/25 of the peak over the first 30% (or ``warmup``) and falls, both along a cosine (Smith 2018).
    """
    rise = (recipe.warmup or (0.3 if recipe.schedule == "one-cycle" else 0.0)) * total
    if step < rise:
        share = (step + 1) / (rise + 1)
        if recipe.schedule == "one-cycle":
            return recipe.lr * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * share)) / 2)
        return recipe.lr * share
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "step":
        return recipe.lr * recipe.step_factor ** (step // steps_per_epoch // recipe.step_epochs)
    left = 1 - (step - rise) / (total - rise)
    return recipe.lr * (left if recipe.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


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

    def make(weights: list[nn.Parameter], lr_scale: float, weight_decay: float) -> Group:
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
        first: Group = Muon(filters, momentum=recipe.muon_momentum)
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
    if not recipe.clip_norm:
        return lambda: None
    return lambda: nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)


def make_augment(recipe: Recipe, classes: int) -> Augment:
    """Return the recipe's augmentation as one function of (images, labels, draws)."""

    def apply(x: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        if recipe.crop_probability:
            x = augment.centre_crop_resize(x, draws, recipe.crop_probability, recipe.crop_fraction)
        if recipe.rotation or recipe.scale:
            x = augment.affine(x, draws, recipe.rotation, recipe.scale)
        if recipe.shift:
            x = augment.shift(x, draws, recipe.shift)
        if recipe.colour_jitter:
            x = augment.colour_jitter(x, draws, recipe.colour_jitter)
        if recipe.cutout:
            x = augment.cutout(x, draws, recipe.cutout)
        if recipe.mixup:
            x, y = augment.mixup(x, y, draws, recipe.mixup, classes)
        if recipe.cutmix:
            x, y = augment.cutmix(x, y, draws, recipe.cutmix, classes)
        return x, y

    return apply


class WeightAverage:
    """Exponential moving average of all floating-point weights and buffers; with decay 0 it does nothing."""

    def __init__(self, net: nn.Module, decay: float):
        self._net, self._decay = net, decay
        self.weights = {k: v.detach().clone() for k, v in self._live().items()} if decay else {}

    def _live(self) -> dict[str, Tensor]:
        return {k: v for k, v in self._net.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the net's weights after ``step`` steps; early on it follows them faster."""
        if not self._decay:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        live = self._live()
        keys = list(self.weights)
        torch._foreach_lerp_([self.weights[k] for k in keys], [live[k] for k in keys], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the net use the averaged weights inside the block."""
        if not self._decay:
            yield
            return
        own = {k: v.clone() for k, v in self._live().items()}
        self._net.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            self._net.load_state_dict(own, strict=False)
