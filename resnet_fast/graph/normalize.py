"""One form for all graphs: no in-place writes, layers as function calls with constant tensors, arguments positional.

What is not a ResNet layer stays as it is, unless its author registered how to write it in this form. Nothing is fused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fast.nn import pristine
from resnet_fast.nn.pristine import is_frozen_batch_norm
from resnet_fast.ops.common import as_pair, conv_geometry

from . import guards, ir, memory


class SharedMemoryError(Exception):
    """The graph writes in place into memory that another value shows later, so its order of memory must stay."""


_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    torch.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
}
_OUT_OF_PLACE_METHODS = {
    f"{name}_": name
    for name in (
        "relu", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "neg", "abs", "square", "clamp", "add", "sub", "mul", "div"
    )
}  # fmt: skip


def normalize(gm: fx.GraphModule, notes: ir.Notes) -> None:
    """Bring ``gm`` (annotated by shapes.annotate where possible) into the common form, in place.

    Raises:
        SharedMemoryError: an in-place write cannot be replaced; ``gm`` is unusable then.
    """
    _remove_in_place(gm, notes)
    rewrite(gm)
    _fold_constants(gm)
    gm.graph.eliminate_dead_code(lambda node: _has_effect(gm, node))


def rewrite(gm: fx.GraphModule) -> None:
    """Bring the layers of a graph whose in-place writes are gone into the common form."""
    for node in list(gm.graph.nodes):
        handler: Callable[[fx.GraphModule, fx.Node], None] | None = None
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            handler = _batch_norm_module if is_frozen_batch_norm(module) else _MODULES.get(type(module))
        elif node.op == "call_function":
            handler = _FUNCTIONS.get(node.target)
            if (op := ir.OPS.get(node.target)) is not None and len(node.args) == len(op.arguments._fields):
                node.meta["normal"] = True  # a snapshot that is a part of this model
        elif node.op == "call_method":
            handler = _METHODS.get(str(node.target))
        if handler is not None:
            handler(gm, node)


def _has_effect(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node must stay even if nobody reads its value."""
    asks = node.target in (guards.expect, guards.expect_length)
    return asks or bool(memory.written(gm, node)) or (node.op != "call_module" and node.is_impure())


# ---------------------------------------------------------------------------------------------------- in-place writes


def _remove_in_place(gm: fx.GraphModule, notes: ir.Notes) -> None:
    """Make in-place ops out of place. Whoever reads the overwritten value later reads the new value already.

    Those that cannot be work on a copy of what the caller gave: its own code may be run on that yet.
    """
    sharing = memory.sharing(gm.graph)
    order = ir.positions(gm.graph)
    copied: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        overwritten = memory.written(gm, node)
        reached = {x: memory.possible_aliases_of(gm, x) for x in overwritten}
        for x in overwritten:
            aliases = memory.aliases_of(x, sharing)
            check_shared(node, x, aliases, order)
            if given := {other for other in reached[x] | aliases if other.op == "placeholder"}:
                writes = "wrote" if given & (aliases | {x}) else "may write"
                notes.add(f"{ir.name_of(node)} {writes} into the caller's tensor; the snapshot leaves it unchanged")
        if len(overwritten) == 1 and make_functional(node, overwritten[0]):
            node.meta["written"] = []
            continue
        for x in overwritten:
            check_shared(node, x, reached[x], order)
            copied |= {other for other in reached[x] if other.op == "placeholder"}
    for given_node in copied:
        _copy(gm, given_node)


def _copy(gm: fx.GraphModule, given: fx.Node) -> None:
    """Have the graph work on a copy of an argument."""
    with gm.graph.inserting_after([node for node in gm.graph.nodes if node.op == "placeholder"][-1]):
        copy = gm.graph.call_function(torch.clone, (given,))
    copy.meta = dict(given.meta)
    given.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def check_shared(node: fx.Node, x: fx.Node, aliases: set[fx.Node], order: dict[fx.Node, int]) -> None:
    """Raise SharedMemoryError if ``node``, writing into ``x``, changes what a later node reads as another value."""
    now = order[node]
    for other in aliases:
        if order[other] >= now or other is x:
            continue
        if other.op == "get_attr" or any(order[user] > now and ir.reads_data(user) for user in other.users):
            raise SharedMemoryError(f"{node.name} writes into memory that {other.name} shows as well")
    if x.op == "get_attr":
        raise SharedMemoryError(f"{node.name} writes into the model's own tensor {x.target}")


def make_functional(node: fx.Node, x: fx.Node) -> bool:
    """Turn ``node``, which writes into ``x``, into its out-of-place form; False if it has none that is surely equal."""
    target: Any = node.target
    if node.op == "call_method" and target in _OUT_OF_PLACE_METHODS:
        replacement: Any = _OUT_OF_PLACE_METHODS[target]
    elif node.op == "call_function" and target in _OUT_OF_PLACE:
        replacement = _OUT_OF_PLACE[target]
    elif node.op == "call_function" and (position := memory.inplace_position(target)) is not None:
        if len(node.args) > position:
            node.update_arg(position, False)
        else:
            node.update_kwarg("inplace", False)
        return True
    else:
        return False
    if "out" in node.kwargs or not (replacement in ("relu", torch.relu) or _same_type_out_of_place(node, x)):
        return False
    node.target = replacement
    return True


def _same_type_out_of_place(node: fx.Node, x: fx.Node) -> bool:
    """Whether ``x op y`` surely has x's shape and dtype, which an in-place op keeps and type promotion may not."""
    value = x.meta.get("value")
    others = [*node.args[1:], *(value for name, value in node.kwargs.items() if name not in ("alpha", "rounding_mode"))]
    if isinstance(value, int | float):
        return True
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    for other in others:
        if isinstance(other, fx.Node):
            other = other.meta.get("value")
        if isinstance(other, Tensor):
            if other.dtype is not value.dtype:
                return False
        elif not isinstance(other, int | float) and other is not None:
            return False
    return True


# ------------------------------------------------------------------------------------------------------------- layers


def arguments(node: fx.Node, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any] | None:
    """Return the call's arguments by name; None if there are any that are not expected."""
    if len(node.args) > len(names) or any(name not in names for name in node.kwargs):
        return None
    found = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return found if all(name in found for name in names) else None


def register(kind: type[nn.Module], handler: Handler, *, norm: bool = False) -> None:
    """Have ``handler`` rewrite calls of modules of exactly this class, which then are layers that tracing keeps whole.

    Args:
        kind: a module class outside torch.nn.
        handler: called with the graph and the ``call_module`` node; replaces it by :func:`put`, or leaves it.
        norm: whether its tensors may be wider than the model computes in, as a batch norm's statistics are.
    """
    pristine.know(kind)
    _MODULES[kind] = handler
    if norm:
        _NORMS.add(kind)


def is_norm(module: nn.Module) -> bool:
    """Return whether the module's tensors may be wider than the model computes in."""
    return isinstance(module, _BatchNorm) or is_frozen_batch_norm(module) or type(module) in _NORMS


def is_layer(module: nn.Module) -> bool:
    """Return whether a handler is registered for this module's class."""
    return type(module) in _MODULES


def put(gm: fx.GraphModule, node: fx.Node, target: Any, *args: Any) -> None:
    """Replace ``node`` by a call of ``target``."""
    with gm.graph.inserting_before(node):
        new = ir.call(gm, target, args)
    reasons = [layer.reason for layer in ir.layers_of(node)]
    ir.replace([node], new)
    for layer, reason in zip(ir.layers_of(new), reasons, strict=True):
        layer.reason = reason


def _attribute(gm: fx.GraphModule, node: fx.Node, name: str) -> fx.Node | None:
    """Return a ``get_attr`` node, placed before ``node``, for a tensor of the module that ``node`` calls."""
    value = getattr(gm.get_submodule(str(node.target)), name, None)
    if not isinstance(value, Tensor):
        return None
    with gm.graph.inserting_before(node):
        new = gm.graph.create_node("get_attr", f"{node.target}.{name}")
    new.meta["value"] = torch.empty_like(value, device="meta", requires_grad=False)
    return new


def _conv(gm: fx.GraphModule, node: fx.Node, x: Any, weight: Any, bias: Any, *geometry: Any) -> None:
    stride, padding, dilation, groups = geometry
    value = weight.meta.get("value") if isinstance(weight, fx.Node) else None
    if not isinstance(value, Tensor) or not all(isinstance(each, int) for each in (groups, *value.shape)):
        return ir.reject(node, "its weight or geometry is not constant")
    pairs = conv_geometry(stride, padding, dilation, value.shape[2:])
    if pairs is None:
        same = f"padding={padding!r} is not the same on both sides"
        return ir.reject(node, same if isinstance(padding, str) else "its weight or geometry is not constant")
    put(gm, node, ir.CONV, x, weight, bias, *pairs, groups)


def _conv_function(gm: fx.GraphModule, node: fx.Node) -> None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    found = arguments(node, names, {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    if found is not None:
        _conv(gm, node, *(found[name] for name in names))


def _batch_norm_module(gm: fx.GraphModule, node: fx.Node) -> None:
    module: Any = gm.get_submodule(str(node.target))
    found = arguments(node, ("input",), {}) or arguments(node, ("x",), {})
    if found is None:
        return None
    mean, var = _attribute(gm, node, "running_mean"), _attribute(gm, node, "running_var")
    if mean is None or var is None:
        return ir.reject(node, "it keeps no running statistics, so it normalises with those of the batch")
    weight, bias = _attribute(gm, node, "weight"), _attribute(gm, node, "bias")
    (x,) = found.values()
    return put(gm, node, ir.BATCH_NORM, x, mean, var, weight, bias, False, 0.0, module.eps)


def _batch_norm_function(gm: fx.GraphModule, node: fx.Node) -> None:
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    names: tuple[str, ...] = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    if node.target is torch.batch_norm:
        names = ("input", "weight", "bias", "running_mean", "running_var", *names[5:], "cudnn_enabled")
    found = arguments(node, names, defaults)
    if found is None:
        return None
    if found["training"] is not False or found["running_mean"] is None or found["running_var"] is None:
        return ir.reject(node, "it normalises with the statistics of the batch")
    order = ("input", "running_mean", "running_var", "weight", "bias")
    return put(gm, node, ir.BATCH_NORM, *(found[name] for name in order), False, 0.0, found["eps"])


def _relu(gm: fx.GraphModule, node: fx.Node) -> None:
    found = arguments(node, ("input", "inplace"), {"inplace": False})
    if found is not None and not found["inplace"] and isinstance(found["input"], fx.Node):
        put(gm, node, ir.RELU, found["input"])


def _add(gm: fx.GraphModule, node: fx.Node) -> None:
    found = arguments(node, ("input", "other", "alpha"), {"alpha": 1})
    if found is None or found["alpha"] != 1:
        return ir.reject(node, "it scales one operand")
    if not (memory.is_tensor(found["input"]) and memory.is_tensor(found["other"])):
        return ir.reject(node, "its operands are not known to be tensors")
    return put(gm, node, ir.ADD, found["input"], found["other"])


def _max_pool_function(gm: fx.GraphModule, node: fx.Node) -> None:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    found = arguments(node, names, defaults)
    if found is not None and found["return_indices"] is False:
        _max_pool(gm, node, *(found[name] for name in names[1:-1]))


def _max_pool(gm: fx.GraphModule, node: fx.Node, kernel: Any, stride: Any, *rest: Any) -> None:
    padding, dilation, ceil_mode = rest
    stride = kernel if stride is None or stride == () or stride == [] else stride
    pairs = [as_pair(value) for value in (kernel, stride, padding, dilation)]
    x = node.args[0] if node.args else node.kwargs.get("input")
    if all(value is not None for value in pairs) and isinstance(ceil_mode, bool) and isinstance(x, fx.Node):
        put(gm, node, ir.MAX_POOL, x, *pairs, ceil_mode)


def _avg_pool_function(gm: fx.GraphModule, node: fx.Node) -> None:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    defaults = {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    found = arguments(node, names, defaults)
    if found is not None:
        _avg_pool(gm, node, *(found[name] for name in names))


def _avg_pool(gm: fx.GraphModule, node: fx.Node, x: Any, kernel: Any, stride: Any, padding: Any, *rest: Any) -> None:
    ceil_mode, counts_padding, divisor = rest
    stride = kernel if stride is None or stride == () or stride == [] else stride
    pairs = [as_pair(value) for value in (kernel, stride, padding)]
    flags = isinstance(ceil_mode, bool) and isinstance(counts_padding, bool)
    if all(value is not None for value in pairs) and flags and divisor is None and isinstance(x, fx.Node):
        put(gm, node, ir.AVG_POOL, x, *pairs, ceil_mode, counts_padding)


def _adaptive_function(gm: fx.GraphModule, node: fx.Node) -> None:
    found = arguments(node, ("input", "output_size"), {})
    if found is not None:
        _adaptive(gm, node, found["input"], found["output_size"])


def _adaptive(gm: fx.GraphModule, node: fx.Node, x: Any, size: Any) -> None:
    pair = as_pair(size)
    if pair is not None and isinstance(x, fx.Node):
        put(gm, node, ir.ADAPTIVE_AVG_POOL, x, pair)


def _mean(gm: fx.GraphModule, node: fx.Node) -> None:
    """Only the mean over height and width: ``torch.mean(x, (2, 3), keepdim)``."""
    found = arguments(node, ("input", "dim", "keepdim"), {"keepdim": False})
    shape = ir.shape_of(found["input"]) if found else None
    if found is None or shape is None or len(shape) != 4 or not isinstance(found["dim"], tuple | list):
        return
    if sorted(d % 4 for d in found["dim"] if isinstance(d, int)) == [2, 3] and isinstance(found["keepdim"], bool):
        put(gm, node, ir.MEAN, found["input"], (2, 3), found["keepdim"])


def _flatten_function(gm: fx.GraphModule, node: fx.Node) -> None:
    found = arguments(node, ("input", "start_dim", "end_dim"), {"start_dim": 0, "end_dim": -1})
    if found is not None:
        _flatten(gm, node, found["input"], found["start_dim"], found["end_dim"])


def _flatten(gm: fx.GraphModule, node: fx.Node, x: Any, start: Any, end: Any) -> None:
    shape = ir.shape_of(x)
    if isinstance(x, fx.Node) and start == 1 and (end == -1 or (shape is not None and end == len(shape) - 1)):
        put(gm, node, ir.FLATTEN, x, 1)


def _view(gm: fx.GraphModule, node: fx.Node) -> None:
    """``x.view(x.size(0), -1)`` is flatten; other views become reshapes, since fused ops give channels_last tensors."""
    x, *size = node.args
    if len(size) == 1 and isinstance(size[0], tuple | list):
        size = list(size[0])
    if any(isinstance(item, torch.dtype) for item in size) or node.kwargs:
        return
    shape = ir.shape_of(x)
    if len(size) == 2 and size[1] == -1 and shape is not None and len(shape) > 1 and _is_batch_size(size[0], x):
        put(gm, node, ir.FLATTEN, x, 1)
    else:
        node.target = "reshape"


def _view_as(gm: fx.GraphModule, node: fx.Node) -> None:
    """What a fused op gives may be channels_last, which ``view_as`` does not take."""
    node.target = "reshape_as"


def _is_batch_size(value: Any, x: Any) -> bool:
    """Return whether ``value`` is the size of the batch that ``x`` belongs to."""
    size = isinstance(value, fx.Node) and value.op == "call_method" and value.target == "size"
    return size and value.args[1:] == (0,) and _batch(value.args[0]) is _batch(x)


def _batch(value: Any) -> Any:
    """Return the first value that has as many images as ``value``."""
    while any(ir.is_call(value, kind) for kind in _PER_IMAGE):
        value = value.args[0]
    return value


def _linear_function(gm: fx.GraphModule, node: fx.Node) -> None:
    found = arguments(node, ("input", "weight", "bias"), {"bias": None})
    if found is not None:
        put(gm, node, ir.LINEAR, found["input"], found["weight"], found["bias"])


def _remove(gm: fx.GraphModule, node: fx.Node) -> None:
    """A layer that hands its input on."""
    if len(node.args) < 1 or not isinstance(node.args[0], fx.Node):
        return
    for layer in ir.layers_of(node):
        layer.removed = True
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)


def _dropout_function(gm: fx.GraphModule, node: fx.Node) -> None:
    names, defaults = ("input", "p", "training", "inplace"), {"p": 0.5, "training": True, "inplace": False}
    found = arguments(node, names, defaults)
    if found is not None and found["training"] is False:
        _remove(gm, node)


Handler = Callable[[fx.GraphModule, fx.Node], None]
_NORMS: set[type[nn.Module]] = set()
_MODULES: dict[type[nn.Module], Handler] = {}
#: What gives one image for each image of its first argument.
_PER_IMAGE = (ir.CONV, ir.BATCH_NORM, ir.RELU, ir.MAX_POOL, ir.AVG_POOL, ir.ADAPTIVE_AVG_POOL, ir.MEAN)
_FUNCTIONS: dict[Any, Handler] = {
    torch.conv2d: _conv_function,
    F.batch_norm: _batch_norm_function,
    torch.batch_norm: _batch_norm_function,
    F.relu: _relu,
    torch.relu: _relu,
    operator.add: _add,
    torch.add: _add,
    F.max_pool2d: _max_pool_function,
    torch.max_pool2d: _max_pool_function,
    F.avg_pool2d: _avg_pool_function,
    F.adaptive_avg_pool2d: _adaptive_function,
    torch._C._nn.adaptive_avg_pool2d: _adaptive_function,
    torch.mean: _mean,
    torch.flatten: _flatten_function,
    F.linear: _linear_function,
    F.dropout: _dropout_function,
    torch.dropout: _dropout_function,
    F.dropout1d: _dropout_function,
    F.dropout2d: _dropout_function,
    F.dropout3d: _dropout_function,
}
# What was put in the place of torch's functions before this package was imported is somebody's own.
_FUNCTIONS = {function: handler for function, handler in _FUNCTIONS.items() if pristine.own(function)}
_METHODS: dict[str, Handler] = {
    "relu": _relu,
    "add": _add,
    "mean": _mean,
    "flatten": _flatten_function,
    "view": _view,
    "view_as": _view_as,
    "reshape": _view,
}


# ---------------------------------------------------------------------------------------------------------- constants

_PURE_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub, torch.mul,
    torch.div, torch.rsqrt, torch.sqrt, torch.reshape, torch.matmul, torch.mean, torch.std, torch.var, torch.sum,
    torch.abs, torch.square, F.normalize,
}  # fmt: skip
_PURE_METHODS = {
    "add", "sub", "mul", "div", "rsqrt", "sqrt", "reshape", "reshape_as", "view", "view_as", "unsqueeze", "to", "float",
    "neg", "abs", "square", "pow", "mean", "std", "var", "sum", "clamp", "matmul", "t", "transpose", "permute",
    "flatten", "expand_as", "detach",
}  # fmt: skip


def _fold_constants(gm: fx.GraphModule) -> None:
    """Compute arithmetic on constant tensors once: a frozen batch norm that was traced through consists of it.

    The float64 result is kept beside the one in the model's precision, for folding into a convolution.
    """
    for node in list(gm.graph.nodes):
        pure = (node.op == "call_function" and node.target in _PURE_FUNCTIONS) or (
            node.op == "call_method" and node.target in _PURE_METHODS
        )
        pure |= node.target is F.batch_norm and node.args[1:3] == (None, None)  # standardises, as of weights
        inputs = node.all_input_nodes
        tensors = [ir.tensor_of(gm, source) for source in inputs]
        if not pure or not inputs or any(tensor is None or not tensor.is_floating_point() for tensor in tensors):
            continue
        as_is: dict[fx.Node, Any] = dict(zip(inputs, tensors, strict=True))
        wide = {source: source.meta.get("wide", tensor.double()) for source, tensor in as_is.items()}
        with torch.no_grad():
            results = [_evaluate(node, values) for values in (as_is, wide)]
        with gm.graph.inserting_before(node):
            new = ir.add_constant(gm, f"constant_{node.name}", results[0].clone())
        new.meta["wide"] = results[1].double()
        for layer in ir.layers_of(node):
            layer.removed = True
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
