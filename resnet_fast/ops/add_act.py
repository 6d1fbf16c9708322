"""``add_act``: residual addition and ReLU, forward and backward, where no convolution can carry them.

Schema, reference, fake, autograd, autocast. Broadcasting is deliberately not offered: a residual has the other's shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast.kernels.problems import AddAct as Problem

from .. import backends
from ..backends import cuda, triton
from ._common import (
    KERNELS,
    accumulate_dtype,
    cast,
    check_activation,
    check_device,
    choose_kernel,
    kernels_for,
    register,
    relu_gradient,
    transformed,
)

NAME = "add_act"


def reference(x: Tensor, y: Tensor, activation: str = "relu") -> Tensor:
    """The op in plain torch, any device and dtype; the result has the strides of ``torch.empty_like(x)``."""
    accumulate = accumulate_dtype(x.dtype)
    z = (x.to(accumulate) + y.to(accumulate)).to(x.dtype)
    return _like(x, z.relu() if activation == "relu" else z)


def _like(x: Tensor, z: Tensor) -> Tensor:
    """``z`` with the strides of ``torch.empty_like(x)``, copied only where they differ."""
    out = torch.empty_like(x)
    return z if transformed() or z.stride() == out.stride() else out.copy_(z)


def _check(x: Tensor, y: Tensor, activation: str) -> None:
    check_activation(NAME, activation)
    if not x.is_floating_point() or y.dtype is not x.dtype:
        raise TypeError(f"{NAME}: x and y must have one floating point dtype, got {x.dtype} and {y.dtype}")
    if x.shape != y.shape:
        raise ValueError(f"{NAME}: x has shape {list(x.shape)}, y has {list(y.shape)}; they must be the same")
    check_device(NAME, x, y=y)


def _default(x: Tensor, y: Tensor, activation: str) -> Tensor:
    _check(x, y, activation)
    return reference(x, y, activation)


def _flat(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` with its elements in memory as dense ``strides`` put them; a copy only where they lie otherwise."""
    if all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True)):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def problem_of(x: Tensor) -> Problem:
    """What a kernel is asked to compute, of which its choice depends; ``x`` may be without data."""
    return Problem(x.numel(), triton.precision(x.dtype))


def run_kernel(whose: str, x: Tensor, y: Tensor, activation: str) -> Tensor | None:
    """The op by a kernel of ``whose`` (:func:`kernels_for`), on checked arguments.

    None where there is no such kernel, or x is empty.
    """
    if whose not in KERNELS or x.numel() == 0:
        return None
    out = torch.empty_like(x)
    problem = problem_of(x)
    x, y = _flat(x, out.stride()), _flat(y, out.stride())
    backend, _ = choose_kernel(NAME, problem, x.device, whose)
    if backend == "cuda":
        cuda.add_act(x, y, out, activation=activation)
    elif backend == "triton":
        from resnet_fast.kernels import add_act as kernel

        with triton.on(x.device):
            config = kernel.choose(problem, triton.gpu_of(x.device))
            kernel.launch(x, y, out, problem, config, activation=activation)()
    return out if backend else None


def run_kernel_backward(whose: str, grad: Tensor, output: Tensor) -> Tensor | None:
    """The gradient, as :func:`run_kernel`, on tensors of one shape and dtype."""
    if whose not in KERNELS or output.numel() == 0:
        return None
    out = torch.empty_like(output)
    problem = problem_of(output)
    grad, output = _flat(grad, out.stride()), _flat(output, out.stride())
    backend, _ = choose_kernel(NAME, problem, output.device, whose)
    if backend == "cuda":
        cuda.add_act_backward(grad, output, out)
    elif backend == "triton":
        from resnet_fast.kernels import add_act as kernel

        with triton.on(output.device):
            config = kernel.choose(problem, triton.gpu_of(output.device))
            kernel.launch_backward(grad, output, out, problem, config)()
    return out if backend else None


def _cuda(x: Tensor, y: Tensor, activation: str) -> Tensor:
    _check(x, y, activation)
    z = run_kernel(kernels_for(NAME, x), x, y, activation)
    return reference(x, y, activation) if z is None else z


def _cpu(x: Tensor, y: Tensor, activation: str) -> Tensor:
    _check(x, y, activation)
    z = run_kernel(kernels_for(NAME, x), x, y, activation)
    if z is not None:
        return z
    if backends.runs("onednn", "cpu"):
        # One vectorised pass that rounds once, and the ReLU in place on the still cached sum.
        z = torch.add(x, y, out=torch.empty_like(x))
        return z.relu_() if activation == "relu" else z
    return reference(x, y, activation)


def _fake(x: Tensor, y: Tensor, activation: str) -> Tensor:
    _check(x, y, activation)
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output if inputs[2] == "relu" else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (output,) = ctx.saved_tensors
    if output is not None:
        # torch.func and forward mode know how to treat torch's function, not ours.
        grad = (relu_gradient if transformed() else torch.ops.resnet_fast.add_act_backward.default)(grad, output)
    return grad if ctx.needs_input_grad[0] else None, grad if ctx.needs_input_grad[1] else None, None


def _autocast(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, y, activation = args
    # As torch's add under autocast: no cast down, the wider of the two types.
    wider = torch.promote_types(x.dtype, y.dtype)
    return cast(x, wider), cast(y, wider), activation


register(
    "add_act(Tensor x, Tensor y, str activation) -> Tensor",
    default=_default,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def _check_backward(grad: Tensor, output: Tensor) -> None:
    if not output.is_floating_point() or grad.dtype is not output.dtype:
        raise TypeError(
            f"{NAME}_backward: grad and output must have one floating point dtype, got {grad.dtype} and {output.dtype}"
        )
    if grad.shape != output.shape:
        raise ValueError(
            f"{NAME}_backward: grad has shape {list(grad.shape)}, output has {list(output.shape)}; "
            "they must be the same"
        )
    check_device(f"{NAME}_backward", output, grad=grad)


def _backward_default(grad: Tensor, output: Tensor) -> Tensor:
    _check_backward(grad, output)
    return torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=torch.empty_like(output))


def _backward_kernel(grad: Tensor, output: Tensor) -> Tensor:
    _check_backward(grad, output)
    result = run_kernel_backward(kernels_for(NAME, output), grad, output)
    return _backward_default(grad, output) if result is None else result


def _backward_fake(grad: Tensor, output: Tensor) -> Tensor:
    _check_backward(grad, output)
    return torch.empty_like(output)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # Linear in its first argument; in the second it is a step, whose derivative is 0 wherever it has one.
    (output,) = ctx.saved_tensors
    return torch.ops.resnet_fast.add_act_backward.default(grad, output), None


# The gradient for x and y of ``relu(x + y) = output``: grad where not output <= 0 (so it passes where output is NaN).
register(
    "add_act_backward(Tensor grad, Tensor output) -> Tensor",
    default=_backward_default,
    cpu=_backward_kernel,
    cuda=_backward_kernel,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    autocast=lambda dtype, args: args,
)


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
    if transformed():
        _check(x, y, activation)
        return reference(x, y, activation)
    result: Tensor = torch.ops.resnet_fast.add_act.default(x, y, activation)
    return result
