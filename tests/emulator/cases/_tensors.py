"""What the cases of several kernels share: how tensors lie in memory, and what shows a read or a write out of bounds.

A read that a missing bounds check lets through shows in one of three ways: it is of a neighbouring value, of NaN laid
around a tensor (``framed``), or AddressSanitizer's, behind a tensor that ends its allocation. A write shows in the NaN
around an output (``around``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.emulator.harness import Case

Results = Iterator[tuple[str, Tensor, Tensor, Tensor]]


def framed(tensor: Tensor, offset: int) -> Tensor:
    """A copy with the same strides in the middle of a buffer of NaN (of bytes: of 255)."""
    size = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    fill = 255 if tensor.dtype is torch.uint8 else float("nan")
    buffer = torch.full((size + offset + 4096,), fill, dtype=tensor.dtype)
    view = buffer[offset : offset + size].as_strided(tensor.shape, tensor.stride())
    view.copy_(tensor)
    return view


def placed(tensor: Tensor, problem: Any) -> Tensor:
    """A copy that ends its allocation, or lies in NaN if the problem is ``framed``."""
    return framed(tensor, problem.offset) if problem.framed else tensor.clone()


def around(name: str, output: Tensor) -> Results:
    """What lies around a framed output, which is to be as it was."""
    whole = output.as_strided((output.untyped_storage().nbytes() // output.element_size(),), (1,), 0)
    begin = output.storage_offset()
    found = torch.cat([whole[:begin], whole[begin + output.numel() :]])
    nan = torch.full_like(found, float("nan"))
    yield f"around {name}", found, nan, nan.double()


def spoil(values: Tensor, positions: Sequence[int]) -> None:
    """Put NaN, infinity and minus infinity, in turn, at these positions of a tensor."""
    for i, position in enumerate(positions):
        values.view(-1)[position] = (float("nan"), float("inf"), -float("inf"))[i % 3]


def rounded_to_tf32(t: Tensor) -> Tensor:
    """Ten bits of significand, to nearest; NaN and infinities as they are."""
    bits = t.contiguous().view(torch.int32)
    return torch.where(t.isfinite(), (bits + 0x1000 & ~0x1FFF).view(torch.float32), t)


def asserted(what: str) -> Results:
    """The result of a case that holds by its assertions alone."""
    one = torch.ones(1)
    yield what, one, one, one.double()


def case(run: Callable[..., Results], name: str, how: str, problem: Any) -> Case:
    """A problem by ``run(native, how, problem)``; ``how`` is a precision or a kernel."""
    return Case(f"{name}[{how}]", functools.partial(run, how=how, problem=problem))
