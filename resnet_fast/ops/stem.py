"""``stem``: 7x7/2 convolution + BatchNorm + ReLU + 3x3/2 max-pool of float NCHW or uint8 NHWC images, as one op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.kernels.problems import Stem as Problem

from .. import backends
from .._random import Random
from ..backends import Backend, cpu, cuda, packing, triton
from ..backends.layouts import kernel_vector, owned, squares, squares_apart
from ..backends.packing import Geometry
from . import checks
from ._op import Bound, Op, Values
from .common import accumulate_dtype, autocast_weight, cast, conv_output_size, keep, kept, result
from .conv_bn_act import OP as CONV_BN_ACT
from .gradients import convolution_gradients, max_pool_gradient, relu_gradient

NAME = "stem"
KERNEL, STRIDE, PADDING = [7, 7], [2, 2], [3, 3]
_GEOMETRY: Geometry = (STRIDE, PADDING, [1, 1], 1)


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    ceil_mode: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The output's: x's, the weight's for uint8 images."""
        return self.weight.dtype if self.x.dtype is torch.uint8 else self.x.dtype


def pooling(ceil_mode: bool) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], bool]:
    """Return kernel, stride, padding, dilation and ceil_mode: padded by 1, or Caffe's window that sees no padding."""
    padding = 0 if ceil_mode else 1
    return (3, 3), (2, 2), (padding, padding), (1, 1), ceil_mode


def pool(x: Tensor, ceil_mode: bool) -> Tensor:
    """Return the max-pool behind the ReLU."""
    return torch.max_pool2d(x, *pooling(ceil_mode))


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """uint8 [N, H, W, C] to ``(x / 255 - mean) / std`` as [N, C, H, W] (channels_last) in ``dtype``."""
    channels = torch.tensor([list(mean), list(std)], dtype=dtype, device=x.device)
    return ((x.to(dtype) / 255 - channels[0]) / channels[1]).permute(0, 3, 1, 2)


def check(a: Arguments) -> None:
    x, weight, mean, std = a.x, a.weight, a.mean, a.std
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
    else:
        checks.image(NAME, x, weight.shape[1])
        checks.weight_dtype(NAME, x, weight)
        if mean is not None or std is not None:
            raise ValueError(f"{NAME}: mean and std go with uint8 images; normalise {x.dtype} images beforehand")
    checks.device(NAME, x, weight=weight, scale=a.scale, shift=a.shift)
    checks.per_channel(NAME, weight.shape[0], scale=a.scale, shift=a.shift)
    (height, width), size = _sizes(a)
    least = 2 if a.ceil_mode else 1
    if size[0] < least or size[1] < least:
        raise ValueError(f"{NAME}: a {height}x{width} image is too small; its convolution must be {least}x{least}")


def _sizes(a: Arguments) -> tuple[Sequence[int], list[int]]:
    """Return [H, W] of the image and of its convolution."""
    image = a.x.shape[1:3] if a.x.dtype is torch.uint8 else a.x.shape[2:]
    return image, conv_output_size(image, KERNEL, STRIDE, PADDING, [1, 1])


def empty(a: Arguments) -> Tensor:
    # Caffe: ceil((H - 3) / 2) + 1; a window never begins outside, since H - 1 >= 2 * (P - 1) there.
    pooled = [(size - 3 + 1) // 2 + 1 if a.ceil_mode else (size + 2 - 3) // 2 + 1 for size in _sizes(a)[1]]
    shape = [a.x.shape[0], a.weight.shape[0], *pooled]
    return torch.empty(shape, dtype=a.dtype, device=a.x.device, memory_format=torch.channels_last)


def reference(a: Arguments) -> Tensor:
    """Compute the op in float32 (float64 for float64) throughout, rounded once."""
    accumulate = accumulate_dtype(a.dtype)
    image = a.x.to(accumulate) if a.mean is None or a.std is None else normalise(a.x, a.mean, a.std, accumulate)
    y = torch.conv2d(image, a.weight.to(accumulate), None, STRIDE, PADDING)
    y = y * a.scale.to(accumulate).view(1, -1, 1, 1) + a.shift.to(accumulate).view(1, -1, 1, 1)
    return result(pool(y.relu(), a.ceil_mode).to(a.dtype))


@lru_cache(maxsize=64)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """[2, C] float32: factor and summand that make ``(pixel / 255 - mean) / std`` of a byte. Copied to a GPU once."""
    factors = [1 / (255 * s) for s in std]
    summands = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor([factors, summands], dtype=torch.float32, device=device)


def normalisation(a: Arguments) -> Tensor | None:
    """Return what the kernels apply to bytes: [2, C] float32, a factor and a summand; None for float images."""
    return None if a.mean is None or a.std is None else _normalisation(tuple(a.mean), tuple(a.std), a.x.device)


#: The weight as each backend's kernel reads it.
PACKED = {triton.NAME: squares_apart, cuda.NAME: squares}


def problem(a: Arguments) -> Problem:
    """Return what a launch choice depends on; the tensors may be without data."""
    k, c = a.weight.shape[:2]
    height, width = _sizes(a)[0]
    uint8 = a.x.dtype is torch.uint8
    return Problem(a.x.shape[0], height, width, c, k, uint8, a.ceil_mode, triton.precision(a.dtype))


def sample(asked: Problem, random: Random) -> Arguments:
    image = random.image(asked.n, asked.c, asked.h, asked.w)
    constants = random.weight(asked.k, asked.c, *KERNEL), *random.scale_and_shift(asked.k)
    if not asked.uint8:
        return Arguments(image, *constants, ceil_mode=asked.ceil_mode)
    pixels = (image * 64 + 128).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return Arguments(pixels, *constants, [0.5] * asked.c, [0.25] * asked.c, asked.ceil_mode)


def kernel(among: tuple[Backend, ...], a: Arguments, bound: Bound[Arguments] | None) -> Tensor | None:
    asked, out = problem(a), empty(a)
    if out.numel() == 0:
        return out
    choice = backends.choose(NAME, among, asked, a.x.device)
    if choice.backend is None:
        return None
    kept = {} if bound is None else bound.kept
    form = choice.name, a.dtype
    if form not in kept:
        kept[form] = PACKED[choice.name](a.weight, a.dtype), kernel_vector(a.scale), kernel_vector(a.shift)
    weight, scale, shift = kept[form]
    if choice.backend is cuda:
        cuda.stem(a.x, weight, scale, shift, normalisation(a), out, asked)
    else:
        from resnet_fast.kernels import stem as kernels

        pixels = out.new_empty(kernels.squares_shape(asked))
        triton.launch(NAME, asked, a.x.device, a.x, normalisation(a), pixels, function="launch_squares")
        triton.launch(NAME, asked, a.x.device, pixels, weight, scale, shift, out)
    return out


def native(a: Arguments, bound: Bound[Arguments] | None = None) -> Tensor | None:
    """Compute the convolution packed. ReLU and max commute (for NaN too): ReLU runs on the 4x smaller pooled tensor."""
    packed = packing.packed(NAME, a.x, a.dtype, a.weight, a.scale, a.shift, _GEOMETRY, bound)
    if packed is None:
        return None
    conv, folded = packed
    image = a.x if a.mean is None or a.std is None else normalise(a.x, a.mean, a.std, torch.float32)
    return owned(pool(conv.run(image, folded), a.ceil_mode).relu_())


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # The convolution's output is 4x the pooled one and was never kept: computed again, then the three steps backwards.
    a, _ = kept(ctx)
    image, constants = a.x, a[1:4]
    if a.mean is not None and a.std is not None:
        image = normalise(a.x, a.mean, a.std, accumulate_dtype(a.dtype)).to(a.dtype)
    inner = CONV_BN_ACT.overload(image, *constants, None, *_GEOMETRY, "relu", False)
    grad = relu_gradient(max_pool_gradient(grad, inner, a.ceil_mode), inner)
    gradients = convolution_gradients(grad, (image, *constants), _GEOMETRY, ctx.needs_input_grad[:4])
    return *gradients, None, None, None


def autocast(dtype: torch.dtype, a: Arguments) -> Arguments:
    x = cast(a.x, dtype)
    # For uint8 images the weight alone says the output's dtype.
    weight = cast(a.weight, dtype) if x.dtype is torch.uint8 else autocast_weight(a.weight, x.dtype)
    return a._replace(x=x, weight=weight)


def limits(name: str, constants: dict[str, Any], dtype: torch.dtype, chosen: bool) -> str:
    return packing.unsupported(name, chosen, dtype, constants["weight"].shape, 1)


def plan(network: cpu.Network, bound: Bound[Arguments], values: Values, stored: cpu.Stored | None = None) -> int:
    a, (x,) = bound.of(), values
    layer = bound.keep(
        (cpu.NAME, stored), lambda: packing.engine(a.weight, a.scale, a.shift, _GEOMETRY, bound.dtype, stored)
    )
    inner = network.convolution(x, layer, None, relu=True)
    return network.max_pool(inner, *pooling(a.ceil_mode))


OP = Op(
    NAME, Arguments, check, empty, reference, kernel, native, lambda ctx, a, output: keep(ctx, a), backward, autocast,
    dtype=lambda a: a.dtype, problem=problem, sample=sample,
    limits=limits, plan=plan,
)  # fmt: skip


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
    made: Tensor = OP(Arguments(x, weight, scale, shift, mean, std, ceil_mode))
    return made
