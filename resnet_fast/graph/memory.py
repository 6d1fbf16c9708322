"""Which values of a graph may share memory, and which nodes write into memory that exists already.

Errs on the safe side: an op that is not known to return fresh memory may return a view of any of its inputs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from resnet_fast.nn.pristine import is_frozen_batch_norm

from .ir import ADD_ACT, BOTTLENECK_TAIL, CONV_BN_ACT, HEAD, STEM, nodes_in

#: Functions whose result is new memory (called without ``inplace=True`` and ``out=``).
_FRESH_FUNCTIONS = {
    torch.conv2d, F.batch_norm, torch.relu, F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu,
    F.elu, F.hardtanh, torch.sigmoid, torch.tanh, torch.add, torch.sub, torch.mul, torch.div, operator.add,
    operator.sub, operator.mul, operator.truediv, operator.neg, torch.max_pool2d, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.mean, torch.sum, F.linear, torch.cat, torch.stack,
    torch.softmax, F.softmax,
    torch.batch_norm, torch._C._nn.adaptive_avg_pool2d,
    torch.clone, torch.exp, torch.sqrt, torch.rsqrt, torch.matmul, F.group_norm, F.layer_norm,
    CONV_BN_ACT, ADD_ACT, STEM, HEAD, BOTTLENECK_TAIL,
}  # fmt: skip
_FRESH_METHODS = {
    "add", "sub", "mul", "div", "neg", "relu", "sigmoid", "tanh", "softmax", "exp", "sqrt", "rsqrt", "mean", "sum",
    "clone", "clamp", "square", "pow", "abs", "matmul",
}  # fmt: skip
_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul, operator.setitem,
}  # fmt: skip
#: Methods that end in "_" and change no values.
_NOT_WRITING = {"requires_grad_", "detach_"}


def written(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the inputs that ``node`` writes into: as the capture saw it, else all that it may."""
    if "written" in node.meta:
        return list(node.meta["written"])
    first = [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else []
    if node.op == "call_module":
        return first if getattr(gm.get_submodule(str(node.target)), "inplace", False) else []
    if node.op == "call_method":
        name = str(node.target)
        in_place = name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITING
        return first if in_place else []
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        values = {a.name: v for a, v in zip(arguments, node.args, strict=False)} | node.kwargs
        marked = [values.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        return list(nodes_in(marked))
    if node.target in _IN_PLACE_OPERATORS:
        return first
    outputs = list(nodes_in(node.kwargs.get("out")))
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITING:
        return first + outputs
    return (first if _inplace_flag(node) else []) + outputs


def _inplace_flag(node: fx.Node) -> bool:
    """Return whether a torch.nn.functional call has ``inplace`` set."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    position = inplace_position(node.target)
    return position is not None and len(node.args) > position and bool(node.args[position])


def inplace_position(function: Any) -> int | None:
    """Return the index of a Python function's ``inplace`` parameter, None if it has none."""
    code = getattr(function, "__code__", None)
    if code is None or "inplace" not in code.co_varnames[: code.co_argcount]:
        return None
    return int(code.co_varnames.index("inplace"))


def holds_tensor(node: fx.Node) -> bool:
    """False if the node's value is known to be no tensor and to hold none (a size, a number)."""
    if "value" not in node.meta:
        return True
    value = node.meta["value"]
    if isinstance(value, int | float | bool | str | torch.Size | torch.dtype | torch.device) or value is None:
        return False
    if isinstance(value, tuple | list):
        return not all(isinstance(item, int | float) for item in value)
    return True


def fresh(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether the node's value is memory of its own, shared with none of its inputs."""
    if written(gm, node):
        return False
    if node.op == "call_function":
        if getattr(node.target, "__module__", "") == "_operator":  # may be lists and tuples that hold tensors
            return node.target in _FRESH_FUNCTIONS and is_tensor(node)
        return node.target in _FRESH_FUNCTIONS
    if node.op == "call_method":
        return node.target in _FRESH_METHODS
    if node.op == "call_module":
        return is_frozen_batch_norm(gm.get_submodule(str(node.target)))
    return False


def sharing(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """Return the nodes that show each memory, as the capture found them, or may show it in another memory format."""
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        storages: list[int] = list(node.meta.get("storages", ()))
        if _copies_in_some_format(node):
            storages += node.args[0].meta.get("storages", ())
        groups = {id(found[storage]): found[storage] for storage in storages if storage in found}
        if len(groups) == 1:
            merged = next(iter(groups.values()))
        else:
            merged = [other for group in groups.values() for other in group]
            found.update({storage: merged for storage, group in found.items() if id(group) in groups})
        merged.append(node)
        found.update(dict.fromkeys(storages, merged))
    return found


_COPYING_IN_SOME_FORMAT = {"contiguous", "reshape", "flatten", "to", "reshape_as", torch.reshape, torch.flatten}


def _copies_in_some_format(node: fx.Node) -> bool:
    """Return whether it depends on strides if the result is a copy of the first argument or shows its memory."""
    if node.target not in _COPYING_IN_SOME_FORMAT or not node.args:
        return False
    x: Any = node.args[0]
    return is_tensor(x) and is_tensor(node) and x.meta["value"].dtype is node.meta["value"].dtype


def aliases_of(node: fx.Node, shown: dict[int, list[fx.Node]]) -> set[fx.Node]:
    """Return every value, earlier or later, that shares memory with ``node`` in the author's code; itself included."""
    return {other for storage in node.meta.get("storages", ()) for other in shown[storage]}


def _views(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the users of ``node`` whose values may share its memory."""
    return [user for user in node.users if user.op != "output" and holds_tensor(user) and not fresh(gm, user)]


def views_of(gm: fx.GraphModule, node: fx.Node) -> set[fx.Node]:
    """``node`` and every later value that may share its memory, in whatever memory format it comes."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(_views(gm, current))
    return found


def possible_aliases_of(gm: fx.GraphModule, node: fx.Node) -> set[fx.Node]:
    """Return every value, earlier or later, that may share memory with ``node`` in some memory format."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found.add(current)
        pending.extend(_views(gm, current))
        if current.op not in ("placeholder", "get_attr") and not fresh(gm, current):
            pending.extend(source for source in current.all_input_nodes if holds_tensor(source))
    return found


def is_tensor(node: Any) -> bool:
    """Return whether the node's value is known to be a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("value"), Tensor)
