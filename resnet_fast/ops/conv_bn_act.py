"""``conv_bn_act``: convolution, BatchNorm as scale and shift, residual and ReLU with one write of the output.

Schema, reference, fake, autograd, autocast and the choice of what runs on a CPU or CUDA tensor. No module, no packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fast.kernels.problems import ConvBNAct as Problem

from .. import backends
from ..backends import cuda, triton
from . import _packing
from ._common import (
    KERNELS,
    accumulate_dtype,
    cast,
    channels_last,
    check_activation,
    check_device,
    check_image,
    check_per_channel,
    check_weight_dtype,
    choose_kernel,
    conv_output_size,
    convolution_gradients,
    empty_channels_last,
    kernel_vector,
    kernel_weight,
    kernels_for,
    pair,
    register,
    relu_gradient,
    result,
    transformed,
)

NAME = "conv_bn_act"


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "relu",
    residual_after_activation: bool = False,
) -> Tensor:
    """The op in plain torch, any device and dtype: float32 (float64 for float64) throughout, rounded once."""
    accumulate = accumulate_dtype(x.dtype)
    y = torch.conv2d(x.to(accumulate), weight.to(accumulate), None, stride, padding, dilation, groups)
    y = y * scale.to(accumulate).view(1, -1, 1, 1) + shift.to(accumulate).view(1, -1, 1, 1)
    if residual is not None and not residual_after_activation:
        y = y + residual.to(accumulate)
    if activation == "relu":
        y = y.relu()
    if residual is not None and residual_after_activation:
        y = y + residual.to(accumulate)
    return result(y.to(x.dtype))


#: Arguments that passed every check, by shape, dtype and option.
_checked: set[tuple[object, ...]] = set()


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> list[int]:
    """All argument checks; returns the output's shape."""
    if weight.dim() != 4:
        raise ValueError(f"{NAME}: weight must be 4-D [K, C/groups, R, S], got shape {list(weight.shape)}")
    if 0 in weight.shape[2:]:
        raise ValueError(f"{NAME}: weight's window is {list(weight.shape[2:])}, it must be at least 1x1")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{NAME}: groups is {groups}; it must divide the {weight.shape[0]} output channels")
    check_image(NAME, x, weight.shape[1] * groups)
    check_weight_dtype(NAME, x, weight)
    check_device(NAME, x, weight=weight, scale=scale, shift=shift, residual=residual)
    check_per_channel(NAME, weight.shape[0], scale=scale, shift=shift)
    check_activation(NAME, activation)
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or min(values) < least:
            raise ValueError(f"{NAME}: {name} must be two ints >= {least}, got {list(values)}")
    size = conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"{NAME}: a {x.shape[2]}x{x.shape[3]} image is too small for kernel {list(weight.shape[2:])}, "
            f"padding {list(padding)}, dilation {list(dilation)}"
        )
    shape = [x.shape[0], weight.shape[0], *size]
    if residual is not None and (list(residual.shape) != shape or residual.dtype is not x.dtype):
        raise ValueError(
            f"{NAME}: residual is {residual.dtype} {list(residual.shape)}, the output is {x.dtype} {shape}; "
            "they must be the same"
        )
    return shape


def _default(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual_after_activation: bool,
) -> Tensor:
    _check(x, weight, scale, shift, residual, stride, padding, dilation, groups, activation)
    return reference(
        x, weight, scale, shift, residual, stride, padding, dilation, groups, activation, residual_after_activation
    )


def problem_of(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Problem:
    """What a kernel is asked to compute, of which its choice depends; the tensors may be without data."""
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    return Problem(
        n, h, w, c, k, (r, s), (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups,
        triton.precision(x.dtype), residual is not None,
    )  # fmt: skip


def run_kernel(
    whose: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual_after_activation: bool,
) -> Tensor | None:
    """The op by a kernel of ``whose`` (:func:`kernels_for`), on checked arguments.

    None where there is no such kernel, or x is empty.
    """
    if whose not in KERNELS or x.numel() == 0:
        return None
    x = channels_last(x)
    weight, scale, shift = kernel_weight(weight, x.dtype), kernel_vector(scale), kernel_vector(shift)
    residual = None if residual is None else channels_last(residual)
    problem = problem_of(x, weight, residual, stride, padding, dilation, groups)
    out = empty_channels_last(x, [problem.n, problem.k, *problem.output])
    if out.numel() == 0:
        return out
    backend, name = choose_kernel(NAME, problem, x.device, whose, x, weight, residual, out)
    form: Any = {"activation": activation, "residual_after_activation": residual_after_activation}
    if backend == "cuda":
        cuda.conv_bn_act(name, x, weight, scale, shift, residual, out, problem, **form)
    elif backend == "triton":
        from resnet_fast.kernels import conv_bn_act as kernel

        config = kernel.choose(problem, triton.gpu_of(x.device))
        with triton.on(x.device):
            kernel.launch(x, weight, scale, shift, residual, out, problem, config, **form)()
    return out if backend else None


def _cuda(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual_after_activation: bool,
) -> Tensor:
    _check(x, weight, scale, shift, residual, stride, padding, dilation, groups, activation)
    arguments = (
        x, weight, scale, shift, residual, stride, padding, dilation, groups, activation, residual_after_activation
    )  # fmt: skip
    y = run_kernel(kernels_for(NAME, x), *arguments)
    return reference(*arguments) if y is None else y


def _cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual_after_activation: bool,
) -> Tensor:
    # The same shapes come again and again; what passed once need not be looked at a second time.
    seen = (
        x.shape, x.dtype, weight.shape, weight.dtype, weight.device, scale.shape, scale.dtype, scale.device,
        shift.shape, shift.dtype, shift.device,
        residual is None or residual.shape, residual is None or residual.dtype,
        *stride, *padding, *dilation, groups, activation,
    )  # fmt: skip
    if seen not in _checked:
        _check(x, weight, scale, shift, residual, stride, padding, dilation, groups, activation)
        if len(_checked) > 10_000:
            _checked.clear()
        _checked.add(seen)
    if whose := kernels_for(NAME, x):
        y = run_kernel(
            whose, x, weight, scale, shift, residual, stride, padding, dilation, groups, activation,
            residual_after_activation,
        )  # fmt: skip
        if y is not None:
            return y
    if x.numel() and backends.runs("onednn", "cpu"):
        reason = _packing.unsupported(x.dtype, weight, groups)
        if not reason:
            conv, folded = _packing.packed_conv(weight, scale, shift, x.dtype, stride, padding, dilation, groups)
            y = conv.run(
                x,
                folded,
                residual,
                activation=activation,
                residual_after_activation=residual_after_activation,
            )
            return result(y)
        backends.fallback(NAME, f"{reason}; the plain torch reference runs instead")
    return reference(
        x, weight, scale, shift, residual, stride, padding, dilation, groups, activation, residual_after_activation
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual_after_activation: bool,
) -> Tensor:
    shape = _check(x, weight, scale, shift, residual, stride, padding, dilation, groups, activation)
    return empty_channels_last(x, shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, shift, residual, *geometry = inputs
    ctx.geometry = geometry
    ctx.has_residual = residual is not None
    # With the residual added after the activation the output does not show where the ReLU was open: recomputed then.
    keep_output = ctx.geometry[4] == "relu" and not (ctx.has_residual and ctx.geometry[5])
    ctx.save_for_backward(x, weight, scale, shift, output if keep_output else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, scale, shift, output = ctx.saved_tensors
    stride, padding, dilation, groups, activation, residual_after_activation = ctx.geometry
    grad_residual = grad if ctx.has_residual else None
    if activation == "relu":
        if output is None:
            output = torch.ops.resnet_fast.conv_bn_act.default(
                x, weight, scale, shift, None, stride, padding, dilation, groups, "relu", False
            )
        grad = relu_gradient(grad, output)
    if ctx.has_residual and not residual_after_activation:
        grad_residual = grad
    gradients = convolution_gradients(
        grad, x, weight, scale, shift, stride, padding, dilation, groups, ctx.needs_input_grad[:4]
    )
    return *gradients, grad_residual, *([None] * 6)


def _autocast(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weight, scale, shift, residual, *rest = args
    x = cast(x, dtype)
    # A weight in another half type than autocast's goes through float32, which holds both.
    weight = weight if weight.dtype in (x.dtype, torch.float32, torch.float64) else weight.float()
    return (x, weight, scale, shift, None if residual is None else cast(residual, dtype), *rest)


register(
    "conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, bool residual_after_activation) -> Tensor",
    default=_default,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


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
    arguments = (x, weight, scale, shift, residual, *geometry, activation, residual_after_activation)
    if transformed():
        _check(*arguments[:-1])
        return reference(*arguments)
    result: Tensor = torch.ops.resnet_fast.conv_bn_act.default(*arguments)
    return result
