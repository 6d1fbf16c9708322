"""Convolution + bias + ReLU, and a residual added behind it: one fused op or plain layers, decided at every call.

For networks without BatchNorm; those with it are `fused`'s affair. No kernel is known here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .fused import geometry, must_be_plain, untouched
from .pristine import ordinary

__all__ = ["conv_act", "same_padding"]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one dimension, (before, after): the output has ceil(size / stride) elements.

    The total is ``max((ceil(size / stride) - 1) * stride + kernel - size, 0)``, an odd element of it goes behind (the
    note on convolution in TensorFlow's documentation of ``tf.nn``). Written without a comparison, so that ``size`` may
    be symbolic; needs ``kernel >= stride``.
    """
    total = kernel - stride + -size % stride
    before = total // 2
    return before, total - before


def conv_act(x: Tensor, conv: Any, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    """``act(conv(x)) + residual``: one ``conv_bn_act`` call where no gradient is wanted, otherwise the layers.

    With gradients the layers are the faster choice. Every optimizer step changes the weight, so its packed copy would
    be made anew at every step. And the op keeps its output only: with the residual behind the ReLU that does not show
    where the ReLU was open, so the backward pass would compute the convolution again. ``conv2d`` adds the bias itself,
    the ReLU runs in place, and autograd keeps the ReLU's output, which is the next convolution's input anyway.

    The layers also run wherever fusing could be noticed: hooks, subclasses, symbolic tracing, torch.func.

    Args:
        x: [N, C, H, W], floating point. residual: as the output, or None.
        conv: a ``torch.nn.Conv2d``, or what is called like one. act: a ``torch.nn.ReLU``, or None.

    Returns:
        [N, K, P, Q] in x's dtype.
    """
    if (
        not must_be_plain(x, residual)
        and _fusable(conv, act)
        and not _wants_gradients(x, conv.weight, conv.bias, residual)
    ):
        weight, bias = conv.weight, conv.bias
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        scale = torch.ones(weight.shape[0], dtype=dtype, device=weight.device)
        shift = torch.zeros_like(scale) if bias is None else bias.to(dtype)
        stride, padding, dilation = geometry(conv)  # type: ignore[misc]
        activation = "none" if act is None else "relu"
        return ops.conv_bn_act(
            x, weight, scale, shift, residual, stride, padding, dilation, conv.groups, activation,
            residual_after_activation=True,
        )  # fmt: skip
    out: Tensor = conv(x)
    if act is not None:
        out = act(out)
    return out if residual is None else out + residual


def _fusable(conv: Any, act: nn.Module | None) -> bool:
    return (
        type(conv) is nn.Conv2d
        and geometry(conv) is not None
        and (act is None or type(act) is nn.ReLU)
        and untouched(conv, act)
        and ordinary(conv.weight, conv.bias)
    )


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
