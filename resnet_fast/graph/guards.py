"""What a captured graph assumes about sizes, asked again at each run, and what it computes from them.

Expressions are Python source over the names ``s0``, ``s1`` ..., as printed by torch's printer for symbolic sizes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch

_NAMES = {"__builtins__": {"abs": abs, "max": max, "min": min, "round": round}, "math": math, "torch": torch}


class Refused(Exception):
    """The module cannot be written down as a graph; the message says why, in one line."""


class OutsideGuards(Exception):
    """Sizes for which the author's code might take another way than the one that was captured."""


@functools.lru_cache(maxsize=1024)
def _function(source: str, count: int) -> Callable[..., Any]:
    names = ", ".join(f"s{index}" for index in range(count))
    function: Callable[..., Any] = eval(f"lambda {names}: {source}", dict(_NAMES))
    return function


def numbered(source: str, names: list[str]) -> str:
    """Return ``source`` with the given names as s0, s1 ... in their order."""
    found = {name: f"s{index}" for index, name in enumerate(names)}
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda match: found.get(match[0], match[0]), source)


def _traced(function: Callable[..., Any], *args: Any) -> Any:
    """Return a proxy for the call if torch.fx traces a graph, as it does to load one, else None."""
    proxy = next((arg for arg in args if isinstance(arg, torch.fx.Proxy)), None)
    return None if proxy is None else proxy.tracer.create_proxy("call_function", function, args, {})


def compute(source: str, *sizes: int) -> Any:
    """Return the value of an expression of sizes."""
    traced = _traced(compute, source, *sizes)
    if traced is not None:
        return traced
    return _function(source, len(sizes))(*sizes)


def expect(source: str, *sizes: int) -> None:
    """Do nothing if the expression holds.

    Raises:
        OutsideGuards: it does not.
    """
    if _traced(expect, source, *sizes) is None and not _function(source, len(sizes))(*sizes):
        raise OutsideGuards(f"{source} does not hold of their sizes")


def expect_length(values: Any, length: int) -> Any:
    """Return ``values``.

    Raises:
        OutsideGuards: there are more or fewer than ``length``.
    """
    traced = _traced(expect_length, values, length)
    if traced is not None:
        return traced
    if len(values) != length:
        raise OutsideGuards(f"there are not {length} of them")
    return values
