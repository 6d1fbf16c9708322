"""``conv_statistics``: a training convolution with the mean and variance of its output, for the BatchNorm behind it.

One torch op, with or without BatchNorm + ReLU in front of the convolution (:class:`recompute.Norm`), whose output is
then not kept but made again in the backward. Only y carries a gradient: what mean and variance owe to y is the business
of ``batch_norm_act``'s backward. No launch choice is made here, no table is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from resnet_fast.kernels import _tables
from resnet_fast.kernels.problems import ConvStatistics as Problem

from .. import backends
from .._random import Random
from ..backends import triton
from ..backends.layouts import channels_last, empty_channels_last, kernel_vector, kernel_weight
from . import checks
from ._op import Op
from .batch_norm_act import Norm, moments
from .common import accumulate_dtype, cast
from .recompute import NO_NORM, convolved, norm_and_conv_backward, save_norm_and_conv
from .recompute import NormActConv as Arguments

NAME = "conv_statistics"

_BIAS = "the Triton kernel has no bias in front of its statistics"


def check(a: Arguments) -> None:
    if a.weight.dim() != 4 or a.weight.shape[0] % a.groups:
        raise ValueError(
            f"{NAME}: weight has shape {list(a.weight.shape)}, groups is {a.groups}: [K, C / groups, R, S]"
        )
    checks.image(NAME, a.x, a.weight.shape[1] * a.groups)
    vectors = {"gamma": a.gamma, "beta": a.beta, "mean": a.mean, "invstd": a.invstd}
    checks.device(NAME, a.x, **vectors, weight=a.weight, bias=a.bias)


def problem_of(x: Tensor, dtype: torch.dtype, weight: Tensor, geometry: Sequence[Any], normalised: bool) -> Problem:
    """Return what the kernels are asked for where x is read in ``dtype``."""
    (n, c, h, w), (k, _, *window) = x.shape, weight.shape
    pairs: Any = [tuple(pair) for pair in (window, *geometry[:3])]
    return Problem(n, h, w, c, k, *pairs, geometry[3], triton.precision(dtype), False, normalised)


def chosen(x: Tensor, normalised: bool, weight: Tensor, bias: Tensor | None, *geometry: Any) -> bool:
    """Whether the op's Triton kernel would compute this, under autocast too; nothing is recorded, no kernel imported.

    By itself on CUDA tensors, where a table has measured that it takes less time than convolution and statistics. Under
    ``backends.use("triton")`` wherever it can. Never while ``torch.compile`` traces, whose graph keeps no such choice.
    """
    how = backends.current()
    if how not in ("auto", "triton") or (how == "auto" and x.device.type != "cuda"):
        return False
    if torch.compiler.is_compiling() or bias is not None or not x.numel() or triton.unavailable():
        return False
    kind = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(kind) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    if triton.unsupported(dtype, x.device):
        return False
    problem = problem_of(x, dtype, weight, geometry, normalised)
    return how == "triton" or _pays(problem, triton.gpu_of(x.device).name)


@lru_cache(maxsize=4096)
def _pays(problem: Problem, gpu: str) -> bool:
    return _tables.pays(NAME, problem.key(), gpu)


_tables.remembers(_pays)


def run_kernel(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op by Triton, on checked arguments without a bias."""
    from resnet_fast.kernels import conv_statistics as kernels

    x, weight, before = channels_last(a.x), kernel_weight(a.weight, a.x.dtype), a.before
    problem = problem_of(x, x.dtype, weight, a[10:], before is not None)
    if min(problem.output) < 1:
        return plain(a)  # which says what is wrong
    y = empty_channels_last(x, [problem.n, problem.k, *problem.output])
    config = kernels.choose(problem, triton.gpu_of(x.device))
    mean, variance = (torch.empty(problem.k, dtype=torch.float32, device=x.device) for _ in range(2))
    workspace = torch.empty(kernels.workspace_size(problem, config), dtype=torch.float32, device=x.device)
    vectors = (None, None) if before is None else scale_and_shift(before)

    def launches() -> None:
        for launch in kernels.launches(x, weight, *vectors, y, mean, variance, workspace, problem, config):
            launch()

    try:
        triton.run(NAME, problem, x.device, launches)
    except triton.Refused as refused:
        if backends.named():
            raise
        backends.fallback(NAME, f"{refused}; convolution and statistics run one after the other instead")
        return plain(a)
    return y, mean, variance


def scale_and_shift(norm: Norm) -> tuple[Tensor, Tensor]:
    """Return a norm as the kernel applies it, [C] each in float32: ``x * scale + shift``."""
    mean, scale = kernel_vector(norm.mean), kernel_vector(norm.invstd)
    if norm.gamma is not None:
        scale = scale * kernel_vector(norm.gamma)
    if norm.beta is None:
        return scale, -mean * scale
    return scale, torch.addcmul(kernel_vector(norm.beta), mean, scale, value=-1)


def plain(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op by those it stands for: ``batch_norm_act``, torch's convolution, the pass for statistics."""
    y = a.convolved()
    return y, *moments(y)


def compute(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    if backends.current() == triton.NAME:
        if a.x.numel() and backends.candidates(NAME, a.x.device, a.x.dtype):  # which records why not
            if a.bias is None:
                return run_kernel(a)
            backends.fallback(NAME, f"{_BIAS}; convolution and statistics run one after the other")
    elif chosen(a.x, a.mean is not None, *a[8:]):
        return run_kernel(a)
    return plain(a)


def empty(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    y = convolved(a.x, *a[8:])
    mean, variance = (a.x.new_empty(y.shape[1], dtype=accumulate_dtype(a.x.dtype)) for _ in range(2))
    return y, mean, variance


def context(ctx: Any, a: Arguments, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    save_norm_and_conv(ctx, a)


def sample(asked: Problem, random: Random) -> Arguments:
    """An x whose mean is not 0; statistics in front such that they leave it about as large."""
    c, before = asked.c, NO_NORM
    if asked.normalised:
        before = Norm(*random.scale_and_shift(c), random.normal(c), random.normal(c).abs() + 0.5, False, None, "")
    x, weight = random.image(asked.n, c, asked.h, asked.w), random.weight(asked.k, c // asked.groups, *asked.kernel)
    geometry = asked.stride, asked.padding, asked.dilation, asked.groups
    return Arguments._make((x.add_(0.5), *before, weight, None, *geometry))


OP = Op(
    NAME, Arguments, check, empty, compute, context=context, backward=norm_and_conv_backward,
    autocast=lambda dtype, a: a._replace(x=cast(a.x, dtype)), sample=sample, returns=tuple[Tensor, Tensor, Tensor],
)  # fmt: skip


def conv_statistics(
    x: Tensor, before: Norm | None, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = conv(x, weight, bias)``, or of ``relu(before(x))``, with the mean and biased variance of y's channels.

    Args:
        x: [N, C, H, W], floating point. before: the BatchNorm + ReLU in front of the convolution; x is then what is
            kept for the backward, and relu(before(x)) made again.
        weight: [K, C / groups, R, S], rounded to x's dtype (autocast's under it). bias: [K] or None.
        geometry: stride, padding, dilation, two ints each, and groups.

    Returns:
        y [N, K, P, Q], stored channels_last, differentiable in x, before's gamma and beta, weight and bias; mean and
        variance [K] in float32 (float64 for float64), of y as it is rounded, without a gradient.

    Raises:
        ValueError: shapes or devices do not fit; TypeError: x is not floating point.
    """
    norm = NO_NORM if before is None else before
    made: tuple[Tensor, Tensor, Tensor] = OP.overload(x, *norm, weight, bias, *geometry)
    return made
