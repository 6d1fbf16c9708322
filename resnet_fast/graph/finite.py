"""Proof, for given weights, that no NaN can reach a ReLU, so that a ReLU which drops NaN gives torch's answer.

oneDNN's ReLU inside a convolution turns NaN into 0, and a separate ReLU costs a pass over the output. A bound on the
largest magnitude is carried through the graph: ``|conv(x)| <= max|x| * sum|w|``. While it stays far from overflow no
infinity can arise, so no NaN either. Where it would not, the values themselves are measured (guard.py), which
starts the bound anew; if they are NaN or huge, the graph runs again with separate ReLUs. So the answer is torch's for
every input, and one that is not finite costs a second run.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import memory
from .guard import PASSED, Guard
from .plan import Fused

#: A bound above this proves nothing (float32 and bfloat16 end at 3e38).
LIMIT = 1e36
#: Room for rounding in each layer, of bfloat16 weights too.
_SLACK = 1.05
_NAME = "resnet_fast_guard"

#: Averages add before they divide: below this no image is large enough to overflow the sum.
_LIMIT_OF_SUMS = 1e28

_KEEP_BOUND: set[Any] = {torch.relu, torch.flatten, nn.ReLU, nn.Identity}
_MAX_POOLS: set[Any] = {torch.max_pool2d, F.max_pool2d, nn.MaxPool2d}
_AVERAGES: set[Any] = {F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, nn.AdaptiveAvgPool2d}


def certify(gm: fx.GraphModule) -> int:
    """Put guards into the lowered ``gm`` and mark the convolutions whose ReLU sees no NaN; returns the guards' number.

    Nothing is marked on devices other than the CPU, and in a graph that writes in place.
    """
    _reset(gm)
    nodes = list(gm.graph.nodes)
    on_cpu = all(buffer.device.type == "cpu" for buffer in (*gm.parameters(), *gm.buffers()))
    if not on_cpu or any(memory.written(gm, node) for node in nodes):
        return 0
    unknown = float("inf")
    bounds: dict[fx.Node, float] = {}
    for node in nodes:
        bound = unknown
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Fused) and module.op in ("conv_bn_act", "stem"):
            gain, offset = _gain(module)
            sources = cast(tuple[fx.Node, ...], node.args)
            bound = _after(gain, offset, [bounds[source] for source in sources])
            relu = module.op == "conv_bn_act" and module.options["activation"] == "relu"
            if relu and module.backend == "onednn":
                if not bound <= LIMIT and _after(gain, offset, [PASSED] * len(sources)) <= LIMIT:
                    # What else is still to be read and has grown is measured too, or it would need its own guard soon.
                    grown = [value for value in _alive(nodes, node) if PASSED < bounds[value] <= LIMIT]
                    for value in dict.fromkeys((*sources, *grown)):
                        if not bounds[value] <= PASSED:
                            _insert_guard(gm, node, value)
                            bounds[value] = PASSED
                    bound = _after(gain, offset, [bounds[source] for source in sources])
                module.no_nan = bound <= LIMIT
        elif node.op == "call_function" and node.target is torch.cat:
            bound = max(bounds[source] for source in node.all_input_nodes)
        elif (node.op == "call_function" and node.target is torch.add and not node.kwargs) or _adds(module):
            operands = node.args[:2]
            if all(isinstance(operand, fx.Node) for operand in operands):
                bound = _SLACK * sum(bounds[cast(fx.Node, operand)] for operand in operands)
        elif _keeps_bound(node, module, bounds):
            bound = _SLACK * bounds[node.all_input_nodes[0]]
        bounds[node] = bound if bound <= LIMIT else unknown
    gm.recompile()
    return sum(node.op == "call_module" and node.target == _NAME for node in gm.graph.nodes)


def _adds(module: nn.Module | None) -> bool:
    return isinstance(module, Fused) and module.op == "add_act"


def _keeps_bound(node: fx.Node, module: nn.Module | None, bounds: dict[fx.Node, float]) -> bool:
    """Return whether nothing in the node's result is larger than what it reads, nor infinite on the way."""
    kind = node.target if module is None else type(module)
    if node.kwargs:
        return False
    if kind in _MAX_POOLS:
        # A dilated window may lie in the padding altogether, and then gives -inf.
        dilation = node.args[4:5] if module is None else (module.dilation,)
        return all(d in (1, (1, 1), [1, 1]) for d in dilation)
    if kind is F.avg_pool2d and node.args[6:] not in ((), (None,)):
        return False  # it divides by a number of its own, perhaps by none
    if kind in _AVERAGES:
        return bounds[node.all_input_nodes[0]] <= _LIMIT_OF_SUMS
    return kind in _KEEP_BOUND


def _alive(nodes: list[fx.Node], now: fx.Node) -> list[fx.Node]:
    """Return the values made before ``now`` that it or a later node reads."""
    position = {node: index for index, node in enumerate(nodes)}
    return [
        node for node in nodes[: position[now]] if any(position.get(user, -1) >= position[now] for user in node.users)
    ]


def _reset(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if isinstance(module, Guard):
                gm.graph.erase_node(node)
            elif isinstance(module, Fused):
                module.no_nan = False


def _gain(module: Fused) -> tuple[float, float]:
    """Return the largest sum of folded weights' magnitudes of an output channel, and the largest shift."""
    weight, scale, shift = (cast(Tensor, getattr(module, name)) for name in ("weight", "scale", "shift"))
    sums = weight.float().abs().sum((1, 2, 3)).double() * scale.double().abs()
    return (float(sums.max()), float(shift.abs().max())) if sums.numel() else (0.0, 0.0)


def _after(gain: float, offset: float, inputs: list[float]) -> float:
    """Return the bound behind a convolution of ``inputs[0]``, with the residual ``inputs[1]`` if there is one."""
    return _SLACK * (gain * inputs[0] + offset + sum(inputs[1:]))


def _insert_guard(gm: fx.GraphModule, before: fx.Node, value: fx.Node) -> None:
    if not hasattr(gm, _NAME):
        gm.add_submodule(_NAME, Guard())
    with gm.graph.inserting_before(before):
        gm.graph.call_module(_NAME, (value,))
