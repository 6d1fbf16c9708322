"""``conv_fp8``: a convolution of float8 (e4m3) with a float8 weight, its residual and ReLU, and one rounding.

float8 is ``torch.float8_e4m3fn``: 3 bits of fraction, up to 448, NaN but no infinity.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.kernels.problems import ConvFp8 as Problem

from .. import backends
from .._dtypes import DTYPES, FLOAT8, narrowed
from .._random import Random
from ..backends import Backend, triton
from ..backends.layouts import channels_last, empty_channels_last, kernel_vector, kernel_weight
from . import checks
from ._op import Bound, Op
from .common import result
from .conv_int8 import epilogue, output_shape

NAME = "conv_fp8"

#: How outputs and residuals are stored, by the names of problems.
OUTPUTS = {"fp8": FLOAT8, **{name: DTYPES[name] for name in ("fp16", "bf16", "fp32")}}


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    out: str = "fp8"
    residual: Tensor | None = None
    residual_scale: float = 1.0
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    activation: str = "relu"
    residual_after_activation: bool = False


def check(a: Arguments) -> None:
    x, weight = a.x, a.weight
    if x.dim() != 4 or x.dtype is not FLOAT8:
        raise TypeError(f"{NAME}: x must be {FLOAT8} [N, C, H, W], got {x.dtype} of shape {list(x.shape)}")
    if weight.dim() != 4 or weight.dtype is not FLOAT8 or 0 in weight.shape[2:]:
        raise TypeError(f"{NAME}: weight must be {FLOAT8} [K, C, R, S], got {weight.dtype} {list(weight.shape)}")
    if a.out not in OUTPUTS:
        raise ValueError(f"{NAME}: out is {a.out!r}; it must be one of {list(OUTPUTS)}")
    checks.per_channel(NAME, weight.shape[0], scale=a.scale, shift=a.shift)
    checks.quantized_conv(NAME, a, output_shape, OUTPUTS[a.out])


def empty(a: Arguments) -> Tensor:
    return empty_channels_last(a.x, output_shape(a), OUTPUTS[a.out])


def reference(a: Arguments) -> Tensor:
    """Compute the sums in float64, rounded once; then float32, in the order in which kernels do."""
    sums = torch.conv2d(a.x.double(), a.weight.double(), None, a.stride, a.padding, a.dilation)
    return result(narrowed(epilogue(sums.float(), a), OUTPUTS[a.out]))


def problem(a: Arguments) -> Problem:
    """Return what a launch choice depends on, made once for each; the tensors may be without data."""
    (n, c, h, w), (k, _, r, s) = a.x.shape, a.weight.shape
    pairs = tuple(a.stride), tuple(a.padding), tuple(a.dilation)
    return _asked(n, h, w, c, k, (r, s), *pairs, 1, "fp8", a.residual is not None, a.out)


@functools.lru_cache(maxsize=4096)
def _asked(*given: Any) -> Problem:
    return Problem(*given)


def sample(asked: Problem, random: Random) -> Arguments:
    def image(channels: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        drawn = narrowed(random.normal(asked.n, channels, *size), dtype)
        return drawn.to(memory_format=torch.channels_last)

    weight = narrowed(random.normal(asked.k, asked.c, *asked.kernel), FLOAT8).to(memory_format=torch.channels_last)
    scale, shift = random.scale_and_shift(asked.k)
    residual = image(asked.k, asked.output, OUTPUTS[asked.out]) if asked.residual else None
    unit = 1 / max(1, asked.c * asked.kernel[0] * asked.kernel[1]) ** 0.5
    x = image(asked.c, (asked.h, asked.w), FLOAT8)
    return Arguments(
        x, weight, scale * unit, shift, asked.out, residual, 0.5, asked.stride, asked.padding, asked.dilation
    )


def kernel(among: tuple[Backend, ...], a: Arguments, bound: Bound[Arguments] | None) -> Tensor | None:
    if triton not in among:
        return None
    if reason := triton.without_float8(a.x.device):
        backends.fallback(NAME, f"{reason}; the plain torch reference runs instead")
        return None
    kept = {} if bound is None else bound.kept
    if "read" not in kept:  # in one step, for threads
        kept["read"] = kernel_weight(a.weight, FLOAT8), kernel_vector(a.scale), kernel_vector(a.shift)
    x, out = channels_last(a.x), empty(a)
    if out.numel() == 0:
        return out
    residual = None if a.residual is None else channels_last(a.residual)
    triton.launch(
        NAME, problem(a), x.device, x, *kept["read"], residual, out, residual_scale=a.residual_scale,
        activation=a.activation, residual_after_activation=a.residual_after_activation,
    )  # fmt: skip
    return out


OP = Op(
    NAME, Arguments, check, empty, reference, kernel, dtype=lambda a: torch.float16, data=("x", "residual"),
    problem=problem, sample=sample, limits=lambda name, constants, dtype, chosen: f"{NAME} has kernels for GPUs only",
)  # fmt: skip


def conv_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    out: str = "fp8",
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "relu",
    residual_after_activation: bool = False,
) -> Tensor:
    """Convolve float8 with a float8 weight, add a residual, apply the activation, and round once.

    ``y = act(conv(x, weight) * scale + shift + residual * residual_scale)`` in float32, or with
    ``residual_after_activation`` ``act(conv(x, weight) * scale + shift) + residual * residual_scale``. In float8
    what is beyond 448, infinity too, becomes 448 with its sign; NaN stays NaN.

    Args:
        x: [N, C, H, W] torch.float8_e4m3fn, any strides (channels_last is read without a copy).
        weight: [K, C, R, S] torch.float8_e4m3fn.
        scale, shift: [K] float32.
        out: dtype of the result and the residual: "fp8", "fp16", "bf16" or "fp32".
        residual: [N, K, P, Q] in the result's dtype, or None.
        stride, padding, dilation: (vertical, horizontal).
        activation: "relu" or "none".

    Returns:
        [N, K, P, Q], stored channels_last. Not differentiable.

    Raises:
        ValueError: shapes, devices or options do not fit; TypeError: a dtype does not.

    Examples:
        >>> import torch
        >>> x = torch.full((1, 32, 4, 4), 2.0).to(torch.float8_e4m3fn)
        >>> weight = torch.ones(8, 32, 1, 1).to(torch.float8_e4m3fn)
        >>> conv_fp8(x, weight, torch.full((8,), 1 / 8), torch.zeros(8))[0, 0, 0].float()
        tensor([8., 8., 8., 8.])
    """
    made: Tensor = OP(
        Arguments(
            x, weight, scale, shift, out, residual, residual_scale, stride, padding, dilation, activation,
            residual_after_activation,
        )
    )  # fmt: skip
    return made
