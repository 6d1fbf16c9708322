"""The decision between fused ops and the plain layers, made at every call on ordinary torch modules.

Parameters, train and eval mode, frozen BN and hooks are read here and nowhere else; no kernel is known here. The plain
layers run whenever fusing could be noticed: hooks, subclasses, symbolic tracing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..backends.layouts import looks_channels_last, nchw, spoils_memory, suggests_channels_last
from ..backends.packing import Geometry
from ..ops import conv_statistics as statistics_of_conv
from ..ops import recompute
from ..ops._op import unobserved
from ..ops.batch_norm_act import Norm, constant_statistics, from_moments, statistics
from ..ops.common import Pairs, as_pair, conv_geometry, conv_output_size, transformed
from ..ops.conv_bn_act import OP as CONV_BN_ACT
from ..ops.conv_bn_act import Arguments
from .pristine import capturing, is_frozen_batch_norm, ordinary, watched, why_called

__all__ = [
    "Normalised",
    "bn_act",
    "constants",
    "conv_bn_act",
    "fold_norm",
    "frozen",
    "geometry",
    "head",
    "laid_out",
    "lean_inner",
    "lean_last",
    "scale_and_shift",
    "shortcut",
    "stem",
    "torch_gives_nchw",
]  # fmt: skip


_PUBLIC = ops.conv_bn_act
_POINTWISE: Pairs = ((1, 1), (0, 0), (1, 1))
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def must_be_plain(x: object, *others: Tensor | None) -> bool:
    """Whether the plain layers must run on ``x``: symbolic and jit tracing, ONNX export and torch.func understand them
    all, and tensor subclasses and modes of somebody's see every call. So does torch.export, if the reference is asked
    for."""
    if (
        transformed()
        or not isinstance(x, Tensor)
        or (torch._C._len_torch_function_stack() and capturing())
        or x.dim() != 4
        or torch._C._get_tracing_state() is not None
        or torch.onnx.is_in_onnx_export()
        or (backends.selected == "reference" and torch.compiler.is_exporting())
    ):
        return True
    if not ordinary(x, *others):
        _note("a tensor subclass is computed on, so the plain layers run")
        return True
    reason = watched()
    if reason:
        _note(reason)
    return bool(reason)


def _note(reason: str) -> None:
    if not torch.compiler.is_compiling():
        backends.fallback("resnet_fast.nn", reason)


def untouched(*modules: nn.Module | None) -> bool:
    """Whether nobody would notice that these modules are not called; what is noticed is recorded as a fallback."""
    reason = why_called(*modules)
    if reason:
        _note(reason)
    return not reason


def _constant_statistics(bn: nn.Module) -> bool:
    """BatchNorm that uses stored statistics: eval mode with running statistics, or frozen."""
    if type(bn) in _NORMS:
        return not bn.training and bn.running_mean is not None
    return is_frozen_batch_norm(bn)


def _batch_statistics(bn: nn.Module) -> bool:
    """BatchNorm that uses the batch's statistics: train mode, or without running statistics."""
    return type(bn) in _NORMS and (bn.training or bn.running_mean is None)


def _fusable(conv: Any, bn: Any, act: nn.Module | None, quiet: bool = False) -> Pairs | None:
    """The convolution's geometry if the three are what fused ops compute, with constant statistics or the batch's.

    quiet: their parameters are known to be torch's own tensors.
    """
    if type(conv) is not nn.Conv2d or not (act is None or type(act) is nn.ReLU):
        return None
    if reason := why_called(conv, bn, act):
        _note(reason)
        return None
    if not quiet and not ((type(bn) in _NORMS or is_frozen_batch_norm(bn)) and _ordinary(conv, bn)):
        return None
    return geometry(conv)


def _tensors(*modules: Any) -> tuple[Tensor | None, ...]:
    """Return the parameters and statistics of convolutions, norms and linear layers."""
    names = ("weight", "bias", "running_mean", "running_var")
    return tuple([getattr(module, name, None) for module in modules for name in names])


def _ordinary(*modules: Any) -> bool:
    if ordinary(*_tensors(*modules)):
        return True
    _note("a weight is a tensor subclass: its block runs unfused")
    return False


def scale_and_shift(conv: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """BatchNorm's two vectors behind ``conv``, [K] each, from the stored statistics in float32 (float64 for float64).

    ``scale = gamma / sqrt(var + eps)``, ``shift = beta + (conv_bias - mean) * scale``; differentiable.
    """
    mean, var, gamma, beta, bias = bn.running_mean, bn.running_var, bn.weight, bn.bias, conv.bias
    dtype = torch.float64 if var.dtype is torch.float64 else torch.float32
    if var.dtype is not dtype or (gamma is not None and gamma.dtype is not dtype):
        mean, var = mean.to(dtype), var.to(dtype)
        gamma, beta = (None if t is None else t.to(dtype) for t in (gamma, beta))
    bias = None if bias is None else bias.to(dtype)
    # As fold_norm, without a Python frame more for each layer of a live network.
    scale = torch.rsqrt(var + bn.eps)
    if gamma is not None:
        scale = gamma * scale
    if bias is not None:
        mean = mean - bias
    return scale, -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)


def fold_norm(mean: Any, var: Any, gamma: Any, beta: Any, bias: Any, eps: Any) -> tuple[Any, Any]:
    """Return scale and shift of a BatchNorm behind a convolution with ``bias``: vectors [K] of one dtype, or None."""
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = gamma * scale
    if bias is not None:
        mean = mean - bias
    return scale, -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)


def _group(bn: Any) -> str:
    """Return the process group that a SyncBatchNorm takes its statistics over, by name; "" for this process alone."""
    distributed: Any = torch.distributed
    if type(bn) is not nn.SyncBatchNorm or not bn.training or not distributed.is_available():
        return ""
    if not distributed.is_initialized():
        return ""
    group = bn.process_group or distributed.group.WORLD
    return str(group.group_name) if distributed.get_world_size(group) > 1 else ""


def _norm(x: Tensor, bn: Any, moments: tuple[Tensor, Tensor] | None = None) -> Norm:
    """``bn`` with the statistics that it uses for ``x``; brings running statistics up to date as its forward does.

    moments: mean and biased variance of x, if they are known and what bn uses.
    """
    if not _batch_statistics(bn):
        mean, invstd, _ = constant_statistics(bn.running_mean, bn.running_var, bn.eps)
        return Norm(bn.weight, bn.bias, mean, invstd, False, None, "")
    group = _group(bn)
    if not group and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
    momentum, running = 0.0 if bn.momentum is None else bn.momentum, (None, None)
    if bn.training and bn.track_running_stats:
        running = (bn.running_mean, bn.running_var)
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if bn.momentum is None:  # the plain average over all batches
                momentum = 1.0 / float(bn.num_batches_tracked)
    if moments is None:
        mean, invstd, total = statistics(x, *running, momentum, bn.eps, group)
    else:
        rows = x.shape[0] * x.shape[2] * x.shape[3]
        mean, invstd, total = from_moments(*moments, rows, *running, momentum, bn.eps)
    return Norm(bn.weight, bn.bias, mean, invstd, True, total, group)


def _normalise(x: Tensor, norm: Norm, act: nn.Module | None, residual: Tensor | None) -> Tensor:
    return recompute.apply_norm(x, norm, residual, "none" if act is None else "relu")


def bn_act(x: Tensor, bn: nn.Module, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    """``act(bn(x) + residual)``: one op behind the statistics, which the batch or the module gives.

    Args:
        x: [N, C, H, W]. residual: as x, or None.
        bn, act: the layers, called as they are wherever fusing could be noticed.
    """
    known = _batch_statistics(bn) or _constant_statistics(bn)
    usual = known and (act is None or type(act) is nn.ReLU) and not must_be_plain(x, residual)
    if usual and untouched(bn, act) and _ordinary(bn):
        return _normalise(x, _norm(x, bn), act, residual)
    out: Tensor = bn(x)
    if residual is not None:
        out = out + residual
    return out if act is None else act(out)


def frozen(x: Tensor, bn: Any) -> Tensor:
    """Return a FrozenBatchNorm2d by itself: ``(x - running_mean) / sqrt(running_var + eps) * weight + bias``."""
    if not must_be_plain(x, *_tensors(bn)):
        return laid_out(_normalise(x, _norm(x, bn), None, None), x)
    if isinstance(x, Tensor) and x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    shift = bn.bias - bn.running_mean * scale
    return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)


def conv_bn_act(
    x: Tensor, conv: Any, bn: nn.Module, act: nn.Module | None = None, residual: Tensor | None = None
) -> Tensor:
    """``act(bn(conv(x)) + residual)``: one op where the statistics are constant, else two behind a convolution.

    Args:
        x: [N, C, H, W]. residual: as the output, or None.
        conv, bn, act: the layers, called as they are wherever fusing could be noticed.
    """
    # Asked once: if nobody but the op would see the call, neither modes and transforms nor the dispatcher are asked.
    quiet = type(x) is Tensor and _quiet(conv, bn, x, residual) and x.dim() == 4
    if quiet or not must_be_plain(x, residual):
        pairs = _fusable(conv, bn, act, quiet)
        if pairs is not None and (residual is None or _fits(x, conv, residual, pairs)):
            if type(bn) in _NORMS and (bn.training or bn.running_mean is None):
                return _normalise(*_convolved(x, conv, bn), act, residual)
            activation = "none" if act is None else "relu"
            a = (x, conv.weight, *scale_and_shift(conv, bn), residual, *pairs, conv.groups, activation)
            made: Tensor = CONV_BN_ACT.run(Arguments(*a)) if quiet else ops.conv_bn_act(*a)
            return made
    out: Tensor = bn(conv(x))
    if residual is not None:
        out += residual
    return out if act is None else act(out)


def _quiet(conv: Any, bn: Any, *images: Tensor | None) -> bool:
    """Return whether these are a convolution and a norm that nobody but an op would see being computed on."""
    return (
        type(conv) is nn.Conv2d
        and type(conv.groups) is int
        and ops.conv_bn_act is _PUBLIC
        and (type(bn) in _NORMS or is_frozen_batch_norm(bn))
        and unobserved((*images, conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var))
    )


def constants(conv: Any, bn: Any, act: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Geometry] | None:
    """Weight, scale, shift and geometry of the op that :func:`conv_bn_act` makes of these layers for images of a dtype.

    None if it makes none, or not of stored statistics, or if they are not in this machine's memory. Whether somebody
    would notice (`pristine.why_called`) is still to be asked.
    """
    known = (act is None or type(act) is nn.ReLU) and _quiet(conv, bn) and _constant_statistics(bn)
    pairs = geometry(conv) if known else None
    if pairs is None:
        return None
    weight, (scale, shift) = conv.weight, scale_and_shift(conv, bn)
    vectors = scale.shape == shift.shape == weight.shape[:1] and scale.dtype is shift.dtype is torch.float32
    usual = vectors and weight.dim() == 4 and weight.dtype is dtype and weight.is_cpu and scale.is_cpu and shift.is_cpu
    return (weight, scale, shift, (*pairs, conv.groups)) if usual else None


def _fits(x: Tensor, conv: Any, residual: Tensor, pairs: Pairs) -> bool:
    """Return whether an op can add the residual: torch's addition broadcasts and casts as well."""
    if residual.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
        return False
    window = conv.weight.shape[2:]
    size = x.shape[2:] if window == (1, 1) and pairs == _POINTWISE else conv_output_size(x.shape[2:], window, *pairs)
    return residual.shape == (x.shape[0], conv.weight.shape[0], *size)


def _convolve(x: Tensor, conv: Any) -> Tensor:
    """torch's convolution (cuDNN, oneDNN) on channels_last images, which the ops behind it read without a copy."""
    weight, *rest = _conv(conv)
    if spoils_memory(x, weight, rest[1]):
        return nn.functional.conv2d(nchw(x), nchw(weight), *rest)
    if weight.requires_grad and looks_channels_last(weight):
        weight = nchw(weight)  # the same memory, and its gradient gets the weight's own strides
    return nn.functional.conv2d(x.contiguous(memory_format=torch.channels_last), weight, *rest)


def _convolved(x: Tensor, conv: Any, bn: Any, before: Norm | None = None) -> tuple[Tensor, Norm]:
    """The convolution's output and ``bn`` for it, from the batch; by one kernel if that is known to take less time.

    before: a norm and ReLU in front of the convolution.
    """
    if not _group(bn) and _same_dtype(x, conv) and statistics_of_conv.chosen(x, before is not None, *_conv(conv)):
        x = x.contiguous(memory_format=torch.channels_last)
        y, *moments = statistics_of_conv.conv_statistics(x, before, *_conv(conv))
        return y, _norm(y, bn, (moments[0], moments[1]))
    y = _convolve(x, conv) if before is None else recompute.norm_act_conv(x, before, *_conv(conv))
    return y, _norm(y, bn)


class Normalised(NamedTuple):
    """``relu(norm(x))`` that was not computed yet: what a convolution behind it keeps for the backward is x."""

    x: Tensor
    norm: Norm


def lean_inner(x: Tensor | Normalised, conv: Any, bn: nn.Module, act: nn.Module) -> Tensor | Normalised:
    """:func:`conv_bn_act` of a layer that only another convolution of its block reads; keeps less for the backward.

    In train mode the result is the convolution's output with the norm that is still to be applied; it goes to
    :func:`lean_inner` or :func:`lean_last`.
    """
    if not _is_lean(x, conv, bn, act):
        return conv_bn_act(_finished(x), conv, bn, act)
    source, before = x if isinstance(x, Normalised) else (x, None)
    return Normalised(*_convolved(source, conv, bn, before))


def lean_last(
    x: Tensor | Normalised, conv: Any, bn: nn.Module, act: nn.Module | None = None, residual: Tensor | None = None
) -> Tensor:
    """:func:`conv_bn_act` of a block's last layer.

    It keeps x for the backward instead of the convolution's output, which the backward computes again.
    """
    source, before = x if isinstance(x, Normalised) else (x, None)
    fits = ordinary(residual) and _is_lean(x, conv, bn, act)
    if not fits or not (residual is None or _fits(source, conv, residual, geometry(conv))):  # type: ignore[arg-type]
        return conv_bn_act(_finished(x), conv, bn, act, residual)
    with torch.no_grad():
        y, norm = _convolved(source, conv, bn, before)
    activation = "none" if act is None else "relu"
    return recompute.conv_norm_act(y, source, before, *_conv(conv), norm, residual, activation)


def _is_lean(x: Tensor | Normalised, conv: Any, bn: nn.Module, act: nn.Module | None) -> bool:
    """Return whether there is something to keep less of: the batch's statistics, and gradients."""
    x = x.x if isinstance(x, Normalised) else x
    plain = not torch.is_grad_enabled() or must_be_plain(x) or not _fusable(conv, bn, act) or not _batch_statistics(bn)
    return not plain and _same_dtype(x, conv)


def _same_dtype(x: Tensor, conv: Any) -> bool:
    """Weights of another type are autocast's business, or an error that torch's convolution words."""
    return conv.weight.dtype is x.dtype or torch.is_autocast_enabled(x.device.type)


def _finished(x: Tensor | Normalised) -> Tensor:
    return recompute.apply_norm(x.x, x.norm) if isinstance(x, Normalised) else x


def geometry(conv: Any) -> Pairs | None:
    """Stride, padding and dilation of a Conv2d as pairs, in whatever form they were set; None if no op takes them."""
    if conv.padding_mode != "zeros":
        return None
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    if (
        type(stride) is type(padding) is type(dilation) is tuple
        and len(stride) == len(padding) == len(dilation) == 2
        and type(stride[0]) is type(stride[1]) is type(padding[0]) is type(padding[1]) is int
        and type(dilation[0]) is type(dilation[1]) is int
    ):
        return stride, padding, dilation  # the usual form, seen at each call of a layer
    return conv_geometry(stride, padding, dilation, conv.weight.shape[2:])


def _conv(conv: Any) -> tuple[Tensor, Tensor | None, Any, Any, Any, int]:
    """Return what a convolution that :func:`_fusable` accepted hands to an op."""
    stride, padding, dilation = geometry(conv)  # type: ignore[misc]
    return conv.weight, conv.bias, stride, padding, dilation, conv.groups


def torch_gives_nchw(x: Tensor, *convs: Any) -> bool:
    """Return whether torch's own layers answer NCHW to ``x``, which is computed on fused.

    They do unless it or a convolution's weight is channels_last.
    """
    if must_be_plain(x) or suggests_channels_last(x):
        return False
    return not any(type(conv) is nn.Conv2d and suggests_channels_last(conv.weight) for conv in convs)


def laid_out(y: Tensor, x: Tensor, *convs: Any) -> Tensor:
    """``y``, which fused ops made channels_last, as torch's own layers lay out their answer to ``x``.

    Args:
        convs: the convolutions between the two.
    """
    if torch._C._len_torch_function_stack() and capturing():
        return y
    traced = torch._C._get_tracing_state() is not None  # which warns of decisions by sizes
    if isinstance(x, Tensor) and x.dim() == 4 and not traced and suggests_channels_last(x):
        return y  # as torch's layers answer, too
    if not isinstance(y, Tensor) or y.dim() != 4 or transformed() or y.is_contiguous():
        return y
    return y.contiguous() if torch_gives_nchw(x, *convs) else y


def shortcut(x: Tensor, downsample: nn.Module, lean: bool = False) -> Tensor:
    """Return a block's shortcut: ``Sequential(conv, bn)`` fused, anything else called.

    lean: keep less for the backward, as :func:`lean_last`.
    """
    if type(downsample) is nn.Sequential and len(downsample) == 2 and not must_be_plain(x) and untouched(downsample):
        return (lean_last if lean else conv_bn_act)(x, downsample[0], downsample[1])
    return downsample(x)


def stem(x: Tensor, conv: Any, bn: nn.Module, act: nn.Module, pool: nn.Module, lean: bool = False) -> Tensor:
    """``pool(act(bn(conv(x))))`` for the first layers of a ResNet, fused into one op for its usual geometry.

    lean: in train mode keep the convolution's output alone for the backward.
    """
    ceil_mode = bool(getattr(pool, "ceil_mode", False))
    # Padded by 1, or Caffe's pool: unpadded, the size rounded up.
    usual_pool = (
        type(pool) is nn.MaxPool2d
        and [as_pair(value) for value in (pool.kernel_size, pool.stride, pool.dilation)] == [(3, 3), (2, 2), (1, 1)]
        and as_pair(pool.padding) == ((0, 0) if ceil_mode else (1, 1))
        and not pool.return_indices
    )
    if type(pool) is not nn.MaxPool2d or not (
        (torch._C._len_torch_function_stack() and capturing()) or untouched(pool)
    ):  # it may tell memory formats apart
        return pool(laid_out(conv_bn_act(x, conv, bn, act), x, conv))
    if not usual_pool or must_be_plain(x):
        return pool(conv_bn_act(x, conv, bn, act))
    if lean and _is_lean(x, conv, bn, act):
        return recompute.norm_act_pool(*_convolved(x, conv, bn), ceil_mode)
    pairs = _fusable(conv, bn, act)
    window = None if pairs is None or _batch_statistics(bn) else (conv.weight.shape[2:], conv.groups, pairs)
    if window == ((7, 7), 1, ((2, 2), (3, 3), (1, 1))):
        return ops.stem(x, conv.weight, *scale_and_shift(conv, bn), ceil_mode=ceil_mode)
    return pool(conv_bn_act(x, conv, bn, act))


def head(x: Tensor, avgpool: nn.Module, fc: Any) -> Tensor:
    """``fc(flatten(avgpool(x), 1))``, fused into one op for a global average pool and a linear layer."""
    usual = type(avgpool) is nn.AdaptiveAvgPool2d and as_pair(avgpool.output_size) == (1, 1) and type(fc) is nn.Linear
    if usual and not must_be_plain(x) and untouched(avgpool, fc) and _ordinary(fc):
        return ops.head(x, fc.weight, fc.bias)
    return fc(torch.flatten(avgpool(x), 1))
