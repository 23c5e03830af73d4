"""Build what a training needs from a recipe: model, batches, loss, optimizer, average, precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlens.data import augment
from convlens.data.augment import BatchRandom
from convlens.data.dataset import Dataset, Split
from convlens.data.loader import Augment, BatchLoader
from convlens.data.normalize import Normalize
from convlens.data.preprocess import Preprocess
from convlens.distributed.process_group import World, init_world
from convlens.distributed.sync_batchnorm import SyncBatchNorm, batchnorm_statistics
from convlens.errors import UsageError
from convlens.evaluation.metrics import Scores, evaluate
from convlens.models import ConvNet, create_model, model_options
from convlens.system.device import select_device
from convlens.system.memory import is_out_of_memory
from convlens.training.ema import EMA
from convlens.training.finite import FiniteCheck
from convlens.training.optimizers import SGD, Adam, Muon, Optimizer, ParamGroup
from convlens.training.precision import autocast, choose_precision
from convlens.training.recipe import Recipe
from convlens.training.schedule import LOG_EVERY_STEPS

MAX_INIT_PIXELS = 1_000_000  # of the training images that a fresh model's weights are initialized from


@dataclass(frozen=True, eq=False)
class TrainSetup:
    """Everything that a training needs and that does not change from step to step.

    Attributes:
        model: The model, on its device.
        recipe: How it is trained.
        world: The processes that train together.
        device: Where it is computed.
        precision: "fp32" or "bf16".
        shape: Shape (C, H, W) of the images.
        normalize: From uint8 to float images.
        loader: Batches by epoch and index.
        compute_loss: From logits (N, K) and labels to the mean loss.
        optimizer: Updates the weights.
        ema: Average of the weights, if any.
        clip: Clips the gradients, if asked for.
        finite: Check for NaN and infinity.
        batchnorm: Context of the forward pass.
        sync_batchnorm: True if BatchNorm synchronizes the ranks within a step.
        eval_splits: The splits that are evaluated after every epoch, by name.
    """

    model: nn.Module
    recipe: Recipe
    world: World
    device: torch.device
    precision: str
    shape: tuple[int, int, int]
    normalize: Normalize
    loader: BatchLoader
    compute_loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Optimizer
    ema: EMA
    clip: Callable[[], object]
    finite: FiniteCheck
    batchnorm: AbstractContextManager[object]
    sync_batchnorm: bool
    eval_splits: dict[str, Split]
    _weights: list[nn.Parameter]
    _statistics: list[Tensor]

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: Dataset,
        recipe: Recipe,
        preprocess: Preprocess | None = None,
        world: World | None = None,
    ) -> TrainSetup:
        """Move the model to its device, freeze what is frozen, and build everything around it.

        Args:
            model: The model to train.
            dataset: Its images; without a validation split, the recipe's ``val_fraction`` is held out.
            recipe: How it is trained.
            preprocess: Normalization of the images; by default fitted on the training images.
            world: The processes that train together; by default torchrun's.

        Raises:
            UsageError: If the model, the data or this machine do not allow what the recipe asks for.
        """
        world = world or init_world()
        device = select_device(recipe.device)
        precision = world.broadcast(choose_precision(recipe, device, model, dataset.shape))
        dataset = dataset.with_validation(recipe.val_fraction, recipe.seed)
        require_possible(recipe, model, dataset)
        normalize = (preprocess or Preprocess.fit(dataset.train.images, dataset.input_style)).normalizer()
        loader = BatchLoader(
            dataset.train,
            recipe.batch_size,
            normalize.to(device),
            seed=recipe.seed,
            augment=make_augment(recipe, len(dataset.classes)),
            hflip=recipe.hflip,
            balanced_sampling=recipe.balanced_sampling,
            world=world,
        )
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        world.sync_parameters(model)
        freeze(model, recipe)
        sync_batchnorm = recipe.sync_batchnorm and world.size > 1
        if sync_batchnorm and recipe.grad_accum_steps > 1:
            raise UsageError("`sync_batchnorm` normalizes a batch as a whole; leave out `grad_accum_steps`")
        statistics = batchnorm_statistics(model)
        check_every = 1 if device.type == "cpu" else LOG_EVERY_STEPS
        splits = {"val": dataset.validation, "test": dataset.test if recipe.log_test_metrics else None}
        return cls(
            model=model,
            recipe=recipe,
            world=world,
            device=device,
            precision=precision,
            shape=dataset.shape,
            normalize=normalize,
            loader=loader,
            compute_loss=make_loss(recipe, model),
            optimizer=make_optimizer(model, recipe),
            ema=EMA(model, recipe.ema_decay),
            clip=make_clip(model, recipe),
            finite=FiniteCheck(model, statistics, recipe, every=check_every),
            batchnorm=SyncBatchNorm(model) if sync_batchnorm else contextlib.nullcontext(),
            sync_batchnorm=sync_batchnorm,
            eval_splits={name: split for name, split in splits.items() if split is not None},
            _weights=[p for p in model.parameters() if p.requires_grad],
            _statistics=list(statistics.values()),
        )

    def batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield the batches of an epoch from ``step`` on: images (N, C, H, W), labels, images of all ranks together."""
        epoch, first = divmod(step, len(self.loader))
        for index in range(first, len(self.loader)):
            yield *self.loader(epoch, index), self.loader.size(index)

    def average_gradients(self, loss: Tensor, count: int) -> None:
        """Average loss, gradients and BatchNorm statistics over the ranks, by the ``count`` of images of each."""
        gradients = [p.grad for p in self._weights if p.grad is not None]
        self.world.all_reduce_mean([loss, *gradients, *self._statistics], count)

    def evaluate(self) -> dict[str, Scores]:
        """Return loss and accuracy of the model on each of :attr:`eval_splits`, the same on all ranks."""
        scores = {}
        for name, split in self.eval_splits.items():
            score = evaluate(
                self.model,
                split,
                self.normalize,
                batch_size=self.recipe.batch_size,
                autocast=autocast(self.precision, self.device),
                world=self.world,
            )
            scores[name] = Scores(*self.world.broadcast([score.loss, score.accuracy]))  # equal to the last bit
        return scores


def require_possible(recipe: Recipe, model: nn.Module, dataset: Dataset) -> None:
    """Raise UsageError if the recipe does not suit the model, or ``dataset``, which has its validation split."""
    if dataset.validation is None and (recipe.patience or recipe.restore_best):
        raise UsageError("`patience` and `restore_best` choose by validation images; set `val_fraction` above 0")
    make_loss(recipe, model)


def drop_unsupported_options(recipe: Recipe, asked: Collection[str]) -> Recipe:
    """Return the recipe without the model options that its model does not have.

    A recipe's options are for its own model, and ``asked`` may have replaced that. Options in ``asked`` itself stay, so
    that building the model raises an error.
    """
    unfit = set(recipe.model_options()) - set(model_options(recipe.model)) - set(asked)
    return recipe.override(**dict.fromkeys(unfit))


def model_config(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Return the name and the constructor arguments of the recipe's model for these images; a run records them."""
    channels, height, width = dataset.shape
    sizes = {"channels": channels, "image_height": height, "image_width": width, "classes": len(dataset.classes)}
    return {"name": recipe.model, "arguments": {**sizes, **recipe.model_options()}}


def make_model(config: dict[str, Any], dataset: Dataset, preprocess: Preprocess) -> nn.Module:
    """Build a model and initialize it.

    Weights are random, drawn from PyTorch's global generator, or computed from some of the training images.

    Args:
        config: The model's ``name`` and ``arguments``, as from :func:`model_config`.
        dataset: Training images to initialize from.
        preprocess: Normalization of these images.

    Raises:
        UsageError: If the model does not fit into memory.
    """
    try:
        model = create_model(config["name"], **config["arguments"])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"there is not enough memory for this model {config['name']}; try less `width`") from None
    if isinstance(model, ConvNet):
        _, height, width = dataset.shape
        some = dataset.train.evenly_spaced(max(MAX_INIT_PIXELS // (height * width), 50))
        model.initialize(preprocess.normalizer()(dataset.train.images[some]))
    return model


def freeze(model: nn.Module, recipe: Recipe) -> None:
    """Freeze the recipe's first stages; UsageError if the model has fewer stages or is not a ConvNet."""
    if recipe.freeze:
        if not isinstance(model, ConvNet):
            raise UsageError(f"`freeze` needs a convlens.models.ConvNet, and the model {recipe.model} is not one")
        model.freeze(recipe.freeze)


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Return the recipe's optimizer.

    Filters, matrices and vectors are separate groups: Muon updates the filters only, and SGD the rest. ``head_lr`` is
    the learning rate of matrices, ``bias_lr`` of vectors, which have no weight decay; 0 means ``lr``.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
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


def make_loss(recipe: Recipe, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss: (outputs (N, K), labels (N,) or probabilities (N, K)) -> mean over the batch.

    Raises:
        UsageError: If the loss is NLL and the model does not return log-probabilities, or labels are not plain.
    """
    if recipe.loss == "cross-entropy":
        return lambda logits, target: F.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing)
    if not getattr(model, "log_probabilities", False):
        raise UsageError(f"`loss` nll needs a model that ends in log-softmax, and {recipe.model} does not")
    if recipe.label_smoothing or recipe.mixup or recipe.cutmix:
        raise UsageError("`loss` nll takes plain labels: no label smoothing, mixup or cutmix")
    return F.nll_loss


def make_clip(model: nn.Module, recipe: Recipe) -> Callable[[], object]:
    """Return a function that clips the gradients to the recipe's ``max_grad_norm``; without one a no-op."""
    if not recipe.max_grad_norm:
        return lambda: None
    return lambda: nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)


def make_augment(recipe: Recipe, classes: int) -> Augment:
    """Return the recipe's augmentation as one function of (images, labels, random numbers of the batch)."""

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
