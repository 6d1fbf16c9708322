"""Training ops that keep less for the backward: they save what a convolution gave and compute the rest again.

``norm_act_conv``: BatchNorm + ReLU in front of a convolution; keeps the BatchNorm's input instead of its output.
``conv_norm_act``: convolution + BatchNorm + residual + activation; keeps the convolution's input instead of its output,
which a second run of the convolution brings back. ``norm_act_pool``: BatchNorm + ReLU + max-pool 3x3/2, for a stem.

Together they leave of a bottleneck block two tensors of its narrow width and its output. They have no kernels of their
own: convolutions are torch's (oneDNN, cuDNN), the rest is ``batch_norm_act``. BatchNorms come as :class:`Norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..backends.layouts import channels_last, empty_channels_last
from . import checks
from ._op import Op
from .batch_norm_act import OP as BATCH_NORM_ACT
from .batch_norm_act import Norm, norm_gradients
from .common import cast, conv_output_size, keep, kept, result
from .gradients import convolution_backward, max_pool, max_pool_gradient

Ints: TypeAlias = Sequence[int]


def apply_norm(x: Tensor, norm: Norm | None, residual: Tensor | None = None, activation: str = "relu") -> Tensor:
    """Return ``act(norm(x) + residual)``, x itself if there is no norm."""
    if norm is None:
        return x
    gamma, beta, mean, invstd, of_batch, total, group = norm
    out: Tensor = BATCH_NORM_ACT.overload(x, gamma, beta, mean, invstd, residual, activation, of_batch, total, group)
    return out


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Compute the convolution in x's dtype, stored channels_last."""
    stride, padding, dilation, groups = geometry
    bias = None if bias is None else bias.to(x.dtype)
    arguments = (x, weight.to(x.dtype), bias, stride, padding, dilation, False, [0, 0], groups)
    return result(torch.ops.aten.convolution.default(*arguments))


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Return memory for the convolution's output."""
    stride, padding, dilation, _ = geometry
    size = conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_channels_last(x, [x.shape[0], weight.shape[0], *size])


class ConvAgain(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int


# The convolution as an op without gradients. A compiler that saw the same one in the forward would keep its result.
CONV_AGAIN = Op(
    "conv_again", ConvAgain, lambda a: checks.image("conv_again", a.x, a.weight.shape[1] * a.groups),
    lambda a: convolved(*a), lambda a: convolve(*a),
    autocast=lambda dtype, a: a,  # a backward inside of autocast computes as the forward did
)  # fmt: skip


def differentiate(function: Any, inputs: Sequence[Any], needed: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Gradients by torch's own differentiation of ``function(*inputs)``: for gradients of gradients."""
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Each input by a name of its own: two may be one tensor, or one be made of another.
        inputs = [x.view_as(x) if need else x for x, need in zip(inputs, needed, strict=True)]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


# --- norm_act_conv


class NormActConv(NamedTuple):
    """A convolution with a norm and ReLU before it, or with none, whose fields are then those of ``NO_NORM``."""

    x: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None
    of_batch: bool
    count: Tensor | None  # type: ignore[assignment]  # a tuple has such a method
    group: str
    weight: Tensor
    bias: Tensor | None
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int

    @property
    def before(self) -> Norm | None:
        """The norm before the convolution."""
        return None if self.mean is None else Norm(*self[1:8])  # type: ignore[arg-type]

    def inner(self) -> Tensor:
        """Compute ``relu(norm(x))``, which the convolution reads."""
        return channels_last(self.x) if self.before is None else apply_norm(self.x, self.before)

    def convolved(self) -> Tensor:
        """Compute ``conv(relu(norm(x)))``, or without the norm if there is none."""
        return convolve(apply_norm(self.x, self.before), *self[8:])


def gradients_of_norm_and_conv(
    grad: Tensor, conv: NormActConv, a: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``conv(a, weight, bias)`` for x, before's gamma and beta, weight and bias, None if not ``needed``.

    ``a`` is what :meth:`NormActConv.inner` gives.
    """
    inside, (need_weight, need_bias) = any(needed[:3]), needed[3:]
    weight, bias, before = conv.weight, conv.bias, conv.before
    sizes, wanted = None if bias is None else [bias.shape[0]], (inside, need_weight, need_bias)
    grad_a, grad_weight, grad_bias = convolution_backward(grad, a, weight.to(a.dtype), sizes, conv[10:], wanted)
    grads = (
        grad_weight.to(weight.dtype) if need_weight else None,
        grad_bias.to(bias.dtype) if need_bias and bias is not None else None,
    )
    if before is None or not inside:
        return grad_a, None, None, *grads
    return *norm_gradients(grad_a, conv.x, a, before, (needed[0], needed[1], needed[2], False))[:3], *grads


def save_norm_and_conv(ctx: Any, a: NormActConv, *_: Any) -> None:
    """Save the arguments of a convolution with a norm and ReLU before it for :func:`norm_and_conv_backward`."""
    ctx.set_materialize_grads(False)
    keep(ctx, a)


def norm_and_conv_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    """Differentiate ``conv(relu(norm(x)), weight, bias)``, or without the norm if there is none."""
    a, _others = kept(ctx)
    needed = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[8:10])  # x, gamma, beta, weight, bias
    grads: Sequence[Tensor | None] = [None] * 5
    if grad is not None and torch.is_grad_enabled():

        def plainly(x: Tensor, gamma: Any, beta: Any, weight: Tensor, bias: Any) -> Tensor:
            changed: NormActConv = a._replace(x=x, gamma=gamma, beta=beta, weight=weight, bias=bias)
            return changed.convolved()

        grads = differentiate(plainly, (a.x, a.gamma, a.beta, a.weight, a.bias), needed, grad)
    elif grad is not None:
        grads = gradients_of_norm_and_conv(grad, a, a.inner(), needed)
    return *grads[:3], *([None] * 5), *grads[3:], *([None] * 4)


NORM_ACT_CONV = Op(
    "norm_act_conv", NormActConv, lambda a: checks.image("norm_act_conv", a.x, a.weight.shape[1] * a.groups),
    lambda a: convolved(a.x, *a[8:]), NormActConv.convolved, context=save_norm_and_conv,
    backward=norm_and_conv_backward, autocast=lambda dtype, a: a._replace(x=cast(a.x, dtype)),
    schema="norm_act_conv(Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor invstd, bool of_batch, Tensor? "
    "count, str group, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt "
    "groups) -> Tensor",
)  # fmt: skip


def norm_act_conv(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """``conv(relu(norm(x)), weight, bias)``, of which x is kept for the backward, and relu(norm(x)) made again.

    Args:
        x: [N, C, H, W], floating point. weight: [K, C / groups, R, S], rounded to x's dtype (autocast's under it).
        geometry: stride, padding, dilation, two ints each, and groups.

    Returns:
        [N, K, P, Q], stored channels_last. Differentiable in x, norm's gamma and beta, weight and bias.
    """
    out: Tensor = NORM_ACT_CONV.overload(x, *norm, weight, bias, *geometry)
    return out


# --- conv_norm_act


class ConvNormAct(NamedTuple):
    """The names that end in 0 are those of the norm before the convolution, of which there may be none."""

    y: Tensor
    x: Tensor
    gamma0: Tensor | None
    beta0: Tensor | None
    mean0: Tensor | None
    invstd0: Tensor | None
    of_batch0: bool
    count0: Tensor | None
    group0: str
    weight: Tensor
    bias: Tensor | None
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    invstd: Tensor
    of_batch: bool
    count: Tensor | None  # type: ignore[assignment]  # a tuple has such a method
    group: str
    residual: Tensor | None
    activation: str

    @property
    def conv(self) -> NormActConv:
        return NormActConv(*self[1:15])

    @property
    def norm(self) -> Norm:
        return Norm(*self[15:22])


def _conv_norm_act_context(ctx: Any, a: ConvNormAct, output: Tensor) -> None:
    keep(ctx, a, output if a.activation == "relu" else None, without=("y", "residual"))


def _conv_norm_act_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, (output,) = kept(ctx)
    positions = (1, 2, 3, 9, 10, 15, 16, 22)  # of x, gamma0, beta0, weight, bias, gamma, beta, residual
    needed = tuple(ctx.needs_input_grad[position] for position in positions)
    found: list[Tensor | None] = [None] * 8
    if torch.is_grad_enabled():
        zero = torch.zeros_like(grad).requires_grad_() if needed[7] else None
        names = [ConvNormAct._fields[position] for position in positions[:7]]

        def plainly(*inputs: Any) -> Tensor:
            changed = a._replace(**dict(zip(names, inputs[:7], strict=True)))
            y = apply_norm(changed.conv.convolved(), changed.norm, inputs[7], "none")
            # The residual is not kept; the output shows what of the sum went through.
            return y if output is None else torch.where(output <= 0, 0.0, y).to(y.dtype)

        found = differentiate(plainly, (*(getattr(a, name) for name in names), zero), needed, grad)
    else:
        inner = a.conv.inner()
        y = CONV_AGAIN.overload(inner, *a[9:15])
        grad_y, *found[5:] = norm_gradients(grad, y, output, a.norm, (any(needed[:5]), *needed[5:]))
        del y
        if grad_y is not None:
            found[:5] = gradients_of_norm_and_conv(grad_y, a.conv, inner, needed[:5])
    every: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for position, gradient in zip(positions, found, strict=True):
        every[position] = gradient
    return tuple(every)


def _conv_norm_act_autocast(dtype: torch.dtype, a: ConvNormAct) -> ConvNormAct:
    return a._replace(x=cast(a.x, dtype), residual=None if a.residual is None else cast(a.residual, a.y.dtype))


CONV_NORM_ACT = Op(
    "conv_norm_act", ConvNormAct, lambda a: None, lambda a: empty_channels_last(a.y, a.y.shape),
    lambda a: apply_norm(a.y, a.norm, a.residual, a.activation), context=_conv_norm_act_context,
    backward=_conv_norm_act_backward, autocast=_conv_norm_act_autocast,
)  # fmt: skip

NO_NORM: tuple[Any, ...] = (None, None, None, None, False, None, "")


def conv_norm_act(
    y: Tensor,
    x: Tensor,
    before: Norm | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    norm: Norm,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(norm(y) + residual)`` for ``y = conv(relu(before(x)), weight, bias)``, which is not kept but made again.

    Args:
        y: the convolution's result [N, K, P, Q], without a gradient: it reaches x, weight and bias by this op.
        x: [N, C, H, W]. before: the BatchNorm + ReLU between x and the convolution, None if x is its input.
        activation: "relu" or "none".

    Returns:
        [N, K, P, Q], stored channels_last. Differentiable in x, weight, bias, both norms' gamma and beta, and residual.
    """
    out: Tensor = CONV_NORM_ACT.overload(
        y.detach(), x, *(NO_NORM if before is None else before), weight, bias, list(stride), list(padding),
        list(dilation), groups, *norm, residual, activation,
    )  # fmt: skip
    return out


# --- norm_act_pool


class NormActPool(NamedTuple):
    x: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    invstd: Tensor
    of_batch: bool
    count: Tensor | None  # type: ignore[assignment]  # a tuple has such a method
    group: str
    ceil_mode: bool

    @property
    def norm(self) -> Norm:
        return Norm(*self[1:8])


def _norm_act_pool(a: NormActPool) -> Tensor:
    return result(max_pool(apply_norm(a.x, a.norm), a.ceil_mode)[0])


def _norm_act_pool_empty(a: NormActPool) -> Tensor:
    padding = 0 if a.ceil_mode else 1
    return empty_channels_last(a.x, [*a.x.shape[:2], *((size + padding) // 2 for size in a.x.shape[2:])])


def _norm_act_pool_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, _ = kept(ctx)
    needed = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():

        def plainly(x: Tensor, gamma: Any, beta: Any) -> Tensor:
            return max_pool(apply_norm(x, a.norm._replace(gamma=gamma, beta=beta)), a.ceil_mode)[0]

        return *differentiate(plainly, (a.x, a.gamma, a.beta), needed, grad), *([None] * 6)
    inner = apply_norm(a.x, a.norm)
    grad = max_pool_gradient(grad, inner, a.ceil_mode)
    return *norm_gradients(grad, a.x, inner, a.norm, (*needed, False))[:3], *([None] * 6)


NORM_ACT_POOL = Op(
    "norm_act_pool", NormActPool, lambda a: None, _norm_act_pool_empty, _norm_act_pool,
    context=lambda ctx, a, output: keep(ctx, a), backward=_norm_act_pool_backward,
)  # fmt: skip


def norm_act_pool(x: Tensor, norm: Norm, ceil_mode: bool = False) -> Tensor:
    """``max_pool2d(relu(norm(x)), 3, 2, 1)``, of which x is kept for the backward, and the rest made again.

    Args:
        x: [N, C, H, W], floating point.
        ceil_mode: pool without padding, the size rounded up, as Caffe's models do; H and W are then at least 2.

    Returns:
        [N, C, P, Q], stored channels_last. Differentiable in x and norm's gamma and beta.
    """
    out: Tensor = NORM_ACT_POOL.overload(x, *norm, ceil_mode)
    return out
