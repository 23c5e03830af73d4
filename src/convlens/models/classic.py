"""The models of the five classic programs, exactly as their documents describe them."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from convlens.errors import UsageError
from convlens.models.base import MODELS, ConvNet, require_pixels

POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


def make_pool(pool: str) -> nn.Module:
    """Return 2x2 pooling with stride 2, ``max`` or ``avg``."""
    if pool not in POOLS:
        raise UsageError(f"unknown pooling {pool!r}; choose from: max, avg")
    return POOLS[pool](2)


@MODELS.register("fashion-2conv")
class FashionTwoConv(ConvNet):
    """Program 000: two 5x5 convolutions with ReLU, each pooled 2x2 (max or average), and one linear head.

    The document leaves the widths open. 16 and 32 filters, padded to keep the size, are those of the tutorial that has
    the same batch size and number of steps. 28,938 parameters on 28x28 gray images.
    """

    def __init__(
        self, channels: int, image_height: int, image_width: int, classes: int, pool: str = "max", kernel_size: int = 5
    ):
        super().__init__()
        pad = kernel_size // 2
        self.body = nn.Sequential(
            OrderedDict(
                conv1=nn.Sequential(nn.Conv2d(channels, 16, kernel_size, padding=pad), nn.ReLU()),
                pool1=make_pool(pool),
                conv2=nn.Sequential(nn.Conv2d(16, 32, kernel_size, padding=pad), nn.ReLU()),
                pool2=make_pool(pool),
            )
        )
        for _ in range(2):  # an even kernel adds a pixel, and the pool halves
            image_height, image_width = (
                (side + 2 * pad - kernel_size + 1) // 2 for side in (image_height, image_width)
            )
        require_pixels("fashion-2conv", image_height, image_width)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * image_height * image_width, classes))


@MODELS.register("folder-cnn")
class FolderCNN(ConvNet):
    """Program 001: three stages of convolution and max pooling, flatten, two fully connected layers.

    The size of the first fully connected layer depends on the size of the images. Softmax is part of the loss and of
    prediction, so the model returns logits.
    """

    default_input_shape = (3, 64, 64)

    def __init__(self, channels: int, image_height: int, image_width: int, classes: int, kernel_size: int = 3):
        super().__init__()
        pad = kernel_size // 2
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = channels
        for number, filters in enumerate((16, 32, 64), start=1):
            conv = nn.Conv2d(inputs, filters, kernel_size, padding=pad)
            stages[f"conv{number}"] = nn.Sequential(conv, nn.ReLU())
            stages[f"pool{number}"] = nn.MaxPool2d(2)
            image_height, image_width = (
                (side + 2 * pad - kernel_size + 1) // 2 for side in (image_height, image_width)
            )
            inputs = filters
        require_pixels("folder-cnn", image_height, image_width)
        self.body = nn.Sequential(stages)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs * image_height * image_width, 128), nn.ReLU(), nn.Linear(128, classes)
        )


@MODELS.register("cifar-lenet")
class CifarLeNet(ConvNet):
    """Program 002: two unpadded 5x5 convolutions (6 and 16 filters), each max-pooled, and three linear layers.

    The document also has a ReLU after the last layer, which sets negative logits to zero; ``output_relu=False`` removes
    it. 65,886 parameters on 32x32 color images.
    """

    default_input_shape = (3, 32, 32)

    def __init__(
        self,
        channels: int,
        image_height: int,
        image_width: int,
        classes: int,
        kernel_size: int = 5,
        output_relu: bool = True,
    ):
        super().__init__()
        self.body = nn.Sequential(
            OrderedDict(
                conv1=nn.Sequential(nn.Conv2d(channels, 6, kernel_size), nn.ReLU()),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Sequential(nn.Conv2d(6, 16, kernel_size), nn.ReLU()),
                pool2=nn.MaxPool2d(2),
            )
        )
        for _ in range(2):
            image_height, image_width = ((side - kernel_size + 1) // 2 for side in (image_height, image_width))
        require_pixels("cifar-lenet", image_height, image_width)
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(16 * image_height * image_width, 128), nn.ReLU()]
        layers += [nn.Linear(128, 84), nn.ReLU(), nn.Linear(84, classes)]
        if output_relu:
            layers.append(nn.ReLU())
        self.head = nn.Sequential(*layers)


@MODELS.register("mnist-4conv")
class MnistFourConv(ConvNet):
    """Programs 003 and 004: four unpadded 3x3 convolutions (32, 64, 128, 256 filters), two linear layers.

    Max pooling follows the second and the fourth convolution, before their ReLU. The output is log-softmax.
    593,200 parameters on 28x28 gray images.
    """

    log_probabilities = True

    def __init__(self, channels: int, image_height: int, image_width: int, classes: int, kernel_size: int = 3):
        super().__init__()
        self.body = nn.Sequential(
            OrderedDict(
                conv1=nn.Sequential(nn.Conv2d(channels, 32, kernel_size), nn.ReLU()),
                conv2=nn.Sequential(nn.Conv2d(32, 64, kernel_size), nn.MaxPool2d(2), nn.ReLU()),
                conv3=nn.Sequential(nn.Conv2d(64, 128, kernel_size), nn.ReLU()),
                conv4=nn.Sequential(nn.Conv2d(128, 256, kernel_size), nn.MaxPool2d(2), nn.ReLU()),
            )
        )
        for _ in range(2):
            image_height, image_width = ((side - 2 * (kernel_size - 1)) // 2 for side in (image_height, image_width))
        require_pixels("mnist-4conv", image_height, image_width)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(256 * image_height * image_width, 50),
            nn.ReLU(),
            nn.Linear(50, classes),
            nn.LogSoftmax(dim=1),
        )
