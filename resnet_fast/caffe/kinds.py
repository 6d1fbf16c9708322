"""The layers that are supported, each declared once: its fields in a prototxt, its limits, shapes, blobs and module.

A class here is named as Caffe's type and is registered by being defined; the schema, the reader and the writer of
prototxts, the check of the wiring and the network itself follow from it. Shapes and rules are those of BVLC/caffe
(src/caffe/layers), Axpy's of hujie-frank/SENet. No graph and no file is here, and no arithmetic: that is in `layers`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from . import layers
from .parameters import (
    MANY,
    MAX_AXES,
    Illegal,
    Message,
    Parameters,
    Shape,
    at_least,
    axis_of,
    axis_or_alias,
    four_axes,
    times,
    two_axes,
)

# -------------------------------------------------------------------------------------------------- windows and weights


def _two(parameters: Any, name: str, short: str, default: int | None) -> tuple[int, int]:
    """Return a size for height and width: repeated or single under ``name``, or as ``short``_h and ``short``_w."""
    by_side = (f"{short}_h", f"{short}_w")
    either = [parameters.HasField(side) for side in by_side]
    value = getattr(parameters, name)
    values = list(value) if not isinstance(value, int) else [value] if parameters.HasField(name) else []
    if any(either):
        if values:
            raise ValueError(f"has both {name} and {by_side[0]} or {by_side[1]}; Caffe takes one kind")
        if not all(either) and default is None:
            raise ValueError(f"has one of {by_side[0]} and {by_side[1]}, both are needed")
        if not all(either) and default == 1:
            raise ValueError(f"has one of {by_side[0]} and {by_side[1]}, Caffe would take the other as 0")
        return getattr(parameters, by_side[0]), getattr(parameters, by_side[1])
    if not values:
        if default is None:
            raise ValueError(f"{name} is missing")
        return default, default
    return _sides(name, values)


def _sides(name: str, values: Sequence[int]) -> tuple[int, int]:
    if len(values) > 2:
        raise ValueError(f"{name} has {len(values)} values; one, or one each for height and width, was expected")
    return values[0], values[-1]


def _put_two(message: Any, name: str, short: str, value: tuple[int, int], default: tuple[int, int] | None) -> None:
    if value == default:
        return
    if value[0] != value[1]:
        setattr(message, f"{short}_h", value[0])
        setattr(message, f"{short}_w", value[1])
    elif isinstance(getattr(message, name), int):
        setattr(message, name, value[0])
    else:
        getattr(message, name).append(value[0])


@dataclass(frozen=True)
class _Filters(Parameters):
    """What Convolution and Deconvolution have in common."""

    message = Message(
        "convolution_param", "ConvolutionParameter", 106, 10,
        "num_output 1 uint32; bias_term 2 bool true; pad 3 uint32*; kernel_size 4 uint32*; group 5 uint32 1;"
        "stride 6 uint32*; weight_filler 7 FillerParameter; bias_filler 8 FillerParameter; pad_h 9 uint32 0;"
        "pad_w 10 uint32 0; kernel_h 11 uint32; kernel_w 12 uint32; stride_h 13 uint32; stride_w 14 uint32;"
        "engine 15 Engine DEFAULT; axis 16 int32 1; force_nd_im2col 17 bool false; dilation 18 uint32*",
    )  # fmt: skip

    num_output: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    group: int = 1
    bias_term: bool = True

    def check(self) -> None:
        at_least("num_output", 1, self.num_output)
        at_least("group", 1, self.group)
        at_least("kernel_size", 1, *self.kernel)
        at_least("stride", 1, *self.stride)
        at_least("dilation", 1, *self.dilation)
        at_least("pad", 0, *self.padding)

    @classmethod
    def read(cls, layer: Any) -> Self:
        p = layer.convolution_param
        kernel, stride = _two(p, "kernel_size", "kernel", None), _two(p, "stride", "stride", 1)
        padding = _two(p, "pad", "pad", 0)
        if p.axis not in (1, -3):
            raise ValueError(f"axis is {p.axis}; only axis 1, the channels, is supported")
        dilation = _sides("dilation", p.dilation) if p.dilation else (1, 1)
        return cls(p.num_output, kernel, stride, padding, dilation, p.group, p.bias_term)

    def write(self, layer: Any) -> None:
        message = layer.convolution_param
        message.num_output = self.num_output
        _put_two(message, "kernel_size", "kernel", self.kernel, None)
        _put_two(message, "stride", "stride", self.stride, (1, 1))
        _put_two(message, "pad", "pad", self.padding, (0, 0))
        if self.dilation != (1, 1):
            same = self.dilation[0] == self.dilation[1]
            message.dilation.extend(self.dilation[:1] if same else self.dilation)
        if self.group != 1:
            message.group = self.group
        if not self.bias_term:
            message.bias_term = False

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        x = four_axes(bottoms[0])
        if x[1] % self.group or self.num_output % self.group:
            raise Illegal(f"{x[1]} channels and num_output {self.num_output} must be multiples of group {self.group}")
        sides = tuple(
            self._side(size, stride, pad, dilation * (kernel - 1) + 1)
            for size, kernel, stride, pad, dilation in zip(
                x[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        if min(sides) < 1:
            raise Illegal(f"its kernel {times(self.kernel)} does not fit into {times(x[2:])} with its padding")
        return (x[0], self.num_output, *sides)

    def _side(self, size: int, stride: int, pad: int, extent: int) -> int:
        raise NotImplementedError

    def blobs(self, bottoms: Sequence[Shape]) -> dict[str, Shape]:
        bias: dict[str, Shape] = {"bias": (self.num_output,)} if self.bias_term else {}
        return {"weight": self._weight(bottoms[0][1]), **bias}

    def _weight(self, channels: int) -> Shape:
        raise NotImplementedError


@dataclass(frozen=True)
class Convolution(_Filters):
    """2-D cross-correlation over [N, C, H, W]; weight [num_output, C / group, kernel...]."""

    def _side(self, size: int, stride: int, pad: int, extent: int) -> int:
        return (size + 2 * pad - extent) // stride + 1

    def _weight(self, channels: int) -> Shape:
        return (self.num_output, channels // self.group, *self.kernel)

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        sizes = (self.kernel, self.stride, self.padding, self.dilation)
        return nn.Conv2d(bottoms[0][1], self.num_output, *sizes, groups=self.group, bias=self.bias_term)


@dataclass(frozen=True)
class Deconvolution(_Filters):
    """The transposed convolution over [N, C, H, W]; weight [C, num_output / group, kernel...]."""

    def _side(self, size: int, stride: int, pad: int, extent: int) -> int:
        return stride * (size - 1) + extent - 2 * pad

    def _weight(self, channels: int) -> Shape:
        return (channels, self.num_output // self.group, *self.kernel)

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return nn.ConvTranspose2d(
            bottoms[0][1],
            self.num_output,
            self.kernel,
            self.stride,
            self.padding,
            groups=self.group,
            bias=self.bias_term,
            dilation=self.dilation,
        )


@dataclass(frozen=True)
class Pooling(Parameters):
    """MAX or AVE over windows; ``kernel`` None pools over the whole image."""

    message = Message(
        "pooling_param", "PoolingParameter", 121, 19,
        "pool 1 PoolMethod MAX; kernel_size 2 uint32; stride 3 uint32 1; pad 4 uint32 0; kernel_h 5 uint32;"
        "kernel_w 6 uint32; stride_h 7 uint32; stride_w 8 uint32; pad_h 9 uint32 0; pad_w 10 uint32 0;"
        # ceil_mode is what other forks, and OpenCV, call field 13; here it is for reading texts only
        "engine 11 Engine DEFAULT; global_pooling 12 bool false; round_mode 13 RoundMode CEIL; ceil_mode 1013 bool true"
    )  # fmt: skip

    method: str = "MAX"
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    round_mode: str = "CEIL"

    def check(self) -> None:
        at_least("stride", 1, *self.stride)
        at_least("pad", 0, *self.padding)
        if self.method not in ("MAX", "AVE"):
            raise ValueError(f"pool: {self.method} is not supported; MAX and AVE are")
        if self.kernel is None:
            if self.padding != (0, 0) or self.stride != (1, 1):
                raise ValueError("global_pooling takes no padding and no stride other than 1")
            return
        at_least("kernel_size", 1, *self.kernel)
        if self.padding[0] >= self.kernel[0] or self.padding[1] >= self.kernel[1]:
            raise ValueError(f"pad {times(self.padding)} must be less than the kernel {times(self.kernel)}")

    @classmethod
    def read(cls, layer: Any) -> Self:
        p = layer.pooling_param
        method = p.PoolMethod.Name(p.pool)
        stride, padding = _two(p, "stride", "stride", 1), _two(p, "pad", "pad", 0)
        if p.global_pooling:
            if any(p.HasField(name) for name in ("kernel_size", "kernel_h", "kernel_w")):
                raise ValueError("has global_pooling and a kernel size; Caffe takes one of them")
            return cls(method, None, stride, padding)
        kernel = _two(p, "kernel_size", "kernel", None) if method != "STOCHASTIC" else None
        if p.HasField("ceil_mode") and p.HasField("round_mode"):
            raise ValueError("has both round_mode and ceil_mode, which mean the same")
        return cls(method, kernel, stride, padding, p.RoundMode.Name(p.round_mode) if p.ceil_mode else "FLOOR")

    def write(self, layer: Any) -> None:
        message = layer.pooling_param
        message.pool = message.PoolMethod.Value(self.method)
        if self.kernel is None:
            message.global_pooling = True
            return
        _put_two(message, "kernel_size", "kernel", self.kernel, None)
        _put_two(message, "stride", "stride", self.stride, (1, 1))
        _put_two(message, "pad", "pad", self.padding, (0, 0))
        if self.round_mode != "CEIL":
            message.round_mode = message.RoundMode.Value(self.round_mode)

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        x = four_axes(bottoms[0])
        if self.kernel is None:
            return (*x[:2], 1, 1)
        sides = layers.pooled_sizes(self, x[2], x[3])
        if min(sides) < 1:
            raise Illegal(f"its window {times(self.kernel)} does not fit into {times(x[2:])}")
        return (*x[:2], *sides)


@dataclass(frozen=True)
class InnerProduct(Parameters):
    """A linear layer over everything from ``axis`` on; weight [num_output, K], or [K, num_output] if ``transpose``."""

    message = Message(
        "inner_product_param", "InnerProductParameter", 117, 17,
        "num_output 1 uint32; bias_term 2 bool true; weight_filler 3 FillerParameter; bias_filler 4 FillerParameter;"
        "axis 5 int32 1; transpose 6 bool false",
    )  # fmt: skip

    num_output: int
    bias_term: bool = True
    axis: int = 1
    transpose: bool = False

    def check(self) -> None:
        at_least("num_output", 1, self.num_output)

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        return (*bottoms[0][: axis_of(self.axis, bottoms[0])], self.num_output)

    def blobs(self, bottoms: Sequence[Shape]) -> dict[str, Shape]:
        inner = math.prod(bottoms[0][axis_of(self.axis, bottoms[0]) :])
        matrix = (inner, self.num_output) if self.transpose else (self.num_output, inner)
        return {"weight": matrix, "bias": (self.num_output,)} if self.bias_term else {"weight": matrix}

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return layers.InnerProduct(math.prod(bottoms[0][axis_of(self.axis, bottoms[0]) :]), self)


# ----------------------------------------------------------------------------------------------- normalisation, scaling


@dataclass(frozen=True)
class BatchNorm(Parameters):
    """Normalisation of axis 1; blobs mean, variance, factor, without scale and shift.

    ``use_global_stats``: the stored statistics (True), those of the batch (False), or stored ones in the TEST phase and
    the batch's in the TRAIN phase (None). ``scale_bias``: NVIDIA/caffe's layer with a scale and a shift as further
    blobs, which takes mean and variance as they are stored, in the TEST phase whatever ``use_global_stats`` says.
    """

    message = Message(
        "batch_norm_param", "BatchNormParameter", 139, None,
        "use_global_stats 1 bool; moving_average_fraction 2 float 0.999; eps 3 float 1e-5;"
        "scale_filler 5 FillerParameter; bias_filler 6 FillerParameter; scale_bias 7 bool false;"
        "engine 15 Engine DEFAULT"
    )  # fmt: skip

    use_global_stats: bool | None = None
    moving_average_fraction: float = 0.999
    eps: float = 1e-5
    scale_bias: bool = False

    def check(self) -> None:
        if self.eps < 0:
            raise ValueError(f"eps is {self.eps:g}, it must be 0 or more")

    @classmethod
    def read(cls, layer: Any) -> Self:
        p = layer.batch_norm_param
        stored = p.use_global_stats if p.HasField("use_global_stats") else None
        scale_bias = p.scale_bias or p.HasField("scale_filler") or p.HasField("bias_filler")
        return cls(stored, p.moving_average_fraction, p.eps, scale_bias)

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        return two_axes(bottoms[0])

    def blobs(self, bottoms: Sequence[Shape]) -> dict[str, Shape]:
        channels = bottoms[0][1:2]
        found: dict[str, Shape] = {"mean": channels, "variance": channels, "factor": (1,)}
        return {**found, "weight": channels, "bias": channels} if self.scale_bias else found

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return layers.BatchNorm(bottoms[0][1], self)


@dataclass(frozen=True)
class Scale(Parameters):
    """Product with a parameter (or a second bottom) that covers ``num_axes`` axes (-1: all) from ``axis`` on."""

    message = Message(
        "scale_param", "ScaleParameter", 142, None,
        "axis 1 int32 1; num_axes 2 int32 1; filler 3 FillerParameter; bias_term 4 bool false;"
        "bias_filler 5 FillerParameter",
    )  # fmt: skip
    bottoms = (1, 2)

    axis: int = 1
    num_axes: int = 1
    bias_term: bool = False

    def covered(self, bottoms: Sequence[Shape]) -> Shape:
        """Return the axes that the parameter, or the second bottom, covers."""
        x = bottoms[0]
        axis = axis_of(self.axis, x)
        if len(bottoms) > 1:
            return bottoms[1]
        return x[axis:] if self.num_axes == -1 else x[axis : axis + self.num_axes]

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        x = bottoms[0]
        axis = axis_of(self.axis, x)
        if len(bottoms) == 1:
            if self.num_axes < -1 or axis + self.num_axes > len(x):
                raise Illegal(f"it covers {self.num_axes} axes from axis {axis} on, its bottom is {times(x)}")
        elif x[axis : axis + len(bottoms[1])] != bottoms[1]:
            raise Illegal(f"its second bottom {times(bottoms[1])} does not match {times(x)} from axis {axis} on")
        return x

    def blobs(self, bottoms: Sequence[Shape]) -> dict[str, Shape]:
        weight = {"weight": self.covered(bottoms)} if len(bottoms) == 1 else {}
        return {**weight, "bias": self.covered(bottoms)} if self.bias_term else weight

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        shape, axis = self.covered(bottoms), axis_of(self.axis, bottoms[0])
        trailing = len(bottoms[0]) - axis - len(shape)
        return layers.Scale(shape, trailing, len(bottoms) == 1, self.bias_term, axis)


@dataclass(frozen=True)
class LRN(Parameters):
    """Local response normalisation over [N, C, H, W], across ``local_size`` channels or within each channel."""

    message = Message(
        "lrn_param", "LRNParameter", 118, 18,
        "local_size 1 uint32 5; alpha 2 float 1; beta 3 float 0.75; norm_region 4 NormRegion ACROSS_CHANNELS;"
        "k 5 float 1; engine 6 Engine DEFAULT",
    )  # fmt: skip

    local_size: int = 5
    alpha: float = 1.0
    beta: float = 0.75
    norm_region: str = "ACROSS_CHANNELS"
    k: float = 1.0

    def check(self) -> None:
        at_least("local_size", 1, self.local_size)
        if self.local_size % 2 == 0:
            raise ValueError(f"local_size is {self.local_size}, it must be odd")

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        return four_axes(bottoms[0])


# --------------------------------------------------------------------------------------------------- element by element


@dataclass(frozen=True)
class ReLU(Parameters):
    """``max(x, 0) + negative_slope * min(x, 0)``."""

    message = Message(
        "relu_param", "ReLUParameter", 123, 30, "negative_slope 1 float 0; engine 2 Engine DEFAULT"
    )  # fmt: skip

    negative_slope: float = 0.0

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return nn.ReLU() if self.negative_slope == 0 else nn.LeakyReLU(self.negative_slope)


@dataclass(frozen=True)
class PReLU(Parameters):
    """``max(x, 0) + slope * min(x, 0)`` with a learned slope for each channel, or one for all."""

    message = Message(
        "prelu_param", "PReLUParameter", 131, None, "filler 1 FillerParameter; channel_shared 2 bool false"
    )  # fmt: skip

    channel_shared: bool = False

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        return two_axes(bottoms[0])

    def blobs(self, bottoms: Sequence[Shape]) -> dict[str, Shape]:
        return {"weight": () if self.channel_shared else bottoms[0][1:2]}

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return layers.PReLU(self.blobs(bottoms)["weight"])


@dataclass(frozen=True)
class ELU(Parameters):
    """``x`` if it is positive, ``alpha * (exp(x) - 1)`` elsewhere."""

    message = Message("elu_param", "ELUParameter", 140, None, "alpha 1 float 1")

    alpha: float = 1.0

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return nn.ELU(self.alpha)


@dataclass(frozen=True)
class Sigmoid(Parameters):
    """``1 / (1 + exp(-x))``."""

    message = Message("sigmoid_param", "SigmoidParameter", 124, 38, "engine 1 Engine DEFAULT")

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return nn.Sigmoid()


@dataclass(frozen=True)
class TanH(Parameters):
    """The hyperbolic tangent."""

    message = Message("tanh_param", "TanHParameter", 127, 37, "engine 1 Engine DEFAULT")

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return nn.Tanh()


@dataclass(frozen=True)
class Power(Parameters):
    """``(shift + scale * x) ** power``; a constant if scale or power is 0, whatever x is."""

    message = Message("power_param", "PowerParameter", 122, 21, "power 1 float 1; scale 2 float 1; shift 3 float 0")

    power: float = 1.0
    scale: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class Dropout(Parameters):
    """In training each element is 0 with probability ``ratio``, the others are divided by 1 - ratio.

    In the TEST phase it does nothing, whatever the ratio; in training one outside of [0, 1) has no meaning.
    """

    message = Message("dropout_param", "DropoutParameter", 108, 12, "dropout_ratio 1 float 0.5")

    ratio: float = dataclasses.field(default=0.5, metadata={"field": "dropout_ratio"})

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return nn.Dropout(self.ratio) if 0 <= self.ratio < 1 else layers.TestDropout(self.ratio)


@dataclass(frozen=True)
class Softmax(Parameters):
    """Softmax along ``axis``."""

    message = Message("softmax_param", "SoftmaxParameter", 125, 39, "engine 1 Engine DEFAULT; axis 2 int32 1")

    axis: int = 1

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        axis_of(self.axis, bottoms[0])
        return bottoms[0]

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return nn.Softmax(self.axis)


# ------------------------------------------------------------------------------------------------------ several bottoms


@dataclass(frozen=True)
class Eltwise(Parameters):
    """SUM (with one coefficient per bottom, or none at all), PROD or MAX of bottoms of one shape."""

    message = Message(
        "eltwise_param", "EltwiseParameter", 110, 24,
        "operation 1 EltwiseOp SUM; coeff 2 float*; stable_prod_grad 3 bool true",
    )  # fmt: skip
    bottoms = (2, MANY)

    operation: str = "SUM"
    coeff: tuple[float, ...] = ()

    @classmethod
    def read(cls, layer: Any) -> Self:
        p = layer.eltwise_param
        operation = p.EltwiseOp.Name(p.operation)
        if p.coeff and operation == "PROD":
            raise ValueError("coeff belongs to SUM, the operation is PROD")
        if len(p.coeff) not in (0, len(layer.bottom)):
            raise ValueError(f"has {len(p.coeff)} coeff entries for {len(layer.bottom)} bottoms; one each is needed")
        # MAX ignores them, as in Caffe.
        return cls(operation, () if operation == "MAX" or all(c == 1 for c in p.coeff) else tuple(p.coeff))

    def write(self, layer: Any) -> None:
        message = layer.eltwise_param
        message.operation = message.EltwiseOp.Value(self.operation)
        message.coeff.extend(self.coeff)

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        if any(shape != bottoms[0] for shape in bottoms):
            raise Illegal(f"its bottoms {', '.join(map(times, bottoms))} are not of one shape")
        if self.coeff and len(self.coeff) != len(bottoms):
            raise Illegal(f"it has {len(self.coeff)} coefficients for {len(bottoms)} bottoms")
        return bottoms[0]


@dataclass(frozen=True)
class Axpy(Parameters):
    """``scale * x + y``: one factor for each image and channel, [N, C] or [N, C, 1, 1]; SENet's layer."""

    bottoms = (3, 3)

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        scale, x, y = bottoms
        two_axes(x)
        if x != y or scale[:2] != x[:2] or math.prod(scale[2:]) != 1:
            raise Illegal(
                f"its bottoms are {', '.join(map(times, bottoms))}; [N, C] or [N, C, 1, 1], and two of one shape, "
                "were expected"
            )
        return x

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return layers.Axpy()


@dataclass(frozen=True)
class Concat(Parameters):
    """Bottoms one behind the other along ``axis``."""

    message = Message("concat_param", "ConcatParameter", 104, 9, "axis 2 int32 1; concat_dim 1 uint32 1")
    bottoms = (1, MANY)

    axis: int = 1

    @classmethod
    def read(cls, layer: Any) -> Self:
        return cls(axis_or_alias(layer.concat_param, "concat_dim"))

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        x = bottoms[0]
        axis = axis_of(self.axis, x)
        for other in bottoms[1:]:
            if len(other) != len(x) or any(a != b for i, (a, b) in enumerate(zip(x, other, strict=True)) if i != axis):
                raise Illegal(f"its bottoms {', '.join(map(times, bottoms))} differ elsewhere than along axis {axis}")
        return (*x[:axis], sum(shape[axis] for shape in bottoms), *x[axis + 1 :])

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module:
        return layers.Concat(self.axis)


@dataclass(frozen=True)
class Crop(Parameters):
    """The part of the first bottom that has the second's sizes from ``axis`` on, and begins at ``offset``.

    ``offset``: none for 0, one for all of these axes, or one for each.
    """

    message = Message("crop_param", "CropParameter", 144, None, "axis 1 int32 2; offset 2 uint32*")
    bottoms = (2, 2)

    axis: int = 2
    offset: tuple[int, ...] = ()

    def check(self) -> None:
        at_least("offset", 0, *self.offset)
        if len(self.offset) > MAX_AXES:
            raise ValueError(f"offset has {len(self.offset)} values; a blob has at most {MAX_AXES} axes")

    def begins(self, x: Shape, like: Shape) -> Shape:
        """Return where the part begins in each axis of ``x`` from ``axis`` on."""
        axis = axis_of(self.axis, x)
        if len(self.offset) > 1 and axis + len(self.offset) != len(x):
            raise Illegal(f"it has {len(self.offset)} offsets for the axes from {axis} on of its bottom {times(x)}")
        offsets = self.offset if len(self.offset) > 1 else (self.offset or (0,)) * (len(x) - axis)
        if len(like) < len(x) or any(
            begin + size > whole for begin, size, whole in zip(offsets, like[axis:], x[axis:], strict=False)
        ):
            raise Illegal(
                f"its second bottom {times(like)}, at offset {', '.join(map(str, offsets))} from axis {axis} on, is "
                f"not within {times(x)}"
            )
        return offsets

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        x, like = bottoms
        self.begins(x, like)
        axis = axis_of(self.axis, x)
        return (*x[:axis], *like[axis : len(x)])


# ---------------------------------------------------------------------------------------------------- the same elements


@dataclass(frozen=True)
class Flatten(Parameters):
    """The axes from ``axis`` to ``end_axis``, both included, as one."""

    message = Message("flatten_param", "FlattenParameter", 135, None, "axis 1 int32 1; end_axis 2 int32 -1")

    axis: int = 1
    end_axis: int = -1

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        x = bottoms[0]
        begin, end = axis_of(self.axis, x), axis_of(self.end_axis, x) + 1
        if begin > end:
            raise Illegal(f"its axis {self.axis} is behind end_axis {self.end_axis} of its bottom {times(x)}")
        return (*x[:begin], math.prod(x[begin:end]), *x[end:])


@dataclass(frozen=True)
class Reshape(Parameters):
    """``num_axes`` axes (-1: all) from ``axis`` on replaced by ``dims``: 0 copies a size, -1 is what is left."""

    message = Message(
        "reshape_param", "ReshapeParameter", 133, None, "shape 1 BlobShape; axis 2 int32 0; num_axes 3 int32 -1"
    )  # fmt: skip

    dims: tuple[int, ...] = ()
    axis: int = 0
    num_axes: int = -1

    def check(self) -> None:
        if len(self.dims) > MAX_AXES:
            raise ValueError(f"shape has {len(self.dims)} sizes; a blob has at most {MAX_AXES} axes")
        at_least("shape", -1, *self.dims)
        at_least("num_axes", -1, self.num_axes)
        if self.dims.count(-1) > 1:
            raise ValueError(f"shape has {self.dims.count(-1)} sizes of -1, at most one can be left to find")

    @classmethod
    def read(cls, layer: Any) -> Self:
        p = layer.reshape_param
        return cls(tuple(p.shape.dim), p.axis, p.num_axes)

    def write(self, layer: Any) -> None:
        message = layer.reshape_param
        message.shape.dim.extend(self.dims)
        if self.axis:
            message.axis = self.axis
        if self.num_axes != -1:
            message.num_axes = self.num_axes

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        x = bottoms[0]
        begin = self.axis if self.axis >= 0 else len(x) + self.axis + 1
        end = len(x) if self.num_axes == -1 else begin + self.num_axes
        if not 0 <= begin <= end <= len(x):
            raise Illegal(f"its axis {self.axis} and num_axes {self.num_axes} are not within its bottom {times(x)}")
        copied = {index for index, size in enumerate(self.dims) if size == 0}
        if any(begin + index >= len(x) for index in copied):
            raise Illegal(f"its shape {times(self.dims)} copies an axis that its bottom {times(x)} does not have")
        top = [*x[:begin], *(x[begin + i] if i in copied else n for i, n in enumerate(self.dims)), *x[end:]]
        count = math.prod(x)
        if -1 in self.dims:
            known = math.prod(size for size in top if size != -1)
            if known == 0 or count % known:
                raise Illegal(f"its shape {times(self.dims)} does not divide the {count} elements of {times(x)}")
            top[begin + self.dims.index(-1)] = count // known
        if math.prod(top) != count or len(top) > MAX_AXES:
            raise Illegal(f"its shape {times(self.dims)} makes {times(top)} of {times(x)}, which has {count} elements")
        return tuple(top)


@dataclass(frozen=True)
class Slice(Parameters):
    """The bottom cut along ``axis`` before each of ``slice_point``, or into parts of one size."""

    message = Message(
        "slice_param", "SliceParameter", 126, 31, "slice_dim 1 uint32 1; slice_point 2 uint32*; axis 3 int32 1"
    )  # fmt: skip
    tops = (1, MANY)

    axis: int = 1
    slice_point: tuple[int, ...] = ()

    def check(self) -> None:
        at_least("slice_point", 1, *self.slice_point)
        if any(a >= b for a, b in itertools.pairwise(self.slice_point)):
            shown = ", ".join(map(str, self.slice_point[:5]))
            raise ValueError(f"slice_point is {shown}{', ...' if len(self.slice_point) > 5 else ''}; it must increase")

    @classmethod
    def read(cls, layer: Any) -> Self:
        return cls(axis_or_alias(layer.slice_param, "slice_dim"), tuple(layer.slice_param.slice_point))

    def sizes(self, x: Shape, tops: int) -> tuple[int, ...]:
        """Return the parts' sizes along ``axis``."""
        size = x[axis_of(self.axis, x)]
        if not self.slice_point:
            if size % tops:
                raise Illegal(f"its {tops} tops do not divide axis {self.axis} of its bottom {times(x)}")
            return (size // tops,) * tops
        if len(self.slice_point) != tops - 1:
            raise Illegal(f"it has {len(self.slice_point)} slice_point entries for {tops} tops; one less is needed")
        if self.slice_point[-1] >= size:
            raise Illegal(f"its slice_point {self.slice_point[-1]} is not within axis {self.axis} of {times(x)}")
        ends = (0, *self.slice_point, size)
        return tuple(b - a for a, b in itertools.pairwise(ends))

    def shapes(self, bottoms: Sequence[Shape], tops: int) -> tuple[Shape, ...]:
        x = bottoms[0]
        axis = axis_of(self.axis, x)
        return tuple((*x[:axis], size, *x[axis + 1 :]) for size in self.sizes(x, tops))

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module | None:
        return None if tops == 1 else layers.Slice(self, tops)


@dataclass(frozen=True)
class Split(Parameters):
    """The bottom under several names."""

    tops = (1, MANY)

    def module(self, bottoms: Sequence[Shape], tops: int) -> None:
        return None
