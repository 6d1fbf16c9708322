"""Modules that run fused: parameters and modes live here, arithmetic in ``ops``."""

from .conv_bn_act import ConvBNAct2d

__all__ = ["ConvBNAct2d"]
