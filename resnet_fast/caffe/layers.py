"""Caffe's layers as modules, where torch.nn has none with the same arithmetic. Each computes one layer, nothing fused.

Definitions are those of BVLC/caffe (src/caffe/layers). ReLU, MAX and max-pooling hand NaN on, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import definition as d


class BatchNorm(nn.Module):
    """``(x - mean) / sqrt(variance + eps)`` along axis 1, without scale and shift.

    The buffers are the layer's blobs as a file has them: ``mean`` [C] and ``variance`` [C], sums that ``factor`` [1]
    divides (by 0 gives 0). They stay float32 in a half precision model, since the sums may exceed its range. The
    batch's statistics normalise where ``use_global_stats`` is False, or None in train mode; in train mode they are
    added to the sums as Caffe does.
    """

    mean: Tensor
    variance: Tensor
    factor: Tensor

    def __init__(self, channels: int, parameters: d.BatchNorm) -> None:
        super().__init__()
        self.eps = parameters.eps
        self.use_global_stats = parameters.use_global_stats
        self.moving_average_fraction = parameters.moving_average_fraction
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("factor", torch.ones(1))

    @property
    def of_batch(self) -> bool:
        """Whether the batch's own statistics normalise now."""
        return self.training if self.use_global_stats is None else not self.use_global_stats

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] that the blobs stand for."""
        inverse = torch.where(self.factor == 0, self.factor, 1 / self.factor)
        return self.mean * inverse, self.variance * inverse

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, ...] of any floating point dtype."""
        if self.of_batch:
            return self._of_batch(x)
        mean, variance = self.statistics()
        # F.batch_norm may refuse eps = 0, which Caffe takes.
        return torch.batch_norm(x, None, None, mean, variance, False, 0.0, self.eps, torch.backends.cudnn.enabled)

    def _of_batch(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.clone()
        others = [axis for axis in range(x.dim()) if axis != 1]
        wide = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        variance, mean = torch.var_mean(wide, others, correction=0, keepdim=True)
        if self.training:
            with torch.no_grad():
                count = x.numel() // x.shape[1]
                keep = self.moving_average_fraction
                self.factor.mul_(keep).add_(1)
                self.mean.mul_(keep).add_(mean.flatten())
                self.variance.mul_(keep).add_(variance.flatten() * (count / (count - 1) if count > 1 else 1))
        return ((wide - mean) / (variance + self.eps).sqrt()).to(x.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BatchNorm:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.is_floating_point() and new.dtype.itemsize < 4 <= old.dtype.itemsize:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        return f"{self.mean.shape[0]}, eps={self.eps:.6g}, use_global_stats={self.use_global_stats}"


class Scale(nn.Module):
    """``x * weight + bias``, weight and bias covering axes of x from ``axis`` on; or ``x * y + bias``.

    Args:
        shape: of weight and bias.
        trailing: how many axes of x follow those that are covered.
        weight: False where the second operand takes weight's place.
        bias: whether there is one.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, shape: d.Shape, trailing: int, weight: bool, bias: bool, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.view = (*shape, *(1,) * trailing)
        self.register_parameter("weight", nn.Parameter(torch.ones(shape)) if weight else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape)) if bias else None)

    @property
    def per_channel(self) -> bool:
        """Whether it is one number per channel of an image."""
        return self.axis == 1 and self.weight is not None and self.weight.dim() == 1 and len(self.view) == 3

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x: any shape that weight, or ``y``, covers; the result has it too."""
        if y is None:
            assert self.weight is not None
            x = x * self.weight.reshape(self.view)
        else:
            x = x * y.reshape((*y.shape, *(1,) * (x.dim() - self.axis - y.dim())))
        return x if self.bias is None else x + self.bias.reshape(self.view)

    def extra_repr(self) -> str:
        return f"{self.view}, axis={self.axis}, bias={self.bias is not None}"


class Eltwise(nn.Module):
    """Sum (each operand times its coefficient), product or maximum of operands of one shape."""

    def __init__(self, parameters: d.Eltwise) -> None:
        super().__init__()
        self.operation, self.coeff = parameters.operation, parameters.coeff

    def forward(self, *operands: Tensor) -> Tensor:
        """operands: two or more of one shape."""
        if self.coeff:
            operands = tuple(x if c == 1 else x * c for x, c in zip(operands, self.coeff, strict=True))
        result = operands[0]
        for x in operands[1:]:
            if self.operation == "SUM":
                result = result + x
            else:
                result = result * x if self.operation == "PROD" else torch.maximum(result, x)
        return result

    def extra_repr(self) -> str:
        return f"{self.operation}{f', coeff={self.coeff}' if self.coeff else ''}"


class InnerProduct(nn.Module):
    """A linear layer over everything from ``axis`` on: weight [outputs, features] ([features, outputs] transposed)."""

    bias: nn.Parameter | None

    def __init__(self, features: int, parameters: d.InnerProduct) -> None:
        super().__init__()
        self.axis, self.transpose = parameters.axis, parameters.transpose
        shape = (features, parameters.num_output)
        self.weight = nn.Parameter(torch.empty(shape if self.transpose else shape[::-1]))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(parameters.num_output)) if parameters.bias_term else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., features in one or more axes]."""
        return F.linear(torch.flatten(x, self.axis), self.weight.t() if self.transpose else self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, axis={self.axis}"


class Pooling(nn.Module):
    """Max or average pooling by Caffe's rules.

    The number of windows is rounded up by default. An average divides by the window's size clipped to image and
    padding. A window that lies wholly beyond the image (only possible without padding and with gaps between windows)
    gives the lowest finite number, or 0 / 0, as in Caffe.
    """

    def __init__(self, parameters: d.Pooling) -> None:
        super().__init__()
        self.window = parameters
        kernel, stride, padding = parameters.kernel or (0, 0), parameters.stride, parameters.padding
        #: Whether torch's pooling in ceil mode is the same for every image.
        self.like_torch = any(padding) or all(s <= k for s, k in zip(stride, kernel, strict=True))
        self.like_torch &= all(2 * p <= k for p, k in zip(padding, kernel, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]."""
        p = self.window
        ceil_mode = p.round_mode == "CEIL"
        if p.kernel is None:
            return F.adaptive_avg_pool2d(x, (1, 1)) if p.method == "AVE" else x.amax((2, 3), keepdim=True)
        if not self.like_torch:
            return self._window_by_window(x)
        if p.method == "MAX":
            return F.max_pool2d(x, p.kernel, p.stride, p.padding, 1, ceil_mode)
        return F.avg_pool2d(x, p.kernel, p.stride, p.padding, ceil_mode)

    def _window_by_window(self, x: Tensor) -> Tensor:
        """Rows first, then columns, so that the largest window costs no more than the image."""
        p = self.window
        assert p.kernel is not None
        windows = d.pooled_sizes(p, x.shape[2], x.shape[3])
        # Sums are wide, since a float16 may hold their quotient and not them.
        y = x.to(torch.promote_types(x.dtype, torch.float32)) if p.method == "AVE" else x
        divisors: list[Tensor] = []
        for axis, count, kernel, stride, pad in zip((2, 3), windows, p.kernel, p.stride, p.padding, strict=True):
            size = x.shape[axis]
            parts, divisor = [], []
            for index in range(count):
                begin = index * stride - pad
                inside = y.narrow(axis, min(max(begin, 0), size), max(min(begin + kernel, size) - max(begin, 0), 0))
                divisor.append(min(begin + kernel, size + pad) - begin)
                if p.method == "AVE":
                    parts.append(inside.sum(axis))
                elif inside.shape[axis]:
                    parts.append(inside.amax(axis))
                else:
                    lowest = torch.finfo(x.dtype).min
                    parts.append(y.new_full([n for i, n in enumerate(y.shape) if i != axis], lowest))
            y = torch.stack(parts, axis)
            divisors.append(torch.tensor(divisor, dtype=y.dtype, device=y.device))
        return y if p.method == "MAX" else (y / (divisors[0][:, None] * divisors[1])).to(x.dtype)

    def extra_repr(self) -> str:
        p = self.window
        window = "global" if p.kernel is None else f"{p.kernel}, stride={p.stride}, padding={p.padding}, {p.round_mode}"
        return f"{p.method}, {window}"


class Concat(nn.Module):
    """Operands one behind the other along ``axis``."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *operands: Tensor) -> Tensor:
        """operands: of one shape except along ``axis``."""
        return torch.cat(operands, self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


def build(layer: d.Layer, bottoms: list[d.Shape]) -> nn.Module | None:
    """The module that computes ``layer`` for bottoms of these shapes, any batch; None if there is none."""
    p, x = layer.parameters, bottoms[0]
    if isinstance(p, d.Convolution):
        sizes = (p.kernel, p.stride, p.padding, p.dilation)
        return nn.Conv2d(x[1], p.num_output, *sizes, groups=p.group, bias=p.bias_term)
    if isinstance(p, d.BatchNorm):
        return BatchNorm(x[1], p)
    if isinstance(p, d.Scale):
        own = len(bottoms) == 1
        shape = d.scale_shape(p, x) if own else bottoms[1]
        axis = d.axis_of(p.axis, x)
        return Scale(shape, len(x) - axis - len(shape), own, p.bias_term, axis)
    if isinstance(p, d.ReLU):
        return nn.ReLU() if p.negative_slope == 0 else nn.LeakyReLU(p.negative_slope)
    if isinstance(p, d.Eltwise):
        return Eltwise(p)
    if isinstance(p, d.Pooling):
        return Pooling(p)
    if isinstance(p, d.InnerProduct):
        return InnerProduct(math.prod(x[d.axis_of(p.axis, x) :]), p)
    if isinstance(p, d.Softmax):
        return nn.Softmax(p.axis)
    if isinstance(p, d.Dropout):
        return nn.Dropout(p.ratio)
    if isinstance(p, d.Concat):
        return Concat(p.axis)
    return None


def blobs(module: nn.Module) -> dict[str, Tensor]:
    """The module's blobs by name, in the order in which Caffe stores them: what it computes with, pruned or normed."""
    names: tuple[str, ...] = ()
    if isinstance(module, BatchNorm):
        names = ("mean", "variance", "factor")
    elif isinstance(module, nn.Conv2d | Scale | InnerProduct):
        names = ("weight", "bias")
    found = {name: getattr(module, name, None) for name in names}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
