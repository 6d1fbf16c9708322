"""What a kernel's cases look like, and how a case is run: under a seed, held to the error rule and to the same bits.

No processes here (worker.py) and no compiling (build.py).
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.numerics import assert_obeys_error_rule


@dataclass(frozen=True)
class Case:
    """A small problem of one op.

    ``run(native)`` launches the op through the emulated ``_C`` and yields, for every result, its name, ours, plain
    torch's in the same dtype, and a float64 reference.
    """

    name: str
    run: Callable[[Any], Iterable[tuple[str, Tensor, Tensor, Tensor]]]


@dataclass(frozen=True)
class Site:
    """A place in a kernel's source that was reached; ``conflicts`` are bank cycles lost in ``phases`` row reads."""

    kind: str
    file: str
    line: int
    column: int
    count: int = 0
    phases: int = 0
    conflicts: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        return self.file, self.line, self.column

    @property
    def removable(self) -> bool:
        """Whether a kernel should be wrong without it."""
        return self.kind in {"barrier", "syncwarp", "wait", "inside"}


class Emulator:
    """The controls of a compiled library (``build.build``)."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_seed.argtypes = [ctypes.c_uint64]
        self.library.emulator_disable.argtypes = [ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        self.library.emulator_sites.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """All schedules up to the next call follow from the seed."""
        self.library.emulator_seed(seed)

    def disable(self, site: tuple[str, int, int] | None) -> None:
        """Switches off one place: a barrier or wait that does nothing, an ``inside`` that is true."""
        file, line, column = site or ("", 0, 0)
        self.library.emulator_disable(file.encode(), line, column)

    def forget_counts(self) -> None:
        self.library.emulator_forget_counts()

    def sites(self) -> list[Site]:
        """Every place reached since ``forget_counts``."""
        rows = [line.split("\t") for line in self.library.emulator_sites().decode().splitlines()]
        return [Site(kind, file, *map(int, numbers)) for kind, file, *numbers in rows]


SELFTEST = "_selftest"  # whose cases are of the emulator itself


def ops() -> list[str]:
    """The ops that have cases."""
    return sorted(path.stem for path in (Path(__file__).parent / "cases").glob("[!_]*.py"))


def cases(op: str) -> dict[str, Case]:
    """The op's cases by name."""
    module = importlib.import_module(f"{__package__}.cases.{op}")
    made = module.cases()
    assert len({case.name for case in made}) == len(made), f"{op}: two cases have the same name"
    return {case.name: case for case in made}


Bits = dict[str, Tensor]


def check(case: Case, native: Any, emulator: Emulator, seed: int, first: Bits | None) -> Bits:
    """Runs a case and returns its results' bits, which must be those of ``first`` if that is given.

    Raises:
        AssertionError: a result breaks the error rule or depends on the seed.
        RuntimeError: the launch failed, with the emulator's words.
    """
    emulator.seed(seed)
    bits: Bits = {}
    for what, ours, same_dtype, exact in case.run(native):
        assert what not in bits, f"two results are called {what}"
        bits[what] = ours.detach().clone().contiguous().view(torch.uint8)
        if first is None or not torch.equal(bits[what], first[what]):  # the same bits have obeyed the rule before
            assert_obeys_error_rule(ours, same_dtype, exact, what)
            assert first is None, f"{what}: other bits than under the first seed"
    assert bits, "the case has no results"
    return bits
