"""Models that cannot be captured whole: which of their children can, down to single blocks.

A child is captured with the arguments that the model's own code gives it. The code of the others runs as it is, and
so do hooks of the children themselves, which are around their forwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import copies
from .capture import plain_modes
from .guards import Refused
from .plan import Fused
from .report import Report, Row
from .shapes import first_line
from .snapshot import OptimizedModule, PartlyOptimizedModule


class Call(NamedTuple):
    """The arguments of a module's first call, tensors without data."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def drawn(value: Any, device: torch.device) -> Any:
    """Return arguments with random tensors of the same shapes: between 0 and 1, as images are; whole numbers are 0.

    The numbers are the same each time, and torch's own generators stay as they are.
    """
    generator = torch.Generator(device).manual_seed(0)

    def one(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.rand(tensor.shape, dtype=torch.float32, device=device, generator=generator).to(tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    return pytree.tree_map_only(Tensor, one, value)


def calls_of(model: nn.Module, args: tuple[Any, ...], device: torch.device) -> dict[str, Call]:
    """Run a model and return how its code calls each of its modules.

    Modules that are called under autocast or with gradients are left out, and those that the code around them, or they
    themselves, change: their forward is not all that matters.

    Raises:
        Exception: whatever the model raises.
    """
    found: dict[str, Call] = {}
    changed: set[str] = set()
    states: dict[str, Any] = {}

    def seen(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        on = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or torch.is_grad_enabled()
        if on or _state(module) != states[name]:
            changed.add(name)
        found.setdefault(name, Call(*pytree.tree_map_only(Tensor, _without_data, (args, kwargs))))

    own = copies.copied(model)  # it may change tensors of its own
    modules = {name: module for name, module in own.named_modules() if name}
    for name, module in modules.items():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(functools.partial(seen, name), with_kwargs=True)
    states.update({name: _state(module) for name, module in modules.items()})
    with plain_modes():
        own(*drawn(args, device))
    changed.update(name for name, module in modules.items() if _state(module) != states[name])
    return {name: call for name, call in found.items() if name not in changed}


def _state(module: nn.Module) -> list[Any]:
    """Return what tells whether somebody changes a module: attributes, tensors, hooks and modes, its children's too."""
    return [
        (name, key, id(value), _digest(value)) for name, inner in module.named_modules() for key, value in _held(inner)
    ]


def _digest(value: Any) -> float | None:
    """Return a number that another content of a tensor changes, whoever wrote it."""
    plain = type(value) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    return value.detach().double().sum().item() if plain else None


def _held(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    for key, value in vars(module).items():
        yield key, value
        if isinstance(value, dict | list | set):
            yield (key, len(value)), None
            yield from (
                ((key, at), item) for at, item in (value.items() if isinstance(value, dict) else enumerate(value))
            )


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def split(
    own: nn.Module, calls: Mapping[str, Call], snapshot: Callable[[nn.Module, Call], OptimizedModule]
) -> tuple[dict[str, OptimizedModule], dict[str, str]]:
    """Return the snapshots of the largest children that can be captured, and why the others cannot.

    Args:
        own: the model. calls: what `calls_of` found. snapshot: makes a child's snapshot, or raises.
    """
    parts: dict[str, OptimizedModule] = {}
    reasons: dict[str, str] = {}
    visited: set[int] = set()

    def visit(prefix: str, module: nn.Module) -> None:
        for key, child in module.named_children():
            name = f"{prefix}{key}"
            if id(child) in visited:
                continue
            visited.add(id(child))
            if name in calls and not any(inner and copies.hooked(part) for inner, part in child.named_modules()):
                try:
                    part = snapshot(child, calls[name])
                except Refused as error:
                    reasons[name] = str(error)
                except Exception as error:
                    reasons[name] = first_line(error)
                else:
                    if any(isinstance(inner, Fused) for inner in part.modules()):
                        parts[name] = part
                    continue
            visit(f"{name}.", child)

    visit("", own)
    return parts, reasons


def assemble(
    own: nn.Module,
    parts: dict[str, OptimizedModule],
    reasons: Mapping[str, str],
    why: str,
    dtype: torch.dtype,
    original: torch.dtype,
) -> PartlyOptimizedModule:
    """Return a model whose own code runs and calls the snapshots of its parts."""
    notes = [f"the model's own code runs, and {len(parts)} parts of it are fused: {why}"]
    notes += [f"{name} runs its own code: {reason}" for name, reason in reasons.items()]
    notes += [f"{name}: {note}" for name, part in parts.items() for note in part.report().notes]
    report = Report(
        type(own).__name__,
        str(dtype).removeprefix("torch."),
        (),
        tuple(_rows(own, parts)),
        tuple(notes),
        None,
        str(original).removeprefix("torch."),
    )
    return PartlyOptimizedModule(own, parts, report, dtype)


def _rows(own: nn.Module, parts: Mapping[str, OptimizedModule]) -> Iterator[Row]:
    for name, module in own.named_modules():
        if name in parts:
            for row in parts[name].report().rows:
                op, _, first = row.fused.partition(" ")
                yield replace(row, name=f"{name}.{row.name}", fused=f"{op} {name}.{first}" if op else "")
        elif not list(module.children()) and not any(name.startswith(f"{part}.") for part in parts):
            yield Row(name, type(module).__name__, "", "the model's own code calls it", "torch", None, None, None)
