"""Convolutions, with the batch norm (or other per-channel scale and shift) behind them, become ``conv_bn_act`` nodes.

Scale and shift are computed in float64 from the stored statistics and kept apart from the weight; no activation here.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx

from . import ir

_ARITHMETIC: dict[Any, str] = {
    operator.mul: "mul",
    torch.mul: "mul",
    operator.add: "add",
    torch.add: "add",
    operator.sub: "sub",
    torch.sub: "sub",
}


def fold_bn(gm: fx.GraphModule, scale_dtype: torch.dtype) -> None:
    """Turn every conv2d of ``gm`` with constant weights into conv_bn_act, taking the batch norm behind it along.

    Args:
        scale_dtype: in which scale and shift are stored, float32 or float64.
    """
    for node in list(gm.graph.nodes):
        if ir.is_call(node, ir.CONV):
            _fold(gm, node, scale_dtype)
    for node in list(gm.graph.nodes):
        if ir.is_call(node, ir.BATCH_NORM):
            ir.reject(node, _why_not(gm, node))


def _fold(gm: fx.GraphModule, conv: fx.Node, scale_dtype: torch.dtype) -> None:
    x, weight, bias, stride, padding, dilation, groups = conv.args
    weights, biases = ir.tensor_of(gm, weight), ir.tensor_of(gm, bias)
    if weights is None or (bias is not None and biases is None):
        return ir.reject(conv, "its weight or bias is computed in the graph")
    shape = ir.shape_of(conv)
    if weights.dim() != 4 or (shape is not None and len(shape) != 4):
        return ir.reject(conv, "it is applied to an image without a batch dimension")
    channels = weights.shape[0]
    scale = torch.ones(channels, dtype=torch.float64, device=weights.device)
    shift = torch.zeros_like(scale) if biases is None else biases.detach().double()
    chain = [conv]
    while len(chain[-1].users) == 1:
        follower = next(iter(chain[-1].users))
        found = _affine(gm, follower, chain[-1], channels, weights.device)
        if found is None:
            break
        scale, shift = scale * found[0], shift * found[0] + found[1]
        chain.append(follower)
    name = ir.name_of(conv)
    with gm.graph.inserting_before(conv):
        scale_node = ir.add_constant(gm, f"{name}_scale", scale.to(scale_dtype))
        shift_node = ir.add_constant(gm, f"{name}_shift", shift.to(scale_dtype))
        arguments = (None, stride, padding, dilation, groups, "none", False)
        new = ir.call(gm, ir.CONV_BN_ACT, (x, weight, scale_node, shift_node, *arguments))
    return ir.replace(chain, new)


def _affine(
    gm: fx.GraphModule, node: fx.Node, x: fx.Node, channels: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (float64 [K]) if ``node`` computes ``x * scale + shift`` per channel with constants."""
    if ir.is_call(node, ir.BATCH_NORM):
        return _statistics(gm, node, x, channels)
    kind = _ARITHMETIC.get(node.target) if node.op == "call_function" else None
    if kind is None or len(node.args) != 2 or node.kwargs or (kind == "sub" and node.args[0] is not x):
        return None
    other = node.args[1] if node.args[0] is x else node.args[0]
    if isinstance(other, int | float) and (dtype := ir.dtype_of(x)) is not None and dtype.is_floating_point:
        return _as_affine(kind, torch.full((channels,), float(other), dtype=torch.float64, device=device))
    tensor = ir.tensor_of(gm, other)
    if tensor is None or not tensor.is_floating_point() or tensor.dtype != ir.dtype_of(x):
        return None
    if tuple(tensor.shape) not in ((1, channels, 1, 1), (channels, 1, 1)):
        return None
    assert isinstance(other, fx.Node)
    return _as_affine(kind, other.meta.get("wide", tensor.double()).flatten())


def _as_affine(kind: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a product with, a sum with, or a difference from ``value``."""
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    return {"mul": (value, zero), "add": (one, value), "sub": (one, -value)}[kind]


def _statistics(gm: fx.GraphModule, node: fx.Node, x: fx.Node, channels: int) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a batch norm over ``x`` with constant statistics."""
    source, *tensors, training, _, eps = cast(tuple[Any, ...], node.args)
    if source is not x or training or not isinstance(eps, float | int):
        return None
    values: list[Tensor | None] = []
    for tensor in tensors:
        value = ir.tensor_of(gm, tensor)
        if tensor is not None and (value is None or value.shape != (channels,)):
            return None
        values.append(None if value is None else tensor.meta.get("wide", value.detach().double()))
    mean, var, gamma, beta = values
    if mean is None or var is None:
        return None
    scale = (var + eps).rsqrt() if gamma is None else gamma / (var + eps).sqrt()
    shift = -mean * scale if beta is None else beta - mean * scale
    return scale, shift


def _why_not(gm: fx.GraphModule, node: fx.Node) -> str:
    source: Any = node.args[0]
    if ir.is_call(source, ir.CONV_BN_ACT):
        if len(source.users) > 1:
            return f"the output of {ir.name_of(source)} is used elsewhere too"
        return "its parameters are computed in the graph"
    if isinstance(source, fx.Node) and ir.layers_of(source):
        return f"it follows {ir.name_of(source)}, no convolution that could take it along"
    return "there is no convolution before it"
