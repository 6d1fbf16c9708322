"""``stem``: the network's first four layers, convolution 7x7/2 + BatchNorm + ReLU + max-pool 3x3/2, as one op.

Schema, reference, fake, autograd, autocast and the choice of what runs. Reads float NCHW or decoded uint8 NHWC images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from resnet_fast.kernels.problems import Stem as Problem

from .. import backends
from ..backends import cuda, triton
from . import _packing
from ._common import (
    KERNELS,
    accumulate_dtype,
    cast,
    check_device,
    check_image,
    check_per_channel,
    check_weight_dtype,
    choose_kernel,
    conv_output_size,
    convolution_gradients,
    kernel_vector,
    kernels_for,
    register,
    relu_gradient,
    result,
    transformed,
)

NAME = "stem"
KERNEL, STRIDE, PADDING = [7, 7], [2, 2], [3, 3]
_GEOMETRY = (STRIDE, PADDING, [1, 1], 1)


def _pool(x: Tensor, ceil_mode: bool) -> Tensor:
    """3x3 stride 2: padded by 1, or Caffe's unpadded window with the output size rounded up."""
    return torch.nn.functional.max_pool2d(x, 3, 2, 0 if ceil_mode else 1, ceil_mode=ceil_mode)


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """uint8 [N, H, W, C] to ``(x / 255 - mean) / std`` as [N, C, H, W] (channels_last) in ``dtype``."""
    channels = torch.tensor([list(mean), list(std)], dtype=dtype, device=x.device)
    return ((x.to(dtype) / 255 - channels[0]) / channels[1]).permute(0, 3, 1, 2)


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """The op in plain torch, any device and dtype: float32 (float64 for float64) throughout, rounded once."""
    dtype = _output_dtype(x, weight)
    accumulate = accumulate_dtype(dtype)
    image = x.to(accumulate) if mean is None or std is None else normalise(x, mean, std, accumulate)
    y = torch.conv2d(image, weight.to(accumulate), None, STRIDE, PADDING)
    y = y * scale.to(accumulate).view(1, -1, 1, 1) + shift.to(accumulate).view(1, -1, 1, 1)
    return result(_pool(y.relu(), ceil_mode).to(dtype))


def _output_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """x's dtype; the weight's for uint8 images."""
    return weight.dtype if x.dtype is torch.uint8 else x.dtype


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    ceil_mode: bool,
) -> list[int]:
    """All argument checks; returns the output's shape."""
    if weight.dim() != 4 or list(weight.shape[2:]) != KERNEL:
        raise ValueError(f"{NAME}: weight must be [K, C, 7, 7], got {list(weight.shape)}")
    if x.dtype is torch.uint8:
        if mean is None or std is None or len(mean) != weight.shape[1] or len(std) != weight.shape[1]:
            raise ValueError(
                f"{NAME}: uint8 images need mean and std of {weight.shape[1]} values each "
                f"(the pixel is (x / 255 - mean) / std), got mean={mean}, std={std}"
            )
        if x.dim() != 4 or x.shape[3] != weight.shape[1]:
            raise ValueError(f"{NAME}: uint8 x must be [N, H, W, {weight.shape[1]}], got {list(x.shape)}")
        height, width = x.shape[1], x.shape[2]
    else:
        check_image(NAME, x, weight.shape[1])
        check_weight_dtype(NAME, x, weight)
        if mean is not None or std is not None:
            raise ValueError(f"{NAME}: mean and std go with uint8 images; normalise {x.dtype} images beforehand")
        height, width = x.shape[2], x.shape[3]
    check_device(NAME, x, weight=weight, scale=scale, shift=shift)
    check_per_channel(NAME, weight.shape[0], scale=scale, shift=shift)
    size = conv_output_size([height, width], KERNEL, STRIDE, PADDING, [1, 1])
    least = 2 if ceil_mode else 1
    if size[0] < least or size[1] < least:
        raise ValueError(f"{NAME}: a {height}x{width} image is too small; its convolution must be {least}x{least}")
    # Caffe: ceil((H - 3) / 2) + 1; a window never begins outside, since H - 1 >= 2 * (P - 1) there.
    pooled = [(s - 3 + 1) // 2 + 1 if ceil_mode else (s + 2 - 3) // 2 + 1 for s in size]
    return [x.shape[0], weight.shape[0], *pooled]


def _default(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    ceil_mode: bool,
) -> Tensor:
    _check(x, weight, scale, shift, mean, std, ceil_mode)
    return reference(x, weight, scale, shift, mean, std, ceil_mode)


@lru_cache(maxsize=64)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """[2, C] float32: factor and summand that make ``(pixel / 255 - mean) / std`` of a byte. Copied to a GPU once."""
    factors = [1 / (255 * s) for s in std]
    summands = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor([factors, summands], dtype=torch.float32, device=device)


def kernel_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, C, 7, 7] in ``dtype``, stored as [7, 7, C, K]: Triton's kernel then reads many output channels at a time."""
    k, c, r, s = weight.shape
    stored = torch.empty((r, s, c, k), dtype=dtype, device=weight.device)
    return stored.permute(3, 2, 0, 1).copy_(weight.detach())


def cuda_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, C, 7, 7] as [K, 4, 4, 16] in ``dtype``: the 7x7 stride 2 as a 4x4 stride 1 over squares of 2x2 pixels.

    A row and a column of zeros in front make it 8x8. The 16 values are those of a square, C channels for each of its
    pixels, and zeros behind; C is at most 4.
    """
    k, c = weight.shape[:2]
    packed = torch.zeros((k, 4, 4, 16), dtype=dtype, device=weight.device)
    squares = torch.nn.functional.pad(weight.detach(), (1, 0, 1, 0)).view(k, c, 4, 2, 4, 2)
    packed[..., : 4 * c].view(k, 4, 4, 2, 2, c).copy_(squares.permute(0, 2, 4, 3, 5, 1))
    return packed


#: The weight as each backend's kernel reads it.
PACKED = {"triton": kernel_weight, "cuda": cuda_weight}


def problem_of(x: Tensor, weight: Tensor, ceil_mode: bool) -> Problem:
    """What a kernel is asked to compute, of which its choice depends; the tensors may be without data."""
    k, c = weight.shape[:2]
    uint8 = x.dtype is torch.uint8
    height, width = (x.shape[1], x.shape[2]) if uint8 else (x.shape[2], x.shape[3])
    precision = triton.precision(_output_dtype(x, weight))
    return Problem(x.shape[0], height, width, c, k, uint8, ceil_mode, precision)


def run_kernel(
    whose: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    ceil_mode: bool,
    packed: Callable[[str], Tensor] | None = None,
) -> Tensor | None:
    """The op by a kernel of ``whose`` (:func:`kernels_for`), on checked arguments.

    None where there is no such kernel, or x is empty. ``packed``: the weight as the backend of that name reads it.
    """
    if whose not in KERNELS or x.numel() == 0:
        return None
    problem, dtype = problem_of(x, weight, ceil_mode), _output_dtype(x, weight)
    shape = [problem.n, problem.k, *problem.output]
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    backend, _ = choose_kernel(NAME, problem, x.device, whose)
    if not backend:
        return None
    weight = PACKED[backend](weight, dtype) if packed is None else packed(backend)
    normalisation = None if mean is None or std is None else _normalisation(tuple(mean), tuple(std), x.device)
    arguments = (x, weight, kernel_vector(scale), kernel_vector(shift), normalisation, out, problem)
    if backend == "cuda":
        cuda.stem(*arguments)
    else:
        from resnet_fast.kernels import stem as kernel

        with triton.on(x.device):
            kernel.launch(*arguments, kernel.choose(problem, triton.gpu_of(x.device)))()
    return out


def _cuda(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    ceil_mode: bool,
) -> Tensor:
    arguments = (x, weight, scale, shift, mean, std, ceil_mode)
    _check(*arguments)
    y = run_kernel(kernels_for(NAME, x, _output_dtype(x, weight)), *arguments)
    return reference(*arguments) if y is None else y


def _cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    ceil_mode: bool,
) -> Tensor:
    arguments = (x, weight, scale, shift, mean, std, ceil_mode)
    _check(*arguments)
    dtype = _output_dtype(x, weight)
    y = run_kernel(kernels_for(NAME, x, dtype), *arguments)
    if y is not None:
        return y
    if x.numel() and backends.runs("onednn", "cpu"):
        reason = _packing.unsupported(dtype, weight, 1)
        if not reason:
            conv, folded = _packing.packed_conv(weight, scale, shift, dtype, *_GEOMETRY)
            image = x if mean is None or std is None else normalise(x, mean, std, torch.float32)
            return run_packed(conv, image, folded, ceil_mode)
        backends.fallback(NAME, f"{reason}; the plain torch reference runs instead")
    return reference(*arguments)


def run_packed(conv: _packing.PackedConv, image: Tensor, folded: _packing.Folded, ceil_mode: bool) -> Tensor:
    """The stem on oneDNN. ReLU and max commute (for NaN too), so ReLU runs on the four times smaller pooled tensor."""
    return result(_pool(conv.run(image, folded), ceil_mode).relu_())


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    ceil_mode: bool,
) -> Tensor:
    shape = _check(x, weight, scale, shift, mean, std, ceil_mode)
    return torch.empty(shape, dtype=_output_dtype(x, weight), device=x.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, shift, ctx.mean, ctx.std, ctx.ceil_mode = inputs
    ctx.save_for_backward(x, weight, scale, shift)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # The convolution's output is 4x the pooled one and was never kept: computed again, then the three steps backwards.
    x, weight, scale, shift = ctx.saved_tensors
    dtype = _output_dtype(x, weight)
    image = x if ctx.mean is None else normalise(x, ctx.mean, ctx.std, accumulate_dtype(dtype)).to(dtype)
    conv_bn_act = torch.ops.resnet_fast.conv_bn_act.default
    inner = conv_bn_act(image, weight, scale, shift, None, *_GEOMETRY, "relu", False)
    padding = [0, 0] if ctx.ceil_mode else [1, 1]
    pooling = ([3, 3], [2, 2], padding, [1, 1], ctx.ceil_mode)
    _, indices = torch.ops.aten.max_pool2d_with_indices.default(inner, *pooling)
    grad = torch.ops.aten.max_pool2d_with_indices_backward.default(grad, inner, *pooling, indices)
    grad = relu_gradient(grad, inner)
    gradients = convolution_gradients(grad, image, weight, scale, shift, *_GEOMETRY, needed=ctx.needs_input_grad[:4])
    return *gradients, None, None, None


def _autocast(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weight, *rest = args
    x = cast(x, dtype)
    if x.dtype is torch.uint8:  # the weight alone says the output's dtype
        weight = cast(weight, dtype)
    elif weight.dtype not in (x.dtype, torch.float32, torch.float64):
        weight = weight.float()
    return (x, weight, *rest)


register(
    "stem(Tensor x, Tensor weight, Tensor scale, Tensor shift, float[]? mean, float[]? std, bool ceil_mode) -> Tensor",
    default=_default,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Convolution 7x7 stride 2 padding 3 + BatchNorm (scale, shift) + ReLU + max-pool 3x3 stride 2, rounded once.

    He et al. 2015, arXiv:1512.03385, table 1. NaN passes through as in torch.

    Args:
        x: float [N, C, H, W] in any strides, or decoded images as uint8 [N, H, W, C].
        weight: [K, C, 7, 7], x's dtype or float32. For uint8 images its dtype is the output's.
        scale, shift: [K], float32 (float64 for float64 inputs).
        mean, std: for uint8 images: C values each, in units of a pixel value divided by 255.
        ceil_mode: False pools with padding 1 (torch models); True without padding, the size rounded up (Caffe models).

    Returns:
        [N, K, P, Q], stored channels_last. Differentiable in x (float), weight, scale and shift.

    Raises:
        ValueError: shapes, devices, mean or std do not fit; TypeError: a dtype does not.
    """
    if transformed():
        _check(x, weight, scale, shift, mean, std, ceil_mode)
        return reference(x, weight, scale, shift, mean, std, ceil_mode)
    result: Tensor = torch.ops.resnet_fast.stem.default(x, weight, scale, shift, mean, std, ceil_mode)
    return result
