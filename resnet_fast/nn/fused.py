"""The decision between one fused op and the plain layers, made at every call on ordinary torch modules.

Parameters, train and eval mode, frozen BN and hooks are read here and nowhere else; no kernel is known here. The plain
layers run whenever fusing could be noticed: statistics of the batch, hooks, subclasses, symbolic tracing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import backends, ops
from ..ops._common import transformed

__all__ = ["conv_bn_act", "head", "scale_and_shift", "shortcut", "stem"]


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """torchvision's FrozenBatchNorm2d, or anybody's of that name with the same four buffers and eps."""
    names = ("weight", "bias", "running_mean", "running_var")
    return (
        type(module).__name__ == "FrozenBatchNorm2d"
        and all(isinstance(getattr(module, name, None), Tensor) for name in names)
        and isinstance(getattr(module, "eps", None), float)
    )


def _touched(module: nn.Module) -> bool:
    """Whether somebody watches or replaced this module's forward: then it must really be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _must_be_plain(x: object) -> bool:
    """Symbolic tracing, jit tracing, ONNX export and torch.func get the plain layers, which all of them understand."""
    return (
        transformed()
        or not isinstance(x, Tensor)
        or torch._C._get_tracing_state() is not None
        or torch.onnx.is_in_onnx_export()
    )


def _note(reason: str) -> None:
    if not torch.compiler.is_compiling():
        backends.fallback("resnet_fast.nn", reason)


def _untouched(*modules: nn.Module | None) -> bool:
    if _has_any_global_hook():
        _note("a global module hook is registered, so the plain layers run and it fires")
        return False
    for module in modules:
        if module is not None and _touched(module):
            _note(f"a hook or a replaced forward on a {type(module).__name__}: its block runs unfused so that it fires")
            return False
    return True


def _constant_statistics(bn: nn.Module) -> bool:
    """BatchNorm that uses stored statistics: eval mode with running statistics, or frozen."""
    if type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return not bn.training and bn.running_mean is not None
    return is_frozen_batch_norm(bn)


def _fusable(conv: nn.Module, bn: nn.Module, act: nn.Module | None) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and _constant_statistics(bn)
        and (act is None or type(act) is nn.ReLU)
        and _untouched(conv, bn, act)
    )


def scale_and_shift(conv: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """BatchNorm's two vectors behind ``conv``, [K] each, from the stored statistics in float32 (float64 for float64).

    ``scale = gamma / sqrt(var + eps)``, ``shift = beta + (conv_bias - mean) * scale``; differentiable.
    """
    mean, var, gamma, beta, bias = bn.running_mean, bn.running_var, bn.weight, bn.bias, conv.bias
    dtype = torch.float64 if var.dtype is torch.float64 else torch.float32
    if var.dtype is not dtype or (gamma is not None and gamma.dtype is not dtype):
        mean, var = mean.to(dtype), var.to(dtype)
        gamma, beta = (None if t is None else t.to(dtype) for t in (gamma, beta))
    scale = torch.rsqrt(var + bn.eps)
    if gamma is not None:
        scale = gamma * scale
    if bias is not None:
        mean = mean - bias.to(dtype)
    return scale, -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)


def conv_bn_act(
    x: Tensor, conv: Any, bn: nn.Module, act: nn.Module | None = None, residual: Tensor | None = None
) -> Tensor:
    """``act(bn(conv(x)) + residual)``: one fused op where the statistics are constant, otherwise the layers themselves.

    Args:
        x: [N, C, H, W]. residual: as the output, or None.
        conv, bn, act: the layers, called as they are wherever fusing could be noticed.
    """
    if not _must_be_plain(x) and _fusable(conv, bn, act):
        scale, shift = scale_and_shift(conv, bn)
        return ops.conv_bn_act(
            x, conv.weight, scale, shift, residual, conv.stride, conv.padding, conv.dilation, conv.groups,
            "none" if act is None else "relu",
        )  # fmt: skip
    out: Tensor = bn(conv(x))
    if residual is not None:
        out += residual
    return out if act is None else act(out)


def shortcut(x: Tensor, downsample: nn.Module | None) -> Tensor:
    """A block's shortcut: ``x`` itself, ``Sequential(conv, bn)`` fused, anything else called."""
    if downsample is None:
        return x
    if type(downsample) is nn.Sequential and len(downsample) == 2 and not _must_be_plain(x) and _untouched(downsample):
        return conv_bn_act(x, downsample[0], downsample[1])
    return downsample(x)


def stem(x: Tensor, conv: Any, bn: nn.Module, act: nn.Module, pool: nn.Module) -> Tensor:
    """``pool(act(bn(conv(x))))`` for the first layers of a ResNet, fused into one op for its usual geometry."""
    usual = (
        type(pool) is nn.MaxPool2d
        and (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)
        and not (pool.ceil_mode or pool.return_indices)
        and type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((7, 7), (2, 2), (3, 3), (1, 1))
        and conv.groups == 1
    )
    if usual and not _must_be_plain(x) and _fusable(conv, bn, act) and _untouched(pool):
        return ops.stem(x, conv.weight, *scale_and_shift(conv, bn))
    return pool(conv_bn_act(x, conv, bn, act))


def head(x: Tensor, avgpool: nn.Module, fc: Any) -> Tensor:
    """``fc(flatten(avgpool(x), 1))``, fused into one op for a global average pool and a linear layer."""
    usual = type(avgpool) is nn.AdaptiveAvgPool2d and avgpool.output_size in (1, (1, 1)) and type(fc) is nn.Linear
    if usual and not _must_be_plain(x) and _untouched(avgpool, fc):
        return ops.head(x, fc.weight, fc.bias)
    return fc(torch.flatten(avgpool(x), 1))
