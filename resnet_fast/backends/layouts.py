"""Memory layouts: what kernels read, what torch suggests, and what oneDNN must not be given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_channels_last(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last tensor of ``shape`` with x's dtype and device: what the fake kernels return.

    Args:
        dtype: another one than x's.
    """
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


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


def owned(y: Tensor) -> Tensor:
    """Return ``y`` as :func:`channels_last`, and not as a view.

    If autograd saw an op's output as a view of a tensor inside the op, callers could not modify it in place.
    """
    _, c, h, w = y.shape
    if y.stride() != (h * w * c, 1, w * c, c) or not y.numel():
        y = channels_last(y)
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride()) if y._is_view() else y


def suggests_channels_last(x: Tensor) -> bool:
    """Return whether torch takes a 4-D tensor for channels_last and answers in it: its strides are ordered C, W, H, N.

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


def kernel_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a convolution's weight as the kernels read it: ``dtype``, dense channels_last; no copy if it is so."""
    return channels_last(weight.detach().to(dtype))


def kernel_vector(vector: Tensor) -> Tensor:
    """Return a per-channel vector as the kernels read it: float32, dense."""
    return vector.detach().float().contiguous()


# --- the stem's weight


def squares_apart(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, C, 7, 7] as [K, 4, 4, 2, 2, C'] in ``dtype``: a 4x4 stride 1 over squares of 2x2 pixels, as Triton reads it.

    A row and a column of zeros in front make it 8x8; zeros behind make C a power of two C', at least 4.
    """
    k, c = weight.shape[:2]
    padded = max(4, 1 << (c - 1).bit_length())
    packed = torch.zeros((k, 4, 4, 2, 2, padded), dtype=dtype, device=weight.device)
    squares = torch.nn.functional.pad(weight.detach(), (1, 0, 1, 0)).view(k, c, 4, 2, 4, 2)
    packed[..., :c].copy_(squares.permute(0, 2, 4, 3, 5, 1))
    return packed


def squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, C, 7, 7] as [K, 4, 4, 16] in ``dtype``: the 7x7 stride 2 as a 4x4 stride 1 over squares of 2x2 pixels.

    A row and a column of zeros in front make it 8x8. The 16 values are those of a square, C channels for each of its
    pixels, and zeros behind; C is at most 4.
    """
    k, c = weight.shape[:2]
    packed = torch.zeros((k, 4, 4, 16), dtype=dtype, device=weight.device)
    squares = torch.nn.functional.pad(weight.detach(), (1, 0, 1, 0)).view(k, c, 4, 2, 4, 2)
    packed[..., : 4 * c].view(k, 4, 4, 2, 2, c).copy_(squares.permute(0, 2, 4, 3, 5, 1))
    return packed
