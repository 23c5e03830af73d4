"""The nets: the classics as CLASSICS.md draws them, their sizes, the summary table, and the contract of every net."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens.errors import ConvlensError, UnknownNameError, UsageError
from convlens.models import (
    MODELS,
    ConvNet,
    check_model,
    count_parameters,
    create_model,
    model_options,
    register,
    summarize,
)

ANY_SIZE = [(1, 28, 28), (3, 32, 32), (3, 64, 48)]  # of a net that is not listed
SIZES = {
    "fashion-2conv": [(1, 28, 28), (3, 32, 32), (1, 4, 4), (3, 9, 20)],
    "folder-cnn": [(3, 64, 64), (1, 8, 8), (3, 30, 50)],
    "cifar-lenet": [(3, 32, 32), (1, 28, 28), (1, 16, 16), (3, 16, 40)],
    "mnist-4conv": [(1, 28, 28), (3, 32, 32), (1, 16, 16)],
    "small": [(1, 1, 1), (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 1, 40), (3, 100, 40)],
    "whitened": [(1, 3, 3), (1, 28, 28), (3, 2, 2), (3, 32, 32), (3, 40, 24)],
    "residual": [(1, 1, 1), (1, 28, 28), (3, 32, 32), (3, 5, 24)],
    "tiny": [(1, 5, 5), (1, 28, 28), (3, 32, 32), (3, 40, 24)],
}
CASES = [(name, size) for name in MODELS.names() for size in SIZES.get(name, ANY_SIZE)]


def build(name: str, channels: int, side: int, classes: int = 10, **options: Any) -> Any:
    return create_model(name, channels=channels, image_height=side, image_width=side, classes=classes, **options)


def layers_of(name: str, channels: int, side: int, **options: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Return (kind, output shape) of every layer in the order in which an image passes them."""
    net = build(name, channels, side, **options)
    return [(row.kind, row.output_shape) for row in summarize(net, channels, side, side)]


@pytest.mark.parametrize(("name", "size"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_every_net_keeps_the_contract_at_every_size_it_takes(name: str, size: tuple[int, int, int]) -> None:
    channels, height, width = size
    check_model(name, channels=channels, image_height=height, image_width=width, classes=3)
    check_model(name, channels=channels, image_height=height, image_width=width, classes=2)
    net = create_model(name, channels=channels, image_height=height, image_width=width, classes=3)
    assert isinstance(net, ConvNet)
    assert net(torch.zeros(2, channels, height, width)).shape == (2, 3)


@pytest.mark.parametrize("name", ["small", "whitened", "residual", "tiny"])
@pytest.mark.parametrize("width", [1, 5])
def test_width_is_an_option_of_the_strong_nets(name: str, width: int) -> None:
    net = build(name, 3, 32, width=width)
    assert net.features(torch.zeros(1, 3, 32, 32)).shape[1] == 4 * width


@pytest.mark.parametrize(
    ("name", "channels", "side", "parameters"),
    [("fashion-2conv", 1, 28, 28_938), ("cifar-lenet", 3, 32, 65_886), ("mnist-4conv", 1, 28, 593_200)],
)
def test_parameter_counts_of_the_classics(name: str, channels: int, side: int, parameters: int) -> None:
    net = build(name, channels, side)
    assert count_parameters(net) == parameters
    assert sum(row.parameters for row in summarize(net, channels, side, side)) == parameters


def test_size_of_folder_cnn_follows_the_images() -> None:
    convolutions = 3 * 16 * 9 + 16 + 16 * 32 * 9 + 32 + 32 * 64 * 9 + 64
    for side in (16, 40, 64):
        linear = 64 * (side // 8) ** 2 * 128 + 128 + 128 * 5 + 5
        assert count_parameters(build("folder-cnn", 3, side, classes=5)) == convolutions + linear


@pytest.mark.parametrize(
    ("options", "pool"), [({}, "MaxPool2d"), ({"pool": "max"}, "MaxPool2d"), ({"pool": "avg"}, "AvgPool2d")]
)
def test_layers_of_fashion_2conv(options: dict[str, Any], pool: str) -> None:
    assert layers_of("fashion-2conv", 1, 28, **options) == [
        ("Conv2d", (16, 28, 28)),
        ("ReLU", (16, 28, 28)),
        (pool, (16, 14, 14)),
        ("Conv2d", (32, 14, 14)),
        ("ReLU", (32, 14, 14)),
        (pool, (32, 7, 7)),
        ("Flatten", (32 * 7 * 7,)),
        ("Linear", (10,)),
    ]
    kernels = [m.kernel_size for m in build("fashion-2conv", 1, 28, **options).modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(5, 5), (5, 5)]


def test_layers_of_folder_cnn() -> None:
    assert layers_of("folder-cnn", 3, 64) == [
        ("Conv2d", (16, 64, 64)),
        ("ReLU", (16, 64, 64)),
        ("MaxPool2d", (16, 32, 32)),
        ("Conv2d", (32, 32, 32)),
        ("ReLU", (32, 32, 32)),
        ("MaxPool2d", (32, 16, 16)),
        ("Conv2d", (64, 16, 16)),
        ("ReLU", (64, 16, 16)),
        ("MaxPool2d", (64, 8, 8)),
        ("Flatten", (4096,)),
        ("Linear", (128,)),
        ("ReLU", (128,)),
        ("Linear", (10,)),
    ]


@pytest.mark.parametrize(
    ("options", "last"), [({}, ["ReLU"]), ({"output_relu": True}, ["ReLU"]), ({"output_relu": False}, [])]
)
def test_layers_of_cifar_lenet(options: dict[str, Any], last: list[str]) -> None:
    assert layers_of("cifar-lenet", 3, 32, **options) == [
        ("Conv2d", (6, 28, 28)),
        ("ReLU", (6, 28, 28)),
        ("MaxPool2d", (6, 14, 14)),
        ("Conv2d", (16, 10, 10)),
        ("ReLU", (16, 10, 10)),
        ("MaxPool2d", (16, 5, 5)),
        ("Flatten", (400,)),
        ("Linear", (128,)),
        ("ReLU", (128,)),
        ("Linear", (84,)),
        ("ReLU", (84,)),
        ("Linear", (10,)),
        *((kind, (10,)) for kind in last),
    ]


def test_output_relu_cuts_negative_logits() -> None:
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    with_relu = build("cifar-lenet", 3, 32)
    without = build("cifar-lenet", 3, 32, output_relu=False)
    without.load_state_dict(with_relu.state_dict())
    assert (without(x) < 0).any()
    assert torch.equal(with_relu(x), without(x).clamp(min=0))


def test_layers_of_mnist_4conv() -> None:
    assert layers_of("mnist-4conv", 1, 28) == [
        ("Conv2d", (32, 26, 26)),
        ("ReLU", (32, 26, 26)),
        ("Conv2d", (64, 24, 24)),
        ("MaxPool2d", (64, 12, 12)),
        ("ReLU", (64, 12, 12)),
        ("Conv2d", (128, 10, 10)),
        ("ReLU", (128, 10, 10)),
        ("Conv2d", (256, 8, 8)),
        ("MaxPool2d", (256, 4, 4)),
        ("ReLU", (256, 4, 4)),
        ("Flatten", (4096,)),
        ("Linear", (50,)),
        ("ReLU", (50,)),
        ("Linear", (10,)),
        ("LogSoftmax", (10,)),
    ]


def test_mnist_4conv_gives_log_probabilities_and_says_so() -> None:
    net = build("mnist-4conv", 1, 28)
    output = net(torch.randn(16, 1, 28, 28))
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(16))
    assert net.log_probabilities
    assert [name for name in MODELS.names() if getattr(MODELS[name], "log_probabilities", False)] == ["mnist-4conv"]


@pytest.mark.parametrize(
    ("name", "side"), [("fashion-2conv", 28), ("folder-cnn", 28), ("cifar-lenet", 28), ("mnist-4conv", 28)]
)
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
def test_kernel_size_is_an_option_of_every_classic(name: str, side: int, kernel_size: int) -> None:
    net = build(name, 1, side, kernel_size=kernel_size)
    assert net(torch.zeros(2, 1, side, side)).shape == (2, 10)
    assert {m.kernel_size for m in net.modules() if isinstance(m, nn.Conv2d)} == {(kernel_size, kernel_size)}


def test_options_and_their_defaults() -> None:
    assert {name: model_options(name) for name in SIZES} == {
        "fashion-2conv": {"pool": "max", "kernel_size": 5},
        "folder-cnn": {"kernel_size": 3},
        "cifar-lenet": {"kernel_size": 5, "output_relu": True},
        "mnist-4conv": {"kernel_size": 3},
        "small": {"width": 32},
        "whitened": {"width": 64},
        "residual": {"width": 32},
        "tiny": {"width": 16},
    }


def test_stages_are_named_in_order() -> None:
    names = {
        "fashion-2conv": ["conv1", "pool1", "conv2", "pool2"],
        "cifar-lenet": ["conv1", "pool1", "conv2", "pool2"],
        "mnist-4conv": ["conv1", "conv2", "conv3", "conv4"],
        "small": ["stem", "conv1", "conv2", "conv3"],
        "whitened": ["stem", "group1", "group2", "group3"],
        "residual": ["stem", "group1", "group2", "group3"],
        "tiny": ["conv1", "conv2", "conv3"],
    }
    assert {name: list(build(name, 1, 28).stages()) for name in names} == names


# the summary


def test_flops_by_hand() -> None:
    rows = summarize(build("mnist-4conv", 1, 28), 1, 28, 28)
    flops = {row.name: row.flops for row in rows}
    # 24x24 outputs of 64 filters, each 32x3x3 multiply-adds of two operations
    assert flops["body.conv2.0"] == 24 * 24 * 64 * (32 * 3 * 3) * 2
    assert flops["head.1"] == 4096 * 50 * 2
    assert flops["body.conv2.1"] == flops["body.conv2.2"] == 0  # pooling and ReLU are not counted


def test_receptive_fields_of_mnist_4conv() -> None:
    rows = summarize(build("mnist-4conv", 1, 28), 1, 28, 28)
    fields = [row.receptive_field for row in rows if row.kind in ("Conv2d", "MaxPool2d")]
    # conv 3, conv 5, pool 6, then steps of two pixels: conv 10, conv 14, pool 16
    assert fields == [3, 5, 6, 10, 14, 16]
    assert [row.receptive_field for row in rows if row.name.startswith("head.")] == [None] * 5


def test_receptive_field_of_a_dilated_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 3, dilation=2), nn.Conv2d(1, 1, 3))
    assert [row.receptive_field for row in summarize(net, 1, 28, 28)] == [5, 7]


def test_summary_leaves_the_net_as_it_was() -> None:
    net = build("small", 1, 28).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    summarize(net, 1, 28, 28)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


# what is refused when a net is made


def test_unknown_model_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"^unknown model 'mnist-4cnv'; did you mean 'mnist-4conv'\?$"):
        build("mnist-4cnv", 1, 28)
    with pytest.raises(UnknownNameError, match="choose from: cifar-lenet, "):
        build("qqqqqqqq", 1, 28)


def test_unknown_option_says_what_the_net_takes() -> None:
    with pytest.raises(UsageError, match=r"^model 'fashion-2conv' has no option 'width'; it takes pool, kernel_size$"):
        build("fashion-2conv", 1, 28, width=3)
    with pytest.raises(UsageError, match=r"^unknown pooling 'median'; choose from: max, avg$"):
        build("fashion-2conv", 1, 28, pool="median")


@pytest.mark.parametrize(
    ("name", "side"),
    [("fashion-2conv", 3), ("folder-cnn", 7), ("cifar-lenet", 15), ("mnist-4conv", 15), ("whitened", 2), ("tiny", 4)],
)
def test_too_small_images(name: str, side: int) -> None:
    assert build(name, 1, side + 1).eval()(torch.zeros(1, 1, side + 1, side + 1)).shape == (1, 10)
    for height, width in ((side, side), (side, 64), (64, side)):
        with pytest.raises(UsageError, match=f"the images are too small for model '{name}'"):
            create_model(name, channels=1, image_height=height, image_width=width, classes=10)


def test_too_large_kernel() -> None:
    with pytest.raises(UsageError, match="its kernel is too large"):
        build("mnist-4conv", 1, 28, kernel_size=9)


# the contract, for nets of users


class Whole(nn.Module):
    """A net that keeps the contract, in no way derived from ConvNet: what the broken ones below start from."""

    def __init__(self, channels: int, image_height: int, image_width: int, classes: int, width: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.head: Any = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def features(self, x: Tensor) -> Any:
        return self.conv(x).relu()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))

    def stages(self) -> dict[str, nn.Module]:
        return {"conv": self.conv}


class WrongShape(Whole):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[:, :-1]


class NotFinite(Whole):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) / 0


class UnusedWeight(Whole):
    def __init__(self, channels: int, image_height: int, image_width: int, classes: int):
        super().__init__(channels, image_height, image_width, classes)
        self.idle = nn.Parameter(torch.ones(3))


class NoFeatures(Whole):
    features = property()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.conv(x))


class NoHead(Whole):
    def __init__(self, channels: int, image_height: int, image_width: int, classes: int):
        super().__init__(channels, image_height, image_width, classes)
        self.top = self.head
        del self.head

    def forward(self, x: Tensor) -> Any:
        return self.top(self.features(x))


class NoStages(Whole):
    stages = property()  # type: ignore[assignment]


class FlatFeatures(Whole):
    def __init__(self, channels: int, image_height: int, image_width: int, classes: int):
        super().__init__(channels, image_height, image_width, classes)
        self.head = nn.Linear(4, classes)

    def features(self, x: Tensor) -> Any:
        return self.conv(x).mean(dim=(2, 3))


class OtherPath(Whole):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * 2 + 1


class EmptyStages(Whole):
    def stages(self) -> dict[str, nn.Module]:
        return {}


class IdleStage(Whole):
    def stages(self) -> dict[str, nn.Module]:
        return {"conv": self.conv, "elsewhere": nn.ReLU()}


class HiddenState(Whole):
    def __init__(self, channels: int, image_height: int, image_width: int, classes: int):
        super().__init__(channels, image_height, image_width, classes)
        self.factor = torch.rand(1)  # random, and not in the state

    def features(self, x: Tensor) -> Any:
        return super().features(x) * self.factor


class RandomShape(Whole):
    built = 0

    def __init__(self, channels: int, image_height: int, image_width: int, classes: int):
        RandomShape.built += 1
        super().__init__(channels, image_height, image_width, classes, width=RandomShape.built)


class OptionNone(Whole):
    def __init__(self, channels: int, image_height: int, image_width: int, classes: int, act: object = None):
        super().__init__(channels, image_height, image_width, classes)


class OptionWithoutDefault(Whole):
    def __init__(self, channels: int, image_height: int, image_width: int, classes: int, depth: int):
        super().__init__(channels, image_height, image_width, classes)


class NoSizes(Whole):
    def __init__(self, channels: int, classes: int):
        super().__init__(channels, 28, 28, classes)


class Pair(Whole):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.features(x)


@pytest.fixture
def entered() -> Iterator[Callable[[Any], str]]:
    """Enter a constructor into the registry of models as "mine", and take it out again after the test."""

    def enter(constructor: Any) -> str:
        register("mine")(constructor)
        return "mine"

    yield enter
    MODELS._entries.pop("mine", None)


def test_a_whole_net_of_a_user_passes(entered: Callable[[Any], str]) -> None:
    check_model(entered(Whole))
    assert create_model("mine", channels=1, image_height=9, image_width=9, classes=4, width=2)(
        torch.zeros(1, 1, 9, 9)
    ).shape == (
        1,
        4,
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (WrongShape, r"model\(x\) is \(5, 6\), not \(5, 7\)"),
        (NotFinite, "logits that are NaN or infinite"),
        (UnusedWeight, "idle gets no finite gradient"),
        (NoFeatures, "it has no 'features'"),
        (NoHead, "it has no 'head'"),
        (NoStages, "it has no 'stages'"),
        (FlatFeatures, r"features\(x\) must be N x C x H x W, not 2-d"),
        (OtherPath, r"head\(features\(x\)\) differs from model\(x\)"),
        (EmptyStages, r"stages\(\) is empty"),
        (IdleStage, r"stages\(\) names \['elsewhere'\], which model\(x\) does not use"),
        (HiddenState, "a second model with the same weights gives other logits"),
        (RandomShape, "built twice"),
        (OptionNone, "option 'act' must have a plain number or string as its default"),
        (OptionWithoutDefault, "option 'depth' must have a plain number or string as its default"),
        (NoSizes, "height|width|construct"),
        (Pair, r"model\(x\)"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_check_model_names_what_is_broken(broken: type, message: str, entered: Callable[[Any], str]) -> None:
    with pytest.raises(ConvlensError, match=f"^model 'mine': .*(?:{message})"):
        check_model(entered(broken))


def test_check_model_takes_frozen_weights(entered: Callable[[Any], str]) -> None:
    class Frozen(Whole):
        def __init__(self, channels: int, image_height: int, image_width: int, classes: int):
            super().__init__(channels, image_height, image_width, classes)
            self.conv.requires_grad_(False)

    check_model(entered(Frozen))


def test_check_model_of_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'smal'; did you mean 'small'"):
        check_model("smal")


def test_a_taken_name_is_refused(entered: Callable[[Any], str]) -> None:
    small = MODELS["small"]
    with pytest.raises(UsageError, match="^model 'small' is registered already; choose another name$"):
        register("small")(Whole)
    assert MODELS["small"] is small
    entered(Whole)
    with pytest.raises(UsageError, match="'mine' is registered already"):
        register("mine")(Whole)


# the nets for speed


def test_whitened_starts_from_the_images_it_is_shown() -> None:
    """Its stem makes patches of them uncorrelated and of variance 1; each filter comes with its negative."""
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(400, 3, 3, 10, 10, generator=g)
    x = mixed[:, 0] + 0.7 * mixed[:, 1].flip(3).cumsum(3) / 3  # neighbours are alike
    x = x - x.mean()
    torch.manual_seed(0)
    net = create_model("whitened", channels=3, image_height=10, image_width=10, classes=4, width=4)
    net.initialize(x)
    stem = net.body.stem[0]
    out = nn.functional.conv2d(x, stem.weight)[:, :12].transpose(0, 1).flatten(1)  # (12, positions)
    covariance = out @ out.T / out.shape[1]
    assert torch.allclose(covariance, torch.eye(12), atol=0.05)
    assert torch.equal(stem.weight[:12], -stem.weight[12:])
    assert not stem.weight.requires_grad and stem.bias.requires_grad


def test_convolutions_of_whitened_begin_as_the_identity() -> None:
    net = create_model("whitened", channels=3, image_height=12, image_width=12, classes=4, width=8)
    x = torch.randn(2, 8, 5, 5)
    second = net.body.group1[4]
    assert isinstance(second, nn.Conv2d)
    assert torch.allclose(second(x), x, atol=1e-6)


def test_shortcuts_of_residual_carry_what_came_in() -> None:
    net = build("residual", 1, 28, width=4).eval()
    x = torch.rand(2, 4, 9, 9)
    for block, same in ((net.body.group1, True), (net.body.group2[0], False)):
        nn.init.zeros_(block.branch[-1].weight)  # BatchNorm's factor: nothing is added
        assert torch.equal(block(x), x if same else block.shortcut(x).relu())
    assert net.body.group2[0](x).shape == (2, 8, 5, 5)
    assert [(row.kind, row.output_shape) for row in summarize(net, 1, 28, 28) if row.kind == "Conv2d"] == [
        ("Conv2d", shape)
        for shape in ((4, 28, 28),) * 3 + ((8, 14, 14),) * 5 + ((16, 7, 7),) * 5  # two of them 1x1, of the shortcuts
    ]


def test_most_nets_take_nothing_from_the_images() -> None:
    net = create_model("small", channels=1, image_height=12, image_width=12, classes=4)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.initialize(torch.randn(9, 1, 12, 12))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_layers_of_tiny() -> None:
    net = create_model("tiny", channels=1, image_height=28, image_width=28, classes=10)
    shapes = [(layer.kind, layer.output_shape) for layer in summarize(net, 1, 28, 28) if layer.kind == "Conv2d"]
    assert [shape for _, shape in shapes] == [(16, 12, 12), (32, 6, 6), (64, 3, 3)]
