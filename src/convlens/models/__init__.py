"""The nets: the five classics, the strong defaults, their registry and the contract they keep."""

from convlens.models import classic, compact, timm  # noqa: F401 - entering their nets into the registry
from convlens.models.base import MODELS, ConvNet, check_model, create_model, model_options
from convlens.models.summary import LayerSummary, count_parameters, summarize

register = MODELS.register
"""``@register("mine")`` above a class enters it into :data:`convlens.models.MODELS`; UsageError if it is taken."""

__all__ = [
    "MODELS",
    "ConvNet",
    "LayerSummary",
    "check_model",
    "count_parameters",
    "create_model",
    "model_options",
    "register",
    "summarize",
]
