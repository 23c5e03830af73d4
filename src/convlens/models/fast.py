"""The strong nets that ``convlens train DATA`` uses by default: few operations for each point of accuracy."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from convlens.models.contract import MODELS, ConvNet, require_pixels


def conv_block(inputs: int, outputs: int, *, stride: int = 1, kernel_size: int = 3) -> list[nn.Module]:
    """Return convolution (padded to keep the size at stride 1), BatchNorm and ReLU."""
    pad = (kernel_size - 1) // 2
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, pad, bias=False)  # BatchNorm brings the bias
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


@MODELS.register("small")
class SmallNet(ConvNet):
    """A strided stem and three 3x3 convolutions with BatchNorm, max-pooled down; a global maximum and one linear.

    The stem's stride grows with the image (1 below 16 pixels, 2 below 64, else 4), so that the costly inner
    layers see about 14x14 pixels whatever comes in, and images of any size from 1x1 up are taken.
    """

    def __init__(self, channels: int, height: int, width: int, classes: int, filters: int = 32):
        super().__init__()
        side = min(height, width)
        stride = 1 if side < 16 else 2 if side < 64 else 4
        stem = {1: 3, 2: 4, 4: 8}[stride]
        stages: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(*conv_block(channels, filters, stride=stride, kernel_size=stem))
        )
        side = (side + 2 * ((stem - 1) // 2) - stem) // stride + 1
        inputs = filters
        for number, outputs in enumerate((2 * filters, 4 * filters, 4 * filters), start=1):
            block = conv_block(inputs, outputs)
            # the last stage keeps its pixels for the global maximum and for the class activation map
            if number < 3 and side >= 4:
                block.insert(1, nn.MaxPool2d(2))
                side //= 2
            stages[f"conv{number}"] = nn.Sequential(*block)
            inputs = outputs
        self.body = nn.Sequential(stages)
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


@MODELS.register("medium")
class MediumNet(ConvNet):
    """A 2x2 stem and three groups of two 3x3 convolutions with BatchNorm, each group halving the image.

    The plan (pool between the first convolution of a group and its BatchNorm, a global maximum at the end)
    follows K. Jordan's "94% on CIFAR-10 in 3.29 seconds" (2024), with ordinary BatchNorm and initialisation.
    """

    usual_shape = (3, 32, 32)

    def __init__(self, channels: int, height: int, width: int, classes: int, filters: int = 64):
        super().__init__()
        stages: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(nn.Conv2d(channels, 24, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        )
        inputs, side = 24, min(height, width) - 1
        require_pixels("medium", side, side)
        for number, outputs in enumerate((filters, 2 * filters, 2 * filters), start=1):
            first = conv_block(inputs, outputs)
            if side >= 2:
                first.insert(1, nn.MaxPool2d(2))
                side //= 2
            stages[f"group{number}"] = nn.Sequential(*first, *conv_block(outputs, outputs))
            inputs = outputs
        self.body = nn.Sequential(stages)
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
