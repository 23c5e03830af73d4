"""Model architectures: the five classics, our own and timm's, their registry and their contract."""

from convlens.models import classic, compact, timm  # noqa: F401 - they register their models
from convlens.models.base import MODELS, ConvNet, check_model, create_model, model_options
from convlens.models.summary import LayerSummary, count_parameters, summarize

register = MODELS.register
"""``@register("mine")`` above a class adds it to :data:`convlens.models.MODELS`; UsageError if the name is taken."""

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
