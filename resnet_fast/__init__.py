"""resnet_fast: ResNets made of fused kernels, with the parameters and answers of the ResNets made of layers.

The public names of the package; what they are made of lives in the subpackages, imports running downward only:
caffe -> models, graph -> nn -> ops -> backends and kernels.
"""

from __future__ import annotations

__version__ = "0.1.0"

from . import backends, caffe, models, nn, ops
from ._info import Info, info
from .graph import optimize
from .models import (
    residual_network,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "Info",
    "__version__",
    "backends",
    "caffe",
    "info",
    "models",
    "nn",
    "ops",
    "optimize",
    "residual_network",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
