"""The vocabulary that the passes share: canonical nodes, constant tensors, shapes, and the layers a node stands for.

In a graph in normal form the layers of a ResNet are calls of the functions named here, all arguments positional,
weights as ``get_attr`` nodes. No pass lives here, and nothing here knows modules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from resnet_fast import ops
from resnet_fast.ops import Op

CONV = torch.conv2d
BATCH_NORM = F.batch_norm
RELU = torch.relu
ADD = torch.add
MAX_POOL = torch.max_pool2d
AVG_POOL = F.avg_pool2d
ADAPTIVE_AVG_POOL = F.adaptive_avg_pool2d
MEAN = torch.mean
FLATTEN = torch.flatten
LINEAR = F.linear
CONV_BN_ACT, ADD_ACT, STEM, HEAD, BOTTLENECK_TAIL = (
    ops.ALL[name].overload for name in ("conv_bn_act", "add_act", "stem", "head", "bottleneck_tail")
)
#: The fused ops by what their nodes call.
OPS: dict[Any, Op[Any]] = {op.overload: op for op in ops.ALL.values()}


@dataclass(eq=False)
class Layer:
    """One layer of the model as its author wrote it; ``reason`` says why it was not fused (empty if it was).

    ``removed``: it does nothing at inference, or was computed once and for all.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None = None
    bytes_before: int | None = None
    reason: str = ""
    removed: bool = False


@dataclass
class Notes:
    """Remarks for the report, in order, each one once."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)


def op_of(node: Any) -> Op[Any] | None:
    """Return the op that a node in normal form calls, None if it calls none of ours."""
    op = OPS.get(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else None
    return op if op is not None and node.meta.get("normal") else None


def arguments_of(node: fx.Node) -> Any:
    """Return the arguments of a node that calls an op, as the op's own NamedTuple, with nodes in place of tensors."""
    return OPS[node.target].arguments(*node.args)


def call(gm: fx.GraphModule, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Return a node in normal form, at the graph's current insertion point."""
    node = gm.graph.call_function(target, args)
    node.meta["normal"] = True
    return node


def is_call(value: Any, target: Any) -> bool:
    """Return whether ``value`` is a node in normal form that calls the function ``target``."""
    return calls(value, target) and bool(value.meta.get("normal"))


def calls(value: Any, target: Any) -> bool:
    """Return whether ``value`` is a node, in whatever form, that calls the function ``target``."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target is target


def plain_conv(value: Any, activation: str = "none") -> bool:
    """Return whether ``value`` is a conv_bn_act node with this activation, no residual, and exactly one user."""
    if not is_call(value, CONV_BN_ACT) or len(value.users) != 1:
        return False
    conv = arguments_of(value)
    return conv.residual is None and conv.activation == activation


def layers_of(node: fx.Node) -> list[Layer]:
    """Return the author's layers that ``node`` computes."""
    return node.meta.get("layers", [])


def name_of(node: fx.Node) -> str:
    """Return the name of the first of the author's layers in ``node``, else the node's own."""
    layers = layers_of(node)
    return layers[0].name if layers else node.name


def reject(node: fx.Node, reason: str) -> None:
    """Record why the layers of ``node`` stay as they are. A later pass may still take them, which clears it."""
    for layer in layers_of(node):
        layer.reason = reason


def replace(old: Sequence[fx.Node], new: fx.Node) -> None:
    """Put ``new`` in the place of the chain ``old``: users of the last one, and the layers of all of them.

    The nodes of ``old`` are erased, so each but the last may have no user outside the chain.
    """
    last = old[-1]
    for key in ("value", "storages"):
        if key in last.meta:
            new.meta[key] = last.meta[key]
    new.meta["layers"] = [layer for node in old for layer in layers_of(node)]
    for layer in layers_of(new):
        layer.reason = ""
    last.replace_all_uses_with(new)
    for node in reversed(old):
        node.graph.erase_node(node)


def tensor_of(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """Return the constant that a ``get_attr`` node stands for; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def is_held(gm: fx.GraphModule, node: Any) -> bool:
    """Return whether ``node`` is a constant, or in a graph of live layers a tensor that is given to it."""
    return tensor_of(gm, node) is not None or (isinstance(node, fx.Node) and node.meta.get("held", False))


def earlier(gm: fx.GraphModule, node: Any) -> Any:
    """Return a node for the same constant at the graph's current insertion point; other inputs are known anywhere."""
    return gm.graph.node_copy(node) if isinstance(node, fx.Node) and node.op == "get_attr" else node


def identifier(name: str) -> str:
    """``name`` as a Python identifier."""
    cleaned = re.sub(r"\W", "_", name)
    return cleaned if re.match(r"[A-Za-z_]", cleaned) else f"_{cleaned}"


def free_name(gm: fx.GraphModule, name: str) -> str:
    """``name`` as an attribute that ``gm`` does not have yet."""
    base = candidate = identifier(name)
    count = 1
    while hasattr(gm, candidate):
        candidate = f"{base}_{count}"
        count += 1
    return candidate


def add_constant(gm: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """Return a ``get_attr`` node, at the graph's current insertion point, for a new buffer that holds ``tensor``."""
    attribute = free_name(gm, name)
    gm.register_buffer(attribute, tensor.detach())
    node = gm.graph.create_node("get_attr", attribute)
    node.meta["value"] = torch.empty_like(tensor, device="meta")
    return node


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Return the shape of a node's value at the example inputs, None if it is unknown or no tensor."""
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    """Return the dtype of a node's value, None if it is unknown or no tensor."""
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return where in the order of execution each node is."""
    return {node: index for index, node in enumerate(graph.nodes)}


def reads_data(node: fx.Node) -> bool:
    """Return whether a node reads more of a tensor than its size."""
    return not (node.op == "call_method" and node.target == "size")


def nodes_in(value: Any) -> list[fx.Node]:
    """Return all nodes in a nest of tuples, lists, dicts and slices."""
    found: list[fx.Node] = []

    def collect(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(value, collect)
    return found
