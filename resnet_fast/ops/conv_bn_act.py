"""``conv_bn_act``: convolution, BatchNorm as scale and shift, residual and ReLU with one write of the output."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.kernels.problems import ConvBNAct as Problem

from .. import backends
from .._random import Random
from ..backends import Backend, cpu, cuda, packing, triton
from ..backends.layouts import channels_last, empty_channels_last, kernel_vector, kernel_weight
from ..backends.packing import Geometry
from . import checks
from ._op import Bound, Op, Values
from .common import (
    accumulate_dtype,
    autocast_weight,
    cast,
    conv_output_size,
    freeze_constants,
    keep,
    kept,
    pair,
    result,
)
from .gradients import convolution_gradients, relu_gradient

NAME = "conv_bn_act"


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None = None
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1
    activation: str = "relu"
    residual_after_activation: bool = False

    @property
    def geometry(self) -> Geometry:
        return self[5:9]


def check(a: Arguments) -> None:
    x, weight = a.x, a.weight
    if weight.dim() != 4:
        raise ValueError(f"{NAME}: weight must be 4-D [K, C/groups, R, S], got shape {list(weight.shape)}")
    if 0 in weight.shape[2:]:
        raise ValueError(f"{NAME}: weight's window is {list(weight.shape[2:])}, it must be at least 1x1")
    if a.groups < 1 or weight.shape[0] % a.groups:
        raise ValueError(f"{NAME}: groups is {a.groups}; it must divide the {weight.shape[0]} output channels")
    checks.image(NAME, x, weight.shape[1] * a.groups)
    checks.weight_dtype(NAME, x, weight)
    checks.device(NAME, x, weight=weight, scale=a.scale, shift=a.shift, residual=a.residual)
    checks.per_channel(NAME, weight.shape[0], scale=a.scale, shift=a.shift)
    checks.convolved(NAME, a, output_shape, x.dtype)


def output_shape(a: Arguments) -> list[int]:
    size = conv_output_size(a.x.shape[2:], a.weight.shape[2:], a.stride, a.padding, a.dilation)
    return [a.x.shape[0], a.weight.shape[0], *size]


def reference(a: Arguments) -> Tensor:
    """Compute the op in float32 (float64 for float64) throughout, rounded once."""
    accumulate = accumulate_dtype(a.x.dtype)
    y = torch.conv2d(a.x.to(accumulate), a.weight.to(accumulate), None, *a.geometry)
    y = y * a.scale.to(accumulate).view(1, -1, 1, 1) + a.shift.to(accumulate).view(1, -1, 1, 1)
    if a.residual is not None and not a.residual_after_activation:
        y = y + a.residual.to(accumulate)
    if a.activation == "relu":
        y = y.relu()
    if a.residual is not None and a.residual_after_activation:
        y = y + a.residual.to(accumulate)
    return result(y.to(a.x.dtype))


def problem(a: Arguments) -> Problem:
    """Return what a launch choice depends on; the tensors may be without data."""
    return _problem(a.x.shape, a.weight.shape, a.geometry, triton.precision(a.x.dtype), a.residual is not None)


def _problem(x: Sequence[int], weight: Sequence[int], geometry: Geometry, precision: str, residual: bool) -> Problem:
    n, c, h, w = x
    k, _, r, s = weight
    stride, padding, dilation = ((pair[0], pair[1]) for pair in geometry[:3])
    return Problem(n, h, w, c, k, (r, s), stride, padding, dilation, geometry[3], precision, residual)


@functools.lru_cache(maxsize=4096)
def _asked(*given: Any) -> tuple[Problem, tuple[int, ...], tuple[int, ...]]:
    """Return the problem of shapes, and its output's shape and strides, made once for each."""
    made = _problem(*given)
    k, (p, q) = made.k, made.output
    return made, (made.n, k, p, q), (p * q * k, 1, q * k, k)


def sample(asked: Problem, random: Random) -> Arguments:
    return Arguments(
        random.image(asked.n, asked.c, asked.h, asked.w),
        random.weight(asked.k, asked.c // asked.groups, *asked.kernel),
        *random.scale_and_shift(asked.k),
        random.image(asked.n, asked.k, *asked.output) if asked.residual else None,
        *(asked.stride, asked.padding, asked.dilation, asked.groups),
    )


def kernel(among: tuple[Backend, ...], a: Arguments, bound: Bound[Arguments] | None) -> Tensor | None:
    kept = {} if bound is None else bound.kept
    if "read" not in kept:  # in one step, for threads
        dtype = a.x.dtype if bound is None else bound.dtype
        kept["read"] = kernel_weight(a.weight, dtype), kernel_vector(a.scale), kernel_vector(a.shift)
    weight, scale, shift = kept["read"]
    x, dtype = channels_last(a.x), a.x.dtype
    if weight.dtype is not dtype:
        weight = kernel_weight(weight, dtype)
    residual = None if a.residual is None else channels_last(a.residual)
    geometry = tuple(a.stride), tuple(a.padding), tuple(a.dilation), a.groups
    asked, shape, strides = _asked(x.shape, weight.shape, geometry, triton.precision(dtype), residual is not None)
    out = torch.empty_strided(shape, strides, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    choice = backends.choose(NAME, among, asked, x.device, x, weight, residual, out)
    form: Any = {"activation": a.activation, "residual_after_activation": a.residual_after_activation}
    if choice.backend is cuda:
        cuda.conv_bn_act(choice.kernel, x, weight, scale, shift, residual, out, asked, **form)
    elif choice.backend is triton:
        from resnet_fast.kernels import conv_bn_act as kernels

        config = kernels.choose(asked, triton.gpu_of(x.device))
        if kernels.takes_shares(x, weight, config):
            sums = torch.empty(kernels.sums_shape(asked, config), dtype=torch.float32, device=x.device)
            triton.launch(NAME, asked, x.device, x, weight, sums, function="launch_shares")
            triton.launch(NAME, asked, x.device, sums, scale, shift, residual, out, function="launch_sum", **form)
        else:
            triton.launch(NAME, asked, x.device, x, weight, scale, shift, residual, out, **form)
    return None if choice.backend is None else out


def native(
    a: Arguments, bound: Bound[Arguments] | None = None, overwrite_residual: bool = False, finite: bool = False
) -> Tensor | None:
    """Compute the op on packed weights, by the CPU engine or oneDNN.

    Args:
        overwrite_residual: the result may be written into the residual. finite: neither NaN nor an overflow can reach
            the ReLU.
    """
    packed = packing.packed(NAME, a.x, a.x.dtype, a.weight, a.scale, a.shift, a[5:9], bound)
    if packed is None:
        return None
    conv, folded = packed
    return conv.run(
        a.x, folded, a.residual, overwrite_residual=overwrite_residual, activation=a.activation,
        residual_after_activation=a.residual_after_activation, finite=finite,
    )  # fmt: skip


def context(ctx: Any, a: Arguments, output: Tensor) -> None:
    ctx.has_residual = a.residual is not None
    # With the residual added after the activation the output does not show where the ReLU was open: recomputed then.
    keep_output = a.activation == "relu" and not (ctx.has_residual and a.residual_after_activation)
    keep(ctx, a, output if keep_output else None, without=("residual",))


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, (output,) = kept(ctx)
    grad_residual = grad if ctx.has_residual else None
    if a.activation == "relu":
        if output is None:
            output = OP.overload(*a._replace(residual_after_activation=False))
        grad = relu_gradient(grad, output)
    if ctx.has_residual and not a.residual_after_activation:
        grad_residual = grad
    gradients = convolution_gradients(grad, a[:4], a.geometry, ctx.needs_input_grad[:4])
    return *gradients, grad_residual, *([None] * 6)


def autocast(dtype: torch.dtype, a: Arguments) -> Arguments:
    x = cast(a.x, dtype)
    residual = None if a.residual is None else cast(a.residual, dtype)
    return a._replace(x=x, weight=autocast_weight(a.weight, x.dtype), residual=residual)


def freeze(constants: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    checks.activation(NAME, constants.get("activation", "relu"))
    return freeze_constants(constants, dtype)


def limits(name: str, constants: dict[str, Any], dtype: torch.dtype, chosen: bool) -> str:
    return packing.unsupported(name, chosen, dtype, constants["weight"].shape, constants.get("groups", 1))


def plan(network: cpu.Network, bound: Bound[Arguments], values: Values, stored: cpu.Stored | None = None) -> int:
    a, (x, residual) = bound.of(), values
    layer = bound.keep(
        (cpu.NAME, stored), lambda: packing.engine(a.weight, a.scale, a.shift, a.geometry, bound.dtype, stored)
    )
    return network.convolution(x, layer, residual, a.activation == "relu", a.residual_after_activation)


OP = Op(
    NAME, Arguments, check, lambda a: empty_channels_last(a.x, output_shape(a)), reference, kernel, native, context,
    backward, autocast, data=("x", "residual"), problem=problem, sample=sample, freeze=freeze,
    limits=limits, plan=plan,
)  # fmt: skip


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "relu",
    residual_after_activation: bool = False,
) -> Tensor:
    """Convolution + BatchNorm (as scale and shift) + residual + activation in one pass over the output.

    Computes ``act(conv(x, weight) * scale + shift + residual)``, or with ``residual_after_activation``
    ``act(conv(x, weight) * scale + shift) + residual``. Accumulated and finished in float32 (float64 for float64),
    rounded once. For BatchNorm in eval mode ``scale = gamma / sqrt(var + eps)``, ``shift = beta - mean * scale``
    (+ ``conv_bias * scale``); see Ioffe & Szegedy 2015, arXiv:1502.03167. NaN passes through the ReLU as in torch.

    Args:
        x: [N, C, H, W], floating point, any strides (channels_last is read without a copy).
        weight: [K, C / groups, R, S], x's dtype or float32.
        scale, shift: [K], float32 (float64 for float64 inputs).
        residual: [N, K, P, Q] in x's dtype, or None.
        stride, padding, dilation: an int or (vertical, horizontal).
        groups: as in ``torch.nn.functional.conv2d``.
        activation: "relu" or "none".
        residual_after_activation: add the residual behind the activation instead of before it.

    Returns:
        [N, K, P, Q] in x's dtype, stored channels_last. Differentiable in x, weight, scale, shift and residual.

    Raises:
        ValueError: shapes, devices or options do not fit; TypeError: a dtype does not.
    """
    geometry = (pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"), groups)
    made: Tensor = OP(Arguments(x, weight, scale, shift, residual, *geometry, activation, residual_after_activation))
    return made
