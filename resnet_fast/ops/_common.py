"""What ops share: argument checks, dtypes, layouts, a convolution's gradients. No op and no backend is known here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch: Any = torch._C._functorch

ACTIVATIONS = ("none", "relu")


def pair(value: int | Sequence[int], name: str) -> list[int]:
    """``value`` as [vertical, horizontal]; ValueError that names the argument if it is not one int or two."""
    if isinstance(value, int):
        return [value, value]
    items = list(value)
    if len(items) != 2:
        raise ValueError(f"{name} must be an int or two ints, got {value!r}")
    return items


def as_pair(value: object) -> tuple[int, int] | None:
    """An int or one or two ints, as torch's layers take them, as (vertical, horizontal); None for anything else."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value  # the usual form, seen at each call of a layer
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, tuple | list) and len(value) in (1, 2) and all(isinstance(item, int) for item in value):
        return (value[0], value[-1])
    return None


#: Stride, padding, dilation and groups of a convolution.
Geometry: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], int]
Pairs: TypeAlias = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def conv_geometry(stride: object, padding: object, dilation: object, window: Sequence[int]) -> Pairs | None:
    """A 2-D convolution's stride, padding and dilation, given as ``torch.nn.functional.conv2d`` takes them, as pairs.

    None for what an op cannot be given: a padding "same" that is not the same on both sides, and what torch refuses.

    Args:
        window: of the weight, [R, S].
    """
    strides, dilations = as_pair(stride), as_pair(dilation)
    if strides is None or dilations is None:
        return None
    paddings = as_pair(padding)
    if padding == "valid":
        paddings = (0, 0)
    elif padding == "same" and strides == (1, 1):
        total = [dilations[i] * (window[i] - 1) for i in (0, 1)]
        paddings = None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return None if paddings is None else (strides, paddings, dilations)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an op computes in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")


def check_image(op: str, x: Tensor, channels: int | None = None) -> None:
    """``x`` is a floating point [N, C, H, W] tensor, with ``channels`` channels where given."""
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be 4-D [N, C, H, W], got {x.dim()}-D of shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating point tensor, got {x.dtype}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{op}: x has {x.shape[1]} channels, weight expects {channels}")


def check_weight_dtype(op: str, x: Tensor, weight: Tensor) -> None:
    """Weights come in x's dtype, or in float32 beside a narrower x (rounded once, when they are packed)."""
    if weight.dtype is x.dtype or (weight.dtype is torch.float32 and x.dtype is not torch.float64):
        return
    allowed = {torch.float32: "torch.float32", torch.float64: "torch.float64"}.get(
        x.dtype, f"{x.dtype} or torch.float32"
    )
    raise TypeError(f"{op}: weight is {weight.dtype}, x is {x.dtype}; weight must be {allowed}")


def check_device(op: str, x: Tensor, called: str = "x", /, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, {called} is on {x.device}; they must be on one device"
            )


def check_per_channel(op: str, channels: int, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        if vector.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} is {vector.dtype}; it must be torch.float32 (or float64), never narrower")
        if vector.dim() != 1 or vector.shape[0] != channels:
            raise ValueError(
                f"{op}: {name} has shape {list(vector.shape)}, weight has {channels} output channels; "
                f"{name} must be [{channels}]"
            )


def conv_output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """[P, Q] of a convolution over [H, W]."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]


def empty_channels_last(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised channels_last tensor of ``shape`` with x's dtype and device: what the fake kernels return."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    """``x`` with exactly a dense channels_last tensor's strides; no copy where only those of size-1 dims differ."""
    n, c, h, w = x.shape
    wanted = (h * w * c, 1, w * c, c)
    if x.stride() == wanted and x.numel() > 0:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    if x.numel() == 0:
        return empty_channels_last(x, x.shape)
    return x if x.stride() == wanted else x.as_strided((n, c, h, w), wanted)


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch takes a 4-D tensor for channels_last and answers in it: its strides are ordered C, W, H, N.

    As torch's own ``suggest_memory_format``: tensors of both layouts, as of one channel, count as NCHW.
    """
    shape, strides, least = x.shape, x.stride(), 0
    if strides[1] == 0:
        return False
    for axis in (1, 3, 2, 0):
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * (shape[axis] if shape[axis] > 1 else 1)
    return True


def result(y: Tensor) -> Tensor:
    """``y``, made by the op itself, as an op returns it: :func:`channels_last`, and not a view.

    What autograd takes for a view of something inside an op nobody could change in place afterwards.
    """
    if _vmapped():  # whose tensors know no memory format
        return y
    y = channels_last(y)
    if transformed() or not y._is_view():
        return y
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def transformed() -> bool:
    """Whether torch.func or forward-mode AD watches: the ops have reverse-mode formulas only, plain torch has all."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


def _vmapped() -> bool:
    stack = None if torch.compiler.is_compiling() else _functorch.get_interpreter_stack()
    return stack is not None and any(each.key() == _functorch.TransformType.Vmap for each in stack)


def kernel_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution's weight as the kernels read it: ``dtype``, dense channels_last; no copy where it is so."""
    return channels_last(weight.detach().to(dtype))


def kernel_vector(vector: Tensor) -> Tensor:
    """A per-channel vector as the kernels read it: float32, dense."""
    return vector.detach().float().contiguous()


def relu_gradient(grad: Tensor, output: Tensor) -> Tensor:
    """torch's ReLU backward: ``grad`` where ``output`` is not <= 0 (so it passes where output is NaN), else 0."""
    return torch.ops.aten.threshold_backward.default(grad, output, 0)


def spoils_memory(x: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether oneDNN's weight gradient of this convolution writes beyond its memory if x is stored channels_last.

    1x1 with a stride, float32, fewer input channels than a vector register holds (uxlfoundation/oneDNN#6035). No ResNet
    has one; such images are handed over as NCHW.
    """
    pointwise = weight.shape[2] == weight.shape[3] == 1 and max(stride) > 1
    return x.device.type == "cpu" and pointwise and weight.shape[1] < 16


def nchw(x: Tensor) -> Tensor:
    """``x`` with exactly a dense NCHW tensor's strides, also where those of channels_last mean the same memory."""
    return x.contiguous().flatten().view(x.shape)


def looks_channels_last(weight: Tensor) -> bool:
    """Whether torch may take a weight with NCHW strides for channels_last, as it does 1x1 ones beside such images."""
    _, c, r, s = weight.shape
    return weight.stride() == (c * r * s, r * s, s, 1) and weight.is_contiguous(memory_format=torch.channels_last)


def with_strides_of(weight: Tensor, grad: Tensor) -> Tensor:
    """A gradient with its weight's strides where only those of dimensions of size 1 differ; it is the same memory.

    torch's rule for ``.grad``, which autograd does not enforce there, and DistributedDataParallel's buckets.
    """
    strides = zip(weight.shape, weight.stride(), grad.stride(), strict=True)
    if grad.stride() == weight.stride() or any(size != 1 and ours != theirs for size, ours, theirs in strides):
        return grad
    return grad.as_strided(weight.shape, weight.stride())


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    geometry: Geometry,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's gradients of a convolution for x, weight and bias, as far as ``wanted``."""
    given, (stride, padding, dilation, groups) = weight, geometry
    if spoils_memory(x, weight, stride):
        grad, x, weight = nchw(grad), nchw(x), nchw(weight)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad, x, weight, bias_sizes, stride, padding, dilation, False, [0, 0], groups, list(wanted)
    )
    return grad_x, with_strides_of(given, grad_weight) if wanted[1] else grad_weight, grad_bias


def convolution_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    geometry: Geometry,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``conv(x, weight) * scale + shift`` for x, weight, scale and shift, None where not ``needed``.

    dL/dx is the data gradient for the weight ``w * scale``, and with G = the weight gradient for the unscaled ``grad``,
    dL/dw = scale * G and dL/dscale = sum over C, R, S of w * G. So neither the convolution's output nor a division by
    scale is needed.
    """
    need_x, need_weight, need_scale, need_shift = needed
    per_channel = scale.view(-1, 1, 1, 1)
    grad_x = grad_weight = grad_scale = grad_shift = None
    if need_x or need_weight or need_scale:
        scaled = (weight.to(scale.dtype) * per_channel).to(x.dtype)
        wanted = [need_x, need_weight or need_scale, False]
        grad_x, unscaled, _ = convolution_backward(grad, x, scaled, None, geometry, wanted)
        if need_weight:
            grad_weight = with_strides_of(weight, (unscaled.to(scale.dtype) * per_channel).to(weight.dtype))
        if need_scale:
            grad_scale = (unscaled.to(scale.dtype) * weight.to(scale.dtype)).sum((1, 2, 3))
    if need_shift:
        grad_shift = grad.sum((0, 2, 3), dtype=shift.dtype)
    return grad_x, grad_weight, grad_scale, grad_shift


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast's rule: floating point tensors other than float64 are cast to the autocast dtype."""
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x
    return x.to(dtype)


def autocast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight as an op takes it beside x of ``dtype``: in another half type it goes through float32, which
    holds both."""
    return weight if weight.dtype in (dtype, torch.float32, torch.float64) else weight.float()
