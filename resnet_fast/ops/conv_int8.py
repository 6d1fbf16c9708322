"""``conv_int8``: a convolution of uint8 with an int8 weight, its residual and ReLU, and one rounding at the end."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.kernels.problems import ConvInt8 as Problem

from .._dtypes import DTYPES
from .._random import Random
from ..backends import Backend, triton
from ..backends.layouts import channels_last, empty_channels_last, kernel_vector, kernel_weight
from . import checks
from ._op import Bound, Op
from .common import conv_output_size, result

NAME = "conv_int8"

#: How outputs and residuals are stored, by the names of problems.
OUTPUTS = {"uint8": torch.uint8, **{name: DTYPES[name] for name in ("fp16", "bf16", "fp32")}}

#: How many products of 255 and 127 are added up in 32 bits.
MOST_PRODUCTS = (2**31 - 1) // (255 * 127)


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    zero_point: int = 0
    out: str = "uint8"
    out_zero_point: int = 0
    largest: int = 255
    residual: Tensor | None = None
    residual_scale: float = 1.0
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    activation: str = "relu"
    residual_after_activation: bool = False


def check(a: Arguments) -> None:
    x, weight = a.x, a.weight
    if x.dim() != 4 or x.dtype is not torch.uint8:
        raise TypeError(f"{NAME}: x must be uint8 [N, C, H, W], got {x.dtype} of shape {list(x.shape)}")
    if weight.dim() != 4 or weight.dtype is not torch.int8 or 0 in weight.shape[2:]:
        raise TypeError(f"{NAME}: weight must be int8 [K, C, R, S], got {weight.dtype} of shape {list(weight.shape)}")
    if len(weight) and weight[0].numel() > MOST_PRODUCTS:
        raise ValueError(f"{NAME}: {weight[0].numel()} products may not fit in 32 bits; at most {MOST_PRODUCTS} do")
    checks.per_channel(NAME, weight.shape[0], scale=a.scale, shift=a.shift)
    if a.out not in OUTPUTS:
        raise ValueError(f"{NAME}: out is {a.out!r}; it must be one of {list(OUTPUTS)}")
    for name, value in (("zero_point", a.zero_point), ("out_zero_point", a.out_zero_point), ("largest", a.largest)):
        if not 0 <= value <= 255:
            raise ValueError(f"{NAME}: {name} is {value}; it must be from 0 to 255")
    checks.quantized_conv(NAME, a, output_shape, OUTPUTS[a.out])


def output_shape(a: Any) -> list[int]:
    """Return [N, K, P, Q] of any quantized convolution's arguments."""
    size = conv_output_size(a.x.shape[2:], a.weight.shape[2:], a.stride, a.padding, a.dilation)
    return [a.x.shape[0], a.weight.shape[0], *size]


def empty(a: Arguments) -> Tensor:
    return empty_channels_last(a.x, output_shape(a), OUTPUTS[a.out])


def reference(a: Arguments) -> Tensor:
    """Compute the sums exactly, in float64, which holds them; then float32, in the order in which kernels do."""
    x = a.x.double() - a.zero_point  # so that padding is 0
    sums = torch.conv2d(x, a.weight.double(), None, a.stride, a.padding, a.dilation)
    y = epilogue(sums.to(torch.int32).float(), a)
    if a.out == "uint8":
        y = y.clamp(-a.out_zero_point, a.largest - a.out_zero_point).round() + a.out_zero_point
    return result(y.to(OUTPUTS[a.out]))


def epilogue(sums: Tensor, a: Any) -> Tensor:
    """Return what becomes of sums in float32, of any quantized convolution's arguments, before it is stored."""
    y = sums * a.scale.float().view(1, -1, 1, 1)
    y = y + a.shift.float().view(1, -1, 1, 1)
    added = None if a.residual is None else a.residual.float() * a.residual_scale
    if added is not None and not a.residual_after_activation:
        y = y + added
    if a.activation == "relu":
        y = y.relu()
    if added is not None and a.residual_after_activation:
        y = y + added
    return y


def problem(a: Arguments) -> Problem:
    """Return what a launch choice depends on; the tensors may be without data."""
    (n, c, h, w), (k, _, r, s) = a.x.shape, a.weight.shape
    stride, padding, dilation = ((pair[0], pair[1]) for pair in (a.stride, a.padding, a.dilation))
    residual = a.residual is not None
    return Problem(n, h, w, c, k, (r, s), stride, padding, dilation, 1, "int8", residual, a.out, a.zero_point != 0)


def sample(asked: Problem, random: Random) -> Arguments:
    def image(channels: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        drawn = random.normal(asked.n, channels, *size)
        stored = (drawn.abs_() * 64).clamp_(0, 255) if dtype is torch.uint8 else drawn
        return stored.to(dtype).to(memory_format=torch.channels_last)

    weight = (random.normal(asked.k, asked.c, *asked.kernel) * 40).clamp_(-127, 127).to(torch.int8)
    scale, shift = random.scale_and_shift(asked.k)
    residual = image(asked.k, asked.output, OUTPUTS[asked.out]) if asked.residual else None
    steps = 1 / (80 * max(1, weight[0].numel()) ** 0.5) if len(weight) else 1.0
    x, weight = image(asked.c, (asked.h, asked.w), torch.uint8), weight.to(memory_format=torch.channels_last)
    return Arguments(
        x, weight, scale * steps, shift, 7 if asked.shifted else 0, asked.out, residual=residual, residual_scale=0.5,
        stride=asked.stride, padding=asked.padding, dilation=asked.dilation,
    )  # fmt: skip


def offset(a: Arguments) -> Tensor:
    """Return what makes of sums of x - 128 those of x - zero_point: int32 [K]."""
    return a.weight.sum((1, 2, 3), dtype=torch.int32) * (128 - a.zero_point)


def kernel(among: tuple[Backend, ...], a: Arguments, bound: Bound[Arguments] | None) -> Tensor | None:
    if triton not in among:
        return None
    kept = {} if bound is None else bound.kept
    if "read" not in kept:  # in one step, for threads
        weight = kernel_weight(a.weight, torch.int8)
        kept["read"] = weight, kernel_vector(a.scale), kernel_vector(a.shift), offset(a)
    x, asked, out = channels_last(a.x), _problem(a), empty(a)
    if out.numel() == 0:
        return out
    residual = None if a.residual is None else channels_last(a.residual)
    triton.launch(
        NAME, asked, x.device, x, *kept["read"], residual, out, residual_scale=a.residual_scale,
        activation=a.activation, residual_after_activation=a.residual_after_activation, zero_point=a.zero_point,
        out_zero_point=a.out_zero_point, largest=a.largest,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=4096)
def _asked(*given: Any) -> Problem:
    return Problem(*given)


def _problem(a: Arguments) -> Problem:
    """As :func:`problem`, made once for each."""
    (n, c, h, w), (k, _, r, s) = a.x.shape, a.weight.shape
    pairs = tuple(a.stride), tuple(a.padding), tuple(a.dilation)
    return _asked(n, h, w, c, k, (r, s), *pairs, 1, "int8", a.residual is not None, a.out, a.zero_point != 0)


OP = Op(
    NAME, Arguments, check, empty, reference, kernel, dtype=lambda a: torch.float16, data=("x", "residual"),
    problem=problem, sample=sample, limits=lambda name, constants, dtype, chosen: f"{NAME} has kernels for GPUs only",
)  # fmt: skip


def conv_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    zero_point: int = 0,
    out: str = "uint8",
    out_zero_point: int = 0,
    largest: int = 255,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "relu",
    residual_after_activation: bool = False,
) -> Tensor:
    """Convolve uint8 with an int8 weight, add a residual, apply the activation, and round once.

    With ``sums = conv(x - zero_point, weight)``, exact in 32 bits, ``y = act(sums * scale + shift + residual *
    residual_scale)`` in float32, or with ``residual_after_activation`` ``act(sums * scale + shift) + residual *
    residual_scale``. The result is y, or for uint8 ``clamp(round(y), -out_zero_point, largest - out_zero_point) +
    out_zero_point``, rounded half to even: scale, shift and residual_scale are then in steps of the output.

    Args:
        x: [N, C, H, W] uint8, any strides (channels_last is read without a copy).
        weight: [K, C, R, S] int8.
        scale, shift: [K] float32. A zero point of a residual that is added before the activation goes into shift.
        zero_point: what stands for 0 in x; padding is that.
        out: dtype of the result and the residual: "uint8", "fp16", "bf16" or "fp32".
        out_zero_point, largest: what stands for 0, and the largest value, in a result of uint8.
        residual: [N, K, P, Q] in the result's dtype, or None.
        stride, padding, dilation: (vertical, horizontal).
        activation: "relu" or "none".

    Returns:
        [N, K, P, Q], stored channels_last. Not differentiable.

    Raises:
        ValueError: shapes, devices or options do not fit; TypeError: a dtype does not.

    Examples:
        >>> import torch
        >>> x = torch.full((1, 32, 4, 4), 255, dtype=torch.uint8)
        >>> weight = torch.ones(8, 32, 1, 1, dtype=torch.int8)
        >>> conv_int8(x, weight, torch.full((8,), 1 / 64), torch.zeros(8))[0, 0, 0]
        tensor([128, 128, 128, 128], dtype=torch.uint8)
    """
    made: Tensor = OP(
        Arguments(
            x, weight, scale, shift, zero_point, out, out_zero_point, largest, residual, residual_scale, stride,
            padding, dilation, activation, residual_after_activation,
        )
    )  # fmt: skip
    return made
