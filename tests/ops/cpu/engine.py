"""The CPU engine's module called with tensors, and what plain torch makes of the same layer.

Tests that import this are skipped in a checkout without the module. Nothing of ``resnet_fast`` but ``_cpu`` is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

_cpu = pytest.importorskip("resnet_fast._cpu", reason="the CPU engine is not built here (make engine)")

ALGORITHMS = ("direct", "winograd2", "winograd4")
DTYPES = (torch.float32, torch.bfloat16)
GUARD = 0 if _cpu.build_info()["sanitizer"] else 97
"""Elements around each buffer that nobody may write; NaN, so that a sum shows if they were read. A sanitizer has zones
of its own. An odd number: nothing but an element's own alignment is asked of a caller."""


class Buffer:
    """A channels_last tensor [n, c, h, w] within guard zones, full of NaN or of a copy."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, source: Tensor | None = None) -> None:
        n, c, h, w = shape
        count = n * c * h * w
        self._all = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype)
        self.tensor = self._all[GUARD : GUARD + count].view(n, h, w, c).permute(0, 3, 1, 2)
        if source is not None:
            self.tensor.copy_(source)

    @property
    def address(self) -> int:
        return self._all.data_ptr() + self._all.itemsize * GUARD

    def intact(self) -> bool:
        """Return whether the guard zones are as they were."""
        ends = torch.cat([self._all[:GUARD], self._all[self._all.numel() - GUARD :]])
        return bool(ends.isnan().all())


@dataclass(frozen=True)
class Problem:
    """One convolution with all that is fused with it. ``residual`` [n, k, p, q] or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    relu: bool = False
    residual_after_relu: bool = False
    name: str = field(default="", compare=False)

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem in ``dtype``; weights are rounded to it, but float32 as the engine takes them."""
        residual = None if self.residual is None else self.residual.to(dtype)
        return replace(self, x=self.x.to(dtype), weight=self.weight.to(dtype).float(), residual=residual)

    def reference(self, dtype: torch.dtype | None = None) -> Tensor:
        """Plain torch's result in ``dtype``, x's if there is none."""
        dtype = dtype or self.x.dtype
        out = F.conv2d(
            self.x.to(dtype),
            self.weight.to(dtype),
            self.bias.to(dtype),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        if self.residual is None:
            return F.relu(out) if self.relu else out
        if self.residual_after_relu:
            return (F.relu(out) if self.relu else out) + self.residual.to(dtype)
        out = out + self.residual.to(dtype)
        return F.relu(out) if self.relu else out

    def winograd_possible(self) -> bool:
        square = tuple(self.weight.shape[2:]) == (3, 3)
        return square and self.groups == 1 and self.stride == self.dilation == (1, 1)

    def algorithms(self) -> tuple[str, ...]:
        """Those that compute it."""
        return ALGORITHMS if self.winograd_possible() else ALGORITHMS[:1]

    def layer(self) -> _cpu.Convolution:
        """Its weights, packed."""
        return packed(self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.x.dtype)

    def run(self, algorithm: str = "auto", threads: int = 1, layer: _cpu.Convolution | None = None) -> Tensor:
        """Return the engine's result, after a look at what is around the buffers."""
        layer = layer or self.layer()
        n, _, h, w = self.x.shape
        dtype = self.x.dtype
        x = Buffer(self.x.shape, dtype, self.x)
        shape = conv_shape(self)
        residual = None if self.residual is None else Buffer(shape, dtype, self.residual)
        out = Buffer(shape, dtype)
        layer.run(
            x=x.address,
            n=n,
            h=h,
            w=w,
            residual=residual.address if residual else 0,
            out=out.address,
            relu=self.relu,
            residual_after_relu=self.residual_after_relu,
            threads=threads,
            algorithm=algorithm,
        )
        for buffer, source in ((x, self.x), (residual, self.residual)):
            if buffer is not None and source is not None:
                assert same(buffer.tensor, source), f"{self.name}: an input was written to"
        for buffer in (x, residual, out):
            assert buffer is None or buffer.intact(), f"{self.name}: written beside a buffer"
        return out.tensor


def packed(
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> _cpu.Convolution:
    """Return weight [k, c / groups, r, s] and bias [k], both float32, as the engine's layer for images of ``dtype``."""
    weight, bias = weight.contiguous(), bias.contiguous()
    k, c, r, s = weight.shape
    return _cpu.Convolution(
        weight.data_ptr(), bias.data_ptr(), k, c * groups, groups, (r, s), stride, padding, dilation, name_of(dtype)
    )


def name_of(dtype: torch.dtype) -> str:
    """Return what the engine calls it."""
    return str(dtype).removeprefix("torch.")


def conv_shape(problem: Problem) -> tuple[int, int, int, int]:
    """Return the shape of a convolution's result."""
    n, _, *size = problem.x.shape
    k, _, *window = problem.weight.shape
    p, q = (
        (size[i] + 2 * problem.padding[i] - problem.dilation[i] * (window[i] - 1) - 1) // problem.stride[i] + 1
        for i in range(2)
    )
    return n, k, p, q


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether every value is equal, and NaN where the other is NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same bits, that of the sign of zero and those of NaN included."""
    bits = torch.int32 if a.itemsize == 4 else torch.int16
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(
        a.contiguous().view(bits), b.contiguous().view(bits)
    )


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Return whether numbers have the same bits, and NaN of any bits stands where the other has it."""
    nan = torch.tensor(torch.nan, dtype=a.dtype)
    return a.dtype is b.dtype and same_bits(torch.where(a.isnan(), nan, a), torch.where(b.isnan(), nan, b))


def given(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return how a plan takes a tensor: address, shape, strides."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def run_plan(plan: _cpu.Plan, *inputs: Tensor, threads: int = 1) -> list[Tensor]:
    """Return a plan's outputs, after a look at what is around them."""
    images = [given(each) for each in inputs]
    outputs = [Buffer(shape, inputs[0].dtype) for shape in plan.shapes(images)]
    plan.run(images, [each.address for each in outputs], threads)
    assert all(each.intact() for each in outputs), "written beside an output"
    return [each.tensor for each in outputs]
