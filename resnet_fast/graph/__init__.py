"""From a module to a graph of fused ops: capture by running, one normal form, the passes, lowering. Knows no backend.

The passes work on function calls with constant tensors only, so every front end that can give those shares them.
"""

from .export import exportable
from .optimize import optimize
from .quantize import quantize
from .quantize_report import LayerQuality, Quantization
from .report import Report, Row
from .snapshot import OptimizedModule

__all__ = ["LayerQuality", "OptimizedModule", "Quantization", "Report", "Row", "exportable", "optimize", "quantize"]
