"""The named recipes. Each docstring says what came of it; `docs/results/accuracy.md` has the commands and every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from convlens.errors import UsageError
from convlens.system.files import read_json
from convlens.system.registry import Registry
from convlens.training.recipe import Recipe

# what `convlens train DATA` takes for a data set; any other data is a folder's
DEFAULTS = {"digits": "digits", "mnist": "mnist-995", "fashion-mnist": "fashion-94", "cifar10": "cifar10-90"}
# what --budget picks from, the quickest first
BUDGET_RECIPES = {
    "mnist": ("mnist-99", "mnist-995", "mnist-best"),
    "fashion-mnist": ("fashion-85", "fashion-92", "fashion-94", "fashion-best"),
    "cifar10": ("cifar10-small", "cifar10-90", "cifar10-94", "cifar10-best"),
}

RECIPES: Registry[Callable[[], Recipe]] = Registry("recipe")


def get_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``; UnknownName with the nearest one if there is none.

    >>> get_recipe("digits").epochs
    30
    >>> get_recipe("digit")
    Traceback (most recent call last):
    convlens.errors.UnknownNameError: unknown recipe 'digit'; did you mean 'digits'?
    """
    return RECIPES[name]()


def default_recipe(data_name: str) -> Recipe:
    """Return the recipe that ``convlens train DATA`` uses.

    >>> default_recipe("mnist").name, default_recipe("photos/").name
    ('mnist-995', 'folder')
    """
    return get_recipe(DEFAULTS.get(data_name, "folder"))


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a JSON file: ``{"recipe": "digits", "lr": 0.05}``, a named one and what is other in this.

    Files without the name hold every field, as ``convlens recipes NAME`` prints them; a run's config.json holds them
    beside other things. Raises UsageError for an unknown key (with the nearest one) or a value that a field does not
    take, ConvlensError for a file that cannot be read.
    """
    values = read_json(Path(path) / "config.json" if Path(path).is_dir() else Path(path))  # of a run
    start = values.pop("recipe", None)
    try:
        if isinstance(start, dict):
            return Recipe.from_json(start)
        if isinstance(start, str):
            return get_recipe(start).override(**values)
        if start is not None:
            raise UsageError('"recipe" is neither the name of a recipe nor the recipe of a run')
        return Recipe.from_json(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


@RECIPES.register("digits")
def digits() -> Recipe:
    """Strong default on the embedded digits.

    `convlens train digits`: test accuracy 99.36% +- 0.32 (10 seeds), 2.1 s
    on two cores of an AMD EPYC.
    """
    return Recipe(
        name="digits", model="small", width=16, epochs=30, batch_size=64, lr=0.1, nesterov=True, warmup_fraction=0.1,
        weight_decay=1e-3, rotation=10.0, scale=0.1, precision="fp32", threads=1,
    )  # fmt: skip


@RECIPES.register("mnist-99")
def mnist_99() -> Recipe:
    """99% on MNIST in the fewest seconds: less than one epoch.

    `convlens train mnist --recipe mnist-99`: test accuracy 99.09% +- 0.07 (10 seeds), 1.0 s
    on two cores of an AMD EPYC.
    """
    return Recipe(
        name="mnist-99", model="tiny", width=16, val_fraction=0.0, max_steps=112, batch_size=512, optimizer="muon",
        lr=0.22, head_lr=0.15, bias_lr=2.0, momentum=0.85, nesterov=True, muon_momentum=0.5, weight_decay=2e-3,
        warmup_fraction=0.03, label_smoothing=0.07,
    )  # fmt: skip


@RECIPES.register("mnist-995")
def mnist_995() -> Recipe:
    """99.5% on MNIST in the fewest seconds.

    `convlens train mnist`: test accuracy 99.55% +- 0.05 (5 seeds), 15 s
    on two cores of an AMD EPYC.
    """
    return Recipe(
        name="mnist-995", model="tiny", width=32, val_fraction=1 / 12, epochs=7, batch_size=512, optimizer="muon",
        lr=0.2, head_lr=0.15, bias_lr=2.0, momentum=0.85, nesterov=True, muon_momentum=0.5, weight_decay=2e-3,
        warmup_fraction=0.03, label_smoothing=0.1, translate=1, rotation=10.0, scale=0.1,
    )  # fmt: skip


@RECIPES.register("mnist-best")
def mnist_best() -> Recipe:
    """The best single net on MNIST, however long it takes.

    `convlens train mnist --recipe mnist-best`: test accuracy 99.83% (1 seed), 2,599 s
    on two cores of an AMD EPYC; with test-time augmentation 99.84%.
    """
    return Recipe(
        name="mnist-best", model="residual", width=32, val_fraction=0.02, epochs=20, batch_size=250,
        optimizer="muon", lr=0.04, head_lr=0.02, bias_lr=0.05, momentum=0.85, nesterov=True, weight_decay=5e-4,
        label_smoothing=0.05, translate=2, rotation=12.0, scale=0.12, tta=True,
    )  # fmt: skip


@RECIPES.register("fashion-85")
def fashion_85() -> Recipe:
    """85% on Fashion-MNIST in the fewest seconds: less than one epoch.

    `convlens train fashion-mnist --recipe fashion-85`: test accuracy 87.78% +- 0.17 (5 seeds), 0.8 s
    on two cores of an AMD EPYC.
    """
    return Recipe(
        name="fashion-85", model="tiny", width=16, val_fraction=1 / 12, max_steps=100, batch_size=512,
        optimizer="muon", lr=0.22, head_lr=0.15, bias_lr=2.0, momentum=0.85, nesterov=True, muon_momentum=0.5,
        weight_decay=2e-3, warmup_fraction=0.03, label_smoothing=0.07,
    )  # fmt: skip


@RECIPES.register("fashion-92")
def fashion_92() -> Recipe:
    """92% on Fashion-MNIST in the fewest seconds.

    `convlens train fashion-mnist --recipe fashion-92`: test accuracy 92.10% +- 0.23 (5 seeds), 18 s
    on two cores of an AMD EPYC.
    """
    return Recipe(
        name="fashion-92", model="whitened", width=16, val_fraction=1 / 12, max_steps=390, batch_size=500,
        optimizer="muon", lr=0.24, head_lr=0.082, bias_lr=26.0, momentum=0.85, nesterov=True, weight_decay=0.012,
        label_smoothing=0.1, hflip=True, initial_size=18, initial_size_fraction=0.65,
    )  # fmt: skip


@RECIPES.register("fashion-94")
def fashion_94() -> Recipe:
    """94% on Fashion-MNIST in the fewest seconds.

    `convlens train fashion-mnist`: test accuracy 94.12% +- 0.08 (3 seeds), 130 s
    on two cores of an AMD EPYC; with test-time augmentation 94.33% +- 0.10.
    """
    return Recipe(
        name="fashion-94", model="whitened", width=30, val_fraction=1 / 12, epochs=7, batch_size=500, optimizer="muon",
        lr=0.12, head_lr=0.0233, bias_lr=26.0, momentum=0.85, nesterov=True, weight_decay=0.05, label_smoothing=0.1,
        hflip=True, translate=1, tta=True,
    )  # fmt: skip


@RECIPES.register("fashion-best")
def fashion_best() -> Recipe:
    """For accuracy on Fashion-MNIST, in eighty minutes on two cores: a single net.

    `convlens train fashion-mnist --recipe fashion-best`: test accuracy 95.68% (1 seed), 4,757 s
    on two cores of an AMD EPYC; with test-time augmentation 95.96%.
    """
    return Recipe(
        name="fashion-best", model="residual", width=48, val_fraction=0.02, epochs=48, batch_size=250,
        optimizer="muon", lr=0.04, head_lr=0.02, bias_lr=0.05, momentum=0.85, nesterov=True, weight_decay=5e-4,
        label_smoothing=0.1, hflip=True, translate=2, cutout=14, tta=True,
    )  # fmt: skip


@RECIPES.register("cifar10-small")
def cifar10_small() -> Recipe:
    """A small net on CIFAR-10: the one that comes with convlens.

    `convlens train cifar10-jpeg --recipe cifar10-small`: test accuracy 86.25% +- 0.18 (3 seeds), 234 s
    on two cores of an AMD EPYC; with test-time augmentation 87.42% +- 0.12.
    """
    return Recipe(
        name="cifar10-small", model="whitened", width=30, val_fraction=0.06, epochs=9, batch_size=500,
        optimizer="muon", lr=0.24, head_lr=0.0233, bias_lr=26.0, momentum=0.85, nesterov=True, weight_decay=0.05,
        label_smoothing=0.1, hflip=True, translate=2, initial_size=20, initial_size_fraction=0.5, tta=True,
    )  # fmt: skip


@RECIPES.register("cifar10-90")
def cifar10_90() -> Recipe:
    """Strong default on CIFAR-10, in less than four minutes: a wide net, on small images first.

    `convlens train cifar10-jpeg --recipe cifar10-90`: test accuracy 88.16% +- 0.37 (3 seeds), 233 s
    on two cores of an AMD EPYC; with test-time augmentation 89.11% +- 0.10.
    """
    return Recipe(
        name="cifar10-90",
        model="whitened",
        width=64,
        val_fraction=0.06,
        max_steps=270,
        batch_size=1000,
        grad_accum_steps=4,
        optimizer="muon",
        lr=0.24,
        head_lr=0.0102,
        bias_lr=53.0,
        momentum=0.85,
        nesterov=True,
        weight_decay=0.2,
        label_smoothing=0.1,
        hflip=True,
        translate=2,
        initial_size=20,
        initial_size_fraction=0.55,
        tta=True,
    )


@RECIPES.register("cifar10-94")
def cifar10_94() -> Recipe:
    """In the fewest seconds what stands for 94% on CIFAR-10: 90.6% of its JPEG copy, with test-time augmentation.

    `convlens train cifar10-jpeg --recipe cifar10-94`: test accuracy 89.39% +- 0.34 (3 seeds), 450 s
    on two cores of an AMD EPYC; with test-time augmentation 90.60% +- 0.24.
    """
    return Recipe(
        name="cifar10-94", model="whitened", width=64, val_fraction=0.0, epochs=10, batch_size=1000, grad_accum_steps=4,
        optimizer="muon", lr=0.24, head_lr=0.0102, bias_lr=53.0, momentum=0.85, nesterov=True, weight_decay=0.2,
        label_smoothing=0.2, hflip=True, translate=2, initial_size=20, initial_size_fraction=0.5, tta=True,
    )  # fmt: skip


@RECIPES.register("cifar10-best")
def cifar10_best() -> Recipe:
    """For accuracy on CIFAR-10, in an hour on two cores: the net of `cifar10-94`, wider and for longer.

    `convlens train cifar10-jpeg --recipe cifar10-best`: test accuracy 90.82% (1 seed), 3,304 s
    on two cores of an AMD EPYC; with test-time augmentation 91.85%.
    """
    return Recipe(
        name="cifar10-best",
        model="whitened",
        width=96,
        val_fraction=0.02,
        epochs=36,
        batch_size=1000,
        grad_accum_steps=4,
        optimizer="muon",
        lr=0.24,
        head_lr=0.0102,
        bias_lr=53.0,
        momentum=0.85,
        nesterov=True,
        weight_decay=0.2,
        label_smoothing=0.2,
        hflip=True,
        translate=4,
        cutout=12,
        initial_size=20,
        initial_size_fraction=0.53,
        tta=True,
    )


@RECIPES.register("folder")
def folder() -> Recipe:
    """Strong default on a folder of class folders.

    `convlens train hymenoptera`: test accuracy 69.41% +- 1.69 (5 seeds), 2.1 s
    on two cores of an AMD EPYC.

    Also for arrays and .npz files. It mirrors images: for signs and letters add ``--no-hflip``.
    """
    return Recipe(
        name="folder",
        model="small",
        val_fraction=0.15,
        epochs=30,
        batch_size=32,
        lr=0.02,
        nesterov=True,
        warmup_fraction=0.1,
        weight_decay=1e-3,
        translate=6,
        rotation=10.0,
        scale=0.2,
        hflip=True,
        color_jitter=0.2,
        label_smoothing=0.1,
    )


@RECIPES.register("fashion-2conv")
def fashion_2conv() -> Recipe:
    """Classic program 000 on Fashion-MNIST: its 3000 iterations of 100 images are 5 epochs.

    `convlens train fashion-mnist --recipe fashion-2conv`: test accuracy 86.12% +- 0.40 (5 seeds), 32 s
    on two cores of an AMD EPYC.

    ``--pool avg`` pools by the average.
    """
    return Recipe(
        name="fashion-2conv",
        model="fashion-2conv",
        val_fraction=0.0,
        log_test_metrics=True,
        max_steps=3000,
        batch_size=100,
        lr=0.01,
        momentum=0.0,
        lr_schedule="constant",
    )


@RECIPES.register("folder-cnn")
def folder_cnn() -> Recipe:
    """Classic program 001 on a folder of class folders.

    `convlens train hymenoptera --recipe folder-cnn`: test accuracy 61.83% +- 4.20 (5 seeds), 1.4 s
    on two cores of an AMD EPYC.

    The document names no sizes: three stages of 16, 32 and 64 filters, and 128 hidden units, are our choice.
    """
    return Recipe(
        name="folder-cnn", model="folder-cnn", epochs=20, batch_size=32, lr=0.01, momentum=0.9, lr_schedule="constant",
    )  # fmt: skip


@RECIPES.register("cifar-lenet")
def cifar_lenet() -> Recipe:
    """Classic program 002 on CIFAR-10; ``--no-output-relu`` leaves out the ReLU behind the last layer.

    `convlens train cifar10-jpeg --recipe cifar-lenet`: test accuracy 58.65% +- 1.33 (3 seeds), 148 s
    on two cores of an AMD EPYC.

    The document names no learning rate, batch size or length; ours are the usual ones.
    """
    return Recipe(
        name="cifar-lenet",
        model="cifar-lenet",
        val_fraction=0.0,
        log_test_metrics=True,
        epochs=10,
        batch_size=32,
        lr=0.01,
        momentum=0.9,
        lr_schedule="constant",
    )


@RECIPES.register("mnist-4conv")
def mnist_4conv() -> Recipe:
    """Classic programs 003 and 004 on MNIST: 118 train batches and 20 test batches of 512, 20 epochs.

    `convlens train mnist --recipe mnist-4conv`: test accuracy 99.11% (1 seed), 1,274 s
    on two cores of an AMD EPYC.

    The document's per-image transforms are done on the batch: the centre crop (its size, 22 of 28 pixels, is our
    choice: the document names none) with p = 0.1, resized bilinearly, and the rotation; the border continues the image.
    """
    return Recipe(
        name="mnist-4conv", model="mnist-4conv", val_fraction=0.0, log_test_metrics=True, epochs=20, batch_size=512,
        loss="nll", lr=0.01, momentum=0.9, lr_schedule="step", lr_step_size=15, center_crop_prob=0.1, rotation=15.0,
    )  # fmt: skip
