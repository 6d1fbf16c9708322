"""Sizes that the author's code asks for inside a chain of layers, read from the chain's input instead.

A layer whose output is only measured is then read by nobody but the next layer, and can be fused with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from . import guards, ir

_KEEPS_SHAPE: set[Any] = {
    F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.hardtanh, F.dropout, torch.sigmoid,
    torch.tanh,
}  # fmt: skip


def hoist_sizes(gm: fx.GraphModule) -> None:
    """Read every size as early as it is known, and compute at once what depends on constants alone."""
    for node in list(gm.graph.nodes):
        if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
            with gm.graph.inserting_before(node):
                found = _origin(gm, node.args[0], node.args[1])
            if found is not node:
                node.replace_all_uses_with(found) if isinstance(found, fx.Node) else _put_in(node, found)
                gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        constant = not node.all_input_nodes
        if node.target is guards.compute and constant:
            _put_in(node, guards.compute(*node.args))
            gm.graph.erase_node(node)
        elif node.target is guards.expect and constant:
            guards.expect(*node.args)
            gm.graph.erase_node(node)


def _put_in(node: fx.Node, value: Any) -> None:
    """Have every user of ``node`` take a constant in its place."""
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg(
            (user.args, user.kwargs), lambda source: value if source is node else source
        )


def _origin(gm: fx.GraphModule, x: Any, dim: Any) -> Any:
    """Return the size of ``x`` along ``dim``: a number, or a node that reads or computes it."""
    while isinstance(x, fx.Node):
        arguments: Any = x.args
        if ir.is_call(x, ir.RELU) or ir.is_call(x, ir.BATCH_NORM) or _keeps_shape(x) or x.meta.get("same_shape"):
            x = arguments[0]
        elif dim < 2 and any(ir.is_call(x, pool) for pool in (ir.MAX_POOL, ir.AVG_POOL, ir.ADAPTIVE_AVG_POOL)):
            shape = ir.shape_of(x)
            if shape is None or len(shape) != 4:
                break
            x = arguments[0]
        elif ir.is_call(x, ir.ADAPTIVE_AVG_POOL) and arguments[1][dim - 2] is not None:
            return arguments[1][dim - 2]
        elif ir.is_call(x, ir.CONV) and (weight := ir.tensor_of(gm, arguments[1])) is not None and weight.dim() == 4:
            if len(ir.shape_of(x) or ()) != 4:
                break
            if dim == 1:
                return weight.shape[0]
            if dim > 1:
                stride, padding, dilation = (int(pair[dim - 2]) for pair in arguments[3:6])
                extent = dilation * (weight.shape[dim] - 1) + 1
                source = f"(s0 + {2 * padding - extent}) // {stride} + 1"
                return gm.graph.call_function(guards.compute, (source, _origin(gm, arguments[0], dim)))
            x = arguments[0]
        else:
            break
    return gm.graph.call_method("size", (x, dim))


def _keeps_shape(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _KEEPS_SHAPE and isinstance(node.args[0], fx.Node)
