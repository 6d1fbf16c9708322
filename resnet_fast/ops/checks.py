"""Argument checks that ops share; each error names the op, the argument, what it was and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu")


def activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")


def image(op: str, x: Tensor, channels: int | None = None) -> None:
    """``x`` is a floating point [N, C, H, W] tensor, with ``channels`` channels if given."""
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be 4-D [N, C, H, W], got {x.dim()}-D of shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating point tensor, got {x.dtype}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{op}: x has {x.shape[1]} channels, weight expects {channels}")


def weight_dtype(op: str, x: Tensor, weight: Tensor, image: str = "x", name: str = "weight") -> None:
    """Weights come in x's dtype, or in float32 beside a narrower x (rounded once, when they are packed)."""
    if weight.dtype is x.dtype or (weight.dtype is torch.float32 and x.dtype is not torch.float64):
        return
    allowed = {torch.float32: "torch.float32", torch.float64: "torch.float64"}.get(
        x.dtype, f"{x.dtype} or torch.float32"
    )
    raise TypeError(f"{op}: {name} is {weight.dtype}, {image} is {x.dtype}; {name} must be {allowed}")


def device(op: str, x: Tensor, called: str = "x", /, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            devices = f"{name} is on {tensor.device}, {called} is on {x.device}"
            raise ValueError(f"{op}: {devices}; they must be on one device")


def like(op: str, x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype is not x.dtype):
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} of shape {list(tensor.shape)}, x is {x.dtype} of shape "
                f"{list(x.shape)}; they must be the same"
            )


def per_channel(op: str, channels: int, weight: str = "weight", /, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        if vector.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} is {vector.dtype}; it must be torch.float32 (or float64), never narrower")
        if vector.dim() != 1 or vector.shape[0] != channels:
            raise ValueError(
                f"{op}: {name} has shape {list(vector.shape)}, {weight} has {channels} output channels; "
                f"{name} must be [{channels}]"
            )


def quantized_conv(op: str, a: Any, output_shape: Callable[[Any], list[int]], dtype: torch.dtype) -> None:
    """The arguments of a quantized convolution fit each other; ``dtype`` is the output's."""
    x, weight = a.x, a.weight
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} channels, weight expects {weight.shape[1]}")
    device(op, x, weight=weight, scale=a.scale, shift=a.shift, residual=a.residual)
    convolved(op, a, output_shape, dtype)


def convolved(op: str, a: Any, output_shape: Callable[[Any], list[int]], dtype: torch.dtype) -> None:
    """A convolution's options are sensible, its image is large enough, and its residual is as the output, of dtype."""
    activation(op, a.activation)
    for name, values, least in (("stride", a.stride, 1), ("padding", a.padding, 0), ("dilation", a.dilation, 1)):
        if len(values) != 2 or min(values) < least:
            raise ValueError(f"{op}: {name} must be two ints >= {least}, got {list(values)}")
    shape = output_shape(a)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"{op}: a {a.x.shape[2]}x{a.x.shape[3]} image is too small for kernel {list(a.weight.shape[2:])}, "
            f"padding {list(a.padding)}, dilation {list(a.dilation)}"
        )
    if a.residual is not None and (list(a.residual.shape) != shape or a.residual.dtype is not dtype):
        raise ValueError(
            f"{op}: residual is {a.residual.dtype} {list(a.residual.shape)}, the output is {dtype} {shape}; "
            "they must be the same"
        )
