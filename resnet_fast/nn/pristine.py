"""Whether a module still computes what its class is known for, and whether somebody watches: asked at every call.

A fused op stands for layers that are then not called. Here is decided whether anybody could notice; what runs instead
is decided by those who ask. Nothing is told by a class's name.
"""

import sys
from collections.abc import Callable
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import batchnorm
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = [
    "Capturing",
    "capturing",
    "changed",
    "hooked",
    "is_frozen_batch_norm",
    "know",
    "know_frozen",
    "ordinary",
    "own",
    "watched",
    "why_called",
]

#: What is looked up on the class each time, and what it was when the class became known; None if it was replaced then.
_Path = tuple[tuple[Callable[[Any], Any], Any, Any], ...]

_known: dict[type[nn.Module], _Path | None] = {}
_frozen: set[type[nn.Module]] = set()

#: Attributes that a call of a module goes through, all of which an instance can have of its own.
_OF_INSTANCES = (
    "forward", "_conv_forward", "_check_input_dim", "_check_non_zero_input_channels", "_call_impl",
    "_wrapped_call_impl", "_compiled_call_impl", "_slow_forward",
)  # fmt: skip

#: Tensors that are what they seem: torch's own classes, and those that its compiler and its exporter trace with.
_ORDINARY = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor, type(None)))

_MODULE_CALL: Any = nn.Module.__call__

_T = TypeVar("_T")


def _constant(function: _T) -> _T:
    """Have the compiler ask while it compiles; ``torch.compiler.assume_constant_result`` would import all of it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def own(value: Any, package: str = "torch") -> bool:
    """Return whether a function or class is one that ``package`` itself defines, not one that was put in its place."""
    if isinstance(value, FunctionType):
        defined = value.__globals__.get("__name__", "")
        return str(defined).partition(".")[0] == package and not hasattr(value, "__wrapped__")
    return isinstance(value, BuiltinFunctionType) or (
        isinstance(value, type) and value.__module__.partition(".")[0] == package
    )


#: Whether ``nn.Module.__call__`` was torch's when this package was imported.
_ORIGINAL = own(_MODULE_CALL)


def know(kind: type[nn.Module], *methods: str, functions: tuple[tuple[Any, str], ...] = ()) -> None:
    """Make ``kind`` a class that can be fused as long as it is what it is now.

    Args:
        kind: a module class; its subclasses stay unknown.
        methods: what its ``forward`` calls on itself. functions: what it calls elsewhere, as (owner, name).
    """
    names = ("forward", *methods, "_wrapped_call_impl", "_call_impl")
    package = kind.__module__.partition(".")[0]
    owners: dict[int, tuple[Any, list[str]]] = {}
    for owner, name in functions:
        owners.setdefault(id(owner), (owner, []))[1].append(name)
    # The last name twice: attrgetter gives a tuple for two names and more.
    getters = [(attrgetter(*found, found[-1]), owner) for owner, found in ((kind, list(names)), *owners.values())]
    path = tuple((get, owner, get(owner)) for get, owner in getters)
    # Before this package was imported somebody may have replaced what others define; the rest is known by its author.
    original = package not in ("torch", "torchvision") or all(
        own(value) or own(value, package) for _, _, values in path for value in values
    )
    _known[kind] = path if original else None


def know_frozen(kind: type[nn.Module]) -> None:
    """Make ``kind`` a frozen batch norm: ``(x - running_mean) / sqrt(running_var + eps) * weight + bias``."""
    know(kind)
    _frozen.add(kind)


@_constant
def _is_frozen(kind: type[nn.Module]) -> bool:
    theirs: Any = sys.modules.get("torchvision.ops.misc")
    if kind is getattr(theirs, "FrozenBatchNorm2d", None) and _known.get(kind) is None:  # or replaced at the last look
        know_frozen(kind)
    return kind in _frozen


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Return whether the module's class is `resnet_fast.nn.FrozenBatchNorm2d` or torchvision's."""
    kind = type(module)
    return _is_frozen(kind) if kind.__module__ == "torchvision.ops.misc" else kind in _frozen


@_constant
def _classes_changed(*kinds: type[nn.Module]) -> str:
    """Return why modules of one of these classes may compute something else than it is known for; "" if they do not."""
    call = nn.Module.__call__
    for kind in kinds:
        path = _known.get(kind, ())
        if path == ():
            return f"there is no fused form of {kind.__module__}.{kind.__qualname__}"
        if kind.__call__ is not call:
            path = None
        for get, owner, values in path or ():
            if get(owner) != values:
                path = None
                break
        if not path:
            return f"somebody replaced a method of {kind.__name__} or a function that it calls"
    return ""


@_constant
def _calls_replaced() -> bool:
    """Return whether ``nn.Module.__call__`` was replaced, by others than torch.fx, which does so while it traces."""
    call: Any = nn.Module.__call__
    if call is _MODULE_CALL:
        return not _ORIGINAL
    by_fx = getattr(call, "__globals__", None) is vars(fx._symbolic_trace)
    return not (by_fx and call.__wrapped__ is _MODULE_CALL)


def changed(module: nn.Module) -> str:
    """Return why the module computes, or may compute, something else than its class is known for; "" if it does not."""
    reason = _classes_changed(type(module))
    if reason:
        return reason
    for name in _OF_INSTANCES:
        if name in module.__dict__:
            return f"somebody replaced {name} of a {type(module).__name__}"
    return ""


def hooked(*modules: nn.Module) -> bool:
    """Return whether one of these modules' own hooks runs when it is called, or when the gradient passes it."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    return False


def why_called(*modules: nn.Module | None) -> str:
    """Return why one of these modules must be called rather than computed by a fused op; "" if nobody would notice."""
    if _has_any_global_hook():
        return "a global module hook is registered, so the plain layers run and it fires"
    if (nn.Module.__call__ is not _MODULE_CALL or not _ORIGINAL) and _calls_replaced():
        return "somebody replaced torch.nn.Module.__call__, so the plain layers run"
    kinds = []
    for module in modules:
        if module is None:
            continue
        # As `hooked` and `changed` ask, in one place: this is asked at each call of each layer.
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"a hook on a {type(module).__name__}: its block runs unfused so that it fires"
        attributes = module.__dict__
        for name in _OF_INSTANCES:
            if name in attributes:
                return f"{changed(module)}: its block runs unfused"
        kinds.append(type(module))
    reason = _classes_changed(*kinds)
    return f"{reason}: its block runs unfused" if reason else ""


class Capturing(TorchFunctionMode):
    """A mode that writes calls of torch down: the plain layers run under it, and nothing is said of that."""


def capturing() -> bool:
    """Return whether such a mode is active in this thread."""
    return any(
        isinstance(torch._C._get_function_stack_at(index), Capturing)
        for index in range(torch._C._len_torch_function_stack())
    )


def ordinary(*tensors: Any) -> bool:
    """Return whether these are torch's own tensors (or None), not subclasses with arithmetic of their own."""
    for tensor in tensors:  # noqa: SIM110 - a generator costs as much as all these look-ups
        if type(tensor) not in _ORDINARY:
            return False
    return True


def watched() -> str:
    """Return why every call of torch must happen: a function or dispatch mode of somebody's is active; "" if none is.

    The default device (``torch.set_default_device``, ``with torch.device(...)``) is a mode too. It only concerns calls
    that make tensors from nothing.
    """
    if torch.compiler.is_compiling():
        return ""
    for index in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(index)
        if type(mode) is not DeviceContext:
            return f"{type(mode).__name__}, a torch function mode, is active, so the plain layers run"
    if torch._C._len_torch_dispatch_stack():
        for mode in _get_current_dispatch_mode_stack():
            if not mode.is_infra_mode():
                return f"{type(mode).__name__}, a torch dispatch mode, is active, so the plain layers run"
    return ""


for _kind, _methods, _functions in (
    (nn.Conv2d, ("_conv_forward",), ((F, "conv2d"),)),
    (nn.BatchNorm2d, ("_check_input_dim",), ((F, "batch_norm"), (torch, "batch_norm"))),
    (
        nn.SyncBatchNorm,
        ("_check_input_dim", "_check_non_zero_input_channels"),
        ((F, "batch_norm"), (torch, "batch_norm"), (batchnorm, "sync_batch_norm")),
    ),
    (nn.ReLU, (), ((F, "relu"), (torch, "relu"), (torch, "relu_"))),
    (nn.MaxPool2d, (), ((F, "max_pool2d"), (F, "_max_pool2d"), (torch, "max_pool2d"))),
    (nn.AvgPool2d, (), ((F, "avg_pool2d"),)),
    (
        nn.AdaptiveAvgPool2d,
        (),
        ((F, "adaptive_avg_pool2d"), (torch._C._nn, "adaptive_avg_pool2d"), (torch, "flatten")),
    ),
    (nn.Flatten, (), ((torch, "flatten"),)),
    (nn.Linear, (), ((F, "linear"),)),
    (nn.Sequential, ("__iter__",), ()),
    *(
        (kind, (), ())
        for kind in (
            nn.Identity,
            nn.GroupNorm,
            nn.LayerNorm,
            nn.ReLU6,
            nn.SiLU,
            nn.GELU,
            nn.Hardswish,
            nn.Hardsigmoid,
            nn.LeakyReLU,
            nn.ELU,
            nn.Hardtanh,
            nn.Sigmoid,
            nn.Tanh,
            nn.Softmax,
            nn.AdaptiveMaxPool2d,
        )
    ),
    (nn.Dropout, (), ((F, "dropout"),)),
    (nn.Dropout1d, (), ((F, "dropout1d"),)),
    (nn.Dropout2d, (), ((F, "dropout2d"),)),
):
    know(_kind, *_methods, functions=_functions)
