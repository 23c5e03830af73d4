"""Errors for optional dependencies."""

from __future__ import annotations

from convlens.errors import UsageError


def missing_extra(feature: str, extra: str) -> UsageError:
    """Return the error for a feature whose packages are not installed.

    Args:
        feature: What the user asked for, such as "ONNX export".
        extra: The extra of convlens that installs the packages.
    """
    return UsageError(f"{feature} needs the extra `{extra}`: pip install 'convlens[{extra}]'")
