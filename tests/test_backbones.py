"""Nets of timm: the contract, their stages, weights with timm's names, and all that follows a training.

They need timm, which the environment of the other tests has not: docs/how-to/fine-tuning.md says how to install it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("timm", reason="timm is not installed")

import timm

import convlens
from convlens.errors import ConvlensError, UnknownNameError, UsageError
from convlens.export.onnx import build_onnx, write_onnx
from convlens.models import ConvNet, check_model, create_model
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest
from convlens.runs.run import Run

QUICK: dict[str, Any] = {"threads": 1, "device": "cpu", "precision": "fp32", "epochs": 1, "batch_size": 8}
# one of each way to be built: norm and activation in one, depthwise, a conv in the head, no BatchNorm, dense, a tree
NETS = ("resnet10t", "mobilenetv3_small_050", "regnetx_002", "convnext_atto", "densenet121", "dla34")


def make_photos(root: Path, side: int = 48, mode: str = "RGB", classes: str = "ab") -> Path:
    """Make a folder of twelve images a class, each class with a brightness of its own."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for image in range(12):
            pixels = generator.integers(0, 80, (side, side, 3)) + 60 * number
            Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(root / name / f"{image}.png")
    return root


def build(name: str, classes: int = 3, side: int = 64, channels: int = 3) -> ConvNet:
    net = create_model(f"timm:{name}", channels=channels, image_height=side, image_width=side, classes=classes)
    assert isinstance(net, ConvNet)
    return net


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of a net of timm's with five classes, under timm's names."""
    torch.manual_seed(7)
    path = tmp_path / "resnet10t.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=5).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("photos")
    yield convlens.train(
        make_photos(folder / "photos"), model="timm:resnet10t", image_size=48, out=folder / "run", **QUICK
    )


@pytest.mark.parametrize("name", NETS)
def test_the_contract(name: str) -> None:
    check_model(f"timm:{name}", channels=3, image_height=64, image_width=64, classes=3)


def test_grey_images() -> None:
    check_model("timm:resnet10t", channels=1, image_height=32, image_width=32)


@pytest.mark.parametrize("name", NETS)
def test_a_frozen_stage_gives_what_it_gave(name: str) -> None:
    """However a net is built: what comes out of the frozen stages is the same after training, and the next is not."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 64, 64)

    def outputs(net: ConvNet) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        hooks = [
            stage.register_forward_hook(lambda *all, n=n: seen.__setitem__(n, all[-1].clone()))
            for n, stage in net.stages().items()
        ]
        net.eval()(x)
        for hook in hooks:
            hook.remove()
        return seen

    net = build(name)
    stages = list(net.stages())
    assert len(stages) >= 3
    with torch.no_grad():
        before = outputs(net)
    net.freeze(2)
    net.train()
    for _ in range(2):
        net(x).square().sum().backward()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad.sign()
                    parameter.grad = None
    with torch.no_grad():
        after = outputs(net)
    same = [stage for stage in stages if torch.equal(before[stage], after[stage])]
    assert same == stages[:2]


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="^unknown timm model 'resnet1O'; did you mean 'resnet"):
        build("resnet1O")
    assert build("resnet18.a1_in1k").stages().keys() == build("resnet18").stages().keys()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_nets_without_maps_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"^the model timm:{name} has no feature maps; choose a convolutional one$"):
        build(name, side=224)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(UsageError, match="^the model timm:vgg11 does not accept images of 8 x 8 pixels: "):
        build("vgg11", side=8)


# weights


def test_weights_with_the_names_of_timm(weights: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "grey", mode="L")
    rules = {**QUICK, "model": "timm:resnet10t", "image_size": 48}
    experiment = Experiment.start(TrainRequest.create(photos, pretrained=str(weights), out="run", **rules))
    assert experiment.dataset.shape == (3, 48, 48)  # as timm's nets take them
    cfg = timm.get_pretrained_cfg("resnet10t")
    assert (experiment.preprocess.mean, experiment.preprocess.std) == (cfg.mean, cfg.std)
    own = experiment.model.state_dict()
    assert experiment.config.init_from.num_tensors == f"{len(own) - 2} of {len(own)}"  # all but the head
    again = Experiment.start(TrainRequest.create(photos, out="plain", **rules))
    assert again.preprocess.mean != cfg.mean


def test_the_size_and_what_is_beside_the_file(weights: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    rules = {**QUICK, "model": "timm:resnet10t", "pretrained": str(weights)}
    assert Experiment.start(TrainRequest.create(photos, out="usual", **rules)).dataset.shape == (3, 176, 176)
    told = {"pretrained_cfg": {"input_size": [3, 40, 40], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}}
    weights.with_name("config.json").write_text(json.dumps(told))
    experiment = Experiment.start(TrainRequest.create(photos, out="told", **rules))
    assert experiment.dataset.shape == (3, 40, 40) and experiment.preprocess.mean == (0.5, 0.5, 0.5)


def test_half_precision_weights_become_floats(weights: Path, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in timm.create_model("resnet10t").state_dict().items()}
    save_file(half, weights)
    photos = make_photos(tmp_path / "photos")
    experiment = Experiment.start(
        TrainRequest.create(photos, model="timm:resnet10t", pretrained=str(weights), image_size=32, out="run", **QUICK)
    )
    assert {parameter.dtype for parameter in experiment.model.parameters()} == {torch.float32}


def test_weights_of_another_net_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="^--pretrained: no weight in .* fits a net Backbone here$"):
        Experiment.start(TrainRequest.create(
            make_photos(tmp_path / "photos"), model="timm:mobilenetv3_small_050", pretrained=str(weights),
            image_size=32, out="run", **QUICK,
        ))  # fmt: skip


def test_timms_own_weights_come_as_safetensors(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str]] = []

    def download(place: str, file: str) -> str:
        asked.append((place, file))
        return str(weights)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    rules = {**QUICK, "model": "timm:resnet10t", "pretrained": "timm", "image_size": 32}
    experiment = Experiment.start(TrainRequest.create(make_photos(tmp_path / "photos"), out="run", **rules))
    assert asked == [("timm/resnet10t.c3_in1k", "model.safetensors")]
    assert experiment.config.init_from.source == "timm" and experiment.recipe.pretrained == "timm"

    def fail(*_: object) -> str:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        ConvlensError, match="^the weights of timm:resnet10t cannot be downloaded .*: no route to host; "
    ):
        Experiment.start(TrainRequest.create(tmp_path / "photos", out="again", **rules))


def test_nets_that_timm_has_no_weights_of(tmp_path: Path) -> None:
    name = next(n for n in timm.list_models("resnet*") if not timm.get_pretrained_cfg(n).hf_hub_id)
    with pytest.raises(UsageError, match=f"^timm has no weights of timm:{name}; "):
        Experiment.start(
            TrainRequest.create(
                make_photos(tmp_path / "photos"), model=f"timm:{name}", pretrained="timm", out="run", **QUICK
            )
        )


# what follows a training


def test_a_bundle_is_rebuilt_without_asking_anybody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("a download"))
    said = convlens.Classifier.load(run.path).predict(np.zeros((48, 48, 3), np.uint8))
    assert said.label in ("a", "b")


@pytest.mark.usefixtures("no_plots")
def test_a_run_is_a_start_for_another(run: Run, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", classes="abc")
    again = convlens.train(photos, init_from=run.path, freeze=3, image_size=48, out="again", **QUICK)
    assert again.config["model"]["name"] == "timm:resnet10t"
    before, after = run.classifier.net.state_dict(), again.classifier.net.state_dict()
    assert torch.equal(before["model.layer2.0.bn1.running_mean"], after["model.layer2.0.bn1.running_mean"])
    assert not torch.equal(before["model.layer3.0.conv1.weight"], after["model.layer3.0.conv1.weight"])


def test_it_is_explained(run: Run) -> None:
    seen = run.explain(np.full((48, 48, 3), 90, np.uint8))
    assert list(seen.feature_maps) == list(seen.cams) == ["act1", "layer1", "layer2", "layer3", "layer4"]


def test_it_goes_to_onnx_and_answers_alike(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    assert write_onnx(build_onnx(run.path / "model"), tmp_path / "net.onnx") < 1e-3


def test_the_report_is_there(run: Run) -> None:
    assert run.report.is_file() and (run.path / "plots" / "filters.png").is_file()


def test_nn_modules_hold_no_head_twice(run: Run) -> None:
    net: nn.Module = run.classifier.net
    assert all(key.startswith("model.") for key in net.state_dict())
