"""From a fused graph in float32 and the ranges of its values to the graph that computes in uint8 and int8.

Here is decided which values are made as uint8, and where one is converted; which layers take part is decided in
quantize.py.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from resnet_fast.backends.onednn import Window
from resnet_fast.backends.onednn_int8 import Affine
from resnet_fast.backends.packing import fold
from resnet_fast.ops.stem import PADDING, STRIDE, pooling

from . import ir
from .plan import Fused
from .quantize_layers import LARGEST, Convolution, Dequantize, MaxPool, Quantize, Quantized
from .quantize_observe import Observer
from .snapshot import OptimizedModule


class Graph:
    """One fused graph on its way to int8.

    Attributes:
        prefix: of its layers' names in the model. gm: the float graph. layers: each fused node's first layer, by its
            full name.
        chosen: the convolutions that become int8. reasons: why other fused nodes do not. observers: by value.
        largest: of stored activations. trials: what each convolution loses alone, in dB.
        quantized: the graph made last; planned: the same as calls of the CPU engine, once it has run so; where: of each
            layer, the node that holds its result there and how.
    """

    def __init__(self, prefix: str, snapshot: OptimizedModule) -> None:
        self.prefix, self.snapshot = prefix, snapshot
        self.gm = snapshot.graph_module
        self.layers: dict[fx.Node, str] = {}
        for node in self.gm.graph.nodes:
            module = self.module(node)
            if isinstance(module, Fused):
                self.layers[node] = f"{prefix}{module.layer}"
        self.chosen: dict[fx.Node, None] = {}
        self.reasons: dict[fx.Node, str] = {}
        self.observers: dict[fx.Node, Observer] = {}
        self.largest = LARGEST
        self.trials: dict[fx.Node, float] = {}
        self.quantized = self.gm
        self.planned: tuple[fx.GraphModule | None] | None = None
        self.convolutions: dict[fx.Node, fx.Node] = {}
        self.where: dict[fx.Node, tuple[fx.Node, Affine | None]] = {}

    def module(self, node: fx.Node) -> Any:
        return self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None

    def keep(self, node: fx.Node, reason: str) -> None:
        """Leave a convolution float32."""
        self.chosen.pop(node, None)
        self.reasons[node] = reason

    def sample(self, node: Any) -> Tensor:
        """Return a value that calibration saw, of one image."""
        found = self.observers[node].sample
        assert found is not None
        return found

    def affine(self, values: Iterable[fx.Node]) -> Affine:
        """Return how to store values that share one scale."""
        seen = [self.observers[value] for value in values if value in self.observers]
        found = seen[0]
        for other in seen[1:]:
            found = found.merged(other)
        return found.affine(self.largest)


def _stored_values(graph: Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return the values that are made as uint8, each with those that share its scale.

    A chosen convolution gives uint8 if a chosen one reads it (or a max-pool or concatenation that does the same), else
    float32. Max-pools and concatenations keep the scale of what they read.
    """
    nodes = list(graph.gm.graph.nodes)
    passing = {node for node in nodes if _is_pool(node) or _is_cat(node)}
    while True:
        made = _made(graph, nodes, passing)
        wrong = {node for node in passing & made if not all(source in made for source in node.all_input_nodes)}
        if not wrong:
            break
        passing -= wrong
    shared = {node: [node] for node in made}
    for node in nodes:
        for source in node.all_input_nodes if node in passing & made else ():
            if shared[source] is not shared[node]:
                shared[node].extend(shared[source])
                for member in shared[source]:
                    shared[member] = shared[node]
    return shared


def _made(graph: Graph, nodes: list[fx.Node], passing: set[fx.Node]) -> set[fx.Node]:
    """Return the values to make as uint8 if those of ``passing`` can be, whatever they read."""
    made: set[fx.Node] = set()

    def reads(user: fx.Node, node: fx.Node) -> bool:
        if user in graph.chosen:
            return node is user.args[0] or (user in made and _relu(graph.module(user)) != "first")
        return user in passing and user in made

    for node in reversed(nodes):
        makes = node in passing or (node in graph.chosen and _relu(graph.module(node)) != "first")
        if makes and any(reads(user, node) for user in node.users):
            made.add(node)
    return made


def _relu(module: Fused) -> str:
    """Return where a convolution's ReLU is, seen from its residual: "", "first" or "last"."""
    if module.op == "stem":
        return "last"
    if module.options["activation"] != "relu":
        return ""
    return "first" if module.options["residual_after_activation"] else "last"


class Builder:
    """Makes the quantized graph of a float one, node by node; a value may be there as float32, as uint8, or both."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._shared = graph, _stored_values(graph)
        self._affines: dict[fx.Node, Affine] = {}  # by the first of those that share one
        self._new = fx.Graph()
        self._root: dict[str, Any] = {}
        kept = [n for n in graph.gm.graph.nodes if n.op in ("get_attr", "call_module") and n not in graph.chosen]
        self._taken = {str(node.target).partition(".")[0] for node in kept}
        self._floats: dict[fx.Node, fx.Node] = {}
        self._bytes: dict[fx.Node, tuple[fx.Node, Affine]] = {}

    def build(self) -> fx.GraphModule:
        """Return the quantized graph, and set ``where`` of the float one."""
        graph, gm = self._graph, self._graph.gm
        graph.where, graph.convolutions, graph.planned = {}, {}, None
        node: Any
        for node in gm.graph.nodes:
            layer = graph.layers.get(node, "")
            if node in graph.chosen:
                self._convolution(node)
            elif node in self._shared and _is_pool(node):
                x, affine = self._bytes_of(node.args[0], layer)
                self._bytes[node] = self._call(node.name, MaxPool(*node.args[1:]), x), affine
            elif node in self._shared:
                values = [self._bytes_of(source, layer) for source in node.args[0]]
                made = self._new.call_function(torch.cat, ([value for value, _ in values], *node.args[1:]), node.kwargs)
                self._bytes[node] = made, values[0][1]
            else:
                given = functools.partial(self._float_of, layer=layer, reads=ir.reads_data(node))
                self._floats[node] = self._new.node_copy(node, given)
                if node.op in ("get_attr", "call_module"):
                    self._root[str(node.target)] = operator.attrgetter(str(node.target))(gm)
            if node in graph.layers:
                graph.where[node] = self._bytes[node] if node in self._bytes else (self._floats[node], None)
        result = fx.GraphModule(self._root, self._new, class_name=type(gm).__name__)
        for module in result.modules():
            if type(module) is nn.Module or module is result:  # the containers just made
                module.training = False
        _mark_overwritten(result)
        return result

    def _call(self, name: str, module: Quantized, *inputs: fx.Node) -> fx.Node:
        module.dtype = self._graph.snapshot.dtype
        base = candidate = ir.identifier(name)
        count = 0
        while candidate in self._taken or hasattr(fx.GraphModule, candidate):
            count += 1
            candidate = f"{base}_{count}"
        self._taken.add(candidate)
        self._root[candidate] = module
        return self._new.call_module(candidate, inputs)

    def _affine(self, node: fx.Node) -> Affine:
        """Return how a value is stored."""
        shared = self._shared.get(node, [node])
        first = shared[0]
        if first not in self._affines:
            self._affines[first] = self._graph.affine(shared)
        return self._affines[first]

    def _bytes_of(self, node: Any, layer: str) -> tuple[fx.Node, Affine]:
        """Return a value as uint8."""
        if node not in self._bytes:
            affine = self._affine(node)
            module = Quantize(affine, self._graph.largest)
            module.layer = layer
            self._bytes[node] = self._call(f"{node.name}_quantize", module, self._floats[node]), affine
        return self._bytes[node]

    def _float_of(self, node: fx.Node, layer: str, reads: bool = True) -> fx.Node:
        """Return a value as float32, or for who only asks for its size as what there is."""
        if node not in self._floats:
            made, affine = self._bytes[node]
            if not reads:
                return made
            module = Dequantize(affine, self._graph.largest)
            module.layer = layer
            self._floats[node] = self._call(f"{node.name}_dequantize", module, made)
        return self._floats[node]

    def _convolution(self, node: fx.Node) -> None:
        graph, fused = self._graph, self._graph.module(node)
        a, layer, relu = fused.arguments(), graph.layers[node], _relu(fused)
        source, *rest = cast(tuple[fx.Node, ...], node.args)
        x, stored_x = self._bytes_of(source, layer)
        out = self._affine(node) if node in self._shared else None
        inputs, residual = [x], None
        if rest:
            if out is None:
                inputs.append(self._float_of(rest[0], layer))
            else:
                value, residual = self._bytes_of(rest[0], layer)
                inputs.append(value)
        weight = fold(a.weight.double(), a.scale.double(), torch.float64)
        window: Window = PADDING, STRIDE, [1, 1], 1
        if fused.op != "stem":
            window = list(a.padding), list(a.stride), list(a.dilation), a.groups
        module = Convolution(layer, weight, a.shift, window, stored_x, out, residual, relu, graph.largest)
        if rest and out is None:
            module.overwrites = fused.overwrites
        made = graph.convolutions[node] = self._call(str(node.target), module, *inputs)
        if fused.op == "stem":
            made = self._call(f"{node.name}_pool", MaxPool(*pooling(a.ceil_mode), layer), made)
        if out is None:
            self._floats[node] = made
        else:
            self._bytes[node] = made, out


def _mark_overwritten(gm: fx.GraphModule) -> None:
    """Let each int8 convolution write over a residual in uint8 that nobody reads afterwards.

    Only modules of ours read and make uint8, each result is memory of its own, and nothing shows it as a view.
    """
    order = ir.positions(gm.graph)
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Convolution) and len(node.args) > 1 and module.affine("residual") is not None:
            residual = node.args[1]
            readers = [user for user in residual.users if user is not node]
            module.overwrites = node.args[0] is not residual and all(order[user] < order[node] for user in readers)


def _is_pool(node: fx.Node) -> bool:
    """Return whether it is a max-pool in normal form; a dilated window may lie in the padding, and then gives -inf."""
    usual = node.op == "call_function" and node.target is torch.max_pool2d and len(node.args) == 6 and not node.kwargs
    return usual and node.args[4] in (1, (1, 1), [1, 1])


def _is_cat(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.cat and isinstance(node.args[0], list | tuple)
