"""``quantize``: the fused graph of ``optimize`` with its convolutions in int8, calibrated on images of the user's.

A pass over captured, fused graphs: nothing is traced here. Each convolution takes uint8 and an int8 weight, and gives
uint8 again if a convolution reads it, so that a chain of layers never leaves 8 bits; where a layer that stays float
reads or writes, a value is converted once.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from resnet_fast._dtypes import FLOAT8, LARGEST_FLOAT8
from resnet_fast._warn import reworded, warn
from resnet_fast.backends import onednn_int8
from resnet_fast.ops.stem import pool

from . import batching, calling, ir, memory, quantize_layers, shapes
from .guards import Refused
from .optimize import row_bytes, unplanned
from .plan import Fused
from .quantize_build import Builder, Graph
from .quantize_layers import LARGEST, LARGEST_REDUCED, Quantized, real, stored
from .quantize_observe import Observer
from .quantize_report import LayerQuality, Noise, Quantization, Top1
from .snapshot import OptimizedModule, PartlyOptimizedModule

#: The calibration images are kept while they are used.
_LARGEST_CALIBRATION = 2 << 30
#: How many images are measured at a time: float and int8 results of every layer are kept that long.
_MEASURED_AT_ONCE = 4
#: On how many images each layer is measured; the outputs are on all.
_LAYERS_MEASURED = 32
#: Outputs below this are hardly the network's any more: 20 dB is an error of a tenth.
_POOR = 10.0


class Call(NamedTuple):
    """One calibration batch as the arguments of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def quantize(
    model: nn.Module,
    calibration_batches: Iterable[Any],
    *,
    keep_float: Sequence[str] = (),
    min_sqnr: float | None = None,
    round_image: bool = False,
    float_dtype: torch.dtype | None = None,
    check: bool = True,
    dtype: torch.dtype = torch.int8,
) -> OptimizedModule:
    """Return a frozen copy of ``model`` for inference whose convolutions compute in int8, or in float8 on a GPU.

    It is what :func:`optimize` returns, fused in the same way, with its convolutions' inputs as uint8 (one scale and
    zero point for a tensor) and their weights as int8 (symmetric, one scale for an output channel); sums are int32. The
    first convolution, the layer behind the global average pool, and whatever has no int8 form stay float32, on a GPU
    in half precision. Input and output are the model's own, and every batch and image size is taken. ``report()`` shows
    what it costs in accuracy.

    Ranges of activations are those with the least squared error over the calibration images. An image that holds NaN or
    infinity runs by the definition in float32, slowly, so that its answer is NaN as the model's would be.

    Args:
        model: as for :func:`optimize`: a module in eval mode, float32 on the CPU, float32 or half precision on a GPU;
            others stay as they are, with one warning.
        calibration_batches: an iterable of batches, prepared as those at inference are; 100 to 500 images of the
            training set are usual. A batch is a tensor; or a tuple or list that begins with the model's required
            arguments, as (images, labels) does; or a mapping of its arguments by name (others, and "labels", are left
            out), or one that is itself the only argument. Gone through once and kept in memory, at most 2 GiB.
        keep_float: patterns of layers' names, as ``["layer1.*", "layer4.2.conv3"]``, that stay float32.
        round_image: whether the image becomes uint8, too, so that the first convolution computes in int8. That takes
            less time, and costs accuracy if images have more than 8 bits, or channels of unlike ranges.
        min_sqnr: signal-to-quantization-noise ratio in dB that the outputs must have on the calibration images: as long
            as they have not, the layers that lose most by themselves become float32 again, a tenth at a time.
        float_dtype: what layers that stay floating point compute in, of a model on a GPU: torch.float16, bfloat16 or
            float32. None: the model's half precision, float16 for a model in float32. On a CPU it is float32.
        check: as for :func:`optimize`.
        dtype: torch.int8, or torch.float8_e4m3fn for a model on a GPU of capability 8.9 and up: both weights and
            activations are float8 then, scaled by their largest magnitudes without zero points. Elsewhere nothing is
            quantized, and a warning says why.

    Returns:
        The snapshot; its ``quantization`` is a :class:`Quantization`, which ``report()`` shows too.

    Raises:
        ValueError: there is no calibration image, one holds NaN or infinity or makes some in the network, they are more
            than 2 GiB, a pattern matches no layer, or as :func:`optimize`.
        TypeError: an argument has the wrong type, or as :func:`optimize`.

    Examples:
        >>> import torch
        >>> import resnet_fast as rf
        >>> images = [torch.rand(4, 3, 64, 64) for _ in range(2)]  # in earnest some hundred of the training set
        >>> fast = rf.quantize(rf.resnet18().eval(), images)
        >>> fast(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
        >>> fast.quantization  # print() shows all layers
        <Quantization: 19 of 21 layers in int8, ...>
    """
    if isinstance(model, OptimizedModule):
        raise TypeError("quantize: this module is a snapshot already; give it the original model")
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(keep_float, str) or not all(isinstance(pattern, str) for pattern in keep_float):
        raise TypeError(f"quantize: keep_float is {keep_float!r}; it must be a list of patterns of layers' names")
    if min_sqnr is not None and not (isinstance(min_sqnr, int | float) and min_sqnr == min_sqnr):
        raise TypeError(f"quantize: min_sqnr is {min_sqnr!r}; it must be None or a number of decibels")
    if dtype not in (torch.int8, FLOAT8):
        raise ValueError(f"quantize: dtype is {dtype!r}; it must be torch.int8 or {FLOAT8}")
    if dtype is FLOAT8 and round_image:
        raise ValueError("quantize: round_image goes with dtype=torch.int8")
    rest = _float_dtype(model, float_dtype)
    calls = list(_calls(model, calibration_batches))
    try:
        fast = unplanned(model, dtype=rest, example_inputs=_positional(model, calls[0]), check=check)
    except (TypeError, ValueError) as error:  # in the words of this function's arguments
        said = reworded(error, "optimize", "quantize", "example_inputs", "calibration_batches[0]")
        if said is error:
            raise
        raise said from error
    if isinstance(fast, PartlyOptimizedModule):
        holders = {name: module.__dict__.get("forward") for name, module in fast.model.named_modules()}
        parts = {f"{name}.": part for name, part in holders.items() if isinstance(part, OptimizedModule)}
    else:
        parts = {"": fast}
    graphs = [Graph(prefix, part) for prefix, part in parts.items()]
    for graph in graphs if dtype is FLOAT8 else ():
        graph.largest = LARGEST_FLOAT8
    _choose(fast, graphs, keep_float, round_image)
    if any(graph.chosen for graph in graphs):
        _calibrate(fast, graphs, calls)
    measured = _fit(fast, graphs, calls, min_sqnr)
    return _finished(fast, graphs, calls[0], measured)


def _float_dtype(model: nn.Module, asked: torch.dtype | None) -> torch.dtype | None:
    """Return what the layers that stay floating point compute in, None for the model's own dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    gpu = bool(tensors) and quantize_layers.on_gpu(tensors[0].device)
    allowed = (torch.float32, *_HALVES) if gpu else (torch.float32,)
    if asked is not None and asked not in allowed:
        raise ValueError(
            f"quantize: float_dtype is {asked!r}; it must be None or one of {', '.join(map(str, allowed))} for a model "
            f"on {tensors[0].device if tensors else 'the CPU'}"
        )
    if asked is not None or not gpu or not tensors[0].is_cuda:
        return asked
    own = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return {torch.float32: torch.float16}.get(own)


_HALVES = (torch.float16, torch.bfloat16)


# --- calibration batches


def _calls(model: nn.Module, batches: Any) -> Iterator[Call]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"quantize: calibration_batches is a {type(batches).__name__}; it must be an iterable of batches, such as "
            "a list of tensors or a DataLoader"
        )
    held = images = 0
    for index, batch in enumerate(batches):
        where = f"calibration_batches[{index}]"
        call = _call(model, batch, where)
        tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
        if not tensors:
            raise TypeError(f"quantize: {where} is a {type(batch).__name__} that holds no tensor")
        for tensor in tensors:
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"quantize: {where} holds NaN or infinity, with which no range can be found")
            held += tensor.numel() * tensor.element_size()
        if held > _LARGEST_CALIBRATION:
            raise ValueError(
                f"quantize: calibration_batches are more than {_LARGEST_CALIBRATION >> 30} GiB after {index + 1} "
                "batches; some hundred images are enough"
            )
        if not _images(tensors[0]):
            continue
        images += _images(tensors[0])
        yield pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), call)  # a buffer may be used again
    if not images:
        raise ValueError("quantize: calibration_batches holds no image; it must give at least one")


def _images(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def _call(model: nn.Module, batch: Any, where: str) -> Call:
    """Return a batch as the model's arguments."""
    if isinstance(batch, Tensor):
        return Call((batch,), {})
    parameters = inspect.signature(model.forward).parameters
    needed = [name for name, each in parameters.items() if _is_positional(each) and each.default is each.empty]
    if isinstance(batch, Mapping):
        known = {name: value for name, value in batch.items() if name in parameters and name != "labels"}
        if known and all(name in known for name in needed):
            return Call((), known)
        if len(needed) == 1 and not known:
            return Call((batch,), {})
        raise TypeError(
            f"quantize: {where} has the entries {', '.join(map(str, batch)) or 'none'}; the model takes "
            f"{', '.join(needed or parameters)}"
        )
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        count = calling.required(model)
        if len(batch) < count:
            raise TypeError(f"quantize: {where} has {len(batch)} entries; the model takes {', '.join(needed)}")
        return Call(tuple(batch[:count]), {})
    raise TypeError(f"quantize: {where} is a {type(batch).__name__}; it must be a tensor, a tuple, a list or a mapping")


def _run(fast: nn.Module, call: Call) -> Any:
    """Run a batch, on a copy: a model may write into what it is given."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, tuple(call))
    return fast(*args, **kwargs)


def _is_positional(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)


def _positional(model: nn.Module, call: Call) -> tuple[Any, ...]:
    """Return a call's arguments in their order."""
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    return call.args if not call.kwargs else bound.args


# --- what can be int8


def _choose(fast: OptimizedModule, graphs: list[Graph], patterns: Sequence[str], round_image: bool) -> None:
    """Decide which convolutions may become int8, and say why the others may not."""
    names = {row.name for row in fast.report().rows} | {name for graph in graphs for name in graph.layers.values()}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"quantize: keep_float has {pattern!r}, which matches no layer, such as {min(names)!r}")
    first = True
    for graph in graphs:
        everywhere, computed_by = _why_no_graph(graph), set()
        for node, name in graph.layers.items():
            module = graph.module(node)
            reason = everywhere or _why_float(module, first, round_image)
            if not reason and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                reason = "kept by keep_float"
            if not reason:
                weight, groups = module.constants()["weight"], module.options.get("groups", 1)
                if graph.largest == LARGEST_FLOAT8:
                    reason = quantize_layers.without_float8(groups, graph.snapshot._device)
                elif quantize_layers.on_gpu(graph.snapshot._device):
                    reason = quantize_layers.without_kernel(weight.shape, groups, graph.snapshot._device)
                else:
                    backend = quantize_layers.computed_by(weight.shape, groups)
                    reason = quantize_layers.incapable(backend, LARGEST_REDUCED)
                    computed_by.add(backend)
            if module.op in ("conv_bn_act", "stem"):
                first = False
            if reason:
                graph.reasons[node] = reason
            else:
                graph.chosen[node] = None
        if onednn_int8.NAME in computed_by and graph.chosen and onednn_int8.saturates():
            graph.largest = LARGEST_REDUCED


def _why_no_graph(graph: Graph) -> str:
    snapshot = graph.snapshot
    if snapshot._device.type not in ("cpu", "cuda"):
        return f"the model is on {snapshot._device}, int8 runs on CPUs and GPUs"
    gpu = quantize_layers.on_gpu(snapshot._device)
    if snapshot.dtype not in (torch.float32, *(_HALVES if gpu else ())):
        beside = "float32 and half precision" if gpu else "float32"
        return f"the model computes in {str(snapshot.dtype).removeprefix('torch.')}, int8 stands beside {beside}"
    if any(memory.written(graph.gm, node) for node in graph.gm.graph.nodes):
        return "the graph writes into tensors that it has made"
    return ""


def _why_float(module: Fused, first: bool, round_image: bool) -> str:
    """Return why a fused op stays float32, "" if it may become int8."""
    if module.op == "head":
        return "the scores are computed in float32"
    if module.op not in ("conv_bn_act", "stem"):
        return "no int8 form of this op"
    weight = module.constants()["weight"]
    if not round_image and (first or weight.shape[1] * module.options.get("groups", 1) <= 4):
        return "it reads the image"
    if module.image_size is not None or module.options.get("mean") is not None:
        return "it checks the image's size, or normalises its bytes"
    if weight.shape[0] == 0 or weight.numel() == 0:
        return "it has no channels"
    if not all(bool(tensor.isfinite().all()) for tensor in module.constants().values()):
        return "its weights are not finite"
    return ""


# --- calibration


def _calibrate(fast: OptimizedModule, graphs: list[Graph], calls: list[Call]) -> None:
    """Run the calibration images through the float graph and see what range each value has."""
    for graph in graphs:
        read = {node: None for conv in graph.chosen for node in (conv, *conv.all_input_nodes)}
        graph.observers = {node: Observer() for node in read}
    with _Watching(graphs, [graph.observers for graph in graphs]):
        for index, call in enumerate(calls):
            try:
                _run(fast, call)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"quantize: the model does not accept calibration_batches[{index}]: {shapes.first_line(error)}"
                ) from error
            for graph in graphs:
                broken = next((node for node, each in graph.observers.items() if not each.finite), None)
                if broken is not None:
                    name = graph.layers.get(broken, broken.name)
                    raise ValueError(f"quantize: calibration_batches[{index}] makes NaN or infinity at {name}")
    for graph in graphs:
        for node in list(graph.chosen):
            if not all(graph.observers[value].seen for value in (node, *node.all_input_nodes)):
                graph.keep(node, "no calibration image reached it")


class _Watching:
    """While inside, modules are called on values of the graphs, which run layer by layer and whole batches at once.

    A quantized graph of which nothing is watched runs as its snapshot will.

    Args:
        watched: for each graph, the module to call on a node's value, as it is right behind the node.
        quantized: whether these are nodes of the quantized graphs.
    """

    def __init__(
        self, graphs: list[Graph], watched: Sequence[Mapping[fx.Node, nn.Module]], quantized: bool = False
    ) -> None:
        self._graphs, self._watched, self._quantized = graphs, watched, quantized
        self._added: list[tuple[fx.GraphModule, fx.Node]] = []
        self._kept: list[tuple[Any, ...]] = []

    def __enter__(self) -> None:
        for graph, watched in zip(self._graphs, self._watched, strict=True):
            gm, snapshot = graph.quantized if self._quantized else graph.gm, graph.snapshot
            self._kept.append((snapshot.graph_module, snapshot._separable))
            last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1:]
            for node, module in watched.items():
                name = ir.free_name(gm, "watched")
                gm.add_submodule(name, module)
                with gm.graph.inserting_after(last[0] if node.op == "placeholder" else node):
                    self._added.append((gm, gm.graph.call_module(name, (node,))))
            if watched:
                gm.recompile()
            snapshot.graph_module, snapshot._separable = gm, False
            snapshot._planned = graph.planned if self._quantized and not watched else (None,)

    def __exit__(self, *_: object) -> None:
        for gm, node in self._added:
            gm.graph.erase_node(node)
            gm.delete_submodule(str(node.target))
        for graph, watched, (gm, separable) in zip(self._graphs, self._watched, self._kept, strict=True):
            if self._quantized and not watched:
                graph.planned = graph.snapshot._planned
            if watched:
                (graph.quantized if self._quantized else graph.gm).recompile()
            graph.snapshot.graph_module, graph.snapshot._separable = gm, separable
            graph.snapshot._planned = None


class _Tap(nn.Module):
    """Keeps what it is given, in copies: the memory may be written over."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        self.values: list[Tensor] = []

    def forward(self, x: Tensor) -> None:
        self.values.append(x.clone())


# --- what it costs


class _Measured(NamedTuple):
    """The outputs of the quantized network against those of the float one, and each layer's."""

    outputs: Noise
    layers: dict[str, Noise]
    top1: Top1
    images: int


def _fit(
    fast: OptimizedModule, graphs: list[Graph], calls: list[Call], min_sqnr: float | None
) -> tuple[_Measured | None, tuple[str, ...]]:
    """Make the quantized graphs; leave layers float32 that come out wrong, and as ``min_sqnr`` wants it."""
    while any(graph.chosen for graph in graphs):
        for graph in graphs:
            graph.where = {}
            graph.quantized = Builder(graph).build() if graph.chosen else graph.gm
        right = [_tried(graph) for graph in graphs]
        if not all(right):
            continue
        measured = _measure(fast, graphs, calls)
        found = measured.outputs.sqnr
        if min_sqnr is None:
            if found is None or found >= _POOR:
                return measured, ()
            return measured, (f"the outputs have {found:.1f} dB only: min_sqnr and keep_float leave layers in float32",)
        if found is None or found >= min_sqnr:
            return measured, ()
        chosen = [(graph, node) for graph in graphs for node in graph.chosen]
        losing = sorted(chosen, key=lambda each: each[0].trials[each[1]])
        for graph, node in losing[: max(1, len(losing) // 10)]:
            graph.keep(node, f"float32 for min_sqnr={min_sqnr:g}: {graph.trials[node]:.1f} dB alone")
    return None, ()


_WHOSE = {
    quantize_layers.ENGINE: "the engine's int8",
    onednn_int8.NAME: "oneDNN's int8",
    quantize_layers.TRITON: "Triton's int8",
    quantize_layers.TRITON_FLOAT8: "Triton's float8",
}


def _tried(graph: Graph) -> bool:
    """Run each quantized convolution that is new on its sample image, by itself, and return whether all are right.

    One that fails, or is further from its definition than one step of the output, becomes float32.
    """
    right = True
    for node in [node for node in graph.chosen if node not in graph.trials]:
        module: Any = graph.quantized.get_submodule(str(graph.convolutions[node].target))
        fused = graph.module(node)
        reason, exact, noise = "", graph.sample(node), Noise()
        ways, out = (module.affine("x"), module.affine("residual")), module.affine("out")
        pairs = list(zip((graph.sample(source) for source in node.args), ways, strict=False))
        given = [stored(sample, way, graph.largest) if way else sample for sample, way in pairs]
        try:
            with torch.no_grad():
                found = real(module(*(each.clone() for each in given)), out)
                meant = module.defined(*(real(each, way) for each, (_, way) in zip(given, pairs, strict=True)))
        except (RuntimeError, ValueError) as error:
            reason = f"{_WHOSE[module.backend]} convolution fails: {shapes.first_line(error)}"
        else:
            digits = 1e-4 + (0.0 if module.dtype is torch.float32 else torch.finfo(module.dtype).eps)
            if module.float8:
                digits += 2.0**-9
            step: Any = 1.001 * out.scale if out else max(digits * float(meant.abs().max()), _rounding(module))
            if module.float8:  # whose steps grow with the values
                step = meant.abs() / 8 + out.scale / 448 if out else digits * meant.abs().max()
            if not bool(((found - meant).abs() <= step).all()):
                reason = f"{_WHOSE[module.backend]} convolution gives other numbers than its definition"
        if reason:
            graph.keep(node, reason)
            right = False
            continue
        noise.add(exact, pool(found, fused.options["ceil_mode"]) if fused.op == "stem" else found)
        graph.trials[node] = math.inf if noise.sqnr is None else noise.sqnr
    return right


def _rounding(module: Any) -> float:
    """Return what float32 may lose of an int8 convolution's sum, of zero points that cancel out, say."""
    products = module.weight[0].numel() * LARGEST * 127
    return 2.0**-22 * float(module.affine("x").scale * module.weight_scale.max()) * products


def _measure(fast: OptimizedModule, graphs: list[Graph], calls: list[Call]) -> _Measured:
    """Run the calibration images through both networks."""
    measured, images = _Measured(Noise(extremes=True), {}, Top1(), 0), 0
    for call in itertools.chain.from_iterable(_pieces(graphs, call) for call in calls):
        watched = [graph.layers if images < _LAYERS_MEASURED else {} for graph in graphs]
        taps = [{node: _Tap() for node in layers} for layers in watched]
        with _Watching(graphs, taps):
            exact = _tensors(_run(fast, call))
        found_taps = [
            {graph.where.get(node, (node, None))[0]: _Tap() for node in layers}
            for graph, layers in zip(graphs, watched, strict=True)
        ]
        if images < _LAYERS_MEASURED:
            with _Watching(graphs, found_taps, quantized=True):
                _run(fast, call)
        with _Watching(graphs, [{} for _ in graphs], quantized=True):
            found = _tensors(_run(fast, call))
        images += _images(next(leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)))
        if len(exact) == len(found):
            for one, other in zip(exact, found, strict=True):
                if one.shape == other.shape and bool(one.isfinite().all()):
                    measured.outputs.add(one, other)
                    measured.top1.add(one, other)
        for graph, mine, theirs in zip(graphs, taps, found_taps, strict=True):
            for node, tap in mine.items():
                place, affine = graph.where.get(node, (node, None))
                noise = measured.layers.setdefault(graph.layers[node], Noise())
                for one, other in zip(tap.values, theirs[place].values, strict=False):
                    if one.shape == other.shape:
                        noise.add(one, real(other, affine) if affine else other)
    return measured._replace(images=images)


def _pieces(graphs: list[Graph], call: Call) -> Iterator[Call]:
    """Yield a batch a few images at a time, if the network treats each image by itself."""
    whole = len(graphs) == 1 and not graphs[0].prefix and len(call.args) == 1 and not call.kwargs
    if not (whole and isinstance(call.args[0], Tensor) and not batching.why_not_separable(graphs[0].gm)):
        yield call
        return
    for piece in call.args[0].split(_MEASURED_AT_ONCE):
        yield Call((piece,), {})


def _tensors(result: Any) -> list[Tensor]:
    """Return the floating point tensors of a result; none of an object that nobody knows."""
    try:
        leaves = calling.flatten(result)[0]
    except Refused:
        return []
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


# --- the result


def _finished(
    fast: OptimizedModule,
    graphs: list[Graph],
    call: Call,
    fitted: tuple[_Measured | None, tuple[str, ...]],
) -> OptimizedModule:
    measured, notes = fitted
    qualities: dict[str, LayerQuality] = {}
    moved: dict[str, int | None] = {}
    name_of = "float8" if graphs and graphs[0].largest == LARGEST_FLOAT8 else "int8"
    for graph in graphs:
        for node, name in graph.layers.items():
            noise = None if measured is None else measured.layers.get(name)
            precision = name_of if node in graph.chosen else str(fast.dtype).removeprefix("torch.")
            reason, alone = graph.reasons.get(node, ""), graph.trials.get(node)
            sqnr = None if noise is None else noise.sqnr
            stored = _stored(graph, node)
            quality = LayerQuality(name, graph.module(node).op, precision, reason, alone, sqnr, *stored)
            if name not in qualities or (alone is not None and alone < (qualities[name].alone or math.inf)):
                qualities[name] = quality
        if graph.chosen:
            moved |= _bytes_moved(graph, call)
            graph.snapshot.become(graph.quantized)
    if measured is None:
        reasons = dict.fromkeys(quality.reason for quality in qualities.values() if quality.reason)
        why = "; ".join(reasons) or "the model has no convolution that optimize() fuses"
        notes = (f"nothing is quantized: {why}",)
    layers = tuple(_in_order(fast, qualities))
    reduced = any(graph.largest == LARGEST_REDUCED for graph in graphs)
    quantization = Quantization(layers, bits=7 if reduced else 8, precision=name_of)
    if measured is not None:
        quantization = dataclasses.replace(
            quantization,
            images=measured.images,
            sqnr=measured.outputs.sqnr,
            largest_error=measured.outputs.largest_error,
            largest_output=measured.outputs.largest,
            top1_agreement=measured.top1.agreement,
        )
    for note in notes:
        warn(note, "quantize", "optimize")
    int8 = {
        graph.layers[node]: graph.quantized.get_submodule(str(graph.convolutions[node].target)).backend
        for graph in graphs
        for node in graph.chosen
    }
    fast.quantized_as(
        dataclasses.replace(quantization, notes=notes),
        lambda row: _row(row, int8, moved),
    )
    return fast


def _stored(graph: Graph, node: fx.Node) -> tuple[tuple[float, int] | None, tuple[float, int] | None]:
    """Return how a layer's input and output are stored."""
    if node not in graph.chosen:
        return None, None
    module: Any = graph.quantized.get_submodule(str(graph.convolutions[node].target))
    x, out = (affine and tuple(affine) for affine in (module.affine("x"), module.affine("out")))
    return x, out


def _row(row: Any, int8: Mapping[str, Any], moved: Mapping[str, int | None]) -> Any:
    """Return a row of the report as it is in the quantized graph; ``int8``: what computes the layers that are int8."""
    first = row.fused.partition(" ")[2]
    if first in int8:
        row = dataclasses.replace(row, backend=int8[first])
    if first == row.name and first in moved:
        row = dataclasses.replace(row, bytes_after=moved[first])
    return row


def _in_order(fast: OptimizedModule, qualities: dict[str, LayerQuality]) -> Iterator[LayerQuality]:
    """Yield the layers in the model's order, with convolutions and linear layers that are no fused op."""
    rest = dict(qualities)
    for row in fast.report().rows:
        first = row.fused.partition(" ")[2]
        if first in rest:
            yield rest.pop(first)
        elif not row.fused and row.reason and ("conv" in row.kind.lower() or "linear" in row.kind.lower()):
            yield LayerQuality(row.name, row.kind, "float32", "no int8 form of this layer")
    yield from rest.values()


def _bytes_moved(graph: Graph, call: Call) -> dict[str, int | None]:
    """Return the bytes that each layer's ops move in the quantized graph, conversions to and from uint8 included."""
    gm, snapshot = graph.quantized, graph.snapshot
    found: dict[str, int | None] = {}
    if graph.prefix:  # a part: what it is called with is its model's business
        return dict.fromkeys(graph.layers.values())
    values = shapes.run(gm, snapshot._arguments.tensors_of(call.args, call.kwargs)).values
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Fused | Quantized) and module.layer:
            moved = row_bytes(gm, node, values)
            before = found.get(module.layer, 0)
            found[module.layer] = None if moved is None or before is None else before + moved
    return found
