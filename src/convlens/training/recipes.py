"""The named recipes. Each docstring says what came of it; `docs/results.md` has the commands and every run."""

from __future__ import annotations

from collections.abc import Callable

from convlens.registry import Registry
from convlens.training.recipe import Recipe

RECIPES: Registry[Callable[[], Recipe]] = Registry("recipe")


def get_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``; UnknownName with the nearest one if there is none."""
    return RECIPES[name]()


def default_recipe(data_name: str) -> Recipe:
    """Return the recipe that ``convlens train DATA`` uses: the one named like the data, else ``folder``."""
    return RECIPES[data_name if data_name in RECIPES else "folder"]()


@RECIPES.register("digits")
def digits() -> Recipe:
    """Strong default on the embedded digits.

    `convlens train digits`: test accuracy 99.39% +- 0.32 (10 seeds), 3 s
    on two cores of an AMD EPYC.
    """
    return Recipe(
        name="digits", model="small", filters=16, epochs=30, batch_size=64, lr=0.1, nesterov=True, warmup=0.1,
        weight_decay=1e-3, rotation=10.0, scale=0.1, precision="fp32", threads=1,
    )  # fmt: skip


@RECIPES.register("mnist")
def mnist() -> Recipe:
    """Strong default on MNIST.

    `convlens train mnist`: test accuracy 99.47% +- 0.06 (5 seeds), 60 s
    on two cores of an AMD EPYC.
    """
    return Recipe(
        name="mnist", model="small", validation=1 / 12, epochs=5, batch_size=256, lr=0.1, nesterov=True, warmup=0.1,
        weight_decay=5e-4, shift=2, rotation=10.0, scale=0.1,
    )  # fmt: skip


@RECIPES.register("fashion-mnist")
def fashion_mnist() -> Recipe:
    """Strong default on Fashion-MNIST.

    `convlens train fashion-mnist`: test accuracy 93.13% +- 0.13 (5 seeds), 125 s
    on two cores of an AMD EPYC.
    """
    return Recipe(
        name="fashion-mnist", model="small", validation=1 / 12, epochs=12, batch_size=256, lr=0.1, nesterov=True,
        warmup=0.1, weight_decay=1e-3, shift=1, flip=True, label_smoothing=0.1,
    )  # fmt: skip


@RECIPES.register("cifar10")
def cifar10() -> Recipe:
    """Strong default on CIFAR-10 (and on its JPEG copy in a folder).

    `convlens train cifar10-jpeg --recipe cifar10`: test accuracy 86.48% +- 0.34 (3 seeds), 562 s
    on two cores of an AMD EPYC.
    """
    return Recipe(
        name="cifar10", model="medium", filters=48, epochs=12, validation=0.04, batch_size=256, lr=0.2, nesterov=True,
        warmup=0.2, weight_decay=1e-3, shift=2, flip=True, label_smoothing=0.1,
    )  # fmt: skip


@RECIPES.register("folder")
def folder() -> Recipe:
    """Strong default on a folder of class folders.

    `convlens train hymenoptera`: test accuracy 70.07% +- 3.11 (5 seeds), 4 s
    on two cores of an AMD EPYC.

    Also for arrays and .npz files. It mirrors images: for signs and letters add ``--no-flip``.
    """
    return Recipe(
        name="folder", model="small", validation=0.15, epochs=30, batch_size=32, lr=0.02, nesterov=True, warmup=0.1,
        weight_decay=1e-3, shift=6, rotation=10.0, scale=0.2, flip=True, colour_jitter=0.2, label_smoothing=0.1,
    )  # fmt: skip


@RECIPES.register("fashion-2conv")
def fashion_2conv() -> Recipe:
    """Classic program 000 on Fashion-MNIST: its 3000 iterations of 100 images are 5 epochs.

    `convlens train fashion-mnist --recipe fashion-2conv`: test accuracy 86.12% +- 0.40 (5 seeds), 28 s
    on two cores of an AMD EPYC.

    ``--pool avg`` pools by the average.
    """
    return Recipe(
        name="fashion-2conv", model="fashion-2conv", validation=0.0, watch_test=True, iterations=3000, batch_size=100,
        lr=0.01, momentum=0.0, schedule="constant",
    )  # fmt: skip


@RECIPES.register("folder-cnn")
def folder_cnn() -> Recipe:
    """Classic program 001 on a folder of class folders.

    `convlens train hymenoptera --recipe folder-cnn`: test accuracy 61.83% +- 4.20 (5 seeds), 3 s
    on two cores of an AMD EPYC.

    The document names no sizes: three stages of 16, 32 and 64 filters, and 128 hidden units, are our choice.
    """
    return Recipe(
        name="folder-cnn", model="folder-cnn", epochs=20, batch_size=32, lr=0.01, momentum=0.9, schedule="constant",
    )  # fmt: skip


@RECIPES.register("cifar-lenet")
def cifar_lenet() -> Recipe:
    """Classic program 002 on CIFAR-10; ``--no-output-relu`` leaves out the ReLU behind the last layer.

    `convlens train cifar10-jpeg --recipe cifar-lenet`: test accuracy 58.65% +- 1.33 (3 seeds), 82 s
    on two cores of an AMD EPYC.

    The document names no learning rate, batch size or length; ours are the usual ones.
    """
    return Recipe(
        name="cifar-lenet", model="cifar-lenet", validation=0.0, watch_test=True, epochs=10, batch_size=32, lr=0.01,
        momentum=0.9, schedule="constant",
    )  # fmt: skip


@RECIPES.register("mnist-4conv")
def mnist_4conv() -> Recipe:
    """Classic programs 003 and 004 on MNIST: 118 train batches and 20 test batches of 512, 20 epochs.

    `convlens train mnist --recipe mnist-4conv`: test accuracy 99.11% (1 seed), 1274 s
    on two cores of an AMD EPYC.

    The document's per-image transforms are done on the batch: the centre crop (its size, 22 of 28 pixels, is our
    choice: the document names none) with p = 0.1, resized bilinearly, and the rotation; the border continues the image.
    """
    return Recipe(
        name="mnist-4conv", model="mnist-4conv", validation=0.0, watch_test=True, epochs=20, batch_size=512,
        loss="nll", lr=0.01, momentum=0.9, schedule="step", step_epochs=15, crop_probability=0.1, rotation=15.0,
    )  # fmt: skip
