"""What a training starts from: --init-from and --pretrained, and frozen stages. With models of our own."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convlens
from convlens.cli.main import main
from convlens.distributed.sync_batchnorm import SyncBatchNorm
from convlens.errors import ConvlensError, UsageError
from convlens.models import MODELS, ConvNet, create_model
from convlens.runs.config import InitFrom
from convlens.runs.experiment import Experiment
from convlens.runs.request import TrainRequest
from convlens.runs.run import Run
from convlens.training.loop import fit
from convlens.training.pretrained import PretrainedWeights, load_matching_weights
from convlens.training.recipe import Recipe

QUICK: dict[str, Any] = {"threads": 1, "device": "cpu", "precision": "fp32"}
TRAINED: dict[str, Any] = {"epochs": 1, "batch_size": 16, "val_fraction": 0.25, **QUICK}
SMALL: dict[str, Any] = {"width": 4, **TRAINED}
MISSING = "^timm is not installed: pip install 'convlens\\[backbones\\]'$"


def make_photos(root: Path, side: int = 12, mode: str = "RGB", classes: str = "ab") -> Path:
    """Make a folder of ten bright or dark images a class."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for image in range(10):
            pixels = generator.integers(0, 100, (side, side, 3), dtype=np.uint8) + 80 * number
            Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(root / name / f"{image}.png")
    return root


@pytest.fixture
def trained(tmp_path: Path, no_plots: None) -> Run:
    return convlens.train(make_photos(tmp_path / "first"), out=tmp_path / "trained", **SMALL)


def weights_of(run: Run) -> Path:
    return run.path / "model" / "model.safetensors"


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


# --pretrained FILE


def test_weights_of_a_bundle_start_another_net(trained: Run, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", side=20, classes="abc")
    experiment = Experiment.start(
        TrainRequest.create(photos, pretrained=str(weights_of(trained)), out=tmp_path / "run", **SMALL)
    )
    weights, fresh = load_file(weights_of(trained)), experiment.model.state_dict()
    stages = [key for key in weights if not key.startswith("head.")]
    assert all(torch.equal(fresh[key], weights[key]) for key in stages)
    assert fresh["head.2.weight"].shape[0] == 3
    assert experiment.config.init_from == InitFrom(str(weights_of(trained)), f"{len(stages)} of {len(fresh)}")
    # as those weights had them: the size of the images, their mean and spread
    assert experiment.recipe.image_size == 12 and experiment.dataset.shape == (3, 12, 12)
    first = trained.classifier.preprocess
    assert (experiment.preprocess.mean, experiment.preprocess.std) == (first.mean, first.std)


def test_the_size_of_the_images_can_be_another(trained: Run, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", side=20)
    experiment = Experiment.start(
        TrainRequest.create(photos, pretrained=str(weights_of(trained)), image_size=15, out="run", **SMALL)
    )
    assert experiment.recipe.image_size == 15 and experiment.dataset.shape == (3, 15, 15)


def test_grey_photos_get_the_channels_of_the_weights(trained: Run, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "grey", mode="L")
    assert convlens.load_dataset(photos).shape[0] == 1
    experiment = Experiment.start(TrainRequest.create(photos, pretrained=str(weights_of(trained)), out="run", **SMALL))
    assert experiment.dataset.shape[0] == 3


def test_the_class_that_has_a_head_already_gets_a_fresh_one(trained: Run, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    experiment = Experiment.start(
        TrainRequest.create(photos, pretrained=str(weights_of(trained)), seed=1, out="run", **SMALL)
    )
    assert not torch.equal(
        experiment.model.state_dict()["head.2.weight"], load_file(weights_of(trained))["head.2.weight"]
    )


@pytest.mark.usefixtures("no_plots")
def test_neither_a_resumed_run_nor_a_bundle_needs_the_file_again(trained: Run, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights_of(trained).read_bytes())
    rules = {**SMALL, "epochs": 3, "pretrained": str(weights)}
    whole = convlens.train(photos, out=tmp_path / "whole", **rules)
    epochs = Experiment.start(TrainRequest.create(photos, out=tmp_path / "grad_accum_steps", **rules)).epochs()
    next(epochs)
    epochs.close()
    weights.unlink()
    experiment = Experiment.resume(tmp_path / "grad_accum_steps")
    for _ in experiment.epochs():
        pass
    assert experiment.finish().test == whole.test
    # a bundle travels: it names the file, and not where it lay
    bundle = json.loads((tmp_path / "grad_accum_steps" / "model" / "config.json").read_text())
    assert bundle["training"]["recipe"]["pretrained"] == "weights.safetensors"
    assert str(tmp_path) not in json.dumps(bundle)


@pytest.mark.usefixtures("no_plots")
def test_seeds_start_from_the_same_weights(trained: Run, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", side=20)
    summary = convlens.train_seeds(photos, 2, out="both", pretrained=str(weights_of(trained)), **SMALL)
    runs = [Run(Path("both") / name) for name in summary.runs]
    assert [run.config["init_from"]["source"] for run in runs] == [str(weights_of(trained))] * 2
    assert [run.config["recipe"]["image_size"] for run in runs] == [12, 12]


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"pretrained": "nowhere.safetensors"}, "^`pretrained`: there is no file nowhere.safetensors$"),
        ({"pretrained": "."}, "^`pretrained` takes a .safetensors file; for the run or model . there is `init_from`$"),
        ({"pretrained": "torn.safetensors"}, "^`pretrained`: torn.safetensors is not a complete .safetensors file: "),
        ({"pretrained": "timm"}, "^`pretrained` timm needs a model of timm, such as timm:resnet18$"),
        (
            {"pretrained": "other.safetensors"},
            "^`pretrained`: no weight in .*other.safetensors fits a model SmallNet here$",
        ),
        ({"freeze": 1}, "^`freeze` keeps trained stages fixed; name their weights with `pretrained` or `init_from`$"),
        ({"model": "timm:resnet18", "width": None}, MISSING),
    ],
)
def test_what_cannot_be_started_from(
    rules: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    Path("torn.safetensors").write_bytes(b"\x08\x00\x00")
    save_file({"something": torch.zeros(3, 3)}, "other.safetensors")
    with pytest.raises(ConvlensError, match=says):
        Experiment.start(TrainRequest.create(make_photos(tmp_path / "photos"), out="run", **{**SMALL, **rules}))
    assert not Path("run").exists()


def test_init_and_pretrained_are_two_answers(trained: Run) -> None:
    with pytest.raises(UsageError, match="^give `init_from` or `pretrained`, not both"):
        Experiment.start(
            TrainRequest.create("digits", init_from=trained.path, pretrained=str(weights_of(trained)), **QUICK)
        )


def test_a_damaged_note_beside_the_weights_is_named(trained: Run, tmp_path: Path) -> None:
    save_file(load_file(weights_of(trained)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5]}}')
    with pytest.raises(ConvlensError, match="config.json, next to the weights, is damaged: KeyError"):
        Experiment.start(
            TrainRequest.create(
                make_photos(tmp_path / "photos"), pretrained=str(tmp_path / "model.safetensors"), out="run", **SMALL
            )
        )


# --init-from


def test_init_takes_mean_and_spread_too(trained: Run, tmp_path: Path) -> None:
    dark = make_photos(tmp_path / "dark", classes="bcd")
    experiment = Experiment.start(TrainRequest.create(dark, init_from=trained.path, out="run", **TRAINED))
    assert experiment.preprocess.mean == trained.classifier.preprocess.mean


# --freeze


@pytest.mark.usefixtures("no_plots")
def test_frozen_stages_stay_as_they_were_trained(trained: Run, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", classes="bcd")
    run = convlens.train(photos, init_from=trained.path, freeze=2, ema_decay=0.5, out="run", **TRAINED)
    before, after = tensors_of(trained.classifier.model), tensors_of(run.classifier.model)
    kept = [key for key in before if key.startswith(("body.stem.", "body.conv1."))]
    assert "body.conv1.2.running_mean" in kept or "body.conv1.1.running_mean" in kept  # BatchNorm's statistics too
    assert all(torch.equal(before[key], after[key]) for key in kept)
    learned = [key for key in before if key.startswith(("body.conv2.", "body.conv3."))]
    assert all(not torch.equal(before[key], after[key]) for key in learned)


def test_the_loop_of_ones_own_freezes_too() -> None:
    net = create_model("small", channels=1, image_height=8, image_width=8, classes=10, width=4)
    before = tensors_of(net)
    list(fit(net, convlens.load_dataset("digits"), Recipe(freeze=4, max_steps=2, lr=0.1, **QUICK)))
    changed = [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["head.2.weight", "head.2.bias"]


def test_more_frozen_stages_than_there_are() -> None:
    net = create_model("small", channels=1, image_height=8, image_width=8, classes=10, width=4)
    with pytest.raises(UsageError, match="^`freeze` 5: the model has 4 stages, stem, conv1, conv2, conv3$"):
        list(fit(net, convlens.load_dataset("digits"), Recipe(freeze=5, max_steps=1, **QUICK)))


def test_only_a_convnet_can_be_frozen() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(UsageError, match="^`freeze` needs a convlens.models.ConvNet, and the model small is not one"):
        list(fit(net, convlens.load_dataset("digits"), Recipe(freeze=1, max_steps=1, **QUICK)))


def test_what_is_frozen_must_have_been_trained() -> None:
    net = create_model("small", channels=3, image_height=8, image_width=8, classes=4, width=4)
    assert isinstance(net, ConvNet)
    weights = {key: value + 1 for key, value in tensors_of(net).items() if "stem.0" not in key}
    start = PretrainedWeights("pretrained", "some.safetensors", weights)
    with pytest.raises(
        UsageError, match="^`freeze` 2: 1 of the frozen tensors .* some.safetensors, such as body.stem.0.weight$"
    ):
        load_matching_weights(net, start, freeze=2)
    load_matching_weights(net, start)
    assert torch.equal(net.state_dict()["body.conv1.0.weight"], weights["body.conv1.0.weight"])


def test_a_batchnorm_of_its_own_kind_is_not_measured_together() -> None:
    class WithReLU(nn.BatchNorm2d):  # as timm has them
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    with pytest.raises(UsageError, match="^`sync_batchnorm` does not support WithReLU"):
        SyncBatchNorm(nn.Sequential(WithReLU(3)))


# the extra


def test_without_timm_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm:resnet18" in MODELS and "timm:resnet18" not in MODELS.names()
    with pytest.raises(UsageError, match=MISSING):
        create_model("timm:resnet18", channels=3, image_height=64, image_width=64, classes=2)
    monkeypatch.setattr("sys.argv", ["convlens", "models"])
    with pytest.raises(SystemExit):
        main()
    assert "timm:NAME" in capsys.readouterr().out  # the list needs no timm
