"""What all kernels share on the host: a launch as a value, the precision of a product, powers of two, limits.

A kernel's file makes a ``Launch`` out of tensors, a problem and a config; whoever holds it runs it or only compiles it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

#: Offsets from this element count on need 64 bits.
WIDE_FROM = 2**31

_LARGEST_TILE = 2**16

ITEMSIZE = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}

#: The copy engine wants addresses and strides in multiples of this many bytes.
ALIGNMENT = 16


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is called with. ``options``: its compile-time constants, num_warps, num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> None:
        """Put it on the current stream of the current device (or run it in Triton's interpreter)."""
        self.kernel[self.grid](*self.args, **self.options)

    def compile(self) -> Any:
        """Compile for the active driver's target and return Triton's compiled kernel; nothing is launched."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.options)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(value: int, least: int, most: int) -> int:
    """Return the smallest power of two that is not below ``value``, within [least, most]."""
    return min(most, max(least, 1 << max(0, value - 1).bit_length()))


def dividing_power_of_two(value: int, most: int) -> int:
    """Return the largest power of two that divides ``value``, at most ``most``."""
    return min(most, value & -value)


def dot_precision(precision: str) -> str:
    """``tl.dot``'s input_precision; it means something for float32 operands only."""
    return "ieee" if precision == "fp32" else "tf32"


def aligned(*tensors: Any) -> bool:
    """Return whether the copy engine can address each tensor's first element."""
    return all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)


def wide(*tensors: Any) -> bool:
    """Return whether offsets into one of the tensors, masked ones of its last tile too, may not fit in 32 bits."""
    return any(tensor is not None and tensor.numel() >= WIDE_FROM - _LARGEST_TILE for tensor in tensors)


@lru_cache(maxsize=4096)
def image_box(n: int, p: int, q: int, pixels: int) -> tuple[int, int, int]:
    """Return a box of ``pixels`` (a power of two) [images, rows, columns], powers of two, that covers [N, P, Q] best.

    Least waste first; among equals the one with most pixels of one image, and the squarest.
    """

    def cost(box: tuple[int, int, int]) -> tuple[int, int, int]:
        covered = cdiv(n, box[0]) * cdiv(p, box[1]) * cdiv(q, box[2])
        return covered, box[0], abs(box[1].bit_length() - box[2].bit_length())

    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (h * w), h, w) for h in powers for w in powers if h * w <= pixels]
    return min(boxes, key=cost)
