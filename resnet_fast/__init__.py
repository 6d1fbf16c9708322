"""resnet_fast: ResNets made of fused kernels, with the parameters and answers of the ResNets made of layers.

The public names of the package; what they are made of lives in the subpackages, imports running downward only:
models -> graph -> nn -> ops -> backends and kernels.
"""

from __future__ import annotations

import importlib.util
import sys

__version__ = "0.1.0"

if "resnet_fast.kernels" not in sys.modules and importlib.util.find_spec("resnet_fast.kernels") is None:
    raise ImportError(
        "resnet_fast.kernels is missing: resnet_fast was imported from a source tree that is not installed. "
        "Install it (`pip install -e .` in that tree) or leave the tree's folder."
    )

from . import backends, nn, ops
from ._info import Info, info

__all__ = ["Info", "__version__", "backends", "info", "nn", "ops"]
