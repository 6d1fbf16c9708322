"""Warnings and errors in the terms of whoever called this package."""

from __future__ import annotations

import sys
import warnings


def warn(message: str, *functions: str) -> None:
    """Warn at the line that called this package, through whichever of its functions that was.

    Args:
        functions: which of the package's the message may be of: it begins with the outermost that is running, or the
            first one.
    """
    package = __name__.partition(".")[0]
    level, frame, called = 2, sys._getframe(1), functions[0]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        if frame.f_code.co_name in functions:
            called = frame.f_code.co_name
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{called}: {message}", stacklevel=level)


def reworded(error: Exception, old: str, new: str, argument: str, renamed: str) -> Exception:
    """Return an error of the function ``old`` as one of ``new``, in which ``argument`` has the name ``renamed``.

    What does not begin with the function's name is somebody else's, such as of the caller's own iterable, and returned
    as it is.
    """
    said = str(error)
    if type(error) not in (TypeError, ValueError) or not said.startswith(f"{old}: "):
        return error
    return type(error)(new + said.removeprefix(old).replace(argument, renamed))
