"""Caffe's layers as modules, where torch.nn has none with the same arithmetic. Each computes one layer, nothing fused.

Definitions are those of BVLC/caffe (src/caffe/layers). ReLU, MAX and max-pooling hand NaN on, as torch does. `kinds`
says which layer has which module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CaffeError

if TYPE_CHECKING:
    from . import kinds, parameters


_NVIDIA_EPS = torch.tensor(1e-5).item()


class BatchNorm(nn.Module):
    """``(x - mean) / sqrt(variance + eps)`` along axis 1, without scale and shift.

    The buffers are the layer's blobs as a file has them: ``mean`` [C] and ``variance`` [C], sums that ``factor`` [1]
    divides (by 0 gives 0). They stay float32 in a half precision model, since the sums may exceed its range. The
    batch's statistics normalise where ``use_global_stats`` is False, or None in train mode; in train mode they are
    added to the sums as Caffe does.

    With ``scale_bias`` it is NVIDIA/caffe's layer: ``* weight + bias`` follows, parameters [C]; mean and variance are
    not divided, eps is at least 1e-5, and train mode needs ``use_global_stats`` True, since NVIDIA's averages also
    depend on how many batches a run has seen.
    """

    blob_names = ("mean", "variance", "factor", "weight", "bias")
    mean: Tensor
    variance: Tensor
    factor: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, channels: int, parameters: kinds.BatchNorm) -> None:
        super().__init__()
        self.scale_bias = parameters.scale_bias
        self.eps = max(parameters.eps, _NVIDIA_EPS) if self.scale_bias else parameters.eps
        self.use_global_stats = parameters.use_global_stats
        self.moving_average_fraction = parameters.moving_average_fraction
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("factor", torch.ones(1))
        self.register_parameter("weight", nn.Parameter(torch.ones(channels)) if self.scale_bias else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if self.scale_bias else None)

    @property
    def of_batch(self) -> bool:
        """Whether the batch's own statistics normalise now."""
        if self.scale_bias:
            return self.training and not self.use_global_stats
        return self.training if self.use_global_stats is None else not self.use_global_stats

    def statistics(self, wide: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] that the blobs stand for, in float64 if ``wide``."""
        mean, variance, factor = self.mean, self.variance, self.factor
        if wide:
            mean, variance, factor = mean.double(), variance.double(), factor.double()
        if self.scale_bias:
            return mean, variance
        inverse = torch.where(factor == 0, factor, 1 / factor)
        return mean * inverse, variance * inverse

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, ...] of any floating point dtype."""
        if self.of_batch:
            return self._of_batch(x)
        mean, variance = self.statistics()
        # F.batch_norm may refuse eps = 0, which Caffe takes.
        y = torch.batch_norm(x, None, None, mean, variance, False, 0.0, self.eps, torch.backends.cudnn.enabled)
        if self.weight is None or self.bias is None:
            return y
        shape = (-1, *(1,) * (x.dim() - 2))
        return y * self.weight.reshape(shape) + self.bias.reshape(shape)

    def _of_batch(self, x: Tensor) -> Tensor:
        if self.scale_bias:
            raise CaffeError(
                "a BatchNorm with scale_bias (NVIDIA's) has no batch statistics here; in train mode it needs "
                "use_global_stats: true, or BatchNorm and Scale in its place"
            )
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
        kind = ", scale_bias=True" if self.scale_bias else ""
        return f"{self.mean.shape[0]}, eps={self.eps:.6g}, use_global_stats={self.use_global_stats}{kind}"


class Scale(nn.Module):
    """``x * weight + bias``, weight and bias covering axes of x from ``axis`` on; or ``x * y + bias``.

    Args:
        shape: of weight and bias.
        trailing: how many axes of x follow those that are covered.
        weight: False where the second operand takes weight's place.
        bias: whether there is one.
    """

    blob_names = ("weight", "bias")
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, shape: parameters.Shape, trailing: int, weight: bool, bias: bool, axis: int = 1) -> None:
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

    def __init__(self, parameters: kinds.Eltwise) -> None:
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

    blob_names = ("weight", "bias")
    bias: nn.Parameter | None

    def __init__(self, features: int, parameters: kinds.InnerProduct) -> None:
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


def pooled_sizes(parameters: kinds.Pooling, height: int, width: int) -> tuple[int, int]:
    """How many windows fit, by Caffe's rule: one that begins beyond image and padding goes only if there is padding."""
    assert parameters.kernel is not None
    sizes = []
    for size, kernel, stride, pad in zip(
        (height, width), parameters.kernel, parameters.stride, parameters.padding, strict=True
    ):
        steps = size + 2 * pad - kernel
        windows = (-(-steps // stride) if parameters.round_mode == "CEIL" else steps // stride) + 1
        if any(parameters.padding) and (windows - 1) * stride >= size + pad:
            windows -= 1
        sizes.append(windows)
    return sizes[0], sizes[1]


class Pooling(nn.Module):
    """Max or average pooling by Caffe's rules.

    The number of windows is rounded up by default. An average divides by the window's size clipped to image and
    padding. A window that lies wholly beyond the image (only possible without padding and with gaps between windows)
    gives the lowest finite number, or 0 / 0, as in Caffe.
    """

    def __init__(self, parameters: kinds.Pooling) -> None:
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
        windows = pooled_sizes(p, x.shape[2], x.shape[3])
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


class LRN(nn.Module):
    """Local response normalisation of [N, C, H, W]: ``x / (k + alpha * mean of squares) ** beta``.

    The mean is over ``local_size`` channels, or a square of ``local_size`` pixels in one channel (then k is 1, whatever
    the file says, as in Caffe); what is beyond the blob counts as zeros. Sums are float32 in half precision too.
    """

    def __init__(self, parameters: kinds.LRN) -> None:
        super().__init__()
        self.window = parameters

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W] of any floating point dtype."""
        p = self.window
        if not x.numel():
            return x.clone()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        across = p.norm_region == "ACROSS_CHANNELS"
        sums = wide.square().unsqueeze(1)  # one channel of depth C
        for axis in (2,) if across else (3, 4):
            # Where the blob ends, zeros follow: a window need not reach further than the blob is wide.
            reach = min(p.local_size // 2, sums.shape[axis] - 1)
            padding, window = [0] * 6, [1, 1, 1]
            padding[2 * (4 - axis) : 2 * (4 - axis) + 2] = reach, reach
            window[axis - 2] = 2 * reach + 1
            sums = F.avg_pool3d(F.pad(sums, padding), window, 1, divisor_override=1)
        count = p.local_size if across else p.local_size * p.local_size
        scale = (p.k if across else 1.0) + sums.squeeze(1) * (p.alpha / count)
        return (wide * scale.pow(-p.beta)).to(x.dtype)

    def extra_repr(self) -> str:
        p = self.window
        return f"{p.local_size}, alpha={p.alpha:.6g}, beta={p.beta:.6g}, k={p.k:.6g}, {p.norm_region}"


class PReLU(nn.Module):
    """``max(x, 0) + weight * min(x, 0)``; weight [C], or of no axes for one slope. It begins as 0.25."""

    blob_names = ("weight",)

    def __init__(self, shape: parameters.Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, ...]."""
        return F.prelu(x, self.weight.reshape(-1))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class Power(nn.Module):
    """``(shift + scale * x) ** power``; if scale or power is 0 a constant, also where x is NaN."""

    def __init__(self, parameters: kinds.Power) -> None:
        super().__init__()
        self.power, self.scale, self.shift = parameters.power, parameters.scale, parameters.shift

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape."""
        if self.power * self.scale == 0:
            x = torch.full_like(x, self.shift)
        else:
            x = x if self.scale == 1 else x * self.scale
            x = x if self.shift == 0 else x + self.shift
        return x if self.power == 1 else x.pow(self.power)

    def extra_repr(self) -> str:
        return f"power={self.power:.6g}, scale={self.scale:.6g}, shift={self.shift:.6g}"


class TestDropout(nn.Module):
    """Dropout of a ratio with which nothing can be trained: x in eval mode, an error in train mode."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape."""
        if self.training:
            raise CaffeError(f"dropout_ratio is {self.ratio:g}; in train mode it must be 0 or more and less than 1")
        return x

    def extra_repr(self) -> str:
        return f"ratio={self.ratio:.6g}"


class Axpy(nn.Module):
    """``scale * x + y``."""

    def forward(self, scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """scale: [N, C], or with axes of size 1 behind; x, y: [N, C, ...]."""
        return scale.reshape(*x.shape[:2], *(1,) * (x.dim() - 2)) * x + y


class Crop(nn.Module):
    """The part of x that has the sizes of another blob."""

    def __init__(self, parameters: kinds.Crop) -> None:
        super().__init__()
        self.window = parameters

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """x: any shape; like: of as many axes, within x from the layer's axis on."""
        axis = self.window.axis % x.dim()
        for number, begin in enumerate(self.window.begins(tuple(x.shape), tuple(like.shape)), start=axis):
            x = x.narrow(number, begin, like.shape[number])
        return x

    def extra_repr(self) -> str:
        return f"axis={self.window.axis}, offset={self.window.offset or 0}"


class Reshape(nn.Module):
    """The same elements in another shape."""

    def __init__(self, parameters: kinds.Reshape | kinds.Flatten) -> None:
        super().__init__()
        self.rule = parameters

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape that the rule takes."""
        return x.reshape(self.rule.shape([tuple(x.shape)]))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self.rule).items())


class Flatten(Reshape):
    """Several axes as one."""


class Slice(nn.Module):
    """x cut along one axis into several parts."""

    def __init__(self, parameters: kinds.Slice, tops: int) -> None:
        super().__init__()
        self.rule, self.tops = parameters, tops

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: any shape that has the parts."""
        return torch.split(x, list(self.rule.sizes(tuple(x.shape), self.tops)), self.rule.axis)

    def extra_repr(self) -> str:
        return f"{self.tops}, axis={self.rule.axis}, slice_point={self.rule.slice_point}"


def blobs(module: nn.Module) -> dict[str, Tensor]:
    """The module's blobs by name, in the order in which Caffe stores them: what it computes with, pruned or normed."""
    plain = ("weight", "bias") if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) else ()
    found = {name: getattr(module, name, None) for name in getattr(module, "blob_names", plain)}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
