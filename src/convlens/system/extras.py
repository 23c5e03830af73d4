"""Errors for optional dependencies."""

from __future__ import annotations

from convlens.errors import UsageError


def missing_extra(reason: str, extra: str) -> UsageError:
    """Return the error for a feature whose packages are not installed.

    Args:
        reason: What is missing, such as "timm is not installed".
        extra: The extra of convlens that installs the packages.
    """
    return UsageError(f"{reason}: pip install 'convlens[{extra}]'")
