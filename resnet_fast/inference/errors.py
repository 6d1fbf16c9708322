"""The errors of this package, for every module of it."""

from __future__ import annotations


class ClassifierError(ValueError):
    """Raised if a network, its weights or its labels cannot be used; one line that says what would be right."""
