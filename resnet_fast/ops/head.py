"""``head``: global average pool + fully connected layer, the network's end, as one op.

Schema, reference, fake, autograd, autocast and the choice of what runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast.kernels.problems import Head as Problem

from .. import backends
from ..backends import cuda, triton
from ._common import (
    KERNELS,
    accumulate_dtype,
    cast,
    channels_last,
    check_device,
    check_image,
    check_weight_dtype,
    choose_kernel,
    kernel_vector,
    kernels_for,
    register,
    transformed,
)

NAME = "head"


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The op in plain torch, any device and dtype: float32 (float64 for float64) throughout, rounded once."""
    accumulate = accumulate_dtype(x.dtype)
    pooled = x.to(accumulate).mean((2, 3))
    y = torch.nn.functional.linear(pooled, weight.to(accumulate), None if bias is None else bias.to(accumulate))
    return y.to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{NAME}: weight must be 2-D [K, C], got shape {list(weight.shape)}")
    check_image(NAME, x, weight.shape[1])
    check_weight_dtype(NAME, x, weight)
    check_device(NAME, x, weight=weight, bias=bias)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"{NAME}: bias has shape {list(bias.shape)}, it must be [{weight.shape[0]}]")


def _default(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    return reference(x, weight, bias)


def problem_of(x: Tensor, weight: Tensor) -> Problem:
    """What a kernel is asked to compute, of which its choice depends; the tensors may be without data."""
    n, c, h, w = x.shape
    return Problem(n, h, w, c, weight.shape[0], triton.precision(x.dtype, "matmul"))


def run_kernel(whose: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The op by a kernel of ``whose`` (:func:`kernels_for`), on checked arguments.

    None where there is no such kernel, or x is empty.
    """
    if whose not in KERNELS or x.numel() == 0:
        return None
    x = channels_last(x)
    problem = problem_of(x, weight)
    out = x.new_empty((problem.n, problem.k))
    if out.numel() == 0:
        return out
    weight = weight.detach().to(x.dtype).contiguous()
    backend, _ = choose_kernel(NAME, problem, x.device, whose)
    if backend == "cuda":
        cuda.head(x, weight, None if bias is None else kernel_vector(bias), out, problem, triton.gpu_of(x.device))
    elif backend == "triton":
        from resnet_fast.kernels import head as kernel

        bias = None if bias is None else bias.detach().contiguous()
        config = kernel.choose(problem, triton.gpu_of(x.device))
        with triton.on(x.device):
            kernel.launch(x, weight, bias, out, problem, config)()
    return out if backend else None


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    y = run_kernel(kernels_for(NAME, x), x, weight, bias)
    return reference(x, weight, bias) if y is None else y


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    y = run_kernel(kernels_for(NAME, x), x, weight, bias)
    if y is not None:
        return y
    if x.dtype in (torch.bfloat16, torch.float16) and weight.dtype is x.dtype and backends.runs("onednn", "cpu"):
        return run(x, weight, bias)
    return reference(x, weight, bias)


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Half precision without a float32 copy of the weight: torch's half product accumulates in float32 as well."""
    pooled = x.mean((2, 3))
    return torch.nn.functional.linear(pooled, weight, None if bias is None else bias.to(x.dtype))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    accumulate = accumulate_dtype(x.dtype)
    grad = grad.to(accumulate)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        pooled = (grad @ weight.to(accumulate)) / (x.shape[2] * x.shape[3])
        grad_x = pooled.to(x.dtype)[:, :, None, None].expand(x.shape)
    if ctx.needs_input_grad[1]:
        grad_weight = (grad.t() @ x.to(accumulate).mean((2, 3))).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0).to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias


def _autocast(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weight, bias = args
    x = cast(x, dtype)
    weight = weight if weight.dtype in (x.dtype, torch.float32, torch.float64) else weight.float()
    return x, weight, bias


register(
    "head(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    default=_default,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Global average pool + linear: ``mean(x, (2, 3)) @ weight.T + bias``, in float32 or wider, rounded once.

    Args:
        x: [N, C, H, W], floating point, any strides.
        weight: [K, C], x's dtype or float32.
        bias: [K] or None.

    Returns:
        [N, K] in x's dtype. Differentiable in x, weight and bias.

    Raises:
        ValueError: shapes or devices do not fit; TypeError: a dtype does not.
    """
    if transformed():
        _check(x, weight, bias)
        return reference(x, weight, bias)
    result: Tensor = torch.ops.resnet_fast.head.default(x, weight, bias)
    return result
