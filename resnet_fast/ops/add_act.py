"""``add_act``: residual addition and ReLU, forward and backward, where no convolution can carry them.

Schema, reference, fake, autograd, autocast. Broadcasting is deliberately not offered: a residual has the other's shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._common import accumulate_dtype, cast, check_activation, check_device, register, relu_gradient, transformed

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
    if x.device.type == "cuda" and backends.current() != "reference":
        backends.fallback(NAME, "no CUDA kernel in this version; CUDA tensors run the plain torch reference")
    return reference(x, y, activation)


def _cpu(x: Tensor, y: Tensor, activation: str) -> Tensor:
    _check(x, y, activation)
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
        grad = relu_gradient(grad, output)
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
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
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
