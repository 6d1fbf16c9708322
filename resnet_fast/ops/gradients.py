"""Gradients that ops share: of a ReLU, of the stem's pool, of a convolution, of one with its scale and shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.layouts import nchw, spoils_memory, with_strides_of
from ..backends.packing import Geometry


def relu_gradient(grad: Tensor, output: Tensor) -> Tensor:
    """torch's ReLU backward: ``grad`` where ``output`` is not <= 0 (so it passes where output is NaN), else 0."""
    return torch.ops.aten.threshold_backward.default(grad, output, 0)


def _pooling(ceil_mode: bool) -> tuple[Any, ...]:
    """Return what aten's max-pools take: a window 3x3/2 padded by 1, or Caffe's unpadded one, the size rounded up."""
    padding = 0 if ceil_mode else 1
    return [3, 3], [2, 2], [padding, padding], [1, 1], ceil_mode


def max_pool(x: Tensor, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """Return the maxima and where they are."""
    pooled: tuple[Tensor, Tensor] = torch.ops.aten.max_pool2d_with_indices.default(x, *_pooling(ceil_mode))
    return pooled


def max_pool_gradient(grad: Tensor, x: Tensor, ceil_mode: bool) -> Tensor:
    """Return the gradient for the pool's input, whose maxima are searched again."""
    indices, how = max_pool(x, ceil_mode)[1], _pooling(ceil_mode)
    made: Tensor = torch.ops.aten.max_pool2d_with_indices_backward.default(grad, x, *how, indices)
    return made


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    geometry: Geometry,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's gradients of a convolution for x, weight and bias, as far as ``wanted``."""
    given, (stride, padding, dilation, groups) = weight, geometry
    if spoils_memory(x, weight, stride):
        grad, x, weight = nchw(grad), nchw(x), nchw(weight)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad, x, weight, bias_sizes, stride, padding, dilation, False, [0, 0], groups, list(wanted)
    )
    return grad_x, with_strides_of(given, grad_weight) if wanted[1] else grad_weight, grad_bias


def convolution_gradients(
    grad: Tensor, operands: Sequence[Any], geometry: Geometry, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``conv(x, weight) * scale + shift`` for these four operands, None if not ``needed``.

    dL/dx is the data gradient for the weight ``w * scale``, and with G = the weight gradient for the unscaled ``grad``,
    dL/dw = scale * G and dL/dscale = sum over C, R, S of w * G. So neither the convolution's output nor a division by
    scale is needed.
    """
    x, weight, scale, shift = operands
    need_x, need_weight, need_scale, need_shift = needed
    per_channel = scale.view(-1, 1, 1, 1)
    grad_x = grad_weight = grad_scale = grad_shift = None
    if need_x or need_weight or need_scale:
        scaled = (weight.to(scale.dtype) * per_channel).to(x.dtype)
        wanted = [need_x, need_weight or need_scale, False]
        grad_x, unscaled, _ = convolution_backward(grad, x, scaled, None, geometry, wanted)
        if need_weight:
            grad_weight = with_strides_of(weight, (unscaled.to(scale.dtype) * per_channel).to(weight.dtype))
        if need_scale:
            grad_scale = (unscaled.to(scale.dtype) * weight.to(scale.dtype)).sum((1, 2, 3))
    if need_shift:
        grad_shift = grad.sum((0, 2, 3), dtype=shift.dtype)
    return grad_x, grad_weight, grad_scale, grad_shift
