"""``bottleneck_tail``: a bottleneck block from its 3x3 to its output, and the next block's first 1x1, in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.kernels.bottleneck_tail_choice import Problem

from .. import backends
from .._random import Random
from ..backends import Backend, cuda, packing, triton
from ..backends.layouts import channels_last, empty_channels_last, kernel_vector, kernel_weight
from ..backends.packing import Geometry
from . import checks
from ._op import Bound, Op
from .common import accumulate_dtype, autocast_weight, cast, conv_output_size, keep, kept, pair
from .conv_bn_act import OP as CONV_BN_ACT
from .conv_bn_act import Arguments as Conv
from .gradients import convolution_gradients, relu_gradient

NAME = "bottleneck_tail"

_ONE, _NONE = (1, 1), (0, 0)
_POINTWISE: Geometry = (_ONE, _NONE, _ONE, 1)


class Arguments(NamedTuple):
    a: Tensor
    weight2: Tensor
    scale2: Tensor
    shift2: Tensor
    weight3: Tensor
    scale3: Tensor
    shift3: Tensor
    residual: Tensor
    weight_shortcut: Tensor | None = None
    scale_shortcut: Tensor | None = None
    shift_shortcut: Tensor | None = None
    weight1: Tensor | None = None
    scale1: Tensor | None = None
    shift1: Tensor | None = None
    stride: Sequence[int] = _ONE
    shortcut_stride: Sequence[int] = _ONE

    def spatial(self) -> Conv:
        """Return the 3x3 convolution."""
        return Conv(*self[:4], stride=self.stride, padding=_ONE)

    def expand(self, b: Tensor, shortcut: Tensor) -> Conv:
        return Conv(b, *self[4:7], residual=shortcut)

    def project(self, residual: Tensor) -> Conv | None:
        """Return the convolution of the shortcut, None if the shortcut is the residual itself."""
        if self.weight_shortcut is None or self.scale_shortcut is None or self.shift_shortcut is None:
            return None
        constants = self.weight_shortcut, self.scale_shortcut, self.shift_shortcut
        return Conv(residual, *constants, stride=self.shortcut_stride, activation="none")

    def following(self, y: Tensor) -> Conv | None:
        """Return the next block's first convolution, None if it is no part of the op."""
        if self.weight1 is None or self.scale1 is None or self.shift1 is None:
            return None
        return Conv(y, self.weight1, self.scale1, self.shift1)


def reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the op in float32 (float64 for float64) inside each of its convolutions.

    What a product reads (the 3x3's output and the block's output) is rounded to ``a``'s dtype before it; the
    projection of the shortcut is not.
    """
    conv = CONV_BN_ACT.reference
    project = a.project(a.residual.to(accumulate_dtype(a.a.dtype)))
    y = conv(a.expand(conv(a.spatial()), a.residual if project is None else conv(project)))
    following = a.following(y)
    return y, a.a.new_empty([0]) if following is None else conv(following)


def _check_conv(
    a: Tensor, suffix: str, channels: int, kernel: int, weight: Tensor, scale: Tensor, shift: Tensor, source: str
) -> None:
    """One convolution's constants: [K, ``channels``, ``kernel``, ``kernel``] and two vectors of K."""
    if weight.dim() != 4 or list(weight.shape[1:]) != [channels, kernel, kernel]:
        raise ValueError(
            f"{NAME}: weight{suffix} has shape {list(weight.shape)}; "
            f"it must be [K, {channels}, {kernel}, {kernel}], since {source} has {channels} channels"
        )
    checks.weight_dtype(NAME, a, weight, "a", f"weight{suffix}")
    checks.per_channel(
        NAME, weight.shape[0], f"weight{suffix}", **{f"scale{suffix}": scale, f"shift{suffix}": shift}
    )  # fmt: skip


def check(arguments: Arguments) -> None:
    (
        a, weight2, scale2, shift2, weight3, scale3, shift3, residual, weight_shortcut, scale_shortcut, shift_shortcut,
        weight1, scale1, shift1, stride, shortcut_stride,
    ) = arguments  # fmt: skip
    for name, image in (("a", a), ("residual", residual)):
        if image.dim() != 4:
            raise ValueError(f"{NAME}: {name} must be 4-D [N, C, H, W], got {image.dim()}-D of {list(image.shape)}")
    if not a.is_floating_point():
        raise TypeError(f"{NAME}: a must be a floating point tensor, got {a.dtype}")
    if residual.dtype is not a.dtype:
        raise TypeError(f"{NAME}: residual is {residual.dtype}, a is {a.dtype}; they must be the same")
    checks.device(NAME, a, "a", **dict(zip(Arguments._fields[1:14], arguments[1:14], strict=True)))
    for name, values in (("stride", stride), ("shortcut_stride", shortcut_stride)):
        if len(values) != 2 or min(values) < 1:
            raise ValueError(f"{NAME}: {name} must be two ints >= 1, got {list(values)}")

    mid = a.shape[1]
    _check_conv(a, "2", mid, 3, weight2, scale2, shift2, "a")
    if weight2.shape[0] != mid:
        raise ValueError(f"{NAME}: weight2 has {weight2.shape[0]} output channels, it must have a's {mid}")
    _check_conv(a, "3", mid, 1, weight3, scale3, shift3, "weight2's output")
    size = conv_output_size(a.shape[2:], [3, 3], stride, _ONE, _ONE)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"{NAME}: a is {a.shape[2]}x{a.shape[3]} pixels; it must have at least one row and column")
    shape = [a.shape[0], weight3.shape[0], *size]

    if weight_shortcut is None:
        if scale_shortcut is not None or shift_shortcut is not None:
            raise ValueError(f"{NAME}: scale_shortcut or shift_shortcut is given without weight_shortcut")
        if list(residual.shape) != shape:
            raise ValueError(f"{NAME}: residual is {list(residual.shape)}, the output is {shape}; they must be equal")
    else:
        if scale_shortcut is None or shift_shortcut is None:
            raise ValueError(f"{NAME}: weight_shortcut needs scale_shortcut and shift_shortcut beside it")
        _check_conv(
            a, "_shortcut", residual.shape[1], 1, weight_shortcut, scale_shortcut, shift_shortcut, "residual"
        )  # fmt: skip
        projected = conv_output_size(residual.shape[2:], _ONE, shortcut_stride, _NONE, _ONE)
        found = [residual.shape[0], weight_shortcut.shape[0], *projected]
        if found != shape:
            raise ValueError(
                f"{NAME}: residual {list(residual.shape)} projected with stride {list(shortcut_stride)} is {found}, "
                f"the output is {shape}; they must be equal"
            )

    if weight1 is None:
        if scale1 is not None or shift1 is not None:
            raise ValueError(f"{NAME}: scale1 or shift1 is given without weight1")
    elif scale1 is None or shift1 is None:
        raise ValueError(f"{NAME}: weight1 needs scale1 and shift1 beside it")
    else:
        _check_conv(a, "1", weight3.shape[0], 1, weight1, scale1, shift1, "weight3's output")


def empty(a: Arguments) -> tuple[Tensor, Tensor]:
    size = conv_output_size(a.a.shape[2:], [3, 3], a.stride, _ONE, _ONE)
    y = empty_channels_last(a.a, [a.a.shape[0], a.weight3.shape[0], *size])
    if a.weight1 is None:
        return y, a.a.new_empty([0])
    return y, empty_channels_last(a.a, [a.a.shape[0], a.weight1.shape[0], *size])


def kernel_problem(a: Arguments) -> Problem | None:
    """Return what the Triton kernel has to compute, None if it cannot: uneven strides, or no channels somewhere."""
    if a.stride[0] != a.stride[1] or a.shortcut_stride[0] != a.shortcut_stride[1]:
        return None
    if 0 in (a.weight3.shape[0], a.residual.shape[1]) or (a.weight1 is not None and a.weight1.shape[0] == 0):
        return None
    n, mid, h, w = a.a.shape
    shortcut = None if a.weight_shortcut is None else (*a.residual.shape[1:], a.shortcut_stride[0])
    following = 0 if a.weight1 is None else a.weight1.shape[0]
    return Problem(n, h, w, mid, a.weight3.shape[0], a.stride[0], shortcut, following, triton.precision(a.a.dtype))


def sample(asked: Problem, random: Random) -> Arguments:
    """Images are as a ReLU leaves them, as in the network."""

    def constants(k: int, c: int, kernel: int = 1) -> tuple[Tensor | None, ...]:
        return (random.weight(k, c, kernel, kernel), *random.scale_and_shift(k)) if k and c else (None, None, None)

    c, h, w, stride = asked.shortcut or (asked.k, *asked.output, 1)
    tensors: tuple[Any, ...] = (
        random.image(asked.n, asked.mid, asked.h, asked.w).relu_(), *constants(asked.mid, asked.mid, 3),
        *constants(asked.k, asked.mid), random.image(asked.n, c, h, w).relu_(),
        *constants(asked.k, c if asked.shortcut else 0), *constants(asked.following, asked.k),
    )  # fmt: skip
    return Arguments._make((*tensors, (asked.stride,) * 2, (stride,) * 2))


def kernel(among: tuple[Backend, ...], a: Arguments, bound: Bound[Arguments] | None) -> tuple[Tensor, Tensor]:
    """Compute the op by its Triton kernel, or its convolutions one after the other if that has no tile for them."""
    if among == (cuda,):
        backends.fallback(NAME, "there is no CUDA kernel of it; its convolutions run one after the other instead")
        return composed(a, bound)
    from resnet_fast.kernels import bottleneck_tail as kernels

    asked = kernel_problem(a)
    config = None if asked is None else kernels.choose(asked, triton.gpu_of(a.a.device))
    if asked is None or config is None:
        return composed(a, bound)
    kept = {} if bound is None else bound.kept
    if a.a.dtype not in kept:
        kept[a.a.dtype] = [
            None
            if weight is None or scale is None or shift is None
            else (kernel_weight(weight, a.a.dtype), kernel_vector(scale), kernel_vector(shift))
            for weight, scale, shift in (a[1:4], a[4:7], a[8:11], a[11:14])
        ]
    spatial, expand, project, first = kept[a.a.dtype]
    out, following = empty(a)
    launch = kernels.launch(
        channels_last(a.a), *spatial, *expand, channels_last(a.residual), project, out, first,
        following if asked.following else None, asked, config,
    )  # fmt: skip
    try:
        triton.run(NAME, asked, a.a.device, launch)
    except triton.Refused as refused:
        if backends.named("auto" if bound is None else bound.asked):
            raise
        backends.fallback(NAME, f"{refused}; its convolutions run one after the other instead")
        return composed(a, bound)
    return out, following


def native(a: Arguments, bound: Bound[Arguments] | None = None) -> tuple[Tensor, Tensor] | None:
    return composed(a, bound) if a.a.device.type == "cpu" else None


def composed(a: Arguments, bound: Bound[Arguments] | None = None) -> tuple[Tensor, Tensor]:
    """Compute its convolutions one after the other: for shapes that the kernel has no tile for, and on the CPU."""

    def conv(name: str, b: Conv, **promises: bool) -> Tensor:
        if bound is None:
            made: Tensor = CONV_BN_ACT.overload(*b)
            return made
        if name not in bound.kept:
            constants = {key: value for key, value in b._asdict().items() if key not in CONV_BN_ACT.data}
            bound.kept[name] = CONV_BN_ACT.bind(dtype=bound.dtype, backend=bound.asked, **constants)
        made = bound.kept[name](b.x, b.residual, **promises)
        return made

    project = a.project(a.residual)
    shortcut = a.residual if project is None else conv("project", project)
    # The projected shortcut is nobody else's.
    promises = {} if project is None or bound is None else {"overwrite_residual": True}
    y = conv("expand", a.expand(conv("spatial", a.spatial()), shortcut), **promises)
    following = a.following(y)
    return y, a.a.new_empty([0]) if following is None else conv("following", following)


def context(ctx: Any, a: Arguments, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    keep(ctx, a, *output)


def backward(ctx: Any, grad: Tensor | None, grad_following: Tensor | None) -> tuple[Any, ...]:
    """From the back: the next block's 1x1, the ReLU, the shortcut, the expansion, the 3x3 (its output recomputed)."""
    a, (y, following) = kept(ctx)
    need = ctx.needs_input_grad
    into3, into_shortcut, into1 = need[0:7], need[7:11], need[11:14]
    gradients: list[Tensor | None] = [None] * 16
    need_y = any(into3) or any(into_shortcut)

    if a.weight1 is not None and grad_following is not None:
        behind = relu_gradient(grad_following, following)
        from_following, *gradients[11:14] = convolution_gradients(behind, (y, *a[11:14]), _POINTWISE, (need_y, *into1))
        if from_following is not None:
            grad = from_following if grad is None else grad + from_following
    if grad is None or not need_y:
        return tuple(gradients)

    grad = relu_gradient(grad, y)
    if a.weight_shortcut is None:
        gradients[7] = grad if need[7] else None
    elif any(into_shortcut):
        gradients[7:11] = convolution_gradients(grad, a[7:11], (a.shortcut_stride, _NONE, _ONE, 1), into_shortcut)
    if any(into3):
        b = CONV_BN_ACT.overload(*a.spatial())
        grad_b, *gradients[4:7] = convolution_gradients(grad, (b, *a[4:7]), _POINTWISE, (any(into3[:4]), *into3[4:]))
        if grad_b is not None:
            behind = relu_gradient(grad_b, b)
            gradients[0:4] = convolution_gradients(behind, a[:4], (a.stride, _ONE, _ONE, 1), into3[:4])
    return tuple(gradients)


def autocast(dtype: torch.dtype, a: Arguments) -> Arguments:
    values = a._replace(a=cast(a.a, dtype), residual=cast(a.residual, dtype))._asdict()
    for name, value in values.items():
        if name.startswith("weight") and value is not None:
            values[name] = autocast_weight(value, values["a"].dtype)
    return Arguments(**values)


def limits(name: str, constants: dict[str, Any], dtype: torch.dtype, chosen: bool) -> str:
    return packing.unsupported(name, chosen, dtype, constants["weight2"].shape, 1)


OP = Op(
    NAME, Arguments, check, empty, reference, kernel, native, context, backward, autocast,
    dtype=lambda a: a.a.dtype, data=("a", "residual"), sample=sample,
    limits=limits,
    single=lambda a, output: output[0] if a.weight1 is None else output, returns=tuple[Tensor, Tensor],
)  # fmt: skip


def bottleneck_tail(
    a: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    residual: Tensor,
    weight_shortcut: Tensor | None = None,
    scale_shortcut: Tensor | None = None,
    shift_shortcut: Tensor | None = None,
    weight1: Tensor | None = None,
    scale1: Tensor | None = None,
    shift1: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    shortcut_stride: int | Sequence[int] = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return a bottleneck block behind its first convolution, and on request the next block's first convolution::

        b         = relu(conv3x3(a, weight2, stride, padding=1) * scale2 + shift2)
        y         = relu(conv1x1(b, weight3) * scale3 + shift3 + shortcut)
        following = relu(conv1x1(y, weight1) * scale1 + shift1)

    ``shortcut`` is ``residual``, or ``conv1x1(residual, weight_shortcut, shortcut_stride) * scale_shortcut +
    shift_shortcut``. The block is that of He et al. 2015, arXiv:1512.03385, figure 5; scale and shift are BatchNorm's
    in eval mode, as in :func:`conv_bn_act`. Accumulated and finished in float32 (float64 for float64); b and y are
    rounded to a's dtype before the next product. NaN passes through the ReLUs as in torch.

    Args:
        a: [N, mid, H, W], floating point, any strides (channels_last is read without a copy).
        weight2: [mid, mid, 3, 3]; weight3: [K, mid, 1, 1]; both a's dtype or float32, as the other weights.
        scale2, shift2: [mid]; scale3, shift3: [K]; float32 (float64 for float64 inputs), as the other vectors.
        residual: [N, K, P, Q] in a's dtype, or the projection's input [N, C, H', W'].
        weight_shortcut: [K, C, 1, 1], with scale_shortcut and shift_shortcut [K]; or all three None.
        weight1: [mid_next, K, 1, 1], with scale1 and shift1 [mid_next]; or all three None.
        stride, shortcut_stride: an int or (vertical, horizontal), of the 3x3 and of the projection.

    Returns:
        y [N, K, P, Q] in a's dtype, stored channels_last; with ``weight1`` the pair (y, following), following
        [N, mid_next, P, Q]. Differentiable in every tensor.

    Raises:
        ValueError: shapes, devices or options do not fit.
        TypeError: a dtype does not fit, or no tensor is where one must be.

    Example::

        a, x = torch.rand(1, 64, 56, 56), torch.rand(1, 256, 56, 56)
        weight2, weight3 = torch.rand(64, 64, 3, 3), torch.rand(256, 64, 1, 1)
        one, zero = torch.ones(256), torch.zeros(256)
        y = rf.ops.bottleneck_tail(a, weight2, one[:64], zero[:64], weight3, one, zero, residual=x)
    """
    values = Arguments(
        a, weight2, scale2, shift2, weight3, scale3, shift3, residual, weight_shortcut, scale_shortcut, shift_shortcut,
        weight1, scale1, shift1, pair(stride, "stride"), pair(shortcut_stride, "shortcut_stride"),
    )  # fmt: skip
    for name, tensor in zip(Arguments._fields[:8], values, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {name} must be a tensor, got {type(tensor).__name__}")
    if weight_shortcut is None and max(values.shortcut_stride) > 1:
        raise ValueError(f"{NAME}: shortcut_stride is {shortcut_stride!r}, which means nothing without weight_shortcut")
    made: Tensor | tuple[Tensor, Tensor] = OP.single(values, OP(values))
    return made
