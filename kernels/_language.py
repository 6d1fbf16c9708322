"""Pieces of kernels that several files use inside theirs."""

import triton
import triton.language as tl

#: Triton's interpreter (TRITON_INTERPRET=1) keeps bfloat16 as bits and would multiply those.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def relu(x):
    """max(x, 0) of a float32 tile; NaN stays NaN, which a plain maximum would turn into 0."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b with float32 accumulation; ``PRECISION`` ("tf32", "ieee") matters for float32 operands."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def rounded(y, dtype: tl.constexpr):
    """A float32 tile in ``dtype``, rounded to nearest even as the hardware does; the interpreter cuts bfloat16 off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        nearest = tl.where(y != y, 0x7FC00000, bits + (0x7FFF + ((bits >> 16) & 1)))
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return y.to(dtype)
