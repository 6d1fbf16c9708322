"""One declaration per op: a NamedTuple of its arguments is the schema, and all that torch is told follows from it.

Each function of a declaration takes the arguments as one value. An op's file holds its arguments, ``check`` (every
error), ``empty`` (outputs without data: the fake kernel), ``reference`` (plain torch, right everywhere), and if there
are any, ``kernel`` (a GPU's), ``native`` (torch's fused functions), gradients and autocast.

Ops are registered straight on the dispatcher rather than by ``torch.library.custom_op``, whose wrappers cost more at
each call than a small convolution takes.
"""

from __future__ import annotations

import functools
import inspect
import operator
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from .._dtypes import STORED
from .._random import Random
from ..backends import Backend, cpu, triton
from .common import freeze_constants, transformed

A = TypeVar("A", bound=tuple[Any, ...])
T = TypeVar("T")
#: Of a network of the CPU engine, in the order of an op's data; None for what is left out.
Values: TypeAlias = Sequence[Any]

_library = torch.library.Library("resnet_fast", "DEF")
_CHECKS_KEPT = 10_000
_LISTS = (list, tuple)
_C: Any = torch._C


def _keys(*keys: Any) -> Any:
    return functools.reduce(operator.or_, map(_C.DispatchKeySet, keys))


_KEY = _C.DispatchKey
#: Dispatch keys of torch's own tensors, with and without what records gradients. A subclass, a lazily negated view, a
#: functional or a sparse tensor has others.
_OF_TENSORS = frozenset(
    keys.raw_repr()
    for dense, autograd, autocast in (
        (_KEY.CPU, _KEY.AutogradCPU, _KEY.AutocastCPU),
        (_KEY.CUDA, _KEY.AutogradCUDA, _KEY.AutocastCUDA),
    )
    for keys in (_keys(dense, autocast), _keys(dense, autocast, _KEY.ADInplaceOrView, autograd))
)
_OURS = frozenset((Tensor, torch.nn.Parameter))
#: What a thread includes if nothing watches it: no mode, no transform; in inference mode the second is off.
_OF_THREADS = frozenset(
    keys.raw_repr() for keys in (_keys(_KEY.BackendSelect, _KEY.ADInplaceOrView), _keys(_KEY.BackendSelect))
)


def unmoded() -> bool:
    """Return whether no dispatch mode and no transform is active in this thread."""
    return _C._dispatch_tls_local_include_set().raw_repr() in _OF_THREADS


def unobserved(tensors: Iterable[Any]) -> bool:
    """Return whether torch's dispatcher would do nothing of its own with a call on these tensors: it may be left out.

    Somebody may trace, compile, transform, profile or watch; autocast or gradients may be on; a tensor may be more than
    memory with strides.
    """
    if (
        torch.compiler.is_compiling()
        or _C._dispatch_tls_local_include_set().raw_repr() not in _OF_THREADS  # unmoded(), without a call
        or _C._get_tracing_state() is not None
        or _C._len_torch_function_stack()
        or _C._autograd._profiler_enabled()
        or torch.autograd.profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    ):
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _OURS
            or (grad and tensor.requires_grad)
            or _C._dispatch_keys(tensor).raw_repr() not in _OF_TENSORS
        ):
            return False
    return True


def readable(tensors: Iterable[Any]) -> bool:
    """Return whether each tensor is plain memory of this machine that may be read by its address."""
    return all(
        tensor is None
        or (type(tensor) in _OURS and tensor.is_cpu and _C._dispatch_keys(tensor).raw_repr() in _OF_TENSORS)
        for tensor in tensors
    )


def _schema(name: str, arguments: type[Any], returns: Any) -> str:
    """Write an op's schema from the annotations of its arguments, all of which a call gives."""

    def prototype() -> None: ...

    kinds = typing.get_type_hints(arguments)
    parameters = [
        inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kinds[key]) for key in kinds
    ]
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return name + torch.library.infer_schema(prototype, mutates_args=())


#: Of an argument's type in a schema, whether a value is exactly of it; tensors are asked about by `unobserved`.
_EXACT: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "float": lambda value: type(value) is float,
    "str": lambda value: type(value) is str,
    "List[int]": lambda value: type(value) in _LISTS and set(map(type, value)) <= {int},
    "Optional[List[float]]": lambda value: (
        value is None or (type(value) in _LISTS and set(map(type, value)) <= {float})
    ),
}


def no_limits(name: str, constants: dict[str, Any], dtype: torch.dtype, chosen: bool) -> str:
    """Return why a backend of ``backends.ON_CPU`` does not compute an op whose constants do not matter."""
    return cpu.unsupported(dtype) if name == cpu.NAME else ""


@dataclass(eq=False)
class Op(Generic[A]):
    """An op of ``torch.ops.resnet_fast``.

    Attributes:
        arguments: a NamedTuple whose annotations are the schema.
        check: raises ValueError or TypeError for arguments that do not fit. empty: outputs without values of checked
            arguments: shapes, dtypes and strides.
        reference: the op in plain torch, any device and dtype.
        kernel: the op by a kernel of one of the given backends; None if none has one for these arguments. native: the
            op by faster functions of torch's than the reference, None if they do not compute it. Both keep what they
            make of constants in the :class:`Bound` that they are given.
        context, backward: as ``setup_context`` and ``backward`` of ``torch.library.register_autograd``, with the inputs
            as arguments; None for an op that is only called where no gradients are recorded.
        autocast: the arguments cast for an autocast dtype. ``torch.library.register_autocast`` would cast every
            floating point tensor; scale, shift and weights stay as they are, they are folded in float32.
        dtype: what kernels compute in. data: the fields that are no constants of a network.
        problem: what a launch choice depends on; None if no choice is made by it. sample: random arguments of such a
            problem, with every tensor that it may have.
        freeze: the constants as :meth:`bind` keeps them, for inputs of a dtype. limits: why a backend of
            ``backends.ON_CPU`` does not compute the op on such constants, "" if it does; whether somebody chose it by
            name. single: the result that callers of a bound op see.
        plan: adds the op on constants to a network of the CPU engine, with the network's values in place of data; None
            if it has no place in one. Those of convolutions take a ``cpu.Stored`` too, if outputs become uint8.
        kind: the op whose kernels, tables and fallbacks these are, if not its own.
        schema, returns: if the annotations do not say it: arguments that are written, several outputs.
    """

    name: str
    arguments: type[A]
    check: Callable[[A], None]
    empty: Callable[[A], Any]
    reference: Callable[[A], Any]
    kernel: Callable[[tuple[Backend, ...], A, Bound[A] | None], Any] | None = None
    native: Callable[..., Any] | None = None
    context: Callable[[Any, A, Any], None] | None = None
    backward: Callable[..., Any] | None = None
    autocast: Callable[[torch.dtype, A], A] | None = None
    dtype: Callable[[A], torch.dtype] = lambda a: a[0].dtype
    data: tuple[str, ...] = ("x",)
    problem: Callable[[A], Any] | None = None
    sample: Callable[[Any, Random], A] | None = None
    freeze: Callable[[dict[str, Any], torch.dtype], dict[str, Any]] = freeze_constants
    limits: Callable[[str, dict[str, Any], torch.dtype, bool], str] = no_limits
    plan: Callable[..., int] | None = None
    single: Callable[[A, Any], Any] = lambda a, output: output
    kind: str = ""
    schema: str = ""
    returns: Any = Tensor
    _passed: set[Any] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        name, lib = f"resnet_fast::{self.name}", _library
        self.kind = self.kind or self.name
        lib.define(self.schema or _schema(self.name, self.arguments, self.returns), tags=(torch.Tag.pt2_compliant_tag,))
        lib.impl(self.name, lambda *given: self._plain(self.arguments(*given)), "CompositeExplicitAutograd")
        for device in ("CPU", "CUDA"):
            lib.impl(self.name, lambda *given: self.run(self.arguments(*given)), device)
        torch.library.register_fake(name, lambda *given: self._fake(self.arguments(*given)), lib=lib)
        if self.backward is not None:
            torch.library.register_autograd(name, self.backward, setup_context=self._setup_context, lib=lib)
        self.overload: Any = getattr(torch.ops.resnet_fast, self.name).default
        self._defaults = [argument.default_value for argument in self.overload._schema.arguments]
        self._names = [argument.name for argument in self.overload._schema.arguments]
        kinds = [str(argument.type) for argument in self.overload._schema.arguments]
        self._exact, self._needed = [_EXACT.get(kind) for kind in kinds], [kind == "Tensor" for kind in kinds]
        if self.autocast is not None:
            for device, key in (("cpu", _KEY.AutocastCPU), ("cuda", _KEY.AutocastCUDA)):
                run = functools.partial(self._under_autocast, device, _C.DispatchKeySet(key))
                lib.impl(self.name, run, f"Autocast{device.upper()}")

    def __call__(self, a: A) -> Any:
        """Compute the op: by the dispatcher if it has something to do, under torch.func by the reference."""
        if transformed():  # the op has reverse-mode formulas only, plain torch has all
            self.check(a)
            return self.reference(a)
        if torch.compiler.is_compiling():
            return self.overload(*a)
        tensors = []
        for value, exact, needed in zip(a, self._exact, self._needed, strict=True):
            if exact is None:
                tensors.append(value)
            # What the schema would convert or refuse goes through it.
            if (needed and value is None) or (exact is not None and not exact(value)):
                return self.overload(*a)
        return self.run(a) if unobserved(tensors) else self.overload(*a)

    def run(self, a: A) -> Any:
        """Compute the op without gradients: by a kernel, by torch's fused functions, or by the reference."""
        x = a[0]
        key: list[Any] = []
        for value in a:
            if isinstance(value, Tensor):
                key += (value.shape, value.dtype, value.device)
            else:
                key.append(tuple(value) if type(value) is list else value)
        passed = tuple(key)
        if passed not in self._passed:  # others of these shapes, dtypes, devices and options need no second look
            self.check(a)
            if len(self._passed) > _CHECKS_KEPT:
                self._passed.clear()
            self._passed.add(passed)
        if self.kernel is not None and not (x.is_cpu and backends.selected == "auto") and x.numel():
            candidates = backends.candidates(self.kind, x.device, self.dtype(a))
            if candidates and (y := self.by_kernel(candidates, a)) is not None:
                return y
        y = None if self.native is None else self.native(a)
        return self.reference(a) if y is None else y

    def by_kernel(self, among: tuple[Backend, ...], a: A, bound: Bound[A] | None = None) -> Any:
        """Compute the op by a kernel of one of these backends; None if none has one.

        Another backend's than Triton's if the driver refuses Triton's, which is recorded as a fallback.

        Raises:
            triton.Refused: the driver refuses it, and Triton was chosen by name.
        """
        assert self.kernel is not None
        try:
            return self.kernel(among, a, bound)
        except triton.Refused as refused:
            if backends.named("auto" if bound is None else bound.asked):
                raise
            others = tuple(backend for backend in among if backend is not triton)
            y = self.kernel(others, a, bound) if others else None
            instead = "the plain torch reference" if y is None else "CUDA's kernel"
            backends.fallback(self.kind, f"{refused}; {instead} runs instead")
            return y

    def bind(
        self, *constants: Any, dtype: torch.dtype = torch.float32, backend: str = "auto", **named: Any
    ) -> Bound[A]:
        """Return the op on constants, given in the order of the arguments without data, or by name (:class:`Bound`)."""
        names = [name for name in self._names if name not in self.data]
        return Bound(self, {**dict(zip(names, constants, strict=False)), **named}, dtype, backend)

    def example(self, problem: Any, device: torch.device, generator: torch.Generator | None = None) -> A:
        """Return random arguments of a kernel's problem; on the device "meta" they are shapes alone."""
        assert self.sample is not None, f"{self.name} has no kernel of its own"
        return self.sample(problem, Random(device, STORED[problem.precision], generator))

    def _plain(self, a: A) -> Any:
        self.check(a)
        return self.reference(a)

    def _fake(self, a: A) -> Any:
        self.check(a)
        return self.empty(a)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert self.context is not None
        self.context(ctx, self.arguments(*inputs), output)

    def _under_autocast(self, device: str, keys: Any, *given: Any, **named: Any) -> Any:
        assert self.autocast is not None
        rest = zip(self._names[len(given) :], self._defaults[len(given) :], strict=True)
        a = self.arguments(*given, *(named.get(name, default) for name, default in rest))
        with _C._ExcludeDispatchKeyGuard(keys):
            return self.overload(*self.autocast(torch.get_autocast_dtype(device), a))


class Bound(Generic[A]):
    """An op on constants, for frozen graphs: called with nothing but its data.

    Same results as the op, without autograd, autocast, the dispatcher, or checks of inputs against constants. What is
    made of constants, such as packed weights, is made once, at the first call that needs it.

    Args:
        constants: fields of the op's arguments that are no data, in the precision that they are to be folded in.
        dtype: of the inputs and outputs. asked: "auto" or a backend's name. device: the constants' unless given.

    Attributes:
        candidates: the backends whose kernels may run; none of them if the op runs by one of ``backends.ON_CPU`` or
            the reference.
        kept: what the op has made of its constants.
    """

    def __init__(
        self, op: Op[A], constants: dict[str, Any], dtype: torch.dtype, asked: str, device: torch.device | None = None
    ) -> None:
        self.op, self.dtype, self.asked = op, dtype, asked
        self.constants = op.freeze(constants, dtype)
        self.kept: dict[Any, Any] = {}
        places = [value.device for value in self.constants.values() if isinstance(value, Tensor)]
        self.device = [*places, torch.device("cpu")][0] if device is None else device
        self._all_data = not places  # then inputs have only each other to fit to
        self.candidates = backends.candidates(op.kind, self.device, dtype, asked)
        self._native = ""
        if not self.candidates:
            self._native = backends.on_cpu(
                op.name,
                self.device.type,
                asked,
                lambda name, chosen: op.limits(name, self.constants, dtype, chosen),
            )

    @property
    def backend(self) -> str:
        """The name of the backend that runs it, "auto" if each input's shape decides."""
        if not self.candidates:
            return self._native or "reference"
        return "auto" if len(self.candidates) > 1 else self.candidates[0].NAME

    def backend_for(self, *data: Tensor) -> str:
        """Return the name of the backend that runs it on inputs like these, which may be without data."""
        if not self.candidates:
            return self.backend
        if self.op.problem is None:
            return self.candidates[0].NAME
        problem, among = self.op.problem(self.of(*data)), self.candidates
        if not backends.named(self.asked) and triton.refused(self.op.kind, problem, self.device):
            among = tuple(backend for backend in among if backend is not triton)
        return backends.pick(self.op.name, among, problem, self.device).name if among else "reference"

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """Return what ``make`` has made of the constants, once."""
        if key not in self.kept:
            self.kept[key] = make()  # in one step, for threads
        made: T = self.kept[key]
        return made

    def of(self, *data: Tensor | None) -> A:
        """Return the op's arguments with these data; those that are left out are None."""
        named = dict.fromkeys(self.op.data) | dict(zip(self.op.data, data, strict=False))
        return self.op.arguments(**self.constants, **named)

    def __call__(self, *data: Tensor | None, **promises: bool) -> Any:
        """Compute the op.

        Args:
            promises: what the caller knows and ``native`` may use, such as ``finite``.
        """
        op, a = self.op, self.of(*data)
        if self._all_data:
            op.check(a)
        candidates = self.candidates
        if candidates and op.dtype(a) is not self.dtype:
            candidates = backends.candidates(op.kind, self.device, op.dtype(a), self.asked)
        if candidates and torch.compiler.is_compiling():  # which cannot look into a launch
            return op.single(a, op.overload(*a))
        y = None
        if a[0].numel():
            if candidates:
                y = op.by_kernel(candidates, a, self)
            elif self._native and (self._native != cpu.NAME or readable(data)):
                assert op.native is not None
                y = op.native(a, self, **promises)
        return op.single(a, op.reference(a) if y is None else y)
