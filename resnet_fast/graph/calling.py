"""The form of a module's arguments and of its result: how nests become tensors for a graph, and its leaves a result."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .guards import OutsideGuards, Refused

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
#: What may stand in an output beside tensors.
_INERT = (
    int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class _Tensor(Enum):
    """What stands in the place of a tensor in the form of a call's arguments."""

    TENSOR = "a tensor"


_TENSOR = _Tensor.TENSOR


class Arguments:
    """The arguments that a module was captured with: names, nesting, and all that is no tensor."""

    def __init__(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.signature = _signature(forward)
        self._form = self._bound(args, kwargs)
        leaves, spec = pytree.tree_flatten(self._form)
        self._form = pytree.tree_unflatten([_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        self._kinds = [(leaf.dim(), leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)]
        #: Whether every call that the module accepts has the form of these.
        values = list(self._form.values())
        self.fixed = len(self.signature.parameters) == 1 and values == [_TENSOR]
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_INERT)):
                raise Refused(f"an argument holds a {type(leaf).__module__}.{type(leaf).__qualname__}")

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self.signature.bind(*args, **kwargs)
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
                raise OutsideGuards("arguments of another form than those it was made with")
            for leaf, value in zip(leaves, values, strict=True):
                if not (isinstance(leaf, Tensor) if value is _TENSOR else _equal(leaf, value)):
                    raise OutsideGuards(f"an argument is not {_short(value)}, as it was")
            found = [leaf for leaf, value in zip(leaves, values, strict=True) if value is _TENSOR]
        for leaf, (rank, dtype) in zip(found, self._kinds, strict=True):
            if leaf.dim() != rank:
                raise OutsideGuards("a tensor of another number of dimensions")
            if leaf.dtype is not dtype and not (leaf.is_floating_point() and dtype.is_floating_point):
                raise OutsideGuards("a tensor of another type")
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


def flatten(value: Any, once: bool = False) -> tuple[list[Any], Any]:
    """Return the leaves of a result, and its form for `unflatten`: the same nest with their indices in their places.

    Tuples, lists, dictionaries, what else torch's pytree knows, and dataclasses are gone through.

    Args:
        once: list a tensor that is in several places only once.

    Raises:
        Refused: an object may hold tensors that nobody sees.
    """
    leaves: list[Any] = []
    seen: dict[int, int] = {}

    def one(leaf: Any) -> Any:
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
            return _Dataclass(type(leaf), pytree.tree_map(one, fields))
        if not isinstance(leaf, (Tensor, *_INERT, *SYMBOLIC)):
            raise Refused(f"its result holds a {type(leaf).__module__}.{type(leaf).__qualname__}")
        if once and isinstance(leaf, Tensor) and id(leaf) in seen:
            return seen[id(leaf)]
        seen[id(leaf)] = len(leaves)
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
