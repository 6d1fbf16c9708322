"""Measured choices of the CPU engine: which algorithm computes a 3x3 convolution, from the user's table.

A table (``resnet_fast.kernels._tables``) belongs to one kind of processor, whose name the file has and says. It is read
when the first layer is packed. A choice is for one instruction set, dtype, number of threads, layer and image size,
never for a batch: an image gives the same bits alone and in any batch.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resnet_fast.kernels import _tables

OP = "convolution"  # in the tables
ALGORITHMS = ("direct", "winograd2", "winograd4")

Choice = tuple[int, int, str]
"""Height and width of the images, and the algorithm."""


class Layer(NamedTuple):
    """What a choice is for, but for the image size: ``padding`` of a 3x3 window of stride 1, without groups."""

    isa: str
    dtype: str
    threads: int
    c: int
    k: int
    padding: tuple[int, int]

    def key(self, h: int, w: int) -> str:
        """Return the problem as tables name it."""
        settings = f"{self.isa} {self.dtype} threads{self.threads}"
        return f"{settings} {h}x{w} c{self.c} k{self.k} p{self.padding[0]}x{self.padding[1]}"


_KEY = r"(\w+) (\w+) threads(\d{1,4}) (\d{1,7})x(\d{1,7}) c(\d{1,9}) k(\d{1,9}) p(\d{1,7})x(\d{1,7})"


class Table(NamedTuple):
    """A table as it was read: its file, why there is none or it is not used ("" if it is), and what it says."""

    path: Path | None = None
    reason: str = ""
    choices: Mapping[Layer, Sequence[Choice]] = {}


def machine(processor: str, l2: int, l3: int) -> str:
    """Return how the tables of machines like one are called.

    Args:
        processor: what it calls itself, which on a virtual machine may be as little as "AMD EPYC".
        l2: bytes of its caches, as is l3.
    """
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*$", " ", processor.lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"
    return f"cpu-{name}-{l2 >> 10}k-{l3 >> 10}k"


def read(path: Path, of: str) -> dict[str, dict[str, Any]]:
    """Return the choices in a table, ``problem -> fields``.

    Args:
        of: the machine whose table it must be.

    Raises:
        ValueError: the file is no such table. OSError: it cannot be read.
    """
    found = _tables.read(path, cpu=of).get(OP, {})
    for key, fields in found.items():
        if not re.fullmatch(_KEY, key) or fields.get("algorithm") not in ALGORITHMS:
            raise ValueError(f"{path}: {key!r} is no convolution with an algorithm of {', '.join(ALGORITHMS)}")
    return found


@functools.cache
def _load(of: str) -> Table:
    try:
        folder = _tables.user_folder()
        path = folder / f"{of}.json"
        if not path.is_file():
            others = sorted(each.stem for each in folder.glob("cpu-*.json"))
            what = f"; there is one of {', '.join(others)}" if others else ""
            return Table(None, f"there is no table of {of} in {folder}{what}")
        table = read(path, of)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no home folder
        if not isinstance(error, RuntimeError):
            warnings.warn(f"measured choices are not used: {error}", stacklevel=4)
        return Table(None, str(error))
    choices: dict[Layer, list[Choice]] = {}
    for key, fields in table.items():
        match = re.fullmatch(_KEY, key)
        assert match is not None
        isa, dtype, *numbers = match.groups()
        threads, h, w, c, k, *padding = map(int, numbers)
        layer = Layer(isa, dtype, threads, c, k, (padding[0], padding[1]))
        choices.setdefault(layer, []).append((h, w, fields["algorithm"]))
    return Table(path, "", choices)


_tables.remembers(_load)


def choices(layer: Layer, of: str) -> Sequence[Choice]:
    """Return what the table of the machine ``of`` says of a layer, () if nothing."""
    return _load(of).choices.get(layer, ())


def described(isa: str, threads: int, of: str) -> tuple[str, str]:
    """Return the file whose choices are used with this instruction set and number of threads, or "" and why none is."""
    table = _load(of)
    if table.path is None:
        return "", table.reason
    measured = sorted({(layer.isa, layer.threads) for layer in table.choices})
    if (isa, threads) in measured:
        return str(table.path), ""
    have = ", ".join(f"{_threads(count)} of {name}" for name, count in measured) or "nothing"
    return "", f"{table.path} has choices for {have}, not for {_threads(threads)} of {isa}"


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"
