"""A lowered graph as calls of the CPU engine: what it holds of the layers runs as few calls, the rest in torch between.

The graph itself stays as it is: it is what a snapshot's ``code``, its report and its exports show. Here a second graph
is made of it, with the same modules, at the first run. In a quantized one uint8 begins and ends inside of convolutions:
the one that makes what is quantized rounds it, the one that adds what is real again reads it as it is stored.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from resnet_fast.backends import cpu
from resnet_fast.ops._op import readable, unmoded

from . import memory
from .guard import Guard, TooLarge
from .plan import Fused
from .quantize_layers import ENGINE, Convolution, Dequantize, MaxPool, Quantize, Quantized, integers


class NotPlanned(Exception):
    """The engine takes no tensors like these."""


class Images(NamedTuple):
    """What is known of a value [N, C, H, W]."""

    channels: int
    dtype: torch.dtype


class Segment(nn.Module):
    """Layers of a graph as one call of the engine.

    Args:
        network: of the engine. single: whether it has one output, which is then given by itself. quantized: whether it
            makes or reads uint8.
    """

    def __init__(self, network: cpu.Network, single: bool, quantized: bool) -> None:
        super().__init__()
        self.training = False
        self.network, self.single, self.quantized = network, single, quantized

    def forward(self, *inputs: Tensor) -> Any:
        dtypes = self.network.given
        images = all(x.dim() == 4 and x.dtype is dtype and x.numel() for x, dtype in zip(inputs, dtypes, strict=True))
        if not images or not readable(inputs) or not unmoded() or (self.quantized and not integers(*inputs)):
            raise NotPlanned
        try:
            outputs = self.network.run(inputs)
        except ValueError as error:  # an image is too small, say: each layer has its own words for it
            raise NotPlanned from error
        except cpu.NotFiniteError as error:
            raise TooLarge from error
        return outputs[0] if self.single else tuple(outputs)


def planned(gm: fx.GraphModule) -> fx.GraphModule | None:
    """Return ``gm`` with the engine's layers as calls of it, as few as can be; None if there are none.

    The result is to be run without gradients and under ``guard.with_separate_relus``.
    """
    nodes = [node for node in gm.graph.nodes if not _is_guard(gm, node)]
    if any(memory.written(gm, node) for node in nodes):
        return None  # the order of what writes and reads would have to be kept
    calls: dict[fx.Node, int] = {}  # which call a layer is part of, counted from 0
    ready: dict[fx.Node, int] = {}  # before which call another node runs; these keep their order
    latest = 0
    known: dict[fx.Node, Images] = {}  # what the engine makes
    converts = not cpu.without_uint8() and any(_is_engines(module) for module in gm.modules())
    for node in nodes:
        made = _made(gm, node, known, converts)
        sources = node.all_input_nodes
        if made is None:
            before = [calls[source] + 1 if source in calls else ready[source] for source in sources]
            if getattr(_module(gm, node), "overwrites", False):  # a residual that all before it may have read
                before += [call + 1 for call in calls.values()]
            ready[node] = latest = max((latest, *before))
        else:
            known[node] = made
            calls[node] = max(calls[source] if source in calls else ready[source] for source in sources)
    if not calls:
        return None
    dtypes = {module.dtype for module in gm.modules() if isinstance(module, Fused) and module.backend == cpu.NAME}
    if len(dtypes) > 1:
        return None  # of a graph that casts between its layers
    graph, root = fx.Graph(), {}
    new: dict[fx.Node, fx.Node] = {}
    for call in range(max((*calls.values(), *ready.values())) + 1):
        for node in nodes:
            if ready.get(node) == call:
                new[node] = graph.node_copy(node, new.__getitem__)
        layers = [node for node in nodes if calls.get(node) == call]
        if layers:
            root[f"engine_{call}"] = _add_call(gm, graph, f"engine_{call}", layers, new, known)
    for node in nodes:
        if node in ready and node.op in ("get_attr", "call_module"):
            root[str(node.target)] = operator.attrgetter(str(node.target))(gm)
    return fx.GraphModule(root, graph, class_name=type(gm).__name__).eval()


def _module(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return the module that a node calls, None if it calls none."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_guard(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(_module(gm, node), Guard)


def _readers(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if not _is_guard(gm, user)]


# --- which layers the engine computes


def _is_engines(module: nn.Module | None) -> bool:
    return isinstance(module, Convolution) and module.backend == ENGINE


def _made(gm: fx.GraphModule, node: fx.Node, known: Mapping[fx.Node, Images], converts: bool) -> Images | None:
    """Return what the engine makes for this node; None if it does not compute it.

    Args:
        known: the values that it makes. converts: whether it takes conversions to and from uint8, too, and its pools.
    """
    module = _module(gm, node)
    if isinstance(module, Quantized):
        return _made_quantized(gm, node, module, known) if converts else None
    if module is None:
        source = node.args[0] if _pool_of(node) else None
        found = known.get(source) if isinstance(source, fx.Node) else None
        return found if found is not None and found.dtype is not torch.uint8 else None
    if not isinstance(module, Fused) or module.backend != cpu.NAME or module.declared.plan is None:
        return None
    if module.image_size is not None or module.options.get("mean") is not None:
        return None  # sizes that it must refuse; bytes, which are normalised first
    weight = module.constants().get("weight")
    if weight is not None:
        return Images(int(weight.shape[0]), module.dtype)
    return next((known[source] for source in node.all_input_nodes if source in known), None)


def _made_quantized(
    gm: fx.GraphModule, node: fx.Node, module: Quantized, known: Mapping[fx.Node, Images]
) -> Images | None:
    if isinstance(module, Convolution):
        made = Images(len(module.weight), torch.float32 if module.affine("out") is None else torch.uint8)
        return made if _is_engines(module) else None
    (source,) = node.all_input_nodes
    channels = known[source].channels if source in known else _wanted(gm, node)
    strange = isinstance(module, MaxPool) and _usual_pool(module.window) is None
    if channels is None or strange:
        return None
    return Images(channels, torch.float32 if isinstance(module, Dequantize) else torch.uint8)


def _wanted(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Return how many channels those that read a value ask for; None if they do not say."""
    for user in node.users:
        module = _module(gm, user)
        found = None
        if isinstance(module, Quantized) and not isinstance(module, Convolution):
            found = _wanted(gm, user)
        elif isinstance(module, Fused | Convolution) and _weight(module) is not None:
            found = _channels_read(module, user, node)
        if found is not None:
            return found
    return None


def _weight(module: Fused | Convolution) -> Tensor | None:
    return module.weight if isinstance(module, Convolution) else module.constants().get("weight")


def _channels_read(module: Fused | Convolution, node: fx.Node, source: fx.Node) -> int:
    """Return the channels of a tensor that a layer with a weight reads: its image, else what is added to its result."""
    weight = _weight(module)
    assert weight is not None
    groups = module.window[3] if isinstance(module, Convolution) else int(module.options.get("groups", 1))
    return int(weight.shape[1]) * groups if source is node.args[0] else int(weight.shape[0])


def _pool_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Return a max-pool's kernel, stride, padding, dilation and ceil_mode; None if it is none in normal form."""
    if node.op != "call_function" or node.target is not torch.max_pool2d or node.kwargs or len(node.args) != 6:
        return None
    return _usual_pool(node.args[1:])


def _usual_pool(window: Sequence[Any]) -> tuple[Any, ...] | None:
    *pairs, ceil_mode = window
    usual = all(isinstance(pair, tuple) and [type(size) for size in pair] == [int, int] for pair in pairs)
    return (*pairs, ceil_mode) if usual and isinstance(ceil_mode, bool) else None


# --- one call


def _add_call(
    gm: fx.GraphModule, graph: fx.Graph, name: str, layers: list[fx.Node], new: dict[fx.Node, fx.Node],
    known: Mapping[fx.Node, Images],
) -> Segment:  # fmt: skip
    """Add a call of the module returned to the graph; what it reads is in ``new``, and what it gives is put there."""
    network = cpu.Network()
    values: dict[fx.Node, int] = {}
    inputs: list[fx.Node] = []
    rounding, adding = _rounding(gm, layers), _adding(gm, layers)
    rounded, added = set(rounding.values()), set(adding.values())

    def value(source: fx.Node, reader: fx.Node) -> int:
        if source not in values:
            values[source] = network.input(*(known.get(source) or _read(gm, reader, source, known[reader].channels)))
            inputs.append(source)
        return values[source]

    for node in layers:
        if node in added:
            continue
        if node in rounded:
            values[node] = values[node.all_input_nodes[0]]
            continue
        module = _module(gm, node)
        sources = [source for source in node.args if isinstance(source, fx.Node)]
        given = [value(source, node) for source in sources if source is not adding.get(node)]
        if module is None:
            values[node] = network.max_pool(given[0], *(_pool_of(node) or ()))
        elif isinstance(module, Convolution):
            residual = module.affine("residual") if len(given) > 1 else None
            if node in adding:
                dequantize = adding[node]
                residual = _module(gm, dequantize).stored_as
                given.append(value(dequantize.all_input_nodes[0], dequantize))
            other = given[1] if len(given) > 1 else None
            first = module.relu == "first" and other is not None
            values[node] = network.convolution(given[0], module.engine(residual), other, bool(module.relu), first)
        elif isinstance(module, MaxPool):
            values[node] = network.max_pool(given[0], *(_usual_pool(module.window) or ()))
        elif isinstance(module, Quantize):
            values[node] = network.quantize(given[0], module.stored_as, module.largest)
        elif isinstance(module, Dequantize):
            values[node] = network.dequantize(given[0], module.stored_as)
        else:
            rest = [None] * (len(module.declared.data) - len(given))
            stored = (_stored(_module(gm, rounding[node])),) if node in rounding else ()
            values[node] = module.declared.plan(network, module.prepare(), [*given, *rest], *stored)
    inside = set(layers)
    outputs = [node for node in layers if node in values and any(user not in inside for user in _readers(gm, node))]
    for node in outputs:
        module = _module(gm, node)
        network.output(values[node], flat=isinstance(module, Fused) and module.op == "head")
    call = graph.call_module(name, tuple(new[source] for source in inputs))
    for index, node in enumerate(outputs):
        new[node] = call if len(outputs) == 1 else graph.call_function(operator.getitem, (call, index))
    quantized = any(isinstance(_module(gm, node), Quantized) for node in layers)
    return Segment(network, len(outputs) == 1, quantized)


def _read(gm: fx.GraphModule, reader: fx.Node, source: fx.Node, made: int) -> Images:
    """Return what a layer of the engine reads that the engine has not made.

    Args:
        made: the channels of what the layer makes.
    """
    module = _module(gm, reader)
    if isinstance(module, Convolution):
        stored = source is reader.args[0] or module.affine("residual") is not None
        return Images(_channels_read(module, reader, source), torch.uint8 if stored else torch.float32)
    if isinstance(module, Quantized):
        return Images(made, torch.float32 if isinstance(module, Quantize) else torch.uint8)
    return Images(made if _weight(module) is None else _channels_read(module, reader, source), module.dtype)


# --- uint8 inside of convolutions


def _rounding(gm: fx.GraphModule, layers: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return the convolutions in float32 whose outputs become uint8 at once, each with the Quantize that says so.

    Nobody else may read them. Max-pools in between do not mind: rounding keeps the order.
    """
    found: dict[fx.Node, fx.Node] = {}
    inside = set(layers)
    for node in layers:
        if not isinstance(_module(gm, node), Quantize):
            continue
        source = node.all_input_nodes[0]
        while source in inside and _pools_numbers(source) and len(_readers(gm, source)) == 1:
            source = source.all_input_nodes[0]
        if source in inside and len(_readers(gm, source)) == 1 and _may_round(_module(gm, source), source):
            found[source] = node
    return found


def _pools_numbers(node: fx.Node) -> bool:
    """Return whether it is a max-pool whose windows all hold some of the image; one that does not gives -inf."""
    pool = _pool_of(node)
    return pool is not None and pool[3] == (1, 1)


def _may_round(module: Any, node: fx.Node) -> bool:
    """Return whether a layer is a convolution that takes less time if it gives uint8."""
    if not isinstance(module, Fused) or module.op not in ("conv_bn_act", "stem") or module.dtype is not torch.float32:
        return False
    weight, a = module.constants()["weight"], module.arguments()
    if len(node.args) > 1 or cpu.slower(torch.uint8, weight.shape, getattr(a, "groups", 1)):
        return False
    # Winograd's filtering has no such form, and saves more than the conversion costs.
    window = (*weight.shape[2:], *getattr(a, "stride", (2, 2)), *getattr(a, "dilation", (1, 1)))
    return tuple(window) != (3, 3, 1, 1, 1, 1) or min(weight.shape[:2]) < 32


def _stored(quantize: Quantize) -> cpu.Stored:
    return cpu.Stored(torch.uint8, out=quantize.stored_as, largest=quantize.largest)


def _adding(gm: fx.GraphModule, layers: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return the int8 convolutions to float32 that add what is stored as uint8, each with the Dequantize that it is
    read through, and nobody else reads."""
    found: dict[fx.Node, fx.Node] = {}
    inside = set(layers)
    for node in layers:
        module = _module(gm, node)
        if not isinstance(module, Convolution) or len(node.args) < 2 or module.relu == "first":
            continue  # ReLU in front of the addition is for residuals in float32 only
        residual: Any = node.args[1]
        if residual in inside and isinstance(_module(gm, residual), Dequantize) and len(_readers(gm, residual)) == 1:
            found[node] = residual
    return found
