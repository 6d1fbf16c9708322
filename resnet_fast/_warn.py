"""Warnings and errors in the terms of whoever called this package."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """Warn at the line that called this package, through whichever of its functions that was."""
    package = __name__.partition(".")[0]
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def reworded(error: Exception, old: str, new: str, argument: str, renamed: str) -> Exception:
    """Return an error of the function ``old`` as one of ``new``, in which ``argument`` has the name ``renamed``.

    What does not begin with the function's name is somebody else's, such as of the caller's own iterable, and returned
    as it is.
    """
    said = str(error)
    if type(error) not in (TypeError, ValueError) or not said.startswith(f"{old}: "):
        return error
    return type(error)(new + said.removeprefix(old).replace(argument, renamed))
