"""Training ops that keep less for the backward: they save what a convolution gave and compute the rest again.

``norm_act_conv``: BatchNorm + ReLU in front of a convolution; keeps the BatchNorm's input instead of its output.
``conv_norm_act``: convolution + BatchNorm + residual + activation; keeps the convolution's input instead of its output,
which a second run of the convolution brings back. ``norm_act_pool``: BatchNorm + ReLU + max-pool 3x3/2, for a stem.

Together they leave of a bottleneck block two tensors of its narrow width and its output. They have no kernels of their
own: convolutions are torch's (oneDNN, cuDNN), the rest is ``batch_norm_act``. BatchNorms come as :class:`Norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._common import (
    cast,
    channels_last,
    check_image,
    conv_output_size,
    convolution_backward,
    empty_channels_last,
    register,
    result,
)
from .batch_norm_act import norm_gradients


class Norm(NamedTuple):
    """A BatchNorm with the statistics it uses: what ``batch_norm_act``'s torch op takes of it.

    Attributes:
        gamma, beta: [C] or None. mean, invstd: [C], as ``batch_norm_act.statistics`` gives them.
        of_batch: whether they are functions of the input. total, group: of synchronised statistics, else None and "".
    """

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    invstd: Tensor
    of_batch: bool
    total: Tensor | None
    group: str


#: What schemas say of a norm, and of a convolution.
_NORM = "Tensor? gamma, Tensor? beta, Tensor mean, Tensor invstd, bool of_batch, Tensor? count, str group"
CONV = "Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"


def apply_norm(x: Tensor, norm: Norm, residual: Tensor | None = None, activation: str = "relu") -> Tensor:
    """``act(norm(x) + residual)``."""
    gamma, beta, mean, invstd, of_batch, total, group = norm
    out: Tensor = torch.ops.resnet_fast.batch_norm_act.default(
        x, gamma, beta, mean, invstd, residual, activation, of_batch, total, group
    )
    return out


def gradients_of_norm(
    grad: Tensor, x: Tensor, output: Tensor | None, norm: Norm, needed: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    return norm_gradients(grad, x, output, *norm[:4], norm.total, norm.of_batch, norm.group, needed)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """The convolution in x's dtype, stored channels_last."""
    stride, padding, dilation, groups = geometry
    bias = None if bias is None else bias.to(x.dtype)
    arguments = (x, weight.to(x.dtype), bias, stride, padding, dilation, False, [0, 0], groups)
    return result(torch.ops.aten.convolution.default(*arguments))


def convolve_fake(op: str, x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
    stride, padding, dilation, groups = geometry
    check_image(op, x, weight.shape[1] * groups)
    size = conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_channels_last(x, [x.shape[0], weight.shape[0], *size])


# The convolution as an op without gradients. A compiler that saw the same one in the forward would keep its result.
register(
    f"conv_again(Tensor x, {CONV}) -> Tensor",
    default=convolve,
    cpu=convolve,
    fake=lambda x, weight, bias, *geometry: convolve_fake("conv_again", x, weight, geometry),
    autocast=lambda dtype, args: args,  # a backward inside of autocast computes as the forward did
)


def gradients_of_conv(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients for x, weight and bias in their own dtypes."""
    stride, padding, dilation, groups = geometry
    sizes = None if bias is None else [bias.shape[0]]
    grad_x, grad_weight, grad_bias = convolution_backward(
        grad, x, weight.to(x.dtype), sizes, stride, padding, dilation, groups, needed
    )
    return (
        grad_x,
        grad_weight.to(weight.dtype) if needed[1] else None,
        grad_bias.to(bias.dtype) if needed[2] and bias is not None else None,
    )


def differentiate(function: Any, inputs: Sequence[Any], needed: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Gradients by torch's own differentiation of ``function(*inputs)``: for gradients of gradients."""
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Each input by a name of its own: two may be one tensor, or one be made of another.
        inputs = [x.view_as(x) if need else x for x, need in zip(inputs, needed, strict=True)]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


# --- norm_act_conv


def _norm_act_conv(x: Tensor, *rest: Any) -> Tensor:
    norm, conv = Norm(*rest[:7]), rest[7:]
    check_image("norm_act_conv", x, conv[0].shape[1] * conv[5])
    return convolve(apply_norm(x, norm), *conv)


def _norm_act_conv_fake(x: Tensor, *rest: Any) -> Tensor:
    return convolve_fake("norm_act_conv", x, rest[7], rest[9:])


def _norm_act_conv_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gamma, beta, mean, invstd, ctx.of_batch, count, ctx.group, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(x, gamma, beta, mean, invstd, count, weight, bias)


def _norm_act_conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, gamma, beta, mean, invstd, count, weight, bias = ctx.saved_tensors
    norm = Norm(gamma, beta, mean, invstd, ctx.of_batch, count, ctx.group)
    need_x, need_gamma, need_beta, *_, need_weight, need_bias = ctx.needs_input_grad[:10]
    inside = need_x or need_gamma or need_beta
    if torch.is_grad_enabled():

        def plainly(x: Tensor, gamma: Any, beta: Any, weight: Tensor, bias: Any) -> Tensor:
            return convolve(apply_norm(x, norm._replace(gamma=gamma, beta=beta)), weight, bias, *ctx.geometry)

        needed = (need_x, need_gamma, need_beta, need_weight, need_bias)
        grads = differentiate(plainly, (x, gamma, beta, weight, bias), needed, grad)
        return *grads[:3], *([None] * 5), *grads[3:], *([None] * 4)
    a = apply_norm(x, norm)
    grad_a, grad_weight, grad_bias = gradients_of_conv(
        grad, a, weight, bias, ctx.geometry, (inside, need_weight, need_bias)
    )
    grads = [None] * 4
    if grad_a is not None and inside:
        grads = list(gradients_of_norm(grad_a, x, a, norm, (need_x, need_gamma, need_beta, False)))
    return *grads[:3], *([None] * 5), grad_weight, grad_bias, *([None] * 4)


def _autocast_x(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return cast(args[0], dtype), *args[1:]


register(
    f"norm_act_conv(Tensor x, {_NORM}, {CONV}) -> Tensor",
    default=_norm_act_conv,
    cpu=_norm_act_conv,
    fake=_norm_act_conv_fake,
    setup_context=_norm_act_conv_context,
    backward=_norm_act_conv_backward,
    autocast=_autocast_x,
)


def norm_act_conv(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``conv(relu(norm(x)), weight, bias)``, of which x is kept for the backward, and relu(norm(x)) made again.

    Args:
        x: [N, C, H, W], floating point. weight: [K, C / groups, R, S], rounded to x's dtype (autocast's under it).

    Returns:
        [N, K, P, Q], stored channels_last. Differentiable in x, norm's gamma and beta, weight and bias.
    """
    out: Tensor = torch.ops.resnet_fast.norm_act_conv.default(
        x, *norm, weight, bias, list(stride), list(padding), list(dilation), groups
    )
    return out


# --- conv_norm_act

BEFORE = _NORM.replace("Tensor mean", "Tensor? mean").replace("Tensor invstd", "Tensor? invstd")


def _split(rest: Sequence[Any]) -> tuple[Norm | None, Sequence[Any], Norm, Tensor | None, str]:
    """The norm before the convolution, the convolution, the norm behind it, residual and activation."""
    before = None if rest[2] is None else Norm(*rest[:7])
    return before, rest[7:13], Norm(*rest[13:20]), rest[20], rest[21]


def _conv_norm_act(y: Tensor, x: Tensor, *rest: Any) -> Tensor:
    _, _, norm, residual, activation = _split(rest)
    return apply_norm(y, norm, residual, activation)


def _conv_norm_act_fake(y: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return empty_channels_last(y, y.shape)


def _conv_norm_act_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, *rest = inputs
    before, conv, norm, _, ctx.activation = _split(rest)
    ctx.has_before = before is not None
    first = before or Norm(None, None, rest[2], rest[3], False, None, "")
    ctx.fixed = (first.of_batch, first.group, norm.of_batch, norm.group)
    weight, bias, *ctx.geometry = conv
    ctx.save_for_backward(
        x, first.gamma, first.beta, first.mean, first.invstd, first.total, weight, bias, norm.gamma, norm.beta,
        norm.mean, norm.invstd, norm.total, output if ctx.activation == "relu" else None,
    )  # fmt: skip


def _conv_norm_act_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, gamma0, beta0, mean0, invstd0, count0, weight, bias, gamma, beta, mean, invstd, count, output = ctx.saved_tensors
    before = Norm(gamma0, beta0, mean0, invstd0, ctx.fixed[0], count0, ctx.fixed[1])
    norm = Norm(gamma, beta, mean, invstd, ctx.fixed[2], count, ctx.fixed[3])
    needs = ctx.needs_input_grad
    need_x, need_gamma0, need_beta0 = needs[1:4]
    need_weight, need_bias = needs[9:11]
    need_gamma, need_beta, need_residual = needs[15], needs[16], needs[22]

    def all_of(
        x: Any, gamma0: Any, beta0: Any, weight: Any, bias: Any, gamma: Any, beta: Any, residual: Any
    ) -> tuple[Any, ...]:
        none = [None] * 4
        return (None, x, gamma0, beta0, *none, None, weight, bias, *none, gamma, beta, *none, None, residual, None)

    if torch.is_grad_enabled():
        zero = torch.zeros_like(grad).requires_grad_() if need_residual else None

        def plainly(
            x: Tensor, gamma0: Any, beta0: Any, weight: Any, bias: Any, gamma: Any, beta: Any, zero: Any
        ) -> Tensor:
            a = apply_norm(x, before._replace(gamma=gamma0, beta=beta0)) if ctx.has_before else x
            y = apply_norm(
                convolve(a, weight, bias, *ctx.geometry), norm._replace(gamma=gamma, beta=beta), zero, "none"
            )
            # The residual is not kept; the output shows what of the sum went through.
            return y if output is None else torch.where(output <= 0, 0.0, y).to(y.dtype)

        needed = (need_x, need_gamma0, need_beta0, need_weight, need_bias, need_gamma, need_beta, need_residual)
        return all_of(*differentiate(plainly, (x, gamma0, beta0, weight, bias, gamma, beta, zero), needed, grad))
    inside = need_x or need_gamma0 or need_beta0
    need_y = inside or need_weight or need_bias
    a = apply_norm(x, before) if ctx.has_before else channels_last(x)
    y = torch.ops.resnet_fast.conv_again.default(a, weight, bias, *ctx.geometry)
    grad_y, grad_gamma, grad_beta, grad_residual = gradients_of_norm(
        grad, y, output, norm, (need_y, need_gamma, need_beta, need_residual)
    )
    del y
    grad_a = grad_weight = grad_bias = None
    if grad_y is not None and need_y:
        grad_a, grad_weight, grad_bias = gradients_of_conv(
            grad_y, a, weight, bias, ctx.geometry, (inside, need_weight, need_bias)
        )
    grad_x, grad_gamma0, grad_beta0 = grad_a, None, None
    if ctx.has_before and grad_a is not None and inside:
        grad_x, grad_gamma0, grad_beta0, _ = gradients_of_norm(
            grad_a, x, a, before, (need_x, need_gamma0, need_beta0, False)
        )
    return all_of(
        grad_x, grad_gamma0, grad_beta0, grad_weight, grad_bias, grad_gamma, grad_beta, grad_residual
    )  # fmt: skip


def _numbered(declarations: str) -> str:
    """Argument names of the norm before the convolution, told apart from those of the one behind it."""
    return ", ".join(f"{declaration}0" for declaration in declarations.split(", "))


register(
    f"conv_norm_act(Tensor y, Tensor x, {_numbered(BEFORE)}, {CONV}, {_NORM}, Tensor? residual, str activation) "
    "-> Tensor",
    default=_conv_norm_act,
    cpu=_conv_norm_act,
    fake=_conv_norm_act_fake,
    setup_context=_conv_norm_act_context,
    backward=_conv_norm_act_backward,
    autocast=lambda dtype, args: (
        args[0],
        cast(args[1], dtype),
        *args[2:22],
        None if args[22] is None else cast(args[22], args[0].dtype),
        args[23],
    ),
)

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
        x: [N, C, H, W]. before: the BatchNorm + ReLU between x and the convolution, None where x is its input.
        activation: "relu" or "none".

    Returns:
        [N, K, P, Q], stored channels_last. Differentiable in x, weight, bias, both norms' gamma and beta, and residual.
    """
    out: Tensor = torch.ops.resnet_fast.conv_norm_act.default(
        y.detach(), x, *(NO_NORM if before is None else before), weight, bias, list(stride), list(padding),
        list(dilation), groups, *norm, residual, activation,
    )  # fmt: skip
    return out


# --- norm_act_pool


def _pooling(ceil_mode: bool) -> tuple[Any, ...]:
    """What aten's max-pools take: a window 3x3/2 padded by 1, or Caffe's unpadded one, the size rounded up."""
    padding = 0 if ceil_mode else 1
    return [3, 3], [2, 2], [padding, padding], [1, 1], ceil_mode


def _norm_act_pool(x: Tensor, *rest: Any) -> Tensor:
    *norm, ceil_mode = rest
    pooled = torch.ops.aten.max_pool2d_with_indices.default(apply_norm(x, Norm(*norm)), *_pooling(ceil_mode))
    return result(pooled[0])


def _norm_act_pool_fake(x: Tensor, *rest: Any) -> Tensor:
    padding = 0 if rest[-1] else 1
    return empty_channels_last(x, [*x.shape[:2], *((size + padding) // 2 for size in x.shape[2:])])


def _norm_act_pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gamma, beta, mean, invstd, ctx.of_batch, count, ctx.group, ctx.ceil_mode = inputs
    ctx.save_for_backward(x, gamma, beta, mean, invstd, count)


def _norm_act_pool_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, gamma, beta, mean, invstd, count = ctx.saved_tensors
    norm = Norm(gamma, beta, mean, invstd, ctx.of_batch, count, ctx.group)
    needed, pooling = ctx.needs_input_grad[:3], _pooling(ctx.ceil_mode)
    if torch.is_grad_enabled():

        def plainly(x: Tensor, gamma: Any, beta: Any) -> Tensor:
            a = apply_norm(x, norm._replace(gamma=gamma, beta=beta))
            pooled: Tensor = torch.ops.aten.max_pool2d_with_indices.default(a, *pooling)[0]
            return pooled

        return *differentiate(plainly, (x, gamma, beta), needed, grad), *([None] * 6)
    a = apply_norm(x, norm)
    _, indices = torch.ops.aten.max_pool2d_with_indices.default(a, *pooling)
    grad = torch.ops.aten.max_pool2d_with_indices_backward.default(grad, a, *pooling, indices)
    return *gradients_of_norm(grad, x, a, norm, (*needed, False))[:3], *([None] * 6)


register(
    f"norm_act_pool(Tensor x, {_NORM}, bool ceil_mode) -> Tensor",
    default=_norm_act_pool,
    cpu=_norm_act_pool,
    fake=_norm_act_pool_fake,
    setup_context=_norm_act_pool_context,
    backward=_norm_act_pool_backward,
)


def norm_act_pool(x: Tensor, norm: Norm, ceil_mode: bool = False) -> Tensor:
    """``max_pool2d(relu(norm(x)), 3, 2, 1)``, of which x is kept for the backward, and the rest made again.

    Args:
        x: [N, C, H, W], floating point.
        ceil_mode: pool without padding, the size rounded up, as Caffe's models do; H and W are then at least 2.

    Returns:
        [N, C, P, Q], stored channels_last. Differentiable in x and norm's gamma and beta.
    """
    out: Tensor = torch.ops.resnet_fast.norm_act_pool.default(x, *norm, ceil_mode)
    return out
