"""``convlens verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.app import app


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A file that `convlens export` wrote.")],
) -> None:
    """Prove once more, on this machine, that an exported file answers as the net did: exit code 1 if it does not.

    Examples:
      convlens verify mnist-1.onnx
    """
    from convlens.inference.onnx_runtime import OnnxPredictor

    predictor = OnnxPredictor.load(file)
    whose = "this file gave when it was made" if predictor.is_quantized else "the net gives in PyTorch"
    print(f"proved  no probability is off by more than {predictor.verify():.1g} from what {whose}")
