"""``convlens models``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from convlens.cli.app import app
from convlens.cli.output import first_line, print_table


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="This net layer by layer, or this model's card.")] = None,
    channels: Annotated[int, typer.Option(min=0, help="Channels of the image; 0: the net's usual.")] = 0,
    size: Annotated[int, typer.Option(min=0, help="Side of the image in pixels; 0: the net's usual.")] = 0,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
) -> None:
    """List the nets and the trained models, or show one net layer by layer.

    Examples:
      convlens models

      convlens models mnist-4conv

      convlens models small --size 64 --channels 3
    """
    from convlens.inference.store import bundled_models
    from convlens.models import MODELS, create_model, summarize

    if name is None:
        print("nets")
        rows: list[Any] = [(net, first_line(MODELS[net])) for net in MODELS.names()]
        rows += [(f"{prefix}NAME", first_line(find)) for prefix, find in MODELS.families.items()]
        print_table(rows, head=False)
        print("trained models (convlens predict NAME IMAGE)")
        from convlens.system.files import read_json

        trained_rows: list[Any] = []
        for model, path in bundled_models().items():
            trained = read_json(path / "config.json")["trained"]
            trained_rows.append((model, f"{trained['test']['accuracy']:.2%} on {trained['data']['name']}'s test split"))
        print_table(trained_rows, head=False)
        return
    if name not in MODELS and name in bundled_models():
        card = (bundled_models()[name] / "README.md").read_text(encoding="utf-8")
        print(card.split("---\n\n", 1)[1])  # without what is for machines
        return
    usual = getattr(MODELS[name], "default_input_shape", (1, 28, 28))
    channels, side = channels or usual[0], size or usual[1]
    net = create_model(name, channels=channels, image_height=side, image_width=side, classes=classes)
    layers = summarize(net, channels, side, side)
    rows = [("layer", "kind", "output", "parameters", "MFLOPs", "sees")]
    for layer in layers:
        shape = "x".join(map(str, layer.output_shape))
        field = "all" if layer.receptive_field is None else f"{layer.receptive_field}x{layer.receptive_field}"
        if not getattr(net, "is_chain", True):  # the formula knows no other ways through a net
            field = "-"
        flops = f"{layer.flops / 1e6:.2f}" if layer.flops else "-"
        rows.append(
            (
                layer.name,
                layer.kind,
                shape,
                f"{layer.parameters:,}" if layer.parameters else "-",
                flops,
                field,
            )
        )
    print(f"{name} on {channels}x{side}x{side} images, {classes} classes: {first_line(type(net))}")
    print_table(rows)
    total = sum(layer.parameters for layer in layers)
    print(f"{total:,} parameters, {sum(layer.flops for layer in layers) / 1e6:.1f} MFLOPs forward an image")
