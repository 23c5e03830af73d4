"""What one would write, or take, instead of convlens: generators of (training seconds so far, test accuracy)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from convlens.data.augment import BatchRandom, hflip, translate
from convlens.data.dataset import Dataset
from convlens.data.normalize import Normalize
from convlens.data.preprocess import Preprocess
from convlens.evaluation.inference import TTA, compute_logits, make_tta
from convlens.evaluation.metrics import Scores
from convlens.models import create_model
from convlens.training.build import make_loss, make_model, model_config
from convlens.training.loop import fit
from convlens.training.optimizers import Muon
from convlens.training.recipe import Recipe
from convlens.training.recipes import get_recipe

Course = Generator[tuple[float, float], None, None]


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy of a net on normalised images (N, C, H, W)."""
    net.eval()
    with torch.no_grad():
        hits = sum(
            int((net(x).argmax(dim=1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    net.train()
    return hits / len(labels)


def normalised(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return the training and the test images as floats."""
    normalise = Preprocess.fit(dataset.train.images, dataset.input_style).normalizer()
    return normalise(dataset.train.images), normalise(dataset.test.images)


def convlens(dataset: Dataset, recipe: Recipe) -> Course:
    """A recipe of convlens, watched at the end of every epoch, and at last with augmentation if it has any."""
    torch.manual_seed(recipe.seed)
    preprocess = Preprocess.fit(dataset.train.images, dataset.input_style)
    net = make_model(model_config(recipe, dataset), dataset, preprocess)
    for record in fit(net, dataset, recipe.override(log_test_metrics=True), preprocess=preprocess):
        yield record.seconds, record.test_acc or 0.0
    if recipe.tta:
        yield record.seconds, test_accuracy(net, dataset, preprocess.normalizer(), make_tta(recipe.hflip))


def test_accuracy(net: nn.Module, dataset: Dataset, normalise: Normalize, views: TTA | None = None) -> float:
    """Return the accuracy on the test split, of plain images or with the probabilities of several views averaged."""
    return Scores.of(compute_logits(net, dataset.test.images, normalise, tta=views), dataset.test.labels).accuracy


class Pictures(TorchDataset[tuple[Tensor, int]]):
    """Images one by one through PIL, as the documents do it: at times cut to the centre, turned, made a tensor."""

    def __init__(self, dataset: Dataset, recipe: Recipe):
        images = dataset.train.images.permute(0, 2, 3, 1).squeeze(3).numpy()
        self.images = [Image.fromarray(image) for image in images]
        self.labels = dataset.train.labels.tolist()
        self.center_crop_prob, self.rotation = recipe.center_crop_prob, recipe.rotation
        side = dataset.shape[1]
        self.margin = (side - round(recipe.center_crop_ratio * side)) // 2
        measured = Preprocess.fit(dataset.train.images, dataset.input_style)
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (measured.mean, measured.std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, cut = self.images[index], self.margin
        if random.random() < self.center_crop_prob:
            width, height = image.size
            image = image.crop((cut, cut, width - cut, height - cut)).resize((width, height))
        if self.rotation:
            image = image.rotate(random.uniform(-self.rotation, self.rotation))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, -1)
        return (pixels.permute(2, 0, 1).float() / 255 - self.mean) / self.std, self.labels[index]


def tutorial_loop(
    net: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    compute_loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
) -> Course:
    """The loop that every tutorial has; the clock stops while the test ``images`` are looked at."""
    seconds = 0.0
    load_compiler()
    while True:
        start = time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            compute_loss(net(x), y).backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        yield seconds, accuracy(net, images, labels)


def load_compiler() -> None:
    """Let PyTorch's optimizers import its compiler, as the first step of one does: a second or two, off the clock."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()


def tutorial(dataset: Dataset, classic: str) -> Course:
    """A program of the documents in its plain style: DataLoader, transforms image by image, fp32, eager.

    Net, batch, rate, momentum, steps of the rate, crop and rotation are those of the recipe ``classic``; there is no
    more to the documents.
    """
    torch.manual_seed(0)
    random.seed(0)
    recipe = get_recipe(classic)
    pictures = Pictures(dataset, recipe)
    loader = DataLoader(pictures, batch_size=recipe.batch_size, shuffle=True)
    channels, height, width = dataset.shape
    net = create_model(recipe.model, channels=channels, image_height=height, image_width=width, classes=10)
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    steps = torch.optim.lr_scheduler.StepLR(optimizer, recipe.lr_step_size, recipe.lr_gamma)
    test = (dataset.test.images.float() / 255 - pictures.mean) / pictures.std
    for point in tutorial_loop(net, loader, optimizer, make_loss(recipe, net), test, dataset.test.labels):
        yield point
        if recipe.lr_schedule == "step":
            steps.step()


def plain_loop(dataset: Dataset, model: str, filters: int) -> Course:
    """Our own net in the plain loop that one writes: tensors in a DataLoader, Adam, fp32."""
    torch.manual_seed(0)
    images, test = normalised(dataset)
    loader = DataLoader(TensorDataset(images, dataset.train.labels), batch_size=128, shuffle=True)
    channels, height, width = dataset.shape
    net = create_model(model, channels=channels, image_height=height, image_width=width, classes=10, width=filters)
    net.initialize(images[:1000])  # type: ignore[operator]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    yield from tutorial_loop(net, loader, optimizer, F.cross_entropy, test, dataset.test.labels)


def speedrun(dataset: Dataset, device: torch.device, seed: int = 0, epochs: int = 8) -> tuple[float, float, float]:
    """K. Jordan's published recipe for 94% on CIFAR-10, as one would write it down: 8 epochs of 2000 images with Muon.

    Returns its training seconds, the accuracy of plain test images, and that with its test-time augmentation. The net
    is our `whitened`, which is the published one; rates, batch, momenta and augmentation are its own.
    """
    torch.manual_seed(seed)
    batch, width = 2000, 256
    normalise = Preprocess.fit(dataset.train.images, dataset.input_style).normalizer()
    images, labels = normalise(dataset.train.images).to(device), dataset.train.labels.to(device)
    net = create_model("whitened", channels=3, image_height=32, image_width=32, classes=10, width=64).to(device)
    net.initialize(images[:5000])  # type: ignore[operator]
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stem_bias = net.body.stem[0].bias  # type: ignore[union-attr, index]
    weights = [p for p in net.parameters() if p.requires_grad]
    filters = [p for p in weights if p.dim() == 4]
    biases = [p for p in weights if p.dim() == 1 and p is not stem_bias]
    head = [p for p in weights if p.dim() == 2]
    # for a summed loss; it divides the logits by the width, which our net has in its head's weights
    rates = (0.053, 0.053, 0.67 / width**2)
    groups = [
        {"params": group, "lr": rate, "weight_decay": 2e-6 * batch / rate}
        for group, rate in zip(([stem_bias], biases, head), rates, strict=True)
    ]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    muon = Muon(filters, momentum=0.6)
    per_epoch, step = len(images) // batch, 0
    first = torch.rand(len(images), device=device) < 0.5
    load_compiler()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for epoch in range(epochs):
        flipped = hflip(images, first ^ bool(epoch % 2))
        seen = translate(
            flipped, BatchRandom(torch.Generator(device).manual_seed(100 * seed + epoch), len(flipped), slice(None)), 2
        )
        for rows in torch.randperm(len(images), device=device).split(batch)[:per_epoch]:
            with torch.autocast(device.type, torch.bfloat16):
                logits = net(seen[rows].contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.2, reduction="sum")
            net.zero_grad()
            loss.backward()
            left = 1 - step / (epochs * per_epoch)
            lasting = (max(1 - step / (3 * per_epoch), 0.0), left, left)  # the stem's bias learns for 3 epochs only
            for group, rate, share in zip(sgd.param_groups, rates, lasting, strict=True):
                group["lr"] = rate * share
            sgd.step()
            with torch.no_grad():
                muon.update(0.24 * left)
            step += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    plain, averaged = (test_accuracy(net, dataset, normalise, views) for views in (None, make_tta(True)))
    return seconds, plain, averaged


def scikit_learn(dataset: Dataset) -> Course:
    """scikit-learn's neural network, epoch by epoch: what one takes without PyTorch."""
    from sklearn.neural_network import MLPClassifier

    images, test = (x.flatten(1).numpy() for x in normalised(dataset))
    net = MLPClassifier((256,), random_state=0, batch_size=256)
    classes, seconds = list(range(10)), 0.0
    while True:
        start = time.perf_counter()
        net.partial_fit(images, dataset.train.labels.numpy(), classes=classes)
        seconds += time.perf_counter() - start
        yield seconds, float(net.score(test, dataset.test.labels.numpy()))
