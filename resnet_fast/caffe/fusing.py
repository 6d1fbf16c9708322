"""How ``optimize`` reads Caffe's layers: each written as the calls that the graph passes know. Fuses nothing itself.

Importing this module registers them. A Scale layer is a batch norm of mean 0 and variance 1, so that the pass that
folds batch norms takes the pair BatchNorm, Scale (or either alone) into the convolution before it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, fx

from resnet_fast.graph import ir
from resnet_fast.graph.normalize import put, register

from . import layers

#: An eps that changes no variance: F.batch_norm may refuse 0.
_NOTHING = sys.float_info.min


def _module(gm: fx.GraphModule, node: fx.Node) -> Any:
    return gm.get_submodule(str(node.target))


def _constant(gm: fx.GraphModule, node: fx.Node, name: str, value: Tensor | None, dtype: torch.dtype) -> fx.Node | None:
    """Return a constant placed before ``node``, with its float64 value beside it."""
    if value is None:
        return None
    with gm.graph.inserting_before(node):
        constant = ir.add_constant(gm, f"{node.target}_{name}", value.to(dtype))
    constant.meta["wide"] = value
    return constant


def _batch_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    module = _module(gm, node)
    if module.of_batch:
        return ir.reject(node, "it normalises with the statistics of the batch (use_global_stats: false)")
    mean, variance = module.statistics(wide=True)
    if module.eps == 0 and not (variance > 0).all():
        return ir.reject(node, "it divides by 0: eps is 0, and so is a variance")
    statistics = (
        _constant(gm, node, name, value, module.mean.dtype) for name, value in (("mean", mean), ("variance", variance))
    )
    parameters = [
        None if value is None else _constant(gm, node, name, value.detach().double(), value.dtype)
        for name, value in (("weight", module.weight), ("bias", module.bias))
    ]
    put(gm, node, ir.BATCH_NORM, node.args[0], *statistics, *parameters, False, 0.0, module.eps or _NOTHING)


def _scale(gm: fx.GraphModule, node: fx.Node) -> None:
    module = _module(gm, node)
    shape = ir.shape_of(node.args[0])
    if len(node.args) != 1 or not module.per_channel or shape is None or len(shape) != 4:
        return
    weight = module.weight.detach().double()
    dtype = module.weight.dtype
    mean = _constant(gm, node, "zeros", torch.zeros_like(weight), dtype)
    variance = _constant(gm, node, "ones", torch.ones_like(weight), dtype)
    bias = None if module.bias is None else module.bias.detach().double()
    parameters = _constant(gm, node, "weight", weight, dtype), _constant(gm, node, "bias", bias, dtype)
    put(gm, node, ir.BATCH_NORM, node.args[0], mean, variance, *parameters, False, 0.0, _NOTHING)


def _eltwise(gm: fx.GraphModule, node: fx.Node) -> None:
    module = _module(gm, node)
    operands = list(node.args)
    if module.operation != "SUM" or not all(isinstance(operand, fx.Node) for operand in operands):
        return
    value = node.meta.get("value")

    def call(target: Any, *args: Any) -> fx.Node:
        with gm.graph.inserting_before(node):
            new = ir.call(gm, target, args)
        if value is not None:
            new.meta["value"] = value
        return new

    for index, coefficient in enumerate(module.coeff):
        if coefficient != 1:
            operands[index] = call(torch.mul, operands[index], coefficient)
    while len(operands) > 2:
        operands[:2] = [call(ir.ADD, *operands[:2])]
    put(gm, node, ir.ADD, *operands)


def _inner_product(gm: fx.GraphModule, node: fx.Node) -> None:
    module = _module(gm, node)
    x = node.args[0]
    if module.axis != 1 or module.transpose or not isinstance(x, fx.Node):
        return
    weight = _constant(gm, node, "weight", module.weight.detach(), module.weight.dtype)
    bias = None if module.bias is None else _constant(gm, node, "bias", module.bias.detach(), module.weight.dtype)
    with gm.graph.inserting_before(node):
        flat = ir.call(gm, ir.FLATTEN, (x, 1))
    if "value" in x.meta:
        flat.meta["value"] = torch.flatten(x.meta["value"], 1)
    put(gm, node, ir.LINEAR, flat, weight, bias)


def _pooling(gm: fx.GraphModule, node: fx.Node) -> None:
    module = _module(gm, node)
    p, x = module.window, node.args[0]
    ceil_mode = p.round_mode == "CEIL"
    if p.kernel is None and p.method == "AVE":
        put(gm, node, ir.ADAPTIVE_AVG_POOL, x, (1, 1))
    elif p.kernel is not None and module.like_torch:
        if p.method == "MAX":
            put(gm, node, ir.MAX_POOL, x, p.kernel, p.stride, p.padding, (1, 1), ceil_mode)
        else:
            put(gm, node, ir.AVG_POOL, x, p.kernel, p.stride, p.padding, ceil_mode, True)


def _concat(gm: fx.GraphModule, node: fx.Node) -> None:
    put(gm, node, torch.cat, tuple(node.args), _module(gm, node).axis)


def _plain(gm: fx.GraphModule, node: fx.Node) -> None:
    """A layer that runs as it is."""


register(layers.BatchNorm, _batch_norm, norm=True)
register(layers.Scale, _scale)
register(layers.Eltwise, _eltwise)
register(layers.InnerProduct, _inner_product)
register(layers.Pooling, _pooling)
register(layers.Concat, _concat)
for _kind in (
    layers.LRN, layers.PReLU, layers.Power, layers.TestDropout, layers.Axpy, layers.Crop, layers.Reshape,
    layers.Flatten, layers.Slice,
):  # fmt: skip
    register(_kind, _plain)
