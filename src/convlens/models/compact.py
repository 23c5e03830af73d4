"""Our own models: three that are accurate for few operations, and one for accuracy."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlens.models.base import MODELS, ConvNet, require_pixels


def conv_block(inputs: int, outputs: int, *, stride: int = 1, kernel_size: int = 3) -> list[nn.Module]:
    """Return a convolution (padded to keep the size at stride 1), BatchNorm and ReLU."""
    pad = (kernel_size - 1) // 2
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, pad, bias=False)  # BatchNorm has the bias
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


@MODELS.register("small")
class SmallNet(ConvNet):
    """A strided stem, three 3x3 convolutions with BatchNorm and max pooling, global max pooling and a linear layer.

    The stride of the stem grows with the image (1 below 16 pixels, 2 below 64, else 4), so that the costly inner layers
    see about 14x14 pixels. Images may have any size from 1x1.
    """

    def __init__(self, channels: int, image_height: int, image_width: int, classes: int, width: int = 32):
        super().__init__()
        side = min(image_height, image_width)
        stride = 1 if side < 16 else 2 if side < 64 else 4
        stem = {1: 3, 2: 4, 4: 8}[stride]
        stages: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(*conv_block(channels, width, stride=stride, kernel_size=stem))
        )
        side = (side + 2 * ((stem - 1) // 2) - stem) // stride + 1
        inputs = width
        for number, outputs in enumerate((2 * width, 4 * width, 4 * width), start=1):
            block = conv_block(inputs, outputs)
            # the last stage keeps its resolution for global pooling and the class activation map
            if number < 3 and side >= 4:
                block.insert(1, nn.MaxPool2d(2))
                side //= 2
            stages[f"conv{number}"] = nn.Sequential(*block)
            inputs = outputs
        self.body = nn.Sequential(stages)
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


@MODELS.register("tiny")
class TinyNet(ConvNet):
    """Three convolutions, pooled before BatchNorm: the fewest operations for 99% on MNIST.

    A layer after pooling costs a quarter, so each stage pools first. The 5x5 stem with stride 2 has no padding, because
    MNIST has no ink at the border.
    """

    def __init__(self, channels: int, image_height: int, image_width: int, classes: int, width: int = 16):
        super().__init__()
        side = (min(image_height, image_width) - 5) // 2 + 1
        require_pixels("tiny", side, side)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        conv = nn.Conv2d(channels, width, 5, stride=2, bias=False)
        inputs = width
        for number, outputs in enumerate((width, 2 * width, 4 * width), start=1):
            if number > 1:
                conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            pools = number < 3 and side >= 2
            stages[f"conv{number}"] = nn.Sequential(
                conv, *[nn.MaxPool2d(2)] * pools, ScaleFreeBatchNorm(outputs), nn.ReLU()
            )
            side, inputs = side // 2 if pools else side, outputs
        self.body = nn.Sequential(stages)
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


@MODELS.register("whitened")
class WhitenedNet(ConvNet):
    """A frozen whitening stem and three groups of two 3x3 convolutions that start as the identity, for Muon.

    The model of "94% on CIFAR-10 in 3.29 seconds" (Jordan 2024) and its Muon version. The filters of the stem are the
    eigenvectors of small patches of the training images, so that training starts from decorrelated pixels. BatchNorm
    has no scale. Each group halves the image between its first convolution and BatchNorm.
    """

    default_input_shape = (3, 32, 32)

    def __init__(self, channels: int, image_height: int, image_width: int, classes: int, width: int = 64):
        super().__init__()
        patch = 3 if channels == 1 else 2  # side of the whitened patches
        side = min(image_height, image_width) - patch + 1
        require_pixels("whitened", side, side)
        inputs = 2 * channels * patch**2
        stem = nn.Conv2d(channels, inputs, patch)
        stem.weight.requires_grad_(False)
        stages: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(stem, nn.GELU()))
        for number, outputs in enumerate((width, 4 * width, 4 * width), start=1):
            pool = [nn.MaxPool2d(2)] if side >= 2 else []
            side = max(side // 2, 1)
            stages[f"group{number}"] = nn.Sequential(
                identity_conv(inputs, outputs), *pool, ScaleFreeBatchNorm(outputs), nn.GELU(),
                identity_conv(outputs, outputs), ScaleFreeBatchNorm(outputs), nn.GELU(),
            )  # fmt: skip
            inputs = outputs
        self.body = nn.Sequential(stages)
        head = nn.Linear(inputs, classes, bias=False)
        head.weight.data /= inputs * head.weight.data.std()  # all classes start about equally likely
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), head)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the filters of the stem to the whitening eigenvectors of patches of ``x`` and their negatives."""
        stem: nn.Conv2d = self.body.stem[0]  # type: ignore[assignment, index]
        patches = F.unfold(x, stem.kernel_size).transpose(1, 2).flatten(0, 1).double()  # (N x positions, C x k x k)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(-1, *stem.weight.shape[1:]).flip(0)
        stem.weight.copy_(torch.cat([filters, -filters]))
        nn.init.zeros_(stem.bias)  # type: ignore[arg-type]


@MODELS.register("residual")
class ResidualNet(ConvNet):
    """A ResNet of eleven 3x3 convolutions, the first three at full resolution: for accuracy.

    After He et al. (2015): a stem, groups of one, two and two residual blocks, and global average pooling. Each group
    after the first has half the resolution and twice the width. A shortcut that changes the shape is a 1x1 convolution.
    """

    is_chain = False

    def __init__(self, channels: int, image_height: int, image_width: int, classes: int, width: int = 32):
        super().__init__()
        self.body = nn.Sequential(OrderedDict(
            stem=nn.Sequential(*conv_block(channels, width)),
            group1=ResidualBlock(width, width),
            group2=nn.Sequential(
                ResidualBlock(width, 2 * width, stride=2), ResidualBlock(2 * width, 2 * width)
            ),
            group3=nn.Sequential(
                ResidualBlock(2 * width, 4 * width, stride=2), ResidualBlock(4 * width, 4 * width)
            ),
        ))  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


class ResidualBlock(nn.Module):
    """Two convolutions plus a shortcut: the identity, or a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        # the last ReLU follows the sum
        self.branch = nn.Sequential(*conv_block(inputs, outputs, stride=stride), *conv_block(outputs, outputs)[:-1])
        projection = conv_block(inputs, outputs, stride=stride, kernel_size=1)[:-1]
        self.shortcut = nn.Sequential(*projection) if (inputs, stride) != (outputs, 1) else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return feature maps (N, C', H', W') of feature maps (N, C, H, W)."""
        return self.relu(self.shortcut(x) + self.branch(x))  # type: ignore[no-any-return]


class ScaleFreeBatchNorm(nn.BatchNorm2d):
    """BatchNorm without scale, whose running statistics converge within a few steps."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


def identity_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3x3 convolution without bias that starts as the identity (DiracNets, Zagoruyko & Komodakis 2017)."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[: min(inputs, outputs)])
    return conv
