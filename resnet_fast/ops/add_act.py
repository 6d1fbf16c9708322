"""``add_act``: residual addition and ReLU, forward and backward, if no convolution can carry them.

Broadcasting is deliberately not offered: a residual has the other's shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.kernels.problems import AddAct as Problem

from .. import backends
from .._random import Random
from ..backends import Backend, cpu, cuda, triton
from . import checks
from ._op import Bound, Op, Values
from .common import accumulate_dtype, cast, transformed
from .gradients import relu_gradient

NAME = "add_act"


class Arguments(NamedTuple):
    x: Tensor
    y: Tensor
    activation: str = "relu"


def check(a: Arguments) -> None:
    checks.activation(NAME, a.activation)
    _check_alike(NAME, x=a.x, y=a.y)


def _check_alike(op: str, **both: Tensor) -> None:
    """Check that two tensors have one shape, device and floating point dtype."""
    (first, x), (second, y) = both.items()
    if not x.is_floating_point() or y.dtype is not x.dtype:
        raise TypeError(f"{op}: {first} and {second} must have one floating point dtype, got {x.dtype} and {y.dtype}")
    if x.shape != y.shape:
        shapes = f"{first} has shape {list(x.shape)}, {second} has {list(y.shape)}"
        raise ValueError(f"{op}: {shapes}; they must be the same")
    checks.device(op, x, first, **{second: y})


def reference(a: Arguments) -> Tensor:
    """Compute the op in float32 or wider; the result has the strides of ``torch.empty_like(x)``."""
    accumulate = accumulate_dtype(a.x.dtype)
    z = (a.x.to(accumulate) + a.y.to(accumulate)).to(a.x.dtype)
    if a.activation == "relu":
        z = z.relu()
    out = torch.empty_like(a.x)
    return z if transformed() or z.stride() == out.stride() else out.copy_(z)


def _flat(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return ``x`` with its elements in memory as dense ``strides`` put them; a copy only if they lie otherwise."""
    x = x.resolve_neg()
    if all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True)):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def problem(x: Tensor) -> Problem:
    """Return what a launch choice depends on; ``x`` may be without data."""
    return Problem(x.numel(), triton.precision(x.dtype))


def _two(asked: Problem, random: Random) -> tuple[Tensor, Tensor]:
    return random.normal(asked.length, dtype=random.dtype), random.normal(asked.length, dtype=random.dtype)


def _by_kernel(among: tuple[Backend, ...], tensors: tuple[Tensor, Tensor], like: Tensor, op: str, **form: Any) -> Any:
    """Compute ``op``, the forward or the backward, of tensors of one shape; the result is stored as ``like``."""
    out, asked = torch.empty_like(like), problem(like)
    operands = (*(_flat(tensor, out.stride()) for tensor in tensors), out)
    choice = backends.choose(NAME, among, asked, out.device)
    if choice.backend is cuda:
        getattr(cuda, op)(*operands, **form)
    elif choice.backend is triton:
        triton.launch(NAME, asked, out.device, *operands, function=op.replace(NAME, "launch"), **form)
    return None if choice.backend is None else out


def kernel(among: tuple[Backend, ...], a: Arguments, bound: Bound[Arguments] | None) -> Tensor | None:
    made: Tensor | None = _by_kernel(among, (a.x, a.y), a.x, NAME, activation=a.activation)
    return made


def native(a: Arguments, bound: Bound[Arguments] | None = None) -> Tensor | None:
    """Compute the op in one vectorised pass that rounds once, and the ReLU in place on the still cached sum."""
    if bound is None and not backends.runs("onednn", a.x.device.type):
        return None
    z = torch.add(a.x, a.y, out=torch.empty_like(a.x))
    return z.relu_() if a.activation == "relu" else z


def context(ctx: Any, a: Arguments, output: Tensor) -> None:
    ctx.save_for_backward(output if a.activation == "relu" else None)


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (output,) = ctx.saved_tensors
    if output is not None:
        # torch.func and forward mode know how to treat torch's function, not ours.
        grad = (relu_gradient if transformed() else BACKWARD.overload)(grad, output)
    return grad if ctx.needs_input_grad[0] else None, grad if ctx.needs_input_grad[1] else None, None


def autocast(dtype: torch.dtype, a: Arguments) -> Arguments:
    # As torch's add under autocast: no cast down, the wider of the two types.
    wider = torch.promote_types(a.x.dtype, a.y.dtype)
    return a._replace(x=cast(a.x, wider), y=cast(a.y, wider))


def plan(network: cpu.Network, bound: Bound[Arguments], values: Values) -> int:
    x, y = values
    return network.add(x, y, bound.of().activation == "relu")


OP = Op(
    NAME, Arguments, check, lambda a: torch.empty_like(a.x), reference, kernel, native, context, backward, autocast,
    data=("x", "y"), problem=lambda a: problem(a.x), sample=lambda asked, random: Arguments(*_two(asked, random)),
    plan=plan,
)  # fmt: skip


class Gradient(NamedTuple):
    """The gradient for x and y of ``relu(x + y) = output``: grad unless output <= 0, so it passes if output is NaN."""

    grad: Tensor
    output: Tensor


def _gradient_reference(a: Gradient) -> Tensor:
    out = torch.empty_like(a.output)
    return torch.ops.aten.threshold_backward.grad_input(a.grad, a.output, 0, grad_input=out)


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # Linear in its first argument; in the second it is a step, whose derivative is 0 wherever it has one.
    return BACKWARD.overload(grad, *ctx.saved_tensors), None


BACKWARD = Op(
    f"{NAME}_backward", Gradient, lambda a: _check_alike(f"{NAME}_backward", grad=a.grad, output=a.output),
    lambda a: torch.empty_like(a.output), _gradient_reference,
    lambda among, a, bound: _by_kernel(among, a, a.output, f"{NAME}_backward"), None,
    lambda ctx, a, output: ctx.save_for_backward(a.output), _gradient_backward, lambda dtype, a: a,
    problem=lambda a: problem(a.output), sample=lambda asked, random: Gradient(*_two(asked, random)), kind=NAME,
)  # fmt: skip


def add_act(x: Tensor, y: Tensor, activation: str = "relu") -> Tensor:
    """Residual addition + activation, ``act(x + y)`` (Caffe's Eltwise SUM + ReLU), computed in float32 or wider.

    Args:
        x, y: one shape (no broadcasting), one floating point dtype, any strides.
        activation: "relu" (NaN passes, as in torch) or "none".

    Returns:
        A tensor of that shape and dtype with the strides of ``torch.empty_like(x)``. Differentiable in both.

    Raises:
        ValueError: shapes or devices differ, unknown activation; TypeError: dtypes differ or are not floating point.
    """
    made: Tensor = OP(Arguments(x, y, activation))
    return made
