"""Symbolic sizes: what the author's code computes from them, and what it decides by them."""

from __future__ import annotations

from typing import Any

from .guards import numbered


class Numbers(Exception):
    """Symbols do not stand for the sizes in this computation: numbers must."""


class Symbols:
    """Symbolic sizes, and what is decided by them."""

    def __init__(self) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # it imports sympy

        self._env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        self._count = 0

    def made(self, size: int) -> tuple[Any, str]:
        """Return a symbolic size that is ``size`` now, and its symbol's name."""
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        source = ConstantSource(f"size{self._count}")
        self._count += 1
        # Not known to be positive: a batch may be empty.
        symbol = self._env.create_symbol(
            size, source, dynamic_dim=DimDynamic.DYNAMIC, positive=None, do_not_specialize_zero_one=True
        )
        return self._env.create_symintnode(symbol, hint=size, source=source), str(symbol)

    def guards(self) -> list[Any]:
        """Return the expressions that were found true so far."""
        return [guard.expr for guard in self._env.guards]


def source(expression: Any, names: list[str]) -> str:
    """Return an expression as Python, its symbols as s0, s1 ...

    Raises:
        Numbers: it has decimal factors, which sympy has put together in another order than Python would.
    """
    import sympy  # type: ignore[import-untyped]
    from torch.utils._sympy.printers import PythonPrinter

    for factor in expression.atoms(sympy.Float):
        if not (float(factor) * 1024).is_integer():
            raise Numbers
    return numbered(PythonPrinter().doprint(expression), names)
