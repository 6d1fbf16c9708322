"""A lowered graph as calls of the CPU engine: what it holds of the layers runs as few calls, the rest in torch between.

The graph itself stays as it is: it is what a snapshot's ``code``, its report and its exports show. Here a second graph
is made of it, with the same modules, at the first run.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from resnet_fast.backends import cpu
from resnet_fast.ops._op import readable, unmoded

from . import memory
from .guard import Guard
from .plan import Fused
from .quantize_layers import Quantized


class NotPlanned(Exception):
    """The engine takes no tensors like these."""


class Segment(nn.Module):
    """Layers of a graph as one call of the engine.

    Args:
        network: of the engine. single: whether it has one output, which is then given by itself.
    """

    def __init__(self, network: cpu.Network, single: bool) -> None:
        super().__init__()
        self.training = False
        self.network, self.single = network, single

    def forward(self, *inputs: Tensor) -> Any:
        images = all(x.dim() == 4 and x.dtype is self.network.dtype and x.numel() for x in inputs)
        if not images or not readable(inputs) or not unmoded():
            raise NotPlanned
        try:
            outputs = self.network.run(inputs)
        except ValueError as error:  # an image is too small, say: each layer has its own words for it
            raise NotPlanned from error
        return outputs[0] if self.single else tuple(outputs)


def planned(gm: fx.GraphModule) -> fx.GraphModule | None:
    """Return ``gm`` with the engine's layers as calls of it, as few as can be; None if there are none.

    The result is to be run without gradients and under ``guard.with_separate_relus``.
    """
    nodes = [node for node in gm.graph.nodes if not _is_guard(gm, node)]
    if any(memory.written(gm, node) for node in nodes):
        return None  # the order of what writes and reads would have to be kept
    if any(isinstance(module, Quantized) for module in gm.modules()):
        return None  # with separate ReLUs these run by their definition
    calls: dict[fx.Node, int] = {}  # which call a layer is part of, counted from 0
    ready: dict[fx.Node, int] = {}  # before which call another node runs; these keep their order
    latest = 0
    channels: dict[fx.Node, int] = {}  # of what the engine makes
    for node in nodes:
        made = _channels(gm, node, channels)
        sources = node.all_input_nodes
        if made is None:
            before = (calls[source] + 1 if source in calls else ready[source] for source in sources)
            ready[node] = latest = max((latest, *before))
        else:
            channels[node] = made
            calls[node] = max(calls[source] if source in calls else ready[source] for source in sources)
    if not calls:
        return None
    dtypes = {module.dtype for module in gm.modules() if isinstance(module, Fused) and module.backend == cpu.NAME}
    if len(dtypes) > 1:
        return None  # of a graph that casts between its layers
    dtype = dtypes.pop()
    graph, root = fx.Graph(), {}
    new: dict[fx.Node, fx.Node] = {}
    for call in range(max((*calls.values(), *ready.values())) + 1):
        for node in nodes:
            if ready.get(node) == call:
                new[node] = graph.node_copy(node, new.__getitem__)
        layers = [node for node in nodes if calls.get(node) == call]
        if layers:
            root[f"engine_{call}"] = _add_call(gm, graph, f"engine_{call}", layers, new, channels, dtype)
    for node in nodes:
        if node in ready and node.op in ("get_attr", "call_module"):
            root[str(node.target)] = operator.attrgetter(str(node.target))(gm)
    return fx.GraphModule(root, graph, class_name=type(gm).__name__).eval()


def _is_guard(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), Guard)


def _channels(gm: fx.GraphModule, node: fx.Node, known: dict[fx.Node, int]) -> int | None:
    """Return the channels of what the engine computes for this node; None if it does not compute it.

    Args:
        known: the channels of the values that it makes.
    """
    if node.op != "call_module":
        source = node.args[0] if _pool_of(node) else None
        return known.get(source) if isinstance(source, fx.Node) else None
    module = gm.get_submodule(str(node.target))
    if not isinstance(module, Fused) or module.backend != cpu.NAME or module.declared.plan is None:
        return None
    if module.image_size is not None or module.options.get("mean") is not None:
        return None  # sizes that it must refuse; bytes, which are normalised first
    weight = module.constants().get("weight")
    if weight is not None:
        return int(weight.shape[0])
    return next((known[source] for source in node.all_input_nodes if source in known), None)


def _pool_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Return a max-pool's kernel, stride, padding, dilation and ceil_mode; None if it is none in normal form."""
    if node.op != "call_function" or node.target is not torch.max_pool2d or node.kwargs or len(node.args) != 6:
        return None
    *pairs, ceil_mode = node.args[1:]
    usual = all(isinstance(pair, tuple) and [type(size) for size in pair] == [int, int] for pair in pairs)
    return (*pairs, ceil_mode) if usual and isinstance(ceil_mode, bool) else None


def _add_call(
    gm: fx.GraphModule, graph: fx.Graph, name: str, layers: list[fx.Node], new: dict[fx.Node, fx.Node],
    channels: dict[fx.Node, int], dtype: torch.dtype,
) -> Segment:  # fmt: skip
    """Add a call of the module returned to the graph; what it reads is in ``new``, and what it gives is put there."""
    network = cpu.Network(dtype)
    values: dict[fx.Node, int] = {}
    inputs: list[fx.Node] = []
    for node in layers:
        module: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        for source in node.all_input_nodes:
            if source not in values:
                count = channels[source] if source in channels else _read_channels(module, node, source, channels[node])
                values[source] = network.input(count)
                inputs.append(source)
        if module is None:
            values[node] = network.max_pool(values[node.all_input_nodes[0]], *(_pool_of(node) or ()))
        else:
            given = [values[source] for source in node.args if isinstance(source, fx.Node)]
            rest = [None] * (len(module.declared.data) - len(given))
            values[node] = module.declared.plan(network, module.prepare(), [*given, *rest])
    inside = set(layers)
    outputs = [node for node in layers if any(user not in inside for user in node.users)]
    for node in outputs:
        flat = node.op == "call_module" and gm.get_submodule(str(node.target)).op == "head"
        network.output(values[node], flat)
    call = graph.call_module(name, tuple(new[source] for source in inputs))
    for index, node in enumerate(outputs):
        new[node] = call if len(outputs) == 1 else graph.call_function(operator.getitem, (call, index))
    return Segment(network, len(outputs) == 1)


def _read_channels(module: Fused, node: fx.Node, source: fx.Node, made: int) -> int:
    """Return the channels of a tensor that a layer reads: its image, else what is added to its result."""
    weight = module.constants().get("weight")
    if weight is None or source is not node.args[0]:
        return made
    return int(weight.shape[1]) * int(module.options.get("groups", 1))
