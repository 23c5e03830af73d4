"""What one would write, or take, instead of convlens: generators of (training seconds so far, test accuracy)."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.models import create_model, initialise_from
from convlens.training.engine import fit
from convlens.training.recipe import Recipe

Course = Iterator[tuple[float, float]]


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
    normalise = Preprocess.measure(dataset.train.images, dataset.style).normaliser()
    return normalise(dataset.train.images), normalise(dataset.test.images)


def convlens(dataset: Dataset, recipe: Recipe) -> Course:
    """A recipe of convlens, watched at the end of every epoch."""
    torch.manual_seed(recipe.seed)
    channels, height, width = dataset.shape
    net = create_model(
        recipe.model, channels=channels, height=height, width=width, classes=10, **recipe.model_options()
    )
    preprocess = Preprocess.measure(dataset.train.images, dataset.style)
    initialise_from(net, dataset.train.images, preprocess.normaliser())
    for record in fit(net, dataset, recipe.override(watch_test=True), preprocess=preprocess):
        yield record.seconds, record.test_acc or 0.0


class Pictures(TorchDataset[tuple[Tensor, int]]):
    """Images one by one through PIL, as the documents do it: turned, at times cut to the centre, made a tensor."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images = [Image.fromarray(image[0].numpy()) for image in images]
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if random.random() < 0.1:
            image = image.crop((3, 3, 25, 25)).resize((28, 28))
        image = image.rotate(random.uniform(-15, 15))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 28, 28).float() / 255
        return (pixels - 0.1307) / 0.3081, self.labels[index]


def tutorial(dataset: Dataset) -> Course:
    """The program of the documents in its plain style: DataLoader, transforms image by image, fp32, eager."""
    torch.manual_seed(0)
    random.seed(0)
    loader = DataLoader(Pictures(dataset.train.images, dataset.train.labels), batch_size=512, shuffle=True)
    net = create_model("mnist-4conv", channels=1, height=28, width=28, classes=10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    test = (dataset.test.images.float() / 255 - 0.1307) / 0.3081
    seconds = 0.0
    while True:
        start = time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            F.nll_loss(net(x), y).backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        yield seconds, accuracy(net, test, dataset.test.labels)


def plain_loop(dataset: Dataset, model: str, filters: int) -> Course:
    """Our own net in the plain loop that one writes: tensors in a DataLoader, Adam, fp32."""
    torch.manual_seed(0)
    images, test = normalised(dataset)
    loader = DataLoader(TensorDataset(images, dataset.train.labels), batch_size=128, shuffle=True)
    net = create_model(model, channels=1, height=28, width=28, classes=10, filters=filters)
    net.initialise(images[:1000])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    seconds = 0.0
    while True:
        start = time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        yield seconds, accuracy(net, test, dataset.test.labels)


def scikit_learn(dataset: Dataset) -> Course:
    """scikit-learn's neural network, epoch by epoch: what one takes without PyTorch."""
    from sklearn.neural_network import MLPClassifier

    images, test = (x.flatten(1).numpy() for x in normalised(dataset))
    net = MLPClassifier((256,), random_state=0, batch_size=256)
    classes, seconds = list(range(10)), 0.0
    while True:
        start = time.perf_counter()
        net.partial_fit(images, dataset.train.labels.numpy(), classes)
        seconds += time.perf_counter() - start
        yield seconds, float(net.score(test, dataset.test.labels.numpy()))
