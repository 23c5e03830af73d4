"""``convlens models``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convlens.cli.output import first_line, print_table


def models(
    name: Annotated[str | None, typer.Argument(help="Architecture or trained model to show.")] = None,
    channels: Annotated[int, typer.Option(min=0, help="Channels of the images; 0: the model's default.")] = 0,
    size: Annotated[int, typer.Option(min=0, help="Side of the images in pixels; 0: the model's default.")] = 0,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
) -> None:
    """List architectures and trained models, show an architecture layer by layer, or print a model card.

    Examples:
      convlens models

      convlens models mnist-4conv

      convlens models small --size 64 --channels 3
    """
    from convlens.inference.store import bundled_models
    from convlens.models import MODELS

    trained = bundled_models()
    if name is None:
        list_models(trained)
    elif name not in MODELS and name in trained:
        card = (trained[name] / "README.md").read_text(encoding="utf-8")
        print(card.split("---\n\n", 1)[1])  # without the metadata for programs
    else:
        print_layers(name, channels, size, classes)


def list_models(trained: dict[str, Path]) -> None:
    """Print the architectures and the trained models."""
    from convlens.models import MODELS
    from convlens.system.files import read_json

    print("architectures")
    rows: list[Any] = [(model, first_line(MODELS[model])) for model in MODELS.names()]
    rows += [(f"{prefix}NAME", first_line(find)) for prefix, find in MODELS.families.items()]
    print_table(rows, head=False)
    print("trained models (convlens predict NAME IMAGE)")
    trained_rows: list[Any] = []
    for model, path in trained.items():
        about = read_json(path / "config.json")["training"]
        trained_rows.append((model, f"{about['test']['accuracy']:.2%} on {about['data']['name']}'s test split"))
    print_table(trained_rows, head=False)


def print_layers(name: str, channels: int, side: int, classes: int) -> None:
    """Print an architecture layer by layer, for square images; 0 channels or pixels: its default."""
    from convlens.models import MODELS, create_model, summarize

    default = getattr(MODELS[name], "default_input_shape", (1, 28, 28))
    channels, side = channels or default[0], side or default[1]
    model = create_model(name, channels=channels, image_height=side, image_width=side, classes=classes)
    layers = summarize(model, channels, side, side)
    rows = [("layer", "kind", "output", "parameters", "MFLOPs", "receptive field")]
    for layer in layers:
        field = "all" if layer.receptive_field is None else f"{layer.receptive_field}x{layer.receptive_field}"
        if not getattr(model, "is_chain", True):  # the formula holds for chains of layers only
            field = "-"
        flops = f"{layer.flops / 1e6:.2f}" if layer.flops else "-"
        parameters = f"{layer.parameters:,}" if layer.parameters else "-"
        rows.append((layer.name, layer.kind, "x".join(map(str, layer.output_shape)), parameters, flops, field))
    print(f"{name} on {channels}x{side}x{side} images, {classes} classes: {first_line(type(model))}")
    print_table(rows)
    total = sum(layer.parameters for layer in layers)
    print(f"{total:,} parameters, {sum(layer.flops for layer in layers) / 1e6:.1f} MFLOPs forward per image")
