"""``head``: global average pool + fully connected layer, the network's end, as one op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.kernels.problems import Head as Problem

from .. import backends
from .._random import Random
from ..backends import Backend, cpu, cuda, onednn, triton
from ..backends.layouts import channels_last, kernel_vector
from . import checks
from ._op import Bound, Op, Values
from .common import accumulate_dtype, autocast_weight, cast

NAME = "head"


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None


def check(a: Arguments) -> None:
    x, weight, bias = a
    if weight.dim() != 2:
        raise ValueError(f"{NAME}: weight must be 2-D [K, C], got shape {list(weight.shape)}")
    checks.image(NAME, x, weight.shape[1])
    checks.weight_dtype(NAME, x, weight)
    checks.device(NAME, x, weight=weight, bias=bias)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"{NAME}: bias has shape {list(bias.shape)}, it must be [{weight.shape[0]}]")


def empty(a: Arguments) -> Tensor:
    return a.x.new_empty((a.x.shape[0], a.weight.shape[0]))


def reference(a: Arguments) -> Tensor:
    """Compute the op in float32 (float64 for float64) throughout, rounded once."""
    accumulate = accumulate_dtype(a.x.dtype)
    bias = None if a.bias is None else a.bias.to(accumulate)
    return torch.nn.functional.linear(a.x.to(accumulate).mean((2, 3)), a.weight.to(accumulate), bias).to(a.x.dtype)


def problem(a: Arguments) -> Problem:
    """Return what a launch choice depends on; the tensors may be without data."""
    n, c, h, w = a.x.shape
    return Problem(n, h, w, c, a.weight.shape[0], triton.precision(a.x.dtype, "matmul"))


def sample(asked: Problem, random: Random) -> Arguments:
    x, weight = random.image(asked.n, asked.c, asked.h, asked.w), random.weight(asked.k, asked.c)
    return Arguments(x, weight, random.normal(asked.k, dtype=random.dtype))


def kernel(among: tuple[Backend, ...], a: Arguments, bound: Bound[Arguments] | None) -> Tensor | None:
    x, asked, out = channels_last(a.x), problem(a), empty(a)
    if out.numel() == 0:
        return out
    weight = a.weight.detach().to(x.dtype).contiguous()
    choice = backends.choose(NAME, among, asked, x.device)
    if choice.backend is cuda:
        bias = None if a.bias is None else kernel_vector(a.bias)
        cuda.head(x, weight, bias, out, asked, triton.gpu_of(x.device))
    elif choice.backend is triton:
        bias = None if a.bias is None else a.bias.detach().contiguous()
        triton.launch(NAME, asked, x.device, x, weight, bias, out)
    return None if choice.backend is None else out


def native(a: Arguments, bound: Bound[Arguments] | None = None) -> Tensor | None:
    """Compute the op in half precision without a float32 copy of the weight: torch's half product accumulates in
    float32 as well.
    """
    half = a.x.dtype in (torch.bfloat16, torch.float16) and a.weight.dtype is a.x.dtype
    if not half or (bound is None and not backends.runs("onednn", a.x.device.type)):
        return None
    return torch.nn.functional.linear(a.x.mean((2, 3)), a.weight, None if a.bias is None else a.bias.to(a.x.dtype))


def context(ctx: Any, a: Arguments, output: Tensor) -> None:
    ctx.bias_dtype = None if a.bias is None else a.bias.dtype
    ctx.save_for_backward(a.x, a.weight)


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
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


def autocast(dtype: torch.dtype, a: Arguments) -> Arguments:
    x = cast(a.x, dtype)
    return a._replace(x=x, weight=autocast_weight(a.weight, x.dtype))


def freeze(constants: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants rounded once to ``dtype``."""
    return {name: None if value is None else value.detach().to(dtype) for name, value in constants.items()}


def limits(name: str, constants: dict[str, Any], dtype: torch.dtype, chosen: bool) -> str:
    return cpu.unsupported(dtype) if name == cpu.NAME else onednn.unavailable()


def plan(network: cpu.Network, bound: Bound[Arguments], values: Values) -> int:
    a, (x,) = bound.of(), values
    weight = a.weight[:, :, None, None]
    bias = a.weight.new_zeros(weight.shape[0]) if a.bias is None else a.bias
    layer = bound.keep(cpu.NAME, lambda: cpu.Convolution(weight, bias, ((1, 1), (0, 0), (1, 1), 1), bound.dtype))
    return network.convolution(network.average(x), layer, None, relu=False)


OP = Op(
    NAME, Arguments, check, empty, reference, kernel, native, context, backward, autocast, problem=problem,
    sample=sample, freeze=freeze, limits=limits, plan=plan,
)  # fmt: skip


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
    made: Tensor = OP(Arguments(x, weight, bias))
    return made
