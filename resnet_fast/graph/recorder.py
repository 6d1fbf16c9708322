"""A torch function mode that writes every call of torch in its thread down as a graph."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from resnet_fast.nn import pristine

from . import guards
from .calling import SYMBOLIC
from .guards import Refused
from .ir import Layer
from .normalize import is_layer
from .symbols import Symbols, source

#: Reading these says something about memory that a fused graph does not keep.
_OF_MEMORY = {
    "as_strided", "as_strided_", "data_ptr", "is_contiguous", "is_set_to", "_version", "stride", "storage",
    "storage_offset", "untyped_storage", "nbytes", "names", "set_",
}  # fmt: skip
#: Asking these of an input is a decision by its type or its number of dimensions.
_KIND = {"dtype", "ndim", "dim", "ndimension", "is_floating_point", "is_complex"}
_DUNDER_NAMES = {"div": "truediv", "rdiv": "rtruediv", "and": "and_", "or": "or_", "xor": "xor"}
_ARITHMETIC: dict[str, Any] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "add_": operator.iadd, "sub_": operator.isub, "mul_": operator.imul, "div_": operator.itruediv,
}  # fmt: skip
_OF_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}
_OF_ATEN = {"sym_size": "size", "sym_numel": "numel", "sym_stride": "stride"}
_KEPT_ATTRIBUTES = ("T", "mT", "H", "mH", "real", "imag")


class Recorder(pristine.Capturing):
    """Writes every call of torch down that gives or changes a tensor."""

    def __init__(self, root: nn.Module, fake_mode: FakeTensorMode, fixed: bool) -> None:
        super().__init__()
        self._fixed, self._asked = fixed, 0
        self.graph = fx.Graph()
        self._root, self._fake_mode = root, fake_mode
        self._attributes = {id(t): name for name, t in (*root.named_parameters(), *root.named_buffers())}
        self._constants: dict[int, tuple[Tensor, str]] = {}
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self._env = None if fixed else Symbols()
        self._sizes: dict[tuple[fx.Node, int], Any] = {}
        self._queries: dict[str, tuple[fx.Node, int]] = {}
        self._guards = 0
        self._inputs: list[Tensor] = []
        self.asks_kind = False
        self._failed = ""
        self._owners: list[Layer | None] = []  # of the modules that are running; None for those that are not torch.nn's

    # ------------------------------------------------------------------------------------------------ what is called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        func = _public(func)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and name in _OF_MEMORY and _is_method(func):
            self._failed = name
            raise Refused(f"it asks for a tensor's {name}, which a fused graph does not keep")
        if first is not None and name in _KIND and any(first is given for given in self._inputs):
            self.asks_kind = True
        if first is not None and (name in ("shape", "size", "numel", "nelement", "__len__")):
            return self._size(first, name, *args[1:], **kwargs)
        if name in ("batch_norm", "instance_norm") and _updates_statistics(func, args, kwargs):
            raise Refused(f"its {name} updates running statistics")
        if first is not None and name in ("squeeze", "squeeze_"):
            self._squeezed(first, *args[1:], **kwargs)
        self._flush()
        given = map_leaves((args, kwargs), self._to_fake)
        held = [leaf for leaf in _leaves(given) if isinstance(leaf, Tensor)]
        if _may_write(name, kwargs) and any(tensor.is_inference() for tensor in held):
            raise Refused(f"it calls {name} in inference mode, where nobody counts what is written")
        before = [_version(tensor) for tensor in held]
        try:
            result = func(*given[0], **given[1])
        except Exception:
            self._failed = name
            raise
        if not self._fixed and any(isinstance(leaf, SYMBOLIC) for leaf in _leaves((args, kwargs))):
            for leaf in _leaves(result):
                if isinstance(leaf, FakeTensor):
                    leaf.constant = None  # made of a size: nobody may decide by its value of now
        written = [tensor for tensor, version in zip(held, before, strict=True) if _version(tensor) != version]
        made = [leaf for leaf in _leaves(result) if isinstance(leaf, Tensor)]
        if not made and not written:
            symbolic = not held and any(isinstance(leaf, SYMBOLIC) for leaf in _leaves((args, kwargs)))
            return func(*args, **kwargs) if symbolic else result
        self._record(func, name, args, kwargs, result, written)
        return result

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, written: list[Tensor]) -> None:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Refused("it switches autocast on or off")
        op, target, args = _call(func, name, args, kwargs)
        args, kwargs = map_leaves((args, kwargs), self._argument)
        into = [self._node(tensor) for tensor in written]
        node = self.graph.create_node(op, target, args, kwargs, _label(op, target))
        node.meta["written"] = into
        node.meta["layers"] = [self._layer(node)]
        self._keep(node, result)

    def _keep(self, node: fx.Node, result: Any) -> None:
        """Have ``node`` stand for a result, and nodes that take it apart for the tensors in it."""
        node.meta["storages"] = {storage_of(leaf) for leaf in _leaves(result) if isinstance(leaf, Tensor)}
        node.meta["fake"] = result
        if isinstance(result, Tensor):
            if not isinstance(result, FakeTensor):
                raise Refused(f"{node.name} gives a {type(result).__name__}")
            self._nodes[id(result)] = result, node
        elif isinstance(result, tuple | list):
            if not hasattr(result, "_fields"):
                checked = self.graph.call_function(guards.expect_length, (node, len(result)))
                checked.meta.update(written=[], storages=node.meta["storages"])
                node = checked
            for index, item in enumerate(result):
                if isinstance(item, Tensor | tuple | list):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    part.meta["written"] = []
                    self._keep(part, item)
        elif result is not None:
            raise Refused(f"{node.name} gives a {type(result).__name__}")

    def _layer(self, node: fx.Node) -> Layer:
        """Return the author's layer: the module of torch.nn that makes this call, else the call itself."""
        if self._owners and self._owners[-1] is not None:
            return self._owners[-1]
        return Layer(node.name, _label(node.op, node.target))

    # --------------------------------------------------------------------------------------------------- what is given

    def _to_fake(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
            if type(leaf) not in (Tensor, nn.Parameter):
                raise Refused(f"a tensor is a {type(leaf).__name__}")
            return self._fake_mode.from_tensor(leaf)
        return leaf.node.hint if isinstance(leaf, SYMBOLIC) else leaf

    def _argument(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._node(leaf)
        if isinstance(leaf, SYMBOLIC):
            return self._expression(leaf.node.expr)
        if callable(leaf) and not isinstance(leaf, type):
            raise Refused(f"a function of torch is given a {type(leaf).__name__}")
        return leaf

    def _node(self, tensor: Tensor) -> fx.Node:
        found = self._nodes.get(id(tensor))
        if found is not None:
            return found[1]
        if isinstance(tensor, FakeTensor):
            raise Refused("a tensor comes from elsewhere than a call of torch: an earlier run, or a C++ extension")
        name = self._attributes.get(id(tensor))
        if name is None:
            count = len(self._constants)
            name = next(name for n in itertools.count(count) if not hasattr(self._root, name := f"_tensor_constant{n}"))
            self._constants[id(tensor)] = tensor, name
            self._attributes[id(tensor)] = name
        node = self.graph.create_node("get_attr", name)
        fake = self._fake_mode.from_tensor(tensor)
        node.meta.update(written=[], storages={storage_of(fake)}, fake=fake)
        self._nodes[id(tensor)] = tensor, node
        self._nodes[id(fake)] = fake, node
        return node

    def take(self, name: str, tensor: Tensor, device: torch.device | None) -> Tensor:
        """Return an input, to be given to the module in the place of ``tensor``."""
        node = self.graph.placeholder(name)
        with self._fake_mode:
            fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=device or tensor.device)
        node.meta["written"] = []
        self._keep(node, fake)
        self._inputs.append(fake)
        return cast(Tensor, fake)

    def keep_constants(self) -> None:
        """Give the root copies of the tensors that its code took from elsewhere: closures, globals, attributes."""
        for tensor, name in self._constants.values():
            self._root.register_buffer(name, tensor.detach().clone())

    def drop_constants(self) -> None:
        """Take them away again: the root may be captured once more."""
        for _, name in self._constants.values():
            del self._root._buffers[name]

    def give(self, leaves: list[Any], single: bool, part: bool) -> None:
        """End the graph with these results."""
        if self._failed:
            raise Refused(f"it goes on after {self._failed} has failed")
        if part:
            tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
            own = [storage_of(leaf) for leaf in tensors.values()]
            given = {
                storage_of(leaf) for key, leaf in ((id(leaf), leaf) for leaf in self._inputs) if key not in tensors
            }
            if len(set(own)) != len(own) or given & set(own):
                raise Refused("its results share memory, which their reader may write into")
        self._flush()
        values = [self._argument(leaf) for leaf in leaves]
        self.graph.output(values[0] if single else values)

    # ----------------------------------------------------------------------------------------------------------- sizes

    def _size(self, tensor: Tensor, name: str, dim: Any = None) -> Any:
        sizes = [self._symbol(tensor, index) for index in range(tensor.dim())]
        if name in ("numel", "nelement"):
            return functools.reduce(operator.mul, sizes, 1)
        if name == "__len__":
            return sizes[0] if sizes else tensor.__len__()
        return torch.Size(sizes) if dim is None else torch.Size(sizes)[operator.index(dim)]

    def _symbol(self, tensor: Tensor, dim: int) -> Any:
        node = self._node(tensor)
        if node.op == "get_attr":
            return int(tensor.shape[dim])  # a constant's
        if self._fixed:
            if (node, dim) not in self._sizes:
                self._sizes[node, dim] = _size_of(tensor, dim)
            return self._sizes[node, dim]
        if (node, dim) not in self._sizes:
            assert self._env is not None
            self._sizes[node, dim], symbol = self._env.made(_size_of(tensor, dim))
            self._queries[symbol] = node, dim
        return self._sizes[node, dim]

    def _squeezed(self, tensor: Tensor, dim: Any = None) -> None:
        """Ask which sizes are 1: they decide how many dimensions are left."""
        dims = range(tensor.dim()) if dim is None else dim if isinstance(dim, tuple | list) else (dim,)
        for index in dims:
            bool(self._symbol(tensor, index % tensor.dim()) == 1)

    def _expression(self, expression: Any) -> Any:
        if expression.is_number:
            return int(expression) if expression.is_integer else float(expression)
        names, sizes = self._operands(expression)
        if str(expression) == names[0]:
            return sizes[0]
        return self.graph.call_function(guards.compute, (source(expression, names), *sizes))

    def _operands(self, expression: Any) -> tuple[list[str], list[fx.Node]]:
        names = sorted((str(symbol) for symbol in expression.free_symbols), key=list(self._queries).index)
        sizes = []
        for name in names:
            node, dim = self._queries[name]
            size = self.graph.call_method("size", (node, dim))
            size.meta.update(written=[], value=_size_of(node.meta["fake"], dim))
            sizes.append(size)
        return names, sizes

    def _flush(self) -> None:
        """Write down what the author's code has decided by sizes since the last call."""
        if self._fixed:
            for (node, dim), size in itertools.islice(self._sizes.items(), self._asked, None):
                asked = self.graph.call_method("size", (node, dim))
                asked.meta.update(written=[], value=size)
                self.graph.call_function(guards.expect, (f"s0 == {size}", asked)).meta["written"] = []
            self._asked = len(self._sizes)
        for guard in [] if self._env is None else self._env.guards()[self._guards :]:
            self._guards += 1
            names, sizes = self._operands(guard)
            self.graph.call_function(guards.expect, (source(guard, names), *sizes)).meta["written"] = []

    # --------------------------------------------------------------------------------------------------------- modules

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which of the root's modules is running, and record registered layers as one call."""
        undo: list[Callable[[], None]] = []
        for name, module in self._root.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            push = module.register_forward_pre_hook(functools.partial(self._enter, name), prepend=True)
            pop = module.register_forward_hook(self._leave)
            undo += [push.remove, pop.remove]
            if name and (is_layer(module) or pristine.is_frozen_batch_norm(module)) and not pristine.changed(module):
                module.forward = functools.partial(self._layer_call, name, module.forward)
                undo.append(functools.partial(module.__dict__.pop, "forward", None))
        try:
            yield
        finally:
            for each in undo:
                each()

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        kind = type(module)
        theirs = kind.__module__.startswith("torch.nn.modules.") and not isinstance(module, nn.Sequential)
        self._owners.append(Layer(name, kind.__name__) if theirs and name else None)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._owners.pop()

    def _layer_call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            self._flush()
            given = map_leaves((args, kwargs), self._to_fake)
            result = forward(*given[0], **given[1])
            node = self.graph.create_node("call_module", name, *map_leaves((args, kwargs), self._argument))
            node.meta["written"] = []
            node.meta["layers"] = [Layer(name, type(self._root.get_submodule(name)).__name__)]
            self._keep(node, result)
        return result


def _public(func: Any) -> Any:
    """Return the function of torch that an ATen operator, as programs of torch.export call it, is known by."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or "out" in func._overloadname:
        return func
    name = _OF_ATEN.get(func._opname, func._opname)
    owners: tuple[Any, ...] = (Tensor, torch, torch._C._nn, nn.functional)
    return next((found for owner in owners if (found := getattr(owner, name, None)) is not None), func)


def _label(op: str, target: Any) -> str:
    """Return what a call is called in reports."""
    name = str(target) if op == "call_method" else getattr(target, "__name__", "call")
    return _OF_OPERATORS.get(name, name.strip("_"))


def _size_of(tensor: Tensor, dim: int) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.shape[dim])


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _may_write(name: str, kwargs: Mapping[str, Any]) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or "inplace" in kwargs or "out" in kwargs


def _updates_statistics(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a normalisation writes statistics, which no tensor's version tells."""
    try:
        bound = inspect.signature(func).bind(*args, **kwargs)
    except (TypeError, ValueError):  # torch's own function in C++: (input, weight, bias, mean, variance, training, ...)
        return len(args) > 5 and args[3] is not None and args[5] is True
    bound.apply_defaults()
    training = bound.arguments.get("training", bound.arguments.get("use_input_stats", False))
    return bool(training) and bound.arguments.get("running_mean") is not None


def storage_of(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata


def _is_method(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__get__" or getattr(Tensor, name, None) is func or hasattr(torch, name)


def _call(func: Any, name: str, args: Any, kwargs: Any) -> tuple[str, Any, Any]:
    """Return how a graph calls ``func``: as an operator, a method, or the function that it is; and with which args."""
    if getattr(func, "__name__", "") == "__get__":
        if name == "data":
            return "call_method", "detach", args
        if name not in _KEPT_ATTRIBUTES:
            raise Refused(f"it reads a tensor's {name}")
        return "call_function", getattr, (*args, name)
    if getattr(func, "__name__", "") == "__set__":
        raise Refused("it sets an attribute of a tensor")
    if getattr(Tensor, name, None) is func and args and isinstance(args[0], Tensor):
        if name in _ARITHMETIC and len(args) == 2 and not kwargs:
            return "call_function", _ARITHMETIC[name], args  # Python's operators come as these methods
        if not name.startswith("__"):
            return "call_method", name, args
        plain = name.strip("_")
        plain = _DUNDER_NAMES.get(plain, plain)
        if hasattr(operator, plain):
            return "call_function", getattr(operator, plain), args
        if plain.startswith("r") and hasattr(operator, plain[1:]) and len(args) == 2:
            return "call_function", getattr(operator, plain[1:]), args[::-1]
        raise Refused(f"it calls {name} of a tensor")
    return "call_function", func, args


def map_leaves(value: Any, one: Callable[[Any], Any]) -> Any:
    """Apply ``one`` to the leaves of arguments: tuples, lists, dictionaries and slices are gone through."""
    if isinstance(value, tuple):
        items = [map_leaves(item, one) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_leaves(item, one) for item in value]
    if isinstance(value, dict):
        return {key: map_leaves(item, one) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(map_leaves(value.start, one), map_leaves(value.stop, one), map_leaves(value.step, one))
    return one(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    map_leaves(value, found.append)
    return found
