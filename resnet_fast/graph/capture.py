"""From a module to an ``fx.GraphModule``, by running the module's own code once on tensors without data.

The author's code runs as Python runs it: replaced methods, patched classes, hooks, flags, defaults and isinstance are
what they are. A torch function mode, which exists in the running thread alone, sees each call of torch and writes it
down; nothing of the process is patched. Sizes that the code asks for are symbols: what it computes from them stands in
the graph, and where it decides by them, the graph asks again (`guards.expect`). No layer is understood here; that is
normalize.py.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from resnet_fast.nn import pristine

from . import guards, shapes
from .ir import Layer
from .normalize import is_layer
from .shapes import first_line

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
#: What may stand in an output beside tensors.
_INERT = (
    int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_UNKNOWN_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
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
_KEPT_ATTRIBUTES = ("T", "mT", "H", "mH", "real", "imag")


class _Tensor(Enum):
    """What stands in the place of a tensor in the form of a call's arguments."""

    TENSOR = "a tensor"


_TENSOR = _Tensor.TENSOR


class Refused(Exception):
    """The module cannot be written down as a graph; the message says why, in one line."""


@dataclasses.dataclass(eq=False)
class Captured:
    """A module as a graph.

    Attributes:
        gm: takes the tensors of the module's arguments, in their order, and returns the leaves of its result (the
            result itself if it is a tensor).
        arguments: how a call's arguments become these tensors. form: of the result, None if it is a tensor.
        guarded: whether the code may do something else for other inputs: it asks about sizes, about an input's type or
            dimensions, or catches exceptions. asks_kind: the second of these.
    """

    gm: fx.GraphModule
    arguments: Arguments
    form: Any
    guarded: bool
    asks_kind: bool


class Arguments:
    """The arguments that a module was captured with: names, nesting, and all that is no tensor."""

    def __init__(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._signature = _signature(forward)
        self._form = self._bound(args, kwargs)
        leaves, spec = pytree.tree_flatten(self._form)
        self._form = pytree.tree_unflatten([_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        self._kinds = [(leaf.dim(), leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)]
        #: Whether every call that the module accepts has the form of these.
        values = list(self._form.values())
        self.fixed = len(self._signature.parameters) == 1 and values == [_TENSOR]
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_INERT)):
                raise Refused(f"an argument holds a {type(leaf).__module__}.{type(leaf).__qualname__}")

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        return {
            name: value
            for name, value in bound.arguments.items()
            if name in given or not isinstance(value, Tensor)  # the code has its own default
        }

    def tensors_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors of a call in the order of the graph's inputs.

        Raises:
            OutsideGuards: the arguments are of another form, or another flag is given.
            TypeError: the module takes no such arguments.
        """
        if self.fixed and len(args) == 1 and not kwargs:
            found = [*args]
        else:
            leaves, spec = pytree.tree_flatten(self._bound(args, kwargs))
            values, known = pytree.tree_flatten(self._form)
            if spec != known:
                raise guards.OutsideGuards("arguments of another form than those it was made with")
            for leaf, value in zip(leaves, values, strict=True):
                if not (isinstance(leaf, Tensor) if value is _TENSOR else _equal(leaf, value)):
                    raise guards.OutsideGuards(f"an argument is not {_short(value)}, as it was")
            found = [leaf for leaf, value in zip(leaves, values, strict=True) if value is _TENSOR]
        for leaf, (rank, dtype) in zip(found, self._kinds, strict=True):
            if leaf.dim() != rank:
                raise guards.OutsideGuards("a tensor of another number of dimensions")
            if leaf.dtype is not dtype and not (leaf.is_floating_point() and dtype.is_floating_point):
                raise guards.OutsideGuards("a tensor of another type")
        return found

    def is_tensor(self, name: str) -> bool:
        """Return whether the argument of this name is a tensor itself, not a nest that holds some."""
        return self._form.get(name) is _TENSOR

    def placeholders(self) -> Iterator[str]:
        """Yield a name for each tensor: its parameter's, with a number if the parameter holds several."""
        for name, value in self._form.items():
            held = [leaf for leaf in pytree.tree_leaves(value) if leaf is _TENSOR]
            for number, _ in enumerate(held):
                yield name if len(held) == 1 else f"{name}_{number}"


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Return names and defaults, without annotations."""
    signature = inspect.signature(forward)
    empty = inspect.Parameter.empty
    return inspect.Signature([each.replace(annotation=empty) for each in signature.parameters.values()])


def required(module: nn.Module) -> int:
    """Return how many positional arguments a module needs, 1 if it takes any number."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return sum(each.default is each.empty for each in positional) or 1


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or (type(a) is type(b) and bool(a == b))
    except Exception:
        return False


def _short(value: Any) -> str:
    return "a tensor" if value is _TENSOR else repr(value)[:60]


@dataclasses.dataclass(frozen=True)
class _Dataclass:
    """The form of a dataclass in a result."""

    kind: type
    fields: dict[str, Any]


def flatten(value: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a result, and its form for `unflatten`: the same nest with their indices in their places.

    Tuples, lists, dictionaries, what else torch's pytree knows, and dataclasses are gone through.

    Raises:
        Refused: an object may hold tensors that nobody sees.
    """
    leaves: list[Any] = []

    def one(leaf: Any) -> Any:
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
            return _Dataclass(type(leaf), pytree.tree_map(one, fields))
        if not isinstance(leaf, (Tensor, *_INERT, *_SYMBOLIC)):
            raise Refused(f"its result holds a {type(leaf).__module__}.{type(leaf).__qualname__}")
        leaves.append(leaf)
        return len(leaves) - 1

    return leaves, pytree.tree_map(one, value)


def unflatten(form: Any, leaves: Sequence[Any]) -> Any:
    """Return a result of this form."""

    def one(index: Any) -> Any:
        if not isinstance(index, _Dataclass):
            return leaves[index]
        made: Any = object.__new__(index.kind)
        for name, value in unflatten(index.fields, leaves).items():
            object.__setattr__(made, name, value)
        return made

    return pytree.tree_map(one, form)


def _map(value: Any, one: Callable[[Any], Any]) -> Any:
    """Apply ``one`` to the leaves of arguments: tuples, lists, dictionaries and slices are gone through."""
    if isinstance(value, tuple):
        items = [_map(item, one) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_map(item, one) for item in value]
    if isinstance(value, dict):
        return {key: _map(item, one) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(_map(value.start, one), _map(value.stop, one), _map(value.step, one))
    return one(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _map(value, found.append)
    return found


class _Numbers(Exception):
    """Symbols do not stand for the sizes in this computation: numbers must."""


class Symbols:
    """Symbolic sizes, and what is decided by them."""

    def __init__(self) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # it imports sympy

        self._env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        self._count = 0

    def made(self, size: int) -> tuple[Any, str]:
        """Return a symbolic size that is ``size`` now, and its symbol's name."""
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        source = ConstantSource(f"size{self._count}")
        self._count += 1
        # Not known to be positive: a batch may be empty.
        symbol = self._env.create_symbol(
            size, source, dynamic_dim=DimDynamic.DYNAMIC, positive=None, do_not_specialize_zero_one=True
        )
        return self._env.create_symintnode(symbol, hint=size, source=source), str(symbol)

    def guards(self) -> list[Any]:
        """Return the expressions that were found true so far."""
        return [guard.expr for guard in self._env.guards]


def _source(expression: Any, names: list[str]) -> str:
    """Return an expression as Python, its symbols as s0, s1 ...

    Raises:
        _Numbers: it has decimal factors, which sympy has put together in another order than Python would.
    """
    import sympy  # type: ignore[import-untyped]
    from torch.utils._sympy.printers import PythonPrinter

    for factor in expression.atoms(sympy.Float):
        if not (float(factor) * 1024).is_integer():
            raise _Numbers
    return guards.numbered(PythonPrinter().doprint(expression), names)


class _Recorder(pristine.Capturing):
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
        given = _map((args, kwargs), self._to_fake)
        held = [leaf for leaf in _leaves(given) if isinstance(leaf, Tensor)]
        if _may_write(name, kwargs) and any(tensor.is_inference() for tensor in held):
            raise Refused(f"it calls {name} in inference mode, where nobody counts what is written")
        before = [_version(tensor) for tensor in held]
        try:
            result = func(*given[0], **given[1])
        except Exception:
            self._failed = name
            raise
        if not self._fixed and any(isinstance(leaf, _SYMBOLIC) for leaf in _leaves((args, kwargs))):
            for leaf in _leaves(result):
                if isinstance(leaf, FakeTensor):
                    leaf.constant = None  # made of a size: nobody may decide by its value of now
        written = [tensor for tensor, version in zip(held, before, strict=True) if _version(tensor) != version]
        made = [leaf for leaf in _leaves(result) if isinstance(leaf, Tensor)]
        if not made and not written:
            symbolic = not held and any(isinstance(leaf, _SYMBOLIC) for leaf in _leaves((args, kwargs)))
            return func(*args, **kwargs) if symbolic else result
        self._record(func, name, args, kwargs, result, written)
        return result

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, written: list[Tensor]) -> None:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Refused("it switches autocast on or off")
        op, target, args = _call(func, name, args, kwargs)
        args, kwargs = _map((args, kwargs), self._argument)
        into = [self._node(tensor) for tensor in written]
        node = self.graph.create_node(op, target, args, kwargs, _label(op, target))
        node.meta["written"] = into
        node.meta["layers"] = [self._layer(node)]
        self._keep(node, result)

    def _keep(self, node: fx.Node, result: Any) -> None:
        """Have ``node`` stand for a result, and nodes that take it apart for the tensors in it."""
        node.meta["storages"] = {_storage(leaf) for leaf in _leaves(result) if isinstance(leaf, Tensor)}
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
        return leaf.node.hint if isinstance(leaf, _SYMBOLIC) else leaf

    def _argument(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._node(leaf)
        if isinstance(leaf, _SYMBOLIC):
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
        node.meta.update(written=[], storages={_storage(fake)}, fake=fake)
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
            own = [_storage(leaf) for leaf in tensors.values()]
            given = {_storage(leaf) for key, leaf in ((id(leaf), leaf) for leaf in self._inputs) if key not in tensors}
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
        return self.graph.call_function(guards.compute, (_source(expression, names), *sizes))

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
            self.graph.call_function(guards.expect, (_source(guard, names), *sizes)).meta["written"] = []

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
            given = _map((args, kwargs), self._to_fake)
            result = forward(*given[0], **given[1])
            node = self.graph.create_node("call_module", name, *_map((args, kwargs), self._argument))
            node.meta["written"] = []
            node.meta["layers"] = [Layer(name, type(self._root.get_submodule(name)).__name__)]
            self._keep(node, result)
        return result


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


def _storage(tensor: Tensor) -> int:
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


def capture(
    root: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device | None = None,
    part: bool = False,
    fixed: bool = False,
) -> Captured:
    """Return the graph that ``root`` computes for such arguments; ``root`` is run, and belongs to the graph then.

    Args:
        root: a module in eval mode, a copy that nobody else uses.
        args, kwargs: its arguments; of tensors only shape and dtype are read.
        device: what the tensors are on; None for their own.
        part: leave the hooks of ``root`` itself out, and refuse a module that writes into what it is given.
        fixed: whether sizes are plain numbers to the code, which the graph then asks for at each run.

    Raises:
        Refused: the code decides by values, or does what cannot be written down.
        Exception: whatever the module raises for such arguments.
    """
    arguments = Arguments(root.forward, args, kwargs)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(root, fake_mode, fixed)
    names = arguments.placeholders()
    given = pytree.tree_map_only(
        Tensor, lambda tensor: recorder.take(next(names), tensor, device), (tuple(args), dict(kwargs))
    )
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in root.modules()]
    try:
        with plain_modes(), recorder.watching(), fake_mode, recorder:
            before = _identities(given)
            result = (root.forward if part else root)(*given[0], **given[1])
            if _identities(given) != before:
                raise Refused("it writes into a list or dictionary that it is given")
            leaves, form = flatten(result)
            recorder.give(leaves, isinstance(result, Tensor), part)
    except _UNKNOWN_VALUES as error:
        raise Refused(f"its code decides by values ({first_line(error)})") from error
    finally:
        replaced = [name for each in held for name in _restored(*each, fake_mode)]
    if replaced:
        raise Refused(f"it puts what it computes in the place of {replaced[0]}, a parameter or buffer of its own")
    recorder.keep_constants()
    gm = fx.GraphModule(root, recorder.graph, class_name=type(root).__name__)
    recorder.drop_constants()
    gm.training = False
    for node in gm.graph.nodes:
        if "fake" in node.meta:
            node.meta["value"] = pytree.tree_map_only(FakeTensor, _without_data, node.meta.pop("fake"))
        if part and any(source.op == "placeholder" for source in node.meta.get("written", ())):
            raise Refused("it writes into its argument")
    _mark_made(gm)
    guarded = any(node.target in (guards.expect, guards.expect_length) for node in gm.graph.nodes)
    guarded |= recorder.asks_kind or any(_catches(module) for module in root.modules())
    return Captured(gm, arguments, None if isinstance(result, Tensor) else form, guarded, recorder.asks_kind)


def _catches(module: nn.Module) -> bool:
    """Return whether a module's own forward catches exceptions (or has a ``with``, which looks the same)."""
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    if code is None or type(module).__module__.startswith("torch."):
        return False
    return any(step.opname in ("SETUP_FINALLY", "PUSH_EXC_INFO") for step in dis.get_instructions(code))


@contextmanager
def plain_modes() -> Iterator[None]:
    """Whatever mode the caller is in: no gradients, no autocast, and no inference mode, which hides what is written."""
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _identities(value: Any) -> tuple[str, list[int]]:
    leaves, spec = pytree.tree_flatten(value)
    return str(spec), [id(leaf) for leaf in leaves]


def _restored(
    module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any], fake_mode: FakeTensorMode
) -> list[str]:
    """Give a module its tensors back; returns the names of those that were replaced by others than themselves."""
    changed = []
    for kept, now in ((parameters, module._parameters), (buffers, module._buffers)):
        for name in {**kept, **now}:
            tensor, found = kept.get(name), now.get(name)
            if found is not tensor and (tensor is None or found is not fake_mode.from_tensor(tensor)):
                changed.append(f"{type(module).__name__}.{name}")
            if name in kept:
                now[name] = tensor
            else:
                del now[name]
    return changed


def confirmed(
    make: Callable[[], nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device,
    part: bool,
    fixed: bool = False,
) -> Captured:
    """Capture a module, then once more for another batch and image size, and see that the graphs are equal.

    Sizes are plain numbers to code that can do nothing with symbols; the graph is for these sizes then.

    Args:
        make: gives the module, each time a new copy. fixed: whether sizes are plain numbers from the beginning.

    Raises:
        Refused: they are not: the code keeps a state, draws random numbers of Python's, or makes a number of a size
            in a way that cannot be followed.
        Exception: whatever the module raises for such arguments.
    """
    root = make()
    try:
        captured = capture(root, args, kwargs, device, part, fixed)
    except Refused:
        raise
    except Exception:
        root, fixed = make(), True
        captured = capture(root, args, kwargs, device, part, fixed)
    # The same module once more, so that what it has kept since then counts.
    for more in ((0, 0, 0, 0),) if fixed else ((1, 0, 32, 32), (1, 0, 0, 0), (0, 0, 0, 0)):
        larger = pytree.tree_map_only(Tensor, functools.partial(_grown, more=more), (tuple(args), dict(kwargs)))
        if shapes.run(captured.gm, captured.arguments.tensors_of(*larger)).outside:
            continue
        try:
            again = capture(root, larger[0], larger[1], device, part, fixed)
        except Refused:
            raise
        except Exception:  # the module takes no such image
            continue
        if where := _difference(captured.gm, again.gm):
            raise Refused(f"its code does not do the same each time: {where}")
        break
    return captured


def _grown(tensor: Tensor, more: tuple[int, ...]) -> Tensor:
    extra = more if tensor.dim() == 4 else (more[0],) + (0,) * (tensor.dim() - 1)
    return tensor.new_empty([size + by for size, by in zip(tensor.shape, extra, strict=False)])


def _difference(a: fx.GraphModule, b: fx.GraphModule) -> str:
    """Return where two graphs differ, "" if they do not."""
    place: dict[fx.Node, int] = {}
    for one, other in itertools.zip_longest(a.graph.nodes, b.graph.nodes):
        if one is None or other is None:
            return "once more is called than the other time"
        place[one] = place[other] = len(place)
        texts = [
            repr((node.op, node.target, fx.map_arg((node.args, node.kwargs), lambda source: f"%{place[source]}")))
            for node in (one, other)
        ]
        if texts[0] != texts[1]:
            return f"{one.format_node()} and {other.format_node()}"
        if one.op == "get_attr" and not _same(_attribute(a, one.target), _attribute(b, other.target)):
            return f"{one.target} has two values"
    return ""


def _attribute(gm: fx.GraphModule, target: Any) -> Any:
    return operator.attrgetter(str(target))(gm)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype is b.dtype and torch.equal(a, b))


def _without_data(fake: FakeTensor) -> Tensor:
    """Return the same view of the same memory as a tensor on the device "meta"."""
    made = torch.empty(0, dtype=fake.dtype, device="meta")
    return made.set_(fake.untyped_storage(), fake.storage_offset(), fake.size(), fake.stride())


def _mark_made(gm: fx.GraphModule) -> None:
    """Mark the calls whose result has a floating point type that none of their inputs has."""
    for node in gm.graph.nodes:
        value = node.meta.get("value")
        if node.op in ("call_function", "call_method") and isinstance(value, Tensor) and value.is_floating_point():
            sources = [source.meta.get("value") for source in node.all_input_nodes]
            node.meta["made"] = not any(isinstance(each, Tensor) and each.dtype is value.dtype for each in sources)


_CASTS = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}


def retype(gm: fx.GraphModule, original: torch.dtype, target: torch.dtype) -> None:
    """Have what computed in ``original`` compute in ``target``: casts that the author wrote, tensors made on the way.

    What gave ``original`` for values of another type, as a division of bytes does, is cast.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_method" and node.target == _CASTS.get(original):
            node.target, node.args = "to", (node.args[0], target)
        node.args, node.kwargs = _map((node.args, dict(node.kwargs)), lambda leaf: target if leaf is original else leaf)
        if node.meta.get("made") and node.meta["value"].dtype is original:
            with gm.graph.inserting_after(node):
                cast_ = gm.graph.call_method("to", (node, target))
            node.replace_all_uses_with(cast_, lambda user, own=cast_: user is not own)
    gm.recompile()


def move(gm: fx.GraphModule, old: torch.device, device: torch.device) -> None:
    """Have tensors that the graph makes on the way on the model's device come into being on its new one."""
    for node in gm.graph.nodes:
        node.args, node.kwargs = _map(
            (node.args, dict(node.kwargs)),
            lambda leaf: device if isinstance(leaf, torch.device) and leaf == old else leaf,
        )
    gm.recompile()
