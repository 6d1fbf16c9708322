"""Modules that run fused: parameters and modes live here, arithmetic in ``ops``."""

from .bn_act import BNAct2d
from .conv_bn_act import ConvBNAct2d
from .frozen import FrozenBatchNorm2d

__all__ = ["BNAct2d", "ConvBNAct2d", "FrozenBatchNorm2d"]
