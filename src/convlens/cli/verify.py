"""``convlens verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    file: Annotated[Path, typer.Argument(help="An ONNX file written by `convlens export`.")],
) -> None:
    """Check on this machine that an exported file gives the model's probabilities; exit code 1 if it does not.

    Examples:
      convlens verify mnist-1.onnx
    """
    from convlens.inference.onnx_runtime import OnnxPredictor

    predictor = OnnxPredictor.load(file)
    reference = "this file when it was written" if predictor.is_quantized else "the model in PyTorch"
    print(f"passed  probabilities differ by at most {predictor.verify():.1g} from those of {reference}")
