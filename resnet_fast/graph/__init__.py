"""From a module to a graph of fused ops: capture by running, one normal form, the passes, lowering. Knows no backend.

The passes work on function calls with constant tensors only, so every front end that can give those shares them.
"""

from .export import exportable
from .optimize import optimize
from .report import Report, Row
from .snapshot import OptimizedModule

__all__ = ["OptimizedModule", "Report", "Row", "exportable", "optimize"]
