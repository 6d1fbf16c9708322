"""The passes on a graph whose parameters are inputs: what is folded is computed in the graph, at each run, as live
modules do. Gradients flow through it, and a parameter that somebody changes counts at the next run.

Writes into what the caller can see stay where they are, and no layer is moved across a write into what it reads.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from resnet_fast.nn import fused
from resnet_fast.nn.pristine import ordinary

from . import ir, memory, normalize
from .fuse_act import fuse_act
from .fuse_add import fuse_add
from .fuse_head import fuse_head
from .fuse_stem import fuse_stem

#: These ask for the memory format that the author's code was given, where fused ops give channels_last.
_OF_MEMORY = {"as_strided", "as_strided_", "as_strided_scatter", "set_", "view_as_complex", "view_as_real", "resize_"}
_AFFINE: dict[Any, str] = {
    operator.mul: "mul", torch.mul: "mul", operator.add: "add", torch.add: "add", operator.sub: "sub", torch.sub: "sub"
}  # fmt: skip
_NORMS: dict[Any, tuple[str, ...]] = {
    ir.BATCH_NORM: ("running_mean", "running_var", "weight", "bias"),
    torch.batch_norm: ("weight", "bias", "running_mean", "running_var"),
}
_DEVICES = ("cpu", "cuda")


def fuse(gm: fx.GraphModule) -> Counter[str]:
    """Fuse the layers of ``gm`` in place.

    BatchNorm that takes the statistics of the batch is left to others: by torch's compiler it is fused as well.

    Args:
        gm: functions and methods of torch only, no modules; each node's value on fake tensors in
            ``meta["example_value"]``, as Dynamo gives it.

    Returns:
        How often each op was put in; if no convolution was fused, nothing, and the graph is as it was.
    """
    written_by_author, gm.graph = gm.graph, _copied(gm.graph)
    try:
        made = _fuse(gm)
    except normalize.SharedMemoryError:
        made = Counter()
    if not made:
        gm.graph = written_by_author
    return made


def _fuse(gm: fx.GraphModule) -> Counter[str]:
    if not _annotate(gm) or not any(node.target is ir.CONV for node in gm.graph.nodes):
        return Counter()
    gradients = _wants_gradients(gm)
    _follow_writes(gm)
    _remove_in_place(gm)
    _recognise_flatten(gm)
    normalize.rewrite(gm)
    for node in gm.graph.nodes:
        if ir.is_call(node, ir.ADD):
            node.meta["same_shape"] = _same(node.args)
    regions = list(_regions(gm))
    normal = [[node for node in region if node.meta.get("normal")] for region in regions]
    for node in itertools.chain(*normal):
        node.meta["normal"] = False
    for number, region in enumerate(regions):
        # Nothing is fused with what runs under another mode: a pass takes nodes in normal form only.
        for node in region:
            node.meta["region"] = number
        for node in normal[number]:
            node.meta["normal"] = True
        for node in normal[number]:
            if ir.is_call(node, ir.CONV):
                _fold(gm, node, gradients)
        for fuse_more in (fuse_act, fuse_add, fuse_stem, fuse_head):
            fuse_more(gm)
        for node in gm.graph.nodes:
            node.meta["normal"] = False
    made = Counter(op.name for node in gm.graph.nodes if (op := ir.OPS.get(node.target)) is not None)
    if not made["conv_bn_act"] and not made["stem"]:
        return Counter()
    _keep_layouts(gm)
    gm.graph.lint()
    gm.recompile()
    return made


def _copied(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    found: dict[fx.Node, fx.Node] = {}
    made.graph_copy(graph, found)
    for node, copied in found.items():
        if hasattr(node, "_dynamo_source"):  # which AOTAutograd asks for
            copied._dynamo_source = node._dynamo_source
    last = next(node for node in reversed(graph.nodes) if node.op == "output")
    made.output(fx.map_arg(last.args[0], found.__getitem__)).meta = dict(last.meta)
    made._codegen = graph._codegen
    return made


# ------------------------------------------------------------------------------------------------- what Dynamo has seen


def _annotate(gm: fx.GraphModule) -> bool:
    """Write down each node's value, memory and writes as the passes know them; False if the graph must stay."""
    for node in gm.graph.nodes:
        if node.op == "call_module" or "_functorch" in _module_of(node.target):
            return False
        if node.op == "get_attr":
            node.meta.setdefault("example_value", ir.tensor_of(gm, node))
        value = node.meta.get("example_value")
        if value is not None:
            node.meta["value"] = value
        tensors = _tensors(value)
        if not all(ordinary(tensor) and tensor.layout is torch.strided for tensor in tensors):
            return False
        if node.op == "placeholder" and value is None:
            return False
        node.meta["storages"] = {tensor.untyped_storage()._cdata for tensor in tensors}
        node.meta["held"] = node.op in ("placeholder", "get_attr") and isinstance(value, Tensor)
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        viewed = name == "view" and any(isinstance(arg, torch.dtype) for arg in node.args)
        if node.op in ("call_function", "call_method") and (name in _OF_MEMORY or viewed):
            return False
    given = _outputs(gm)
    shown = [storage for node in given if not node.meta["held"] for storage in node.meta["storages"]]
    return len(set(shown)) == len(shown)


def _module_of(target: Any) -> str:
    return str(getattr(target, "__module__", "") or "")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _outputs(gm: fx.GraphModule) -> list[fx.Node]:
    last = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    return list(dict.fromkeys(ir.nodes_in(last.args)))


def _wants_gradients(gm: fx.GraphModule) -> bool:
    switched = any(getattr(node.target, "__name__", "") == "_set_grad_enabled" for node in gm.graph.nodes)
    needed = any(node.meta["held"] and node.meta["value"].requires_grad for node in gm.graph.nodes)
    return needed and (switched or torch.is_grad_enabled())


def _same(values: Iterable[Any]) -> bool:
    """Return whether the values of nodes have one dtype and, whatever the symbolic sizes are, one shape."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq  # it imports sympy

    a, b = (node.meta.get("value") for node in values)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype is not b.dtype or a.dim() != b.dim():
        return False
    return statically_known_true(sym_eq(tuple(a.shape), tuple(b.shape)))


def _regions(gm: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Yield the nodes between calls that switch a mode, such as autocast, or that run other graphs."""
    region: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and _is_border(node):
            yield region
            region = []
        else:
            region.append(node)
    yield region


def _is_border(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    harmless = getattr(node.target, "__name__", "") in ("_assert", "_check", "_assert_async", "setitem")
    return node.meta.get("example_value") is None and not (
        harmless or node.meta.get("written") or node.meta.get("normal")
    )


# ----------------------------------------------------------------------------------------------------- in-place writes


def _written(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose memory ``node`` writes into."""
    if node.target in _NORMS:
        norm = _norm_arguments(node)
        stats = [] if norm is None or norm["training"] is False else [norm["running_mean"], norm["running_var"]]
        return [each for each in stats if isinstance(each, fx.Node)]
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        schemas = [getattr(node.target, name)._schema for name in node.target.overloads()]
        return node.all_input_nodes if any(schema.is_mutable for schema in schemas) else []
    found = memory.written(gm, node)
    name = getattr(node.target, "__name__", "")
    if name.startswith("_foreach_") and name.endswith("_"):
        found = found + ir.nodes_in(node.args[0])
    return found


def _follow_writes(gm: fx.GraphModule) -> None:
    """Have whoever reads a value behind a write into it read what the write returns: that is the same memory."""
    order = ir.positions(gm.graph)
    for node in gm.graph.nodes:
        written = _written(gm, node)
        if len(written) == 1 and _is_the_same_view(node.meta.get("value"), written[0].meta.get("value")):
            written[0].replace_all_uses_with(node, functools.partial(_is_later, order, node))
    for node in gm.graph.nodes:
        node.meta["written"] = _written(gm, node)


def _is_later(order: dict[fx.Node, int], node: fx.Node, user: fx.Node) -> bool:
    return order[user] > order[node]


def _is_the_same_view(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() != b.dim():
        return False
    return a is b or (a.untyped_storage()._cdata == b.untyped_storage()._cdata and _same_numbers(a, b))


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

    layouts = [(tuple(t.shape), tuple(t.stride()), (t.storage_offset(),)) for t in (a, b)]
    return all(statically_known_true(sym_eq(*pair)) for pair in zip(*layouts, strict=True))


def _remove_in_place(gm: fx.GraphModule) -> None:
    """Make writes into what the graph itself has made out of place.

    Raises:
        SharedMemoryError: a write that stays would be seen elsewhere if a value had another memory format.
    """
    shown = memory.sharing(gm.graph)
    order = ir.positions(gm.graph)
    given = {storage for node in gm.graph.nodes if node.meta["held"] for storage in node.meta["storages"]}
    for node in list(gm.graph.nodes):
        overwritten = node.meta["written"]
        x = overwritten[0] if len(overwritten) == 1 else None
        if x is not None and x.meta["storages"] and not given & x.meta["storages"]:
            try:
                normalize.check_shared(node, x, memory.aliases_of(x, shown), order)
                if normalize.make_functional(node, x):
                    node.meta["written"] = []
                    continue
            except normalize.SharedMemoryError:
                pass
        for x in overwritten:
            if not x.meta["held"]:
                normalize.check_shared(node, x, memory.possible_aliases_of(gm, x), order)


def _overtaken(first: fx.Node, last: fx.Node, reads: Iterable[Any]) -> bool:
    """Return whether a node between the two writes into what is read at ``first``, which may then not be read later."""
    read = {storage for node in reads if isinstance(node, fx.Node) for storage in node.meta.get("storages", ())}
    current = first.next
    while current is not last and current.op != "root":
        if any(read & x.meta.get("storages", set()) for x in current.meta.get("written", ())):
            return True
        current = current.next
    return False


# ------------------------------------------------------------------------------------------------------------- layers


def _recognise_flatten(gm: fx.GraphModule) -> None:
    """Write ``x.view(batch, -1)`` as flatten, if the first size is the batch's."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for node in list(gm.graph.nodes):
        if node.op != "call_method" or node.target not in ("view", "reshape") or node.kwargs:
            continue
        x: Any = node.args[0]
        size = pytree.tree_leaves(node.args[1:])
        before, after = x.meta.get("value"), node.meta.get("value")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or (before.dim(), after.dim()) != (4, 2):
            continue
        if size[-1] == -1 and statically_known_true(before.shape[0] == after.shape[0]):
            normalize.put(gm, node, ir.FLATTEN, x, 1)


def _norm_arguments(node: fx.Node) -> dict[str, Any] | None:
    """Return the arguments of a call of ``F.batch_norm`` or ``torch.batch_norm`` by their names."""
    names = ("input", *_NORMS[node.target], "training", "momentum", "eps")
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    if node.target is torch.batch_norm:
        names, defaults = (*names, "cudnn_enabled"), {}
    return normalize.arguments(node, names, defaults)


class _Vector(NamedTuple):
    """One step of a chain behind a convolution: a product, sum or difference with a vector per channel."""

    kind: str
    operand: fx.Node


class _Norm(NamedTuple):
    """One step of a chain behind a convolution: a BatchNorm with stored statistics."""

    mean: fx.Node
    var: fx.Node
    gamma: fx.Node | None
    beta: fx.Node | None
    eps: Any


def _fold(gm: fx.GraphModule, conv: fx.Node, gradients: bool) -> None:
    """Make a convolution with held weights, and the scales and shifts behind it, one conv_bn_act."""
    given: Any = conv.args
    x, weight, bias, *geometry = given
    kernel, out = ir.shape_of(weight), conv.meta.get("value")
    if not ir.is_held(gm, weight) or not (bias is None or ir.is_held(gm, bias)):
        return
    if not isinstance(out, Tensor) or out.dim() != 4 or not out.is_floating_point() or out.device.type not in _DEVICES:
        return
    if kernel is None or not all(isinstance(size, int) for size in kernel):
        return
    chain, reads = [conv], [x, weight, bias]
    steps: list[_Vector | _Norm] = []
    while len(chain[-1].users) == 1 and (step := _step(gm, next(iter(chain[-1].users)), chain[-1], kernel[0])):
        chain.append(next(iter(chain[-1].users)))
        steps.append(step)
        reads += [each for each in step if isinstance(each, fx.Node)]
    # Every step of an optimizer changes the weight, which would be packed anew; the layer alone is as fast as torch.
    if (gradients and not steps) or _overtaken(conv, chain[-1], reads):
        return
    with gm.graph.inserting_before(chain[-1]):
        scale, shift = _scale_and_shift(gm, steps, weight, bias, out)
        arguments = (None, *geometry, "none", False)
        new = ir.call(gm, ir.CONV_BN_ACT, (x, weight, scale, shift, *arguments))
    ir.replace(chain, new)


def _step(gm: fx.GraphModule, node: fx.Node, x: fx.Node, channels: int) -> _Vector | _Norm | None:
    """Return what ``node`` does to ``x``, None if that is no scale and shift per channel in x's dtype."""
    value = x.meta["value"]
    if not isinstance(node.meta.get("value"), Tensor) or node.meta["value"].dtype is not value.dtype:
        return None
    if ir.is_call(node, ir.BATCH_NORM):
        given: Any = node.args
        source, mean, var, gamma, beta, _, _, eps = given
        tensors = [each for each in (mean, var, gamma, beta) if each is not None]
        if source is not x or not all(ir.is_held(gm, each) for each in tensors):
            return None
        wide = any(each.meta["value"].dtype is torch.float64 for each in tensors)
        return None if wide is not (value.dtype is torch.float64) else _Norm(mean, var, gamma, beta, eps)
    kind = _AFFINE.get(node.target) if node.op == "call_function" else None
    if node.meta.get("region") != x.meta.get("region"):
        return None
    if kind is None or len(node.args) != 2 or node.kwargs or (kind == "sub" and node.args[0] is not x):
        return None
    other: Any = node.args[1] if node.args[0] is x else node.args[0]
    vector = other.meta.get("value") if isinstance(other, fx.Node) else None
    if not isinstance(vector, Tensor) or vector.dtype is not value.dtype or not _of_held(gm, other):
        return None
    return _Vector(kind, other) if tuple(vector.shape) in ((1, channels, 1, 1), (channels, 1, 1)) else None


def _of_held(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a value is computed from vectors that are held alone: it is a parameter, nothing of an image."""
    value = node.meta.get("value")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return False
    if sum(size != 1 for size in value.shape) > 1:
        return False
    if node.op in ("placeholder", "get_attr"):
        return ir.is_held(gm, node)
    return bool(node.all_input_nodes) and all(_of_held(gm, source) for source in node.all_input_nodes)


def _scale_and_shift(
    gm: fx.GraphModule, steps: list[_Vector | _Norm], weight: Any, bias: Any, out: Tensor
) -> tuple[fx.Node, fx.Node]:
    """Return nodes, at the insertion point, for the vectors [K] that a chain of steps comes to."""
    dtype = torch.float64 if out.dtype is torch.float64 else torch.float32
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)

    def vector(node: Any) -> Any:
        if node is None:
            return None
        proxy = fx.Proxy(ir.earlier(gm, node), tracer)
        return proxy if node.meta["value"].dtype is dtype else proxy.to(dtype)

    scale, shift = None, vector(bias)
    for step in steps:
        if isinstance(step, _Norm):
            eps = fx.Proxy(step.eps, tracer) if isinstance(step.eps, fx.Node) else step.eps
            mean, var, gamma, beta = (vector(each) for each in step[:4])
            s, t = fused.fold_norm(mean, var, gamma, beta, shift, eps)
            scale, shift = s if scale is None else scale * s, t
            continue
        other = vector(step.operand).flatten()
        if step.kind == "mul":
            scale = other if scale is None else scale * other
            shift = None if shift is None else shift * other
        else:
            other = other if step.kind == "add" else -other
            shift = other if shift is None else shift + other
    options: dict[str, Any] = {"dtype": dtype, "device": out.device}
    channels = weight.meta["value"].shape[0]
    if scale is None:
        scale = fx.Proxy(gm.graph.call_function(torch.ones, (channels,), options), tracer)
    if shift is None:
        shift = fx.Proxy(gm.graph.call_function(torch.zeros, (channels,), options), tracer)
    return scale.node, shift.node


# -------------------------------------------------------------------------------------------------------------- layout


def _keep_layouts(gm: fx.GraphModule) -> None:
    """Give the caller, and code that is not torch's own, NCHW tensors if the author's code would."""
    from torch._prims_common import is_contiguous_or_false

    given = {storage for node in gm.graph.nodes if node.meta.get("held") for storage in node.meta["storages"]}
    for user in list(gm.graph.nodes):
        if user.op != "output" and not _is_foreign(user):
            continue
        for source in user.all_input_nodes:
            value = source.meta.get("value")
            seen = isinstance(value, Tensor) and not given & source.meta.get("storages", set())
            if seen and value.dim() > 2 and is_contiguous_or_false(value):
                with gm.graph.inserting_before(user):
                    user.replace_input_with(source, gm.graph.call_method("contiguous", (source,)))


def _is_foreign(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = target._qualified_op_name if isinstance(target, torch._ops.OpOverloadPacket) else target._schema.name
        return name.partition("::")[0] not in ("aten", "prims", "resnet_fast")
    return False
